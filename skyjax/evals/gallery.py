"""Pictures of a run's report as HTML: the data as it is stored, and the features beside the images.

In: the folders of records that the config names, and the model. Out: HTML with every picture inside it.
"""

import math
from collections.abc import Iterable, Mapping
from collections.abc import Sequence as ListOf
from html import escape
from typing import Any

import numpy as np

from skyjax.evals import pictures
from skyjax.sample import MODALITIES, Sample, Sequence

SITES_A_SOURCE = 2
TITLES = {"optical": "optical", "multispectral": "multispectral", "sar": "SAR", "fused": "fused"}


def data_sheet(samples: Mapping[str, ListOf[Sample]], credits: Iterable[str] = ()) -> str:
    """A few sites of each source: the dates of each modality side by side, unclear parts striped; then the credits."""
    parts = [
        '<p class="lead">A few sites of each source as they are stored, dates in order. Striped in red: not clear'
        " (cloud, shadow, snow or nodata), which training masks. <b>Bad:</b> stripes on clear ground, clouds without"
        " stripes, dates that show different places.</p>"
    ]
    for source, found in samples.items():
        parts.append(f'<div class="source"><h3>{escape(source)}</h3>')
        parts += [_sample(sample) for sample in found[:SITES_A_SOURCE]]
        parts.append("</div>")
    lines = "<br>".join(map(escape, credits))
    return "".join([*parts, f'<p class="details">{lines}</p>' if lines else ""])


def feature_sheet(groups: Iterable[pictures.FeaturePictures]) -> str:
    """For each modality and the fused features: sites with their images beside the features in colour."""
    parts = [
        '<p class="lead">The first three principal components of the teacher\'s spatial features as red, green and'
        " blue, on the features' own grid. A modality is seen alone, at the date shown; fused features come from all"
        f" modalities and up to {pictures.FUSED_DATES} dates of each. The sites of a row share their components: one"
        " colour means one kind of place along the row, and nothing from row to row. Grey: masked. <b>Bad:</b> one"
        " colour everywhere, or colours that ignore what the image shows.</p>"
    ]
    for group in groups:
        title, share = TITLES[group.title], f"three components hold {100 * sum(group.shares):.0f} % of the variance"
        parts.append(f'<h3>{title[0].upper()}{title[1:]} <span class="quiet">{share}</span></h3><div class="pairs">')
        parts += [_site(site) for site in group.sites]
        parts.append("</div>")
    return "".join(parts)


def label_sheet(result: Mapping[str, Any]) -> str:
    """The label maps of a segmentation probe beside what was said of each pixel when its block was tested."""
    classes = list(result.get("classes") or ())
    maps = result.get("maps") or ()
    if not maps:
        return ""
    colours = pictures.class_colours(len(classes))
    key = "".join(
        f'<span><i class="key" style="background:rgb({r} {g} {b})"></i>{escape(str(name))}</span>'
        for name, (r, g, b) in zip(classes, colours.tolist(), strict=True)
    )
    parts = [f'<div class="legend">{key}</div><div class="pairs">']
    for each in maps:
        images = "".join(
            _picture(pictures.fit(pictures.label_picture(np.array(each[name]), colours), 164), caption)
            for name, caption in (("truth", "label"), ("said", "said"))
        )
        parts.append(
            f'<div class="site"><div class="pair-name">{escape(str(each["site"]))}</div>'
            f'<div class="pair">{images}</div></div>'
        )
    return "".join([*parts, "</div>"])


def _site(site: pictures.SitePicture) -> str:
    images = [_picture(image, TITLES[modality], day) for modality, day, image in site.images]
    grid = f"{site.grid[0]} × {site.grid[1]} places"
    return (
        f'<div class="site"><div class="pair-name">{escape(site.name)}</div><div class="pair">{"".join(images)}'
        f"{_picture(site.features, 'features', grid)}</div></div>"
    )


def _picture(image: pictures.Image, caption: str, note: str = "") -> str:
    quiet = f'<br><span class="quiet">{escape(note)}</span>' if note else ""
    alt = escape(f"{caption} {note}".strip())
    return (
        f'<figure><img src="{pictures.data_uri(image)}" alt="{alt}"><figcaption>{escape(caption)}{quiet}'
        "</figcaption></figure>"
    )


def _sample(sample: Sample) -> str:
    present = {modality: sample.sequences[modality] for modality in MODALITIES if modality in sample.sequences}
    strips = "".join(_strip(modality, sequence) for modality, sequence in present.items())
    # Sites of one date each would be a column of lonely pictures: their modalities stand side by side instead.
    flat = " flat" if all(sequence.valid.sum() <= 1 for sequence in present.values()) else ""
    return (
        f'<div class="site{flat}"><div class="site-name"><b>{escape(sample.id)}</b> {_place(*sample.lonlat.tolist())}'
        f'</div><div class="strips">{strips}</div></div>'
    )


def _place(lon: float, lat: float) -> str:
    if math.isnan(lon) or math.isnan(lat):
        return "place not known"
    return f"{abs(lat):.3f}° {'N' if lat >= 0 else 'S'}, {abs(lon):.3f}° {'E' if lon >= 0 else 'W'}"


def _strip(modality: str, sequence: Sequence) -> str:
    shown = pictures.date_pictures(sequence)
    count = int(sequence.valid.sum())
    dates = f"{len(shown)} of {count} dates" if len(shown) < count else f"{count} date{'s' * (count != 1)}"
    size = f"{sequence.values.shape[1]} × {sequence.values.shape[2]} px"
    name = f"<b>{TITLES[modality]}</b>{escape(sequence.sensor)}<br>{size}, {dates}"
    tiles = [_picture(date.image, date.day, _share(date.clear)) for date in shown]
    alone = " single" if count == 1 else ""
    return (
        f'<div class="strip"><div class="strip-name">{name}</div><div class="tiles{alone}">{"".join(tiles)}</div></div>'
    )


def _share(clear: float) -> str:
    return "" if clear > 0.995 else f"{100 * clear:.0f} % clear"
