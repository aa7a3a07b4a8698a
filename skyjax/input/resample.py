"""Cuts a window out of images: a plain slice where the pixels agree, an antialiased and mask-weighted resampling else.

In: images of some dates with their clear masks, a window in pixels of theirs that may start and end between pixels.
Out: the window at the asked size in the stored type, and which of its pixels are clear. A sample is cut some twenty
times a step, so the two axes are resampled one after the other, by matrices that are built once for a window.
"""

import dataclasses

import numpy as np
import scipy.sparse
from jaxtyping import Bool, Float, Int

# A window closer than this to whole pixels is meant to lie on them: extents are float32 metres.
_WHOLE = 1e-3


@dataclasses.dataclass(frozen=True)
class Axis:
    """One axis of a window, in pixels of the source: where it starts, its length, and how many pixels it becomes."""

    start: float
    length: float
    size: int

    @property
    def is_slice(self) -> bool:
        """Whether each wanted pixel is one pixel of the source."""
        return abs(self.start - round(self.start)) < _WHOLE and abs(self.length - self.size) < _WHOLE

    def weights(self, source: int) -> tuple[slice, Float[np.ndarray, "size n"]]:
        """The pixels of a source of that length that the window needs, and each wanted pixel's share of them.

        A triangle centred on the wanted pixel, one source pixel wide to each side when enlarging (linear
        interpolation) and one wanted pixel wide when shrinking (antialias). At the source's border what is left of
        the triangle is renormalised, which repeats the border pixel when enlarging. Pixels beyond the window but
        inside the source take part: they were measured.
        """
        scale = self.length / self.size
        radius = max(scale, 1.0)
        centres = self.start + (np.arange(self.size) + 0.5) * scale
        first = max(int(np.ceil(centres[0] - radius - 0.5)), 0)
        last = min(int(np.floor(centres[-1] + radius - 0.5)), source - 1)
        distance = np.abs(np.arange(first, last + 1) + 0.5 - centres[:, None])
        weights = np.maximum(1 - distance / radius, 0)
        weights /= weights.sum(axis=1, keepdims=True)
        return slice(first, last + 1), weights.astype(np.float32)


def cut(
    values: np.ndarray,  # (t, h, w, c) as stored
    clear: Bool[np.ndarray, "t h w"],
    dates: Int[np.ndarray, "n"],
    rows: Axis,
    columns: Axis,
) -> tuple[np.ndarray, Bool[np.ndarray, "n rows columns"]]:
    """The window of the chosen dates, (n, rows, columns, c) in the stored type, and its clear pixels.

    Only the window's pixels of the chosen dates are read. A slice is returned bit for bit; what is resampled is the
    mean of clear, finite pixels by their weights, rounded to the stored type. A wanted pixel is clear when at least
    half of its weight is; values where it is not clear carry no meaning and may be NaN in a slice.
    """
    if rows.is_slice and columns.is_slice:
        window = (dates, _run(rows, values.shape[1]), _run(columns, values.shape[2]))
        return values[window], clear[window] & _finite(values[window])

    row_pixels, row_weights = rows.weights(values.shape[1])
    column_pixels, column_weights = columns.weights(values.shape[2])
    part = values[dates, row_pixels, column_pixels]
    usable = clear[dates, row_pixels, column_pixels] & _finite(part)
    pixels = part.astype(np.float32)
    if usable.all():
        mean = _apply(row_weights, column_weights, pixels)
        return _as_stored(mean, values.dtype), np.ones(mean.shape[:3], bool)

    pixels[~usable] = 0
    weight = _apply(row_weights, column_weights, usable[..., None].astype(np.float32))
    mean = _apply(row_weights, column_weights, pixels) / np.maximum(weight, 1e-6)
    # Half the weight up to rounding: the middle of four pixels, two of them clear, is clear on every machine.
    return _as_stored(mean, values.dtype), weight[..., 0] >= 0.5 - 1e-5


def _run(axis: Axis, source: int) -> slice:
    start = min(max(round(axis.start), 0), source - axis.size)
    return slice(start, start + axis.size)


def _finite(values: np.ndarray) -> Bool[np.ndarray, "n h w"] | np.bool_:
    """A pixel with a NaN in any of its bands was not measured."""
    return np.isfinite(values).all(axis=-1) if values.dtype.kind == "f" else np.True_


def _apply(
    row_weights: Float[np.ndarray, "rows h"],
    column_weights: Float[np.ndarray, "columns w"],
    pixels: Float[np.ndarray, "n h w c"],
) -> Float[np.ndarray, "n rows columns c"]:
    """Both axes, each as one matrix product over all else."""
    n, h, w, c = pixels.shape
    by_row = _product(row_weights, pixels.transpose(1, 0, 2, 3).reshape(h, -1)).reshape(-1, n, w, c)
    by_column = _product(column_weights, by_row.transpose(2, 1, 0, 3).reshape(w, -1))
    return by_column.reshape(-1, n, len(row_weights), c).transpose(1, 2, 0, 3)


def _product(weights: Float[np.ndarray, "size n"], pixels: Float[np.ndarray, "n k"]) -> Float[np.ndarray, "size k"]:
    """`weights @ pixels` in the calling thread alone.

    Weights are a narrow band, of which BLAS would do eight times the work. For a large product, though not for a small
    one, it also starts threads of its own, which wait for each other on a busy host: 10 times slower, measured.
    """
    if weights.size * pixels.shape[1] < 2**17:
        return np.matmul(weights, pixels)
    return scipy.sparse.csr_array(weights) @ pixels


def _as_stored(mean: Float[np.ndarray, "n h w c"], dtype: np.dtype) -> np.ndarray:
    if dtype.kind == "f":
        return mean.astype(dtype)
    # A mean of stored integers lies in their range, so that rounding cannot overflow.
    return np.rint(mean).astype(dtype)
