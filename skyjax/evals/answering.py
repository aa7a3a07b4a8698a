"""Answers that a checkpoint's decoder writes, where other rows choose from a closed set.

In: images, each with its questions. Out: a text a question, greedily. An image is encoded once, however much is
asked of it.
"""

import itertools
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from skyjax.evals.features import Encoder
from skyjax.evals.probe import DECODER
from skyjax.sample import Sample
from skyjax.train.words import Words

IMAGES, QUESTIONS = 8, 64  # at a time; a smaller rest is filled up, so that one shape of each is compiled

# (images, the questions of each) -> answers in words, as many: one that writes instead of choosing.
Answerer = Callable[[Sequence[Sample], Sequence[Sequence[str]]], Sequence[Sequence[str]]]


def own(model: Encoder, known: Iterable[str]) -> dict[str, Answerer]:
    """The model's decoder by the name of its row; nothing where it has none. `known`: see `by_decoder`."""
    text = getattr(model, "words", None)
    return {DECODER: by_decoder(model, text, known)} if text is not None and text.can_caption else {}


def by_decoder(model: Encoder, text: Words, known: Iterable[str]) -> Answerer:
    """Who answers by the decoder on the fused features.

    Args:
      model: encodes the images.
      text: its text side, with a decoder.
      known: answers as people write them. An uncased tokenizer writes "yes" for their "Yes"; that counts as theirs.
    """
    answers, tokenizer = sorted(set(known)), text.tokenizer
    tokens, valid = tokenizer.encode(answers, text.config.data.text.length)
    spelled = dict(zip(tokenizer.decode(tokens, valid), answers, strict=True))

    def answer(samples: Sequence[Sample], questions: Sequence[Sequence[str]]) -> list[list[str]]:
        output = model.encode([*samples, *[samples[-1]] * (IMAGES - len(samples))])
        counts = [len(every) for every in questions]
        image, asked = np.repeat(np.arange(len(samples)), counts), list(itertools.chain(*questions))
        said: list[str] = []
        for start in range(0, len(asked), QUESTIONS):
            texts, which = asked[start : start + QUESTIONS], image[start : start + QUESTIONS]
            missing = QUESTIONS - len(texts)
            which = np.pad(which, (0, missing), mode="edge")
            places = output["fused"][which], output["fused_valid"][which]
            written = text.caption(*places, questions=texts + texts[-1:] * missing)
            said += [spelled.get(each, each) for each in written[: len(texts)]]
        rest = iter(said)
        return [list(itertools.islice(rest, count)) for count in counts]

    return answer
