"""The stamp, the checksums and the seal of a checkpoint, against plain Python."""

import json
import pathlib
import tarfile

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest

from skyjax.errors import UserError
from skyjax.parallel.mesh import make_mesh
from skyjax.parallel.sharding import state_shardings, with_shardings
from skyjax.train import checkpoint, notes
from skyjax.train import state as states

NOTES = {"step": 3, "position": 12, "config": {"a": 1e-05, "b": [1, 2.5]}, "versions": {"skyjax": "0.1.0"}}
OLDER = pathlib.Path(__file__).parent / "older"


def odd_number(place):
    """The finaliser of MurmurHash3 in Python's integers, and the last bit set."""
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        place = (place ^ place >> shift) * factor % 2**32
    return (place ^ place >> 16) | 1


def sum_by_places(words):
    return sum(int(word) * odd_number(place) for place, word in enumerate(words)) % 2**32


def test_checksums_are_sums_of_words_times_numbers_of_their_places():
    kernel = np.random.default_rng(0).normal(size=(3, 4, 5)).astype(np.float32)
    state = {"kernel": jnp.asarray(kernel), "count": jnp.int32(-1), "half": jnp.bfloat16([1.0, 1.0])}
    want = {
        "kernel": sum_by_places(kernel.view(np.uint32).ravel()),
        "count": sum_by_places([2**32 - 1]),
        "half": sum_by_places([0x3F80, 0x3F80]),
    }
    assert notes.checksums(state) == want


def test_plain_sums_are_those_of_format_1():
    state = {"a": jnp.array([1.5, -2.25], jnp.float32), "b": jnp.array([3, -1], jnp.int32), "c": jnp.bfloat16([1.0])}
    want = {
        "a": int(np.array([1.5, -2.25], np.float32).view(np.uint32).sum(dtype=np.uint32)),
        "b": 2,
        "c": 0x3F80,
    }
    assert notes.checksums(state, places=False) == want


@pytest.mark.parametrize("size", [1, 2, 64, 1024])
def test_a_block_in_another_place_is_seen(size):
    """As when a shard's file stands where another should."""
    values = np.random.default_rng(1).normal(size=4096).astype(np.float32)
    exchanged = values.copy()
    exchanged[:size], exchanged[2048 : 2048 + size] = values[2048 : 2048 + size], values[:size]
    got, before = (notes.checksums({"x": jnp.asarray(x)})["x"] for x in (exchanged, values))
    assert got != before
    got, before = (notes.checksums({"x": jnp.asarray(x)}, places=False)["x"] for x in (exchanged, values))
    assert got == before  # which is why format 2 is


def test_any_one_bit_is_seen():
    words = np.random.default_rng(2).integers(0, 2**32, 7, np.uint32)
    before = notes.checksums({"x": jnp.asarray(words)})["x"]
    for place in range(7):
        for bit in range(32):
            flipped = words.copy()
            flipped[place] ^= np.uint32(1 << bit)
            assert notes.checksums({"x": jnp.asarray(flipped)})["x"] != before


def test_notes_come_back_from_json():
    stored = json.loads(json.dumps(notes.seal(NOTES, {"x": jnp.ones(3)})))
    back = notes.unseal(stored)
    assert back == NOTES | {"format": notes.FORMAT, "checksums": notes.checksums({"x": jnp.ones(3)})}


@pytest.mark.parametrize(
    "change",
    [
        {"position": 16},
        {"config": {"a": 1e-05, "b": [1, 2.0]}},
        {"seal": 5},
        {"more": 1},
        {"format": "2"},
        {"format": 1},
        {"format": notes.FORMAT + 1},
    ],
)
def test_notes_that_were_changed_are_seen(change):
    with pytest.raises(ValueError, match=r"not what was written|its format is"):
        notes.unseal(notes.seal(NOTES, {}) | change)


def test_a_later_format_is_refused_by_name():
    later = NOTES | {"format": 4, "versions": {"skyjax": "0.9.0", "git": "0123456789abcdef"}}
    with pytest.raises(
        notes.Refused, match=r"of format 4, written by skyjax 0.9.0 \(0123456789ab\); this one reads up"
    ):
        notes.unseal(later | {"seal": notes._checksum_of(later)})


@pytest.fixture(scope="module")
def older(tmp_path_factory):
    """The checkpoint of a run of two steps by the last revision that wrote format 1."""
    folder = tmp_path_factory.mktemp("older")
    with tarfile.open(OLDER / "format1.tar.xz") as archive:
        archive.extractall(folder, filter="data")
    return folder / checkpoint.FOLDER


def test_a_checkpoint_of_format_1_is_read(older):
    """Its arrays are held to the checksums that it has."""
    stored = json.loads((older / "2" / "_CHECKPOINT_METADATA").read_text())["custom_metadata"]
    assert "format" not in stored
    config = ml_collections.ConfigDict(stored["config"])
    mesh = make_mesh(config.mesh)
    abstract = states.abstract(config)
    wanted = with_shardings(abstract, state_shardings(abstract, mesh))
    state, found = checkpoint.restore_newest(older, wanted, config)
    assert (int(state["step"]), found["position"], found["evaluated"], found["bad_samples"]) == (2, 8, 2, 0)
    assert found["order"] == 1  # it goes on as it began
    sums = {
        jax.tree_util.keystr(path, simple=True, separator="/"): int(
            np.ascontiguousarray(leaf).view(np.uint32).sum(dtype=np.uint32)
        )
        for path, leaf in jax.tree_util.tree_leaves_with_path(state)
    }
    assert sums == stored["checksums"]


def test_a_checkpoint_of_other_arrays_is_refused_and_stays(older):
    """As after a revision that gave the model another layer."""
    config = ml_collections.ConfigDict(checkpoint.read_notes(older / "2")["config"])
    abstract = states.abstract(config)
    wanted = with_shardings(abstract, state_shardings(abstract, make_mesh(config.mesh)))
    wanted["params"]["encoder"]["another"] = wanted["params"]["encoder"].pop("fusion")
    with pytest.raises(UserError) as error:
        checkpoint.restore_newest(older, wanted, config)
    text = str(error.value)
    assert 'was written by skyjax 0.1.0 (6170e44ed135) and has no "params/encoder/another/' in text
    assert '" and ' in text
    assert 'has "params/encoder/fusion/' in text
    assert "go on with the skyjax that wrote it" in text
    assert checkpoint.steps(older) == [2]
