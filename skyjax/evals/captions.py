"""`skyjax eval --task=captions`: an image's caption as the decoder writes it, scored against those of people.

In: a checkpoint with a decoder, and a captioned set (evals/captioned.py). Out: BLEU-1 to 4, METEOR, ROUGE-L and CIDEr
(evals/caption_scores.py), beside what a caption of another image of the set gets.
"""

import argparse
import dataclasses
import pathlib
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

import skyjax
from skyjax.errors import UserError
from skyjax.evals import caption_scores, pictures, probe, words
from skyjax.evals.bootstrap import RESAMPLES
from skyjax.evals.captioned import CaptionedSet
from skyjax.evals.features import BATCH_SIZE
from skyjax.evals.probe import PRETRAINED
from skyjax.evals.progress import track
from skyjax.evals.retrieval import open_set, print_table
from skyjax.train.words import Words

TASK = "captions"
OTHER = "caption of another image"
METHODS = ("greedy", "beam", "nucleus")
SHOWN = 4  # best, middling and worst captions


@dataclasses.dataclass(frozen=True)
class Options:
    """What is captioned and how; `captioned.open_captioned` has the options of the set.

    Attributes:
      dataset, split, images, sensor, bands, image_size: as there.
      decode: "greedy", "beam" or "nucleus".
      seed: of the bootstrap, the nucleus, and which other image's caption is the baseline.
    """

    dataset: str
    split: str | None = None
    images: str | None = None
    sensor: str | None = None
    bands: tuple[str, ...] = ()
    image_size: int | None = None
    decode: str = "greedy"
    seed: int = 0


def run(checkpoint: str | pathlib.Path, dataset: str, **options: Any) -> dict[str, Any]:
    """Probes a checkpoint: a run's directory or one of its checkpoints. Options and result: `Options`, `compare`.

    Raises:
      UserError: the checkpoint has no decoder, the data set cannot be used, or the scores' package or Java is missing.
    """
    return {"checkpoint": str(checkpoint)} | compare(skyjax.load(checkpoint), Options(str(dataset), **options))


def compare(model: words.Worded, options: Options) -> dict[str, Any]:
    """Writes a caption for every image and scores them.

    Returns:
      As `probe.compare`, a row's `method` being the metric and `accuracy` its value, of which 1 is 100. `said` has
      every image's name, caption and those of people; `examples` some of them by CIDEr, `pictures` their images.
    """
    text = words.words_of(model, TASK)
    if not text.can_caption:
        raise UserError(
            f"--task={TASK} needs a checkpoint with a decoder, and this one has none; train one with model.decoder"
            " (configs/image_text.py)"
        )
    if options.decode not in METHODS:
        raise UserError(f"--decode={options.decode} is not known; it is one of {', '.join(METHODS)}")
    caption_scores.check_tools()
    captioned = open_set(model, options)
    start = time.perf_counter()
    said = write(model, text, captioned, options.decode, options.seed)
    seconds = {PRETRAINED: round(time.perf_counter() - start, 2), OTHER: 0.0}
    systems = {PRETRAINED: said}
    if len(said) > 1:
        systems[OTHER] = of_another(captioned.captions, options.seed)
    scores = caption_scores.score(systems, captioned.captions, seed=options.seed)
    examples = _examples(scores[PRETRAINED][caption_scores.CIDER].each)
    return {
        "task": TASK,
        "dataset": options.dataset,
        "test_dataset": None,
        "metric": "score",
        "headline": caption_scores.CIDER,
        "classes": [],
        "sizes": {"test": len(said), "captions": sum(map(len, captioned.captions))},
        "rows": [
            {
                "features": name,
                "method": metric,
                "accuracy": every[metric].value,
                "low": every[metric].low,
                "high": every[metric].high,
                "chosen": None,
                "dimension": 0,
                "seconds": seconds[name],
            }
            for metric in caption_scores.METRICS
            for name, every in scores.items()
        ],
        "per_class": {},
        "confusion": None,
        "confusion_of": None,
        "features": {name: {"dimension": 0, "seconds": seconds[name]} for name in scores},
        "said": [
            {"image": captioned.names[i], "said": said[i], "told": list(captioned.captions[i])}
            for i in range(len(said))
        ],
        "examples": [
            {
                "kind": kind,
                "image": i,
                "said": said[i],
                "told": list(captioned.captions[i]),
                "cider": float(scores[PRETRAINED][caption_scores.CIDER].each[i]),
            }
            for kind, i in examples
        ],
        "pictures": {str(i): _picture(captioned, i) for _, i in examples},
        "settings": {
            "split": captioned.split,
            "image_size": {m: list(size) for m, size in captioned.sizes.items()},
            "pooling": f"fused features of each place, written by the decoder ({options.decode})",
            "scores": "pycocoevalcap, texts by the PTB tokenizer without punctuation; CIDEr is of 10",
            "interval": f"95 %, bootstrap over images, {RESAMPLES} draws; METEOR's is of the images' mean",
            "seed": options.seed,
        },
        "notes": [*captioned.notes, *_repeats(said)],
    }


def _picture(captioned: CaptionedSet, i: int) -> str:
    return pictures.data_uri(pictures.portrait(captioned.read(i), "optical"))


def write(model: words.Worded, text: Words, captioned: CaptionedSet, decode: str, seed: int) -> list[str]:
    """A caption an image, a batch at a time; the last is filled up, so that one shape is compiled."""
    said: list[str] = []
    count = len(captioned.names)
    for start in track(range(0, count, BATCH_SIZE), -(-count // BATCH_SIZE), "writing captions"):
        batch = [captioned.read(i) for i in range(start, min(start + BATCH_SIZE, count))]
        output = model.encode(batch + [batch[-1]] * (BATCH_SIZE - len(batch)))
        said += text.caption(output["fused"], output["fused_valid"], decode, seed=seed + start)[: len(batch)]
    return said


def of_another(captions: Sequence[Sequence[str]], seed: int) -> list[str]:
    """For each image the first caption of another one, drawn so that each image's is taken once."""
    order = np.random.default_rng(seed).permutation(len(captions))
    taken = np.empty(len(order), int)
    taken[order] = np.roll(order, 1)
    return [captions[i][0] for i in taken.tolist()]


def _examples(cider: np.ndarray) -> list[tuple[str, int]]:
    """The best, the middling and the worst, none twice."""
    order = np.argsort(-cider, kind="stable").tolist()
    middle = (len(order) - SHOWN) // 2
    kinds = (("best", order[:SHOWN]), ("middling", order[max(middle, 0) :][:SHOWN]), ("worst", order[-SHOWN:][::-1]))
    found: dict[int, str] = {}
    for kind, every in kinds:
        for i in every:
            found.setdefault(i, kind)
    return [(kind, i) for i, kind in found.items()]


def _repeats(said: Sequence[str]) -> list[str]:
    """A decoder that ignores the image says one thing everywhere."""
    different = len(set(said))
    return [f"{different:,} different captions were written for {len(said):,} images"] if different < len(said) else []


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `skyjax eval` that this task alone has."""
    parser.add_argument("--decode", default="greedy", choices=METHODS, help="captions: how text is made (greedy)")


def from_arguments(arguments: argparse.Namespace) -> dict[str, Any]:
    """Runs what the command line asks for, prints the table and writes the files."""
    result = run(arguments.checkpoint, arguments.dataset, **probe.options_of(arguments, Options))
    probe.tell(result, arguments, print_table)
    return result
