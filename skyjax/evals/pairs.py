"""Sites at two dates, for probes of change: the first and the last date of each, and features of their difference.

In: records of sites with two or more dates of a modality and a map of labels. Out: `Site`, and `Cells` of differences:
the last date's features minus the first's, and the sizes of that.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
import scipy.ndimage
from jaxtyping import Float, Int

from skyjax.errors import UserError, nearest
from skyjax.evals import segmentation, series
from skyjax.evals.features import Encoder
from skyjax.input.records import RecordSource
from skyjax.sample import Sample
from skyjax.sample import Sequence as Images
from skyjax.sensors import get_sensor

CLASSES = ("unchanged", "changed")
_CELLS = 16  # features a side of a tile at most, and label pixels are as many times more


@dataclasses.dataclass(frozen=True)
class Site:
    """A site with its first and its last date alone, and its map: 1 changed, 0 not, -1 unknown."""

    first: Sample
    last: Sample
    chart: Int[np.ndarray, "h w"]


@dataclasses.dataclass(frozen=True)
class Cells:
    """Features of a site on a grid that may be coarser than its map; a pixel has those of the cell that it lies in."""

    values: Float[np.ndarray, "H W f"]
    shape: tuple[int, int]

    def at(self, place: Int[np.ndarray, "n 2"]) -> Float[np.ndarray, "n f"]:
        """The rows of pixels of the map."""
        row, column = (place[:, i] * self.values.shape[i] // self.shape[i] for i in range(2))
        return self.values[row, column]


def open_pairs(dataset: str, label: str | None) -> list[Site]:
    """The sites of a data set that have a map of changes and two dates of a modality.

    Raises:
      UserError: there is no such data set, label or site, or nothing changed anywhere.
    """
    source = RecordSource(dataset)
    every = [source[i] for i in range(len(source))]
    names = sorted({name for sample in every for name, value in sample.labels.items() if np.ndim(value) == 2})
    label = label or (names[0] if len(names) == 1 else None)
    if label not in names:
        asked = f'no map of labels "{label}"{nearest(label, names)}' if label else "several maps of labels"
        if not names:
            raise UserError(f'"{dataset}" has no map of labels; --task=change needs one')
        raise UserError(f'"{dataset}" has {asked}; it has {", ".join(names)}; choose one by --label=NAME')
    sites = [site for sample in every if (site := site_of(sample, label))]
    if not sites:
        raise UserError(f'"{dataset}" has no site with a map "{label}" and two dates of one modality')
    seen = np.unique(np.concatenate([site.chart[site.chart >= 0] for site in sites]))
    if len(seen) < len(CLASSES):
        raise UserError(f'"{dataset}": every pixel of "{label}" is {CLASSES[seen[0]]}; a probe needs both')
    return sites


def site_of(sample: Sample, label: str) -> Site | None:
    """A sample as a site; None where it lacks the map, a second date, or a pixel that is known at both."""
    pairs = {m: pair for m, s in sample.sequences.items() if (pair := _first_and_last(s))}
    if label not in sample.labels or not pairs:
        return None
    chart = np.asarray(sample.labels[label]).astype(int).clip(-1, 1)
    for pair in pairs.values():
        if pair[0].clear.shape[1:] == chart.shape:  # where a date shows nothing, nothing can be said
            chart = np.where(pair[0].clear[0] & pair[1].clear[0], chart, -1)
    first, last = (dataclasses.replace(sample, sequences={m: pair[i] for m, pair in pairs.items()}) for i in range(2))
    return Site(first, last, chart) if (chart >= 0).any() else None


def _first_and_last(sequence: Images) -> tuple[Images, Images] | None:
    dates = np.flatnonzero(sequence.valid)
    if len(dates) < 2:
        return None
    first, last = (
        dataclasses.replace(
            sequence,
            **{name: getattr(sequence, name)[i : i + 1] for name in ("values", "days", "valid", "clear")},
        )
        for i in (dates[0], dates[-1])
    )
    return first, last


def encoded(model: Encoder, sites: Sequence[Site], *, kind: str, block: int) -> list[Cells]:
    """Differences of the model's features, from tiles of the size of its training views.

    Args:
      model: as `skyjax.load` returns it.
      sites: with images that it encodes.
      kind: "fused", or a modality.
      block: pixels a side of a block of the label map, which a tile does not cross.
    """
    size = segmentation.view_size(model, [site.first for site in sites])
    maps = []
    for which in ("first", "last"):
        samples = [getattr(site, which) for site in sites]
        # The model's cells are coarser than pixels: a map of cells is made, not one of pixels.
        every = max(1, max(size.values()) // _CELLS)
        grids = [np.zeros([-(-side // every) for side in site.chart.shape], int) for site in sites]
        found = list(series.tiles(samples, grids, block=max(1, block // every), size=size))
        shapes = [(grid.shape[0], grid.shape[1]) for grid in grids]
        maps.append(series.model_features(model, found, shapes, kind=kind))
    return [_difference(first, last, site) for first, last, site in zip(maps[0], maps[1], sites, strict=True)]


def values(site: Site, side: int) -> Cells:
    """Differences of each band, in units of the sensor's spread, of means over `side` x `side` pixels.

    Each modality is brought to the map by repeating its pixels.
    """
    dates = []
    for sample in (site.first, site.last):
        bands = []
        for sequence in sample.sequences.values():
            sensor = get_sensor(sequence.sensor)
            std = np.array([sensor.bands[sensor.index(band)].std for band in sequence.bands], np.float32)
            pixels = np.nan_to_num(sequence.values[0].astype(np.float32)) / std
            if side > 1:
                pixels = scipy.ndimage.uniform_filter(pixels, (side, side, 0), mode="nearest")
            place = np.argwhere(np.ones(site.chart.shape, bool))
            bands.append(Cells(pixels, site.chart.shape).at(place).reshape(*site.chart.shape, -1))
        dates.append(np.concatenate(bands, axis=-1))
    return _difference(dates[0], dates[1], site)


def _difference(first: np.ndarray, last: np.ndarray, site: Site) -> Cells:
    change = last - first
    return Cells(np.concatenate([change, np.abs(change)], axis=-1, dtype=np.float32), site.chart.shape)
