"""From a stored sample to the pairs that are compared, with images in which each pixel holds its own ground position.

What is expected is read off the pixels alone: no map of a view enters it.
"""

import functools

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest

from skyjax.input.device import prepare
from skyjax.input.views import make_views, plan_views
from skyjax.objectives import heads, objective
from skyjax.sample import Sample, Sequence

# Modality -> sensor, bands, pixels a side and metres a pixel of the stored images, dates, pixels a patch.
STORED = {
    "optical": ("aerial", ("red", "green"), 128, 0.5, 1, 4),
    "multispectral": ("sentinel2-l2a", ("B02", "B03"), 32, 2.5, 4, 2),
    "sar": ("sentinel1-grd", ("VV", "VH"), 24, 4.0, 3, 2),
}
MODALITIES = tuple(STORED)
B, GLOBAL, LOCAL = 12, 2, 2
AUGMENT = {
    "date_jitter": 5,
    "drop_date": 0.3,
    "drop_modality": 0.2,
    **dict.fromkeys(("brightness", "contrast", "saturation", "blur", "solarize", "speckle", "gain"), 0.0),
}
CONFIG = ml_collections.ConfigDict(
    {
        "kind": "infonce",
        "head_hidden": 4,
        "head_bottleneck": 4,
        "weights": {"pixel": 1.0, "object": 0.0, "image": 0.0, "alignment": 0.0, "spread": 0.0},
        "pixel": {"tokens": 1000},
    }
)
MODEL = ml_collections.ConfigDict(
    {
        "modalities": {m: {"sensors": (sensor,), "bands": bands} for m, (sensor, bands, *_) in STORED.items()},
        "spatial_width": 4,
        "fusion": {"width": 4},
    }
)


def site():
    """Three images of 64, 80 and 96 m around one place: radar and multispectral reach beyond what all share."""
    sequences = {}
    for m, (sensor, bands, side, metres, dates, _) in STORED.items():
        half = side * metres / 2
        north = half - (np.arange(side) + 0.5) * metres
        places = np.stack(np.meshgrid(north, -north, indexing="ij"), -1).astype(np.float32)
        sequences[m] = Sequence(
            np.repeat(places[None], dates, 0),
            np.arange(dates, dtype=np.int32) * 7 + 18_000,  # nearer than twice the jitter
            np.ones(dates, bool),
            np.ones((dates, side, side), bool),
            sensor,
            bands,
            np.array([half, -half, -half, half], np.float32),
        )
    return Sample(sequences, np.array([7.0, 50.0], np.float32), id="site")


@functools.cache
def batch(native):
    """Views of the site at `B` positions of the global order, prepared as the step does it."""
    data = ml_collections.ConfigDict(
        {
            "dates": {"optical": 1, "multispectral": 3, "sar": 2},
            "global_views": {
                "size": {"optical": 24, "multispectral": 12, "sar": 8},
                "area": None if native else (0.3, 1.0),
            },
            "local_views": {
                "count": LOCAL,
                "size": {"optical": 12, "multispectral": 6, "sar": 4},
                "area": None if native else (0.1, 0.3),
                "dates": {"optical": 1, "multispectral": 2, "sar": 1},
            },
            "augment": AUGMENT,
        }
    )
    plan = plan_views(data, MODEL, dict.fromkeys(MODALITIES, "float32"))
    views = jax.tree.map(lambda *x: np.stack(x), *(make_views(site(), plan, 3, index) for index in range(B)))
    nothing = {m: (np.zeros((1, 2), np.float32), np.ones((1, 2), np.float32)) for m in MODALITIES}
    return jax.device_get(prepare(views, statistics=nothing, augment=data.augment, seed=3))


def encode(views, *, student, hidden):
    """A stand-in whose token is its patch's mean: north, east, day, number of the view. Fused: one date of them."""
    spatial, valid = {}, {}
    for m in MODALITIES:
        values = views[m]["values"]
        b, v, t, size, _, _ = values.shape
        patch = STORED[m][-1]
        grid = size // patch
        tokens = values.reshape(b, v, t, grid, patch, grid, patch, 2).mean((4, 6))
        day = np.broadcast_to(views[m]["days"][..., None, None, None], (*tokens.shape[:-1], 1))
        view = np.broadcast_to(np.arange(v)[:, None, None, None, None], (*tokens.shape[:-1], 1))
        spatial[m] = np.concatenate([tokens, day, view], -1).astype(np.float32)
        seen = views[m]["student_valid" if student else "valid"]
        valid[m] = np.broadcast_to(seen[..., None, None], tokens.shape[:-1])
        if hidden and not student:
            valid[m] = valid[m] & (np.random.default_rng(1).random(valid[m].shape) < 0.7)
    fused = spatial["multispectral"][:, :, 0] * [1, 1, 0, 1]
    return {
        "spatial": spatial,
        "spatial_valid": valid,
        "fused": fused.astype(np.float32),
        "fused_valid": np.ones(fused.shape[:-1], bool),
    }


@functools.cache
def compiled():
    """The objective up to the rows that it would score: stream -> rows of the pixel level."""

    def run(student, teacher, views):
        rows = {}

        def keep(found, *_, **__):
            rows[len(rows)] = found
            return jnp.float32(0)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(objective, "distil", keep)
            parameters = heads.init_heads(CONFIG, MODEL, jax.random.key(0))
            objective.objective(
                CONFIG,
                student,
                teacher,
                views,
                parameters,
                parameters,
                index=jnp.arange(B),
                seed=0,
                teacher_temperature=0.05,
            )
        return dict(zip((*MODALITIES, "fused"), rows.values(), strict=True))

    return jax.jit(run)


def compared(native, hidden):
    """Outputs of student and teacher, and the rows, of one batch."""
    views = batch(native)
    groups = {name: views[name] for name in ("global", "local")}
    student = {name: encode(images, student=True, hidden=hidden) for name, images in groups.items()}
    teacher = {"global": encode(groups["global"], student=False, hidden=hidden)}
    return groups, student, teacher, jax.device_get(compiled()(student, teacher, groups))


def tokens_of(output, stream):
    """(b, v, t, h, w, 4), of the fused map as one date."""
    return output["fused"][:, :, None] if stream == "fused" else output["spatial"][stream]


def pitch(tokens):
    """Metres a token, of each view: (b, v). The same along both axes, whichever way the view was turned."""
    steps = np.abs(np.diff(tokens[:, :, 0, :, 0, :2], axis=2)).sum(-1)
    return steps.mean(-1)


@pytest.mark.parametrize("hidden", [False, True])
@pytest.mark.parametrize("native", [False, True])
@pytest.mark.parametrize("stream", [*MODALITIES, "fused"])
def test_what_is_compared_lies_on_the_same_ground_to_half_a_token(stream, native, hidden):
    _, _, teacher, rows = compared(native, hidden)
    drawn = rows[stream].weight > 0
    sample, _ = np.nonzero(drawn)
    mine, other = rows[stream].student[drawn], rows[stream].teacher[drawn]
    assert len(mine) > 100
    np.testing.assert_allclose(mine[:, 2], other[:, 2], atol=0.1)  # the day
    token = pitch(tokens_of(teacher["global"], stream))[sample, np.round(other[:, 3]).astype(int)]
    error = np.abs(mine[:, :2] - other[:, :2]).max(1)
    # Half a token: where a neighbour is hidden or beyond the border, the others stand for it. A resampled image's own
    # pixels are out by up to half a stored pixel at its border.
    assert (error <= token / 2 + STORED["optical"][3] / 2).all(), (error / token).max()
    assert np.median(error / token) < (0.3 if hidden else 0.02)


@pytest.mark.parametrize("native", [False, True])
@pytest.mark.parametrize("stream", [*MODALITIES, "fused"])
def test_tokens_outside_the_overlap_are_masked_and_no_others(stream, native):
    groups, student, teacher, rows = compared(native, False)
    other = tokens_of(teacher["global"], stream)
    half = pitch(other) / 2
    low, high = other[:, :, 0, ..., :2].min((2, 3)), other[:, :, 0, ..., :2].max((2, 3))  # b v 2
    want, outside = [], 0
    for name in ("global", "local"):
        own = tokens_of(student[name], stream)
        for v in range(own.shape[1]):
            for u in range(GLOBAL):
                if name == "global" and u == v:
                    continue
                places = own[:, v, ..., :2]  # b t h w 2
                box = [(x[:, u] + s * half[:, u, None])[:, None, None, None] for x, s in ((low, -1), (high, 1))]
                inside = np.all((places >= box[0] - 0.05) & (places <= box[1] + 0.05), -1)
                outside += (~inside).sum()
                if stream != "fused":
                    images, taught = groups[name][stream], groups["global"][stream]
                    same = images["days"][:, v, :, None] == taught["days"][:, u, None]
                    dated = (same & taught["valid"][:, u, None]).any(-1) & images["student_valid"][:, v]
                    inside &= dated[..., None, None]
                else:
                    inside &= student[name]["fused_valid"][:, v, None]
                want.append(inside.reshape(B, -1))
    want = np.concatenate(want, 1)
    assert rows[stream].weight.shape == want.shape
    assert outside > 100
    # Each pair and date has its places in an order of its own; which they are, the ground tells.
    for i in range(B):
        got = rows[stream].student[i][rows[stream].weight[i] > 0]
        mine = np.concatenate([_repeated(tokens_of(student[name], stream)[i], name) for name in ("global", "local")])
        wanted = mine[want[i]]
        assert sorted(map(tuple, np.round(got, 2).tolist())) == sorted(map(tuple, np.round(wanted, 2).tolist()))


def _repeated(tokens, name):
    """A sample's tokens, those of a local view once for each of the teacher's views."""
    times = 1 if name == "global" else GLOBAL
    return np.repeat(tokens, times, axis=0).reshape(-1, 4)


def test_every_flip_and_turn_is_among_the_views_and_dates_are_lost():
    for native in (False, True):
        groups = [batch(native)[name] for name in ("global", "local")]
        maps = np.concatenate([views["to_view"].reshape(-1, 2, 3) for views in groups])
        assert len(np.unique(np.sign(np.round(maps[..., :2], 6)).reshape(-1, 4), axis=0)) == 8
        for views in groups:
            for m in ("multispectral", "sar"):
                assert (views[m]["valid"] & ~views[m]["student_valid"]).any()
                assert (views[m]["valid"] & (views[m]["days"] != views[m]["student_days"])).any()
