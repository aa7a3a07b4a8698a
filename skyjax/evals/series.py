"""Features of every pixel of a site: a model's fused map, and the raw series that it has to beat.

A site is encoded in tiles of the size of the training views, each inside one block, so that no pixel's feature has seen
another block through the spatial encoder. Every valid date takes part, in the model's features and in the raw series.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int32

from skyjax.errors import UserError
from skyjax.evals.features import FUSED, Encoder
from skyjax.evals.progress import track
from skyjax.input.resample import Axis, cut
from skyjax.input.views import band_positions, shared_ground, window
from skyjax.sample import Sample
from skyjax.sample import Sequence as Stored
from skyjax.sensors import get_sensor

CONTEXT = "context"
BATCH_SIZE = 16  # tiles
STEP = 10  # days between the times that a raw series is interpolated at


@dataclasses.dataclass(frozen=True)
class Tile:
    """A square of a site's label map: its site's number, first row and column, rows and columns; and its images."""

    site: int
    top: int
    left: int
    height: int
    width: int
    sample: Sample


def tiles(
    samples: Sequence[Sample],
    labels: Sequence[np.ndarray],
    *,
    block: int,
    size: Mapping[str, int],
    shuffle: str | None = None,
    seed: int = 0,
) -> Iterator[Tile]:
    """The tiles that hold a labelled pixel.

    Args:
      samples: sites. Their label maps cover the ground that their sequences share.
      labels: a map (h, w) a site, negative where there is no label.
      block: pixels of a label map that a tile may not cross.
      size: modality -> pixels a side of a training view; other modalities are left out.
      shuffle: "tile" or "site": the dates of each modality change places, in an order drawn for each tile or site.
      seed: of these orders.
    """
    for number, (sample, chart) in enumerate(zip(samples, labels, strict=True)):
        kept = {m: s for m, s in sample.sequences.items() if m in size and s.valid.any()}
        ground = shared_ground(sample, kept)
        side = _tile_side(kept, chart.shape, block, size, ground)
        for top in range(0, chart.shape[0], side):
            for left in range(0, chart.shape[1], side):
                height, width = min(side, chart.shape[0] - top), min(side, chart.shape[1] - left)
                if not (chart[top : top + height, left : left + width] >= 0).any():
                    continue
                rows = top / chart.shape[0], (top + height) / chart.shape[0]
                columns = left / chart.shape[1], (left + width) / chart.shape[1]
                sequences = {m: _excerpt(s, ground, rows, columns, size[m]) for m, s in kept.items()}
                if shuffle:
                    rng = np.random.default_rng((seed, number, *((top, left) if shuffle == "tile" else ())))
                    sequences = {m: shuffle_dates(s, rng) for m, s in sequences.items()}
                yield Tile(number, top, left, height, width, dataclasses.replace(sample, sequences=sequences))


def shuffle_dates(sequence: Stored, rng: np.random.Generator) -> Stored:
    """The same images and the same days, but the valid images stand on each other's days."""
    order = np.arange(len(sequence.days))
    valid = np.flatnonzero(sequence.valid)
    order[valid] = rng.permutation(valid)
    return dataclasses.replace(sequence, values=sequence.values[order], clear=sequence.clear[order])


def _tile_side(
    kept: Mapping[str, Stored], shape: tuple[int, ...], block: int, size: Mapping[str, int], ground: np.ndarray
) -> int:
    """Label pixels a side: those of a training view at its own scale where they divide a block, else the block."""
    leading = next((m for m in ("multispectral", "optical", "sar") if m in kept), None)
    if leading is None:
        return block
    _, length = window(kept[leading], ground, 0.0, 1.0, 0)
    side = max(1, round(size[leading] * shape[0] / length))
    return side if side < block and block % side == 0 else block


def _excerpt(
    sequence: Stored,
    ground: Float[np.ndarray, "4"],
    rows: tuple[float, float],
    columns: tuple[float, float],
    size: int,
) -> Stored:
    dates = np.flatnonzero(sequence.valid)
    cuts = [Axis(*window(sequence, ground, *share, axis), size) for axis, share in enumerate((rows, columns))]
    values, clear = cut(sequence.values, sequence.clear, dates, *cuts)
    top, left, bottom, right = ground
    extent = [
        top + rows[0] * (bottom - top),
        left + columns[0] * (right - left),
        top + rows[1] * (bottom - top),
        left + columns[1] * (right - left),
    ]
    return dataclasses.replace(
        sequence,
        values=values,
        clear=clear,
        days=sequence.days[dates],
        valid=np.ones(len(dates), bool),
        extent=np.array(extent, np.float32),
    )


def model_features(
    model: Encoder, found: Sequence[Tile], shapes: Sequence[tuple[int, int]], *, kind: str = FUSED
) -> list[Float[np.ndarray, "h w d"]]:
    """A map of features a site, 0 outside the tiles; cells coarser than the label map are repeated.

    Args:
      model: as `skyjax.load` returns it.
      found: of `tiles`.
      shapes: of the label maps.
      kind: "fused", "context" or a modality, whose spatial features are averaged over valid dates.
    """
    maps: list[np.ndarray | None] = [None] * len(shapes)
    batches = list(_batches(found))
    for batch in track(batches, len(batches), "features of tiles"):
        whole = [tile.sample for tile in batch] + [batch[-1].sample] * (BATCH_SIZE - len(batch))
        features = _select(model.encode(whole), kind)
        for tile, cells in zip(batch, features, strict=False):
            rows = np.arange(tile.height) * cells.shape[0] // tile.height
            columns = np.arange(tile.width) * cells.shape[1] // tile.width
            chart = maps[tile.site]
            if chart is None:
                chart = maps[tile.site] = np.zeros((*shapes[tile.site], cells.shape[-1]), np.float32)
            chart[tile.top : tile.top + tile.height, tile.left : tile.left + tile.width] = cells[rows][:, columns]
    width = next(chart.shape[-1] for chart in maps if chart is not None)
    return [
        np.zeros((*shape, width), np.float32) if chart is None else chart
        for chart, shape in zip(maps, shapes, strict=True)
    ]


def _batches(found: Sequence[Tile]) -> Iterator[list[Tile]]:
    """Tiles of one shape, dates included, so that few shapes are compiled."""
    by_shape: dict[Any, list[Tile]] = {}
    for tile in found:
        key = tuple((m, s.values.shape, s.values.dtype.name) for m, s in sorted(tile.sample.sequences.items()))
        by_shape.setdefault(key, []).append(tile)
    for group in by_shape.values():
        for start in range(0, len(group), BATCH_SIZE):
            yield group[start : start + BATCH_SIZE]


def _select(output: Mapping[str, Any], kind: str) -> Float[np.ndarray, "b h w d"]:
    if kind == FUSED:
        return np.asarray(output["fused"], np.float32)
    if kind == CONTEXT:
        if output["context"] is None:
            raise UserError("--modality=context: this checkpoint has no geo-context; take fused")
        return np.asarray(output["context"], np.float32)
    if kind not in output["spatial"]:
        raise UserError(f"--modality={kind}: the data set has no {kind} images; it has {', '.join(output['spatial'])}")
    features = np.asarray(output["spatial"][kind], np.float32)
    valid = np.asarray(output["spatial_valid"][kind], np.float32)
    return np.einsum("bthwd,bthw->bhwd", features, valid) / np.maximum(valid.sum(1), 1)[..., None]


# Raw series


def raw_series(
    samples: Sequence[Sample], shapes: Sequence[tuple[int, int]], bands: Mapping[str, Sequence[str]]
) -> list[Float[np.ndarray, "h w f"]]:
    """The values themselves: each band interpolated linearly in time every STEP days, and where there was a clear one.

    Times count from 1 January of a site's first year, so that the seasons of all sites stand together; beyond a series'
    ends its end stays. Values are in units of the sensor's spread around its mean; a band that a site lacks is 0.

    Args:
      samples: sites.
      shapes: of their label maps, whose ground is the one that the sequences share.
      bands: modality -> the bands used, those that the model sees.
    """
    starts = [_first_of_january(sample) for sample in samples]
    ends = [
        [s.days[s.valid].astype(int) - start for s in sample.sequences.values() if s.valid.any()]
        for sample, start in zip(samples, starts, strict=True)
    ]
    every = np.concatenate([days for site in ends for days in site])
    times = np.arange(every.min(), every.max() + STEP, STEP)
    return [
        np.concatenate([_interpolated(sample, m, names, shape, times + start) for m, names in bands.items()], axis=-1)
        for sample, shape, start in zip(samples, shapes, starts, strict=True)
    ]


def raw_means(
    samples: Sequence[Sample], shapes: Sequence[tuple[int, int]], bands: Mapping[str, Sequence[str]]
) -> list[Float[np.ndarray, "h w f"]]:
    """The mean of each band over clear dates: the raw series without time."""
    return [
        np.concatenate([_mean(sample, m, names, shape) for m, names in bands.items()], axis=-1)
        for sample, shape in zip(samples, shapes, strict=True)
    ]


def _first_of_january(sample: Sample) -> int:
    first = min(int(s.days[s.valid][0]) for s in sample.sequences.values() if s.valid.any())
    return int(np.datetime64(first, "D").astype("datetime64[Y]").astype("datetime64[D]").astype(int))


def _at_pixels(
    sample: Sample, modality: str, names: Sequence[str], shape: tuple[int, int]
) -> tuple[Float[np.ndarray, "t n c"], Bool[np.ndarray, "t n"], Int32[np.ndarray, "t"]]:
    """Values, clear and days of the image pixel under the middle of each pixel of the label map."""
    sequence = sample.sequences.get(modality)
    n = shape[0] * shape[1]
    if sequence is None or not sequence.valid.any():
        return np.zeros((0, n, len(names)), np.float32), np.zeros((0, n), bool), np.zeros(0, np.int32)
    ground = shared_ground(sample, {m: s for m, s in sample.sequences.items() if s.valid.any()})
    index = []
    for axis in range(2):
        start, length = window(sequence, ground, 0.0, 1.0, axis)
        index.append(np.floor(start + (np.arange(shape[axis]) + 0.5) * length / shape[axis]).astype(int))
    dates = np.flatnonzero(sequence.valid)
    where = np.ix_(dates, *index)
    sensor = get_sensor(sequence.sensor)
    values = np.zeros((len(dates), *shape, len(names)), np.float32)
    for slot, source in zip(*band_positions(sequence.sensor, sequence.bands, tuple(names)), strict=True):
        band = sensor.bands[sensor.index(names[slot])]
        values[..., slot] = (sequence.values[..., source][where] - band.mean) / band.std
    clear = sequence.clear[where] & np.isfinite(values).all(-1)
    return values.reshape(len(dates), n, -1), clear.reshape(len(dates), n), sequence.days[dates]


def _interpolated(
    sample: Sample, modality: str, names: Sequence[str], shape: tuple[int, int], times: np.ndarray
) -> Float[np.ndarray, "h w f"]:
    values, clear, days = _at_pixels(sample, modality, names, shape)
    result = np.zeros((clear.shape[1], len(times), len(names) + 1), np.float32)
    for i in range(clear.shape[1]):
        seen = clear[:, i]
        if not seen.any():
            continue
        known, there = values[seen, i], days[seen]
        for c in range(len(names)):
            result[i, :, c] = np.interp(times, there, known[:, c])
        result[i, :, -1] = np.abs(times[:, None] - there).min(1) <= STEP / 2
    return result.reshape(*shape, -1)


def _mean(sample: Sample, modality: str, names: Sequence[str], shape: tuple[int, int]) -> Float[np.ndarray, "h w c"]:
    values, clear, _ = _at_pixels(sample, modality, names, shape)
    total = np.where(clear[..., None], values, 0).sum(0)
    return (total / np.maximum(clear.sum(0), 1)[:, None]).reshape(*shape, -1).astype(np.float32)
