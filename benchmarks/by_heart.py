"""Whether the image-text path can learn at all: a hundred images with texts of their own, learned by heart.

PYTHONPATH=. python benchmarks/by_heart.py runs/records/{rsvqa_lr/train,rsvqa_lr/val,rsvqa_hr/train,flair2,triples} \
    --workdir=runs/by_heart --tokenizer=runs/words.model --vocabulary=4000

Every image of the data sets gets one text, made of its questions, labels, place and date, that no other image has; then
configs/image_text.py is trained on them without augmentation and asked for what it was told: each image's text among
all, each text's image among all, and the text word for word. Writes benchmarks/results/by_heart.json. This script is a
config too: skyjax train --config=benchmarks/by_heart.py --config.records=runs/by_heart/records --workdir=DIR
"""

import argparse
import dataclasses
import json
import pathlib
import time
from collections.abc import Iterable, Iterator

import ml_collections

from skyjax.config import load_config
from skyjax.evals import captions as written
from skyjax.evals import retrieval
from skyjax.input import records
from skyjax.input.captions import captions
from skyjax.input.texts import questions_of
from skyjax.sample import Sample
from skyjax.train import loop

ROOT = pathlib.Path(__file__).parents[1]
BASE = ROOT / "configs" / "image_text.py"
RESULTS = ROOT / "benchmarks" / "results" / "by_heart.json"
TRIES = 16  # texts made of an image until one is its own


def get_config(
    records: str = "runs/by_heart/records", tokenizer: str = "runs/words.model", vocabulary: int = 4000
) -> ml_collections.ConfigDict:
    """configs/image_text.py of these optical images, as far as it must change to be asked for what it was told."""
    told = (f"sources={records}", f"tokenizer={tokenizer}", f"vocabulary={vocabulary}")
    config = load_config(BASE, (*told, "modalities=optical", "pixels=96"))
    config.steps, config.batch_size = 450, 64
    config.checkpoint.every = 200
    config.data.text.captions = 1
    config.data.text.length = config.model.text.length = config.model.decoder.length = 96
    config.data.global_views.area = (0.9, 1.0)
    for name in config.data.augment:
        config.data.augment[name] = 0 if name == "date_jitter" else 0.0
    # The teacher is asked: it may not remember what the student knew before the end.
    config.optimizer.teacher_momentum, config.optimizer.final_teacher_momentum = 0.95, 0.98
    config.objective.weights.image = 0.0  # what makes images alike is not asked here
    config.objective.weights.caption = 1.0
    return config


def with_own_texts(folders: Iterable[str]) -> Iterator[Sample]:
    """The optical images of data sets, each with one text that none before it has; those that get none are left out."""
    taken: set[str] = set()
    for folder in folders:
        source = records.RecordSource(folder)
        names = source.description.get("label_names", {})
        for i in range(len(source)):
            sample = source[i]
            optical = {name: each for name, each in sample.sequences.items() if name == "optical"}
            sample = dataclasses.replace(sample, sequences=optical)
            made = captions(sample, names, seed=0, number=TRIES, questions=questions_of(sample.texts))
            own = next((text for text in made if text not in taken), None)
            if own is not None and optical:
                taken.add(own)
                yield dataclasses.replace(sample, texts=(own,), labels={})


def main() -> None:
    """Writes the texts, trains, asks, and keeps what came of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", metavar="FOLDER", help="data sets made by skyjax data build")
    parser.add_argument("--workdir", type=pathlib.Path, default=pathlib.Path("runs/by_heart"))
    parser.add_argument("--tokenizer", default="runs/words.model")
    parser.add_argument("--vocabulary", type=int, default=4000)
    args = parser.parse_args()

    folder = args.workdir / "records"
    images = records.write(with_own_texts(args.folders), folder).count
    config = get_config(str(folder), args.tokenizer, args.vocabulary)
    start = time.perf_counter()
    code = loop.train(config, args.workdir)
    if code != loop.EXIT_DONE:
        raise SystemExit(code)
    minutes = (time.perf_counter() - start) / 60

    size = config.model.modalities.optical.image_size
    found = retrieval.run(args.workdir, str(folder), image_size=size)
    recall = {row["method"]: row["accuracy"] for row in found["rows"] if row["features"] == written.PRETRAINED}
    said = written.run(args.workdir, str(folder), image_size=size)["said"]
    # The decoder writes what the tokenizer makes of a text: without capitals where it knows none.
    same = [each["said"].lower() in [text.lower() for text in each["told"]] for each in said]
    told = {
        "images": images,
        "steps": config.steps,
        "batch_size": config.batch_size,
        "minutes": round(minutes, 1),
        "recall": recall,
        "word_for_word": sum(same) / len(same),
    }
    RESULTS.write_text(json.dumps(told, indent=2) + "\n")
    print(json.dumps(told, indent=2))
    wrong = [each for each, right in zip(said, same, strict=True) if not right]
    for each in wrong:
        print(f"{each['image']}\n  told {each['told'][0]}\n  said {each['said']}")


if __name__ == "__main__":
    main()
