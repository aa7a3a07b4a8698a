import dataclasses

import ml_collections
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from skyjax.errors import BadRecord, UserError
from skyjax.input.views import Crop, band_positions, make_views, plan_views
from skyjax.sample import Sample, Sequence, empty_sample

SENSORS = {"optical": "aerial", "multispectral": "sentinel2-l2a", "sar": "sentinel1-grd"}
BANDS = {"optical": ("red", "green"), "multispectral": ("B02", "B03"), "sar": ("VV", "VH")}
TYPES = dict.fromkeys(BANDS, "float32")


def configs(**changes):
    """`data` and `model`; a change is named by its path with "__" between keys."""
    config = ml_collections.ConfigDict(
        {
            "data": {
                "dates": {"optical": 1, "multispectral": 3, "sar": 2},
                "global_views": {"size": {"optical": 20, "multispectral": 7, "sar": 5}, "area": (0.5, 1.0)},
                "local_views": {
                    "count": 3,
                    "size": {"optical": 8, "multispectral": 4, "sar": 3},
                    "area": (0.1, 0.4),
                    "dates": {"optical": 1, "multispectral": 2, "sar": 1},
                },
                "augment": {"date_jitter": 4, "drop_date": 0.3, "drop_modality": 0.3},
            },
            "model": {
                "modalities": {m: {"sensors": (SENSORS[m],), "bands": BANDS[m]} for m in SENSORS},
            },
        }
    )
    for path, value in changes.items():
        *parents, last = path.split("__")
        node = config
        for key in parents:
            node = node[key]
        node[last] = value
    return config


def plan(types=None, **changes):
    config = configs(**changes)
    return plan_views(config.data, config.model, types or TYPES)


def sequence(modality, extent, shape, t=6, **fields):
    """A picture of where it was taken: each pixel holds its own metres north (band 0) and east (band 1)."""
    top, left, bottom, right = extent
    h, w = shape
    north = top + (np.arange(h) + 0.5) / h * (bottom - top)
    east = left + (np.arange(w) + 0.5) / w * (right - left)
    values = np.broadcast_to(np.stack(np.meshgrid(north, east, indexing="ij"), -1), (t, h, w, 2)).astype(np.float32)
    stored = {
        "values": values,
        "days": np.arange(t, dtype=np.int32) * 10 + 18_000,
        "valid": np.ones(t, bool),
        "clear": np.ones((t, h, w), bool),
        "sensor": SENSORS[modality],
        "bands": BANDS[modality],
        "extent": np.array(extent, np.float32),
    }
    return Sequence(**(stored | fields))


def site(**changes):
    """Three footprints that overlap, of 0.8, 10 and 4 by 5 m pixels; the ground shared is 56 by 60 m."""
    sequences = {
        "optical": sequence("optical", (30.4, -30.4, -30.4, 30.4), (76, 76), t=1),
        "multispectral": sequence("multispectral", (28, -30, -32, 30), (6, 6)),
        "sar": sequence("sar", (40, -45, -28, 45), (17, 18), t=4),
    }
    return Sample({**sequences, **changes}, np.array([10.0, 52.0], np.float32), id="site")


GROUND = (28.0, -30.0, -28.0, 30.0)


def invert(to_view, points):
    """Points of a view's unit square -> (row, column) in the sample's."""
    return np.linalg.solve(to_view[:, :2].astype(float), (points - to_view[:, 2]).T).T


def test_every_view_pixel_shows_the_ground_where_its_map_says():
    """All modalities, global and local views, all eight flips and turns: to within half a pixel of the view."""
    spec, sample, elements = plan(), site(), set()
    for index in range(24):
        views = make_views(sample, spec, 3, index)
        for group in ("global", "local"):
            for view, to_view in enumerate(views[group]["to_view"]):
                elements.add(tuple(np.sign(np.round(to_view[:, :2], 6)).ravel().astype(int)))
                for m, stored in sample.sequences.items():
                    values = views[group][m]["values"][view]
                    size = values.shape[1]
                    points = (np.stack(np.mgrid[:size, :size], -1).reshape(-1, 2) + 0.5) / size
                    rows, columns = invert(to_view, points).T
                    metres = np.stack([GROUND[0] - rows * 56, GROUND[1] + columns * 60], -1)
                    # Between a sequence's border and the centres of its border pixels nothing was measured.
                    centres = stored.values[0].reshape(-1, 2)
                    metres = np.clip(metres, centres.min(0), centres.max(0))
                    sides = np.abs(np.linalg.inv(to_view[:, :2].astype(float)) @ [[1, 0], [0, 1]]).sum(1) * [56, 60]
                    half = np.maximum(sides / size / 2, 1e-3)
                    error = np.abs(values[0].reshape(-1, 2) - metres)
                    assert (error <= half).all(), (group, m, index, error.max(0), half)
    assert len(elements) == 8


crops = st.builds(
    lambda top, left, height, width, element: Crop(
        top * (1 - height), left * (1 - width), top * (1 - height) + height, left * (1 - width) + width, element
    ),
    *(st.floats(0, 1),) * 2,
    *(st.floats(0.01, 1),) * 2,
    st.integers(0, 7),
)


@given(crops)
def test_the_map_takes_the_box_to_the_unit_square(crop):
    corners = np.array([[r, c] for r in (crop.top, crop.bottom) for c in (crop.left, crop.right)])
    mapped = corners @ crop.to_view[:, :2].T + crop.to_view[:, 2]
    np.testing.assert_allclose(sorted(map(tuple, np.round(mapped, 6) + 0.0)), [(0, 0), (0, 1), (1, 0), (1, 1)])


@given(crops, st.integers(1, 5))
def test_turning_pixels_agrees_with_the_map(crop, n):
    """A view of n x n cells of the box: the cell that holds a number stands where the map sends its centre."""
    cells = np.arange(n * n).reshape(1, n, n, 1)
    turned = crop.turn(cells)[0, :, :, 0]
    centre = (np.stack(np.mgrid[:n, :n], -1).reshape(-1, 2) + 0.5) / n
    ground = [crop.top, crop.left] + centre * [crop.bottom - crop.top, crop.right - crop.left]
    place = np.floor((ground @ crop.to_view[:, :2].T + crop.to_view[:, 2]) * n + 1e-6).astype(int)
    np.testing.assert_array_equal(turned[place[:, 0], place[:, 1]], np.arange(n * n))


def boxes(to_view):
    """Top, left, bottom, right in the sample's unit square of each view."""
    corners = [invert(affine, np.array([[0.0, 0.0], [1.0, 1.0]])) for affine in to_view]
    return np.array([[*c.min(0), *c.max(0)] for c in corners])


@settings(max_examples=40, deadline=None)
@given(
    index=st.integers(0, 2**33),
    low=st.floats(0.05, 1),
    high=st.floats(0.05, 1),
    height=st.floats(20, 500),
    width=st.floats(20, 500),
)
def test_boxes_lie_on_the_ground_and_meet(index, low, high, height, width):
    low, high = sorted((low, high))
    spec = plan(data__global_views__area=(low, high))
    sample = Sample({"sar": sequence("sar", (height, 0, 0, width), (12, 15))}, np.zeros(2, np.float32))
    views = make_views(sample, spec, 0, index)
    for group in ("global", "local"):
        box = boxes(views[group]["to_view"])
        assert (box >= -1e-5).all()
        assert (box <= 1 + 1e-5).all()
        metres = (box[:, 2:] - box[:, :2]) * [height, width]
        np.testing.assert_allclose(metres[:, 0], metres[:, 1], rtol=1e-3)  # square on the ground
        share = metres.prod(1) / (height * width)
        area = spec.groups[group].area
        largest = min(height, width) ** 2 / (height * width)  # of a square in the site
        assert (share >= min(area[0], largest) - 1e-4).all()
        assert (share <= min(area[1], largest) + 1e-4).all()
    first, second = boxes(views["global"]["to_view"])
    # The views are square, so that sharing ground on both axes says that they meet.
    assert (np.minimum(first[2:], second[2:]) > np.maximum(first[:2], second[:2])).all()
    for number, local in enumerate(boxes(views["local"]["to_view"])):
        around = (first, second)[number % 2]
        overlap = np.minimum(local[2:], around[2:]) - np.maximum(local[:2], around[:2])
        whole = np.minimum(local[2:] - local[:2], around[2:] - around[:2])
        if (local[2:] - local[:2] <= around[2:] - around[:2] + 1e-6).all():
            np.testing.assert_allclose(overlap, whole, atol=1e-4)  # inside
        else:
            assert (overlap > 0).all()


def test_native_scale_takes_whole_pixels_of_the_grid_and_resamples_nothing():
    spec = plan(
        data__global_views__area=None,
        data__local_views__area=None,
        data__global_views__size={"optical": 24, "multispectral": 12, "sar": 6},
    )
    rng = np.random.default_rng(0)
    sequences = {
        m: dataclasses.replace(s, values=rng.normal(size=s.values.shape).astype(np.float32))
        for m, s in {
            "multispectral": sequence("multispectral", (200, 0, 0, 200), (20, 20)),
            "optical": sequence("optical", (200, 0, 0, 200), (40, 40), t=1),  # 5 m, twice the grid's
        }.items()
    }
    sample = Sample(sequences, np.zeros(2, np.float32))
    for index in range(12):
        views = make_views(sample, spec, 0, index)
        for view, box in enumerate(boxes(views["global"]["to_view"])):
            np.testing.assert_allclose(box * 20, np.round(box * 20), atol=1e-4)
            for m, factor in (("multispectral", 1), ("optical", 2)):
                top, left, bottom, right = np.round(box * 20 * factor).astype(int)
                day = views["global"][m]["days"][view, 0]
                date = int(np.flatnonzero(sequences[m].days == day)[0])
                want = sequences[m].values[date, top:bottom, left:right, 0]
                got = views["global"][m]["values"][view, 0, :, :, 0]
                assert got.shape == want.shape == (12 * factor,) * 2
                turns = [np.rot90(w, k) for k in range(4) for w in (want, want.T)]
                assert any(np.array_equal(got, turned) for turned in turns)


def test_native_scale_on_a_site_that_is_too_small_takes_all_of_it():
    spec = plan(data__global_views__area=None)
    sample = Sample({"multispectral": sequence("multispectral", (40, 0, 0, 40), (4, 4))}, np.zeros(2, np.float32))
    views = make_views(sample, spec, 0, 0)
    np.testing.assert_allclose(boxes(views["global"]["to_view"]), [[0, 0, 1, 1]] * 2, atol=1e-6)


def test_dates_are_drawn_once_among_the_valid_and_locals_take_some_of_them():
    valid = np.array([True, False, True, True, False, True])
    sample = site(multispectral=sequence("multispectral", (28, -30, -32, 30), (6, 6), valid=valid))
    drawn = set()
    for index in range(20):
        views = make_views(sample, plan(), 0, index)
        images, local = views["global"]["multispectral"], views["local"]["multispectral"]
        np.testing.assert_array_equal(images["days"][0], images["days"][1])
        assert (np.diff(images["days"][0]) > 0).all()
        assert images["valid"].all()
        assert set(images["days"][0]) <= set(sample.sequences["multispectral"].days[valid])
        for days in local["days"]:
            assert (np.diff(days) > 0).all()
            assert set(days) <= set(images["days"][0])
        drawn.add(tuple(images["days"][0]))
    assert len(drawn) == 4  # all choices of 3 valid dates in 4


def test_fewer_dates_than_asked_are_masked():
    views = make_views(site(sar=sequence("sar", (40, -45, -28, 45), (17, 18), t=1)), plan(), 0, 5)
    np.testing.assert_array_equal(views["global"]["sar"]["valid"], [[True, False]] * 2)
    assert not views["global"]["sar"]["clear"][:, 1].any()
    assert not views["global"]["sar"]["student_valid"][:, 1].any()
    np.testing.assert_array_equal(views["global"]["sar"]["student_days"][:, 1], 0)


def test_the_student_loses_dates_but_never_all_that_shows_something():
    clear = np.ones((6, 6, 6), bool)
    clear[:5] = False  # one clear date in six
    sample = Sample({"multispectral": sequence("multispectral", (28, -30, -32, 30), (6, 6), clear=clear)}, np.zeros(2))
    spec = plan(data__augment__drop_date=1.0, data__dates__multispectral=6)
    for index in range(8):
        images = make_views(sample, spec, 0, index)["global"]["multispectral"]
        assert images["valid"].all()
        np.testing.assert_array_equal(images["student_valid"], [[False] * 5 + [True]] * 2)


def test_dropping_and_jitter_have_the_asked_rates_and_switch_off():
    sample, spec = site(), plan(data__augment__drop_modality=0.0)
    kept, shifts = [], []
    for index in range(150):
        images = make_views(sample, spec, 0, index)["global"]["multispectral"]
        kept.append(images["student_valid"])
        shifts.append(images["student_days"] - images["days"])
    assert abs(np.mean(kept) - 0.7) < 0.06
    assert set(np.unique(shifts)) == set(range(-4, 5))
    off = plan(**{f"data__augment__{key}": 0 for key in ("drop_date", "drop_modality", "date_jitter")})
    for group in ("global", "local"):
        for images in list(make_views(sample, off, 0, 1)[group].values())[1:]:
            np.testing.assert_array_equal(images["student_valid"], images["valid"])
            np.testing.assert_array_equal(images["student_days"], images["days"])


def test_a_modality_is_dropped_whole():
    sample, spec = site(), plan(data__augment__drop_modality=0.5, data__augment__drop_date=0.0)
    views = [make_views(sample, spec, 0, index)["global"] for index in range(60)]
    shown = {m: np.concatenate([view[m]["student_valid"] for view in views]) for m in SENSORS}
    alone = sum(kept.sum(1) for kept in shown.values()) == 1  # all were dropped, and one date given back
    assert alone.mean() < 0.3
    for kept in shown.values():
        assert (kept.all(1) | ~kept.any(1) | alone).all()
        assert 0.3 < 1 - kept.any(1).mean() < 0.6


def test_a_sample_with_nothing_has_the_same_shapes_and_types_and_finite_maps():
    full, nothing = (make_views(sample, plan(), 0, 7) for sample in (site(), empty_sample("x", "y")))

    def flat(tree, path=()):
        if not isinstance(tree, dict):
            return {path: (np.shape(tree), np.asarray(tree).dtype)}
        return {k: v for name, child in tree.items() for k, v in flat(child, (*path, name)).items()}

    assert flat(full) == flat(nothing)
    for group in ("global", "local"):
        assert np.isfinite(np.linalg.inv(nothing[group]["to_view"][..., :2])).all()
        for m in SENSORS:
            for mask in ("valid", "student_valid", "clear", "bands"):
                assert not nothing[group][m][mask].any()


def test_views_are_a_function_of_seed_and_position():
    def values(seed, index):
        return make_views(site(), plan(), seed, index)["global"]["optical"]["values"]

    np.testing.assert_array_equal(values(1, 2), values(1, 2))
    assert not np.array_equal(values(1, 2), values(1, 3))
    assert not np.array_equal(values(1, 2), values(2, 2))


def test_bands_are_found_by_name_then_common_name_and_missing_ones_are_masked():
    stored = ("B04", "B08", "B02")
    slots, sources = band_positions("sentinel2-l2a", stored, ("blue", "B8A", "B04", "nir", "no such band"))
    np.testing.assert_array_equal(slots, [0, 2, 3])
    np.testing.assert_array_equal(sources, [2, 0, 1])

    spec = plan(model__modalities__optical__bands=("nir", "green", "blue", "red"))
    images = make_views(site(), spec, 0, 0)["global"]["optical"]
    np.testing.assert_array_equal(images["bands"], [False, True, False, True])
    rows, columns = images["values"][..., 3], images["values"][..., 1]  # red holds metres north, green metres east
    want = make_views(site(), plan(), 0, 0)["global"]["optical"]["values"]
    np.testing.assert_array_equal(rows, want[..., 0])
    np.testing.assert_array_equal(columns, want[..., 1])
    np.testing.assert_array_equal(images["values"][..., [0, 2]], 0)


def test_the_sensor_is_its_row_in_the_model():
    spec = plan(model__modalities__optical__sensors=("rgb", "naip", "aerial"))
    assert make_views(site(), spec, 0, 0)["global"]["optical"]["sensor"] == 2


def test_a_narrow_type_goes_into_a_wider_batch_unchanged():
    stored = sequence("optical", (30.4, -30.4, -30.4, 30.4), (76, 76), t=1)
    values = np.random.default_rng(0).integers(0, 255, stored.values.shape, np.uint8)
    sample = Sample({"optical": dataclasses.replace(stored, values=values)}, np.zeros(2))
    narrow, wide = (
        make_views(sample, plan(TYPES | {"optical": t}), 0, 0)["global"]["optical"]["values"]
        for t in ("uint8", "uint16")
    )
    assert (narrow.dtype, wide.dtype) == (np.uint8, np.uint16)
    np.testing.assert_array_equal(narrow, wide)
    with pytest.raises(BadRecord, match=r"stored as float32, but its data set says uint8"):
        make_views(site(), plan(TYPES | {"optical": "uint8"}), 0, 0)


def test_bad_samples_are_named():
    with pytest.raises(BadRecord, match=r'site: sensor "rgb" is not among model.modalities.optical.sensors \(aerial\)'):
        make_views(site(optical=sequence("optical", (1, 0, 0, 1), (4, 4), sensor="rgb")), plan(), 0, 0)
    with pytest.raises(BadRecord, match="share no ground"):
        make_views(site(sar=sequence("sar", (900, 0, 800, 100), (4, 4))), plan(), 0, 0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data__global_views__size__optical": 0}, r"data.global_views.size.optical is 0"),
        ({"data__global_views__size": {"optical": 8, "sar": 8}}, r"data.global_views.size.multispectral is None"),
        ({"data__dates__sar": 0}, r"data.dates.sar is 0"),
        ({"data__local_views__dates__sar": 3}, r"data.local_views.dates.sar is 3, more than data.dates.sar = 2"),
        ({"data__global_views__area": (0.5, 1.5)}, r"data.global_views.area is \(0.5, 1.5\)"),
        ({"data__local_views__area": (0.5, 0.1)}, r"data.local_views.area is \(0.5, 0.1\)"),
        ({"data__local_views__count": -1}, r"data.local_views.count is -1"),
        ({"data__augment__drop_date": 2.0}, r"data.augment.drop_date is 2.0"),
        ({"data__augment__date_jitter": -1}, r"data.augment.date_jitter is -1"),
        ({"model__modalities__multispectral__bands": ("B8",)}, r'"B8", which none of its sensors'),
        (
            {
                "model__modalities__multispectral__bands": ("B11",),
                "model__modalities__multispectral__sensors": ("sentinel2-l2a", "landsat8-9"),
            },
            r'"B11" means swir16 of sentinel2-l2a, lwir12 of landsat8-9',
        ),
    ],
)
def test_a_config_that_makes_no_sense_is_refused(change, message):
    with pytest.raises(UserError, match=message):
        plan(**change)


def test_no_local_views_leaves_the_group_out():
    assert "local" not in make_views(site(), plan(data__local_views__count=0), 0, 0)


def test_samples_that_share_their_dates_draw_them_alike():
    """Positions 0 to 3 draw one set of dates, 4 to 7 another; crops stay each sample's own."""
    sample = site()

    def drawn(index, **changes):
        views = make_views(sample, plan(data__same_dates=4, **changes), 7, index)["global"]
        return views["multispectral"]["days"][0].tolist(), views["sar"]["days"][0].tolist()

    days = [drawn(index) for index in range(24)]
    for first in range(0, 24, 4):
        assert all(each == days[first] for each in days[first : first + 4])
    assert len({str(each) for each in days}) > 3
    crops = [make_views(sample, plan(data__same_dates=4), 7, index)["global"]["to_view"] for index in range(2)]
    assert np.abs(crops[0] - crops[1]).max() > 0.01
    alone = [make_views(sample, plan(), 7, index)["global"]["multispectral"]["days"][0].tolist() for index in range(4)]
    assert len({str(each) for each in alone}) > 1
    with pytest.raises(UserError, match=r"data\.same_dates is 0"):
        plan(data__same_dates=0)


def days_of(views, group, view, m):
    images = views[group][m]
    return set(images["days"][view][images["valid"][view]].tolist())


def test_dates_apart_are_in_one_global_view_each():
    """Eight dates, three slots a view: of neighbouring dates each view has one, and a local view has its own view's."""
    sample = site(multispectral=sequence("multispectral", (28, -30, -32, 30), (6, 6), t=8))
    spec = plan(data__dates_apart=True)
    seen = set()
    for index in range(40):
        views = make_views(sample, spec, 3, index)
        first, second = (days_of(views, "global", view, "multispectral") for view in range(2))
        assert len(first) == len(second) == 3
        assert not first & second
        both = sorted(first | second)
        assert all(len(first & set(both[i : i + 2])) == 1 for i in (0, 2, 4))
        for local in range(3):
            assert days_of(views, "local", local, "multispectral") < (first, second)[local % 2]
        assert (
            days_of(views, "global", 0, "optical") == days_of(views, "global", 1, "optical") != set()
        )  # one date only
        seen |= {tuple(sorted(first))}
    assert len(seen) > 20


def test_dates_apart_are_shared_where_samples_share_their_draw():
    spec = plan(data__dates_apart=True, data__same_dates=4)
    drawn = [days_of(make_views(site(), spec, 3, index), "global", 1, "multispectral") for index in range(8)]
    assert drawn[0] == drawn[3]
    assert drawn[4] == drawn[7]
