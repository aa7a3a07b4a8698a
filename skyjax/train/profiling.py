"""A profiler's window over a few steps: WORKDIR/profile/ gets a trace that TensorBoard and xprof read."""

import pathlib
import re
from typing import Any, Self

import jax

from skyjax.errors import UserError

FOLDER = "profile"


def parse_window(text: str, steps: int) -> tuple[int, int]:
    """The first and the last step to trace, of "FIRST:LAST", both included.

    Args:
      text: what the user wrote.
      steps: of the run.

    Raises:
      UserError: it is not such a range, or lies outside of 1 to `steps`.
    """
    found = re.fullmatch(r"(\d+):(\d+)", text)
    if not found:
        raise UserError(f'--profile is "{text}"; write the first and the last step to trace: --profile=100:110')
    first, last = int(found[1]), int(found[2])
    if not 1 <= first <= last <= steps:
        raise UserError(f"--profile={text} is not a range inside of the run's steps, 1:{steps}")
    return first, last


class Profiler:
    """Traces the steps of a window; each process writes a file of its own.

    Args:
      window: first and last step, both included; None traces nothing.
      workdir: of the run.
    """

    def __init__(self, window: tuple[int, int] | None, workdir: pathlib.Path) -> None:
        self._first, self._last = window or (0, -1)
        self._folder = workdir / FOLDER
        self._on = False

    def step(self, number: int, state: Any) -> jax.profiler.StepTraceAnnotation:
        """To be entered around the dispatch of a step, which it names in the trace; starts and ends the trace.

        Args:
          number: of the step.
          state: what the step works on. At an end of the window it is awaited: the trace holds whole steps.
        """
        inside = self._first <= number <= self._last  # a resumed run may begin within the window
        if inside != self._on:
            jax.block_until_ready(state)
            if inside:
                jax.profiler.start_trace(str(self._folder))
                self._on = True
            else:
                self._stop()
        return jax.profiler.StepTraceAnnotation("train", step_num=number)

    def _stop(self) -> None:
        jax.profiler.stop_trace()
        self._on = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._on:
            self._stop()
