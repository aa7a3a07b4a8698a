"""Spatial blocks: what keeps a probe of pixels honest, since a pixel's neighbour is nearly a copy of it.

A block is a square of a site's label map; a site of one pixel (a field) is one block. Blocks are dealt into folds, each
fold is tested once, and no pixel trains within a gap of a tested block. The bootstrap draws blocks, not pixels.
"""

import dataclasses

import numpy as np
from jaxtyping import Bool, Float, Int

from skyjax.evals.bootstrap import RESAMPLES


@dataclasses.dataclass(frozen=True)
class Pixels:
    """The labelled pixels of all sites.

    Attributes:
      site: number of each pixel's site.
      place: row and column in the site's label map.
      block: number of each pixel's block, over all sites; numbers without a gap.
      label: class number.
    """

    site: Int[np.ndarray, "n"]
    place: Int[np.ndarray, "n 2"]
    block: Int[np.ndarray, "n"]
    label: Int[np.ndarray, "n"]

    @property
    def blocks(self) -> int:
        """How many blocks hold a labelled pixel."""
        return int(self.block.max()) + 1


def labelled_pixels(labels: list[Int[np.ndarray, "h w"]], *, block: int) -> Pixels:
    """All pixels whose label is not negative, site after site, in blocks of `block` pixels a side."""
    site, place, label = [], [], []
    for number, chart in enumerate(labels):
        found = np.argwhere(chart >= 0)
        site.append(np.full(len(found), number))
        place.append(found)
        label.append(chart[tuple(found.T)])
    sites, places = np.concatenate(site), np.concatenate(place)
    _, numbers = np.unique(np.column_stack([sites, places // block]), axis=0, return_inverse=True)
    return Pixels(sites, places, numbers.reshape(-1), np.concatenate(label).astype(int))


def deal(pixels: Pixels, folds: int, seed: int) -> Int[np.ndarray, "blocks"]:
    """The fold of each block. Blocks of one most common class are spread over the folds, in random order."""
    rng = np.random.default_rng(seed)
    classes = int(pixels.label.max()) + 1
    counts = np.zeros((pixels.blocks, classes), int)
    np.add.at(counts, (pixels.block, pixels.label), 1)
    order = rng.permutation(pixels.blocks)
    order = order[np.argsort(counts[order].argmax(1), kind="stable")]
    fold = np.empty(pixels.blocks, int)
    fold[order] = np.arange(pixels.blocks) % folds
    return fold


def near(pixels: Pixels, blocks: Bool[np.ndarray, "blocks"], *, side: int, gap: int) -> Bool[np.ndarray, "n"]:
    """Whether a pixel lies in one of the blocks or fewer than `gap` + 1 pixels beside one, diagonals included.

    Args:
      pixels: of all sites.
      blocks: those meant.
      side: pixels a side of a block.
      gap: pixels that are left free around a block.
    """
    result = np.zeros(len(pixels.site), bool)
    for number in np.unique(pixels.site):
        here = pixels.site == number
        corners = np.unique(pixels.place[here & blocks[pixels.block]] // side, axis=0) * side
        inside = np.zeros(here.sum(), bool)
        for corner in corners:
            low, high = corner - gap, corner + side + gap
            inside |= np.all((pixels.place[here] >= low) & (pixels.place[here] < high), axis=1)
        result[here] = inside
    return result


def confusions(pixels: Pixels, predicted: Int[np.ndarray, "n"], num_classes: int) -> Float[np.ndarray, "blocks k k"]:
    """Truth x said of each block, in pixels."""
    counts = np.zeros((pixels.blocks, num_classes, num_classes))
    np.add.at(counts, (pixels.block, pixels.label, predicted), 1)
    return counts


def redraw(
    counts: Float[np.ndarray, "blocks k k"], *, resamples: int = RESAMPLES, seed: int = 0
) -> Float[np.ndarray, "resamples k k"]:
    """The summed confusion of as many blocks drawn with replacement; one seed draws the same blocks for every table."""
    n = len(counts)
    drawn = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=resamples)
    return np.einsum("rn,nij->rij", drawn.astype(float), counts)


def pixel_accuracy(confusion: Float[np.ndarray, "*r k k"]) -> Float[np.ndarray, "*r"]:
    """Share of pixels that are right."""
    return _ratio(np.trace(confusion, axis1=-2, axis2=-1), confusion.sum((-2, -1)))


def macro_f1(confusion: Float[np.ndarray, "*r k k"]) -> Float[np.ndarray, "*r"]:
    """Mean F1 of the classes that occur."""
    return _mean_of_classes(2 * _diagonal(confusion), confusion.sum(-1) + confusion.sum(-2), confusion)


def mean_iou(confusion: Float[np.ndarray, "*r k k"]) -> Float[np.ndarray, "*r"]:
    """Mean intersection over union of the classes that occur."""
    inside = _diagonal(confusion)
    return _mean_of_classes(inside, confusion.sum(-1) + confusion.sum(-2) - inside, confusion)


METRICS = {
    "pixel accuracy": pixel_accuracy,
    "macro-F1": macro_f1,
    "mean IoU": mean_iou,
}


def _diagonal(confusion: np.ndarray) -> np.ndarray:
    return np.diagonal(confusion, axis1=-2, axis2=-1)


def _mean_of_classes(above: np.ndarray, below: np.ndarray, confusion: np.ndarray) -> np.ndarray:
    """A resampled test set may lack a class; it has then no say."""
    there = confusion.sum(-1) > 0
    return _ratio((_ratio(above, below) * there).sum(-1), there.sum(-1))


def _ratio(above: np.ndarray, below: np.ndarray) -> np.ndarray:
    above, below = np.asarray(above, float), np.asarray(below, float)
    return np.divide(above, below, out=np.zeros_like(above), where=below > 0)
