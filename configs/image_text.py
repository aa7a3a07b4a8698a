r"""Words beside images: every sensor meets captions, in one run with the multi-granularity losses.

skyjax data tokenizer --input=runs/records/eurosat --input=runs/records/benv2 --input=runs/records/triples \
    --vocab-size=1000 --lower-case --out=runs/words.model
skyjax train --config=configs/image_text.py --workdir=runs/image_text --config.tokenizer=runs/words.model \
    --config.vocabulary=1000
skyjax eval --checkpoint=runs/image_text --task=zero_shot --dataset=data/sample/eurosat_rgb

Images with captions of their own, listed by a split file:

skyjax data build --source=data/captioned.py --input=DIR --out=runs/records/captioned
skyjax train --config=configs/image_text.py --workdir=runs/captioned --config.sources=runs/records/captioned/train \
    --config.modalities=optical --config.pixels=96 --config.tokenizer=runs/words.model --config.vocabulary=4000
skyjax eval --checkpoint=runs/captioned --task=retrieval --dataset=DIR/dataset.json --split=test
"""

import pathlib
from typing import Any, NamedTuple

import ml_collections

from skyjax.errors import UserError


class Size(NamedTuple):
    """What grows; towers are width, depth, heads."""

    optical: tuple[int, int, int]
    sequences: tuple[int, int, int]  # of multispectral and SAR images, of each
    fusion: tuple[int, int, int]
    text: tuple[int, int, int]
    decoder: tuple[int, int, int]
    head: tuple[int, int]  # hidden, bottleneck
    stem: str
    pixels: int  # a side of an optical view
    places: int  # a side of its grid
    tokens: int  # of a text
    batch_size: int  # global, samples
    dtype: str
    remat: str
    fsdp: int  # chips that share one copy of the state


SIZES = {
    # Two CPU cores.
    "small": Size(
        optical=(128, 3, 4),
        sequences=(64, 1, 4),
        fusion=(128, 1, 4),
        text=(128, 2, 4),
        decoder=(128, 2, 4),
        head=(256, 128),
        stem="conv",
        pixels=48,
        places=6,
        tokens=48,
        batch_size=128,
        dtype="float32",
        remat="none",
        fsdp=1,
    ),
    # ViT-B/16 and SigLIP B's text tower, for TPUs; nobody has trained it yet (docs/scale.md).
    "base": Size(
        optical=(768, 12, 12),
        sequences=(768, 12, 12),
        fusion=(768, 12, 12),
        text=(768, 12, 12),
        decoder=(768, 6, 12),
        head=(2048, 256),
        stem="patch",
        pixels=224,
        places=14,
        tokens=64,
        batch_size=32_768,
        dtype="bfloat16",
        remat="full",
        fsdp=16,
    ),
}

# Data set -> share of the samples. Captions are those of the records, else made of their labels (docs/text.md).
SHARES = {"eurosat": 0.8, "benv2": 0.08, "triples": 0.04, "pastis": 0.04, "rsvqa_lr/train": 0.04}


def get_config(
    size: str = "small",
    records: str = "runs/records",
    sources: str = "",
    tokenizer: str = "data/sample/tokenizer/albert_en_30k_spiece.model",
    vocabulary: int = 30_000,
    modalities: str = "optical,multispectral,sar",
    pixels: int = 0,
) -> ml_collections.ConfigDict:
    """Every key that the run reads.

    Args:
      size: of SIZES.
      records: the folder of the data sets made by `skyjax data build`; those of SHARES that do not lie there are left
        out, and where none does, all are named, so that the run says what it misses.
      sources: data sets instead of those, with commas between and equal shares.
      tokenizer: a SentencePiece model.
      vocabulary: its ids, or more: rows of the tables of text tower and decoder. Few make a small decoder, whose cost
        is for the most part to score them all.
      modalities: those of the data sets, with commas between: `optical` where all are plain images, which then take
        half the time and memory.
      pixels: a side of an optical view, where not that of the size; places stay as many.
    """
    if size not in SIZES:
        raise UserError(f'config: size "{size}" is not known; it is one of {", ".join(SIZES)}')
    kept = tuple(modalities.split(","))
    sizes = SIZES[size]._replace(pixels=pixels or SIZES[size].pixels)
    config = ml_collections.ConfigDict()
    config.size, config.records, config.tokenizer, config.vocabulary = size, records, tokenizer, vocabulary
    config.seed = 0
    config.steps = 1200
    config.batch_size = sizes.batch_size
    config.micro_batches = 1
    config.checkpoint = ml_collections.ConfigDict({"every": 200, "keep": 2, "keep_every": 0})
    config.eval = ml_collections.ConfigDict({"every": 0})
    config.log = ml_collections.ConfigDict({"every": 10})
    config.watchdog = ml_collections.ConfigDict({"seconds": 1800.0})

    config.data = _data(_own(sources) if sources else _shared(records), tokenizer, sizes, kept)
    config.model = _model(vocabulary, sizes, kept)
    config.objective = _objective(sizes, kept)

    config.optimizer = ml_collections.ConfigDict(
        {
            "learning_rate": 2e-3,
            "final_learning_rate": 1e-5,
            "warmup_steps": 80,
            "weight_decay": 0.05,
            "b1": 0.9,
            "b2": 0.99,
            "clip": 3.0,
            # A locked image tower: ("encoder/.*", 0.0).
            "learning_rate_multipliers": (("(encoder|heads|text|decoder)/.*", 1.0),),
            "weight_decay_multipliers": (
                (r".*/(bias|scale|positions|dates|extra_token|class_token|logit_scale|temperature|table)", 0.0),
                (r".*/(kernel|classes)", 1.0),
            ),
            "teacher_momentum": 0.98,
            "final_teacher_momentum": 0.998,
        }
    )
    config.mesh = ml_collections.ConfigDict({"data": -1, "fsdp": sizes.fsdp, "tensor": 1})
    return config


def _own(sources: str) -> tuple[tuple[str, float], ...]:
    """Folders and equal shares."""
    folders = sources.split(",")
    return tuple((folder, 1 / len(folders)) for folder in folders)


def _shared(records: str) -> tuple[tuple[str, float], ...]:
    """Folders of SHARES and their shares, which add up to one."""
    there = [name for name in SHARES if (pathlib.Path(records) / name / "dataset.json").is_file()] or list(SHARES)
    whole = sum(SHARES[name] for name in there)
    return tuple((f"{records}/{name}", SHARES[name] / whole) for name in there)


def _data(
    sources: tuple[tuple[str, float], ...], tokenizer: str, sizes: Size, kept: tuple[str, ...]
) -> ml_collections.ConfigDict:
    return ml_collections.ConfigDict(
        {
            "sources": sources,
            "threads": 2,
            "prefetch": 4,
            "dates": _of(kept, optical=1, multispectral=3, sar=3),
            # A token of each modality covers the same part of a view.
            "global_views": {
                "size": _of(kept, optical=sizes.pixels, multispectral=sizes.places, sar=sizes.places),
                "area": (0.25, 1.0),
            },
            "local_views": {
                "count": 0,
                "size": _of(kept, optical=sizes.pixels // 2, multispectral=sizes.places // 2, sar=sizes.places // 2),
                "area": (0.05, 0.25),
                "dates": _of(kept, optical=1, multispectral=2, sar=2),
            },
            "text": {
                "tokenizer": tokenizer,
                "length": sizes.tokens,  # bos and eos included
                "captions": 2,  # drawn a sample and step
                "from_labels": 8,  # made of the labels of a sample without captions, of which these are drawn
                "metadata": True,  # they may tell of sensor, place and date
            },
            "augment": {
                "date_jitter": 5,
                "drop_date": 0.2,
                "drop_modality": 0.1,
                "brightness": 0.3,
                "band_gain": 0.05,
                "contrast": 0.3,
                "saturation": 0.3,
                "blur": 0.3,
                "solarize": 0.1,
                "speckle": 0.5,
                "gain": 1.0,
            },
        }
    )


def _of(kept: tuple[str, ...], **each: Any) -> dict[str, Any]:
    """Of a value a modality those that are kept."""
    return {name: value for name, value in each.items() if name in kept}


def _tower(sizes: tuple[int, int, int]) -> dict[str, int]:
    return dict(zip(("width", "depth", "heads"), sizes, strict=True))


def _model(vocabulary: int, sizes: Size, kept: tuple[str, ...]) -> ml_collections.ConfigDict:
    def vit(sensors: tuple[str, ...], bands: tuple[str, ...]) -> dict[str, object]:
        return {
            "kind": "vit",
            "sensors": sensors,
            "bands": bands,
            "patch_size": 1,
            "image_size": sizes.places,
            **_tower(sizes.sequences),
            "up_factor": 1,
        }

    return ml_collections.ConfigDict(
        {
            "dtype": sizes.dtype,
            "remat": sizes.remat,
            "scan": True,
            "drop_path": 0.0,
            "modalities": _of(
                kept,
                optical={
                    "kind": "vit",
                    "sensors": ("rgb", "aerial"),
                    "bands": ("red", "green", "blue"),
                    # RGB here is Sentinel-2 as JPEG; see configs/eurosat_rgb.py.
                    "statistics": {"rgb": {"mean": (87.7, 97.2, 104.2), "std": (51.2, 34.6, 29.5)}},
                    "stem": sizes.stem,
                    "patch_size": sizes.pixels // sizes.places,
                    "image_size": sizes.pixels,
                    **_tower(sizes.optical),
                    "up_factor": None,
                },
                multispectral=vit(
                    ("sentinel2-l2a",), ("B02", "B03", "B04", "B05", "B06", "B07", "B08", "B8A", "B11", "B12")
                ),
                sar=vit(("sentinel1-grd",), ("VV", "VH")),
            ),
            "spatial_width": sizes.optical[0],
            "fusion": _tower(sizes.fusion) if len(kept) > 1 else None,
            "prototypes": None,
            "text": {
                "vocabulary": vocabulary,
                "length": sizes.tokens,
                **_tower(sizes.text),
                "causal": False,
                "pool": "last",
                "embed_dim": sizes.text[0],
            },
            "decoder": {"vocabulary": vocabulary, "length": sizes.tokens, **_tower(sizes.decoder), "tied": True},
        }
    )


def _objective(sizes: Size, kept: tuple[str, ...]) -> ml_collections.ConfigDict:
    return ml_collections.ConfigDict(
        {
            "kind": "infonce",
            "classes": 512,
            "head_norm": "batch",
            "head_hidden": sizes.head[0],
            "head_bottleneck": sizes.head[1],
            "student_temperature": 0.1,
            "teacher_temperature": (0.04, 0.04),
            "sinkhorn_iterations": 3,
            "weights": {
                "pixel": 0.0,
                "object": 0.0,
                "image": 0.5,
                "alignment": 0.1,
                "spread": 0.0,
                "text": 1.0,  # contrastive, each of `text.streams`
                "words": 0.2,  # the words of a caption find their places
                "caption": 0.5,  # the decoder writes it
            },
            "infonce": {"temperature": 0.2, "negatives": 8},
            "chunk": 1024,
            "pixel": {"tokens": 8},
            "object": {"clusters": 4, "iterations": 3, "epsilon": 0.05},
            "alignment": {"temperature": 0.1, "bounds": (0.01, 1.0)},
            "text": {
                "kind": "softmax",  # or "sigmoid", which has a bias
                "streams": ("fused", *kept) if len(kept) > 1 else ("fused",),
                "temperature": 0.1,
                "bias": -10.0,  # kind "sigmoid": where it starts
                "bounds": (0.01, 1.0),  # of the learned temperatures
                "chunk": 32,  # rows of a device whose scores of all tokens are held at once
                "words": {"scales": (1, 2, 3), "group": 16, "sharpness": 0.1, "temperature": 0.1},
            },
            "spread": {"floor": 0.01},
            "rank_alarm": 2.0,
            "spread_alarm": 0.005,
        }
    )
