"""Checkpoints: what is damaged is found, what differs is named, what is old goes."""

import json
import logging
import os
import pathlib
import shutil
import types

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest
from changed import changed

from skyjax.errors import UserError
from skyjax.train import checkpoint

CONFIG = {
    "batch_size": 4,
    "steps": 9,
    "model": {"width": 8},
    "objective": {"rank_alarm": 2.0},
    "log": {"every": 1},
    "mesh": {"data": -1},
}


def make_config(**changes):
    return changed(ml_collections.ConfigDict(CONFIG), **changes)


def make_state(step):
    values = jax.random.normal(jax.random.key(step), (300, 40))
    return {
        "step": jnp.int32(step),
        "params": {"kernel": values, "bias": jnp.zeros(3)},
        "optimizer": {"0": values * 2, "count": jnp.int32(step - 1)},
        "counters": {"skipped": jnp.int32(1)},
    }


def abstract():
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), make_state(0))


def save(workdir, steps, keep=9, keep_every=0):
    with checkpoint.CheckpointWriter(workdir, types.SimpleNamespace(keep=keep, keep_every=keep_every)) as writer:
        for step in steps:
            writer.save(make_state(step), {"step": step, "position": 4 * step, "config": CONFIG, "statistics": {}})
    return workdir / checkpoint.FOLDER


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """A folder with the checkpoints of steps 2 and 5; copy it before it is damaged."""
    return save(tmp_path_factory.mktemp("two"), [2, 5])


@pytest.fixture
def folder(two, tmp_path):
    return pathlib.Path(shutil.copytree(two, tmp_path / checkpoint.FOLDER))


def test_newest_comes_back_bit_for_bit(folder, assert_same_bits):
    state, notes = checkpoint.restore_newest(folder, abstract(), make_config())
    assert_same_bits(state, make_state(5))
    assert (notes["step"], notes["position"], notes["config"]) == (5, 20, CONFIG)
    assert checkpoint.restore_newest(folder / "none", abstract(), make_config()) is None


def test_newest_and_multiples_are_kept(tmp_path):
    folder = save(tmp_path, range(1, 8), keep=2, keep_every=3)
    assert checkpoint.steps(folder) == [3, 6, 7]


def biggest_file(folder):
    return max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


def truncate(checkpoint_folder):
    path = biggest_file(checkpoint_folder)
    os.truncate(path, path.stat().st_size // 2)


def flip_a_bit(checkpoint_folder):
    path = biggest_file(checkpoint_folder)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def lose_the_notes(checkpoint_folder):
    (checkpoint_folder / "_CHECKPOINT_METADATA").write_text("{")


def lose_a_file(checkpoint_folder):
    (checkpoint_folder / "state" / "_METADATA").unlink()


def empty(checkpoint_folder):
    shutil.rmtree(checkpoint_folder)
    checkpoint_folder.mkdir()


@pytest.mark.parametrize("damage", [truncate, flip_a_bit, lose_the_notes, lose_a_file, empty])
def test_a_damaged_newest_is_named_and_the_one_before_it_used(folder, damage, assert_same_bits, caplog, capfd):
    damage(folder / "5")
    with caplog.at_level(logging.WARNING):
        state, _ = checkpoint.restore_newest(folder, abstract(), make_config())
    assert_same_bits(state, make_state(2))
    messages = [record.message for record in caplog.records if record.name.startswith("skyjax")]
    assert len(messages) == 1
    assert "5" in messages[0]
    assert "damaged" in messages[0]
    assert "going on from step 2" in messages[0]
    assert checkpoint.steps(folder) == [2]
    assert (folder.parent / "checkpoints.damaged" / "5").is_dir()
    assert "Traceback" not in capfd.readouterr().err
    # Its step can be written again.
    assert checkpoint.steps(save(folder.parent, [5])) == [2, 5]


def test_nothing_readable_is_an_error_and_nothing_is_moved(folder):
    for step in ("2", "5"):
        truncate(folder / step)
    with pytest.raises(UserError, match="no other checkpoint"):
        checkpoint.restore_newest(folder, abstract(), make_config())
    assert checkpoint.steps(folder) == [2, 5]


def test_a_half_deleted_old_one_hinders_nobody(folder):
    """A run killed while it deletes leaves such a folder."""
    empty(folder / "2")
    assert checkpoint.restore_newest(folder, abstract(), make_config())[1]["step"] == 5
    assert checkpoint.steps(save(folder.parent, [7], keep=1)) == [7]


def test_half_written_ones_are_not_seen_and_swept(folder):
    shutil.copytree(folder / "5", folder / "8.orbax-checkpoint-tmp")
    assert checkpoint.restore_newest(folder, abstract(), make_config())[1]["step"] == 5
    save(folder.parent, [8])
    assert sorted(path.name for path in folder.iterdir()) == ["2", "5", "8"]


def test_keys_that_matter_may_not_differ(folder):
    with pytest.raises(UserError) as error:
        checkpoint.restore_newest(folder, abstract(), make_config(model__width=16, batch_size=8, steps=99))
    assert "batch_size=8 (was 4), model.width=16 (was 8)" in str(error.value)
    assert "steps" not in str(error.value)
    assert checkpoint.steps(folder) == [2, 5]


def test_keys_that_do_not_matter_may_differ(folder):
    config = make_config(steps=99, log__every=7, mesh__data=1, objective__rank_alarm=3.0)
    assert checkpoint.restore_newest(folder, abstract(), config)[1]["step"] == 5


def test_find_takes_a_run_a_folder_or_one_checkpoint(folder, tmp_path):
    for path in (tmp_path, folder, folder / "5"):
        assert checkpoint.find(path) == folder / "5"
    assert checkpoint.find(folder / "2") == folder / "2"
    numbered = tmp_path / "7"
    shutil.copytree(folder, numbered / checkpoint.FOLDER)
    assert checkpoint.find(numbered) == numbered / checkpoint.FOLDER / "5"
    with pytest.raises(UserError, match='there is no "'):
        checkpoint.find(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="holds none; train first"):
        checkpoint.find(tmp_path / "empty")


def test_a_part_can_be_loaded(folder):
    wanted = {"params": {"kernel": abstract()["params"]["kernel"]}}
    got = checkpoint.load(folder / "5", wanted, partial=True)
    np.testing.assert_array_equal(got["params"]["kernel"], make_state(5)["params"]["kernel"])


def test_no_space_is_told_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: types.SimpleNamespace(free=1000))
    with pytest.raises(UserError, match=r"takes 0 MiB and 0 MiB are free; free space and start again"):
        save(tmp_path, [1])
    assert checkpoint.steps(tmp_path / checkpoint.FOLDER) == []


def memory(name):
    """Bytes of this process, as the kernel counts them."""
    status = pathlib.Path("/proc/self/status").read_text()
    return 1024 * int(next(line for line in status.splitlines() if line.startswith(name)).split()[1])


@pytest.mark.skipif(not pathlib.Path("/proc/self/clear_refs").exists(), reason="the peak is asked of Linux")
def test_a_save_takes_one_more_copy_of_the_state(tmp_path):
    """Three arrays of 32 MiB. What is written comes from that copy: were there another, it would be 2."""
    size = 3 * 2**25
    state = {f"{number}": jnp.arange(2**23, dtype=jnp.float32) + number for number in range(3)}
    with checkpoint.CheckpointWriter(tmp_path, types.SimpleNamespace(keep=1, keep_every=0)) as writer:
        writer.save(jax.tree.map(lambda x: x[:1], state), {"step": 1})  # threads and modules
        writer.wait()
        jax.block_until_ready(state)
        pathlib.Path("/proc/self/clear_refs").write_text("5")  # the peak is what it is now
        before = memory("VmRSS")
        writer.save(state, {"step": 2})
        writer.wait()
        assert 0.9 < (memory("VmHWM") - before) / size < 1.4


def test_no_space_while_writing_is_told(tmp_path):
    """A limit on the size of files stands for the full disk; it comes in the middle of a write, as that does."""
    import resource

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    try:
        with pytest.raises(UserError, match="cannot be written"):
            save(tmp_path, [1])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert checkpoint.steps(tmp_path / checkpoint.FOLDER) == []


def test_training_goes_on_while_a_checkpoint_is_written(tmp_path):
    """40 MB: when `save` returns it is not on the disk yet, the state may be given away, and what is kept is the old.

    At most one is on its way, so that the host holds one copy: the second call returns when the first is there.
    """
    rng = np.random.default_rng(0)
    whole = rng.integers(0, 2**32, 10_000_000, np.uint32).view(np.float32)  # does not compress
    step = jax.jit(lambda x: jax.lax.bitcast_convert_type(~jax.lax.bitcast_convert_type(x, jnp.uint32), jnp.float32),
                   donate_argnums=0)  # fmt: skip
    values, folder, here = jax.device_put(whole), tmp_path / checkpoint.FOLDER, abstract()["step"].sharding
    step, went_on = step.lower(values).compile(), []

    def saved():
        return checkpoint.steps(folder)

    with checkpoint.CheckpointWriter(tmp_path, types.SimpleNamespace(keep=9, keep_every=0)) as writer:
        for number in (1, 2, 3):
            state = make_state(number) | {"params": {"kernel": values}}
            writer.save(state, {"step": number, "position": 4 * number, "config": CONFIG, "statistics": {}})
            seen = saved()
            assert seen == list(range(1, number)), "each save waits for the one before it, and for no other"
            del state
            values = jax.block_until_ready(step(values))  # in place, where nobody else holds the buffer
            went_on.append(saved() == seen)
        writer.wait()
        assert saved() == [1, 2, 3]
    assert any(went_on), "no step was done while a checkpoint was on its way"
    for number in (1, 2, 3):
        wanted = {"params": {"kernel": jax.ShapeDtypeStruct(whole.shape, whole.dtype, sharding=here)}}
        got = checkpoint.load(folder / str(number), wanted, partial=True)["params"]["kernel"]
        words = np.asarray(got).view(np.uint32)
        np.testing.assert_array_equal(words, whole.view(np.uint32) if number % 2 else ~whole.view(np.uint32))


def test_notes_are_json_that_others_can_read(folder):
    notes = json.loads((folder / "5" / "_CHECKPOINT_METADATA").read_text())["custom_metadata"]
    assert notes["position"] == 20
    assert set(notes["checksums"]) == {
        "step",
        "params/kernel",
        "params/bias",
        "optimizer/0",
        "optimizer/count",
        "counters/skipped",
    }
