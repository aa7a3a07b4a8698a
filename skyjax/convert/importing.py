"""`skyjax import`: a released SkySense file -> a weights folder that `skyjax.load` reads (docs/import_export.md).

The file is understood by its names and shapes, written as a folder, and the folder is read back and turned into the
released tensors again, to be held against the file bit for bit before it is put in place.
"""

import pathlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import ml_collections
import numpy as np

from skyjax.convert import exchange, files, model_card
from skyjax.convert.bands import Adapted, adapt_modality
from skyjax.convert.released import UP_HEADS, Released, constants, model_config, understand
from skyjax.errors import UserError, nearest
from skyjax.models.listed import from_listed, to_listed
from skyjax.sample import MODALITIES
from skyjax.sensors import get_sensor, sensors, statistics
from skyjax.train import weights

PLAIN = ("multispectral", "sar", "fusion")  # whose heads the weights do not tell

Bands = Mapping[str, tuple[tuple[str, ...], tuple[str, ...]]]  # modality -> sensors (empty: the usual ones), band names


def run(
    source: pathlib.Path, out: pathlib.Path, *, heads: str = "", window: int | None = None, bands: Sequence[str] = ()
) -> dict[str, Any]:
    """Imports a file.

    Args:
      source: .pth or .safetensors.
      out: the folder to write; one of an earlier import or export is replaced once the new one is whole.
      heads: "8", or "fusion:16,multispectral:8": heads of the plain transformers where the usual number is wrong.
      window: of the Swin's attention, likewise.
      bands: "MODALITY:B02,B03" or "SENSOR:B02,B03": what the model is to see, by name.

    Returns:
      What was read and chosen, as JSON values; `describe` makes lines of it.

    Raises:
      UserError: the file is not what it should be, or an option does not fit it.
    """
    chosen_heads, chosen_bands = parse_heads(heads), parse_bands(bands)
    if window is not None and window < 2:
        raise UserError(f"--window={window}: a window has 2 cells a side or more")
    say(f"Reading {source}")
    tensors, beside = files.read(source)
    released = understand(source, tensors, lambda channels: _modality_of(source, channels, chosen_bands))
    model = model_config(
        released, bands=lambda m, n: _channel_names(source, m, n, chosen_bands), heads=chosen_heads, window=window
    )
    _check_options(model, chosen_heads, window, chosen_bands)
    listed, record = exchange.from_released(released, model)
    record["beside"] = beside
    tables = {m: _table(m, model.modalities[m], chosen_bands) for m in MODALITIES if m in model.modalities}
    adapted = _adapt(listed, model, tables, chosen_bands)
    record["adapted"] = sorted(adapted)
    data, licence = (" ".join(constants()[word].split()) for word in ("data", "licence"))
    config = ml_collections.ConfigDict({"model": model})
    say(f"Writing {out}")
    with files.beside(out, marker=weights.NOTES) as folder:
        weights.save(folder, weights.Weights(listed, config, tables, source=record, data=data, licence=licence))
        compared = _compare(folder, tensors, record)
    return {
        "source": str(source),
        "out": str(out),
        "tensors": len(tensors),
        "parameters": sum(value.size for value in listed.values()),
        "parts": _parts(released, model, listed),
        "choices": _choices(released, model, chosen_heads, window),
        "carried": list(released.extras),
        "beside": beside,
        "statistics": tables,
        "adapted": {m: str(found).splitlines() for m, found in adapted.items()},
        "equal_tensors": compared,
        "licence": licence,
    }


def describe(result: Mapping[str, Any]) -> str:
    """The lines that the command prints."""
    lines = [f"{result['source']}: {result['tensors']} tensors, {result['parameters']:,} parameters"]
    for part in result["parts"]:
        prefix = f"{part['prefix']}*" if part["prefix"] else "no prefix"
        lines.append(f"  {part['name']:<24} {prefix:<15} {part['parameters']:>13,}  {part['sizes']}".rstrip())
    lines += result["choices"]
    for modality, table in result["statistics"].items():
        lines.append(f"{modality}: bands {' '.join(table['bands'])} of {', '.join(table['sensors'])}")
        lines += [f"  {line}" for line in result["adapted"].get(modality, [])]
    if result["carried"]:
        lines.append(
            f"Not used by the model, kept for export: {weights.enumerate_names(_short(result['carried']), 24)}"
        )
    if result["beside"]:
        lines.append(f"Beside the tensors, dropped: {', '.join(result['beside'])}")
    lines.append(
        f"Written under the released names again: {result['equal_tensors']} of {result['tensors']} tensors equal the"
        " file's in every bit"
    )
    lines.append(f"Licence: {result['licence']}")
    lines.append(f'{result["out"]}: skyjax.load("{result["out"]}")')
    return "\n".join(lines)


def parse_heads(text: str) -> dict[str, int]:
    """Part -> heads; "" stands for every plain transformer.

    Raises:
      UserError: not of that form.
    """
    heads = {}
    for word in filter(None, text.split(",")):
        part, _, number = word.rpartition(":")
        if part and part not in PLAIN:
            raise UserError(
                f'--heads={text}: "{part}" is not one of {", ".join(PLAIN)}, whose heads can be chosen; a Swin\'s stand'
                " in its logit_scale"
            )
        if not number.isdigit() or int(number) < 1:
            raise UserError(f'--heads={text}: "{word}" is not a number of heads; as in --heads=fusion:16,sar:8')
        heads[part] = int(number)
    return heads


def parse_bands(texts: Sequence[str]) -> dict[str, tuple[tuple[str, ...], tuple[str, ...]]]:
    """Modality -> sensors and band names.

    Raises:
      UserError: not of that form, or a sensor is not known.
    """
    bands: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {}
    for text in texts:
        first, _, names = text.rpartition(":")
        if not first or not all(names.split(",")):
            raise UserError(
                f"--bands={text}: write MODALITY:BAND,BAND or SENSOR:BAND,BAND; as in --bands=optical:red,nir"
            )
        if first not in MODALITIES and first not in sensors():
            near = nearest(first, [*MODALITIES, *sensors()])
            raise UserError(f'--bands={text}: "{first}" is neither a modality nor a sensor{near}')
        modality = first if first in MODALITIES else get_sensor(first).modality
        if modality in bands:
            raise UserError(f"--bands={text}: the bands of {modality} are given twice")
        bands[modality] = (() if first in MODALITIES else (first,), tuple(names.split(",")))
    return bands


def say(line: str) -> None:
    """Progress, for people."""
    print(line, file=sys.stderr, flush=True)


def _modality_of(path: pathlib.Path, channels: int, bands: Bands) -> str:
    """Of a ViT that stands alone."""
    candidates = list(UP_HEADS.values())
    for modality in candidates:
        if channels in constants()[modality]["channels"]:
            return modality
    named = [modality for modality in candidates if modality in bands]
    if len(named) != 1:
        raise UserError(
            f'"{path}" holds an encoder of {channels} channels, and SkySense\'s have 10 (Sentinel-2) or 2 (Sentinel-1);'
            " name them: --bands=sentinel2-l2a:B02,B03,... (or multispectral:, sar:, or another sensor)"
        )
    return named[0]


def _channel_names(path: pathlib.Path, modality: str, channels: int, bands: Bands) -> tuple[str, ...]:
    """What the channels of the file are."""
    table = constants()[modality]
    if channels in table["channels"]:
        return tuple(band["name"] for band in table["bands"][:channels])
    usual = " or ".join(map(str, table["channels"]))
    if modality not in bands:
        raise UserError(
            f'"{path}": {modality} has {channels} channels, and SkySense\'s have {usual}; name them in order:'
            f" --bands={modality}:NAME,NAME,..."
        )
    names = bands[modality][1]
    if len(names) != channels:
        raise UserError(f'"{path}": {modality} has {channels} channels and --bands names {len(names)}; name every one')
    return names


def _check_options(
    model: ml_collections.ConfigDict, heads: Mapping[str, int], window: int | None, bands: Bands
) -> None:
    there = [*model.modalities, *(["fusion"] if model.fusion is not None else [])]
    for option, names in (("--heads", [name for name in heads if name]), ("--bands", bands)):
        for name in names:
            if name not in there:
                raise UserError(f"{option}: the file holds no {name}; it holds {', '.join(there)}")
    if window is not None and "optical" not in model.modalities:
        raise UserError("--window: the file holds no Swin, the only part that has windows")


def _table(modality: str, part: ml_collections.ConfigDict, bands: Bands) -> dict[str, Any]:
    """Statistics of the channels of the file, SkySense's where it publishes them; changes the part's sensors."""
    known = {band["name"]: band for band in constants()[modality]["bands"]}
    if all(name in known for name in part.bands):
        sensor_keys = tuple(part.sensors)
    else:
        sensor_keys = bands[modality][0] or tuple(part.sensors)
        for name in part.bands:
            get_sensor(sensor_keys[0]).index(name)  # raises, and says what is near
        part.sensors = sensor_keys
    mean, std = statistics(sensor_keys, part.bands)
    for row, key in enumerate(sensor_keys):
        for column, name in enumerate(part.bands):
            if key in constants()[modality]["sensors"] and name in known and get_sensor(key).find(name) is not None:
                mean[row, column], std[row, column] = known[name]["mean"], known[name]["std"]
    return {"sensors": list(sensor_keys), "bands": list(part.bands), "mean": mean.tolist(), "std": std.tolist()}


def _adapt(
    listed: dict[str, np.ndarray], model: ml_collections.ConfigDict, tables: dict[str, Any], bands: Bands
) -> dict[str, Adapted]:
    """Changes parameters, config and tables to the bands wanted; what was done, by modality."""
    done = {}
    for modality, (sensor_keys, names) in bands.items():
        part = model.modalities[modality]
        if tuple(part.bands) == names and not set(sensor_keys) - set(part.sensors):
            continue
        own = f"{modality}."
        params = from_listed({n.removeprefix(own): value for n, value in listed.items() if n.startswith(own)})
        found = adapt_modality(modality, params, part, tables[modality], names, sensor_keys=sensor_keys)
        listed |= {own + name: np.asarray(value) for name, value in to_listed(found.params).items()}
        model.modalities[modality] = found.part
        tables[modality] = found.statistics
        done[modality] = found
    return done


def _compare(folder: pathlib.Path, tensors: Mapping[str, np.ndarray], record: Mapping[str, Any]) -> int:
    """How many tensors of the written folder equal the file's, which is all but kernels of adapted bands."""
    back = weights.load(folder)
    again = exchange.to_released(back.listed, back.config.model, back.source)
    changed = {f"{record['prefixes'][m]}patch_embed.projection.weight" for m in record["adapted"]}
    different = [name for name in tensors if name not in changed and not exchange.same(again[name], tensors[name])]
    if list(again) != list(tensors) or different:
        raise RuntimeError(f"import is not lossless, which is a bug of skyjax: {different[:8] or 'names differ'}")
    return len(tensors) - len(changed)


def _parts(
    released: Released, model: ml_collections.ConfigDict, listed: Mapping[str, np.ndarray]
) -> list[dict[str, Any]]:
    rows = []
    for part in released.parts:
        if part.kind == "dates":
            continue
        count = sum(value.size for name, value in listed.items() if name.startswith(f"{part.ours}."))
        rows.append({"name": part.ours, "prefix": part.prefix, "parameters": count, "sizes": _sizes(model, part.ours)})
    return rows


def _sizes(model: ml_collections.ConfigDict, name: str) -> str:
    if name.startswith("up_heads."):
        return f"factor {model.modalities[name.split('.')[1]].up_factor}, to width {model.spatial_width}"
    return model_card.sizes(model.fusion if name == "fusion" else model.modalities[name])


def _choices(
    released: Released, model: ml_collections.ConfigDict, heads: Mapping[str, int], window: int | None
) -> list[str]:
    """What the weights do not tell, and what was taken."""
    lines = []
    optical = released.find("optical")
    if optical is not None:
        told = any(name.endswith("relative_coords_table") for name in optical.names)
        why = "--window" if window else "by relative_coords_table" if told else "as released; change it by --window="
        lines.append(f"Window: {model.modalities.optical.window}, {why}. Its padding is attended to, as published.")
    plain = {m: model.modalities[m].heads for m in PLAIN if m in model.modalities}
    if model.fusion is not None:
        plain["fusion"] = model.fusion.heads
    if plain:
        taken = ", ".join(f"{name} {count}" for name, count in plain.items())
        why = "--heads" if heads else "width / 64, or 4 below a width of 256; change them by --heads="
        lines.append(f"Heads of the plain transformers: {taken} ({why}).")
    lines.append(f"Epsilon of the layer norms, which files do not tell: {model_card.epsilons(model)}.")
    if model.fusion is not None:
        if released.find("fusion", "dates"):
            row = "31 December of leap years is a copy of 31 December: released tables have 365 rows."
            lines.append(f"Dates (ctpe): added to every modality. {row}")
        else:
            lines.append("Dates: the file has no table (ctpe); dates are encoded as nothing.")
    return lines


def _short(names: Sequence[str]) -> list[str]:
    """Names of tensors that every block has, once."""
    found: dict[str, int] = {}
    for name in names:
        before, _, after = name.partition(".stages.")
        key = f"{before}.stages.*.{after.rsplit('.', 1)[1]}" if after else name
        found[key] = found.get(key, 0) + 1
    return [name if count == 1 else f"{name} ({count})" for name, count in found.items()]
