"""Writes the scores of caption_example.json anew: what pycocoevalcap says of its captions by its own evaluation.

python tests/evals/write_caption_example.py

Nothing of skyjax takes part. It needs Java; run it again only where the captions are changed.
"""

import json
import pathlib
import types

import pycocoevalcap.eval

EXAMPLE = pathlib.Path(__file__).with_name("caption_example.json")


class NoSpice:
    """SPICE downloads models and is not one of our metrics; the evaluation would run it besides."""

    def method(self):
        return "SPICE"

    def compute_score(self, references, hypotheses):
        return 0.0, [0.0] * len(references)


def main():
    example = json.loads(EXAMPLE.read_text())

    def table(texts):
        annotations = {i: [{"image_id": i, "caption": text} for text in every] for i, every in enumerate(texts)}
        return types.SimpleNamespace(imgToAnns=annotations, getImgIds=lambda: list(annotations))

    pycocoevalcap.eval.Spice = NoSpice
    evaluation = pycocoevalcap.eval.COCOEvalCap(
        table([image["told"] for image in example["images"]]), table([[image["said"]] for image in example["images"]])
    )
    evaluation.evaluate()
    example["scores"] = {name: float(value) for name, value in evaluation.eval.items() if name != "SPICE"}
    for i, image in enumerate(example["images"]):
        image["scores"] = {n: float(v) for n, v in evaluation.imgToEval[i].items() if n not in ("SPICE", "image_id")}
    EXAMPLE.write_text(json.dumps(example, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
