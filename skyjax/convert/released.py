"""What a released SkySense file holds: which parts under which prefixes, of which sizes, and what besides.

Everything is read from the names and shapes of the tensors, so that any member of the family is understood without a
config. The names are checked first, against the rules of convert/skysense.py: what is missing or left over is the
user's to know. Then the sizes are read.
"""

import dataclasses
import functools
import math
import pathlib
import re
import tomllib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import ml_collections
import numpy as np

from skyjax.convert import skysense
from skyjax.errors import UserError
from skyjax.sample import MODALITIES
from skyjax.train.weights import enumerate_names

NAMES_SHOWN = 60  # of keys in an error
DATES = "ctpe"
UP_HEADS = {"head_s2.": "multispectral", "head_s1.": "sar"}
FUSION = "fusion."
ALONE = ("", "backbone.")  # prefixes of files of one encoder
DEFAULT_WINDOW = 8
DEFAULT_UP_FACTOR = 4

BUFFERS = r"stages\.\d+\.blocks\.\d+\.attn\.w_msa\.(relative_coords_table|relative_position_index)"
# Known tensors that the encoder's output does not depend on, by the kind of part.
HARMLESS = {"swin_v2": rf"mask_token|{BUFFERS}|norm\d+\.(weight|bias)", "vit": "mask_token"}


@dataclasses.dataclass(frozen=True)
class Part:
    """One part of a file.

    Attributes:
      ours: "optical", "multispectral", "sar", "up_heads.M", "fusion" or "fusion" again for its dates.
      kind: "swin_v2", "vit", "up_head", "fusion" or "dates".
      prefix: of its names in the file.
      names: without the prefix, in the file's order.
    """

    ours: str
    kind: str
    prefix: str
    names: tuple[str, ...]

    @property
    def depths(self) -> tuple[int, ...]:
        """Blocks of each stage, or layers."""
        pattern = r"stages\.(\d+)\.blocks\.(\d+)\." if self.kind == "swin_v2" else r"()layers\.(\d+)\."
        depths: dict[int, int] = {}
        for match in filter(None, (re.match(pattern, name) for name in self.names)):
            stage = int(match[1] or 0)
            depths[stage] = max(depths.get(stage, 0), int(match[2]) + 1)
        # A number that the file cannot fill with names is not a depth; what is left over is named later.
        most = len(self.names)
        stages = min(max(depths, default=0) + 1, most)
        return tuple(min(max(depths.get(i, 1), 1), most) for i in range(stages))

    @property
    def extra_norm_every(self) -> int:
        """After how many blocks an extra norm stands, by where norm3 is found."""
        found = (re.match(r"stages\.\d+\.blocks\.(\d+)\.norm3\.", name) for name in self.names)
        return math.gcd(*(int(match[1]) + 1 for match in found if match))

    @property
    def wanted(self) -> list[str]:
        """The names that a part of these depths must have."""
        if self.kind == "swin_v2":
            rules = skysense.swin_v2(self.depths, self.extra_norm_every)
        elif self.kind == "up_head":
            rules = skysense.up_head(1)
        else:
            make = {"vit": skysense.vit, "fusion": skysense.fusion, "dates": lambda _: skysense.dates()}[self.kind]
            rules = make(*self.depths)
        return [rule.released for rule in rules]


@dataclasses.dataclass(frozen=True)
class Released:
    """A file, understood by its names.

    Attributes:
      path: of the file.
      tensors: by name, in the file's order.
      parts: what the model is made of.
      extras: names of known tensors that the model does not use.
    """

    path: pathlib.Path
    tensors: Mapping[str, np.ndarray]
    parts: tuple[Part, ...]
    extras: tuple[str, ...]

    def find(self, ours: str, kind: str | None = None) -> Part | None:
        """The part of that name."""
        return next((part for part in self.parts if part.ours == ours and kind in (None, part.kind)), None)

    def shape(self, part: Part, name: str, axes: int) -> tuple[int, ...]:
        """The shape of a part's tensor.

        Raises:
          UserError: it has another number of axes.
        """
        found = self.tensors[part.prefix + name].shape
        if len(found) != axes:
            raise UserError(f'"{self.path}": "{part.prefix}{name}" has the shape {found}; it must have {axes} axes')
        return found


@functools.cache
def constants() -> dict[str, Any]:
    """What stands in skysense.toml."""
    return tomllib.loads(pathlib.Path(__file__).with_name("skysense.toml").read_text(encoding="utf-8"))


def understand(path: pathlib.Path, tensors: Mapping[str, np.ndarray], modality_of: Callable[[int], str]) -> Released:
    """Finds the parts of a file by its names.

    Args:
      path: for messages.
      tensors: of the file.
      modality_of: number of channels -> modality, asked for a ViT that stands alone.

    Raises:
      UserError: no part is recognised; or names are missing or left over, and it lists them.
    """
    parts, others = _split(path, tensors, modality_of)
    _check_combination(path, parts)
    extras: list[str] = []
    missing: list[str] = []
    left_over: list[str] = []
    for name in others:
        (extras if name == DATES else left_over).append(name)  # dates without a fusion: of a Sentinel-2 file
    for part in parts:
        there, wanted = set(part.names), set(part.wanted)
        missing += [part.prefix + name for name in wanted - there]
        for name in part.names:
            if name not in wanted:
                known = re.fullmatch(HARMLESS.get(part.kind, "(?!)"), name)
                (extras if known else left_over).append(part.prefix + name)
    if missing or left_over:
        told = [
            f"{len(names)} {what}: {enumerate_names(sorted(names), NAMES_SHOWN)}"
            for what, names in (("missing", missing), ("left over", left_over))
            if names
        ]
        raise UserError(f'"{path}" is not a SkySense encoder as released; {"; ".join(told)}')
    return Released(path, tensors, tuple(parts), tuple(name for name in tensors if name in set(extras)))


def _split(
    path: pathlib.Path, tensors: Mapping[str, np.ndarray], modality_of: Callable[[int], str]
) -> tuple[list[Part], list[str]]:
    """The parts, and the names that belong to none."""
    parts: list[Part] = []
    taken: set[str] = set()

    def take(ours: str, kind: str, prefix: str) -> None:
        names = tuple(name.removeprefix(prefix) for name in tensors if name.startswith(prefix))
        if not names:
            return
        twice = [part.prefix for part in parts if part.ours == ours]
        if twice:
            raise UserError(f'"{path}" holds {ours} twice, under "{twice[0]}" and "{prefix}"; remove one of them')
        parts.append(Part(ours, kind, prefix, names))
        taken.update(prefix + name for name in names)

    for modality in MODALITIES:
        for prefix in constants()[modality]["prefixes"]:
            take(modality, "swin_v2" if modality == "optical" else "vit", prefix)
    for prefix, modality in UP_HEADS.items():
        take(f"up_heads.{modality}", "up_head", prefix)
    take("fusion", "fusion", FUSION)
    if parts:
        if DATES in tensors and any(part.kind == "fusion" for part in parts):
            parts.append(Part("fusion", "dates", "", (DATES,)))
            taken.add(DATES)
        return parts, [name for name in tensors if name not in taken]
    return _alone(path, tensors, modality_of)


def _alone(
    path: pathlib.Path, tensors: Mapping[str, np.ndarray], modality_of: Callable[[int], str]
) -> tuple[list[Part], list[str]]:
    """The one encoder of a file without SkySense's prefixes, told by its keys."""
    prefix = ALONE[1] if any(name.startswith(ALONE[1]) for name in tensors) else ALONE[0]
    own = [name for name in tensors if name.startswith(prefix) and name != DATES]
    names = tuple(name.removeprefix(prefix) for name in own)
    others = [name for name in tensors if name not in set(own)]
    if any(name.startswith("stages.") for name in names):
        return [Part("optical", "swin_v2", prefix, names)], others
    if any(name.startswith("porj_linear.") for name in names):
        raise UserError(f'"{path}" holds a fusion alone, which encodes nothing; give a file with encoders')
    if any(name.startswith("decoder.") for name in names):
        raise UserError(f'"{path}" holds an up-head alone, which encodes nothing; give a file with its encoder')
    if any(name.startswith("layers.") for name in names):
        kernel = tensors.get(f"{prefix}patch_embed.projection.weight")
        if kernel is None or kernel.ndim != 4:
            raise UserError(
                f'"{path}" is not a SkySense encoder as released; 1 missing: {prefix}patch_embed.projection.weight'
            )
        return [Part(modality_of(kernel.shape[1]), "vit", prefix, names)], others
    raise UserError(
        f'"{path}" holds no part of SkySense: its names begin with {enumerate_names(list(tensors), 4)}; known are'
        " backbone_gep. backbone_s2. backbone_s1. head_s2. head_s1. fusion. ctpe, or one encoder without prefix"
    )


def _check_combination(path: pathlib.Path, parts: Sequence[Part]) -> None:
    """Whether the parts make a model."""
    found = {part.ours: part for part in parts}
    encoders = [m for m in MODALITIES if m in found]
    if not encoders:
        raise UserError(f'"{path}" holds {", ".join(found)} and no encoder; give a file with encoders')
    for name in found:
        if name.startswith("up_heads.") and name.split(".")[1] not in found:
            modality = name.split(".")[1]
            missing = constants()[modality]["prefixes"][0]
            raise UserError(
                f'"{path}" holds "{found[name].prefix}*", and the encoder before it, "{missing}*", is missing'
            )
    if len(encoders) > 1 and "fusion" not in found:
        raise UserError(f'"{path}" holds {len(encoders)} encoders, and "{FUSION}*", which joins them, is missing')


def model_config(
    released: Released,
    *,
    bands: Callable[[str, int], Sequence[str]],
    heads: Mapping[str, int],
    window: int | None,
) -> ml_collections.ConfigDict:
    """The config of the model that a file holds (`config.model`).

    Args:
      released: the file.
      bands: modality, number of channels -> names of the channels.
      heads: of the plain transformers where the user says so, by part.
      window: of the Swin, where the user says so.

    Raises:
      UserError: shapes contradict each other, or heads do not divide a width.
    """
    fusion = released.find("fusion", "fusion")
    modalities: dict[str, Any] = {}
    for modality in (m for m in MODALITIES if released.find(m)):
        part = released.find(modality)
        assert part is not None
        swin = part.kind == "swin_v2"
        config = _swin_config(released, part, window) if swin else _vit_config(released, part, heads)
        names = tuple(bands(modality, released.shape(part, "patch_embed.projection.weight", 4)[1]))
        sensors = tuple(constants()[modality]["sensors"])
        modalities[modality] = {"kind": part.kind, "sensors": sensors, "bands": names, **config}
    spatial_width = _spatial_width(released, modalities, fusion)
    for modality, config in modalities.items():
        if config["kind"] == "vit":
            config["up_factor"] = _up_factor(released, modality, config, spatial_width)
    model = {
        "dtype": "float32",
        "remat": "none",
        "scan": True,
        "drop_path": 0.0,
        "modalities": modalities,
        "spatial_width": spatial_width,
        "fusion": fusion and _fusion_config(released, fusion, heads),
        "prototypes": None,
    }
    return ml_collections.ConfigDict(model)


def _swin_config(released: Released, part: Part, window: int | None) -> dict[str, Any]:
    width, _, patch_size, columns = released.shape(part, "patch_embed.projection.weight", 4)
    _check_square(released, part, patch_size, columns)
    scales = [f"stages.{i}.blocks.0.attn.w_msa.logit_scale" for i in range(len(part.depths))]
    return {
        "stem": "patch",
        "patch_size": patch_size,
        "width": width,
        "depths": part.depths,
        "heads": tuple(released.shape(part, name, 3)[0] for name in scales),
        "window": _window(released, part, window),
        "extra_norm_every": part.extra_norm_every,
        "mask_padding": False,  # the published modules attend to it
    }


def _window(released: Released, part: Part, chosen: int | None) -> int:
    """What the user says, else by the table of offsets, else as released."""
    tables = [name for name in part.names if name.endswith("relative_coords_table")]
    windows = {(released.shape(part, name, 4)[1] + 1) // 2 for name in tables}
    if len(windows) > 1:
        raise UserError(
            f'"{released.path}": stages have windows of {", ".join(map(str, sorted(windows)))}; a model of skyjax has'
            " one for all stages"
        )
    if chosen:
        return chosen
    window = windows.pop() if windows else DEFAULT_WINDOW
    for name in tables:
        found = np.asarray(released.tensors[part.prefix + name], np.float32)
        ours = skysense.buffer(name, window)
        if found.shape != ours.shape or np.abs(found - ours).max() > 1e-5:
            raise UserError(
                f'"{released.path}": "{part.prefix}{name}" is not that of a window of {window} trained from scratch;'
                " pretrained_window_sizes other than 0 are not supported"
            )
    return window


def _vit_config(released: Released, part: Part, heads: Mapping[str, int]) -> dict[str, Any]:
    width, _, patch_size, columns = released.shape(part, "patch_embed.projection.weight", 4)
    _check_square(released, part, patch_size, columns)
    places = released.shape(part, "pos_embed", 3)[1] - 1
    side = math.isqrt(max(places, 0))
    if side == 0 or side**2 != places:
        raise UserError(
            f'"{released.path}": "{part.prefix}pos_embed" has {places + 1} rows; they must be one and a square grid'
        )
    return {
        "patch_size": patch_size,
        "image_size": side * patch_size,
        "width": width,
        "depth": part.depths[0],
        "heads": _heads(part.ours, width, heads),
    }


def _fusion_config(released: Released, part: Part, heads: Mapping[str, int]) -> dict[str, Any]:
    width = released.shape(part, "porj_linear.weight", 2)[0]
    return {"width": width, "depth": part.depths[0], "heads": _heads("fusion", width, heads)}


def default_heads(width: int) -> int:
    """Heads of a plain transformer, which its weights do not tell: 64 features each, 4 below a width of 256."""
    return width // 64 if width >= 256 else 4


def _heads(part: str, width: int, heads: Mapping[str, int]) -> int:
    count = heads.get(part, heads.get("", default_heads(width)))
    if count < 1 or width % count or (part not in heads and "" not in heads and width >= 256 and width % 64):
        raise UserError(
            f"{part}: {count} heads do not share a width of {width}; say by --heads={part}:N how many it has"
        )
    return count


def _spatial_width(released: Released, modalities: Mapping[str, Any], fusion: Part | None) -> int:
    if fusion is not None:
        return released.shape(fusion, "porj_linear.weight", 2)[1]
    (modality, config), *_ = modalities.items()
    if config["kind"] == "swin_v2":
        return config["width"] * 2 ** (len(config["depths"]) - 1)
    head = released.find(f"up_heads.{modality}")
    if head is None:
        return config["width"]
    if DATES in released.tensors:
        return released.tensors[DATES].shape[-1]
    return released.shape(head, "decoder.0.weight", 4)[0] // DEFAULT_UP_FACTOR**2


def _up_factor(released: Released, modality: str, config: Mapping[str, Any], spatial_width: int) -> int | None:
    head = released.find(f"up_heads.{modality}")
    if head is None:
        if config["width"] != spatial_width:
            wanted = next(prefix for prefix, m in UP_HEADS.items() if m == modality)
            raise UserError(
                f'"{released.path}": {modality} has a width of {config["width"]} and the fusion takes {spatial_width};'
                f' "{wanted}decoder.0.weight" and ".bias", which go between, are missing'
            )
        return None
    rows = released.shape(head, "decoder.0.weight", 4)[0]
    factor = math.isqrt(rows // spatial_width)
    if factor == 0 or factor**2 * spatial_width != rows:
        raise UserError(
            f'"{released.path}": "{head.prefix}decoder.0.weight" has {rows} rows; they must be a square times the width'
            f" of the common grid, {spatial_width}"
        )
    return factor


def _check_square(released: Released, part: Part, rows: int, columns: int) -> None:
    if rows != columns:
        raise UserError(
            f'"{released.path}": "{part.prefix}patch_embed.projection.weight" has patches of {rows} x {columns};'
            " square ones are supported"
        )
