"""Checkpoints, weights folders and run directories of strangers: a model, or a sentence; whatever their files say."""

import contextlib
import copy
import json
import pathlib
import pickle
import shutil
import tempfile

import jax
import pytest
from fuzzing import TIMES, deadline, ends_well, fuzz
from hypothesis import given, settings
from hypothesis import strategies as st

import skyjax
from skyjax.errors import UserError
from skyjax.train import checkpoint, loop
from skyjax.train import state as states
from skyjax.train.notes import _checksum_of

few = settings(fuzz, max_examples=8 * TIMES)  # each takes Orbax a second


@pytest.fixture(scope="module")
def saved(tiny_config, tmp_path_factory):
    """A run's directory with the checkpoint of a step, a weights folder, and what its report reads."""
    config = tiny_config(modalities=("sar",))
    state = jax.tree.map(lambda leaf: jax.numpy.zeros(leaf.shape, leaf.dtype), states.abstract(config))
    workdir = tmp_path_factory.mktemp("saved") / "run"
    with checkpoint.CheckpointWriter(workdir, config.checkpoint) as writer:
        notes = {"step": 0, "position": 0, "config": config.to_dict(), "versions": loop.versions()}
        writer.save(state, {**notes, "statistics": loop.statistics_table(config.model)})
    (workdir / "weights").mkdir()
    skyjax.load(workdir).save(workdir / "weights")
    (workdir / "config.json").write_text(json.dumps(config.to_dict()))
    (workdir / "versions.json").write_text(json.dumps(loop.versions()))
    (workdir / "metrics.jsonl").write_text("".join(json.dumps({"step": n, "loss": 1.0}) + "\n" for n in range(4)))
    (workdir / "goodput.json").write_text(json.dumps({"step": 3, "starts": 1, "seconds": {"step": 1.0}}))
    return workdir


@contextlib.contextmanager
def copied(folder):
    with tempfile.TemporaryDirectory() as place:
        yield pathlib.Path(shutil.copytree(folder, pathlib.Path(place) / folder.name))


def load_or_refuse(folder):
    with deadline(), contextlib.suppress(UserError):
        skyjax.load(folder)


flips = st.lists(st.tuples(st.floats(0, 1), st.integers(1, 255)), min_size=1, max_size=4)
whole = st.one_of(st.integers(-3, 70), st.sampled_from([2**31, 2**62, 10**30]))
anything = st.recursive(
    st.one_of(st.none(), st.booleans(), whole, st.floats(), st.text(max_size=8)),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=8), inner, max_size=3)),
    max_leaves=5,
)


def damage(path, changed, kept):
    data = bytearray(path.read_bytes())
    for place, change in changed:
        if data:
            data[int(place * (len(data) - 1))] ^= change
    path.write_bytes(data[: int(kept * len(data))] if kept < 0.9 else data)


@few
@given(st.data(), flips, st.floats(0, 3))
def test_damaged_files_of_a_checkpoint(saved, data, changed, kept):
    with copied(saved / "checkpoints") as folder:
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        for path in data.draw(st.lists(st.sampled_from(files), min_size=1, max_size=2)):
            damage(path, changed, kept)
        load_or_refuse(folder)


@few
@given(st.sampled_from(["skyjax.json", "model.safetensors"]), flips, st.floats(0, 3))
def test_damaged_files_of_a_weights_folder(saved, name, changed, kept):
    with copied(saved / "weights") as folder:
        damage(folder / name, changed, kept)
        load_or_refuse(folder)


def places(tree, path=()):
    """Every path of keys and numbers in a tree of JSON."""
    yield path
    for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ():
        yield from places(value, (*path, key))


def put(tree, path, value):
    for key in path[:-1]:
        tree = tree[key]
    tree[path[-1]] = value


# What loading reads; the rest of the config is kept and never looked at.
def read_at_load(path):
    return path and (path[0] != "config" or path[:2] == ("config", "model") or len(path) < 3)


@fuzz
@given(st.data(), anything)
def test_weights_folders_whose_notes_say_what_they_like(saved, data, value):
    with copied(saved / "weights") as folder:
        notes = json.loads((folder / "skyjax.json").read_text())
        put(notes, data.draw(st.sampled_from(list(filter(read_at_load, places(notes))))), value)
        (folder / "skyjax.json").write_text(json.dumps(notes))
        load_or_refuse(folder)


@few
@given(st.data(), anything)
def test_checkpoints_whose_notes_say_what_they_like(saved, data, value):
    """Sealed anew: what a stranger writes on purpose."""
    with copied(saved / "checkpoints") as folder:
        path = folder / "0" / "_CHECKPOINT_METADATA"
        if not path.is_file():
            (path,) = (folder / "0").glob("*METADATA*")
        stored = json.loads(path.read_text())
        notes = copy.deepcopy(stored["custom_metadata"])
        del notes["seal"]
        put(notes, data.draw(st.sampled_from(list(filter(read_at_load, places(notes))))), value)
        stored["custom_metadata"] = {**notes, "seal": _checksum_of(notes)}
        path.write_text(json.dumps(stored))
        load_or_refuse(folder)


@few
@given(st.sampled_from(["config.json", "versions.json", "metrics.jsonl", "goodput.json"]), st.data(), anything)
def test_run_directories_whose_files_say_what_they_like(saved, name, data, value):
    with tempfile.TemporaryDirectory() as place:
        workdir = pathlib.Path(place)
        for other in ("config.json", "versions.json", "metrics.jsonl", "goodput.json"):
            shutil.copy(saved / other, workdir)
        lines = [json.loads(line) for line in (workdir / name).read_text().splitlines()]
        path = data.draw(st.sampled_from([path for path in places(lines) if path]))
        put(lines, path, value)
        (workdir / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
        code, _ = ends_well(["report", f"--workdir={workdir}"])
        assert code == 0


class Program:
    def __reduce__(self):
        return pathlib.Path.touch, (pathlib.Path("ran"),)


@pytest.mark.parametrize("name", ["skyjax.json", "model.safetensors"])
def test_a_pickle_is_not_run(saved, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    pickle.loads(pickle.dumps(Program()))
    assert pathlib.Path("ran").exists()  # it would
    pathlib.Path("ran").unlink()
    with copied(saved / "weights") as folder:
        (folder / name).write_bytes(pickle.dumps(Program()))
        with pytest.raises(UserError):
            skyjax.load(folder)
    assert not pathlib.Path("ran").exists()


def test_the_config_of_a_checkpoint_is_read_and_not_run(saved, tmp_path, monkeypatch):
    """A config's file is the user's own Python; what travels in a checkpoint is JSON."""
    monkeypatch.chdir(tmp_path)
    with copied(saved / "weights") as folder:
        notes = json.loads((folder / "skyjax.json").read_text())
        for path in [path for path in places(notes["config"]) if path]:
            if isinstance(notes["config"], dict) and isinstance(path[-1], str):
                tree = notes["config"]
                for key in path[:-1]:
                    tree = tree[key]
                if isinstance(tree.get(path[-1]), str):
                    tree[path[-1]] = "__import__('pathlib').Path('ran').touch()"
        (folder / "skyjax.json").write_text(json.dumps(notes))
        load_or_refuse(folder)
    assert not pathlib.Path("ran").exists()
