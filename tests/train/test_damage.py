"""Checkpoints damaged on the disk in every way that we could think of: found, named, and the one before it used."""

import json
import logging
import pathlib
import random
import shutil

import pytest
from test_checkpoint import CONFIG, abstract, biggest_file, make_config, make_state, save

from skyjax.errors import UserError
from skyjax.train import checkpoint, notes


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    return save(tmp_path_factory.mktemp("two"), [2, 5])


@pytest.fixture
def folder(two, tmp_path):
    return pathlib.Path(shutil.copytree(two, tmp_path / checkpoint.FOLDER))


def files(checkpoint_folder):
    return sorted(path for path in checkpoint_folder.rglob("*") if path.is_file())


def step_restored(folder, assert_same_bits):
    """The step that a run goes on from; what it gets is what was written, to the last bit, or it is damaged."""
    state, found = checkpoint.restore_newest(folder, abstract(), make_config())
    assert_same_bits(state, make_state(found["step"]))
    assert (found["position"], found["config"]) == (4 * found["step"], CONFIG)
    # And a writer takes the folder as it is now.
    save(folder.parent, [found["step"] + 1])
    return found["step"]


def harm(folder, newest, assert_same_bits, what):
    """How many of the changes (file of step `newest`, what it then holds) were found; each is undone again."""
    told = []
    for path, data in what:
        whole = path.read_bytes()
        path.write_bytes(data)
        try:
            state, found = checkpoint.load(folder / newest, abstract()), checkpoint.read_notes(folder / newest)
        except UserError as error:
            told.append(str(error))
        else:
            assert_same_bits(state, make_state(int(newest)))
            assert found["position"] == 4 * int(newest)
        path.write_bytes(whole)
    assert all("is damaged" in text for text in told)
    return len(told)


@pytest.mark.parametrize(
    ("seed", "trials"), [(0, 40)] + [pytest.param(seed, 1000, marks=pytest.mark.slow) for seed in (1, 2)]
)
def test_a_flipped_bit_anywhere_is_found_or_harmless(folder, seed, trials, assert_same_bits):
    rng = random.Random(seed)

    def flips():
        for _ in range(trials):
            path = rng.choice(files(folder / "5"))
            data = bytearray(path.read_bytes())
            place, bit = rng.randrange(len(data)), rng.randrange(8)
            data[place] ^= 1 << bit
            print(f"seed {seed}: {path.relative_to(folder)}, byte {place}, bit {bit}")  # shown when it fails
            yield path, bytes(data)

    assert harm(folder, "5", assert_same_bits, flips()) > trials / 4


def test_a_file_cut_anywhere_is_found_or_harmless(folder, assert_same_bits):
    rng = random.Random(3)

    def cuts():
        for path in files(folder / "5"):
            whole = path.read_bytes()
            for length in (0, rng.randrange(len(whole)), len(whole) - 1):
                print(f"{path.relative_to(folder)} cut to {length} bytes")
                yield path, whole[:length]

    # Not read are both commit_success.txt, the shardings, and the manifest that each process wrote by itself.
    assert harm(folder, "5", assert_same_bits, cuts()) >= 3 * (len(files(folder / "5")) - 5)


def test_any_missing_file_is_found_or_harmless(two, tmp_path, assert_same_bits):
    found = {}
    for number, path in enumerate(files(two / "5")):
        folder = pathlib.Path(shutil.copytree(two, tmp_path / f"{number}" / checkpoint.FOLDER))
        (folder / path.relative_to(two)).unlink()
        name = str(path.relative_to(two / "5"))
        found[name.split("/d/")[0]] = step_restored(folder, assert_same_bits)
    assert {name for name, step in found.items() if step == 5} <= {
        "commit_success.txt", "state/commit_success.txt", "state/_sharding", "state/ocdbt.process_0/manifest.ocdbt",
        "state/array_metadatas/process_0",
    }  # fmt: skip
    assert found["state/ocdbt.process_0"] == found["state/_METADATA"] == found["_CHECKPOINT_METADATA"] == 2


def test_a_data_file_of_another_checkpoint_is_found(folder, assert_same_bits):
    shutil.copyfile(biggest_file(folder / "2"), biggest_file(folder / "5"))
    assert step_restored(folder, assert_same_bits) == 2


def test_the_newest_may_be_deleted(folder, assert_same_bits):
    shutil.rmtree(folder / "5")
    assert step_restored(folder, assert_same_bits) == 2


def test_two_newest_damaged(folder, assert_same_bits, caplog):
    save(folder.parent, [7])
    for step in ("5", "7"):
        biggest_file(folder / step).write_bytes(b"\0" * 100)
    with caplog.at_level(logging.WARNING):
        assert step_restored(folder, assert_same_bits) == 2
    told = [record.message for record in caplog.records if "going on from step 2" in record.message]
    assert [name in line for line, name in zip(told, ('/7" is damaged', '/5" is damaged'), strict=True)] == [True] * 2
    assert checkpoint.steps(folder.with_name("checkpoints.damaged")) == [5, 7]


def test_an_older_one_whose_notes_are_damaged_goes_aside(folder, assert_same_bits, caplog):
    """Orbax would not open the folder: its reader of these notes raises on a name that it does not know."""
    path = folder / "2" / "_CHECKPOINT_METADATA"
    path.write_text(path.read_text().replace("performance_metrics", "pernormance_metrics"))
    with caplog.at_level(logging.WARNING):
        assert step_restored(folder, assert_same_bits) == 5
    assert "going on from step 5" in caplog.text
    assert checkpoint.steps(folder) == [5, 6]


def tamper(checkpoint_folder, **changes):
    """Other notes, with a seal that fits."""
    path = checkpoint_folder / "_CHECKPOINT_METADATA"
    whole = json.loads(path.read_text())
    told = notes.unseal(whole["custom_metadata"])
    sums = told["checksums"] | changes.pop("checksums", {})
    told = {**told, **changes, "checksums": sums}
    whole["custom_metadata"] = told | {"seal": notes._checksum_of(told)}
    path.write_text(json.dumps(whole))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"step": 4}, "its notes' step is 4, and 5 belongs to it"),
        ({"position": 24}, "position is 24, and 20 belongs to it"),
        ({"checksums": {"params/kernel": 1}}, '"params/kernel" is not what was written'),
    ],
)
def test_what_is_asserted_after_a_restore(folder, change, said, assert_same_bits, caplog):
    tamper(folder / "5", **change)
    with caplog.at_level(logging.WARNING):
        assert step_restored(folder, assert_same_bits) == 2
    assert said in caplog.text


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda state: state | {"step": state["step"] + 1}, "step is 6, and 5 belongs to it"),
        (
            lambda state: state | {"optimizer": state["optimizer"] | {"count": state["step"]}},
            "optimizer/count is 5, and 4 belongs to it",
        ),
    ],
)
def test_a_state_of_another_step_is_found(tmp_path, change, said, assert_same_bits, caplog, monkeypatch):
    """Whole by its checksums, but the optimizer did not do these steps."""
    folder = save(tmp_path, [2])
    with monkeypatch.context() as patch:
        patch.setattr("test_checkpoint.make_state", lambda step: change(make_state(step)))
        save(tmp_path, [5])
    with caplog.at_level(logging.WARNING):
        assert step_restored(folder, assert_same_bits) == 2
    assert said in caplog.text


def test_a_renamed_checkpoint_is_found(folder, assert_same_bits, caplog):
    (folder / "5").rename(folder / "9")
    with caplog.at_level(logging.WARNING):
        assert step_restored(folder, assert_same_bits) == 2
    assert "step is 5, and 9 belongs to it" in caplog.text


def test_a_later_format_is_refused_and_stays(folder):
    tamper(folder / "5", format=4)
    with pytest.raises(notes.Refused, match=r'checkpoint: ".*5" is of format 4, written by skyjax of an unknown'):
        checkpoint.restore_newest(folder, abstract(), make_config())
    assert checkpoint.steps(folder) == [2, 5]
