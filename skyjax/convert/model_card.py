"""The model card: what a stranger must know before using an export, from its config, statistics and notes.

The text with its gaps is model_card.md. Nothing here is guessed: what nobody wrote down is said to be unknown.
"""

import json
import pathlib
import string
from collections.abc import Mapping, Sequence
from typing import Any

import ml_collections
import numpy as np

from skyjax import __version__
from skyjax.convert.released import constants
from skyjax.evals.features import FUSED
from skyjax.models import fusion, swin_v2, vit
from skyjax.sample import MODALITIES
from skyjax.sensors import get_sensor
from skyjax.sensors import statistics as sensor_statistics
from skyjax.train.pretrained import Pretrained

NAME = "MODEL_CARD.md"
TOWERS = {"text": "text tower", "decoder": "decoder"}

SIZES: tuple[str, ...] = (
    *("kind", "stem", "patch_size", "image_size", "width", "depths", "depth", "heads", "window", "extra_norm_every"),
    *("up_factor", "mask_padding", "vocabulary", "length", "causal", "pool", "embed_dim", "tied"),
)
USE = {
    "skysense": """\
The names, shapes and layouts of SkySense's released files; its own PyTorch code loads them. Normalise images by the
statistics below first; {container}.""",
    "safetensors": """\
```python
import skyjax

model = skyjax.load("{out}")
features = model.encode(sample)["pooled"]
```

`model.safetensors` holds every layer under its own name; `skyjax.json` has config, sensors and statistics.""",
    "pytorch": """\
```python
from skyjax_encoder import SkyjaxEncoder  # the file in this folder; it needs torch and safetensors alone

model = SkyjaxEncoder.from_folder("{out}")
features = model({{"multispectral": {{"values": values, "days": days}}}})["pooled"]
```

Or, with transformers: `AutoModel.from_pretrained("{out}", trust_remote_code=True)`.""",
}
# Beside that, where images and texts can be compared.
WORDS = {
    "safetensors": """

```python
alike = model.words.project("fused", features) @ model.words.encode(["a forest", "a town"]).T
```

`words.safetensors` holds text tower, projections and decoder; `tokenizer.model` is a SentencePiece model.""",
    "pytorch": """

```python
from skyjax_encoder import SkyjaxWords  # its texts need sentencepiece

words = SkyjaxWords.from_folder("{out}")
alike = words.images(model(sites)) @ words.encode(["a forest", "a town"]).T
```""",
}


def write(pretrained: Pretrained, *, format: str, out: pathlib.Path, check: str, notes: Sequence[str]) -> str:
    """The text of the card.

    Args:
      pretrained: what was exported; its `data` as `training_data` gives it.
      format: of the export.
      out: where it lies.
      check: a sentence: how the written file compares with skyjax.
      notes: what a user of this format must know beside.
    """
    modalities = [m for m in MODALITIES if m in pretrained.config.model.modalities]
    template = string.Template(pathlib.Path(__file__).with_name("model_card.md").read_text(encoding="utf-8"))
    container = "`torch.load(file)['model']` is the state dict" if out.suffix != ".safetensors" else "the file is flat"
    return template.substitute(
        title=out.name,
        about=_about(pretrained, modalities),
        version=__version__,
        format=format,
        check=check,
        use=(USE[format] + (WORDS.get(format, "") if _meets_words(pretrained) else "")).format(
            out=out.name, container=container
        ),
        sensors="\n\n".join(_sensors(m, pretrained.statistics[m], bool(pretrained.source)) for m in modalities),
        parts=_parts(pretrained),
        choices=" ".join([f"Epsilon of the layer norms: {epsilons(pretrained.config.model)}.", *notes]),
        data=_data(pretrained),
        licence=pretrained.licence or _no_licence(pretrained.data),
        limits=_limits(pretrained, modalities),
    )


def training_data(pretrained: Pretrained) -> Any:
    """What it was trained on, with title, licence and attribution of each data set that can still be read."""
    if not isinstance(pretrained.data, list):
        return pretrained.data
    rows = []
    for entry in pretrained.data:
        if isinstance(entry, Mapping):
            rows.append(dict(entry))
            continue
        path, share = entry
        row = {"path": str(path), "share": share}
        try:
            described = json.loads((pathlib.Path(path) / "dataset.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            described = {}
        rows.append(row | {k: described[k] for k in ("title", "count", "licence", "attribution") if k in described})
    return rows


def _about(pretrained: Pretrained, modalities: Sequence[str]) -> str:
    eyes = ", ".join(modalities)
    count = parameters(pretrained)
    made = f"imported from `{pretrained.source['file']}`" if pretrained.source else f"after {pretrained.step:,} steps"
    words = ""
    if pretrained.words is not None:
        sides = ", ".join(pretrained.words.streams) or "no side of the images"
        decoder = " and a decoder that writes" if pretrained.words.can_caption else ""
        words = f" It was trained with texts: a text tower that {sides} met{decoder}."
    return f"An encoder of remote-sensing images ({eyes}), {count:,} parameters, {made}.{words}"


def _meets_words(pretrained: Pretrained) -> bool:
    return pretrained.words is not None and FUSED in pretrained.words.streams


def parameters(pretrained: Pretrained) -> int:
    """How many numbers the encoder learned, without the table of geo-prototypes."""
    return _count(pretrained.params)


def words_parameters(pretrained: Pretrained) -> int:
    """How many numbers the text side learned: tower, projections, decoder; 0 where there is none."""
    return 0 if pretrained.words is None else _count(pretrained.words.params) + _count(pretrained.words.head)


def _count(tree: Any) -> int:
    return sum(map(_count, tree.values())) if isinstance(tree, Mapping) else tree.size


def _sensors(modality: str, table: Mapping[str, Any], imported: bool) -> str:
    blocks = []
    for row, key in enumerate(table["sensors"]):
        sensor = get_sensor(key)
        lines = [f"**{modality}: {sensor.title}** (`{key}`), in {sensor.unit}", "", "| band | nm | m | mean | std |"]
        lines.append("|---|---|---|---|---|")
        absent = []
        for column, name in enumerate(table["bands"]):
            position = sensor.find(name)
            if position is None:
                absent.append(name)
                continue
            band = sensor.bands[position]
            own = name if name == band.name else f"{name} ({band.name})"
            wavelength = f"{band.wavelength:g}" if band.wavelength else "–"
            mean, std = table["mean"][row][column], table["std"][row][column]
            lines.append(f"| {own} | {wavelength} | {band.gsd:g} | {mean:.6g} | {std:.6g} |")
        if absent:
            lines += ["", f"This sensor lacks {', '.join(absent)}; masked."]
        origin = _origin(modality, key, table, row, imported)
        blocks.append("\n".join([*lines, "", f"Statistics: {origin}"]))
    return "\n\n".join(blocks)


def _origin(modality: str, key: str, table: Mapping[str, Any], row: int, imported: bool) -> str:
    mean, std = sensor_statistics([key], table["bands"])
    if np.allclose(mean[0], table["mean"][row]) and np.allclose(std[0], table["std"][row]):
        return get_sensor(key).statistics_source
    if not imported:
        return "those of its training, which skyjax's table of sensors does not have."
    return f"{constants()[modality]['source']}; of bands that SkySense lacks, skyjax's table of sensors."


def _parts(pretrained: Pretrained) -> str:
    model = pretrained.config.model
    lines = ["| part | sizes |", "|---|---|"]
    for modality in (m for m in MODALITIES if m in model.modalities):
        lines.append(f"| {modality} | {sizes(model.modalities[modality])} |")
    fused = "none: the mean over valid dates" if model.fusion is None else sizes(model.fusion)
    lines.append(f"| fusion | {fused} |")
    prototypes = model.get("prototypes")
    if prototypes is not None and pretrained.prototypes is not None:
        lines.append(
            f"| geo-prototypes | {prototypes.regions}² regions, {prototypes.count} of width {prototypes.width} |"
        )
    if pretrained.words is not None:
        lines += [f"| {title} | {sizes(model[name])} |" for name, title in TOWERS.items() if model.get(name)]
    return "\n".join([*lines, "", f"Common width of all modalities: {model.spatial_width}."])


def sizes(part: Mapping[str, Any]) -> str:
    """The sizes of a part of a model's config, in words."""
    words = {key.replace("_", " "): part[key] for key in SIZES if key in part and part[key] is not None}
    return ", ".join(f"{key} {' '.join(map(str, v)) if isinstance(v, tuple | list) else v}" for key, v in words.items())


def epsilons(model: ml_collections.ConfigDict) -> str:
    """The constants that layer norms of a model's parts add to the variance, in words."""
    kinds = {part.kind for part in model.modalities.values()} | ({"fusion"} if model.fusion is not None else set())
    known = {"swin_v2": swin_v2.EPSILON, "vit": vit.EPSILON, "fusion": fusion.EPSILON}
    return ", ".join(f"{kind} {epsilon:g}" for kind, epsilon in known.items() if kind in kinds)


def _data(pretrained: Pretrained) -> str:
    if pretrained.data is None:
        return "Unknown."
    if not isinstance(pretrained.data, list):
        return str(pretrained.data)
    lines = [_labels(pretrained), "", "| data | share | samples | licence | attribution |", "|---|---|---|---|---|"]
    for row in pretrained.data:
        cells = [
            row.get("title", row["path"]),
            row["share"],
            *(row.get(k, "–") for k in ("count", "licence", "attribution")),
        ]
        lines.append(f"| {' | '.join(str(cell).replace('|', '/') for cell in cells)} |")
    steps, batch = pretrained.step, pretrained.config.get("batch_size")
    lines += ["", f"{steps:,} steps" + (f" of {batch:,} sites each." if batch else ".")]
    return "\n".join(lines)


def _labels(pretrained: Pretrained) -> str:
    if pretrained.words is None:
        return "No labels were used."
    made = pretrained.config.data.text.get("from_labels")
    return "Captions and questions of the samples were read" + (
        "; where a sample had no caption, captions were made of its labels." if made else ", and no labels."
    )


def _no_licence(data: Any) -> str:
    licences = dict.fromkeys(str(row["licence"]) for row in data if "licence" in row) if isinstance(data, list) else {}
    under = f" The training data are under: {'; '.join(licences)}." if licences else ""
    return f"Not stated by whoever trained it; skyjax, which computes it, is Apache-2.0.{under}"


def _limits(pretrained: Pretrained, modalities: Sequence[str]) -> str:
    sensors = dict.fromkeys(key for m in modalities for key in pretrained.statistics[m]["sensors"])
    lines = [
        f"- It knows {', '.join(sensors)} and no other sensor; values of another unit or level of processing give"
        " features that mean nothing, without an error.",
        "- It gives features, not maps or classes: a probe or a head has to be trained and tested for each use.",
        "- Nothing here tells how well it works at a place, season or sensor that the training data lack.",
    ]
    if pretrained.config.model.get("prototypes") is not None:
        lines.append("- Geo-context is that of the training sites; where none lay it is what it was at the start.")
    if pretrained.source:
        lines.append("- skyjax did not train it; who made the file knows its data, its tests and its terms.")
    return "\n".join(lines)
