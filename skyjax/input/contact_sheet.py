"""Pictures of samples: one date as RGB, and a contact sheet with all dates of all modalities of each site."""

import dataclasses
import functools
import os
import pathlib
from collections.abc import Iterable

import matplotlib
import numpy as np
import PIL.Image
import PIL.ImageDraw
import PIL.ImageFont
from jaxtyping import Bool, Float, UInt8

from skyjax.errors import UserError
from skyjax.sample import MODALITIES, Sample, Sequence
from skyjax.sensors import get_sensor

Limits = Float[np.ndarray, "3 2"]

# Bands by common name, in the order in which a combination is looked for.
_TRUE_COLOUR = ("red", "green", "blue")
_FALSE_COLOURS = (("swir16", "nir08", "rededge071"), ("swir16", "nir", "red"), ("nir", "red", "green"))

_WIDTH, _MARGIN, _GUTTER, _GAP = 1480, 32, 24, 6
_INNER = _WIDTH - 2 * _MARGIN
_THIRD = (_INNER - 2 * _GUTTER) // 3
_INK, _FAINT, _PAPER, _RULE = (28, 34, 40), (112, 122, 132), (255, 255, 255), (222, 226, 230)
UNCLEAR = np.array([226, 54, 84], np.uint8)  # the stripes over what is not clear
_COLOURS = {"optical": (32, 120, 90), "multispectral": (56, 92, 170), "sar": (140, 84, 20)}


def picture(sequence: Sequence, date: int, limits: Limits | None = None) -> UInt8[np.ndarray, "h w 3"]:
    """One date as an RGB picture.

    True colour where the sequence has red, green and blue; else a false colour of infrared bands, or the first band as
    grey; radar as VV, VH and VV - VH. What wasn't measured is grey.

    Args:
      sequence: of any sensor.
      date: number of the date.
      limits: (low, high) of each channel that become black and full; 2 and 98 % of the date's pixels where left out.
    """
    channels, _ = _channels(sequence, slice(date, date + 1))
    limits = stretch(sequence, date) if limits is None else limits
    low, high = limits.T
    shares = (channels[0] - low) / np.maximum(high - low, 1e-6)
    return np.where(np.isfinite(shares), 255 * np.clip(shares, 0, 1), 128).astype(np.uint8)


def stretch(sequence: Sequence, date: int | None = None) -> Limits:
    """(low, high) of each channel of `picture`: 2 and 98 % of a date's clear pixels, for one date or for all together.

    True colours share their limits, so that hues stay true. Where nothing is clear, every pixel counts.
    """
    dates = slice(None) if date is None else slice(date, date + 1)
    channels, true_colour = _channels(sequence, dates)
    finite = np.isfinite(channels).all(-1)
    clear = (sequence.clear & sequence.valid[:, None, None])[dates] & finite
    if not clear.any():
        clear = finite
    limits = []
    for pixels in (image[seen] for image, seen in zip(channels, clear, strict=True) if seen.any()):
        low, high = np.percentile(pixels.reshape(-1, 1) if true_colour else pixels, (2, 98), axis=0)
        limits.append(np.broadcast_to(np.stack([low, high], -1), (3, 2)))
    if not limits:
        return np.array([[0, 1]] * 3, np.float32)
    # Few dates with a cloud that the mask missed must not darken all others, so extremes are left to them.
    low, high = (np.percentile(np.stack(limits)[..., end], share, axis=0) for end, share in ((0, 20), (1, 80)))
    return np.stack([low, high], -1).astype(np.float32)


def _channels(sequence: Sequence, dates: slice) -> tuple[Float[np.ndarray, "t h w 3"], bool]:
    values = sequence.values[dates]
    if {"VV", "VH"} <= set(sequence.bands):
        vv, vh = (values[..., sequence.bands.index(band)].astype(np.float32) for band in ("VV", "VH"))
        return np.stack([vv, vh, vv - vh], -1), False
    table = get_sensor(sequence.sensor)
    common = [table.bands[table.index(band)].common for band in sequence.bands]
    for names in (_TRUE_COLOUR, *_FALSE_COLOURS):
        if set(names) <= set(common):
            return values[..., [common.index(name) for name in names]].astype(np.float32), names == _TRUE_COLOUR
    return values[..., [0, 0, 0]].astype(np.float32), False


def contact_sheet(samples: Iterable[Sample], path: str | os.PathLike[str]) -> pathlib.Path:
    """Writes a PNG: for each site every modality, all its dates side by side, what is not clear hatched.

    Raises:
      UserError: there is no sample, or the file cannot be written.
    """
    path = pathlib.Path(path)
    sheets = [_site(sample) for sample in samples]
    if not sheets:
        raise UserError(f'"{path}" was not written: there is no sample to show')
    parts = [_head(), *sheets]
    page = PIL.Image.new("RGB", (_WIDTH, sum(part.height for part in parts) + _MARGIN), _PAPER)
    top = 0
    for part in parts:
        page.paste(part, (0, top))
        top += part.height
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        page.save(path, format="PNG", optimize=True)
    except OSError as error:
        raise UserError(f'"{path}" cannot be written: {error.strerror or error}') from error
    return path


def _head() -> PIL.Image.Image:
    head = PIL.Image.new("RGB", (_WIDTH, 64), _PAPER)
    draw = PIL.ImageDraw.Draw(head)
    swatch = hatch(np.full((22, 34, 3), 205, np.uint8), np.zeros((22, 34), bool))
    head.paste(PIL.Image.fromarray(swatch), (_MARGIN, 26))
    words = (
        "not clear: cloud, shadow, snow or nodata     Radar: red VV, green VH, blue VV − VH"
        "     Colours are stretched over the clear pixels of a site's dates"
    )
    draw.text((_MARGIN + 44, 28), words, _FAINT, _font(14))
    return head


def _site(sample: Sample) -> PIL.Image.Image:
    strips = [_strip(modality, sample.sequences.get(modality)) for modality in MODALITIES]
    lines: list[list[PIL.Image.Image]] = []
    for strip in strips:
        if lines and sum(other.width + _GUTTER for other in lines[-1]) + strip.width <= _INNER:
            lines[-1].append(strip)
        else:
            lines.append([strip])
    heights = [max(strip.height for strip in line) for line in lines]
    site = PIL.Image.new("RGB", (_WIDTH, 64 + sum(heights)), _PAPER)
    draw = PIL.ImageDraw.Draw(site)
    draw.line((_MARGIN, 8, _WIDTH - _MARGIN, 8), _RULE, 1)
    draw.text((_MARGIN, 20), sample.id or "without id", _INK, _font(17, bold=True))
    longitude, latitude = sample.lonlat.tolist()
    place = "position unknown" if np.isnan(longitude) else f"{_degrees(latitude, 'NS')}  {_degrees(longitude, 'EW')}"
    right = f"{sample.source}   {place}"
    draw.text((_WIDTH - _MARGIN - draw.textlength(right, _font(14)), 22), right, _FAINT, _font(14))
    top = 56
    for line, height in zip(lines, heights, strict=True):
        left = _MARGIN
        for strip in line:
            site.paste(strip, (left, top))
            left += strip.width + _GUTTER
        top += height
    return site


def _degrees(value: float, letters: str) -> str:
    return f"{abs(value):.4f}° {letters[0] if value >= 0 else letters[1]}"


@dataclasses.dataclass(frozen=True)
class _Grid:
    """How a strip's dates are laid out: the strip's width, a picture's side, columns and rows."""

    width: int
    side: int
    columns: int
    rows: int

    @classmethod
    def of(cls, dates: int) -> "_Grid":
        if dates <= 3:  # a third of the page, so that three modalities stand side by side
            side = 240 if dates == 1 else (_THIRD - 2 * _GAP) // 3
            return cls(_THIRD, side, dates, 1)
        side = 140 if dates <= 9 else 65
        columns = (_INNER + _GAP) // (side + _GAP)
        return cls(_INNER, side, columns, -(-dates // columns))


def _strip(modality: str, sequence: Sequence | None) -> PIL.Image.Image:
    """One modality of a site: what it is, then its dates."""
    if sequence is None or not len(sequence.days):
        strip = PIL.Image.new("RGB", (_THIRD, 56), _PAPER)
        _caption(PIL.ImageDraw.Draw(strip), modality, "absent", "")
        return strip
    grid = _Grid.of(len(sequence.days))
    line = grid.side + 22
    strip = PIL.Image.new("RGB", (grid.width, 52 + grid.rows * line + 12), _PAPER)
    draw = PIL.ImageDraw.Draw(strip)
    _caption(draw, modality, get_sensor(sequence.sensor).title, _describe(sequence))
    limits = stretch(sequence)
    for date, day in enumerate(sequence.days.astype("datetime64[D]")):
        left = date % grid.columns * (grid.side + _GAP)
        top = 50 + date // grid.columns * line
        strip.paste(_thumbnail(sequence, date, limits, grid.side), (left, top))
        text, font = "date unknown" if sequence.days[date] == 0 else str(day), _font(10 if grid.side < 100 else 12)
        draw.text((left + (grid.side - draw.textlength(text, font)) / 2, top + grid.side + 3), text, _FAINT, font)
    return strip


def _caption(draw: PIL.ImageDraw.ImageDraw, modality: str, title: str, numbers: str) -> None:
    draw.rounded_rectangle((0, 5, 10, 15), 2, _COLOURS[modality])
    draw.text((18, 1), modality, _INK, _font(14, bold=True))
    draw.text((26 + draw.textlength(modality, _font(14, bold=True)), 2), title, _INK, _font(13))
    draw.text((18, 23), numbers, _FAINT, _font(13))


def _describe(sequence: Sequence) -> str:
    t, height, width, _ = sequence.values.shape
    gsd = (sequence.extent[0] - sequence.extent[2]) / height
    clear = 100 * sequence.clear[sequence.valid].mean() if sequence.valid.any() else 0
    words = ["1 date" if t == 1 else f"{t} dates", f"{height} × {width} pixels of {gsd:.3g} m", f"{clear:.0f} % clear"]
    if not sequence.valid.all():
        words.append(f"{np.sum(~sequence.valid)} without a measured pixel")
    return "  ·  ".join(words)


def _thumbnail(sequence: Sequence, date: int, limits: Limits, side: int) -> PIL.Image.Image:
    if not sequence.valid[date]:
        empty = PIL.Image.new("RGB", (side, side), (240, 242, 244))
        PIL.ImageDraw.Draw(empty).line((0, 0, side, side), _RULE, 1)
        PIL.ImageDraw.Draw(empty).line((0, side, side, 0), _RULE, 1)
        return empty
    image = PIL.Image.fromarray(picture(sequence, date, limits))
    # Few pixels are shown as they are; many are averaged.
    resample = PIL.Image.Resampling.NEAREST if max(image.size) < side else PIL.Image.Resampling.LANCZOS
    clear = PIL.Image.fromarray(sequence.clear[date]).resize((side, side), PIL.Image.Resampling.NEAREST)
    thumbnail = PIL.Image.fromarray(hatch(np.asarray(image.resize((side, side), resample)), np.asarray(clear)))
    PIL.ImageDraw.Draw(thumbnail).rectangle((0, 0, side - 1, side - 1), outline=_RULE)  # a white cloud on white paper
    return thumbnail


def hatch(image: UInt8[np.ndarray, "h w 3"], clear: Bool[np.ndarray, "h w"]) -> UInt8[np.ndarray, "h w 3"]:
    """The image with slanted stripes where it is not clear; it stays visible between them."""
    rows, columns = np.indices(clear.shape)
    period = max(6, max(clear.shape) // 12)
    stripe = (rows + columns) % period < max(2, period // 5)
    return np.where((~clear & stripe)[..., None], UNCLEAR, image).astype(np.uint8)


@functools.cache
def _font(size: int, *, bold: bool = False) -> PIL.ImageFont.FreeTypeFont:
    """DejaVu Sans, which matplotlib brings to every machine."""
    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return PIL.ImageFont.truetype(pathlib.Path(matplotlib.get_data_path(), "fonts", "ttf", name), size)
