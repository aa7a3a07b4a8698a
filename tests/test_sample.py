"""The sample contract: what a sequence accepts, orders, marks and refuses."""

import dataclasses

import hypothesis
import hypothesis.extra.numpy as arrays
import hypothesis.strategies as some
import numpy as np
import pytest
from numpy.testing import assert_array_equal

from skyjax.errors import BadRecord, UserError
from skyjax.sample import STORED_TYPES, Sample, Sequence, centred, empty_sample, make_sequence, stored

BANDS = ("B02", "B03", "B04")


def sentinel2(days=(10, 20), **changes):
    values = np.random.default_rng(0).integers(100, 4000, (len(days), 4, 5, 3)).astype(np.uint16)
    options = {"values": values, "sensor": "sentinel2-l2a", "bands": BANDS, "days": np.array(days), "gsd": 10.0}
    return make_sequence(**(options | changes))


def test_dates_are_put_in_order_and_doubled_days_keep_theirs():
    values = np.arange(100, 100 + 4 * 3, dtype=np.uint16).reshape(4, 1, 1, 3)
    clear = np.array([True, False, True, True]).reshape(4, 1, 1)
    sequence = sentinel2(days=(30, 10, 30, 20), values=values, clear=clear)
    assert sequence.days.tolist() == [10, 20, 30, 30]
    assert sequence.values[:, 0, 0, 0].tolist() == [103, 109, 100, 106]
    assert sequence.clear[:, 0, 0].tolist() == [False, True, True, True]


def test_many_dates_of_one_day_keep_their_order():
    values = np.arange(1, 201, dtype=np.uint16).reshape(200, 1, 1, 1).repeat(3, -1)
    days = np.arange(200) // 50 % 2  # unstable sorts mix these
    got = sentinel2(days=days, values=values).values[:, 0, 0, 0]
    assert (np.diff(got[:100].astype(int)) > 0).all()
    assert (np.diff(got[100:].astype(int)) > 0).all()


def test_gaps_are_marked():
    values = np.full((3, 2, 2, 3), 500, np.uint16)
    values[0, 0, 0] = 0
    values[2] = 0
    sequence = sentinel2(days=(1, 2, 3), values=values)
    assert sequence.valid.tolist() == [True, True, False]  # a date of nothing but nodata is not there
    assert_array_equal(sequence.clear.sum((1, 2)), [3, 4, 0])


def test_nan_pixels_are_not_clear():
    values = np.full((1, 2, 2, 2), -12, np.float32)
    values[0, 1, 1, 0] = np.nan
    sequence = sentinel2(days=(1,), values=values, sensor="sentinel1-grd", bands=("VV", "VH"))
    assert sequence.clear.sum() == 3


def test_all_dates_invalid_is_a_sequence_without_a_valid_date():
    sequence = sentinel2(values=np.zeros((2, 4, 5, 3), np.uint16))
    assert not sequence.valid.any()
    assert not sequence.clear.any()


def test_extent_is_centred_and_north_is_up():
    assert sentinel2().extent.tolist() == [20, -25, -20, 25]
    assert centred(304, 304, 0.2).tolist() == pytest.approx([30.4, -30.4, -30.4, 30.4])


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"bands": ("B02", "B03")}, "3 bands; sentinel2-l2a was asked for 2: B02 B03"),
        ({"values": np.ones((4, 5, 3), np.uint16)}, "shape"),
        ({"values": np.ones((3, 4, 5, 3), np.uint16)}, "2 days for 3 images"),
        ({"values": np.ones((1, 4, 5, 3), np.uint16)}, "2 days for 1 images"),
        ({"values": np.full((2, 4, 5, 3), 0.2)}, "rescale"),
    ],
)
def test_bad_input_is_named(changes, told):
    with pytest.raises(BadRecord, match=told):
        sentinel2(**changes)


def test_unknown_sensor_and_band_are_the_users_error():
    with pytest.raises(UserError, match='sensor "sentinel3"'):
        sentinel2(sensor="sentinel3")
    with pytest.raises(UserError, match='band "B8"'):
        sentinel2(bands=("B02", "B03", "B8"))
    with pytest.raises(UserError, match='band "B99"'):
        dataclasses.replace(sentinel2(), bands=("B02", "B03", "B99"))
    with pytest.raises(BadRecord, match="own name"):  # "red" would not be found by a model that asks for B04
        dataclasses.replace(sentinel2(), bands=("B02", "B03", "red"))


@pytest.mark.parametrize(
    ("field", "value", "told"),
    [
        ("days", np.array([20, 10], np.int32), "dates are in order"),
        ("days", np.array([10], np.int32), "every date has a day"),
        ("valid", np.array([1, 1]), "valid flag"),
        ("clear", np.ones((2, 4, 4), bool), "clear has the shape"),
        ("values", np.ones((2, 4, 5, 3)), "values is one of"),
        ("values", np.ones((2, 4, 5, 2), np.uint16), "as many band names"),
        ("bands", ("B02", "B02", "B04"), "band names differ"),
        ("extent", np.array([0, 0, 1, 1], np.float32), "top > bottom"),
    ],
)
def test_a_sequence_that_breaks_the_contract_is_refused(field, value, told):
    with pytest.raises(BadRecord, match=told):
        dataclasses.replace(sentinel2(), **{field: value})


def test_a_sample_holds_sequences_under_their_own_modality():
    nowhere = np.full(2, np.nan, np.float32)
    with pytest.raises(BadRecord, match="sentinel2-l2a is multispectral, not optical"):
        Sample({"optical": sentinel2()}, nowhere)
    with pytest.raises(BadRecord, match="unknown modality"):
        Sample({"thermal": sentinel2()}, nowhere)
    with pytest.raises(BadRecord, match="lonlat"):
        Sample({}, np.zeros(3, np.float32))
    assert not empty_sample("a", "b").sequences


@hypothesis.given(arrays.arrays(some.sampled_from(["bool", "int8", "int32", "int64", "uint32", "float16"]), 5))
def test_stored_types_hold_what_they_are_given(values):
    got = stored(values)
    assert got.dtype.name in STORED_TYPES
    if values.dtype.kind == "f" or (abs(values.astype(np.float64)) < 2**24).all():  # float32 holds these integers
        assert_array_equal(got.astype(np.float64), values.astype(np.float64))


def test_stored_types_stay_as_they_are():
    for name in STORED_TYPES:
        values = np.ones(3, name)
        assert stored(values) is values
    assert Sequence.__dataclass_params__.frozen
