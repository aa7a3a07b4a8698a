r"""Words beside images: every sensor meets captions, in one run with the multi-granularity losses.

skyjax data tokenizer --input=runs/records/eurosat --input=runs/records/benv2 --input=runs/records/triples \
    --vocab-size=1000 --lower-case --out=runs/words.model
skyjax train --config=configs/image_text.py --workdir=runs/image_text --config.tokenizer=runs/words.model \
    --config.vocabulary=1000
skyjax eval --checkpoint=runs/image_text --task=zero_shot --dataset=data/sample/eurosat_rgb
"""

import pathlib

import ml_collections

# Data set -> share of the samples. Captions are those of the records, else made of their labels (docs/text.md).
SHARES = {"eurosat": 0.8, "benv2": 0.08, "triples": 0.04, "pastis": 0.04, "rsvqa_lr/train": 0.04}


def get_config(
    records: str = "runs/records",
    tokenizer: str = "data/sample/tokenizer/albert_en_30k_spiece.model",
    vocabulary: int = 30_000,
) -> ml_collections.ConfigDict:
    """Every key that the run reads.

    Args:
      records: the folder of the data sets made by `skyjax data build`; those of SHARES that do not lie there are left
        out, and where none does, all are named, so that the run says what it misses.
      tokenizer: a SentencePiece model.
      vocabulary: its ids, or more: rows of the tables of text tower and decoder. Few make a small decoder, whose cost
        is for the most part to score them all.
    """
    config = ml_collections.ConfigDict()
    config.records, config.tokenizer, config.vocabulary = records, tokenizer, vocabulary
    config.seed = 0
    config.steps = 1200
    config.batch_size = 128  # global, samples
    config.micro_batches = 1
    config.checkpoint = ml_collections.ConfigDict({"every": 200, "keep": 2, "keep_every": 0})
    config.eval = ml_collections.ConfigDict({"every": 0})
    config.log = ml_collections.ConfigDict({"every": 10})
    config.watchdog = ml_collections.ConfigDict({"seconds": 1800.0})

    config.data = _data(records, tokenizer)
    config.model = _model(vocabulary)
    config.objective = _objective()

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
    config.mesh = ml_collections.ConfigDict({"data": -1, "fsdp": 1, "tensor": 1})
    return config


def _sources(records: str) -> tuple[tuple[str, float], ...]:
    """Folders and their shares, which add up to one."""
    there = [name for name in SHARES if (pathlib.Path(records) / name / "dataset.json").is_file()] or list(SHARES)
    whole = sum(SHARES[name] for name in there)
    return tuple((f"{records}/{name}", SHARES[name] / whole) for name in there)


def _data(records: str, tokenizer: str) -> ml_collections.ConfigDict:
    return ml_collections.ConfigDict(
        {
            "sources": _sources(records),
            "threads": 2,
            "prefetch": 4,
            "dates": {"optical": 1, "multispectral": 3, "sar": 3},
            # A cell of each modality is a sixth of a view: 6 x 6 places are fused.
            "global_views": {"size": {"optical": 48, "multispectral": 6, "sar": 6}, "area": (0.25, 1.0)},
            "local_views": {
                "count": 0,
                "size": {"optical": 24, "multispectral": 3, "sar": 3},
                "area": (0.05, 0.25),
                "dates": {"optical": 1, "multispectral": 2, "sar": 2},
            },
            "text": {
                "tokenizer": tokenizer,
                "length": 48,  # tokens, bos and eos included
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


def _model(vocabulary: int) -> ml_collections.ConfigDict:
    def vit(sensors: tuple[str, ...], bands: tuple[str, ...]) -> dict[str, object]:
        return {
            "kind": "vit",
            "sensors": sensors,
            "bands": bands,
            "patch_size": 1,
            "image_size": 6,
            "width": 64,
            "depth": 1,
            "heads": 4,
            "up_factor": 1,
        }

    return ml_collections.ConfigDict(
        {
            "dtype": "float32",
            "remat": "none",
            "scan": True,
            "drop_path": 0.0,
            "modalities": {
                "optical": {
                    "kind": "vit",
                    "sensors": ("rgb", "aerial"),
                    "bands": ("red", "green", "blue"),
                    # RGB here is Sentinel-2 as JPEG; see configs/eurosat_rgb.py.
                    "statistics": {"rgb": {"mean": (87.7, 97.2, 104.2), "std": (51.2, 34.6, 29.5)}},
                    "stem": "conv",
                    "patch_size": 8,
                    "image_size": 48,
                    "width": 128,
                    "depth": 3,
                    "heads": 4,
                    "up_factor": None,
                },
                "multispectral": vit(
                    ("sentinel2-l2a",), ("B02", "B03", "B04", "B05", "B06", "B07", "B08", "B8A", "B11", "B12")
                ),
                "sar": vit(("sentinel1-grd",), ("VV", "VH")),
            },
            "spatial_width": 128,
            "fusion": {"width": 128, "depth": 1, "heads": 4},
            "prototypes": None,
            "text": {
                "vocabulary": vocabulary,
                "length": 48,
                "width": 128,
                "depth": 2,
                "heads": 4,
                "causal": False,
                "pool": "last",
                "embed_dim": 128,
            },
            "decoder": {"vocabulary": vocabulary, "length": 48, "width": 128, "depth": 2, "heads": 4, "tied": True},
        }
    )


def _objective() -> ml_collections.ConfigDict:
    return ml_collections.ConfigDict(
        {
            "kind": "infonce",
            "classes": 512,
            "head_norm": "batch",
            "head_hidden": 256,
            "head_bottleneck": 128,
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
                "streams": ("fused", "optical", "multispectral", "sar"),
                "temperature": 0.1,
                "bias": -10.0,  # kind "sigmoid": where it starts
                "bounds": (0.01, 1.0),  # of the learned temperatures
                "chunk": 32,  # rows whose scores of all tokens are held at once
                "words": {"scales": (1, 2, 3), "group": 16, "sharpness": 0.1, "temperature": 0.1},
            },
            "spread": {"floor": 0.01},
            "rank_alarm": 2.0,
            "spread_alarm": 0.005,
        }
    )
