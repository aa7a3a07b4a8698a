"""`skyjax eval --task=retrieval`: images found by their captions, and captions by their images.

In: a checkpoint with words, and a captioned set (evals/captioned.py). Out: recall at 1, 5 and 10 both ways and the mean
of the six, by the field's protocol: an image is right with any of its captions, a caption with its image alone, and
captions of other images are wrong even where their words are the same. With `hash_bits` the same by binary codes.
"""

import argparse
import dataclasses
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import rich.console
import rich.table
from jaxtyping import Float, Int

import skyjax
from skyjax.errors import UserError
from skyjax.evals import attention, hashing, pictures, probe, ranks, words
from skyjax.evals.bootstrap import PERCENTILES, RESAMPLES, ratios
from skyjax.evals.captioned import CaptionedSet, open_captioned
from skyjax.evals.extremes import extremes
from skyjax.evals.features import FUSED
from skyjax.evals.probe import PRETRAINED
from skyjax.input.captions import captions as label_captions
from skyjax.input.texts import questions_of
from skyjax.sample import Sample
from skyjax.train.words import Words

TASK = "retrieval"
CHANCE = "chance"
TO_TEXT, TO_IMAGE, MEAN = "image to text", "text to image", "mean recall"

# What recall is of: direction -> a score of each query, the site of each query, the site of each item.
Searches = Mapping[str, tuple[Callable[[slice], np.ndarray], Int[np.ndarray, "q"], Int[np.ndarray, "n"]]]


@dataclasses.dataclass(frozen=True)
class Options:
    """What is probed and how; `captioned.open_captioned` has the options of the set.

    Attributes:
      dataset, split, images, sensor, bands, image_size: as there.
      modality: the image side that meets words.
      hash_bits: of binary codes; None for none.
      seed: of the bootstrap and the codes' rotations.
    """

    dataset: str
    split: str | None = None
    images: str | None = None
    modality: str = FUSED
    sensor: str | None = None
    bands: tuple[str, ...] = ()
    image_size: int | None = None
    hash_bits: int | None = None
    seed: int = 0


def run(checkpoint: str | pathlib.Path, dataset: str, **options: Any) -> dict[str, Any]:
    """Probes a checkpoint: a run's directory or one of its checkpoints. Options and result: `Options`, `compare`.

    Raises:
      UserError: the checkpoint has no words, or the data set is missing or cannot be used.
    """
    return {"checkpoint": str(checkpoint)} | compare(skyjax.load(checkpoint), Options(str(dataset), **options))


def compare(model: words.Worded, options: Options) -> dict[str, Any]:
    """Searches both ways, beside chance.

    Returns:
      As `probe.compare`, a row's `method` being "image to text R@1" and so on, `accuracy` the recall. `hashing` has the
      same of binary codes with their speed and size; `examples` the best and worst queries, `attention` where the
      words of some look, `pictures` their images.
    """
    text = words.words_of(model, TASK)
    words.check_stream(text, options.modality)
    if options.hash_bits is not None:
        hashing.check_bits(options.hash_bits)
    captioned = open_set(model, options)
    number = np.arange(len(captioned.names))
    images, image_seconds = words.image_vectors(model, text, captioned, number, options.modality)
    owner = np.repeat(number, [len(texts) for texts in captioned.captions])
    texts = [text for texts in captioned.captions for text in texts]
    captions, text_seconds = words.text_vectors(text, texts)
    searches = {
        TO_TEXT: (ranks.cosines(images, captions), number, owner),
        TO_IMAGE: (ranks.cosines(captions, images), owner, number),
    }
    lucky = {way: (_all_alike(len(items)), queries, items) for way, (_, queries, items) in searches.items()}
    found = {PRETRAINED: recalls(searches, options.seed), CHANCE: recalls(lucky, options.seed)}
    dimension = {PRETRAINED: images.shape[1], CHANCE: 0}
    seconds = {PRETRAINED: round(image_seconds + text_seconds, 2), CHANCE: 0.0}
    examples = {way: extremes(*search, texts, way == TO_IMAGE) for way, search in searches.items()}
    shown = {each for every in examples.values() for example in every for each in example["images"]}
    result: dict[str, Any] = {
        "task": TASK,
        "dataset": options.dataset,
        "test_dataset": None,
        "metric": "recall",
        "headline": MEAN,
        "classes": [],
        "sizes": {"test": len(images), "captions": len(texts)},
        "rows": [
            {
                "features": name,
                "method": method,
                **about,
                "chosen": None,
                "dimension": dimension[name],
                "seconds": seconds[name],
            }
            for name, every in found.items()
            for method, about in every.items()
        ],
        "per_class": {},
        "confusion": None,
        "confusion_of": None,
        "features": {name: {"dimension": dimension[name], "seconds": seconds[name]} for name in found},
        "hashing": None,
        "examples": examples,
        "attention": _looks(model, text, captioned, examples[TO_IMAGE], options.modality),
        "names": {str(i): captioned.names[i] for i in sorted(shown)},
        "pictures": {str(i): _picture(captioned, i, options.modality) for i in sorted(shown)},
        "settings": {
            "split": captioned.split,
            "image_size": {m: list(size) for m, size in captioned.sizes.items()},
            "pooling": words.pooling(options.modality),
            "ties": "the expected recall over all orders of what scores the same",
            "interval": f"95 %, bootstrap over images with their captions, {RESAMPLES} draws; what is searched stays",
            "seed": options.seed,
        },
        "notes": [*captioned.notes, *_shared_words(captioned.captions)],
    }
    if options.hash_bits is not None:
        result["hashing"] = by_codes(images, captions, owner, options.hash_bits, options.seed)
    return result


def _picture(captioned: CaptionedSet, i: int, modality: str) -> str:
    return pictures.data_uri(pictures.portrait(captioned.read(i), modality))


def _looks(
    model: words.Worded, text: Words, captioned: CaptionedSet, examples: Sequence[Mapping[str, Any]], modality: str
) -> list[Any]:
    """Where the words of the captions that find their images best look in these."""
    best = [example for example in examples if example["kind"] == "best"]
    samples = [captioned.read(example["own"]) for example in best]
    return attention.look(model, text, samples, [example["query"] for example in best], modality)


def open_set(model: words.Worded, options: Any) -> CaptionedSet:
    """The captioned set that an `Options` names; labels make captions where training had them do so.

    Raises:
      UserError: as `open_captioned`.
    """
    known = model.config.get("data", {}).get("text") or {}

    def make(sample: Sample, names: Mapping[str, Any]) -> Sequence[str]:
        settings = {"seed": model.config.get("seed", 0), "metadata": known.get("metadata", True)}
        asked = questions_of(sample.texts)
        return label_captions(sample, names, number=known.get("from_labels", 0), questions=asked, **settings)

    found = open_captioned(
        options.dataset,
        split=options.split,
        images=options.images,
        sensor=options.sensor,
        bands=options.bands,
        image_size=options.image_size,
        largest=probe.largest_sides(model),
        make=make,
    )
    encoded = tuple(model.config.model.modalities)
    if not set(encoded) & set(found.sizes):
        raise UserError(
            f'"{options.dataset}" has {", ".join(found.sizes)} images, but this checkpoint encodes'
            f" {', '.join(encoded)}; say by --sensor what the images are, or take another checkpoint"
        )
    return found


def recalls(searches: Searches, seed: int) -> dict[str, dict[str, float]]:
    """Method -> recall ("accuracy") with the ends of its interval ("low", "high"), fractions of 1; and the mean."""
    found: dict[str, dict[str, float]] = {}
    every, draws = [], []
    for way, (score, queries, items) in searches.items():
        hit = ranks.search(score, queries, items)
        sites = max(queries.max(), items.max()) + 1
        # Captions of one image are not independent: images are drawn, each with all its captions.
        count = np.bincount(queries, minlength=sites).astype(float)
        for k, column in zip(ranks.AT, hit.T, strict=True):
            above = np.bincount(queries, column, minlength=sites)
            every.append(column.mean())
            draws.append(ratios(above, count, seed=seed))
            found[f"{way} R@{k}"] = _with_ends(every[-1], draws[-1])
    found[MEAN] = _with_ends(np.mean(every), np.mean(draws, axis=0))
    return found


def _with_ends(value: float, draws: Float[np.ndarray, "r"]) -> dict[str, float]:
    low, high = np.percentile(draws, PERCENTILES)
    return {"accuracy": float(value), "low": float(low), "high": float(high)}


def _all_alike(items: int) -> Callable[[slice], np.ndarray]:
    return lambda block: np.zeros((block.stop - block.start, items), np.int8)


def by_codes(
    images: Float[np.ndarray, "n e"],
    captions: Float[np.ndarray, "m e"],
    owner: Int[np.ndarray, "m"],
    bits: int,
    seed: int,
) -> dict[str, Any]:
    """Recall by binary codes, with the loss against exact search, and bytes and seconds of both.

    Returns:
      "bits", "exact" and "codes": rows of "rotation", "recall" (method -> fraction), "loss" of mean recall, "bytes" of
      an item, "milliseconds" of a query's search among all, mean of both ways.
    """
    number = np.arange(len(images))
    deepest = max(ranks.AT)

    def of(searches: Searches) -> dict[str, float]:
        return {method: about["accuracy"] for method, about in recalls(searches, seed).items()}

    exact = of(
        {
            TO_TEXT: (ranks.cosines(images, captions), number, owner),
            TO_IMAGE: (ranks.cosines(captions, images), owner, number),
        }
    )
    spent = hashing.seconds_exact(images, captions, deepest) + hashing.seconds_exact(captions, images, deepest)
    queries = len(images) + len(captions)
    about: dict[str, Any] = {
        "bits": bits,
        "fitted_on": "what is searched, images and texts each centred, no pair looked at",
        "exact": {"recall": exact, "bytes": 4 * images.shape[1], "milliseconds": 1000 * spent / queries},
        "codes": [],
        "notes": [],
    }
    makers = {"random": hashing.random_codes, "learned (ITQ)": hashing.learned_codes}
    if bits > images.shape[1]:
        about["notes"].append(f"no learned rotation: {bits} bits are more than the width, {images.shape[1]}")
        del makers["learned (ITQ)"]
    for rotation, make in makers.items():
        codes = make(images, captions, bits, seed=seed)
        image_codes, text_codes = codes.of_images(images), codes.of_texts(captions)
        found = of(
            {
                TO_TEXT: (hashing.nearness(image_codes, text_codes), number, owner),
                TO_IMAGE: (hashing.nearness(text_codes, image_codes), owner, number),
            }
        )
        spent = hashing.seconds_by_code(image_codes, text_codes, deepest)
        spent += hashing.seconds_by_code(text_codes, image_codes, deepest)
        about["codes"].append(
            {
                "rotation": rotation,
                "recall": found,
                "loss": exact[MEAN] - found[MEAN],
                "bytes": bits // 8,
                "milliseconds": 1000 * spent / queries,
            }
        )
    return about


def _shared_words(captions: Sequence[Sequence[str]]) -> list[str]:
    sites: dict[str, set[int]] = {}
    for i, texts in enumerate(captions):
        for text in texts:
            sites.setdefault(text, set()).add(i)
    shared = sum(len(sites[text]) > 1 for texts in captions for text in texts)
    total = sum(map(len, captions))
    return [f"{shared:,} of {total:,} captions are word for word those of another image too"] if shared else []


def print_table(result: Mapping[str, Any], console: rich.console.Console | None = None) -> None:
    """Recall down, features across; then the codes."""
    console = console or rich.console.Console()
    names = list(result["features"])
    table = rich.table.Table(
        title=f"{result['task']} on {result['dataset']}: {result['metric']} in %, 95 % interval", title_justify="left"
    )
    table.add_column("", no_wrap=True)
    for name in names:
        table.add_column(name, justify="right", style="bold" if name == PRETRAINED else None)
    for method in dict.fromkeys(row["method"] for row in result["rows"]):
        rows = {row["features"]: row for row in result["rows"] if row["method"] == method}
        cells = [
            f"{100 * row['accuracy']:.1f} ({100 * row['low']:.1f}–{100 * row['high']:.1f})"
            for row in (rows[name] for name in names)
        ]
        table.add_row(method, *cells)
    console.print(table)
    if result.get("hashing"):
        _print_codes(result["hashing"], console)
    counts = f"{result['sizes']['test']:,} images, {result['sizes']['captions']:,} captions"
    console.print(f"{counts} ({result['settings']['split']})", highlight=False)
    for note in result["notes"]:
        console.print(f"Note: {note}.", highlight=False)


def _print_codes(about: Mapping[str, Any], console: rich.console.Console) -> None:
    table = rich.table.Table(title=f"binary codes of {about['bits']} bits", title_justify="left")
    for name in ("search", f"{MEAN}, %", "lost", "R@1 to text", "R@1 to image", "bytes", "ms a query"):
        table.add_column(name, justify="left" if name == "search" else "right")
    rows = [{"rotation": "exact, float32", "loss": 0.0, **about["exact"]}, *about["codes"]]
    for row in rows:
        recall = row["recall"]
        shares = (recall[MEAN], row["loss"], recall[f"{TO_TEXT} R@1"], recall[f"{TO_IMAGE} R@1"])
        table.add_row(
            row["rotation"],
            *(f"{100 * share:.1f}" for share in shares),
            str(row["bytes"]),
            f"{row['milliseconds']:.4f}",
        )
    console.print(table)
    for note in about["notes"]:
        console.print(f"Note: {note}.", highlight=False)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `skyjax eval` that tasks with words alone have."""
    parser.add_argument("--split", metavar="NAME", help="with words: train, val, test or all (test)")
    parser.add_argument("--images", metavar="DIR", help="retrieval, captions: images of a split file (beside it)")
    parser.add_argument("--hash-bits", type=int, metavar="N", help="retrieval: also by binary codes of so many bits")


def from_arguments(arguments: argparse.Namespace) -> dict[str, Any]:
    """Runs what the command line asks for, prints the table and writes the files."""
    result = run(arguments.checkpoint, arguments.dataset, **probe.options_of(arguments, Options))
    probe.tell(result, arguments, print_table)
    return result
