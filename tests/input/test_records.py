"""Records: what goes in comes out, from outside skyjax too, and everything that can be wrong with them is named."""

import dataclasses
import json
import pathlib
import pickle
import re
import subprocess
import sys
import threading

import numpy as np
import pytest
import safetensors.numpy
from numpy.testing import assert_array_equal

from skyjax.errors import BadRecord, UserError
from skyjax.input import records
from skyjax.sample import Sample, empty_sample, make_sequence

ROOT = pathlib.Path(__file__).parents[2]


def make_sample(number=0):
    rng = np.random.default_rng(number)
    optical = make_sequence(
        rng.integers(0, 255, (1, 24, 24, 4), np.uint8),
        "aerial",
        ("nir", "green", "blue", "red"),
        days=np.array([17_000]),
    )
    sar = make_sequence(
        rng.normal(-15, 4, (3, 6, 6, 2)).astype(np.float32), "sentinel1-grd", ("VV", "VH"), days=np.array([9, 7, 7])
    )
    labels = {"class": np.array(number, np.int32), "map": rng.integers(-1, 5, (6, 6)).astype(np.int16)}
    labels["shares"] = np.array([0, 0.25, 0.75], np.float32)
    lonlat = np.array([9.9, 52.1], np.float32)
    return Sample({"optical": optical, "sar": sar}, lonlat, ("ein Wald, grün",), labels, f"site-{number}", "somewhere")


def assert_same(got, want):
    assert (got.id, got.source, got.texts) == (want.id, want.source, want.texts)
    assert_array_equal(got.lonlat, want.lonlat)
    assert got.labels.keys() == want.labels.keys()
    for name in want.labels:
        assert_array_equal(got.labels[name], want.labels[name])
        assert got.labels[name].shape == want.labels[name].shape
    assert list(got.sequences) == list(want.sequences)
    for a, b in zip(got.sequences.values(), want.sequences.values(), strict=True):
        assert (a.sensor, a.bands, a.values.dtype) == (b.sensor, b.bands, b.values.dtype)
        for field in ("values", "days", "valid", "clear", "extent"):
            assert_array_equal(getattr(a, field), getattr(b, field))


@pytest.fixture
def dataset(tmp_path):
    records.write([make_sample(i) for i in range(7)], tmp_path / "set", shard_size=12_000, about={"licence": "CC0"})
    return tmp_path / "set"


@pytest.mark.parametrize("sample", [make_sample(), empty_sample("nothing", "there")], ids=["full", "empty"])
def test_decode_inverts_encode(sample):
    assert_same(records.decode(records.encode(sample)), sample)


def test_values_that_are_not_contiguous_keep_their_order():
    sample = make_sample()
    turned = sample.sequences["optical"].values.swapaxes(1, 2)
    sequence = make_sequence(turned, "aerial", ("nir", "green", "blue", "red"), days=np.array([0]))
    got = records.decode(records.encode(Sample({"optical": sequence}, sample.lonlat)))
    assert_array_equal(got.sequences["optical"].values, turned)


def test_random_access_over_files(dataset):
    source = records.RecordSource(dataset)
    assert len(source) == 7
    assert len(source.description["shards"]) > 1
    for index in (6, 0, 3, -1):
        assert_same(source[index], make_sample(index % 7))
    with pytest.raises(IndexError):
        source[7]
    first = source.description["shards"][0]["count"]
    assert source.name(first) == "samples-00001.array_record: record 0"


def test_records_that_are_not_compressed_are_larger_and_the_same(dataset, tmp_path):
    records.write([make_sample(i) for i in range(7)], tmp_path / "plain", compression="none")
    even = make_sequence(np.full((1, 999, 999, 3), 7, np.uint8), "rgb", ("red", "green", "blue"), days=np.array([9]))
    sizes = {
        name: records.write([Sample({"optical": even}, np.zeros(2))], tmp_path / name, compression=name).size
        for name in records.COMPRESSIONS
    }
    assert sizes["none"] > 10 * sizes["zstd"]
    for index in range(7):
        assert_same(records.RecordSource(tmp_path / "plain")[index], records.RecordSource(dataset)[index])
    with pytest.raises(UserError, match='compression "gzip" is not one of zstd, none'):
        records.write([make_sample()], tmp_path / "other", compression="gzip")


def test_description(dataset):
    description = records.RecordSource(dataset).description
    assert description["count"] == 7
    assert description["sources"] == {"somewhere": 7}
    assert description["licence"] == "CC0"
    optical = {"aerial": ["nir", "green", "blue", "red"]}
    assert description["modalities"]["optical"] == {"samples": 7, "dates": 7, "dtype": "uint8", "sensors": optical}
    assert description["modalities"]["sar"]["dtype"] == "float32"


def test_widest_type():
    assert records.widest_type(["uint8", "uint16"]) == "uint16"
    assert records.widest_type(["uint8", "int16"]) == "int16"
    assert records.widest_type(["uint16", "int16"]) == "float32"  # numpy's answer, int32, is not a stored type


def test_a_source_travels_to_other_processes_and_threads(dataset):
    source = records.RecordSource(dataset)
    copy = pickle.loads(pickle.dumps(source))
    assert repr(copy) == repr(source)
    got = {}
    threads = [threading.Thread(target=lambda i=i: got.update({i: copy[i].id})) for i in range(7)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert got == {i: f"site-{i}" for i in range(7)}


def test_documented_reader_needs_no_skyjax(dataset, tmp_path):
    code = re.search(r"```python\n(.*?)```", (ROOT / "docs" / "records.md").read_text(), re.DOTALL).group(1)
    script = tmp_path / "read.py"
    script.write_text(code + "\nassert not any(name.split('.')[0] == 'skyjax' for name in sys.modules)\n")
    done = subprocess.run(
        [sys.executable, str(script), str(dataset)], cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert "site-0 somewhere [ 9.9 52.1]" in done.stdout
    assert "optical aerial ['nir', 'green', 'blue', 'red'] (1, 24, 24, 4) uint8" in done.stdout
    assert "sar sentinel1-grd ['VV', 'VH'] (3, 6, 6, 2) float32" in done.stdout


# --- bad records -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [0, 5, 200, -1], ids=["empty", "stub", "in the header", "one byte short"])
def test_truncated_record(length):
    record = records.encode(make_sample())
    with pytest.raises(
        BadRecord, match=r"samples-00000.array_record: record 3 is truncated or corrupt \([\d,]+ bytes\)"
    ):
        records.decode(record[:length], name="samples-00000.array_record: record 3")


def test_a_flipped_bit_in_the_header_is_a_bad_record():
    record = bytearray(records.encode(make_sample()))
    refused = 0
    for position in range(8, 400, 7):
        flipped = record.copy()
        flipped[position] ^= 0x80
        try:
            records.decode(bytes(flipped))
        except BadRecord:
            refused += 1
    assert refused == len(range(8, 400, 7))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda a, w: w.update(format="skyjax-sample 9"), 'format is "skyjax-sample 9"'),
        (lambda a, w: a.pop("sar/clear"), "sar/clear"),
        (lambda a, w: a.update({"sar/days": np.array([9, 7, 7], np.int32)}), "dates are in order"),
        (lambda a, w: a.update({"sar/values": a["sar/values"][..., :1]}), "as many band names"),
        (lambda a, w: a.update({"sar/values": a["sar/values"].astype(np.float64)}), "values is one of"),
        (lambda a, w: w.update(sequences=w["sequences"].replace("VH", "HH")), 'band "HH" is not known'),
        (lambda a, w: w.update(sequences=w["sequences"].replace("aerial", "areal")), 'did you mean "aerial"'),
        (lambda a, w: w.update(sequences="[]"), "truncated or corrupt"),
        (lambda a, w: w.pop("sequences"), "sequences"),
    ],
)
def test_a_record_that_breaks_the_contract(change, told):
    record = records.encode(make_sample())
    arrays = safetensors.numpy.load(record)
    words = json.loads(record[8 : 8 + int.from_bytes(record[:8], "little")])["__metadata__"]
    change(arrays, words)
    with pytest.raises(BadRecord, match=re.escape(told)) as error:
        records.decode(safetensors.numpy.save(arrays, words), name="file: record 5")
    assert str(error.value).startswith("file: record 5")


def test_a_corrupt_record_leaves_its_neighbours(dataset):
    path = dataset / "samples-00000.array_record"
    source = records.RecordSource(dataset)
    data = bytearray(path.read_bytes())
    data[300] ^= 0xFF  # within the first record
    path.write_bytes(data)
    with pytest.raises(BadRecord, match=r"samples-00000\.array_record: record 0 is corrupt"):
        source[0]
    assert_same(source[6], make_sample(6))


# --- bad files and folders -------------------------------------------------------------------------------


@pytest.mark.parametrize("keep", [0, 0.5], ids=["empty", "half"])
def test_truncated_file(dataset, keep):
    path = dataset / "samples-00000.array_record"
    data = path.read_bytes()
    path.write_bytes(data[: int(keep * len(data))])
    source = records.RecordSource(dataset)
    with pytest.raises(
        UserError, match=r'samples-00000.array_record" is empty or truncated \(0 of \d+ records\)'
    ) as error:
        source[0]
    assert not isinstance(error.value, BadRecord)
    assert_same(source[6], make_sample(6))  # another file


def test_a_file_that_vanished(dataset):
    source = records.RecordSource(dataset)
    (dataset / "samples-00001.array_record").unlink()
    with pytest.raises(UserError, match="samples-00001"):
        source[6 if source.name(6).startswith("samples-00001") else source.description["shards"][0]["count"]]
    with pytest.raises(UserError, match=r'samples-00001.array_record" is missing'):
        records.RecordSource(dataset)


def test_a_folder_that_is_no_dataset(tmp_path, dataset):
    with pytest.raises(UserError, match=r"\(no dataset.json\); make one: skyjax data build"):
        records.RecordSource(tmp_path)
    with pytest.raises(UserError, match="no dataset"):
        records.RecordSource(tmp_path / "nowhere")
    (dataset / "dataset.json").write_text('{"format": "other", "shards": []}')
    with pytest.raises(UserError, match='is of format "other"'):
        records.RecordSource(dataset)
    (dataset / "dataset.json").write_text('{"format"')
    with pytest.raises(UserError, match="cannot be read"):
        records.RecordSource(dataset)


# --- writing ---------------------------------------------------------------------------------------------


def test_nothing_to_write_leaves_nothing(tmp_path):
    with pytest.raises(UserError, match="the source gave no sample"):
        records.write([], tmp_path / "set")
    assert not list(tmp_path.iterdir())


def test_an_error_of_the_source_leaves_nothing_and_keeps_what_was_there(dataset):
    def broken():
        yield make_sample(0)
        raise UserError("the source broke")

    with pytest.raises(UserError, match="the source broke"):
        records.write(broken(), dataset)
    assert [path.name for path in dataset.parent.iterdir()] == ["set"]
    assert len(records.RecordSource(dataset)) == 7


def test_a_dataset_is_replaced_and_another_folder_is_not(tmp_path, dataset):
    records.write([make_sample(1)], dataset)
    assert len(records.RecordSource(dataset)) == 1
    assert sorted(path.name for path in dataset.iterdir()) == ["dataset.json", "samples-00000.array_record"]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear")
    with pytest.raises(UserError, match="not a skyjax dataset"):
        records.write([make_sample(1)], tmp_path / "mine")
    with pytest.raises(UserError, match="is a file"):
        records.write([make_sample(1)], tmp_path / "mine" / "letter.txt")


@pytest.mark.parametrize("place", ["/proc/skyjax/set", "letter.txt/set"], ids=["no permission", "under a file"])
def test_no_permission_to_write(tmp_path, place):
    (tmp_path / "letter.txt").write_text("dear")
    with pytest.raises(UserError, match=r"cannot be written: .*; choose a folder that you may write"):
        records.write([make_sample(1)], tmp_path / place)


DISK_FULL = """
import pathlib, resource, sys
import numpy as np
from skyjax.errors import UserError
from skyjax.input import records
from skyjax.sample import Sample, make_sequence

resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))   # no file may grow beyond this: write() fails
noise = np.random.default_rng(0).integers(1, 255, (1, 200, 200, 3), np.uint8)
sample = Sample({"optical": make_sequence(noise, "rgb", ("red", "green", "blue"), days=np.array([0]))}, np.zeros(2))
try:
    records.write([sample] * 8, sys.argv[1])
except UserError as error:
    print(error)
"""


def test_disk_full_leaves_nothing(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", DISK_FULL, str(tmp_path / "set")], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert re.search(r"could not be written: .*File too large.*; is the disk full\?", done.stdout)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("value", [[0.5, 1.5], [np.nan], [[0.5]]])
def test_fractions_that_are_no_shares_are_refused(value):
    sample = dataclasses.replace(make_sample(), labels={"height": np.array(value, np.float32)})
    with pytest.raises(BadRecord, match="neither of whole numbers nor of shares"):
        records.decode(records.encode(sample))
