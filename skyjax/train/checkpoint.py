"""Checkpoints by Orbax: state, position in the data, and what a reader needs to use them without the config file.

    WORKDIR/checkpoints/120/             committed by one rename: a folder with a plain number is complete
    WORKDIR/checkpoints.damaged/150/     one that could not be read; training went on from an older one

Policy: the newest `keep` stay, and every step that is a multiple of `keep_every` (0: none).
The notes beside the state (JSON in Orbax's custom metadata): "step", "position" (samples consumed), "seconds" of
training, "config", "versions", "statistics", "checksums".
"""

import contextlib
import gc
import json
import logging
import pathlib
import re
import shutil
import sys
from collections.abc import Iterator, Mapping
from typing import Any, Self

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from jax.experimental import multihost_utils
from orbax.checkpoint import v1 as ocp

from skyjax.errors import UserError
from skyjax.parallel.sharding import path_name
from skyjax.train.metrics import cannot_write

log = logging.getLogger(__name__)

FOLDER = "checkpoints"
Notes = dict[str, Any]

# Config keys that a resumed run may change: they touch neither the state's shape nor what the steps mean.
FREE_KEYS = (
    r"steps|(log|checkpoint|eval|watchdog|mesh)\..*|mesh_rules|model\.(remat|scan|fusion\.parts)|data\.(threads|prefetch)"
    r"|objective\.(rank|spread)_alarm"
)


class CheckpointWriter:
    """Writes checkpoints in the background, one at a time, and deletes old ones by the policy above.

    Args:
      workdir: of the run; its checkpoints folder is made where missing.
      config: the config's `checkpoint`: how many of the newest are kept, and every which step (0: none).

    Raises:
      UserError: the folder cannot be written.
    """

    def __init__(self, workdir: pathlib.Path, config: ml_collections.ConfigDict) -> None:
        self.folder = (workdir / FOLDER).absolute()
        policies = ocp.training.preservation_policies
        preserve: list[Any] = [policies.LatestN(max(config.keep, 1))]
        if config.keep_every:
            preserve.append(policies.EveryNSteps(config.keep_every))
        try:
            self._checkpointer = ocp.training.Checkpointer(
                self.folder,
                preservation_policy=policies.AnyPreservationPolicy(preserve),
                cleanup_tmp_directories=True,  # what a killed run left half-written
            )
        except OSError as error:
            raise cannot_write(self.folder, error) from error

    def save(self, state: Any, notes: Mapping[str, Any]) -> None:
        """Copies the state to the host and returns; the writing goes on in the background.

        Args:
          state: tree of arrays; may be donated as soon as this returns.
          notes: JSON values, "step" among them.

        Raises:
          UserError: this write or the one before it found no space or no permission.
        """
        size = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
        free = shutil.disk_usage(self.folder).free
        if free < size:
            raise UserError(
                f'"{self.folder}": a checkpoint takes {size / 2**20:.0f} MiB and {free / 2**20:.0f} MiB are free; free'
                " space and start again: the run goes on from its newest checkpoint"
            )
        with self._disk_errors():
            self._checkpointer.save_async(
                notes["step"], state, force=True, custom_metadata={**notes, "checksums": checksums(state)}
            )

    def wait(self) -> None:
        """Returns when everything is on the disk. Errors as in `save`."""
        with self._disk_errors():
            self._checkpointer.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        with self._disk_errors():
            self._checkpointer.close()

    @contextlib.contextmanager
    def _disk_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise cannot_write(self.folder, error) from error
        except ValueError as error:  # tensorstore's
            if re.search("RESOURCE_EXHAUSTED|No space left|PERMISSION_DENIED|File too large", str(error)):
                raise cannot_write(self.folder, OSError(str(error).splitlines()[0][:200])) from error
            raise


def checksums(state: Any) -> dict[str, int]:
    """Sum modulo 2**32 of each array's words, by path.

    Orbax finds a truncated file but not a changed bit in the values; any one changed bit changes this sum.
    """
    sums = jax.device_get(_sums(state))
    return {path_name(path): int(value) for path, value in jax.tree_util.tree_leaves_with_path(sums)}


@jax.jit
def _sums(state: Any) -> Any:
    def total(leaf: jax.Array) -> jax.Array:
        words = jax.lax.bitcast_convert_type(leaf, jnp.dtype(f"uint{8 * leaf.dtype.itemsize}"))
        return jnp.sum(words.astype(jnp.uint32), dtype=jnp.uint32)

    return jax.tree.map(total, state)


def steps(folder: pathlib.Path) -> list[int]:
    """Steps that have a committed checkpoint, in order; empty where there is no folder."""
    if not folder.is_dir():
        return []
    return sorted(int(entry.name) for entry in folder.iterdir() if entry.is_dir() and entry.name.isdigit())


def find(path: pathlib.Path) -> pathlib.Path:
    """The newest checkpoint of a run's directory or of its checkpoints folder, or the checkpoint itself.

    Raises:
      UserError: there is none.
    """
    if not path.exists():
        raise UserError(f'checkpoint: there is no "{path}"; give a run\'s --workdir or one of its checkpoints')
    if path.name.isdigit() and ocp.is_orbax_checkpoint(path):
        return path
    for folder in (path / FOLDER, path):
        if found := steps(folder):
            return folder / str(found[-1])
    raise UserError(
        f'checkpoint: "{path}" holds none; train first, or give a run\'s --workdir or one of its checkpoints'
    )


def read_notes(checkpoint: pathlib.Path) -> Notes:
    """What stands beside the state.

    Raises:
      UserError: it cannot be read.
    """
    try:
        with _quiet():
            notes = ocp.metadata(checkpoint.absolute()).custom_metadata
    except Exception as error:  # as in `load`
        raise UserError(f'checkpoint: "{checkpoint}" is damaged: {_first_line(error)}') from error
    if not notes:
        raise UserError(f'checkpoint: "{checkpoint}" is damaged: its notes cannot be read')
    return dict(notes)


def load(checkpoint: pathlib.Path, abstract: Any, *, partial: bool = False) -> Any:
    """The state, or with `partial` the part of it that `abstract` names, checked against its checksums.

    Args:
      checkpoint: folder of one step.
      abstract: tree of jax.ShapeDtypeStruct whose shardings say where the arrays go.
      partial: whether `abstract` names a part only.

    Arrays that lie across processes are read by all of them together, others by this process alone.

    Raises:
      UserError: it is damaged or has another structure; on all processes that read it, if on one.
    """
    context = ocp.Context()
    context.pytree.loading.partial_load = partial
    # Each process reads its own part. With Orbax' barriers, those that can read wait minutes for one that cannot.
    context.multiprocessing.active_processes = {jax.process_index()}
    context.multiprocessing.primary_host = jax.process_index()
    state, expected, failed = None, {}, None
    try:
        with context, _quiet():
            state = ocp.load(checkpoint.absolute(), abstract)
        expected = read_notes(checkpoint)["checksums"]
    except Exception as error:  # tensorstore, Orbax and asyncio raise what they like on damaged files
        failed = error
    is_shared = any(not leaf.sharding.is_fully_addressable for leaf in jax.tree.leaves(abstract) if leaf.sharding)
    if failed or (is_shared and _somewhere(failed is not None)):
        reason = _first_line(failed) if failed else "another process cannot read it"
        raise UserError(f'checkpoint: "{checkpoint}" is damaged: {reason}') from failed
    wrong = [path for path, value in checksums(state).items() if value != expected.get(path)]
    if wrong:
        raise UserError(f'checkpoint: "{checkpoint}" is damaged: "{wrong[0]}" is not what was written')
    return state


def restore_newest(folder: pathlib.Path, abstract: Any, config: ml_collections.ConfigDict) -> tuple[Any, Notes] | None:
    """The newest checkpoint that can be read; None where there is none at all.

    One that cannot be read is named in a warning and moved aside, so that its step can be written again.

    Raises:
      UserError: the config differs from the checkpoint's in a key that matters, or no checkpoint can be read.
    """
    damaged: list[tuple[int, UserError]] = []
    for step in reversed(steps(folder)):
        checkpoint = folder / str(step)
        try:
            notes = read_notes(checkpoint)
            check_config(config, notes["config"], checkpoint)
            state = load(checkpoint, abstract)
        except ConfigDiffers:
            raise
        except UserError as error:
            damaged.append((step, error))
            continue
        _check_position(state, notes, step, config.batch_size)
        for bad, reason in damaged:
            log.warning("%s; going on from step %d; moved to %s", reason, step, _move_aside(folder / str(bad)))
        return state, notes
    if damaged:
        raise UserError(f'{damaged[0][1]}; no other checkpoint of "{folder}" can be read; start in another --workdir')
    return None


def _check_position(state: Any, notes: Notes, step: int, batch_size: int) -> None:
    """Holds what was restored to be of one step: the state, its optimizer and the position in the data.

    That every array is what was written, `load` has found by checksums.
    """
    assert int(state["step"]) == notes["step"] == step, (int(state["step"]), notes["step"], step)
    assert notes["position"] == step * batch_size, (notes["position"], step, batch_size)
    updates = step - int(state["counters"]["skipped"])
    for path, leaf in jax.tree_util.tree_leaves_with_path(state["optimizer"]):
        if path_name(path).endswith("count"):
            assert int(leaf) == updates, (path_name(path), int(leaf), updates)


def _somewhere(here: bool) -> bool:
    """Whether it is so on any process; all must call it."""
    return bool(np.any(multihost_utils.process_allgather(np.array(here))))


class ConfigDiffers(UserError):
    """A run was started again with another config."""


def check_config(config: ml_collections.ConfigDict, saved: Mapping[str, Any], checkpoint: pathlib.Path) -> None:
    """Raises ConfigDiffers, with all keys, where a config differs from a saved one in more than FREE_KEYS."""
    now, before = _flat(json.loads(json.dumps(config.to_dict()))), _flat(saved)
    differing = [
        f"{key}={now.get(key, 'missing')} (was {before.get(key, 'missing')})"
        for key in sorted(now.keys() | before.keys())
        if now.get(key) != before.get(key) and not re.fullmatch(FREE_KEYS, key)
    ]
    if differing:
        raise ConfigDiffers(
            f'config: "{checkpoint}" was trained with other values: {", ".join(differing)}; set them back, or start in'
            " another --workdir"
        )


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {prefix + key: value}
    return flat


def _move_aside(checkpoint: pathlib.Path) -> pathlib.Path:
    """The first process does it while the others wait."""
    folder = checkpoint.parent.with_suffix(".damaged")
    number, target = 0, folder / checkpoint.name
    while target.exists():
        number += 1
        target = folder / f"{checkpoint.name}.{number}"
    multihost_utils.sync_global_devices("all have looked for the name")
    if jax.process_index() == 0:
        folder.mkdir(exist_ok=True)
        checkpoint.rename(target)
    multihost_utils.sync_global_devices("moved")
    return target


def _first_line(error: BaseException) -> str:
    cause = error.__cause__ or error
    return (str(cause).splitlines() or [repr(cause)])[0][:200]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps Orbax and asyncio from printing pages about a damaged file that is answered here in one sentence."""
    loggers = [logging.getLogger(name) for name in ("absl", "asyncio")]
    levels, hook = [logger.level for logger in loggers], sys.unraisablehook
    for logger in loggers:
        logger.setLevel(logging.CRITICAL + 1)
    sys.unraisablehook = lambda _: None
    try:
        yield
    except Exception:
        gc.collect()  # the abandoned coroutines complain when they are collected
        raise
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        sys.unraisablehook = hook
