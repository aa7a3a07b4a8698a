"""Binary codes of embeddings, and search among them by Hamming distance (faiss).

A code is the signs of an embedding's coordinates along rotated axes: random ones, or the first principal components
rotated so that signs lose least (ITQ, Gong et al. 2013, section 3). Images and texts are centred each by their own
mean, since a contrastive space holds them apart; no pair is looked at.
"""

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from jaxtyping import Float, Int, UInt8

from skyjax.errors import UserError

ROUNDS = 50  # of ITQ, as its authors take
_REPEATS = 5  # of a search that is timed; the median counts


@dataclasses.dataclass(frozen=True)
class Codes:
    """What makes codes: a mean for images and one for texts, and the axes whose signs are bits."""

    image_mean: Float[np.ndarray, "e"]
    text_mean: Float[np.ndarray, "e"]
    axes: Float[np.ndarray, "e bits"]

    def of_images(self, vectors: Float[np.ndarray, "n e"]) -> UInt8[np.ndarray, "n bytes"]:
        """Codes, 8 bits a byte."""
        return np.packbits((vectors - self.image_mean) @ self.axes > 0, axis=1)

    def of_texts(self, vectors: Float[np.ndarray, "n e"]) -> UInt8[np.ndarray, "n bytes"]:
        """Codes, 8 bits a byte."""
        return np.packbits((vectors - self.text_mean) @ self.axes > 0, axis=1)


def random_codes(
    images: Float[np.ndarray, "n e"], texts: Float[np.ndarray, "m e"], bits: int, *, seed: int = 0
) -> Codes:
    """Signs along random directions: orthogonal as far as the width allows, then further rotations of it."""
    rng, width = np.random.default_rng(seed), images.shape[1]
    rotations = [np.linalg.qr(rng.normal(size=(width, width)))[0] for _ in range(-(-bits // width))]
    return Codes(images.mean(0), texts.mean(0), np.concatenate(rotations, 1)[:, :bits].astype(np.float32))


def learned_codes(
    images: Float[np.ndarray, "n e"], texts: Float[np.ndarray, "m e"], bits: int, *, seed: int = 0
) -> Codes:
    """ITQ on images and texts together.

    Raises:
      ValueError: more bits than the vectors are wide.
    """
    if bits > images.shape[1]:
        raise ValueError(f"{bits} learned bits of vectors of width {images.shape[1]}; take as many or fewer")
    centred = np.concatenate([images - images.mean(0), texts - texts.mean(0)]).astype(np.float64)
    _, directions = np.linalg.eigh(centred.T @ centred)
    components = directions[:, ::-1][:, :bits]
    along = centred @ components
    rotation = np.linalg.qr(np.random.default_rng(seed).normal(size=(bits, bits)))[0]
    for _ in range(ROUNDS):
        signs = np.where(along @ rotation > 0, 1.0, -1.0)
        left, _, right = np.linalg.svd(along.T @ signs)
        rotation = left @ right
    return Codes(images.mean(0), texts.mean(0), (components @ rotation).astype(np.float32))


def check_bits(bits: int) -> None:
    """Refuses what is no number of whole bytes, and a faiss that is not there.

    Raises:
      UserError: one of both.
    """
    if bits < 8 or bits % 8:
        raise UserError(f"--hash-bits={bits} is not a number of whole bytes; take 8, 16, 32, 64, 128, ...")
    _faiss()


def _faiss() -> Any:
    try:
        import faiss
    except ImportError as error:
        raise UserError(
            '--hash-bits needs faiss, which is not installed; pip install "skyjax[retrieval]" brings it'
        ) from error
    return faiss


def nearness(
    queries: UInt8[np.ndarray, "q bytes"], items: UInt8[np.ndarray, "n bytes"]
) -> Callable[[slice], Int[np.ndarray, "b n"]]:
    """Minus the Hamming distances of a block of queries to all items, for `ranks.search`."""
    index = _binary(items)

    def score(block: slice) -> Int[np.ndarray, "b n"]:
        # Many items are equally far: recall needs to know of all, not of the first few that the library gives.
        distance, which = index.search(np.ascontiguousarray(queries[block]), len(items))
        found = np.empty_like(distance)
        np.put_along_axis(found, which, -distance, axis=1)
        return found

    return score


def _binary(items: UInt8[np.ndarray, "n bytes"]) -> Any:
    index = _faiss().IndexBinaryFlat(8 * items.shape[1])
    index.add(np.ascontiguousarray(items))
    return index


def seconds_by_code(queries: UInt8[np.ndarray, "q bytes"], items: UInt8[np.ndarray, "n bytes"], k: int) -> float:
    """Seconds that the search for the k nearest of all queries takes, by codes."""
    return _seconds(_binary(items), np.ascontiguousarray(queries), min(k, len(items)))


def seconds_exact(queries: Float[np.ndarray, "q e"], items: Float[np.ndarray, "n e"], k: int) -> float:
    """The same by products of float32 vectors, by the same library."""
    index = _faiss().IndexFlatIP(items.shape[1])
    index.add(np.ascontiguousarray(items, np.float32))
    return _seconds(index, np.ascontiguousarray(queries, np.float32), min(k, len(items)))


def _seconds(index: Any, queries: np.ndarray, k: int) -> float:
    times = []
    for _ in range(_REPEATS):
        start = time.perf_counter()
        index.search(queries, k)
        times.append(time.perf_counter() - start)
    return float(np.median(times))
