"""Which dates a view has, and which of them the student sees.

In: the dates that a sequence has, and the sample's random numbers. Out: dates of each global view, and `student_valid`
of a batch (sample.py).
"""

from collections.abc import Mapping

import numpy as np
from jaxtyping import Int

from skyjax.sample import Images


def deal_dates(
    rng: np.random.Generator, valid: Int[np.ndarray, "n"], *, slots: int, views: int, apart: bool
) -> list[Int[np.ndarray, "k"]]:
    """The dates of each global view, in order.

    Apart, no date is in two views: what a single date shows beside the ground (haze, speckle, noise) tells nothing
    about the other view, and what is left to agree on is the course of the year. A sequence with fewer dates than views
    gives all of them to every view.

    Args:
      rng: draws them.
      valid: numbers of the dates that are there.
      slots: the most that a view has.
      views: how many there are.
      apart: whether views share no date; otherwise all have the same.
    """
    if not apart or len(valid) < views:
        return [np.sort(rng.permutation(valid)[:slots])] * views
    drawn = np.sort(rng.permutation(valid)[: views * slots])
    # Of neighbouring dates each view gets one: all views see the same seasons.
    rounds = np.tile(np.arange(views), (-(-len(drawn) // views), 1))
    owner = rng.permuted(rounds, axis=1).reshape(-1)[: len(drawn)]
    return [drawn[owner == view] for view in range(views)]


def drop_for_student(
    rng: np.random.Generator, images: Mapping[str, Images], *, drop_date: float, drop_modality: float
) -> None:
    """Fills `student_valid`: whole modalities and dates dropped at random, but never all that a view could show."""
    for modality in images.values():
        views, slots = modality["valid"].shape
        kept = (rng.random((views, 1)) >= drop_modality) & (rng.random((views, slots)) >= drop_date)
        modality["student_valid"] = modality["valid"] & kept
    valid = np.concatenate([modality["valid"] for modality in images.values()], axis=1)
    seen = valid & np.concatenate([modality["clear"].any(axis=(2, 3)) for modality in images.values()], axis=1)
    student = np.concatenate([modality["student_valid"] for modality in images.values()], axis=1)
    ends = np.cumsum([modality["valid"].shape[1] for modality in images.values()])
    for view in range(len(valid)):
        # A date under full cloud shows nothing; it counts only where there is no other.
        showing = seen[view] if seen[view].any() else valid[view]
        if showing.any() and not (student[view] & showing).any():
            student[view, rng.choice(np.flatnonzero(showing))] = True
    for modality, kept in zip(images.values(), np.split(student, ends[:-1], axis=1), strict=True):
        modality["student_valid"] = kept
