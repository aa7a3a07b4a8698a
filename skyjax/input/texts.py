"""The captions of a sample as a batch holds them: drawn, told apart by a number, and turned into tokens.

In: a sample, the names of its classes, (seed, position in the global order). Out: the sample's part of batch["text"]:

    {"tokens": (k, l) int32, "valid": (k, l) bool, "words": (k,) int32,
     "written": {"tokens": (l,) int32, "valid": (l,) bool, "counted": (l,) bool}}     "written" for a decoder alone

A caption that is not there has no valid token. `words` is equal for captions of equal words, so that losses do not take
one for a wrong caption of another site that is told of alike. Questions with their answers (`questions_of`) are read as
statements, and a decoder learns to answer them: of its row, the answer counts.
"""

import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import ml_collections
import numpy as np

from skyjax.errors import UserError
from skyjax.input.captions import captions
from skyjax.input.tokenizer import Tokenizer
from skyjax.sample import Sample

# Sets the draw of captions apart from that of views, which starts from the same seed and index.
_STREAM = 0x7E87


class Texts:
    """Captions by the config's `data.text`.

    Attributes:
      tokenizer: what makes tokens.
    """

    def __init__(self, config: ml_collections.ConfigDict, model: ml_collections.ConfigDict, seed: int):
        """Reads the tokenizer.

        Args:
          config: `data.text`: "tokenizer", its file; "length", tokens a row; "captions", rows a sample; "from_labels",
            how many captions are made of the labels of a sample without texts, of which rows are drawn (0: none);
            "metadata", whether these tell of sensor, place and date.
          model: the config's `model`, whose text tower and decoder shall know the tokenizer's ids and length.
          seed: of the run.

        Raises:
          UserError: the tokenizer is not usable, or a number makes no sense.
        """
        for key, least in (("captions", 1), ("length", 3), ("from_labels", 0)):
            if not isinstance(config[key], int) or config[key] < least:
                raise UserError(f"config: data.text.{key} is {config[key]}; set it to {least} or more")
        self.tokenizer = Tokenizer(config.tokenizer)
        for name in ("text", "decoder"):
            part = model.get(name)
            if part and part.vocabulary < self.tokenizer.size:
                raise UserError(
                    f"config: model.{name}.vocabulary is {part.vocabulary}, but {config.tokenizer} has"
                    f" {self.tokenizer.size} ids; set it to that or more"
                )
            if part and part.length < config.length:
                raise UserError(
                    f"config: data.text.length is {config.length}, more than model.{name}.length = {part.length}; set"
                    " it to that or less"
                )
        self._config, self._seed, self._writes = config, seed, bool(model.get("decoder"))

    def __call__(self, sample: Sample, names: Mapping[str, Any], index: int) -> dict[str, Any]:
        """The sample's rows.

        Args:
          sample: with texts, or with labels that make some.
          names: label -> names of its numbers, of the sample's data set.
          index: position in the global order, by which captions are drawn.
        """
        config, encode = self._config, self.tokenizer.encode
        asked = questions_of(sample.texts)
        known = tuple(text for text in sample.texts if "\t" not in text)
        if not known and config.from_labels:
            known = captions(
                sample, names, seed=self._seed, number=config.from_labels, metadata=config.metadata, questions=asked
            )
        rng = np.random.default_rng((self._seed, index, _STREAM))
        chosen: list[str | None] = [known[i] for i in rng.permutation(len(known))[: config.captions]]
        chosen += [None] * (config.captions - len(chosen))
        tokens, valid = encode(chosen, config.length)
        words = [zlib.crc32(row[there].tobytes()) & 0x7FFFFFFF for row, there in zip(tokens, valid, strict=True)]
        found: dict[str, Any] = {"tokens": tokens, "valid": valid, "words": np.array(words, np.int32)}
        if self._writes:
            if asked and (chosen[0] is None or rng.random() < 0.5):
                question, answer = asked[int(rng.integers(len(asked)))]
                rows = self.tokenizer.encode_pairs([question], [answer], config.length)
            else:
                first, there = tokens[:1], valid[:1]
                rows = (first, there, there & (np.arange(config.length) > 0))
            found["written"] = dict(zip(("tokens", "valid", "counted"), (row[0] for row in rows), strict=True))
        return found


def questions_of(texts: Sequence[str]) -> tuple[tuple[str, str], ...]:
    """(question, answer) of the texts that are such: fields with tabs between, the last two of which these are."""
    return tuple((fields[-2], fields[-1]) for fields in (text.split("\t") for text in texts) if len(fields) > 1)
