"""What goes wrong around a run while it trains: stated behaviour (docs/resume.md), counted, nothing else disturbed."""

import pathlib
import shutil
import subprocess
import time

import jax
import numpy as np
import pytest
from array_record.python.array_record_module import ArrayRecordWriter
from changed import changed
from real_runs import final_state, lines

from skyjax.errors import UserError
from skyjax.input.records import RecordSource, encode, write
from skyjax.train import checkpoint, goodput, loop


@pytest.fixture
def with_bad_record(config, sample_records, tmp_path):
    """The config with six copies of a data set; the first, which half of the samples are from, has a cut record."""
    folders = [tmp_path / f"copy {number}" for number in range(6)]
    for folder in folders:
        shutil.copytree(sample_records, folder)
    (shard,) = folders[0].glob("*.array_record")
    writer = ArrayRecordWriter(str(shard), "group_size:1")
    for number, sample in enumerate(RecordSource(sample_records)):
        record = encode(sample)
        writer.write(record[: len(record) // 2] if number == 3 else record)
    writer.close()
    return changed(
        config, data__sources=tuple((str(folder), 1.0 if number else 5.0) for number, folder in enumerate(folders))
    )


def places_of_bad(config):
    """At each step, how many samples of the batch are empty for their record; and the batches."""
    loader = loop.Loader(config)
    batches = [next(loader) for _ in range(config.steps)]
    loader.close()
    return np.cumsum([batch["bad"].sum() for batch in batches]), batches


def test_a_bad_record_is_an_empty_sample_and_counted(with_bad_record, quick, tmp_path, caplog):
    """Over a preemption too: what was counted before is in the checkpoint."""
    workdir, stopped = tmp_path / "run", changed(with_bad_record, steps=10)
    counts, batches = places_of_bad(with_bad_record)
    assert counts[9] > 0
    assert counts[-1] > counts[9]
    assert loop.train(stopped, workdir) == 0
    assert loop.train(with_bad_record, workdir) == 0
    assert [line["bad_samples"] for line in lines(workdir)] == counts.tolist()
    assert [line["skipped"] for line in lines(workdir)] == [0] * with_bad_record.steps
    named = [record.message for record in caplog.records if "skipped, 1 of 144 so far" in record.message]
    assert len(named) == 3  # once a start, and once above
    assert "copy 0/samples-00000.array_record: record 3: " in named[0]
    assert "record 3 is truncated or corrupt" in named[0]
    # Every other sample is what it would have been.
    first, second = (source for source, _ in with_bad_record.data.sources[:2])
    shutil.copytree(second, first, dirs_exist_ok=True)
    _, whole = places_of_bad(with_bad_record)

    def same(got, want, good):
        return np.array_equal(got[good], want[good], equal_nan=got.dtype.kind == "f")

    for got, want in zip(batches, whole, strict=True):
        assert all(jax.tree.leaves(jax.tree.map(lambda x, y, good=~got["bad"]: same(x, y, good), got, want)))


@pytest.fixture
def poisoned(monkeypatch):
    """The fifth batch has radar values near the end of float32: finite, and nothing computed from them is."""

    class Poisoned(loop.Loader):
        def __next__(self):
            batch = super().__next__()
            if self.position == 5 * len(batch["index"]):
                values = batch["global"]["sar"]["values"]
                batch["global"]["sar"]["values"] = np.full_like(values, 3e38)
            return batch

    monkeypatch.setattr(loop, "Loader", Poisoned)


def test_a_batch_that_is_not_finite_is_skipped_and_counted(config, straight, quick, poisoned, tmp_path, capfd):
    assert loop.train(config, tmp_path) == 0
    found = lines(tmp_path)
    assert found[:4] == lines(straight)[:4]
    assert [line["step"] for line in found if line["loss"] is None or line["gradient_norm"] is None] == [5]
    assert [line["skipped"] for line in found] == [0] * 4 + [1] * 26
    assert [line["nonfinite_in_a_row"] for line in found] == [0] * 4 + [1] + [0] * 25
    # The samples go on as if nothing had been.
    assert [line["samples"] for line in found[5:]] == [line["samples"] for line in lines(straight)[5:]]
    assert "step 5: loss or gradient is not finite; update skipped, 1 so far" in capfd.readouterr().err
    assert loop.train(config, tmp_path) == 0  # an optimizer that is one update behind is no damage
    assert "damaged" not in capfd.readouterr().err


def test_a_slow_disk_costs_time_alone(config, straight, quick, tmp_path, monkeypatch, assert_same_bits):
    class Slow(loop.Loader):
        def __next__(self):
            if self.position % 32 == 0:  # every fourth batch
                time.sleep(0.5)
            return super().__next__()

    monkeypatch.setattr(loop, "Loader", Slow)
    assert loop.train(config, tmp_path) == 0
    assert lines(tmp_path) == lines(straight)
    assert_same_bits(final_state(tmp_path, config), final_state(straight, config))
    waited, before = (goodput.read(workdir / goodput.FILE)["seconds"]["data"] for workdir in (tmp_path, straight))
    assert waited > before + 0.5


def test_a_vanished_file_ends_the_run_in_words_and_keeps_its_checkpoints(
    config, straight, quick, more_records, tmp_path, monkeypatch, assert_same_bits
):
    """It was there when the run began and is gone when it is first read: the start after a preemption."""
    moved = tmp_path / "moved"
    (shard,) = more_records.glob("*.array_record")

    class Vanishing(loop.Loader):
        def __init__(self, *arguments, **options):
            super().__init__(*arguments, **options)
            if self.position:
                shutil.move(shard, moved)

    workdir = tmp_path / "run"
    monkeypatch.setattr(loop, "Loader", Vanishing)
    assert loop.train(changed(config, steps=10), workdir) == 0
    try:
        with pytest.raises(UserError, match=r"\d+ of \d+ records are bad, more than 1%; the first is without SAR/"):
            loop.train(config, workdir)
    finally:
        shutil.move(moved, shard)
    assert checkpoint.steps(workdir / checkpoint.FOLDER) == [10]
    monkeypatch.undo()


def test_a_source_of_another_length_is_told(config, straight, quick, tmp_path, caplog):
    """The order of the samples depends on it."""
    workdir = pathlib.Path(shutil.copytree(straight, tmp_path / "run"))
    folder = pathlib.Path(config.data.sources[1][0])
    here = pathlib.Path(shutil.copytree(folder, tmp_path / "kept"))
    try:
        write(list(RecordSource(here))[:-1], folder)
        assert loop.train(config, workdir) == 0
    finally:
        shutil.rmtree(folder)
        shutil.copytree(here, folder)
    count = len(RecordSource(folder))
    assert f'without SAR" had {count} records when this run began and has {count - 1} now' in caplog.text


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 12 MiB, and a function that gives it another size."""
    folder = tmp_path / "disk"
    folder.mkdir()
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=12m", "tmpfs", str(folder)], capture_output=True, text=True, check=False
    )
    if made.returncode:
        pytest.skip(f"needs the right to mount: {made.stderr.strip()}")
    yield folder, lambda size: subprocess.run(["mount", "-o", f"remount,size={size}", str(folder)], check=True)
    subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.parametrize("taken_while_saving", [False, True])
def test_a_full_disk_ends_the_run_in_words_and_it_goes_on(
    config, straight, quick, small_disk, monkeypatch, taken_while_saving, assert_same_bits
):
    """Two checkpoints of 5 MiB fit; the third is refused before it begins, or finds the space gone while it writes."""
    folder, resize = small_disk
    workdir = folder / "run"
    with monkeypatch.context() as patch:
        if taken_while_saving:
            patch.setattr(shutil, "disk_usage", lambda _: type("Usage", (), {"free": 2**40}))
        with pytest.raises(UserError) as error:
            loop.train(config, workdir)
    said = "cannot be written: " if taken_while_saving else "MiB are free; free space and start again"
    assert said in str(error.value)
    assert "the run goes on from its newest checkpoint" in str(error.value)
    assert checkpoint.steps(workdir / checkpoint.FOLDER) == [10, 20]
    resize("60m")
    assert loop.train(config, workdir) == 0
    assert lines(workdir) == lines(straight)
    assert_same_bits(final_state(workdir, config), final_state(straight, config))
