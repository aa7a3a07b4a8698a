import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal

from skyjax.convert.bands import adapt_bands, adapt_modality
from skyjax.errors import UserError
from skyjax.models.layers import PatchEmbed
from skyjax.models.stem import ConvStem
from skyjax.sensors import get_sensor, statistics

RGB = ("red", "green", "blue")
RGBN = (*RGB, "nir")
SENTINEL2 = ("B02", "B03", "B04", "B05", "B06", "B07", "B08", "B8A", "B11", "B12")
LANDSAT = ("B2", "B3", "B4", "B5", "B6", "B7")


def random_kernel(bands, seed=0):
    return np.random.default_rng(seed).normal(size=(2, 2, len(bands), 5)).astype(np.float32)


def embed(kernel, image, bands=None):
    """What bands add to the tokens of an image, which is scaled up where some are masked."""
    patches = image.reshape(image.shape[0] // 2, 2, -1, 2, image.shape[-1])
    share = 1 if bands is None else np.mean(bands)
    return np.einsum("ipjqc,pqcd->ijd", patches, kernel.astype(float)) / share


def sources(origins):
    return [origin.source for origin in origins]


def test_near_infrared_is_copied_from_red_as_published():
    kernel = random_kernel(RGB)
    got, origins = adapt_bands(kernel, RGB, RGBN, modality="optical", keep_size=False)
    assert_array_equal(got, kernel[:, :, [0, 1, 2, 0]])
    assert str(origins[1]) == "green takes the slice of green: its own"
    assert str(origins[3]) == "nir takes the slice of red: the nearest centre wavelength (650 nm for 830 nm)"


def test_a_band_that_repeats_another_changes_nothing():
    kernel, image = random_kernel(RGB), np.random.default_rng(1).normal(size=(4, 6, 3))
    got, origins = adapt_bands(kernel, RGB, RGBN, modality="optical")
    assert_allclose(embed(got, image[..., [0, 1, 2, 0]]), embed(kernel, image), atol=1e-5)
    assert [origin.factor for origin in origins] == [0.5, 1, 1, 0.5]
    assert str(origins[0]) == "red takes the slice of red: its own, times 0.5"


ALL_BANDS = sorted({*get_sensor("sentinel2-l1c").names, *(b.common for b in get_sensor("landsat8-9").bands)})


@settings(max_examples=30, deadline=None)
@given(wanted=st.lists(st.sampled_from(ALL_BANDS), min_size=1, max_size=14, unique=True), seed=st.integers(0, 99))
def test_the_embedding_is_the_sources_of_the_mean_of_bands_that_share_a_slice(wanted, seed):
    """The promise of the module, for any bands: what nothing was taken from is a masked band of the source."""
    kernel = random_kernel(SENTINEL2, seed)
    image = np.random.default_rng(seed).normal(size=(2, 4, len(wanted)))
    adapted, origins = adapt_bands(kernel, SENTINEL2, wanted, modality="multispectral")
    as_source = np.zeros((2, 4, 10))
    for i, band in enumerate(SENTINEL2):
        shared = [column for column, source in enumerate(sources(origins)) if source == band]
        if shared:
            as_source[..., i] = image[..., shared].mean(-1)
    present = [band in sources(origins) for band in SENTINEL2]
    assert_allclose(embed(adapted, image), embed(kernel, as_source, present), atol=1e-5)


def test_any_order_and_the_same_bands_are_lossless():
    kernel = random_kernel(SENTINEL2)
    for order in (range(10), [3, 0, 9, 1, 2, 4, 8, 5, 7, 6]):
        got, origins = adapt_bands(kernel, SENTINEL2, [SENTINEL2[i] for i in order], modality="multispectral")
        assert_array_equal(got, kernel[:, :, list(order)])
        assert {(origin.reason, origin.factor) for origin in origins} == {("its own", 1)}


def test_bands_of_another_sensor_meet_by_common_name():
    kernel = random_kernel(SENTINEL2)
    got, origins = adapt_bands(kernel, SENTINEL2, LANDSAT, modality="multispectral", to_sensors=("landsat8-9",))
    assert sources(origins) == ["B02", "B03", "B04", "B8A", "B11", "B12"]
    assert_allclose(got, kernel[:, :, [0, 1, 2, 7, 8, 9]] * np.float32(10 / 6))
    assert str(origins[3]) == "B5 takes the slice of B8A: the same band (nir08), times 1.667"


def test_one_name_of_two_sensors_is_not_one_band():
    """B11 is 1.6 micrometres at Sentinel-2 and thermal, 12 micrometres, at Landsat."""
    kernel = random_kernel(("B11", "B12"))
    _, origins = adapt_bands(
        kernel, ("B11", "B12"), ("B11",), modality="multispectral", to_sensors=("landsat8-9",), keep_size=False
    )
    assert sources(origins) == ["B12"]


@pytest.mark.parametrize(
    ("wanted", "source"), [("coastal", "B02"), ("pan", "B03"), ("nir09", "B8A"), ("cirrus", "B11"), ("lwir11", "B12")]
)
def test_other_bands_take_the_nearest_wavelength(wanted, source):
    """Nanometres: 443, 590, 945, 1374, 10895 to 492, 560, 665, 704, 741, 783, 833, 865, 1614 and 2202."""
    _, origins = adapt_bands(random_kernel(SENTINEL2), SENTINEL2, [wanted], modality="multispectral")
    assert sources(origins) == [source]


@pytest.mark.parametrize(
    ("have", "want", "got"),
    [
        (("VV", "VH"), ("VH", "VV"), ["VH", "VV"]),
        (("VV", "VH"), ("HH", "HV"), ["VV", "VH"]),
        (("VV",), ("VH", "HV"), ["VV", "VV"]),
        (("HH", "HV"), ("VV", "VH"), ["HH", "HV"]),
        (("VH", "HV"), ("VV",), ["VH"]),
    ],
)
def test_radar_goes_by_polarisation(have, want, got):
    assert sources(adapt_bands(random_kernel(have), have, want, modality="sar")[1]) == got


@pytest.mark.parametrize(
    ("modality", "have", "want", "message"),
    [
        ("multispectral", SENTINEL2, ("B02", "B8B"), r'multispectral: band "B8B" is not known; did you mean "B8"\?'),
        ("optical", RGB, ("red", "grene"), r'"grene" is not known; did you mean "green"\? Bands: red green blue nir'),
        ("optical", RGB, ("red", "red"), 'bands "red red": name one or more, each once'),
        ("optical", RGB, (), "name one or more"),
        ("sar", ("VV",), ("red",), r'sar: band "red" is not known. Bands: VV VH'),
    ],
)
def test_wrong_bands_are_named(modality, have, want, message):
    with pytest.raises(UserError, match=message):
        adapt_bands(random_kernel(have), have, want, modality=modality)
    with pytest.raises(ValueError, match="kernel of 2 bands does not go with the 3 named"):
        adapt_bands(random_kernel("ab"), RGB, RGBN, modality="optical")


def part(sensor_keys, bands):
    return ml_collections.ConfigDict({"kind": "vit", "sensors": sensor_keys, "bands": bands, "patch_size": 2}).lock()


def table(sensor_keys, bands):
    mean, std = statistics(sensor_keys, bands)
    return {"sensors": list(sensor_keys), "bands": list(bands), "mean": mean.tolist(), "std": std.tolist()}


def optical(stem=PatchEmbed):
    module = stem(4, 3, 8, jnp.float32, nnx.Rngs(0))
    return {"patch_embed": nnx.to_pure_dict(nnx.state(module)), "norm": {"scale": np.ones(8)}}


def test_a_modality_gets_bands_sensors_and_statistics():
    params, own = optical(), table(("rgb",), RGB)
    own["mean"], own["std"] = [[1.0, 2.0, 3.0]], [[4.0, 5.0, 6.0]]  # trained with other numbers than the table's
    got = adapt_modality("optical", params, part(("rgb",), RGB), own, RGBN)
    assert got.params["patch_embed"]["kernel"].shape == (4, 4, 4, 8)
    assert got.params["patch_embed"]["bias"] is params["patch_embed"]["bias"]
    assert got.params["norm"] is params["norm"]
    assert params["patch_embed"]["kernel"].shape == (4, 4, 3, 8)
    assert got.part.to_dict() == part(("rgb", "aerial", "naip", "worldview3"), RGBN).to_dict()
    mean, std = statistics(("aerial", "naip", "worldview3"), RGBN)
    assert got.statistics["bands"] == list(RGBN)
    assert got.statistics["sensors"] == ["rgb", "aerial", "naip", "worldview3"]
    assert got.statistics["mean"] == [[1.0, 2.0, 3.0, 0.0], *mean.tolist()]
    assert got.statistics["std"] == [[4.0, 5.0, 6.0, 1.0], *std.tolist()]
    assert got.dropped == ()
    assert str(got).splitlines()[3:] == [
        "nir takes the slice of red: the nearest centre wavelength (650 nm for 830 nm), times 0.5",
        "sensors: rgb aerial naip worldview3",
    ]


@pytest.mark.parametrize("stem", [PatchEmbed, ConvStem])
def test_either_stem_sees_the_same_through_other_bands(stem):
    params = optical(stem)
    got = adapt_modality("optical", params, part(("rgb",), RGB), table(("rgb",), RGB), ("nir", "green", "red"))
    assert got.dropped == ("blue",)

    def run(params, image, bands):
        module = stem(4, 3, 8, jnp.float32, nnx.Rngs(0))
        graph, state = nnx.split(module)
        nnx.replace_by_pure_dict(state, jax.tree.map(jnp.asarray, params["patch_embed"]))
        return nnx.merge(graph, state)(jnp.asarray(image), jnp.asarray([bands]))

    image = np.random.default_rng(0).normal(size=(1, 8, 8, 3)).astype(np.float32)
    as_source = np.stack([image[..., [0, 2]].mean(-1), image[..., 1], np.zeros((1, 8, 8))], -1).astype(np.float32)
    want = run(params, as_source, [True, True, False])
    assert_allclose(run(got.params, image, [True] * 3), want, atol=1e-5)


def test_sensors_are_those_that_the_names_fit():
    own = ("sentinel2-l1c", "sentinel2-l2a")

    def adapt(bands, **options):
        config, statistics = part(own, SENTINEL2), table(own, SENTINEL2)
        params = {"patch_embed": {"kernel": random_kernel(SENTINEL2)}}
        return adapt_modality("multispectral", params, config, statistics, bands, **options).statistics["sensors"]

    assert adapt(("B02", "B8A")) == list(own)
    assert adapt(("B02", "B10")) == list(own)  # Level-2A stays, though it lacks the cirrus band
    assert adapt(("red", "swir16")) == list(own)
    assert adapt(("red", "swir16"), sensor_keys=("landsat8-9",)) == ["landsat8-9"]
    assert adapt(LANDSAT) == ["landsat8-9"]
    assert adapt(("B5", "B11")) == ["landsat8-9"]  # the model's sensors have another B11
    for bands, options, message in (
        (("B02", "B8"), {}, "no sensor has all of B02 B8"),
        (("B02", "B99"), {}, 'band "B99" is not known'),
        (("B11",), {"sensor_keys": (*own, "landsat8-9")}, '"B11" is not the same band at sentinel2-l1c and landsat8-9'),
        (("red",), {"sensor_keys": ("naip",)}, 'sensor "naip" is optical, not multispectral'),
        (("B8",), {"sensor_keys": own}, r'sentinel2-l1c: band "B8" is not known; did you mean "B08"\?'),
    ):
        with pytest.raises(UserError, match=message):
            adapt(bands, **options)
    with pytest.raises(UserError, match='sar: band "HH" is not known'):  # no image could ever bring it
        adapt_modality(
            "sar",
            {"patch_embed": {"kernel": random_kernel("ab")}},
            part(("sentinel1-grd",), ("VV", "VH")),
            table(("sentinel1-grd",), ("VV", "VH")),
            ("HH",),
        )
