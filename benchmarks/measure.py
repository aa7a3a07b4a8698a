"""What the benchmarks share: sides that take turns, memory that stays in the process, a batch of random pixels."""

import ctypes
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from skyjax.sample import Batch

SETTLE_S = 0.01  # threads of the side before go on spinning for a moment


def in_turns(
    runs: Mapping[str, Callable[[], Any]], rounds: int, clock: Callable[[], float], warm_up: int = 2
) -> dict[str, list[float]]:
    """Seconds of each round of every side; they take turns, so that what else the machine does meets all alike."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for i in range(rounds + warm_up):
        for name, run in runs.items():
            time.sleep(SETTLE_S)
            start = clock()
            run()
            if i >= warm_up:
                seconds[name].append(clock() - start)
    return seconds


def keep_memory() -> None:
    """Keeps freed memory in the process (glibc).

    Otherwise it depends on what ran before whether each round asks the system for the same pages again, which can
    double the time of a part whose arrays are large.
    """
    mmap_threshold, trim_threshold = -3, -1
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(mmap_threshold, 2**30)
        libc.mallopt(trim_threshold, 2**31 - 1)


def random_batch(abstract: Batch) -> Batch:
    """Every date there, on a day of its own; every view the whole site, so that all places have a counterpart."""
    rng = np.random.default_rng(0)

    def fill(path: Any, leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        name = path[-1].key
        if name == "values":
            return rng.integers(0, 250, leaf.shape).astype(leaf.dtype)
        if name in ("days", "student_days"):
            return np.broadcast_to(18_000 + 10 * np.arange(leaf.shape[-1]), leaf.shape).astype(leaf.dtype)
        if name == "to_view":
            return np.broadcast_to(np.eye(2, 3), leaf.shape).astype(leaf.dtype)
        if name == "index":
            return np.arange(*leaf.shape).astype(leaf.dtype)
        return np.full(leaf.shape, leaf.dtype == bool and name != "bad", leaf.dtype)

    return jax.tree_util.tree_map_with_path(fill, abstract)
