"""Random images by which an export is compared with skyjax: dates, bands, pixels and modalities are missing in places.

In: an encoder. Out: images in stored units, the encoder as a jitted function, and the measure of a difference. For
words: texts, and their vectors beside those of images.
"""

import dataclasses
import functools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import ml_collections
import numpy as np

from skyjax.evals.features import pooled
from skyjax.input.device import normalize
from skyjax.models import skysense
from skyjax.sample import MODALITIES, Images
from skyjax.train.pretrained import Pretrained
from skyjax.train.words import Words

SITES, DATES = 2, 3
LEAP_DAY = 18_627  # 31 December 2020, the last day of a leap year
TEXTS = (
    "a satellite image of annual crops",
    "Été 2018 : 12 Forêts, à côté d'une rivière",
    "",
    "a time series of mixed forest, pastures and a river " * 20,
    "林",
)
LONLAT = np.array([[11.5, -48.1], [np.nan, 20.0]], np.float32)


def cases(pretrained: Pretrained, *, leap_day: bool = True) -> Iterator[dict[str, Images]]:
    """All modalities, of which each site lacks some; then without the first.

    Args:
      pretrained: whose bands, sensors and patch sizes count. Images are no whole number of patches.
      leap_day: whether a date is the last day of a leap year.
    """
    rng = np.random.default_rng(0)
    parts = {m: pretrained.config.model.modalities[m] for m in MODALITIES if m in pretrained.config.model.modalities}
    images = {m: _random_images(rng, part, pretrained.statistics[m], leap_day) for m, part in parts.items()}
    if len(images) > 1:
        images[list(images)[-1]]["valid"][0] = False
    yield images
    if len(images) > 1:
        yield {m: images[m] for m in list(images)[1:]}


def encoder(pretrained: Pretrained) -> Callable[[Mapping[str, Images]], Any]:
    """Images of `cases` -> outputs (models/skysense.py), computed in float32. Equal configs are compiled once."""
    model = pretrained.config.model.to_dict() | {"dtype": "float32"}
    tables = {
        m: {name: np.array(table[name], np.float32) for name in ("mean", "std")}
        for m, table in pretrained.statistics.items()
    }
    return functools.partial(
        _compiled(json.dumps(model, sort_keys=True)), pretrained.params, pretrained.prototypes, tables
    )


def vectors(words: Words, output: Mapping[str, Any], streams: Sequence[str]) -> dict[str, np.ndarray]:
    """Unit vectors of TEXTS, and of an output's sites by each stream; computed in float32."""
    config = words.config.copy_and_resolve_references()
    with config.unlocked():
        config.model.dtype = "float32"
    own = dataclasses.replace(words, config=config)
    found = {"text": own.encode(TEXTS)}
    return found | {stream: own.project(stream, pooled(output, stream, level="spatial")) for stream in streams}


def largest_error(want: Any, got: Any) -> float:
    """The largest max |difference| / max |wanted| of two trees of arrays; infinite where masks or shapes differ."""
    wanted, given = (jax.tree_util.tree_flatten_with_path(tree)[0] for tree in (want, got))
    if [path for path, _ in wanted] != [path for path, _ in given]:
        raise ValueError("outputs have different names")
    return max(_error(np.asarray(x), np.asarray(y)) for (_, x), (_, y) in zip(wanted, given, strict=True))


@functools.lru_cache(maxsize=4)
def _compiled(model: str) -> Callable[..., Any]:
    config = ml_collections.ConfigDict(json.loads(model))

    @jax.jit
    def encode(params: Any, prototypes: Any, tables: Any, images: Mapping[str, Images]) -> Any:
        normalized = {m: {**x, "values": normalize(x, **tables[m])} for m, x in images.items()}
        return skysense.apply(config, params, normalized, lonlat=jax.numpy.asarray(LONLAT), prototypes=prototypes)

    return encode


def _random_images(
    rng: np.random.Generator, part: ml_collections.ConfigDict, statistics: Mapping[str, Any], leap_day: bool
) -> Images:
    """Images of one modality, about three tokens high and wide."""
    size = part.patch_size * 2 ** (len(part.depths) - 1) if part.kind == "swin_v2" else part.patch_size
    h, w, c = 2 * size + 1, 3 * size - 1, len(part.bands)
    mean, std = (np.array(statistics[name], np.float32) for name in ("mean", "std"))
    sensor = rng.integers(0, len(mean), SITES).astype(np.int32)
    shape = (SITES, DATES, h, w, c)
    spread = (slice(None), None, None, None)
    values = (mean[sensor][spread] + std[sensor][spread] * rng.normal(size=shape)).astype(np.float32)
    values[rng.random(shape) < 0.01] = np.nan
    days = np.sort(rng.integers(LEAP_DAY - 1500, LEAP_DAY, (SITES, DATES)), axis=1).astype(np.int32)
    days[0, -1] = LEAP_DAY if leap_day else LEAP_DAY - 1
    valid = np.ones((SITES, DATES), bool)
    valid[1, 1:] = False
    clear = rng.random((SITES, DATES, h, w)) < 0.9
    clear[0, 0, : h // 2] = False
    bands = np.ones((SITES, c), bool)
    bands[1, 1:] = rng.random(c - 1) < 0.5
    return {"values": values, "days": days, "valid": valid, "clear": clear, "sensor": sensor, "bands": bands}


def _error(want: np.ndarray, got: np.ndarray) -> float:
    if want.shape != got.shape:
        return float("inf")
    if want.dtype.kind != "f":
        return 0.0 if np.array_equal(want, got) else float("inf")
    difference = float(np.abs(want - got).max(initial=0))
    if not np.isfinite(difference):
        return float("inf")
    return difference / max(float(np.abs(want).max(initial=0)), 1e-30) if difference else 0.0
