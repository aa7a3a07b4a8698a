"""Images of a labelled or captioned set, looked at once: what cannot be used is named, what differs in size is resized.

In: examples (evals/sources.py). Out: numbers of those that can be used, one image size a modality, and a reader.
"""

import collections
import concurrent.futures
import dataclasses
import hashlib
import logging
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np
import rasterio.errors
from jaxtyping import Int

from skyjax.errors import BadRecord, UserError
from skyjax.evals.progress import track
from skyjax.evals.sources import Example
from skyjax.input.resample import Axis, cut
from skyjax.sample import Sample

BAD_SHARE = 0.01
_KEPT_BYTES = 2**30  # of images held in memory; those beyond are read again

logger = logging.getLogger("skyjax")


@dataclasses.dataclass(frozen=True)
class Images:
    """Images that were looked at.

    Attributes:
      sizes: modality -> (height, width) of every image.
      digests: number of an example that can be used -> a digest of its pixels.
      notes: what a reader of the results should know.
      read: number of an example -> its sample, of these sizes.
    """

    sizes: Mapping[str, tuple[int, int]]
    digests: Mapping[int, bytes]
    notes: tuple[str, ...]
    read: Callable[[int], Sample]


def look_at(
    examples: Sequence[Example],
    used: Int[np.ndarray, "n"],
    *,
    typical: Iterable[int] | None = None,
    image_size: int | None = None,
    largest: Mapping[str, int] | None = None,
) -> Images:
    """Reads every image once.

    Args:
      examples: of the set.
      used: numbers of those that are looked at.
      typical: numbers of those whose most common size is that of all; all that are used where left out.
      image_size: pixels a side that every image is resized to.
      largest: modality -> longest side in pixels; larger images are shrunk to it.

    Raises:
      UserError: more than 1 % of the images cannot be used.
    """
    reader = _Reader(examples)
    facts = reader.scan(used)
    sizes, resized = _sizes(
        [facts[i].sizes for i in (used.tolist() if typical is None else typical) if i in facts],
        facts,
        image_size,
        largest or {},
    )
    notes = (*resized, *_bad_note(len(used) - len(facts), len(used)))
    digests = {i: fact.digest for i, fact in facts.items()}
    return Images(sizes, digests, notes, lambda i: _resize(reader(i), sizes))


@dataclasses.dataclass(frozen=True)
class _Facts:
    sizes: dict[str, tuple[int, int]]  # modality -> height, width
    digest: bytes  # of the pixels


class _Reader:
    """Reads examples, keeping the first gigabyte of them."""

    def __init__(self, examples: Sequence[Example]):
        self._examples = examples
        self._kept: dict[int, Sample] = {}
        self._bytes = 0

    def __call__(self, i: int) -> Sample:
        return self._kept[i] if i in self._kept else self._examples[i].read()

    def scan(self, which: Int[np.ndarray, "n"]) -> dict[int, _Facts]:
        """What each example that can be used is; the others are named.

        Raises:
          UserError: more than 1 % cannot be used.
        """
        facts: dict[int, _Facts] = {}
        bad: list[str] = []
        numbers = which.tolist()
        # Each read silences this warning for itself, but the filters are the process's: threads undo each other's.
        with warnings.catch_warnings(), concurrent.futures.ThreadPoolExecutor(max_workers=4) as threads:
            warnings.simplefilter("ignore", rasterio.errors.NotGeoreferencedWarning)
            results = track(threads.map(self._look, numbers), len(numbers), "reading images")
            for i, result in zip(numbers, results, strict=True):
                if isinstance(result, _Facts):
                    facts[i] = result
                else:
                    bad.append(str(result))
                    logger.warning("%s; left out, %d so far", result, len(bad))
        if len(bad) > BAD_SHARE * len(which):
            raise UserError(
                f"{len(bad):,} of {len(which):,} images cannot be used, more than 1 %; mend or remove them. The first:"
                f" {bad[0]}"
            )
        return facts

    def _look(self, i: int) -> _Facts | BadRecord:
        try:
            sample = self._examples[i].read()
        except BadRecord as error:
            return error
        if not any(sequence.valid.any() for sequence in sample.sequences.values()):
            return BadRecord(f"{self._examples[i].name} has no measured pixel")
        digest = hashlib.blake2b(digest_size=16)
        sizes = {}
        for modality, sequence in sample.sequences.items():
            sizes[modality] = (sequence.values.shape[1], sequence.values.shape[2])
            digest.update(np.ascontiguousarray(sequence.values).data)
            self._bytes += sequence.values.nbytes + sequence.clear.nbytes
        if self._bytes < _KEPT_BYTES:
            self._kept[i] = sample
        return _Facts(sizes, digest.digest())


def _sizes(
    train: Sequence[Mapping[str, tuple[int, int]]],
    facts: Mapping[int, _Facts],
    image_size: int | None,
    largest: Mapping[str, int],
) -> tuple[dict[str, tuple[int, int]], list[str]]:
    """The one size of each modality, and what to say about it: the training part's most common, unless too large."""
    every = [each.sizes for each in facts.values()]
    sizes, notes = {}, []
    for modality in dict.fromkeys(m for each in every for m in each):
        seen = collections.Counter(each[modality] for each in every if modality in each)
        common = collections.Counter(each[modality] for each in train if modality in each) or seen
        # Of sizes that are as common, the larger.
        height, width = max(common, key=lambda size: (common[size], size))
        limit = largest.get(modality, max(height, width))
        if image_size is not None:
            height = width = image_size
        elif max(height, width) > limit:
            shrink = limit / max(height, width)
            height, width = max(1, round(height * shrink)), max(1, round(width * shrink))
        sizes[modality] = (height, width)
        other = sum(count for size, count in seen.items() if size != (height, width))
        if other:
            notes.append(
                f"{other:,} of {sum(seen.values()):,} {modality} images of another size were resized to"
                f" {height} x {width} pixels"
            )
    return sizes, notes


def _resize(sample: Sample, sizes: Mapping[str, tuple[int, int]]) -> Sample:
    sequences = {}
    for modality, sequence in sample.sequences.items():
        t, height, width, _ = sequence.values.shape
        if (height, width) != sizes[modality]:
            rows, columns = sizes[modality]
            values, clear = cut(
                sequence.values, sequence.clear, np.arange(t), Axis(0, height, rows), Axis(0, width, columns)
            )
            sequence = dataclasses.replace(sequence, values=values, clear=clear)
        sequences[modality] = sequence
    return dataclasses.replace(sample, sequences=sequences)


def _bad_note(bad: int, total: int) -> list[str]:
    return [f"{bad:,} of {total:,} images cannot be used and were left out"] if bad else []
