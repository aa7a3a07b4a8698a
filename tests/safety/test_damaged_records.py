"""Records and dataset.json of strangers: a sample or a BadRecord, a table or a sentence, whatever they say."""

import contextlib
import json
import math
import pathlib
import tempfile

import numpy as np
import pytest
import safetensors.numpy
from array_record.python.array_record_module import ArrayRecordWriter
from fuzzing import deadline, ends_well, fuzz
from hypothesis import given
from hypothesis import strategies as st

from skyjax.config import load_config
from skyjax.errors import BadRecord, UserError
from skyjax.input import records
from skyjax.input.loader import Loader
from skyjax.input.views import make_views, plan_views
from skyjax.sample import Sample, make_sequence

ROOT = pathlib.Path(__file__).parents[2]
CONFIG = load_config(ROOT / "configs" / "pretrain_sample.py")
PLAN = plan_views(CONFIG.data, CONFIG.model, dict.fromkeys(("optical", "multispectral", "sar"), "float32"))


def make_sample():
    rng = np.random.default_rng(0)
    optical = make_sequence(
        rng.integers(1, 255, (1, 8, 8, 3), np.uint8), "rgb", ("red", "green", "blue"), days=np.array([9])
    )
    sar = make_sequence(rng.normal(-15, 4, (3, 4, 4, 2)).astype("f"), "sentinel1-grd", ("VV", "VH"), days=np.arange(3))
    labels = {"class": np.array(1, np.int32), "map": np.ones((4, 4), np.int16), "shares": np.ones(3, np.float32)}
    return Sample(
        {"optical": optical, "sar": sar}, np.array([9.9, 52.1], np.float32), ("a wood",), labels, "one", "here"
    )


RECORD = records.encode(make_sample())
HEADER = 8 + int.from_bytes(RECORD[:8], "little")


def use(record):
    """All that training does with a record on the host."""
    sample = records.decode(record, name="a: record 1")
    views = make_views(sample, PLAN, seed=0, index=3)
    assert views["global"]["optical"]["values"].shape == (2, 1, 64, 64, 3)


def is_used_or_bad(record):
    with contextlib.suppress(BadRecord):
        use(record)


flips = st.lists(st.tuples(st.integers(0, len(RECORD) - 1), st.integers(0, 7)), min_size=1, max_size=6)
header_flips = st.lists(st.tuples(st.integers(0, HEADER - 1), st.integers(0, 7)), min_size=1, max_size=3)


@fuzz
@given(st.one_of(flips, header_flips), st.integers(0, len(RECORD)))
def test_flipped_bits_and_lost_ends(changed, length):
    record = bytearray(RECORD)
    for place, bit in changed:
        record[place] ^= 1 << bit
    with deadline():
        is_used_or_bad(bytes(record))
        is_used_or_bad(bytes(record[:length]))


@fuzz
@given(st.binary(max_size=200), st.integers(0, 2**64 - 1))
def test_bytes_of_any_kind(data, size):
    with deadline():
        is_used_or_bad(data)
        is_used_or_bad(size.to_bytes(8, "little") + data)


whole = st.one_of(st.integers(-3, 12), st.sampled_from([2**31, 2**40, 2**63, 2**64, 10**30]))
anything = st.recursive(
    st.one_of(st.none(), st.booleans(), whole, st.floats(), st.text(max_size=8)),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=8), inner, max_size=3)),
    max_leaves=6,
)
NAMES = list(safetensors.numpy.load(RECORD))
DTYPES = ["BOOL", "U8", "I16", "U16", "I32", "I64", "F16", "BF16", "F32", "F64", "F8_E4M3", "O"]
entry = st.fixed_dictionaries(
    {},
    optional={
        "dtype": st.one_of(st.sampled_from(DTYPES), anything),
        "shape": st.one_of(st.lists(whole, max_size=5), anything),
        "data_offsets": st.one_of(st.lists(whole, min_size=2, max_size=2), anything),
    },
)
WORDS = ["format", "id", "source", "texts", "sequences"]


@fuzz
@given(
    st.dictionaries(st.sampled_from(NAMES), entry, max_size=2),
    st.dictionaries(st.sampled_from(WORDS), st.one_of(anything, anything.map(json.dumps)), max_size=2),
)
def test_headers_that_claim_what_they_like(entries, words):
    header = json.loads(RECORD[8:HEADER])
    for name, changes in entries.items():
        header[name] |= changes
    header["__metadata__"] |= words
    text = json.dumps(header).encode()
    with deadline():
        is_used_or_bad(len(text).to_bytes(8, "little") + text + RECORD[HEADER:])


numbers = st.one_of(
    st.floats(width=32), st.integers(-4, 4).map(float), st.sampled_from([1e30, -1e30, math.inf, math.nan])
)


@fuzz
@given(st.lists(numbers, min_size=6, max_size=6), st.lists(st.integers(-(2**31), 2**31 - 1), min_size=3, max_size=3))
def test_places_and_days_that_are_nowhere(place, days):
    arrays = safetensors.numpy.load(RECORD)
    arrays["sar/extent"], arrays["lonlat"] = np.array(place[:4], "f"), np.array(place[4:], "f")
    arrays["sar/days"] = np.sort(np.array(days, np.int32))
    with deadline():
        is_used_or_bad(safetensors.numpy.save(arrays, json.loads(RECORD[8:HEADER])["__metadata__"]))


@fuzz
@given(st.dictionaries(st.sampled_from(NAMES), st.sampled_from([(0,), (1,), (3, 0, 4, 2), (0, 4, 4, 2), (3, 4, 4, 0)])))
def test_arrays_of_other_shapes(shapes):
    arrays = safetensors.numpy.load(RECORD)
    arrays |= {name: np.zeros(shape, arrays[name].dtype) for name, shape in shapes.items()}
    with deadline():
        is_used_or_bad(safetensors.numpy.save(arrays, json.loads(RECORD[8:HEADER])["__metadata__"]))


def test_a_claim_is_refused_before_memory_is_taken():
    header = json.loads(RECORD[8:HEADER])
    header["sar/values"]["shape"] = [2**20, 2**10, 2**10, 2]
    text = json.dumps(header).encode()
    with pytest.raises(BadRecord, match=r'"sar/values" claims the shape \(1048576, 1024, 1024, 2\)'):
        records.decode(len(text).to_bytes(8, "little") + text + RECORD[HEADER:])


def test_what_is_read_is_what_safetensors_reads():
    want = safetensors.numpy.load(RECORD)
    got, _ = records._parse(RECORD)
    assert got.keys() == want.keys()
    for name in want:
        assert got[name].dtype == want[name].dtype
        np.testing.assert_array_equal(got[name], want[name])
        assert not got[name].flags.writeable


# Data sets


def write(folder, written, description):
    folder.mkdir()
    writer = ArrayRecordWriter(str(folder / "samples-00000.array_record"), "group_size:1")
    for record in written:
        writer.write(record)
    writer.close()
    (folder / "dataset.json").write_text(description if isinstance(description, str) else json.dumps(description))


def small_config(folder):
    config = load_config(ROOT / "configs" / "pretrain_sample.py", ["data.threads=0"])
    with config.unlocked():
        config.data.sources = ((str(folder), 1.0),)
    return config


def describe(count):
    modalities = {
        "optical": {"dtype": "uint8", "sensors": {"rgb": ["red", "green", "blue"]}},
        "sar": {"dtype": "float32", "sensors": {"sentinel1-grd": ["VV", "VH"]}},
    }
    shards = [{"file": "samples-00000.array_record", "count": count}]
    return {"format": records.FORMAT, "count": count, "shards": shards, "modalities": modalities}


@fuzz
@given(flips)
def test_verbs_pass_over_bad_records(changed):
    record = bytearray(RECORD)
    for place, bit in changed:
        record[place] ^= 1 << bit
    with tempfile.TemporaryDirectory() as folder:
        data = pathlib.Path(folder) / "data"
        write(data, [RECORD, bytes(record)], describe(2))
        ends_well(["data", "stats", f"--dataset={data}"])


paths = st.lists(
    st.sampled_from(["format", "count", "shards", "modalities", "optical", "dtype", "sensors", "rgb"]), min_size=1
)


def put(tree, path, value):
    """`value` somewhere along a path of keys, as far as the tree has them."""
    for key in path[:-1]:
        if isinstance(tree.get(key), dict):
            tree = tree[key]
        elif isinstance(tree.get(key), list) and tree[key] and isinstance(tree[key][0], dict):
            tree = tree[key][0]
    tree[path[-1]] = value


@fuzz
@given(st.one_of(st.text(max_size=30), st.tuples(paths, anything)))
def test_descriptions_that_say_what_they_like(said):
    description = describe(1)
    if isinstance(said, str):
        description = said
    else:
        put(description, *said)
    with tempfile.TemporaryDirectory() as folder:
        data = pathlib.Path(folder) / "data"
        write(data, [RECORD], description)
        ends_well(["data", "stats", f"--dataset={data}"])
        with deadline(), contextlib.suppress(UserError):
            Loader(small_config(data)).close()


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "", "a/../../secret", ".."])
def test_a_data_set_reads_files_of_its_own_folder_alone(tmp_path, name):
    (tmp_path / "secret").write_text("not yours")
    description = describe(1)
    description["shards"][0]["file"] = name
    write(tmp_path / "data", [RECORD], description)
    code, told = ends_well(["data", "stats", f"--dataset={tmp_path / 'data'}"])
    assert code == 2
    assert "not a name in its folder" in told
