"""A light head over two vectors, an image's and a question's: logistic regression on both and on their products.

Few images meet many questions, so both are cut to their first principal axes, each axis as long as the square root of
its spread: the image's to 8 or 16, the question's to 150, of which 30 meet the image's. What the image says is made ten
times smaller, so that a penalty which lets the question speak keeps it from learning images by heart. The number of
axes and the penalty are chosen by cross-validation over training images: questions about one image stay together.
"""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Float, Int

from skyjax.evals.linear import logistic_path, standardiser

QUESTION_AXES, CROSSED_AXES = 150, 30
IMAGE_AXES, IMAGE_SCALE = (8, 16), 0.1
INVERSE_PENALTIES = tuple(np.logspace(-1.5, 1, 6).tolist())
FOLDS = 4


@dataclasses.dataclass(frozen=True)
class Asked:
    """Questions about images.

    Attributes:
      question: features of each question.
      image: row of its image in `images`.
      images: features of all images; None asks the question alone.
    """

    question: Float[np.ndarray, "n q"]
    image: Int[np.ndarray, "n"]
    images: Float[np.ndarray, "i d"] | None

    def __getitem__(self, which: np.ndarray) -> "Asked":
        return Asked(self.question[which], self.image[which], self.images)


@dataclasses.dataclass(frozen=True)
class Choice:
    """What cross-validation chose: axes of the image's features, and C."""

    axes: int
    penalty: float


def choose(train: Asked, labels: Int[np.ndarray, "n"], *, num_classes: int, seed: int = 0) -> Choice:
    """The choice with the most answers right over the folds; of equals the fewer axes, then the stronger penalty."""
    images = np.unique(train.image)
    fold = np.empty(int(train.image.max()) + 1, int)
    fold[np.random.default_rng(seed).permutation(images)] = np.arange(len(images)) % FOLDS
    tested = fold[train.image]
    right: dict[Choice, int] = {}
    for axes in (0,) if train.images is None else IMAGE_AXES:
        for number in range(min(FOLDS, len(images))):
            inner, outer = tested != number, tested == number
            if not inner.any():  # a single image
                continue
            said = _fit(train[inner], labels[inner], train[outer], axes, INVERSE_PENALTIES, num_classes)
            for penalty, each in zip(INVERSE_PENALTIES, said, strict=True):
                choice = Choice(axes, penalty)
                right[choice] = right.get(choice, 0) + int((each == labels[outer]).sum())
    return max(right, key=right.__getitem__) if right else Choice(IMAGE_AXES[0], INVERSE_PENALTIES[0])


def predict(
    train: Asked, labels: Int[np.ndarray, "n"], test: Asked, *, choice: Choice, num_classes: int
) -> Int[np.ndarray, "m"]:
    """The class of each test question after fitting on all of the training part."""
    return _fit(train, labels, test, choice.axes, [choice.penalty], num_classes)[0]


def _fit(
    train: Asked,
    labels: Int[np.ndarray, "n"],
    test: Asked,
    axes: int,
    penalties: Sequence[float],
    num_classes: int,
) -> Int[np.ndarray, "p m"]:
    question = _axes(train.question, QUESTION_AXES)
    image = None
    if train.images is not None:
        seen = train.images[np.unique(train.image)]  # once each: an image counts the same however much is asked of it
        normalise = standardiser(seen)
        short = _axes(normalise(seen), axes)
        image = IMAGE_SCALE * short(normalise(train.images))
    weights = logistic_path(_design(train, question, image), labels, penalties, num_classes=num_classes)
    tested = _design(test, question, image)
    return (np.einsum("nf,pfk->pnk", tested, weights[:, :-1]) + weights[:, None, -1]).argmax(-1)


def _design(
    asked: Asked, question: Callable[[np.ndarray], np.ndarray], images: Float[np.ndarray, "i k"] | None
) -> Float[np.ndarray, "n f"]:
    words = question(asked.question)
    if images is None:
        return words
    seen = images[asked.image]
    products = np.einsum("nq,nk->nqk", words[:, :CROSSED_AXES], seen).reshape(len(words), -1)
    return np.concatenate([words, seen, products], axis=1)


def _axes(features: Float[np.ndarray, "n d"], count: int) -> Callable[[np.ndarray], Float[np.ndarray, "n k"]]:
    """x -> its places along the principal axes of `features`; the spread of the first is 1."""
    mean = features.mean(0, dtype=np.float64)
    centred = features - mean
    if len(centred) > centred.shape[1]:
        variance, directions = np.linalg.eigh(centred.T @ centred / len(centred))
        spread = np.sqrt(variance.clip(0))[::-1]
        directions = directions[:, ::-1]
    else:
        _, lengths, transposed = np.linalg.svd(centred, full_matrices=False)
        spread, directions = lengths / np.sqrt(len(centred)), transposed.T
    kept = spread[:count] > 1e-6 * max(float(spread[0]), 1e-30)
    spread, directions = spread[:count][kept], directions[:, :count][:, kept]
    scale = 1 / np.sqrt(spread * spread[0]) if len(spread) else spread
    return lambda x: (((x - mean) @ directions) * scale).astype(np.float32)
