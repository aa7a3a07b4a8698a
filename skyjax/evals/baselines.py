"""Features that know nothing of pre-training: what any table of probes must be read against.

Image statistics: of each band's raw values over the clear pixels of all dates, the mean, the standard deviation, five
quantiles, and mean and standard deviation of the differences between neighbours down and across.

Random convolutional features (Coates & Ng 2012; MOSAIKS, Rolf et al. 2021): 512 patches of 7 x 7 pixels drawn from the
training images, whitened, are the filters of one convolution; the means of ReLU(z - 0.5) and ReLU(-z - 0.5) over the
image are 1,024 features a modality.

A band or modality that a sample lacks is NaN here; `fill` puts the training part's mean in its place.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from skyjax.sample import MODALITIES, Sample
from skyjax.sample import Sequence as Stored

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
STATISTICS = 2 + len(QUANTILES) + 4  # a band
FILTERS = 512
PATCH = 7  # pixels a side, or the largest odd number that fits the images
BIAS = 0.5
_WHITENING_PATCHES = 20_000
_WHITENING_FLOOR = 0.1  # added to the variance of each direction: those that hold only noise are not blown up
_BATCH = 32
_BLOCK = 2048  # places of an image that are convolved at a time, so that the responses stay in the cache

Extractor = Callable[[Sequence[Sample]], Float[np.ndarray, "n d"]]


def image_statistics(train: Sequence[Sample]) -> Extractor:
    """Samples -> statistics of each band that the training samples have, by name."""
    bands = _bands(train, set.union)

    def extract(samples: Sequence[Sample]) -> Float[np.ndarray, "n d"]:
        return np.stack([_statistics_of(sample, bands) for sample in samples])

    return extract


def _statistics_of(sample: Sample, bands: Mapping[str, Sequence[str]]) -> Float[np.ndarray, "d"]:
    rows = []
    for modality, names in bands.items():
        row = np.full((len(names), STATISTICS), np.nan, np.float32)
        sequence = sample.sequences.get(modality)
        if sequence is not None:
            here = [name for name in names if name in sequence.bands]
            found = _band_statistics(_chosen(sequence, here), _seen(sequence))
            row[[names.index(name) for name in here]] = found
        rows.append(row.ravel())
    return np.concatenate(rows)


def _band_statistics(values: Float[np.ndarray, "t h w c"], seen: Bool[np.ndarray, "t h w"]) -> Float[np.ndarray, "c s"]:
    pixels = values[seen]
    if not len(pixels):
        return np.full((values.shape[-1], STATISTICS), np.nan, np.float32)
    columns = [pixels.mean(0), pixels.std(0), *np.quantile(pixels, QUANTILES, axis=0)]
    for axis in (1, 2):
        both = np.delete(seen, 0, axis) & np.delete(seen, -1, axis)
        change = np.abs(np.diff(values, axis=axis)[both])
        columns += [change.mean(0), change.std(0)] if len(change) else [np.zeros(values.shape[-1])] * 2
    return np.stack(columns, axis=1).astype(np.float32)


def random_convolution(train: Sequence[Sample], *, filters: int = FILTERS, seed: int = 0) -> Extractor:
    """Samples -> random convolutional features with filters drawn from these training samples.

    A modality takes part with the bands that all training samples of it have.
    """
    rng = np.random.default_rng(seed)
    parts = []
    for modality, bands in _bands(train, set.intersection).items():
        images = [image for sample in train for image in _images(sample, modality, bands)]
        if bands and images:
            parts.append(_FilterBank(modality, bands, images, filters, rng))

    def extract(samples: Sequence[Sample]) -> Float[np.ndarray, "n d"]:
        return np.concatenate([part(samples) for part in parts], axis=1)

    return extract


class _FilterBank:
    """One modality's filters, with the whitening folded into them."""

    def __init__(
        self,
        modality: str,
        bands: Sequence[str],
        images: Sequence[tuple[np.ndarray, np.ndarray]],
        filters: int,
        rng: np.random.Generator,
    ):
        self.modality, self.bands, self.filters = modality, bands, filters
        pixels = np.concatenate([values[seen] for values, seen in images])
        self.mean, self.std = pixels.mean(0), np.maximum(pixels.std(0), 1e-6)
        side = min(min(values.shape[:2]) for values, _ in images)
        self.size = min(PATCH, side - 1 + side % 2)
        each = -(-_WHITENING_PATCHES // len(images))
        patches = np.concatenate([self._draw(self._standard(*image), each, rng) for image in images])
        centre = patches.mean(0)
        variance, directions = np.linalg.eigh(np.cov(patches - centre, rowvar=False).reshape(2 * centre.shape))
        whiten = (directions / np.sqrt(variance.clip(0) + _WHITENING_FLOOR)) @ directions.T
        white = (patches[rng.choice(len(patches), filters, replace=len(patches) < filters)] - centre) @ whiten
        white /= np.maximum(np.linalg.norm(white, axis=1, keepdims=True), 1e-6)
        kernel = whiten @ white.T
        self.kernel = jnp.asarray(kernel.reshape(self.size, self.size, len(bands), filters), jnp.float32)
        self.offset = jnp.asarray(centre @ kernel, jnp.float32)

    def __call__(self, samples: Sequence[Sample]) -> Float[np.ndarray, "n d"]:
        """The mean over each sample's dates."""
        images = [
            (i, self._standard(*image))
            for i, sample in enumerate(samples)
            for image in _images(sample, self.modality, self.bands)
        ]
        total, count = np.zeros((len(samples), 2 * self.filters)), np.zeros((len(samples), 1))
        for start in range(0, len(images), _BATCH):
            owners, values = zip(*images[start : start + _BATCH], strict=True)
            batch = np.zeros((_BATCH, *values[0].shape), np.float32)  # one shape, compiled once
            batch[: len(values)] = values
            features = np.asarray(convolve(batch, self.kernel, self.offset))[: len(values)]
            np.add.at(total, list(owners), features)
            np.add.at(count, list(owners), 1)
        return np.where(count > 0, total / np.maximum(count, 1), np.nan).astype(np.float32)

    def _standard(self, values: np.ndarray, seen: np.ndarray) -> Float[np.ndarray, "h w c"]:
        """Bands in comparable units, so that decibels and counts whiten alike; gaps hold the mean."""
        return np.where(seen[..., None], (values - self.mean) / self.std, 0)

    def _draw(self, image: np.ndarray, count: int, rng: np.random.Generator) -> Float[np.ndarray, "n p"]:
        windows = np.lib.stride_tricks.sliding_window_view(image, (self.size, self.size), axis=(0, 1))
        rows, columns = rng.integers(0, windows.shape[0], count), rng.integers(0, windows.shape[1], count)
        return windows[rows, columns].transpose(0, 2, 3, 1).reshape(count, -1)


@jax.jit
def convolve(
    images: Float[Array, "b h w c"], kernel: Float[Array, "p p c f"], offset: Float[Array, "f"]
) -> Float[Array, "b 2f"]:
    """Means over the image of ReLU(z - BIAS) and ReLU(-z - BIAS), z = image * kernel - offset, without padding.

    By matrix products over blocks of places: five times faster on a CPU than XLA's convolution of three bands.
    """
    p, _, c, f = kernel.shape
    matrix = kernel.reshape(p * p * c, f)

    def one(image: Float[Array, "h w c"]) -> Float[Array, "2f"]:
        rows, columns = image.shape[0] - p + 1, image.shape[1] - p + 1
        across = jnp.concatenate([image[:, j : j + columns] for j in range(p)], axis=-1)
        patches = jnp.concatenate([across[i : i + rows] for i in range(p)], axis=-1).reshape(rows * columns, -1)
        blocks = -(-len(patches) // _BLOCK)
        size = -(-len(patches) // blocks)
        patches = jnp.pad(patches, ((0, blocks * size - len(patches)), (0, 0))).reshape(blocks, size, -1)
        there = (jnp.arange(blocks * size) < rows * columns).reshape(blocks, size, 1)

        def add(total: Array, block: tuple[Array, Array]) -> tuple[Array, None]:
            response = block[0] @ matrix - offset
            above = jnp.where(block[1], jax.nn.relu(response - BIAS), 0).sum(0)
            below = jnp.where(block[1], jax.nn.relu(-response - BIAS), 0).sum(0)
            return total + jnp.concatenate([above, below]), None

        total, _ = jax.lax.scan(add, jnp.zeros(2 * f), (patches, there))
        return total / (rows * columns)

    return jax.lax.map(one, images)


def fill(features: Float[np.ndarray, "n d"], mean: Float[np.ndarray, "d"]) -> Float[np.ndarray, "n d"]:
    """The features with `mean` where they are not finite."""
    return np.where(np.isfinite(features), features, mean).astype(np.float32)


def finite_mean(features: Float[np.ndarray, "n d"]) -> Float[np.ndarray, "d"]:
    """The mean of what is finite in each column; 0 where nothing is."""
    there = np.isfinite(features)
    return np.where(there, features, 0).sum(0) / np.maximum(there.sum(0), 1)


def _bands(samples: Iterable[Sample], together: Callable[..., set]) -> dict[str, tuple[str, ...]]:
    """Modality -> the union or intersection of its samples' bands, in the order in which they first come."""
    found: dict[str, list[tuple[str, ...]]] = {}
    for sample in samples:
        for modality, sequence in sample.sequences.items():
            if sequence.bands not in found.setdefault(modality, []):
                found[modality].append(sequence.bands)
    kept = {modality: together(*map(set, every)) for modality, every in found.items()}
    return {
        m: tuple(dict.fromkeys(band for bands in found[m] for band in bands if band in kept[m]))
        for m in MODALITIES
        if m in found
    }


def _images(
    sample: Sample, modality: str, bands: Sequence[str]
) -> list[tuple[Float[np.ndarray, "h w c"], Bool[np.ndarray, "h w"]]]:
    """Values and seen pixels of each date that has any."""
    sequence = sample.sequences.get(modality)
    if sequence is None or not set(bands) <= set(sequence.bands):
        return []
    seen = _seen(sequence)
    return [(v, s) for v, s in zip(_chosen(sequence, bands), seen, strict=True) if s.any()]


def _chosen(sequence: Stored, bands: Sequence[str]) -> Float[np.ndarray, "t h w c"]:
    return sequence.values[..., [sequence.bands.index(name) for name in bands]].astype(np.float32)


def _seen(sequence: Stored) -> Bool[np.ndarray, "t h w"]:
    """Clear, finite pixels of valid dates."""
    seen = sequence.clear & sequence.valid[:, None, None]
    return seen & np.isfinite(sequence.values).all(-1) if sequence.values.dtype.kind == "f" else seen
