"""The whole framework on real data, small: optical, multispectral and SAR sequences of data/sample.

make pretrain, or: skyjax train --config=configs/pretrain_sample.py --workdir=runs/pretrain_sample
Two CPU cores, 7 minutes, 4.8 GB. On data/sample/eurosat_rgb: kNN 20 72.2 % (untrained 57.8 %), linear 74.4 % (61.4 %);
image statistics 70.8 and 82.2 %. Minutes are a test of the whole, not a foundation model.
"""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
    """Every key that the run reads, with its reason where the number is not plain."""
    config = ml_collections.ConfigDict()
    config.seed = 0
    config.steps = 450
    config.batch_size = 32  # global, samples
    config.micro_batches = 1  # gradient accumulation: batch_size / micro_batches samples at a time
    config.checkpoint = ml_collections.ConfigDict({"every": 100, "keep": 2, "keep_every": 0})
    config.eval = ml_collections.ConfigDict({"every": 0})
    config.log = ml_collections.ConfigDict({"every": 5})
    config.watchdog = ml_collections.ConfigDict({"seconds": 1800.0})  # without a step: the run hangs, exit 124

    config.data = _data()
    config.model = _model()
    config.objective = _objective()

    config.optimizer = ml_collections.ConfigDict(
        {
            "learning_rate": 1.5e-3,
            "final_learning_rate": 1e-5,
            "warmup_steps": 40,
            "weight_decay": 0.05,
            "b1": 0.9,
            "b2": 0.99,
            "clip": 1.0,  # global norm of the gradient
            # Regular expression over the parameter's path -> multiplier. Every parameter matches exactly one.
            "learning_rate_multipliers": (("heads/.*", 1.0), ("encoder/.*", 1.0)),
            "weight_decay_multipliers": (
                (r".*/(bias|scale|positions|dates|extra_token|class_token|logit_scale|temperature)", 0.0),
                (r".*/(kernel|classes)", 1.0),
            ),
            # EMA, cosine: a memory of 30 steps, then of 200. DINO's 0.996 would remember half of this run.
            "teacher_momentum": 0.97,
            "final_teacher_momentum": 0.995,
        }
    )
    config.mesh = ml_collections.ConfigDict({"data": -1, "fsdp": 1, "tensor": 1})
    return config


def _data() -> ml_collections.ConfigDict:
    return ml_collections.ConfigDict(
        {
            # Folders made by `skyjax data build`, with their share of the samples.
            "sources": (
                ("runs/records/eurosat", 0.7),
                ("runs/records/benv2", 0.1),
                ("runs/records/worldcereal", 0.06),
                ("runs/records/triples", 0.05),
                ("runs/records/pastis", 0.04),
                ("runs/records/treesatai", 0.03),
                ("runs/records/flair2", 0.02),
            ),
            "threads": 2,
            "prefetch": 4,  # batches
            # Fixed number of dates a view: drawn from the valid ones, masked where there are fewer.
            "dates": {"optical": 1, "multispectral": 3, "sar": 3},
            "global_views": {
                "size": {"optical": 64, "multispectral": 8, "sar": 8},  # pixels a side
                "area": (0.3, 1.0),  # share of the site
            },
            "local_views": {
                "count": 2,
                "size": {"optical": 32, "multispectral": 4, "sar": 4},
                "area": (0.1, 0.3),
                "dates": {"optical": 1, "multispectral": 2, "sar": 2},
            },
            "augment": {
                "date_jitter": 5,  # days, uniform, student only
                "drop_date": 0.2,  # student only
                "drop_modality": 0.2,
                # Weak: colour is a measurement here, and tells classes apart.
                "brightness": 0.1,
                "contrast": 0.15,
                "saturation": 0.15,
                "blur": 0.3,  # probability
                "solarize": 0.0,  # probability
                "speckle": 0.5,  # dB, standard deviation, SAR
                "gain": 1.0,  # dB, SAR
            },
        }
    )


def _model() -> ml_collections.ConfigDict:
    return ml_collections.ConfigDict(
        {
            "dtype": "float32",  # of the compute; parameters are float32
            "remat": "none",  # or "full": recompute each block in the backward pass
            "scan": True,
            "drop_path": 0.05,
            "modalities": {
                "optical": {
                    "kind": "swin_v2",
                    "sensors": ("rgb", "aerial"),
                    "bands": ("red", "green", "blue"),
                    # RGB here is EuroSAT, whose green and blue have half the spread of photographs (docs/findings.md).
                    "statistics": {"rgb": {"mean": (87.7, 97.2, 104.2), "std": (51.2, 34.6, 29.5)}},
                    "stem": "patch",  # as published; or "conv"
                    "patch_size": 4,
                    "width": 48,
                    "depths": (2, 2, 2),
                    "heads": (2, 4, 8),
                    "window": 4,
                    "extra_norm_every": 6,
                },
                "multispectral": {
                    "kind": "vit",
                    "sensors": ("sentinel2-l2a",),
                    "bands": ("B02", "B03", "B04", "B05", "B06", "B07", "B08", "B8A", "B11", "B12"),
                    "patch_size": 2,
                    "image_size": 8,  # of the learned position embedding; resized for other sizes
                    "width": 64,
                    "depth": 3,
                    "heads": 4,
                    "up_factor": 1,  # up-head: one token -> up_factor x up_factor cells
                },
                "sar": {
                    "kind": "vit",
                    "sensors": ("sentinel1-grd",),
                    "bands": ("VV", "VH"),
                    "patch_size": 2,
                    "image_size": 8,
                    "width": 64,
                    "depth": 3,
                    "heads": 4,
                    "up_factor": 1,
                },
            },
            "spatial_width": 192,  # of every modality after its up-head; optical's last stage has it by itself
            "fusion": {"width": 128, "depth": 2, "heads": 4},  # or None with one modality: the mean over dates
            # Or {"regions": 64, "count": 100, "width": 512, "momentum": 0.996, "epsilon": 0.05, "iterations": 3,
            # "frozen": False}: what was seen in each region of the Earth (docs/fidelity.md, "Geo-prototypes").
            "prototypes": None,
        }
    )


def _objective() -> ml_collections.ConfigDict:
    return ml_collections.ConfigDict(
        {
            "kind": "infonce",  # or "dino": positives only, which needs longer than minutes (docs/findings.md)
            "classes": 256,  # kind "dino": 8 for each sample of the batch; DINO has 64, for a wider encoder
            "head_norm": "batch",  # or "none", as published descriptions have it; see docs/findings.md
            "head_hidden": 128,  # as wide as the fused features
            "head_bottleneck": 64,  # half of it; DINO's heads narrow too, from 2048 to 256
            "student_temperature": 0.1,  # kind "dino", as are the next two: DINO's
            # Start, end; cosine. Sharper than DINO's 0.04 to 0.07, which is for thousands of classes; not shown to be
            # better (docs/findings.md).
            "teacher_temperature": (0.02, 0.04),
            "sinkhorn_iterations": 3,  # rounds of balancing, also of the clusters: SwAV's and DINOv2's; 0 is none
            # Levels alike, as in the paper; alignment: one description of the paper has 0.1; spread: a fifth of
            # DINOv2's 0.1, since InfoNCE's negatives keep features apart too.
            "weights": {"pixel": 1.0, "object": 1.0, "image": 1.0, "alignment": 0.1, "spread": 0.02},
            # kind "infonce": MoCo v2's temperature; 8 rows of each of the 31 other samples bound the cost of a row.
            "infonce": {"temperature": 0.2, "negatives": 8},
            "chunk": 1024,  # rows of a sample scored at a time; more are recomputed in the backward pass. Memory alone
            "pixel": {"tokens": 8},  # places scored a pair of views and date: half of the 4 x 4 of a view
            # Clusters: a quarter of the places each; rounds: as of balancing; epsilon, the balancing's: SwAV's.
            "object": {"clusters": 4, "iterations": 3, "epsilon": 0.05},
            # Where the learned temperature starts: SimCLR's; and its bounds, CLIP's.
            "alignment": {"temperature": 0.1, "bounds": (0.01, 1.0)},
            "spread": {"floor": 0.01},  # nearer neighbours pull no harder: a duplicate stays finite
            # Warn when the effective rank of the fused features falls below. 1 is one point; sound runs had 5 to 8.
            "rank_alarm": 2.0,
            "spread_alarm": 0.005,  # likewise their spread, which is 1 / sqrt(width) = 0.09 where they point everywhere
        }
    )
