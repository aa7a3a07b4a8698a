"""BLEU-1 to 4, METEOR, ROUGE-L and CIDEr by their standard implementations (pycocoevalcap), with intervals.

Texts are split and stripped of punctuation as COCO's evaluation does it, by Stanford's PTB tokenizer; that and METEOR
are Java programs which the package brings. In: what was said of each image, and what people said. Out: a score and its
interval a metric, and of each image what it got.
"""

import dataclasses
import os
import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from jaxtyping import Float

from skyjax.errors import UserError
from skyjax.evals.bootstrap import PERCENTILES, RESAMPLES

BLEU = tuple(f"BLEU-{n}" for n in (1, 2, 3, 4))
METEOR, ROUGE, CIDER, EXACT = "METEOR", "ROUGE-L", "CIDEr", "word for word"
METRICS = (*BLEU, METEOR, ROUGE, CIDER, EXACT)
_NOTHING = "nothing"  # stands for an empty caption, which METEOR's protocol cannot say; see `tokenize`


@dataclasses.dataclass(frozen=True)
class Score:
    """A metric over all images, the ends of its 95 % interval, and its value for each image alone."""

    value: float
    low: float
    high: float
    each: Float[np.ndarray, "n"]


def check_tools() -> None:
    """Refuses where the package or Java is missing, before hours of generating.

    Raises:
      UserError: one is.
    """
    _package()
    java = shutil.which("java")
    # A Mac has a program of this name that only says that there is no Java.
    works = java is not None and subprocess.run([java, "-version"], capture_output=True, check=False).returncode == 0
    if not works:
        raise UserError(
            "--task=captions needs Java, which is not found: METEOR and the tokenizer of all caption scores are Java"
            " programs; install a Java runtime 8 or newer (Debian: apt-get install default-jre-headless)"
        )


def _package() -> Any:
    try:
        import pycocoevalcap
    except ImportError as error:
        raise UserError(
            '--task=captions needs pycocoevalcap, which is not installed; pip install "skyjax[captions]" brings it'
        ) from error
    return pycocoevalcap


def score(
    systems: Mapping[str, Sequence[str]], told: Sequence[Sequence[str]], *, seed: int = 0
) -> dict[str, dict[str, Score]]:
    """Every metric of one or several systems.

    Args:
      systems: name -> its caption of each image.
      told: the captions of people, one or more an image.
      seed: of the bootstrap over images; all systems are drawn alike.

    Returns:
      Name -> metric -> score: fractions of 1, CIDEr of 10. BLEU is of the corpus, METEOR of its summed statistics,
      ROUGE-L and CIDEr are means over images. "word for word" is the share of captions that equal one of people's once
      tokenized.

    Raises:
      UserError: the package or Java is missing.
    """
    check_tools()
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.meteor.meteor import Meteor
    from pycocoevalcap.rouge.rouge import Rouge

    references = tokenize(told)
    draws = np.random.default_rng(seed).multinomial(len(told), np.full(len(told), 1 / len(told)), RESAMPLES)
    with _java():
        meteor = Meteor()  # takes seconds to start, so one serves all
    found = {}
    for system, said in systems.items():
        hypotheses = tokenize([[text] for text in said])
        found[system] = _bleu(references, hypotheses, draws)
        for name, scorer in ((METEOR, meteor), (ROUGE, Rouge()), (CIDER, Cider())):
            value, each = scorer.compute_score(_numbered(references), _numbered(hypotheses))
            found[system][name] = _mean(float(value), np.array(each, float), draws)
        same = [float(text[0] in texts) for text, texts in zip(hypotheses, references, strict=True)]
        found[system][EXACT] = _mean(float(np.mean(same)), np.array(same), draws)
    return found


def tokenize(texts: Sequence[Sequence[str]]) -> list[list[str]]:
    """Texts in lower case, tokens with a blank between, without punctuation, as COCO's evaluation has them.

    An empty text becomes "nothing": METEOR would take a reference for it, and the others would divide by its length.
    """
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    # A line a text: what Java takes for the end of one may stand in none.
    lines = {i: [{"caption": " ".join(text.split()) or _NOTHING} for text in every] for i, every in enumerate(texts)}
    with _java():
        found = PTBTokenizer().tokenize(lines)
    if [len(found.get(i, ())) for i in lines] != [len(every) for every in lines.values()]:
        raise UserError("--task=captions: Java's tokenizer failed; its message stands above")
    return [[text.replace("|||", " ").strip() or _NOTHING for text in found[i]] for i in lines]


@contextmanager
def _java() -> Iterator[None]:
    """Java reads and writes UTF-8, whatever the locale: METEOR would take two accents for one letter."""
    before = os.environ.get("JDK_JAVA_OPTIONS")
    os.environ["JDK_JAVA_OPTIONS"] = f"{before or ''} -Dfile.encoding=UTF-8 -Dstdout.encoding=UTF-8".strip()
    try:
        yield
    finally:
        if before is None:
            del os.environ["JDK_JAVA_OPTIONS"]
        else:
            os.environ["JDK_JAVA_OPTIONS"] = before


def _numbered(texts: Sequence[Sequence[str]]) -> dict[int, list[str]]:
    return {i: list(every) for i, every in enumerate(texts)}


def _bleu(references: Sequence[list[str]], hypotheses: Sequence[list[str]], draws: np.ndarray) -> dict[str, Score]:
    from pycocoevalcap.bleu.bleu_scorer import BleuScorer

    scorer = BleuScorer(n=4)
    for said, told in zip(hypotheses, references, strict=True):
        scorer += (said[0], told)
    values, each = scorer.compute_score(option="closest", verbose=0)
    # The corpus' BLEU of a draw is made of its images' summed counts, not of their BLEU.
    counts = [
        (*counted["correct"], *counted["guess"], counted["testlen"], _closest(counted["reflen"], counted["testlen"]))
        for counted in scorer.ctest
    ]
    drawn = bleu_of_counts(draws @ np.array(counts, float))
    return {
        name: Score(float(values[n]), *_ends(drawn[:, n]), np.asarray(each[n], float)) for n, name in enumerate(BLEU)
    }


def _closest(lengths: Sequence[int], length: int) -> int:
    """Of reference lengths the one nearest to a caption's, the shorter of two."""
    return min(lengths, key=lambda each: (abs(each - length), each))


def bleu_of_counts(counts: Float[np.ndarray, "r 10"]) -> Float[np.ndarray, "r 4"]:
    """BLEU-1 to 4 of summed counts: n-grams that are right, n-grams said (4 each), tokens said, tokens of people."""
    right, said, length, told = counts[:, :4], counts[:, 4:8], counts[:, 8], counts[:, 9]
    # As the package guards empty counts.
    logs = np.log((right + 1e-15) / (said + 1e-9))
    brevity = np.minimum(1 - (told + 1e-9) / (length + 1e-15), 0)
    return np.exp(np.cumsum(logs, 1) / np.arange(1, 5) + brevity[:, None])


def _mean(value: float, each: Float[np.ndarray, "n"], draws: np.ndarray) -> Score:
    """A score that is the images' mean, or near it: its interval is the mean's, moved to the value."""
    low, high = _ends(draws @ each / len(each) + value - each.mean())
    return Score(value, low, high, each)


def _ends(drawn: Float[np.ndarray, "r"]) -> tuple[float, float]:
    low, high = np.percentile(drawn, PERCENTILES)
    return float(low), float(high)
