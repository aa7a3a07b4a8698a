"""What the processes of a run tell each other: whether one was asked to stop, and how long each took to get ready.

A step is one program over all processes, so all must leave the loop at the same step, and the slowest sets the pace.
After every step each sends two numbers through one small all-gather beside the step. It is read one step late, so that
nobody waits for it, and all read the same: that is the agreement.
"""

import contextlib
import dataclasses
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax._src import distributed  # its client has the only barrier without a device
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float

from skyjax.errors import EXIT_USER_ERROR, UserError
from skyjax.parallel.sharding import replicated
from skyjax.train.preemption import EXIT_PREEMPTED

SLOW = 1.2  # times the median
COMPILE_SECONDS = 3600  # the watchdog comes first
BEGIN_SECONDS = 10  # all are there and only have to say so
NOTABLE = 0.05  # of a step, and
NOTABLE_SECONDS = 0.01  # what is less delays nobody


class Hosts:
    """The processes that share a run; one alone needs no messages.

    Args:
      mesh: of all devices.
      requested: whether this process was asked to stop.
    """

    def __init__(self, mesh: Mesh, requested: Callable[[], bool]) -> None:
        self._requested = requested
        self._alone = jax.process_count() == 1
        self._agreed = False
        self._own = np.zeros(jax.process_count())
        self._steps, self._seconds = 0, 0.0
        self._began = self._ready = 0.0  # set by the first step, which takes longer on the process that writes
        if self._alone:
            return
        self._sharding = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
        self._gather = jax.jit(lambda words: words, out_shardings=replicated(mesh))
        # Every device has a row; one row a process is enough.
        owners = [device.process_index for device in mesh.devices.flat]
        self._rows = [owners.index(process) for process in range(jax.process_count())]
        self._held: jax.Array | None = None

    @property
    def stop(self) -> bool:
        """Whether to save and end now; the same on all processes that have taken the same steps."""
        return self._requested() if self._alone else self._agreed

    def ask(self) -> bool:
        """The same, asked and answered now: all processes must call it alike."""
        if not self._alone:
            self._read(self._send(0.0))
        return self.stop

    def ready(self) -> None:
        """This process has its batch; from now on it waits for the device and so for the others."""
        self._ready = time.monotonic()

    def report(self) -> None:
        """To be called once a step, when it was dispatched and the one before is finished."""
        own = self._ready - self._began if self._began else 0.0
        if not self._alone:
            held, self._held = self._held, self._send(own)
            if held is not None:
                self._own += self._read(held)
        now = time.monotonic()  # after the answers, which wait for the others too
        self._steps, self._seconds, self._began = self._steps + 1, self._seconds + now - (self._began or now), now

    def _send(self, own_seconds: float) -> jax.Array:
        words = np.full((len(jax.local_devices()), 2), (self._requested(), own_seconds), np.float32)
        return self._gather(jax.make_array_from_process_local_data(self._sharding, words))

    def _read(self, answers: jax.Array) -> np.ndarray:
        """Everyone's own seconds (processes,); notes whether one was asked to stop."""
        stop, own = np.asarray(answers)[self._rows].T
        self._agreed |= bool(stop.any())
        return own

    def slow(self) -> "Slow | None":
        """The process that kept the others waiting since the last call, if any did.

        Only what happens outside of the step shows: reading data, and whatever else holds up the host. A slow chip
        slows the step of all alike.
        """
        own, seconds = self._own / max(self._steps, 1), self._seconds / max(self._steps, 1)
        self._own, self._steps, self._seconds = np.zeros_like(self._own), 0, 0.0
        slowest, median = int(own.argmax()), float(np.median(own))
        if own[slowest] > SLOW * median and own[slowest] - median > max(NOTABLE * seconds, NOTABLE_SECONDS):
            return Slow(slowest, float(own[slowest]), median)
        return None


def compile_together(step: Any, *arguments: Any, begin: Callable[[], None]) -> Callable[..., Any]:
    """The jitted step compiled for these arguments, when all processes have done so.

    One that finds the program in its cache is ready minutes before the others, and on the CPU the collectives of its
    first step would give the others up after 30 s.

    Until then a process that is asked to stop ends at once, and a step without it would fail. So all agree once more
    when they have called `begin`, after which none ends by itself; where one is missing, none has taken a step, and
    this process ends as preempted.

    Args:
      step: the jitted function.
      arguments: of its first call.
      begin: called with peers, when the step is compiled everywhere.
    """
    if jax.process_count() == 1:
        return step
    compiled = step.lower(*arguments).compile()
    client = distributed.global_state.client
    assert client is not None, "several processes have a coordinator"
    client.wait_at_barrier("skyjax: compiled", COMPILE_SECONDS * 1000)
    begin()
    try:
        client.wait_at_barrier("skyjax: begin", BEGIN_SECONDS * 1000)  # it is passed by all or by none
    except jax.errors.JaxRuntimeError:
        print("skyjax: a process left before the first step: nothing to save", file=sys.stderr, flush=True)
        os._exit(EXIT_PREEMPTED)
    return compiled


@contextlib.contextmanager
def leave_when_broken() -> Iterator[None]:
    """With peers, an error ends this process at once.

    They wait for it within a step, and at the interpreter's end jax would wait for them.
    """
    try:
        yield
    except BaseException as error:
        if not jax.distributed.is_initialized():
            raise
        if isinstance(error, UserError):
            print(f"skyjax: {error}", file=sys.stderr)
        else:
            traceback.print_exc()
        sys.stderr.flush()
        os._exit(EXIT_USER_ERROR if isinstance(error, UserError) else 1)


@dataclasses.dataclass(frozen=True)
class Slow:
    """A process that keeps the others waiting, its own seconds a step and the median of all."""

    process: int
    own: float
    median: float

    def __str__(self) -> str:
        return (
            f"process {self.process} is slow: it takes {self.own:.2g} s a step to get ready, the median is"
            f" {self.median:.2g} s; look at its data and its host"
        )

    @property
    def numbers(self) -> dict[str, float]:
        """For metrics.jsonl."""
        return {"slow_process": self.process, "slow_process_seconds": self.own}


def share_of_batch(mesh: Mesh) -> tuple[int, int]:
    """Which share of each global batch this process reads, and how many shares there are.

    Processes that differ along `tensor` alone hold the same rows and read the same share.

    Raises:
      UserError: two processes hold partly the same rows.
    """
    rows: dict[int, set[int]] = {}
    for place, device in np.ndenumerate(mesh.devices):
        rows.setdefault(device.process_index, set()).add(int(np.ravel_multi_index(place[:2], mesh.devices.shape[:2])))
    shares = sorted(set(map(frozenset, rows.values())), key=min)
    if sum(map(len, shares)) != len(frozenset().union(*shares)) or len(set(map(len, shares))) > 1:
        raise UserError(
            f"config: mesh {dict(mesh.shape)} gives processes partly the same rows of a batch; choose mesh.tensor so"
            " that it divides the devices of a process, or is a multiple of them"
        )
    return shares.index(frozenset(rows[jax.process_index()])), len(shares)


@jax.jit
def count_bad(batch: Any) -> Float[Array, ""]:
    """How many samples of a batch, of all processes, are empty places of records that could not be used."""
    return jnp.sum(batch["bad"], dtype=jnp.float32)


@jax.jit
def fingerprint(batch: Any) -> Float[Array, ""]:
    """A number that tells which samples a batch holds at which global index, whatever processes read them.

    Sum over the samples of the sum of their words times an odd number of their global index, modulo 2**24, which
    float32 holds exactly.
    """
    index = batch["index"].astype(jnp.uint32)
    sums = jnp.zeros_like(index)
    for leaf in jax.tree.leaves(batch):
        words = leaf.astype(jnp.uint8) if leaf.dtype == jnp.bool_ else leaf
        words = jax.lax.bitcast_convert_type(words, jnp.dtype(f"uint{8 * words.dtype.itemsize}"))
        sums += words.astype(jnp.uint32).reshape(len(index), -1).sum(1, dtype=jnp.uint32)
    return (jnp.sum(sums * (2 * index + 1), dtype=jnp.uint32) % 2**24).astype(jnp.float32)
