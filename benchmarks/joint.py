"""Whether words harm what sequences learn without them: configs/time_series.py alone, and joined by captions.

PYTHONPATH=. python benchmarks/joint.py [--seeds=0,1,2] [--workdir=runs/joint]

Both runs see the same sites in the same order. The joined one has the text tower and decoder of configs/image_text.py
and its losses beside its own, on captions made of species and crop labels, place and date. Then the frozen features are
probed as ever: kNN of the BigEarthNet pairs, which neither run saw, and the blocks of the two agricultural sites. Of
these the captions tell a site's shares, test blocks included, in one sentence for 16,384 pixels.

This script is a config too:
skyjax train --config=benchmarks/joint.py --config.words=True --config.seed=1 --workdir=runs/joint/words-1
"""

import argparse
import json
import pathlib
from typing import Any

import ml_collections
import numpy as np

import skyjax
from skyjax.config import load_config
from skyjax.evals import probe, segmentation
from skyjax.evals.features import untrained
from skyjax.train import loop

ROOT = pathlib.Path(__file__).parents[1]
CONFIGS = ROOT / "configs"
RESULTS = ROOT / "benchmarks" / "results" / "joint.json"
PAIRS = "benv2"  # probed, and kept out of training with its like
UNSEEN = (PAIRS, "bigearthnet")
TERMS = ("text", "words", "caption")
# Of the image-text config's weights: there are three streams, and a site's caption is the same for all its pixels.
SHARE = 0.2


def get_config(
    words: bool = False,
    records: str = "runs/records",
    tokenizer: str = "data/sample/tokenizer/albert_en_30k_spiece.model",
    vocabulary: int = 30_000,
) -> ml_collections.ConfigDict:
    """configs/time_series.py on fewer dates and steps, with or without words."""
    config = load_config(CONFIGS / "time_series.py", [f"records={records}"])
    told = load_config(CONFIGS / "image_text.py", [f"tokenizer={tokenizer}", f"vocabulary={vocabulary}"])
    with config.unlocked():
        config.words, config.tokenizer, config.vocabulary = words, tokenizer, vocabulary
        config.steps, config.batch_size, config.checkpoint.every = 300, 16, 300
        config.data.same_dates = 16
        config.data.dates = {"multispectral": 8, "sar": 6}
        sources = [(path, share) for path, share in config.data.sources if pathlib.Path(path).name not in UNSEEN]
        config.data.sources = tuple((path, share / sum(s for _, s in sources)) for path, share in sources)
        if words:
            config.data.text = told.data.text
            config.model.text, config.model.decoder = told.model.text, told.model.decoder
            config.objective.text = told.objective.text
            config.objective.text.streams = ("fused", "multispectral", "sar")
            config.objective.weights.update({term: SHARE * told.objective.weights[term] for term in TERMS})
            for key in ("learning_rate_multipliers", "weight_decay_multipliers"):
                config.optimizer[key] = told.optimizer[key]
    return config


def probes(workdir: pathlib.Path, seed: int, records: pathlib.Path) -> dict[str, float]:
    """Title -> value of each probe of the trained encoder, as shares of 1."""
    model = skyjax.load(workdir)
    found = {}
    for label in ("land_cover", "crop_type"):
        options = segmentation.Options(str(records / "worldcereal"), label=label, seed=seed, baselines=False)
        for row in segmentation.compare(model, model, options)["rows"]:
            found[f"{label}, {row['method']}"] = row["accuracy"]
    for row in probe.compare(model, untrained(model, seed), probe.Options("knn", str(records / PAIRS)))["rows"]:
        if row["features"] in (probe.PRETRAINED, probe.UNTRAINED):
            found[f"BigEarthNet pairs, {row['method']}, {row['features']}"] = row["accuracy"]
    return found


def main() -> None:
    """Trains both kinds with each seed, probes them, and keeps what came of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--workdir", type=pathlib.Path, default=pathlib.Path("runs/joint"))
    parser.add_argument("--records", default="runs/records")
    parser.add_argument("--tokenizer", default="data/sample/tokenizer/albert_en_30k_spiece.model")
    parser.add_argument("--vocabulary", type=int, default=30_000)
    args = parser.parse_args()

    values: dict[str, dict[str, list[float]]] = {}
    for seed in map(int, args.seeds.split(",")):
        for kind, words in (("alone", False), ("with words", True)):
            workdir = args.workdir / f"{kind.replace(' ', '-')}-{seed}"
            config = get_config(words, args.records, args.tokenizer, args.vocabulary)
            config.seed = seed
            code = loop.train(config, workdir)
            if code != loop.EXIT_DONE:
                raise SystemExit(code)
            for title, value in probes(workdir, seed, pathlib.Path(args.records)).items():
                values.setdefault(title, {}).setdefault(kind, []).append(value)
    rows: dict[str, Any] = {}
    print(f"{'':45}{'alone':>16}{'with words':>16}{'difference':>16}")
    for title, kinds in values.items():
        alone, joined = (100 * np.array(kinds[kind]) for kind in ("alone", "with words"))
        texts = [f"{x.mean():.1f} ± {x.std(ddof=1) if len(x) > 1 else 0:.1f}" for x in (alone, joined, joined - alone)]
        print(f"{title:45}" + "".join(f"{text:>16}" for text in texts))
        rows[title] = kinds
    RESULTS.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
