"""Multispectral and SAR sequences: what grows on a pixel, from its year. Labels are not used.

skyjax train --config=configs/time_series.py --workdir=runs/time_series
skyjax eval --checkpoint=runs/time_series --task=segmentation --dataset=runs/records/worldcereal --label=crop_type
One CPU core, 2 minutes of its time, 2.3 GB. Crop types, pixel accuracy: 75.0 % (untrained 77.5 %, raw series 83.5 %):
minutes do not teach it the seasons; what was tried stands in docs/findings.md, "Time series".
"""

import ml_collections

# Data set -> share of the samples. The two agricultural sites have by far the most dates and places.
SHARES = {
    "worldcereal": 0.7,
    "worldcereal_pixels": 0.1,
    "pastis": 0.1,
    "triples": 0.1,
}


def get_config(records: str = "runs/records") -> ml_collections.ConfigDict:
    """Every key that the run reads; `records` is the folder of the data sets made by `skyjax data build`."""
    config = ml_collections.ConfigDict()
    config.seed = 0
    config.steps = 160
    config.batch_size = 32  # global, samples
    config.micro_batches = 1
    config.checkpoint = ml_collections.ConfigDict({"every": 80, "keep": 1, "keep_every": 0})
    config.eval = ml_collections.ConfigDict({"every": 0})
    config.log = ml_collections.ConfigDict({"every": 10})
    config.watchdog = ml_collections.ConfigDict({"seconds": 1800.0})

    config.data = _data(records)
    config.model = _model()
    config.objective = _objective()

    config.optimizer = ml_collections.ConfigDict(
        {
            "learning_rate": 2e-3,
            "final_learning_rate": 1e-5,
            "warmup_steps": 30,
            "weight_decay": 0.05,
            "b1": 0.9,
            "b2": 0.99,
            "clip": 1.0,
            # The table of days starts fifty times smaller than what it is added to: at the common rate a run of minutes
            # ends before the fused features know one day from another (docs/findings.md, "Time series").
            "learning_rate_multipliers": (
                ("heads/.*", 1.0),
                ("encoder/(?!fusion/dates).*", 1.0),
                ("encoder/fusion/dates", 20.0),
            ),
            "weight_decay_multipliers": (
                (r".*/(bias|scale|positions|dates|extra_token|class_token|logit_scale|temperature)", 0.0),
                (r".*/(kernel|classes)", 1.0),
            ),
            # With 0.99, cosine to 1, a third of the teacher would still be where it started after 220 steps.
            "teacher_momentum": 0.95,
            "final_teacher_momentum": 0.99,
        }
    )
    config.mesh = ml_collections.ConfigDict({"data": -1, "fsdp": 1, "tensor": 1})
    return config


def _data(records: str) -> ml_collections.ConfigDict:
    return ml_collections.ConfigDict(
        {
            "sources": tuple((f"{records}/{name}", share) for name, share in SHARES.items()),
            "threads": 2,
            "prefetch": 4,
            "dates": {"multispectral": 8, "sar": 6},
            # Crops of one site in one batch have the same dates: what tells them apart is what grows there.
            "same_dates": 32,
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
                "drop_date": 0.5,
                "drop_modality": 0.2,
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
    def vit(sensor: str, bands: tuple[str, ...]) -> dict[str, object]:
        return {
            "kind": "vit",
            "sensors": (sensor,),
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
                    "sentinel2-l2a", ("B02", "B03", "B04", "B05", "B06", "B07", "B08", "B8A", "B11", "B12")
                ),
                "sar": vit("sentinel1-grd", ("VV", "VH")),
            },
            "spatial_width": 48,
            "fusion": {"width": 128, "depth": 1, "heads": 8},
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
