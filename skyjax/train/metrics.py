"""What a run writes down: metrics.jsonl, TensorBoard files, and the progress on stderr."""

import json
import math
import os
import pathlib
import time
from collections.abc import Mapping
from typing import Self

import tensorboardX
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
            self._tensorboard = tensorboardX.SummaryWriter(str(workdir / "tensorboard"), purge_step=step + 1)
        except OSError as error:
            raise cannot_write(self.path, error) from error

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Adds the line of one step. A value that is not finite becomes null, since JSON has no NaN."""
        line = {"step": step} | {name: value if math.isfinite(value) else None for name, value in values.items()}
        try:
            self._file.write(json.dumps(line) + "\n")
        except OSError as error:
            raise cannot_write(self.path, error) from error
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


def read(path: pathlib.Path) -> list[dict[str, float | None]]:
    """The lines of a metrics.jsonl. A last line cut by a crash is left out."""
    lines = []
    for text in path.read_text().splitlines():
        try:
            lines.append(json.loads(text))
        except ValueError:
            break
    return lines


def _drop_lines_beyond(path: pathlib.Path, step: int) -> None:
    if not path.exists():
        return
    kept = [line for line in read(path) if line["step"] <= step]
    shorter = path.with_suffix(".jsonl.part")
    shorter.write_text("".join(json.dumps(line) + "\n" for line in kept))
    shorter.replace(path)


def cannot_write(path: pathlib.Path, error: OSError) -> UserError:
    """The user's error behind a failed write: no space or no permission."""
    return UserError(
        f'"{path}" cannot be written: {error.strerror or error}; free space or choose another --workdir, then start'
        " again: the run goes on from its newest checkpoint"
    )


class Clock:
    """Seconds of training, over all starts of the run, and the speed since the last look.

    Args:
      seconds: what the earlier starts took.
    """

    def __init__(self, seconds: float = 0.0) -> None:
        self._before = seconds
        self._start = self._last = time.monotonic()
        self._last_step: int | None = None

    @property
    def seconds(self) -> float:
        """Seconds of training until now."""
        return self._before + time.monotonic() - self._start

    def steps_per_second(self, step: int) -> float:
        """Since the last call; NaN at the first, whose time is compilation."""
        now = time.monotonic()
        speed = float("nan")
        if self._last_step is not None and now > self._last:
            speed = (step - self._last_step) / (now - self._last)
        self._last, self._last_step = now, step
        return speed


class ProgressLine:
    """A bar with loss, speed and time left on a terminal; plain lines, one a logged step, elsewhere. On stderr."""

    def __init__(self, steps: int, step: int, console: Console | None = None) -> None:
        self._console = console or Console(stderr=True)
        self._steps = steps
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[numbers]}"),
            TimeRemainingColumn(),
            console=self._console,
            disable=not self._console.is_terminal,
        )
        self._task = self._bar.add_task("train", total=steps, completed=step, numbers="compiling")

    def step(self, step: int) -> None:
        """Moves the bar."""
        self._bar.update(self._task, completed=step)

    def log(self, step: int, loss: float, samples_per_second: float, steps_per_second: float) -> None:
        """Shows the numbers of a logged step."""
        speed = f"{samples_per_second:.1f} samples/s" if math.isfinite(samples_per_second) else "compiled"
        numbers = f"loss {loss:.4f}  {speed}"
        self._bar.update(self._task, numbers=numbers)
        if not self._console.is_terminal:
            left = (self._steps - step) / steps_per_second if steps_per_second > 0 else math.nan
            eta = f"{int(left) // 3600}:{int(left) // 60 % 60:02d}:{int(left) % 60:02d}" if left >= 0 else "-"
            self.say(f"step {step}/{self._steps}  {numbers}  ETA {eta}")

    def say(self, text: str) -> None:
        """One line above the bar."""
        self._console.print(text, highlight=False, markup=False, soft_wrap=True)

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()
