"""Multispectral and SAR sequences: what grows on a pixel, from its year. Labels are not used.

skyjax train --config=configs/time_series.py --workdir=runs/time_series
skyjax eval --checkpoint=runs/time_series --task=segmentation --dataset=runs/records/worldcereal --label=crop_type
One CPU core, 16 minutes, 3.1 GB. Crop types, pixel accuracy: 78.7 % (untrained 78.1 %, raw series 83.5 %); land cover:
5.4 points below untrained. It is not shown to learn the seasons from so little: docs/findings.md, "Time series".
"""

import pathlib

import ml_collections

# Data set -> share of the samples: every source whose images have dates. WorldCereal's two sites have by far the most
# dates and places; the last three have one date a place, which teaches the spatial encoders. Three have no files in
# data/sample: `skyjax data build --source=data/NAME.py --input=DIR --out=RECORDS/NAME` takes them from where they lie.
SHARES = {
    "worldcereal": 0.56,
    "worldcereal_pixels": 0.1,
    "biomassters": 0.08,
    "triples": 0.08,
    "worldcereal_monthly": 0.06,
    "pastis": 0.04,
    "cropharvest": 0.02,
    "benv2": 0.02,
    "bigearthnet": 0.02,
    "terramesh": 0.02,
}


def get_config(records: str = "runs/records") -> ml_collections.ConfigDict:
    """Every key that the run reads.

    Args:
      records: the folder of the data sets made by `skyjax data build`, each by the name of its builder. Those of SHARES
        that do not lie there are left out; where none does, all are named, so that the run says what it misses.
    """
    config = ml_collections.ConfigDict()
    config.records = records
    config.seed = 0
    config.steps = 1300
    config.batch_size = 32  # global, samples
    config.micro_batches = 1
    config.checkpoint = ml_collections.ConfigDict({"every": 200, "keep": 1, "keep_every": 0})
    config.eval = ml_collections.ConfigDict({"every": 0})
    config.log = ml_collections.ConfigDict({"every": 20})
    config.watchdog = ml_collections.ConfigDict({"seconds": 1800.0})

    config.data = _data(records)
    config.model = _model()
    config.objective = _objective()

    config.optimizer = ml_collections.ConfigDict(
        {
            "learning_rate": 2e-3,
            "final_learning_rate": 1e-5,
            "warmup_steps": 50,
            "weight_decay": 0.05,
            "b1": 0.9,
            "b2": 0.99,
            "clip": 1.0,
            "learning_rate_multipliers": (("heads/.*", 1.0), ("encoder/.*", 1.0)),
            "weight_decay_multipliers": (
                (r".*/(bias|scale|positions|dates|extra_token|class_token|logit_scale|temperature)", 0.0),
                (r".*/(kernel|classes)", 1.0),
            ),
            # A memory of 30 steps, then of 100: a teacher that stands still teaches what was known long ago.
            "teacher_momentum": 0.97,
            "final_teacher_momentum": 0.99,
        }
    )
    config.mesh = ml_collections.ConfigDict({"data": -1, "fsdp": 1, "tensor": 1})
    return config


def _sources(records: str) -> tuple[tuple[str, float], ...]:
    """Folders and their shares, which add up to one."""
    there = [name for name in SHARES if (pathlib.Path(records) / name / "dataset.json").is_file()] or list(SHARES)
    whole = sum(SHARES[name] for name in there)
    return tuple((f"{records}/{name}", SHARES[name] / whole) for name in there)


def _data(records: str) -> ml_collections.ConfigDict:
    return ml_collections.ConfigDict(
        {
            "sources": _sources(records),
            "threads": 2,
            "prefetch": 4,
            # Half of them under cloud. Fewer or more (10 and 8, 28 and 24) were no better in single runs of 220 steps.
            "dates": {"multispectral": 16, "sar": 12},
            # Crops of one site in one batch have the same dates: what tells them apart is what grows there.
            "same_dates": 32,
            # The views of a crop share no date: what they can agree on is the year, not the noise of a day
            # (docs/findings.md, "Time series").
            "dates_apart": True,
            # A cell is 2 x 2 pixels: fields are told apart by their year, not by their texture.
            "global_views": {"size": {"multispectral": 8, "sar": 8}, "area": None},  # native scale
            "local_views": {
                "count": 0,
                "size": {"multispectral": 4, "sar": 4},
                "area": None,
                "dates": {"multispectral": 4, "sar": 3},
            },
            "augment": {
                "date_jitter": 5,
                "drop_date": 0.0,
                "drop_modality": 0.1,
                "brightness": 0.0,
                "contrast": 0.0,
                "saturation": 0.0,
                "blur": 0.0,
                "solarize": 0.0,
                "speckle": 0.5,
                "gain": 1.0,
            },
        }
    )


def _model() -> ml_collections.ConfigDict:
    def vit(sensors: tuple[str, ...], bands: tuple[str, ...]) -> dict[str, object]:
        return {
            "kind": "vit",
            "sensors": sensors,
            "bands": bands,
            "patch_size": 2,
            "image_size": 8,
            "width": 48,
            "depth": 1,
            "heads": 3,
            "up_factor": 1,
        }

    return ml_collections.ConfigDict(
        {
            "dtype": "float32",
            "remat": "none",
            "scan": True,
            "drop_path": 0.0,
            "modalities": {
                "multispectral": vit(
                    ("sentinel2-l2a", "sentinel2-l1c"),
                    ("B02", "B03", "B04", "B05", "B06", "B07", "B08", "B8A", "B11", "B12"),
                ),
                "sar": vit(("sentinel1-grd",), ("VV", "VH")),
            },
            "spatial_width": 48,
            # The table of dates starts as large as what it is added to. At 0.02, the common start, fusion begins as a
            # mean over dates and stays one for as long as this run lasts.
            "fusion": {"width": 128, "depth": 1, "heads": 8, "date_stddev": 1.0},
            "prototypes": None,
        }
    )


def _objective() -> ml_collections.ConfigDict:
    return ml_collections.ConfigDict(
        {
            "kind": "infonce",
            "classes": 256,
            "head_norm": "batch",
            "head_hidden": 128,
            "head_bottleneck": 64,
            "student_temperature": 0.1,
            "teacher_temperature": (0.02, 0.04),
            "sinkhorn_iterations": 3,
            "weights": {"pixel": 1.0, "object": 0.0, "image": 0.0, "alignment": 0.1, "spread": 0.02},
            "infonce": {"temperature": 0.1, "negatives": 8},
            "chunk": 1024,
            "pixel": {"tokens": 8},
            "object": {"clusters": 4, "iterations": 3, "epsilon": 0.05},
            "alignment": {"temperature": 0.1, "bounds": (0.01, 1.0)},
            "spread": {"floor": 0.01},
            "rank_alarm": 2.0,
            "spread_alarm": 0.005,
        }
    )
