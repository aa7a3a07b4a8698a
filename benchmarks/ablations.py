"""What each term of the objective adds: rows of configs/time_series.py with one term more than the row before.

python benchmarks/ablations.py [--rows=image,pixel] [--seeds=0,1,2] [--workdir=runs/ablations]

Each row is trained with each seed, which sets initial parameters, order of the data, augmentation and the folds of the
probe. Then its frozen features are probed as `skyjax eval --task=segmentation` does. A cell, a row with a seed, is one
line of benchmarks/results/ablations.jsonl; what stands there is not run again. At the end the tables of
docs/ablations.md are written anew from that file. This script is a config too, so one cell can be repeated by hand:

skyjax train --config=benchmarks/ablations.py --config.row=pixel --config.seed=1 --workdir=runs/ablations/pixel-1
skyjax eval --checkpoint=runs/ablations/pixel-1 --task=segmentation --dataset=runs/records/worldcereal \
    --label=land_cover --seed=1
"""

import argparse
import dataclasses
import json
import pathlib
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, cast

import jax
import ml_collections
import numpy as np
import scipy.stats
from jax.sharding import Mesh

from skyjax.config import load_config, run_file
from skyjax.errors import UserError
from skyjax.evals import segmentation
from skyjax.evals.features import FUSED
from skyjax.evals.progress import track
from skyjax.evals.series import CONTEXT
from skyjax.models import skysense
from skyjax.parallel.sharding import replicated, state_shardings
from skyjax.sample import MODALITIES
from skyjax.train import loop, metrics
from skyjax.train.pretrained import Pretrained
from skyjax.train.step import make_step

ROOT = pathlib.Path(__file__).parents[1]
BASE = "configs/time_series.py"
RESULTS = ROOT / "benchmarks" / "results" / "ablations.jsonl"
DOCS = ROOT / "docs" / "ablations.md"
BEGIN, END = "<!-- tables of benchmarks/ablations.py -->", "<!-- end of the tables -->"

LEVELS = ("image", "pixel", "object")
WEIGHT = 1.0  # of each level, as in configs/pretrain_sample.py
# All cells together shall fit into half an hour of one core.
SHORT = {
    "steps": 120,
    "batch_size": 16,
    "data.threads": 1,
    "data.dates": {"multispectral": 6, "sar": 4},
    "data.same_dates": 16,  # all of a batch
    "checkpoint.every": 120,
    "optimizer.warmup_steps": 10,
    "optimizer.teacher_momentum": 0.95,  # at 0.99 half of the teacher, which is probed, would still be its start
}
# A small table: regions as in configs/skysense.py, fewer and narrower prototypes, since few regions are seen at all.
PROTOTYPES = {
    "regions": 64,
    "count": 8,
    "width": 64,
    "momentum": 0.996,
    "epsilon": 0.05,
    "iterations": 3,
    "frozen": False,
}
# Records and label of each probe, with its title in the tables.
PROBES = {
    ("worldcereal", "land_cover"): "land cover",
    ("worldcereal", "crop_type"): "crop type",
    ("worldcereal_pixels", "land_cover"): "field pixels",
}
METRICS = ("pixel accuracy", "macro-F1")
ENDS = ("accuracy", "low", "high")  # of a row of the probe: its value and its interval
CONFIDENCE = 0.95


@dataclasses.dataclass(frozen=True)
class Row:
    """One row of the ablation.

    Attributes:
      title: in the tables.
      modalities: that the model has.
      levels: of self-distillation that have a weight; none: the row is not trained.
      alignment: weight of the modalities' alignment; 0.1 in all configs.
      geo: whether the model has geo-prototypes.
    """

    title: str
    modalities: tuple[str, ...]
    levels: tuple[str, ...] = ()
    alignment: float = 0.0
    geo: bool = False

    @property
    def overrides(self) -> dict[str, Any]:
        """What differs from the base config, by its key."""
        return {
            **SHORT,
            "model.modalities": list(self.modalities),
            **{f"objective.weights.{level}": WEIGHT * (level in self.levels) for level in LEVELS},
            "objective.weights.alignment": self.alignment,
            **({"model.prototypes": PROTOTYPES} if self.geo else {}),
        }

    @property
    def terms(self) -> set[str]:
        """Names of the loss terms that this row claims to have, and no others."""
        streams = (*self.modalities, FUSED)
        pairs = {"alignment/" + "-".join(self.modalities)} if self.alignment else set()
        return {f"{level}/{stream}" for level in (*self.levels, "spread") for stream in streams} | pairs

    @property
    def features(self) -> tuple[str, ...]:
        """What is probed."""
        return (FUSED, CONTEXT) if self.geo else (FUSED,)


ONE, TWO = ("multispectral",), ("multispectral", "sar")
ROWS = {
    "untrained": Row("untrained, multispectral", ONE),
    "image": Row("image level only", ONE, LEVELS[:1]),
    "pixel": Row("+ pixel level", ONE, LEVELS[:2]),
    "object": Row("+ object level", ONE, LEVELS),
    "untrained_sar": Row("untrained, multispectral and SAR", TWO),
    "sar": Row("+ second modality (SAR)", TWO, LEVELS),
    "alignment": Row("+ cross-modal alignment", TWO, LEVELS, alignment=0.1),
    "geo": Row("+ geo-context", TWO, LEVELS, alignment=0.1, geo=True),
    "alignment_10": Row("+ alignment at ten times its weight, no geo-context", TWO, LEVELS, alignment=1.0),
}
# Which features of which row are compared, seed by seed, with those of another.
Side = tuple[str, str]
PAIRS: tuple[tuple[Side, Side], ...] = (
    (("image", FUSED), ("untrained", FUSED)),
    (("pixel", FUSED), ("image", FUSED)),
    (("object", FUSED), ("pixel", FUSED)),
    (("sar", FUSED), ("object", FUSED)),
    (("sar", FUSED), ("untrained_sar", FUSED)),
    (("untrained_sar", FUSED), ("untrained", FUSED)),
    (("alignment", FUSED), ("sar", FUSED)),
    (("geo", FUSED), ("alignment", FUSED)),
    (("geo", CONTEXT), ("geo", FUSED)),
    (("geo", CONTEXT), ("alignment", FUSED)),
    (("alignment_10", FUSED), ("sar", FUSED)),
)


def get_config(row: str = "image") -> ml_collections.ConfigDict:
    """The base config with what `row` overrides."""
    if row not in ROWS:
        raise UserError(f'config: row "{row}" is not known; it is one of {", ".join(ROWS)}')
    config = run_file(ROOT / BASE, "config").get_config()
    for key, value in ROWS[row].overrides.items():
        *parents, last = key.split(".")
        node = config
        for parent in parents:
            node = node[parent]
        if key == "model.modalities":
            for absent in set(MODALITIES) & set(node[last]) - set(value):
                del node[last][absent]
        else:
            node[last] = value
    return config


def run_cell(name: str, seed: int, workdir: pathlib.Path) -> dict[str, Any]:
    """Trains and probes one row with one seed.

    Returns:
      A line of the results: row, seed, config, overrides, commit, versions, seconds, the last logged losses, probes.
    """
    row = ROWS[name]
    config = load_config(__file__, [f"row={name}", f"seed={seed}"])
    start = _clocks()
    last: dict[str, float] = {}
    if row.levels:
        loop.jit_step = jit_step  # type: ignore[assignment]
        code = loop.train(config, workdir)
        if code != loop.EXIT_DONE:
            raise SystemExit(code)
        lines = metrics.read(workdir / metrics.FILE)
        check_terms(row, lines)
        last = {key: value for key, value in lines[-1].items() if key.startswith(("step", "loss", "rank", "spread"))}
        model = Pretrained.load(workdir)
    else:
        # Put where a checkpoint's parameters are, so that the encoder is compiled once for both.
        params = jax.device_put(skysense.init(config.model, jax.random.key(seed)), jax.local_devices()[0])
        model = Pretrained(config, params, loop.statistics_table(config.model), step=0)
    trained = _clocks()
    probes = [probe(model, folder, label, kind, seed) for folder, label in PROBES for kind in row.features]
    versions = loop.versions()
    return {
        "row": name,
        "seed": seed,
        "config": BASE,
        "overrides": row.overrides,
        "commit": versions.pop("git", ""),
        "versions": {package: versions[package] for package in ("jax", "jaxlib", "python", "hardware")},
        "seconds": {"train": _seconds(start, trained), "probes": _seconds(trained, _clocks())},
        "last": last,
        "probes": probes,
    }


class _WithSeed:
    """A config whose seed is the argument of a compiled step."""

    def __init__(self, config: ml_collections.ConfigDict, seed: Any):
        self._config, self.seed = config, seed

    def __getattr__(self, name: str) -> Any:
        return getattr(self._config, name)


_steps: dict[str, Callable[..., Any]] = {}


def jit_step(config: ml_collections.ConfigDict, statistics: Any, state: Any, mesh: Mesh) -> Callable[..., Any]:
    """`loop.jit_step` with the seed as an argument: as a constant, it would have each seed compile its own step.

    Compiling takes longer than the training itself, and the seeds of a row differ in nothing else.
    """
    if config.row not in _steps:
        arrays = {m: (np.array(t["mean"], np.float32), np.array(t["std"], np.float32)) for m, t in statistics.items()}
        _steps[config.row] = jax.jit(
            lambda state, batch, seed: make_step(cast(Any, _WithSeed(config, seed)), arrays)(state, batch),
            donate_argnums=0,
            out_shardings=(state_shardings(state, mesh), replicated(mesh)),
        )
    step, seed = _steps[config.row], np.uint32(config.seed)
    return lambda state, batch: step(state, batch, seed)


def check_terms(row: Row, lines: Sequence[Mapping[str, Any]]) -> None:
    """Holds the logged loss terms to those that the row claims, each with a value at some step.

    Raises:
      ValueError: a term is missing, never had a value, or is one too many.
    """
    found = {key.removeprefix("loss/") for line in lines for key, value in line.items() if _is_term(key, value)}
    if found != row.terms:
        raise ValueError(
            f"{row.title}: loss terms differ from what the row says; missing: {sorted(row.terms - found)},"
            f" too many: {sorted(found - row.terms)}"
        )


def _is_term(key: str, value: Any) -> bool:
    return key.startswith("loss/") and value is not None


def probe(model: Pretrained, folder: str, label: str, kind: str, seed: int) -> dict[str, Any]:
    """The segmentation probe of one kind of features: metric -> value and interval over blocks, as shares of 1."""
    options = segmentation.Options(f"runs/records/{folder}", label=label, modality=kind, seed=seed, baselines=False)
    result = segmentation.compare(model, model, options)
    return {
        "dataset": folder,
        "label": label,
        "features": kind,
        "pixels": result["sizes"]["test"],
        "blocks": result["blocks"],
        "classes": result["classes"],
        "scores": {
            row["method"]: [round(row[end], 5) for end in ("accuracy", "low", "high")] for row in result["rows"]
        },
    }


def _clocks() -> tuple[float, float]:
    return time.monotonic(), time.process_time()


def _seconds(start: tuple[float, float], end: tuple[float, float]) -> dict[str, float]:
    return {name: round(b - a, 1) for name, a, b in zip(("wall", "processor"), start, end, strict=True)}


# Tables


def read_results(path: pathlib.Path) -> list[dict[str, Any]]:
    """The cells that are done; none where the file is missing."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def tables(cells: Iterable[Mapping[str, Any]]) -> str:
    """Two tables in Markdown: each row's scores, and the differences of rows, seed by seed."""
    scores: dict[tuple[Side, str, str], dict[int, float]] = {}
    for cell in cells:
        for each in cell["probes"]:
            title = PROBES[each["dataset"], each["label"]]
            for metric in METRICS:
                key = ((cell["row"], each["features"]), title, metric)
                scores.setdefault(key, {})[cell["seed"]] = 100 * each["scores"][metric][0]
    columns = [(title, metric) for title in PROBES.values() for metric in METRICS]
    head = [f"{title}, {metric}" for title, metric in columns]
    sides = [(name, kind) for name, row in ROWS.items() for kind in row.features]
    rows = [
        [title_of(side), *(_mean_std(list(scores.get((side, *column), {}).values())) for column in columns)]
        for side in sides
    ]
    differences = [
        [
            f"{title_of(side)} − {title_of(other)}",
            *(difference(scores.get((side, *column), {}), scores.get((other, *column), {})) for column in columns),
        ]
        for side, other in PAIRS
    ]
    return "\n\n".join([_markdown(["row", *head], rows), _markdown(["difference, paired by seed", *head], differences)])


def title_of(side: Side) -> str:
    """A row's title, with the kind of features where it is not the fused ones."""
    name, kind = side
    return ROWS[name].title + ("" if kind == FUSED else f", {kind} probed")


def _mean_std(values: Sequence[float]) -> str:
    if len(values) < 2:
        return "–"
    return f"{statistics.mean(values):.1f} ± {statistics.stdev(values):.1f}"


def difference(first: Mapping[int, float], second: Mapping[int, float]) -> str:
    """Mean and standard deviation of the differences by seed; in bold where they are told apart.

    Told apart: the 95 % interval of Student's t for the mean of paired differences leaves out zero.
    """
    seeds = sorted(set(first) & set(second))
    if len(seeds) < 2:
        return "–"
    one, other = [first[seed] for seed in seeds], [second[seed] for seed in seeds]
    apart = [a - b for a, b in zip(one, other, strict=True)]
    text = f"{statistics.mean(apart):+.1f} ± {statistics.stdev(apart):.1f}"
    low, high = scipy.stats.ttest_rel(one, other).confidence_interval(CONFIDENCE)
    return f"**{text}**" if low > 0 or high < 0 else text


def _markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows))


def write_tables(path: pathlib.Path, text: str) -> None:
    """Puts the tables between the two marks of a document.

    Raises:
      UserError: the marks are not there.
    """
    document = path.read_text()
    before, begin, rest = document.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise UserError(f'"{path}" has no lines "{BEGIN}" and "{END}" for the tables to stand between')
    path.write_text(f"{before}{BEGIN}\n\n{text}\n\n{END}{after}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default=",".join(ROWS))
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--workdir", type=pathlib.Path, default=pathlib.Path("runs/ablations"))
    arguments = parser.parse_args()
    # The encoders of the probes are the same for all rows of the same modalities.
    jax.config.update("jax_compilation_cache_dir", str((arguments.workdir / "compiled").resolve()))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    done = {(cell["row"], cell["seed"]) for cell in read_results(RESULTS)}
    # All rows of one seed before the next seed: a run that is broken off still has whole columns to compare.
    cells = [(name, int(seed)) for seed in arguments.seeds.split(",") for name in arguments.rows.split(",")]
    cells = [cell for cell in cells if cell not in done]
    RESULTS.parent.mkdir(exist_ok=True)
    for name, seed in track(cells, len(cells), "cells"):
        line = run_cell(name, seed, arguments.workdir / f"{name}-{seed}")
        with RESULTS.open("a") as file:
            file.write(json.dumps(line) + "\n")
    write_tables(DOCS, tables(read_results(RESULTS)))
    print(f"{len(read_results(RESULTS))} cells in {RESULTS}; tables in {DOCS}")


if __name__ == "__main__":
    main()
