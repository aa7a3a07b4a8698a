"""What the chips of a compiled step send each other, as text: how many collectives of each kind, and their bytes.

Small configs are compiled by every test run, SkySense at full size by `make goldens full`. libtpu compiles for
chips that are not here; counts are those of its version, which the text names.
"""

import importlib.metadata
import pathlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import ml_collections
import shipped

from skyjax.config import load_config
from skyjax.parallel import hlo, topology
from skyjax.parallel.ahead import compile_ahead
from skyjax.parallel.mesh import make_mesh
from skyjax.train import plan

FOLDER = pathlib.Path(__file__).parent / "collectives"

# What makes configs/skysense.py small but leaves stacks of layers large enough to be split over fsdp.
_SMALL = {
    "size": "tiny",
    "batch_size": 16,
    "data.dates.multispectral": 2,
    "data.dates.sar": 2,
    "data.global_views.size.optical": 64,
    "data.global_views.size.multispectral": 8,
    "data.global_views.size.sar": 8,
    "data.local_views.count": 0,
    "model.prototypes.regions": 16,
    "objective.pixel.tokens": 4,
    "objective.object.clusters": 2,
}


class Case(NamedTuple):
    """A config and the topology that it is compiled for."""

    config: Callable[[], ml_collections.ConfigDict]
    topology: str
    slices: int = 1


def sequences() -> ml_collections.ConfigDict:
    """Two sequences, their fusion and geo-prototypes; the state is shared by four chips."""
    return _small(("multispectral", "sar"), {"data": 1, "fsdp": 4, "tensor": 1})


def optical() -> ml_collections.ConfigDict:
    """Swin-V2 alone; each pair of chips shares the state and another pair the widths."""
    return _small(("optical",), {"data": 1, "fsdp": 2, "tensor": 2})


def words() -> ml_collections.ConfigDict:
    """Images and captions: text tower, decoder, and every comparison of the two, in turns of 4 rows a chip."""
    overrides = ["modalities=optical", "vocabulary=1024", "batch_size=64", "objective.text.chunk=4"]
    config = load_config(shipped.ROOT / "configs" / "image_text.py", overrides)
    config.mesh.update({"data": 2, "fsdp": 2, "tensor": 1})
    return config


def full(name: str) -> Callable[[], ml_collections.ConfigDict]:
    """SkySense at full size with the mesh rules of a topology."""
    return lambda: shipped.load("skysense_huge", name)


def image_text() -> ml_collections.ConfigDict:
    """Single images of 224 pixels and their captions, at base size and a batch of 32,768."""
    return load_config(shipped.ROOT / "configs" / "image_text.py", ["size=base", "modalities=optical"])


SMALL = {
    "sequences": Case(sequences, "v5e:2x2"),
    "optical": Case(optical, "v5p:2x2x1"),
    "words": Case(words, "v5e:2x2"),
}
FULL = {
    "skysense_huge_v5e-16x16": Case(full("v5e:16x16"), "v5e:16x16"),
    "skysense_huge_v5e-16x16-2": Case(full("v5e:16x16*2"), "v5e:16x16", 2),
    "skysense_huge_v5p-4x4x8": Case(full("v5p:4x4x8"), "v5p:4x4x8"),
    "image_text_base_v5e-16x16": Case(image_text, "v5e:16x16"),
}


def compiled(case: Case, lower: Callable[..., Any] = plan.lower) -> str:
    """Compiles a case: its text. `lower` may make a mistake."""
    config, chips = case.config(), topology.describe(case.topology, case.slices)
    mesh = make_mesh(config.mesh, chips)
    planned = compile_ahead(lower, (config, case.topology, case.slices), say=lambda _: None)
    program = hlo.analyse(planned.text, [topology.slice_of(chip) for chip in mesh.devices.flat])
    return text(dict(mesh.shape), case, program)


def text(mesh: Mapping[str, int], case: Case, program: hlo.Program) -> str:
    """Collectives of a step by kind: all runs of each, and bytes that a chip sends."""
    title = f"{case.topology}{f' x {case.slices} slices' if case.slices > 1 else ''}"
    lines = [
        f"{title}, {', '.join(f'{axis} {size}' for axis, size in mesh.items())}: what crosses chips in a step.",
        f"Written by `make goldens` with libtpu {version()}.",
        "",
        f"{'kind':20}{'count':>8}{'ICI bytes':>20}{'DCN bytes':>20}",
        *(
            f"{kind:20}{traffic.count:8,}{traffic.ici_bytes:20,}{traffic.dcn_bytes:20,}"
            for kind, traffic in program.collectives.items()
        ),
        # Kernels without a declared cost are unknown too; they send nothing.
        *(f"not counted to its end: {name}" for name in program.unknown if "declared cost" not in name),
    ]
    return "\n".join(lines) + "\n"


def version() -> str:
    """Of libtpu."""
    return importlib.metadata.version("libtpu")


def file(name: str) -> pathlib.Path:
    """Where the accepted text of a case lies."""
    return FOLDER / f"{name}.txt"


def _small(modalities: tuple[str, ...], mesh: Mapping[str, int]) -> ml_collections.ConfigDict:
    overrides = [f"{key}={value}" for key, value in _SMALL.items()]
    config = load_config(shipped.ROOT / "configs" / "skysense.py", overrides)
    with config.unlocked():
        config.mesh.update(mesh)
        for modality in set(config.model.modalities) - set(modalities):
            del config.model.modalities[modality]
        if len(modalities) == 1:
            config.model.fusion = config.model.prototypes = None
    return config
