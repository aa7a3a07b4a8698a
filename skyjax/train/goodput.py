"""Where a run's time went: its wall time by account, over all starts of the run.

WORKDIR/goodput.json holds {"step": the step it was written at, "starts": n, "seconds": {account: seconds}}. Only "step"
is useful time. What a killed run did after its last checkpoint is done again, so it is moved to "lost" when the run
goes on; the time in which nothing ran counts nowhere.
"""

import contextlib
import json
import pathlib
import queue
import threading
import time
from collections.abc import Iterator, Mapping
from typing import Any, Self

import jax

from skyjax.train.metrics import cannot_write

FILE = "goodput.json"
# Account -> what it is called in a sentence.
ACCOUNTS = {
    "initialise": "initialise",
    "compile": "compile",
    "data": "wait for data",
    "step": "step",
    "checkpoint": "checkpoint",
    "evaluate": "evaluate",
    "lost": "lost",
}
USEFUL = "step"


class Ledger:
    """Charges all time since it was made to one account at a time, at first to "initialise".

    Args:
      workdir: of the run; None keeps no file, as all processes but one do.
      began: when the run did, by `time.monotonic`; now where None.
    """

    def __init__(self, workdir: pathlib.Path | None = None, began: float | None = None) -> None:
        self.seconds = dict.fromkeys(ACCOUNTS, 0.0)
        self.starts = 1
        self._path = workdir / FILE if workdir else None
        self._account, self._since = "initialise", time.monotonic() if began is None else began

    def resume(self, step: int, saved: Mapping[str, Any] | None) -> None:
        """Takes over what the earlier starts of the run noted.

        Args:
          step: the step that the run goes on from.
          saved: `totals` as they stand in that step's checkpoint; None where it has none.
        """
        found = read(self._path) if self._path else None
        saved = saved or {"step": step, "starts": 0, "seconds": {}}
        totals = saved
        if found:
            more = sum(found["seconds"].values()) - sum(saved["seconds"].values())
            if found["step"] <= step and more > 0:  # it ended after this save, with nothing done since
                totals = found
            elif more > 0:
                lost = saved["seconds"].get("lost", 0.0) + more
                totals = {"starts": found["starts"], "seconds": {**saved["seconds"], "lost": lost}}
        self.starts += totals["starts"]
        for account, seconds in totals["seconds"].items():
            self.seconds[account] += seconds

    def turn_to(self, account: str) -> None:
        """Charges the time from now on to another account."""
        now = time.monotonic()
        self.seconds[self._account] += now - self._since
        self._account, self._since = account, now

    @contextlib.contextmanager
    def measure(self, account: str) -> Iterator[None]:
        """Charges the time inside to `account`."""
        before = self._account
        self.turn_to(account)
        try:
            yield
        finally:
            self.turn_to(before)

    @contextlib.contextmanager
    def waiting_for_data(self, device: "Device") -> Iterator[None]:
        """Charges to "data" the part in which the device had nothing to do; while it computes, nothing is lost."""
        start, before = time.monotonic(), self._account
        self.turn_to("data")
        try:
            yield
        finally:
            self.turn_to(before)
            busy = self._since - start - device.idle_seconds(start, self._since)
            self.seconds["data"] -= busy
            self.seconds["step"] += busy

    def totals(self, step: int) -> dict[str, Any]:
        """What a checkpoint and the file keep."""
        self.turn_to(self._account)
        return {"step": step, "starts": self.starts, "seconds": dict(self.seconds)}

    def write(self, step: int) -> None:
        """Puts the totals on the disk, whole or not at all.

        Raises:
          UserError: no space or no permission.
        """
        if self._path is None:
            return
        try:
            part = self._path.with_suffix(".json.part")
            part.write_text(json.dumps(self.totals(step)) + "\n")
            part.replace(self._path)
        except OSError as error:
            raise cannot_write(self._path, error) from error


def read(path: pathlib.Path) -> dict[str, Any] | None:
    """The totals in a goodput.json; None where there are none that make sense."""
    try:
        found = json.loads(path.read_text())
        seconds = {account: float(found["seconds"].get(account, 0.0)) for account in ACCOUNTS}
        return {"step": int(found["step"]), "starts": int(found["starts"]), "seconds": seconds}
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None


def shares(seconds: Mapping[str, float]) -> dict[str, float]:
    """Each account's share of all time, 0 to 1."""
    total = sum(seconds.values())
    return {account: seconds.get(account, 0.0) / total if total else 0.0 for account in ACCOUNTS}


def summary(totals: Mapping[str, Any]) -> str:
    """One line: the share of useful time, and where the rest went."""
    share = shares(totals["seconds"])
    rest = sorted((account for account in ACCOUNTS if account != USEFUL), key=lambda account: -share[account])
    spent = ", ".join(f"{ACCOUNTS[account]} {share[account]:.1%}" for account in rest if share[account] >= 0.0005)
    starts = f" in {totals['starts']} starts" if totals["starts"] > 1 else ""
    return f"goodput: {share[USEFUL]:.1%} of {sum(totals['seconds'].values()):.0f} s{starts} went into steps; {spent}"


class Device:
    """Notes when the device finishes what was given to it last. A thread waits for it, since a step is not awaited."""

    def __init__(self) -> None:
        self._given: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._dispatched, self._finished, self._idle_since = 0, 0, time.monotonic()
        self._thread = threading.Thread(target=self._watch, name="device-clock", daemon=True)

    def dispatched(self, result: Any) -> None:
        """A step was dispatched; `result` is an array that it gives."""
        self._dispatched += 1
        self._given.put(result)

    def idle_seconds(self, start: float, end: float) -> float:
        """How much of the time from `start` to `end` (now) the device had nothing to do."""
        if self._finished < self._dispatched:
            return 0.0
        return max(0.0, end - max(start, self._idle_since))

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._given.put(None)

    def _watch(self) -> None:
        while (result := self._given.get()) is not None:
            with contextlib.suppress(Exception):  # whoever reads the result raises it
                jax.block_until_ready(result)
            self._idle_since = time.monotonic()
            self._finished += 1
