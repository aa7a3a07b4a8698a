"""Pictures of a run for its report: samples as the model gets them, and what its spatial features look like.

Features of width d become colours by their first three principal components, fitted over all the places that are shown
for one modality, so that one colour means the same at every site. Images come from input/contact_sheet.py `picture`.
"""

import base64
import dataclasses
import io
import math
from collections.abc import Callable, Iterable, Mapping
from collections.abc import Sequence as ListOf
from typing import Any

import matplotlib
import numpy as np
import PIL.Image
from jaxtyping import Bool, Float, Int, UInt8

from skyjax.errors import UserError
from skyjax.input import contact_sheet, records
from skyjax.sample import MODALITIES, Sample, Sequence

MASKED = np.array([150, 150, 150], np.uint8)
SCANNED = 48  # records of a data set that are read to find samples of each source
COMPONENTS = 3
FUSED_DATES = 4  # of each modality
FEW_PIXELS = 16  # a side; smaller sites make poor pictures
REFUSED = 8  # sites that the model may refuse before a picture is given up

Image = UInt8[np.ndarray, "h w 3"]
Encode = Callable[[Sample], Mapping[str, Any]]


@dataclasses.dataclass(frozen=True)
class Components:
    """Principal components of a set of feature vectors, and the range of each that becomes a colour channel.

    Attributes:
      mean: of the features.
      axes: unit vectors, by falling variance; each points so that its largest entry is positive.
      shares: of the whole variance.
      low, high: the 2nd and 98th percentile of the features along each axis: black and full colour.
    """

    mean: Float[np.ndarray, "d"]
    axes: Float[np.ndarray, "3 d"]
    shares: Float[np.ndarray, "3"]
    low: Float[np.ndarray, "3"]
    high: Float[np.ndarray, "3"]

    def colours(self, features: Float[np.ndarray, "h w d"], valid: Bool[np.ndarray, "h w"]) -> Image:
        """Features as red, green and blue; grey where masked."""
        along = (features.astype(np.float64) - self.mean) @ self.axes.T
        extent = self.high - self.low
        # An axis without variance says nothing: the middle, not noise blown up to full colour.
        level = np.where(extent > 1e-9, (along - self.low) / np.where(extent > 1e-9, extent, 1), 0.5)
        return np.where(valid[..., None], np.rint(255 * np.clip(level, 0, 1)).astype(np.uint8), MASKED)


def principal_components(features: Float[np.ndarray, "n d"]) -> Components:
    """The first three principal components of at least one feature vector; axes that don't exist are zero."""
    mean = features.mean(0, dtype=np.float64)
    centred = features - mean
    _, singular, axes = np.linalg.svd(centred, full_matrices=False)
    count = min(COMPONENTS, len(axes))
    first = np.zeros((COMPONENTS, features.shape[1]))
    largest = np.abs(axes[:count]).argmax(1)
    first[:count] = axes[:count] * np.sign(axes[np.arange(count), largest])[:, None]
    shares = np.zeros(COMPONENTS)
    shares[:count] = singular[:count] ** 2 / max(float((singular**2).sum()), np.finfo(np.float64).tiny)
    low, high = np.percentile(centred @ first.T, (2, 98), axis=0)
    return Components(mean, first, shares, low, high)


@dataclasses.dataclass(frozen=True)
class SitePicture:
    """One site: (modality, day, image) of each sequence that is shown, and its features in colour on their grid."""

    name: str
    images: tuple[tuple[str, str, Image], ...]
    features: Image
    grid: tuple[int, int]


@dataclasses.dataclass(frozen=True)
class FeaturePictures:
    """Sites of one modality, or of the fused features, in the colours of one set of components."""

    title: str
    sites: tuple[SitePicture, ...]
    shares: tuple[float, ...]


def samples_by_source(folders: Iterable[str]) -> dict[str, list[Sample]]:
    """Samples from all over each data set, by the collection that they come from; unreadable records are passed over.

    Raises:
      UserError: a folder is no data set.
    """
    found: dict[str, list[Sample]] = {}
    for folder in folders:
        source = records.RecordSource(folder)
        for index in np.unique(np.linspace(0, len(source) - 1, min(SCANNED, len(source))).astype(int)).tolist():
            try:
                sample = source[index]
            except UserError:
                continue  # counted and named by the training that met it
            found.setdefault(sample.source or str(folder), []).append(sample)
    return found


def credits(folders: Iterable[str]) -> list[str]:
    """Title, licence and attribution of each data set that tells them: a report that shows images passes them on."""
    found = []
    for folder in folders:
        about = records.RecordSource(folder).description
        found.append(". ".join(str(about[word]) for word in ("title", "licence", "attribution") if about.get(word)))
    return [words for words in dict.fromkeys(found) if words]


def feature_pictures(
    encode: Encode, samples: Mapping[str, ListOf[Sample]], *, sites: int = 3, side: int = 320
) -> list[FeaturePictures]:
    """For each modality and the fused features: a few sites, their images beside their features in colour.

    A modality is encoded alone, at its clearest date, so that its features lie on its own grid and each shape of image
    is compiled for once. Fused features are those of all modalities, at most FUSED_DATES dates each.

    Args:
      encode: `Pretrained.encode`: a sample to its outputs with a leading axis of 1.
      samples: source -> samples to choose from; those that the model refuses are passed over.
      sites: at most, for each modality, from as many sources as there are.
      side: about how many pixels wide each picture is.
    """
    mixed = _one_source_after_the_other(samples)
    groups = []
    for modality in MODALITIES:
        excerpts = [_excerpt(sample, (modality,), dates=1) for sample in _clear_first(mixed, modality)]
        groups.append(_group(modality, encode, excerpts, sites, side))
    excerpts = [_excerpt(sample, MODALITIES, dates=FUSED_DATES) for sample in _most_to_fuse_first(mixed)]
    groups.append(_group("fused", encode, excerpts, sites, side))
    return [group for group in groups if group is not None]


@dataclasses.dataclass(frozen=True)
class DatePicture:
    """One date of a sequence as it is shown: its day, its image with unclear parts hatched, the share that is clear."""

    day: str
    image: Image
    clear: float


def date_pictures(sequence: Sequence, *, dates: int = 8, side: int = 176) -> list[DatePicture]:
    """Dates from all over a sequence, in order; a date that is not there is left out."""
    there = np.flatnonzero(sequence.valid)
    if not len(there):
        return []
    limits = _limits(sequence)
    shown = there[np.unique(np.linspace(0, len(there) - 1, min(dates, len(there))).round().astype(int))]
    return [
        DatePicture(
            _day(sequence.days[date]),
            contact_sheet.hatch(
                fit(contact_sheet.picture(sequence, date, limits), side), fit(sequence.clear[date], side)
            ),
            float(sequence.clear[date].mean()),
        )
        for date in shown.tolist()
    ]


def portrait(sample: Sample, modality: str, *, side: int = 164) -> Image:
    """A sample's clearest date, on the ground that its features cover; of another modality where it lacks this one."""
    there = [m for m in (modality, *MODALITIES) if m in sample.sequences and sample.sequences[m].valid.any()]
    sequence = sample.sequences[there[0]]
    (date,) = _clearest(sequence, 1).tolist()
    return fit(_on_site(contact_sheet.picture(sequence, date), sequence, sample), side)


def _limits(sequence: Sequence) -> np.ndarray:
    """What is black and what is full colour on all dates alike.

    Of the dates' own limits the median and the 75th percentile, not the extremes: one missed cloud, bright as it is,
    would darken a year of forest.
    """
    share = np.where(sequence.valid, sequence.clear.mean((1, 2)), 0.0)
    dates = np.flatnonzero(share >= min(0.5, share.max()))
    # Some dozens tell as much as all, and there may be hundreds.
    dates = dates[np.unique(np.linspace(0, len(dates) - 1, min(len(dates), 24)).astype(int))]
    low, high = np.moveaxis(np.stack([contact_sheet.stretch(sequence, date) for date in dates.tolist()]), -1, 0)
    return np.stack([np.median(low, 0), np.percentile(high, 75, 0)], -1)


def class_colours(count: int) -> UInt8[np.ndarray, "k 3"]:
    """A colour a class; twenty differ."""
    table = matplotlib.colormaps["tab20"](np.arange(20))[:, :3]
    # The table has pairs of one hue: first every hue, then their pale twins.
    order = np.concatenate([np.arange(0, 20, 2), np.arange(1, 20, 2)])
    return np.rint(255 * table[order[np.arange(count) % 20]]).astype(np.uint8)


def label_picture(chart: Int[np.ndarray, "h w"], colours: UInt8[np.ndarray, "k 3"]) -> Image:
    """A map of class numbers in their colours; grey where there is no label."""
    grey = np.full((1, 3), 225, np.uint8)
    return np.concatenate([colours, grey])[np.where(chart < 0, len(colours), chart)]


def fit(image: np.ndarray, side: int, *, grid: bool = False) -> np.ndarray:
    """An image or a mask at about `side` pixels: small ones by whole factors, each pixel a square; large ones reduced.

    With `grid`, squares of 8 pixels and more are set apart by a line.
    """
    height, width = image.shape[:2]
    longest = max(height, width)
    if longest > side:
        rows, columns = max(1, round(height * side / longest)), max(1, round(width * side / longest))
        how = PIL.Image.Resampling.LANCZOS if image.ndim == 3 else PIL.Image.Resampling.NEAREST
        return np.asarray(PIL.Image.fromarray(image).resize((columns, rows), how))
    factor = math.ceil(side / longest)
    large = image.repeat(factor, 0).repeat(factor, 1)
    if grid and factor >= 8:
        large[factor - 1 : -1 : factor] = large[factor - 1 : -1 : factor] // 4 * 3
        large[:, factor - 1 : -1 : factor] = large[:, factor - 1 : -1 : factor] // 4 * 3
    return large


def data_uri(image: Image) -> str:
    """An image as the address of itself: PNG, or JPEG where that is shorter, as it is for photographs."""
    written = {}
    for kind, options in (("png", {}), ("jpeg", {"quality": 88, "subsampling": 0})):
        buffer = io.BytesIO()
        PIL.Image.fromarray(image).save(buffer, kind, **options)
        written[kind] = buffer.getvalue()
    kind = min(written, key=lambda kind: len(written[kind]))
    return f"data:image/{kind};base64,{base64.b64encode(written[kind]).decode()}"


def _one_source_after_the_other(samples: Mapping[str, ListOf[Sample]]) -> list[Sample]:
    longest = max(map(len, samples.values()), default=0)
    return [found[index] for index in range(longest) for found in samples.values() if index < len(found)]


def _clear_first(samples: ListOf[Sample], modality: str) -> list[Sample]:
    """Those that have the modality: first those that show something, by a date without clouds and enough pixels."""

    def hidden(sample: Sample) -> bool:
        sequence = sample.sequences[modality]
        return bool(_clear_shares(sequence).max() < 0.95) or min(sequence.values.shape[1:3]) < FEW_PIXELS

    return sorted((s for s in samples if modality in s.sequences and s.sequences[modality].valid.any()), key=hidden)


def _most_to_fuse_first(samples: ListOf[Sample]) -> list[Sample]:
    """The sample with most modalities and dates, then the others, those of several modalities and many pixels first."""

    def amount(sample: Sample) -> tuple[int, int]:
        dates = [min(int(sequence.valid.sum()), FUSED_DATES) for sequence in sample.sequences.values()]
        return sum(count > 0 for count in dates), sum(dates)

    def plain(sample: Sample) -> tuple[bool, bool]:
        coarsest = min((min(s.values.shape[1:3]) for s in sample.sequences.values()), default=0)
        return amount(sample)[0] < 2, coarsest < FEW_PIXELS

    most = sorted(samples, key=amount, reverse=True)
    return most[:1] + sorted((sample for sample in samples if sample is not most[0]), key=plain)


def _clear_shares(sequence: Sequence) -> Float[np.ndarray, "t"]:
    """The share of clear pixels of each date; -1 where there is no date."""
    return np.where(sequence.valid, sequence.clear.mean((1, 2)), -1.0)


def _clearest(sequence: Sequence, count: int) -> np.ndarray:
    """At most `count` dates, in order: spread over those that are as clear as any, else the clearest."""
    shares = _clear_shares(sequence)
    alike = np.flatnonzero(shares >= shares.max() - 0.02)
    if len(alike) >= count:
        return alike[((np.arange(count) + 0.5) * len(alike) / count).astype(int)]
    return np.sort(np.argsort(-shares, kind="stable")[: min(count, int(sequence.valid.sum()))])


def _excerpt(sample: Sample, modalities: Iterable[str], *, dates: int) -> Sample:
    """The sample with some modalities, and of each the clearest dates."""
    sequences = {}
    for modality in modalities:
        sequence = sample.sequences.get(modality)
        if sequence is not None and sequence.valid.any():
            best = _clearest(sequence, dates)
            parts = {name: getattr(sequence, name)[best] for name in ("values", "days", "valid", "clear")}
            sequences[modality] = dataclasses.replace(sequence, **parts)
    return dataclasses.replace(sample, sequences=sequences)


def _group(title: str, encode: Encode, samples: ListOf[Sample], sites: int, side: int) -> FeaturePictures | None:
    """The first of the samples that the model can encode, in the colours of components that they share."""
    found = []
    for sample in samples[: sites + REFUSED]:
        try:
            output = encode(sample)
        except UserError:
            continue  # such as a sensor that the model does not name; other sites are still worth a look
        features, valid = (
            (output["fused"][0], output["fused_valid"][0])
            if title == "fused"
            else (output["spatial"][title][0, 0], output["spatial_valid"][title][0, 0])
        )
        if valid.any():
            found.append((sample, np.asarray(features, np.float64), np.asarray(valid)))
        if len(found) == sites:
            break
    if not found:
        return None
    components = principal_components(np.concatenate([features[valid] for _, features, valid in found]))
    pictures = tuple(
        SitePicture(
            f"{sample.source} {sample.id}".strip(),
            tuple(_image(modality, sequence, sample, side) for modality, sequence in sample.sequences.items()),
            fit(components.colours(features, valid), side, grid=True),
            features.shape[:2],
        )
        for sample, features, valid in found
    )
    return FeaturePictures(title, pictures, tuple(components.shares.tolist()))


def _image(modality: str, sequence: Sequence, sample: Sample, side: int) -> tuple[str, str, Image]:
    """Modality, day and picture of a sequence's clearest date."""
    (date,) = _clearest(sequence, 1).tolist()
    image = fit(_on_site(contact_sheet.picture(sequence, date), sequence, sample), side)
    clear = fit(_on_site(sequence.clear[date], sequence, sample), side)
    return modality, _day(sequence.days[date]), contact_sheet.hatch(image, clear)


def _on_site(image: np.ndarray, sequence: Sequence, sample: Sample) -> np.ndarray:
    """The part of an image that lies on the ground that all sequences of the sample share: what the features cover."""
    extents = np.stack([other.extent for other in sample.sequences.values()])
    top, bottom = extents[:, 0].min(), extents[:, 2].max()
    left, right = extents[:, 1].max(), extents[:, 3].min()
    height, width = image.shape[:2]
    high, west, low, east = sequence.extent
    rows = np.rint((high - np.array([top, bottom])) / (high - low) * height).astype(int)
    columns = np.rint((np.array([left, right]) - west) / (east - west) * width).astype(int)
    cut = image[rows[0] : max(rows[1], rows[0] + 1), columns[0] : max(columns[1], columns[0] + 1)]
    return cut if cut.size else image


def _day(days: int) -> str:
    if days == 0:  # docs/records.md
        return "date unknown"
    return str(np.datetime64(0, "D") + np.timedelta64(int(days), "D"))
