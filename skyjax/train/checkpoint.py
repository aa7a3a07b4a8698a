"""Checkpoints by Orbax: state, position in the data, and what a reader needs to use them without the config file.

    WORKDIR/checkpoints/120/             committed by one rename: a folder with a plain number is complete
    WORKDIR/checkpoints.damaged/150/     one that could not be read; training went on from an older one

Policy: the newest `keep` stay, and every step that is a multiple of `keep_every` (0: none).
The notes beside the state (JSON in Orbax's custom metadata): "step", "position" (samples consumed), "seconds" of
training, "config", "versions", "statistics", "evaluated" (the step of the last evaluation), "bad_samples" until then,
"records" of each source and the "order" that they come in, "goodput", and what notes.py adds.
"""

import contextlib
import functools
import gc
import json
import logging
import pathlib
import re
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Self

import jax
import ml_collections
import numpy as np
from jax.experimental import multihost_utils
from orbax.checkpoint import v1 as ocp

from skyjax.errors import UserError
from skyjax.parallel.sharding import path_name
from skyjax.train.metrics import cannot_write
from skyjax.train.notes import Notes, Refused, seal, unseal, writer, wrong_arrays

log = logging.getLogger(__name__)

FOLDER = "checkpoints"

# Config keys that a resumed run may change: they touch neither the state's shape nor what the steps mean.
FREE_KEYS = (
    r"steps|(log|checkpoint|eval|watchdog|mesh)\..*|mesh_rules|model\.(remat|scan|fusion\.parts)|data\.(threads|prefetch)"
    r"|objective\.(rank|spread)_alarm|data\.text\.tokenizer"  # loop.py compares the tokenizer itself
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
            self._checkpointer.save_async(notes["step"], state, force=True, custom_metadata=seal(notes, state))

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
    if found := steps(path / FOLDER):  # first: a run may be called "7", as a checkpoint is
        return path / FOLDER / str(found[-1])
    if path.name.isdigit() and ocp.is_orbax_checkpoint(path):
        return path
    if found := steps(path):
        return path / str(found[-1])
    raise UserError(
        f'checkpoint: "{path}" holds none; train first, or give a run\'s --workdir or one of its checkpoints'
    )


def read_notes(checkpoint: pathlib.Path) -> Notes:
    """What stands beside the state.

    Raises:
      UserError: it cannot be read; Refused where a later revision wrote it.
    """
    try:
        with _quiet():
            notes = ocp.metadata(checkpoint.absolute()).custom_metadata
        if not notes:
            raise ValueError("its notes cannot be read")
        return unseal(notes)
    except Refused as error:
        raise Refused(f'checkpoint: "{checkpoint}" {error}') from error
    except Exception as error:  # as in `load`
        raise UserError(f'checkpoint: "{checkpoint}" is damaged: {_first_line(error)}') from error


def load(checkpoint: pathlib.Path, abstract: Any, *, partial: bool = False) -> Any:
    """The state, or with `partial` the part of it that `abstract` names, checked against its checksums.

    Args:
      checkpoint: folder of one step.
      abstract: tree of jax.ShapeDtypeStruct whose shardings say where the arrays go.
      partial: whether `abstract` names a part only.

    Arrays that lie across processes are read by all of them together, others by this process alone.

    Raises:
      UserError: it is damaged, on all processes that read it, if on one; Refused where it holds other arrays.
    """
    return _read(checkpoint, abstract, partial=partial)[0]


def _read(
    checkpoint: pathlib.Path, abstract: Any, *, partial: bool = False, check: Callable[[Notes], None] | None = None
) -> tuple[Any, Notes]:
    """State and notes as `load`; `check` may refuse the notes before the state is read."""
    context = ocp.Context()
    context.pytree.loading.partial_load = partial
    # Each process reads its own part. With Orbax' barriers, those that can read wait minutes for one that cannot.
    context.multiprocessing.active_processes = {jax.process_index()}
    context.multiprocessing.primary_host = jax.process_index()
    is_shared = any(not leaf.sharding.is_fully_addressable for leaf in jax.tree.leaves(abstract) if leaf.sharding)
    state, notes = None, {}

    def agree(failed: Exception | None) -> None:
        if _somewhere(failed is not None) if is_shared else failed:
            reason = _first_line(failed) if failed else "another process cannot read it"
            raise UserError(f'checkpoint: "{checkpoint}" is damaged: {reason}') from failed

    failed: Exception | None = None
    try:
        notes = read_notes(checkpoint)
        if check:
            check(notes)
        _check_arrays(checkpoint, notes, abstract, partial)
    except Refused:
        raise
    except Exception as error:  # tensorstore, Orbax and asyncio raise what they like on damaged files
        failed = error
    agree(failed)  # Orbax numbers its calls: had one process made more of them, the next save would never end
    try:
        with context, _quiet():
            state = ocp.load(checkpoint.absolute(), abstract)
    except Exception as error:  # as above
        failed = error
    agree(failed)
    if wrong := wrong_arrays(state, notes):
        raise UserError(f'checkpoint: "{checkpoint}" is damaged: "{wrong[0]}" is not what was written')
    return state, notes


def _check_arrays(checkpoint: pathlib.Path, notes: Notes, abstract: Any, partial: bool) -> None:
    """Holds the checkpoint to have the arrays that this revision wants."""
    wanted = {path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(abstract)}
    held = set(notes["checksums"])
    missing, more = sorted(wanted - held), [] if partial else sorted(held - wanted)
    if missing or more:
        told = [f"has no {_some(missing)}"] * bool(missing) + [f"has {_some(more)} besides"] * bool(more)
        raise Refused(
            f'checkpoint: "{checkpoint}" was written by {writer(notes)} and {" and ".join(told)}; go on with the skyjax'
            " that wrote it, or start in another --workdir"
        )


def _some(paths: list[str]) -> str:
    more = f" and {len(paths) - 3} more" if len(paths) > 3 else ""
    return ", ".join(f'"{path}"' for path in paths[:3]) + more


def restore_newest(folder: pathlib.Path, abstract: Any, config: ml_collections.ConfigDict) -> tuple[Any, Notes] | None:
    """The newest checkpoint that can be read; None where there is none at all.

    One that cannot be read is named in a warning and moved aside, so that its step can be written again.

    Raises:
      UserError: the config differs from the checkpoint's in a key that matters, another revision of skyjax wrote it
        in a way that this one cannot read, or no checkpoint can be read.
    """
    damaged: list[tuple[int, UserError]] = []
    for step in reversed(steps(folder)):
        checkpoint = folder / str(step)
        try:
            state, notes = _read(checkpoint, abstract, check=functools.partial(check_config, config, checkpoint))
            _check_step(checkpoint, state, notes, config.batch_size)
        except Refused:
            raise
        except UserError as error:
            damaged.append((step, error))
            continue
        older = [(number, _damage(folder / str(number))) for number in steps(folder) if number < step]
        damaged += [(number, error) for number, error in older if error]
        for bad, reason in damaged:
            log.warning("%s; going on from step %d; moved to %s", reason, step, _move_aside(folder / str(bad)))
        return state, notes
    if damaged:
        raise UserError(f'{damaged[0][1]}; no other checkpoint of "{folder}" can be read; start in another --workdir')
    return None


def _damage(checkpoint: pathlib.Path) -> UserError | None:
    """Whether the notes of one that is not needed now are damaged on any process: then Orbax may refuse its folder."""
    found = None
    try:
        read_notes(checkpoint)
    except Refused:
        pass
    except UserError as error:
        found = error
    if _somewhere(found is not None):
        return found or UserError(f'checkpoint: "{checkpoint}" is damaged: another process cannot read it')
    return None


def _check_step(checkpoint: pathlib.Path, state: Any, notes: Notes, batch_size: int) -> None:
    """Holds state, optimizer, position in the data and folder to be of one step; that each is whole, `load` found."""
    step = int(checkpoint.name)
    updates = step - int(state["counters"]["skipped"])
    counts = {"step": (int(state["step"]), step), "its notes' step": (notes["step"], step)}
    counts["position"] = (notes["position"], step * batch_size)
    for path, leaf in jax.tree_util.tree_leaves_with_path(state["optimizer"]):
        if path_name(path).endswith("count"):
            counts[f"optimizer/{path_name(path)}"] = (int(leaf), updates)
    for name, (found, want) in counts.items():
        if found != want:
            raise UserError(f'checkpoint: "{checkpoint}" is damaged: {name} is {found}, and {want} belongs to it')


def _somewhere(here: bool) -> bool:
    """Whether it is so on any process; all must call it, also those where it is."""
    return bool(np.any(multihost_utils.process_allgather(np.array(here))))


def check_config(config: ml_collections.ConfigDict, checkpoint: pathlib.Path, notes: Notes) -> None:
    """Raises Refused, with all keys, where a config differs from a checkpoint's in more than FREE_KEYS."""
    now, before = _flat(json.loads(json.dumps(config.to_dict()))), _flat(notes["config"])
    differing = [
        f"{key}={now.get(key, 'missing')} (was {before.get(key, 'missing')})"
        for key in sorted(now.keys() | before.keys())
        if now.get(key) != before.get(key) and not re.fullmatch(FREE_KEYS, key)
    ]
    if differing:
        raise Refused(
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
