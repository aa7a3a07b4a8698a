"""What a run writes down: metrics.jsonl, TensorBoard files, and the progress on stderr."""

import contextlib
import datetime
import json
import math
import os
import pathlib
import sys
import time
from collections.abc import Mapping
from typing import Any, Self

import jax
import ml_collections
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from skyjax.errors import UserError

FILE = "metrics.jsonl"


class MetricsFiles:
    """metrics.jsonl, one object a logged step in order, and the same numbers for TensorBoard.

    Args:
      workdir: folder of the run.
      step: the step that the run goes on from; lines beyond it are dropped, so that each step stands there once.

    Raises:
      UserError: the file cannot be written.
    """

    def __init__(self, workdir: pathlib.Path, step: int) -> None:
        self.path = workdir / FILE
        try:
            _drop_lines_beyond(self.path, step)
            self._file = self.path.open("a")
            # The suffix: two starts in one second would write to one file, and the second would empty it.
            self._tensorboard = _tensorboardx().SummaryWriter(
                str(workdir / "tensorboard"), purge_step=step + 1, filename_suffix=f".from-{step}"
            )
        except OSError as error:
            raise cannot_write(self.path, error) from error

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Adds the line of one step. A value that is not finite becomes null, since JSON has no NaN."""
        try:
            self._file.write(json.dumps({"step": step} | _for_json(values)) + "\n")
        except OSError as error:
            raise cannot_write(self.path, error) from error
        self._for_tensorboard(step, values)

    def amend(self, step: int, values: Mapping[str, float]) -> None:
        """Adds numbers to the line of `step`, the last one, which was written by an earlier start of the run."""
        try:
            self._file.close()
            lines = read(self.path)
            if not lines or lines[-1]["step"] != step:
                lines.append({"step": step})
            lines[-1] |= _for_json(values)
            _rewrite(self.path, lines)
            self._file = self.path.open("a")
        except OSError as error:
            raise cannot_write(self.path, error) from error
        self._for_tensorboard(step, values)

    def _for_tensorboard(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            if math.isfinite(value):
                self._tensorboard.add_scalar(name, value, step)

    def flush(self) -> None:
        """Returns when all lines are on the disk."""
        try:
            self._file.flush()
            os.fsync(self._file.fileno())
            self._tensorboard.flush()
        except OSError as error:
            raise cannot_write(self.path, error) from error

    def close(self) -> None:
        """Closes both; lines not flushed are flushed."""
        self._file.close()
        self._tensorboard.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _tensorboardx() -> Any:
    """The package, which would load torch where that is installed: 2 s a start, for tensors that we do not have."""
    modules: dict[str, Any] = sys.modules
    is_there = "torch" in modules
    modules.setdefault("torch", None)  # as if it were not installed
    try:
        import tensorboardX
    finally:
        if not is_there:
            del modules["torch"]
    return tensorboardX


def _for_json(values: Mapping[str, float]) -> dict[str, float | None]:
    return {name: value if math.isfinite(value) else None for name, value in values.items()}


def read(path: pathlib.Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl. One that was cut by a crash or damaged is left out."""
    lines = []
    for text in path.read_text(errors="replace").split("\n"):
        with contextlib.suppress(ValueError):
            line = json.loads(text)
            if isinstance(line, dict) and isinstance(line.get("step"), int):
                lines.append(line)
    return lines


def _drop_lines_beyond(path: pathlib.Path, step: int) -> None:
    if not path.exists():
        return
    _rewrite(path, [line for line in read(path) if line["step"] <= step])


def _rewrite(path: pathlib.Path, lines: list[dict[str, Any]]) -> None:
    """Whole or not at all."""
    part = path.with_suffix(".jsonl.part")
    part.write_text("".join(json.dumps(line) + "\n" for line in lines))
    part.replace(path)


def cannot_write(path: pathlib.Path, error: OSError) -> UserError:
    """The user's error behind a failed write: no space or no permission."""
    return UserError(
        f'"{path}" cannot be written: {error.strerror or error}; free space or choose another --workdir, then start'
        " again: the run goes on from its newest checkpoint"
    )


class Clock:
    """Seconds of training over all starts of a run, and its speed.

    Args:
      seconds: what the earlier starts took.
    """

    def __init__(self, seconds: float = 0.0) -> None:
        self._start = time.monotonic() - seconds
        self._mark: tuple[int, float] | None = None

    @property
    def seconds(self) -> float:
        """Seconds of training until now."""
        return time.monotonic() - self._start

    def mark(self, step: int) -> None:
        """Starts to measure speed at the first step that is done: the time before it went into compilation."""
        if self._mark is None:
            self._mark = step, time.monotonic()

    def steps_per_second(self, step: int) -> float:
        """Since the last call or mark; NaN where no step was done since."""
        now = time.monotonic()
        before, then = self._mark or (step, now)
        self._mark = step, now
        return (step - before) / (now - then) if step > before else math.nan


class ProgressLine:
    """A bar with loss, speed and time left on a terminal; plain lines, one a logged step, elsewhere. On stderr."""

    def __init__(self, steps: int, step: int, console: Console | None = None) -> None:
        self._console = console or Console(stderr=True)
        self._steps = steps
        self._bar = Progress(
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[numbers]}"),
            TextColumn("ETA"),
            TimeRemainingColumn(),
            console=self._console,
            disable=not self._console.is_terminal,
        )
        self._task = self._bar.add_task("train", total=steps, completed=step, numbers="compiling")

    def step(self, step: int) -> None:
        """Moves the bar."""
        self._bar.update(self._task, completed=step)

    def log(self, step: int, loss: float, steps_per_second: float, batch_size: int) -> None:
        """Shows the numbers of a logged step."""
        known = steps_per_second > 0  # NaN is not
        numbers = f"loss {loss:.4f}  " + (f"{steps_per_second * batch_size:.1f} samples/s" if known else "compiled")
        self._bar.update(self._task, numbers=numbers)
        if not self._console.is_terminal:
            left = datetime.timedelta(seconds=round((self._steps - step) / steps_per_second)) if known else "-"
            self.say(f"step {step}/{self._steps}  {numbers}  ETA {left}")

    def say(self, text: str) -> None:
        """One line above the bar."""
        self._console.print(text, highlight=False, markup=False, soft_wrap=True)

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()


class Journal:
    """Everything that the loop says and writes about its steps, one step late so that the device never waits.

    Args:
      config: the experiment.
      workdir: folder of the run.
      step: the step that the run goes on from.
      seconds: of training until then.
      bad_samples: until then.
      quiet: whether another process of the run writes and speaks. The numbers are read all the same.

    Attributes:
      bad_samples: places of the batches until the last finished step whose record could not be used.
    """

    def __init__(
        self,
        config: ml_collections.ConfigDict,
        workdir: pathlib.Path,
        step: int,
        seconds: float,
        bad_samples: int = 0,
        quiet: bool = False,
    ) -> None:
        self.clock = Clock(seconds)
        self.bad_samples = bad_samples
        self._step = step
        self._config = config
        self._files = None if quiet else MetricsFiles(workdir, step)
        self._progress = ProgressLine(config.steps, step, Console(stderr=True, quiet=quiet))
        self._held: tuple[int, Mapping[str, Any]] | None = None
        self._added: dict[str, float] = {}
        self._nonfinite_in_a_row = 0
        self._collapsed = False

    def log(self, step: int, metrics: Mapping[str, Any]) -> int:
        """Holds the metrics (device scalars) of the step just dispatched and finishes those of the one before.

        "bad_samples" among them is that of the step; what is written is their sum since the run began.

        Returns:
          Updates skipped in a row until the step before.
        """
        self.finish()
        self._held = step, metrics
        return self._nonfinite_in_a_row

    def add(self, numbers: Mapping[str, float]) -> None:
        """More numbers for the line of the step that is held, or of the one that the run goes on from."""
        if self._held:
            self._added |= numbers
        elif self._files and numbers:
            self._files.amend(self._step, numbers)

    def finish(self) -> None:
        """Waits for the held step; writes its line where one is due, and puts all lines on the disk."""
        if self._held is None:
            return
        (step, metrics), self._held = self._held, None
        values = {name: float(value) for name, value in jax.device_get(metrics).items()} | self._added
        self.bad_samples += int(values["bad_samples"])
        values["bad_samples"] = self.bad_samples
        first = self._nonfinite_in_a_row == 0 and values["nonfinite_in_a_row"] > 0
        self._nonfinite_in_a_row = int(values["nonfinite_in_a_row"])
        self._progress.step(step)
        self.clock.mark(step)
        if first:
            self.say(f"step {step}: loss or gradient is not finite; update skipped, {values['skipped']:.0f} so far")
        every = self._config.log.every, self._config.eval.every  # an evaluation that was broken off is added later
        if any(is_due(each, step) for each in every) or step == self._config.steps or self._added:
            self._write(step, values)
        self._added = {}

    def _write(self, step: int, values: dict[str, float]) -> None:
        speed = self.clock.steps_per_second(step)
        values |= {"samples_per_second": speed * self._config.batch_size, "seconds": self.clock.seconds}
        if self._files:
            self._files.write(step, values)
            self._files.flush()
        self._progress.log(step, values["loss"], speed, self._config.batch_size)
        self._watch_collapse(step, values)

    def _watch_collapse(self, step: int, values: Mapping[str, float]) -> None:
        """Says when rank or spread falls below its alarm; not before the warm-up is over, when they say nothing yet.

        A cloud of features that shrinks evenly keeps its rank, one that flattens may keep its spread.
        """
        objective = self._config.objective
        rank, spread = values["rank/fused"], values["spread/fused"]
        share = min(rank / objective.rank_alarm, spread / objective.spread_alarm)
        if step >= self._config.optimizer.warmup_steps and share < 1 and not self._collapsed:
            self.say(
                f"step {step}: the fused features collapse: effective rank {rank:.2f} (alarm below"
                f" {objective.rank_alarm:g}), spread {spread:.3g} (alarm below {objective.spread_alarm:g}). Raise"
                " objective.weights.spread or lower optimizer.learning_rate"
            )
            self._collapsed = True
        elif share > 1.5:  # well above, or a value near its alarm would warn again and again
            self._collapsed = False

    def say(self, text: str) -> None:
        """One line on stderr."""
        self._progress.say(text)

    def __enter__(self) -> Self:
        self._progress.__enter__()
        parts = self._config.micro_batches
        if parts > 1:
            size = self._config.batch_size // parts
            self.say(
                f"micro_batches={parts}: what compares samples (alignment, spread, balancing) sees {size} at a time"
            )
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.__exit__()
        if self._files:
            self._files.close()


def is_due(every: int, step: int) -> bool:
    """Whether something done every so many steps (0: never) is due at a step."""
    return every > 0 and step > 0 and step % every == 0
