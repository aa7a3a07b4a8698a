"""Features of a set, one vector an example.

Each image is read once and goes through every extractor while it is in memory. The encoder's vector is the mean of the
fused features over valid places ("fused"), or of one modality's spatial encoder, before its up-head, over valid places
and dates.
"""

import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import jax
import numpy as np
from jaxtyping import Float, Int

from skyjax.errors import UserError
from skyjax.evals.baselines import Extractor
from skyjax.evals.progress import track
from skyjax.models import skysense
from skyjax.sample import Sample

FUSED = "fused"
BATCH_SIZE = 64


class Encoder(Protocol):
    """What a probe needs of a model: `skyjax.load(...)` is one."""

    @property
    def config(self) -> Any:
        """Of the experiment."""

    def encode(self, samples: list[Sample]) -> dict[str, Any]:
        """The encoder's output as numpy (models/skysense.py)."""


def encoder_features(
    model: Encoder, *, kind: str = FUSED, level: str = "encoder", batch_size: int = BATCH_SIZE
) -> Extractor:
    """Samples -> the encoder's features.

    Args:
      model: as `skyjax.load` returns it.
      kind: "fused", or a modality of the model.
      level: of a modality: "encoder", before the up-head, or "spatial", behind it.
      batch_size: samples encoded at a time; a smaller rest is filled up, so that one shape is compiled.

    Raises:
      UserError: the model has no such modality.
    """
    known = (FUSED, *model.config.model.modalities)
    if kind not in known:
        raise UserError(f"--modality={kind} is not in this checkpoint; it has {', '.join(known)}")

    def extract(samples: Sequence[Sample]) -> Float[np.ndarray, "n d"]:
        rows = []
        for start in range(0, len(samples), batch_size):
            batch = list(samples[start : start + batch_size])
            output = model.encode(batch + [batch[-1]] * (batch_size - len(batch)))
            rows.append(pooled(output, kind, level)[: len(batch)])
        return np.concatenate(rows)

    return extract


def pooled(output: Mapping[str, Any], kind: str, level: str = "encoder") -> Float[np.ndarray, "b d"]:
    """Means over valid places and dates of what the encoder gives; arguments and errors as in `encoder_features`."""
    if kind == FUSED:
        return np.asarray(output["pooled"], np.float32)
    if kind not in output[level]:
        raise UserError(f"--modality={kind}: the data set has no {kind} images; it has {', '.join(output[level])}")
    features = np.asarray(output[level][kind], np.float32)
    valid = np.asarray(output[f"{level}_valid"][kind], np.float32)
    total = np.einsum("bthwd,bthw->bd", features, valid)
    return total / np.maximum(valid.sum((1, 2, 3)), 1)[:, None]


class Readable(Protocol):
    """Samples by their numbers: a labelled set, a captioned one, or images that were looked at."""

    @property
    def read(self) -> Callable[[int], Sample]:
        """Number of an example -> its sample."""


def extract_all(
    dataset: Readable, which: Int[np.ndarray, "n"], extractors: Mapping[str, Extractor]
) -> tuple[dict[str, Float[np.ndarray, "n d"]], dict[str, float]]:
    """The features of each extractor, and the seconds that each took."""
    rows: dict[str, list[np.ndarray]] = {name: [] for name in extractors}
    seconds = dict.fromkeys(extractors, 0.0)
    for samples in _batches(dataset, which):
        for name, extract in extractors.items():
            start = time.perf_counter()
            rows[name].append(extract(samples))
            seconds[name] += time.perf_counter() - start
    return {name: np.concatenate(every) for name, every in rows.items()}, seconds


def _batches(dataset: Readable, which: Int[np.ndarray, "n"]) -> Iterator[list[Sample]]:
    batch: list[Sample] = []
    for i in track(which.tolist(), len(which), "features"):
        batch.append(dataset.read(i))
        if len(batch) == BATCH_SIZE:
            yield batch
            batch = []
    if batch:
        yield batch


def untrained(model: Any, seed: int) -> Any:
    """The same model with fresh parameters: what its architecture knows before any training."""
    return dataclasses.replace(model, params=skysense.init(model.config.model, jax.random.key(seed)))
