"""Ends a run that hangs, so that whatever started it can start it again."""

import faulthandler
import os
import sys
import threading
from typing import Self

EXIT_HUNG = 124
STDERR = 2  # the file, not sys.stderr, which the progress bar may have replaced


class Watchdog:
    """Prints every thread's stack and exits with 124 when `beat` was not called for `seconds`.

    The first step's compilation counts as well, so `seconds` is longer than that.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._beaten = threading.Event()
        self._stopped = False
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def beat(self) -> None:
        """Says that the run goes on."""
        self._beaten.set()

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped = True
        self._beaten.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stopped:
            if self._beaten.wait(self.seconds):
                self._beaten.clear()
                continue
            print(f"skyjax: no step was finished for {self.seconds:g} s; stacks of all threads:", file=sys.stderr)
            faulthandler.dump_traceback(file=STDERR, all_threads=True)
            # Not sys.exit: the main thread hangs, and so would its clean-up.
            os._exit(EXIT_HUNG)
