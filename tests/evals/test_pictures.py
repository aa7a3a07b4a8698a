import base64
import io

import numpy as np
import PIL.Image
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from sklearn.decomposition import PCA

from skyjax.errors import BadRecord
from skyjax.evals import pictures
from skyjax.evals.pictures import (
    MASKED,
    data_uri,
    date_pictures,
    feature_pictures,
    fit,
    principal_components,
)
from skyjax.input import records
from skyjax.sample import Sample, Sequence


def sequence(values, sensor="sentinel2-l2a", bands=("B04", "B03", "B02"), half=20.0, days=None, clear=None):
    dates = len(values)
    return Sequence(
        values,
        np.asarray(days if days is not None else np.arange(18_000, 18_000 + dates), np.int32),
        np.ones(dates, bool),
        np.ones(values.shape[:3], bool) if clear is None else clear,
        sensor,
        bands,
        np.array([half, -half, -half, half], np.float32),
    )


def make_sample(**sequences):
    return Sample(sequences, np.array([np.nan, np.nan], np.float32), id="site", source="source")


def noise(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 3000, shape).astype(np.uint16)


def encode(sample, *, size=4, width=6):
    """Features like those of a model: (1, t, h, w, d)."""
    rng = np.random.default_rng(1)
    dates = {modality: len(found.days) for modality, found in sample.sequences.items()}
    return {
        "spatial": {modality: rng.normal(size=(1, t, size, size, width)) for modality, t in dates.items()},
        "spatial_valid": {modality: np.ones((1, t, size, size), bool) for modality, t in dates.items()},
        "fused": rng.normal(size=(1, size, size, width)),
        "fused_valid": np.ones((1, size, size), bool),
    }


def groups_of(encode, *samples, **options):
    return {group.title: group for group in feature_pictures(encode, {"source": samples}, **options)}


def test_components_are_those_of_sklearn():
    rng = np.random.default_rng(0)
    features = (
        rng.normal(size=(300, 8)) * np.array([5, 4, 3, 1, 1, 0.5, 0.5, 0.1]) @ np.linalg.qr(rng.normal(size=(8, 8)))[0]
    )
    got = principal_components(features + 7)
    want = PCA(3).fit(features + 7)
    assert_allclose(got.mean, want.mean_, atol=1e-9)
    assert_allclose(np.abs((got.axes * want.components_).sum(1)), 1, atol=1e-9)
    assert_allclose(got.shares, want.explained_variance_ratio_, atol=1e-9)
    assert_array_equal(np.take_along_axis(got.axes, np.abs(got.axes).argmax(1)[:, None], 1) > 0, True)


def test_colours_run_from_the_2nd_to_the_98th_percentile():
    # One direction only: 101 points at 0, 1 .. 100 along the first axis.
    features = np.zeros((101, 5))
    features[:, 0] = np.arange(101)
    components = principal_components(features)
    shown = components.colours(features[[0, 2, 50, 98, 100]][None], np.array([[True, True, True, True, False]]))[0]
    assert_array_equal(shown[:4, 0], [0, 0, 128, 255])
    assert_array_equal(shown[:4, 1:], 128)  # no variance: the middle
    assert_array_equal(shown[4], MASKED)


@pytest.mark.parametrize("count", [1, 2])
def test_few_places_and_few_channels_have_colours(count):
    features = np.random.default_rng(0).normal(size=(count, 2))
    components = principal_components(features)
    assert components.axes.shape == (3, 2)
    assert np.isfinite(components.shares).all()
    assert components.colours(features[None], np.ones((1, count), bool)).dtype == np.uint8


def test_sites_of_a_modality_share_their_colours():
    vectors = np.random.default_rng(3).normal(size=(2, 2, 4))
    samples = [make_sample(multispectral=sequence(noise(1, 6, 6, 3, seed=s))) for s in range(2)]
    calls = []

    def half_alike(sample):
        output = encode(sample, size=2, width=4)
        output["spatial"]["multispectral"][0, 0] = vectors
        output["spatial"]["multispectral"][0, 0, 1] += 5 * len(calls)
        calls.append(sample)
        return output

    first, second = groups_of(half_alike, *samples, side=2)["multispectral"].sites
    assert_array_equal(first.features[0], second.features[0])
    assert (first.features[1] != second.features[1]).any()


def test_a_modality_is_encoded_alone_and_fused_features_together():
    sample = make_sample(
        optical=sequence(np.zeros((1, 40, 40, 3), np.uint8), "rgb", ("red", "green", "blue")),
        multispectral=sequence(noise(9, 4, 4, 3)),
    )
    seen = []

    def watched(sample):
        seen.append({modality: len(found.days) for modality, found in sample.sequences.items()})
        return encode(sample)

    groups = groups_of(watched, sample)
    assert list(groups) == ["optical", "multispectral", "fused"]
    assert seen == [{"optical": 1}, {"multispectral": 1}, {"optical": 1, "multispectral": 4}]
    assert [modality for modality, *_ in groups["fused"].sites[0].images] == ["optical", "multispectral"]


def test_a_site_shows_the_ground_that_its_features_cover():
    # A bright middle of 20 m in an aerial image of 40 m; Sentinel-2 covers the middle alone.
    aerial = np.zeros((1, 40, 40, 3), np.uint8)
    aerial[:, 10:30, 10:30] = 200
    sample = make_sample(
        optical=sequence(aerial, "rgb", ("red", "green", "blue"), half=20.0),
        multispectral=sequence(noise(1, 4, 4, 3), half=10.0),
    )
    groups = groups_of(encode, sample, side=20)
    ((modality, day, together), _) = groups["fused"].sites[0].images
    assert (modality, day) == ("optical", "2019-04-14")
    assert_array_equal(together, 255)
    ((_, _, alone),) = groups["optical"].sites[0].images
    assert 0.2 < (alone > 128).mean() < 0.3


def test_the_clearest_date_is_shown():
    clear = np.ones((4, 6, 6), bool)
    clear[0, 0] = clear[1, :2] = clear[3] = False
    found = sequence(noise(4, 6, 6, 3), clear=clear)
    assert groups_of(encode, make_sample(multispectral=found))["multispectral"].sites[0].images[0][1] == "2019-04-16"
    found.valid[2] = False
    assert groups_of(encode, make_sample(multispectral=found))["multispectral"].sites[0].images[0][1] == "2019-04-14"


def test_fused_dates_are_spread_over_the_clear_ones():
    clear = np.ones((20, 6, 6), bool)
    clear[::2] = False  # 1, 3 .. 19 are clear
    seen = []

    def watched(sample):
        seen.append((sample.sequences["multispectral"].days - 18_000).tolist())
        return encode(sample)

    groups_of(watched, make_sample(multispectral=sequence(noise(20, 6, 6, 3), clear=clear)))
    assert seen == [[11], [3, 7, 13, 17]]


def test_sites_that_show_something_come_first():
    small = make_sample(multispectral=sequence(noise(1, 6, 6, 3)))
    cloudy = make_sample(multispectral=sequence(noise(1, 20, 20, 3), clear=np.zeros((1, 20, 20), bool)))
    good = make_sample(multispectral=sequence(noise(1, 20, 20, 3)))
    seen = []

    def watched(sample):
        seen.append(sample.sequences["multispectral"])
        return encode(sample)

    groups_of(watched, small, cloudy, good, sites=1)
    assert seen[0].values.shape == (1, 20, 20, 3)
    assert seen[0].clear.all()


def test_a_site_that_the_model_refuses_leaves_the_others():
    samples = [make_sample(multispectral=sequence(noise(1, 6, 6, 3, seed=s))) for s in range(3)]

    def picky(sample):
        if (sample.sequences["multispectral"].values == samples[0].sequences["multispectral"].values).all():
            raise BadRecord("its sensor is not known")
        return encode(sample)

    assert {title: len(group.sites) for title, group in groups_of(picky, *samples).items()} == {
        "multispectral": 2,
        "fused": 2,
    }


def test_a_masked_place_is_grey_and_a_masked_site_is_left_out():
    def masked(sample):
        output = encode(sample)
        output["spatial_valid"]["multispectral"][0, 0, 0, 0] = False
        output["fused_valid"][:] = False
        return output

    groups = groups_of(masked, make_sample(multispectral=sequence(noise(1, 6, 6, 3))), side=4)
    assert list(groups) == ["multispectral"]
    features = groups["multispectral"].sites[0].features
    assert_array_equal(features[0, 0], MASKED)
    assert (features[0, 1] != MASKED).any()


def test_small_images_grow_by_whole_pixels_and_large_ones_shrink():
    image = np.arange(12, dtype=np.uint8).reshape(2, 2, 3)
    assert_array_equal(fit(image, 5), np.kron(image, np.ones((3, 3, 1), np.uint8)))
    assert fit(np.zeros((300, 200, 3), np.uint8), 100).shape == (100, 67, 3)
    assert fit(np.ones((300, 300), bool), 100).dtype == bool


def test_a_grid_darkens_the_border_between_places_only():
    large = fit(np.full((2, 2, 3), 160, np.uint8), 16, grid=True)
    want = np.full((16, 16), 160)
    want[7] = 120
    want[:, 7] = np.where(np.arange(16) == 7, 90, 120)
    assert_array_equal(large[..., 0], want)


def test_a_data_uri_holds_the_image():
    image = np.zeros((8, 8, 3), np.uint8)
    image[2:4] = (10, 200, 30)
    head, _, text = data_uri(image).partition(",")
    assert head == "data:image/png;base64"
    assert_array_equal(np.asarray(PIL.Image.open(io.BytesIO(base64.b64decode(text)))), image)
    photo = np.random.default_rng(0).integers(0, 255, (200, 200, 3)).astype(np.uint8)
    assert data_uri(photo).startswith("data:image/jpeg;base64,")


def test_dates_are_spread_over_the_sequence_and_absent_ones_left_out():
    found = sequence(noise(12, 4, 4, 3))
    found.valid[[0, 3]] = False
    found.clear[1] = False
    shown = date_pictures(found, dates=4, side=8)
    assert [picture.day for picture in shown] == ["2019-04-15", "2019-04-19", "2019-04-22", "2019-04-25"]
    assert [picture.clear for picture in shown] == [0, 1, 1, 1]
    found.valid[:] = False
    assert date_pictures(found) == []
    assert date_pictures(sequence(noise(1, 4, 4, 3)))[0].image.shape == (176, 176, 3)
    assert date_pictures(sequence(noise(1, 4, 4, 3), days=[0]))[0].day == "date unknown"


def test_a_record_that_cannot_be_read_is_passed_over(sample_records, monkeypatch):
    whole = pictures.samples_by_source([str(sample_records)])
    read = records.RecordSource.__getitem__

    def broken(source, index):
        if index == 3:
            raise BadRecord("truncated")
        return read(source, index)

    monkeypatch.setattr(records.RecordSource, "__getitem__", broken)
    rest = pictures.samples_by_source([str(sample_records)])
    assert list(whole) == list(rest) == ["random"]
    assert len(rest["random"]) == len(whole["random"]) - 1
