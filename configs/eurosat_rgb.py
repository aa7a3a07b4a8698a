"""One small encoder of RGB images, without labels, from a folder of 6,000 EuroSAT images.

skyjax train --config=configs/eurosat_rgb.py --workdir=runs/eurosat_rgb --config.path=DIR
skyjax eval --checkpoint=runs/eurosat_rgb --task=knn --dataset=DIR --train-per-class=300
One CPU core, 79 minutes, 2 GB. kNN 20 85.7 % (untrained 62.8, image statistics 72.4, random convolutional features
72.0), linear 87.9 % (71.4, 81.8, 88.1); 3,000 test images, 95 % intervals of 1.2 points to either side. What was tried:
docs/ablations.md.
"""

import ml_collections


def get_config(path: str = "data/sample/eurosat_rgb") -> ml_collections.ConfigDict:
    """Every key that the run reads; `path`: a folder of images, or of records made by `skyjax data build`."""
    config = ml_collections.ConfigDict()
    config.path = path
    config.seed = 0
    config.steps = 4500  # 96 times 6,000 images
    config.batch_size = 128
    config.micro_batches = 1
    config.checkpoint = ml_collections.ConfigDict({"every": 500, "keep": 2, "keep_every": 0})
    config.eval = ml_collections.ConfigDict({"every": 0})
    config.log = ml_collections.ConfigDict({"every": 20})
    config.watchdog = ml_collections.ConfigDict({"seconds": 1800.0})

    config.data = _data(path)
    config.model = _model()
    config.objective = _objective()

    config.optimizer = ml_collections.ConfigDict(
        {
            "learning_rate": 2e-3,
            "final_learning_rate": 1e-5,
            "warmup_steps": 250,
            "weight_decay": 0.04,
            "b1": 0.9,
            "b2": 0.99,  # the batch is small and the run short: 100 steps of memory
            "clip": 3.0,
            "learning_rate_multipliers": (("heads/.*", 1.0), ("encoder/.*", 1.0)),
            "weight_decay_multipliers": (
                (r".*/(bias|scale|positions|dates|extra_token|class_token|logit_scale|temperature)", 0.0),
                (r".*/(kernel|classes)", 1.0),
            ),
            # A teacher that stands still teaches what was known long ago: 100 steps of memory, 1,000 at the end.
            "teacher_momentum": 0.99,
            "final_teacher_momentum": 0.999,
        }
    )
    config.mesh = ml_collections.ConfigDict({"data": -1, "fsdp": 1, "tensor": 1})
    return config


def _data(path: str) -> ml_collections.ConfigDict:
    return ml_collections.ConfigDict(
        {
            "sources": ((path, 1.0),),
            "threads": 1,  # a batch takes a tenth of a step
            "prefetch": 4,
            "dates": {"optical": 1},
            "global_views": {"size": {"optical": 48}, "area": (0.15, 1.0)},  # of 64 pixels
            "local_views": {"count": 0, "size": {"optical": 24}, "area": (0.05, 0.15), "dates": {"optical": 1}},
            "augment": {
                "date_jitter": 0,
                "drop_date": 0.0,
                "drop_modality": 0.0,
                # Half of what photographs take: colour tells these classes apart (docs/findings.md).
                "brightness": 0.3,
                "band_gain": 0.05,
                "contrast": 0.3,
                "saturation": 0.3,
                "blur": 0.3,
                "solarize": 0.1,
                "speckle": 0.0,
                "gain": 0.0,
            },
        }
    )


def _model() -> ml_collections.ConfigDict:
    return ml_collections.ConfigDict(
        {
            "dtype": "float32",
            "remat": "none",
            "scan": True,
            "drop_path": 0.0,
            "modalities": {
                "optical": {
                    "kind": "vit",
                    "sensors": ("rgb",),
                    "bands": ("red", "green", "blue"),
                    # Of these images, not of photographs, as sensors.toml has them for RGB:
                    # green and blue would come in at half their spread (docs/findings.md).
                    "statistics": {"rgb": {"mean": (87.7, 97.2, 104.2), "std": (51.2, 34.6, 29.5)}},
                    "stem": "conv",  # or "patch"
                    "patch_size": 8,
                    "image_size": 48,
                    "width": 128,
                    "depth": 3,
                    "heads": 4,
                    "up_factor": None,  # a token is a cell
                },
            },
            "spatial_width": 128,
            "fusion": None,  # one modality of one date
            "prototypes": None,  # no positions
        }
    )


def _objective() -> ml_collections.ConfigDict:
    return ml_collections.ConfigDict(
        {
            "kind": "infonce",  # or "dino", which starts more slowly (docs/ablations.md)
            "classes": 512,  # kind "dino"
            "head_norm": "batch",
            "head_hidden": 512,
            "head_bottleneck": 128,
            "student_temperature": 0.1,  # kind "dino", DINO's; likewise the next two
            "teacher_temperature": (0.04, 0.04),
            "sinkhorn_iterations": 3,
            # Image level alone: a scene is one class, and nothing here asks for places.
            "weights": {"pixel": 0.0, "object": 0.0, "image": 1.0, "alignment": 0.0, "spread": 0.0},
            "infonce": {"temperature": 0.2, "negatives": 8},  # an image has 2 rows, so 254 negatives
            "chunk": 1024,
            "pixel": {"tokens": 8},
            "object": {"clusters": 4, "iterations": 3, "epsilon": 0.05},
            # Where the learned temperature starts: SimCLR's; and its bounds, CLIP's.
            "alignment": {"temperature": 0.1, "bounds": (0.01, 1.0)},
            "spread": {"floor": 0.01},  # nearer neighbours pull no harder: a duplicate stays finite
            "rank_alarm": 2.0,
            "spread_alarm": 0.005,
        }
    )
