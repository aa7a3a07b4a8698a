"""What stands beside the state in a checkpoint, and what proves that both are what was written.

In: the notes of the loop and the state. Out: the notes as they are stored (JSON), stamped with the format's number,
checksums of every array and a seal over themselves; and back, brought to today's format.

| format | what is new |
|---|---|
| 1 | no number. "checksums": sums of words, which do not tell where a word stood |
| 2 | "format", "seal"; "checksums" know places; "evaluated" and "bad_samples" |
| 3 | "order": in which the records of small sources come (input/loader.py); without, the one of before |
"""

import json
import zlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, UInt32

from skyjax.errors import UserError
from skyjax.parallel.sharding import path_name

FORMAT = 3
Notes = dict[str, Any]


class Refused(UserError):
    """A checkpoint that is whole and does not belong to this run or this revision: not damaged, so left where it is."""


def seal(notes: Mapping[str, Any], state: Any) -> Notes:
    """The notes as a checkpoint keeps them.

    Args:
      notes: JSON values.
      state: tree of arrays that they stand beside.
    """
    stamped = {**notes, "format": FORMAT, "checksums": checksums(state)}
    return {**stamped, "seal": _checksum_of(stamped)}


def unseal(stored: Mapping[str, Any]) -> Notes:
    """Notes of any format that was, as they would be today.

    Raises:
      Refused: they are of a later format.
      ValueError: they are not what was written.
    """
    notes = dict(stored)
    number = notes.get("format", 1)
    if not isinstance(number, int) or number < 1:
        raise ValueError(f"its format is {number!r}")
    # The seal is made alike in all formats to come: "format": 3 with one bit changed is 1, 2 or 7, and damaged.
    sealed = number >= 2 or "seal" in notes
    if sealed and notes.pop("seal", None) != _checksum_of(notes):
        raise ValueError("its notes are not what was written")
    if number > FORMAT:
        raise Refused(
            f"is of format {number}, written by {writer(notes)}; this one reads up to {FORMAT}: update skyjax"
        )
    for older in range(number, FORMAT):
        notes = MIGRATIONS[older](notes)
    return notes


def writer(notes: Mapping[str, Any]) -> str:
    """Who wrote them, in words."""
    versions = notes.get("versions", {})
    revision = f" ({versions['git'][:12]})" if "git" in versions else ""
    return f"skyjax {versions.get('skyjax', 'of an unknown version')}{revision}"


def _checksum_of(notes: Mapping[str, Any]) -> int:
    return zlib.crc32(json.dumps(notes, sort_keys=True).encode())


def _from_1(notes: Notes) -> Notes:
    """Evaluated as far as can be known; bad samples were not counted. The checksums stay those of format 1."""
    return {"evaluated": notes["step"], "bad_samples": 0, **notes}


def _from_2(notes: Notes) -> Notes:
    """The run goes on in the order that it began with."""
    return {"order": 1, **notes}


MIGRATIONS: dict[int, Callable[[Notes], Notes]] = {1: _from_1, 2: _from_2}


def wrong_arrays(state: Any, notes: Mapping[str, Any]) -> list[str]:
    """Paths of the arrays of `state` that are not what was written."""
    found = checksums(state, places=notes.get("format", 1) >= 2)
    return [path for path, value in found.items() if value != notes["checksums"].get(path)]


def checksums(state: Any, places: bool = True) -> dict[str, int]:
    """A number for each array, by path; the same however the array is spread over devices and processes.

    Orbax finds a truncated file but not a changed bit in the values. Modulo 2**32, the sum of an array's words, each
    times an odd number that depends on its place: any one changed bit changes it, and so do words that have changed
    places, but for one chance in 2**31.

    Args:
      state: tree of arrays.
      places: without, the plain sum of format 1.
    """
    sums = jax.device_get(_sums(state, places=places))
    return {path_name(path): int(value) for path, value in jax.tree_util.tree_leaves_with_path(sums)}


@jax.jit(static_argnames="places")
def _sums(state: Any, *, places: bool) -> Any:
    def total(leaf: jax.Array) -> UInt32[Array, ""]:
        words = jax.lax.bitcast_convert_type(leaf, jnp.dtype(f"uint{8 * leaf.dtype.itemsize}")).astype(jnp.uint32)
        return jnp.sum(words * _odd_numbers(words.shape) if places else words, dtype=jnp.uint32)

    return jax.tree.map(total, state)


def _odd_numbers(shape: tuple[int, ...]) -> UInt32[Array, "..."]:
    """An odd number for each place; neighbours have nothing in common (the finaliser of MurmurHash3)."""
    place = jnp.zeros(shape, jnp.uint32)
    for axis, size in enumerate(shape):
        place = place * jnp.uint32(size % 2**32) + jax.lax.broadcasted_iota(jnp.uint32, shape, axis)
    place = (place ^ (place >> 16)) * jnp.uint32(0x85EBCA6B)
    place = (place ^ (place >> 13)) * jnp.uint32(0xC2B2AE35)
    return place ^ (place >> 16) | jnp.uint32(1)
