"""SkySense's encoder (CVPR 2024) at full size and its smaller family, with our pre-training of it.

skyjax train --config=configs/skysense.py --workdir=runs/skysense [--config.size=tiny|small|base|large|huge] [--dry-run]
Data: sites that you have to build (docs/own_data.md). Hardware: the paper had 80 A100 of 80 GB for 13 days. Here huge
keeps 30 GB of state, spread over 16 chips or more; tiny runs on a laptop. Sizes and how to try it: docs/models.md.
Nobody has trained it with skyjax yet, so there is no result to expect; whether the batch fits has not been measured.
"paper" marks what the paper or its published modules say; every other number is our choice (docs/fidelity.md).
"""

from typing import Any, NamedTuple

import ml_collections

from skyjax.errors import UserError


class Size(NamedTuple):
    """What grows: Swin-V2 and ViT of the usual sizes, a fusion as large as a ViT, prototypes half as wide, heads."""

    swin: tuple[int, tuple[int, ...], tuple[int, ...]]  # width, depths, heads a stage
    vit: tuple[int, int, int]  # width, depth, heads
    head: tuple[int, int, int]  # hidden, bottleneck, classes
    fsdp: int  # chips that share one copy of the state


SIZES = {
    "tiny": Size((96, (2, 2, 6, 2), (3, 6, 12, 24)), (192, 12, 3), (512, 128, 4096), 1),
    "small": Size((96, (2, 2, 18, 2), (3, 6, 12, 24)), (384, 12, 6), (1024, 256, 8192), 1),
    "base": Size((128, (2, 2, 18, 2), (4, 8, 16, 32)), (768, 12, 12), (2048, 256, 16_384), 1),
    "large": Size((192, (2, 2, 18, 2), (6, 12, 24, 48)), (1024, 24, 16), (2048, 256, 32_768), 8),
    "huge": Size((352, (2, 2, 18, 2), (8, 16, 32, 64)), (1024, 24, 16), (2048, 256, 32_768), 16),  # paper
}

# Names of topologies, several slices as NAME*SLICES -> what is set for them, the first that fits (docs/scale.md). The
# paper's 240 samples do not go evenly on 2^n chips, so 256, and one a chip where there are more. v6e's HBM is slow for
# its products: fusion's places go in turns that stay in VMEM. Where HBM is large, what projections give is kept.
_TURNS = {"batch_size": 256, "model.fusion.parts": 4}
_KEPT = {"batch_size": 256, "model.remat": "dots"}
MESH_RULES = (
    (r"v5e:16x16\*2", {"batch_size": 512}),
    (r"v5e:16x16\*4", {"batch_size": 1024}),
    (r"v5e:.*", {"batch_size": 256}),
    (r"v6e:16x16\*2", _TURNS | {"batch_size": 512}),
    (r"v6e:16x16\*4", _TURNS | {"batch_size": 1024}),
    (r"v6e:8x8", _TURNS | {"model.fusion.parts": 16}),
    (r"v6e:.*", _TURNS),
    (r"v5p:8x8x8|tpu7x:4x8x8", _KEPT | {"batch_size": 512}),
    (r"v5p:8x8x16|tpu7x:8x8x8", _KEPT | {"batch_size": 1024}),
    (r"(v4|v5p|tpu7x):.*", _KEPT),
)


def get_config(size: str = "huge") -> ml_collections.ConfigDict:
    """Every key that the run reads, with its reason where the number is not plain."""
    if size not in SIZES:
        raise UserError(f'config: size "{size}" is not known; it is one of {", ".join(SIZES)}')
    config = ml_collections.ConfigDict()
    config.size = size
    config.seed = 0
    config.steps = 875_000  # paper
    config.batch_size = 240  # paper; global, samples
    config.micro_batches = 1
    config.checkpoint = ml_collections.ConfigDict({"every": 1000, "keep": 3, "keep_every": 100_000})
    config.eval = ml_collections.ConfigDict({"every": 0})
    config.log = ml_collections.ConfigDict({"every": 50})
    config.watchdog = ml_collections.ConfigDict({"seconds": 1800.0})

    config.data = _data()
    config.model = _model(SIZES[size])
    config.objective = _objective(SIZES[size])
    config.optimizer = _optimizer()
    config.mesh = ml_collections.ConfigDict({"data": -1, "fsdp": SIZES[size].fsdp, "tensor": 1})
    config.mesh_rules = MESH_RULES
    return config


def _data() -> ml_collections.ConfigDict:
    return ml_collections.ConfigDict(
        {
            # Sites with a high-resolution image and sequences of Sentinel-2 and Sentinel-1: a folder that you make.
            "sources": (("runs/records/sites", 1.0),),
            "threads": 16,
            "prefetch": 4,
            "dates": {"optical": 1, "multispectral": 20, "sar": 10},  # paper
            # A cell of the common grid is one Sentinel-2 pixel = 32 optical pixels, so that nothing is resampled.
            "global_views": {
                "size": {"optical": 512, "multispectral": 16, "sar": 16},  # SkySense++'s smaller crop
                "area": None,  # native scale
            },
            "local_views": {
                "count": 4,
                "size": {"optical": 256, "multispectral": 8, "sar": 8},
                "area": None,
                "dates": {"optical": 1, "multispectral": 5, "sar": 3},
            },
            "augment": {
                "date_jitter": 5,  # days; the paper names jitter, not how much
                "drop_date": 0.2,
                "drop_modality": 0.2,
                "brightness": 0.2,
                "contrast": 0.2,
                "saturation": 0.2,
                "blur": 0.5,  # named in descriptions of the paper, as solarisation is; probabilities are DINO's
                "solarize": 0.1,
                "speckle": 0.5,
                "gain": 1.0,
            },
        }
    )


def _model(size: Size) -> ml_collections.ConfigDict:
    width, depths, heads = size.swin
    vit_width, vit_depth, vit_heads = size.vit

    def vit(sensor: str, bands: tuple[str, ...]) -> dict[str, Any]:
        return {
            "kind": "vit",
            "sensors": (sensor,),
            "bands": bands,
            "patch_size": 4,  # paper
            "image_size": 64,  # paper: of the learned positions, resized for crops
            "width": vit_width,
            "depth": vit_depth,
            "heads": vit_heads,
            "up_factor": 4,  # paper: back to one cell a pixel
        }

    return ml_collections.ConfigDict(
        {
            "dtype": "bfloat16",
            "remat": "full",
            "scan": True,
            "drop_path": 0.2,  # the released configs
            "modalities": {
                "optical": {
                    "kind": "swin_v2",
                    "sensors": ("worldview3", "aerial", "naip", "rgb"),
                    "bands": ("red", "green", "blue"),  # paper
                    "stem": "patch",
                    "patch_size": 4,  # paper, as are window and extra norm
                    "width": width,
                    "depths": depths,
                    "heads": heads,
                    "window": 8,
                    "extra_norm_every": 6,
                },
                "multispectral": vit(
                    "sentinel2-l2a", ("B02", "B03", "B04", "B05", "B06", "B07", "B08", "B8A", "B11", "B12")
                ),
                "sar": vit("sentinel1-grd", ("VV", "VH")),
            },
            "spatial_width": width * 2 ** (len(depths) - 1),
            # Paper: 24 layers, 1024, 16 heads. Parts: turns in which places go through the layers.
            "fusion": {"width": vit_width, "depth": vit_depth, "heads": vit_heads, "parts": 1},
            "prototypes": {
                "regions": 64,  # paper: 4096 regions; ours: 64 x 64 cells of equal area
                "count": 100,  # paper
                "width": vit_width // 2,  # huge: 4096 x 100 x 512 and projections make the paper's 215 M
                "momentum": 0.996,
                "epsilon": 0.05,
                "iterations": 3,
                "frozen": False,
            },
        }
    )


def _objective(size: Size) -> ml_collections.ConfigDict:
    hidden, bottleneck, classes = size.head
    return ml_collections.ConfigDict(
        {
            "kind": "dino",  # paper: positives only, DINO's averaged teacher
            # DINO and DINOv2 have 64 classes for each sample of the batch. Here that is 15,360 where a site has one
            # image a view, ten and twenty times that where it has a sequence: 32,768 in huge.
            "classes": classes,
            "head_norm": "none",
            "head_hidden": hidden,  # DINO's, as is the bottleneck
            "head_bottleneck": bottleneck,
            "student_temperature": 0.1,  # DINO's, as is the next
            "teacher_temperature": (0.04, 0.07),  # start, end; cosine
            "sinkhorn_iterations": 3,  # rounds of balancing, also of the clusters: SwAV's and DINOv2's
            # Levels alike: paper. Alignment: one description of the paper has 0.1. Spread: DINOv2's weight of KoLeo.
            "weights": {"pixel": 1.0, "object": 1.0, "image": 1.0, "alignment": 0.1, "spread": 0.1},
            "infonce": {"temperature": 0.2, "negatives": 8},  # kind "infonce"; MoCo v2's, 8 rows of each other sample
            "chunk": 256,  # rows of a sample: 32 MiB of scores
            "pixel": {"tokens": 16},  # of 256 places a pair of views and date: 1,280 multispectral rows a sample
            # Left open by the paper. Clusters of 32 places where views agree; rounds as of balancing; SwAV's epsilon.
            "object": {"clusters": 8, "iterations": 3, "epsilon": 0.05},
            # Where the learned temperature starts: SimCLR's; and its bounds, CLIP's.
            "alignment": {"temperature": 0.1, "bounds": (0.01, 1.0)},
            "spread": {"floor": 0.01},  # nearer neighbours pull no harder: a duplicate stays finite
            "rank_alarm": 5.0,  # 1 is one point; small sound runs had 5 to 8 (docs/findings.md)
            "spread_alarm": 0.005,  # 1 / sqrt(1024) = 0.03 where features point everywhere
        }
    )


def _optimizer() -> ml_collections.ConfigDict:
    return ml_collections.ConfigDict(
        {
            "learning_rate": 1e-4,  # SkySense V2's 2e-4 at 1024 samples, by the root of the batch
            "final_learning_rate": 1e-6,
            "warmup_steps": 10_000,
            "weight_decay": 0.04,  # SkySense++, as are b1, b2 and clip
            "b1": 0.9,
            "b2": 0.999,
            "clip": 5.0,
            "learning_rate_multipliers": (("heads/.*", 1.0), ("encoder/.*", 1.0)),
            "weight_decay_multipliers": (
                (r".*/(bias|scale|positions|dates|extra_token|class_token|logit_scale|temperature)", 0.0),
                (r".*/(kernel|classes)", 1.0),
            ),
            "teacher_momentum": 0.996,  # DINO's, as is the end; the paper leaves it open
            "final_teacher_momentum": 1.0,
        }
    )
