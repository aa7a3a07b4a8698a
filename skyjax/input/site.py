"""Whole sites as one view each, for encoding with a trained model: nothing cropped, turned, dropped or jittered.

In: samples as stored. Out: the images of a batch (sample.py) without views: every valid date of the ground that a
sample's sequences share.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float

from skyjax.errors import UserError
from skyjax.input.records import widest_type
from skyjax.input.resample import Axis, cut
from skyjax.input.views import band_positions, shared_ground, window
from skyjax.sample import Images, Sample
from skyjax.sample import Sequence as Stored


def site_images(
    samples: Sequence[Sample],
    sensors: Mapping[str, Sequence[str]],
    bands: Mapping[str, Sequence[str]],
    size: Mapping[str, tuple[int, int]] | None = None,
) -> dict[str, Images]:
    """The images of whole sites, stacked.

    Args:
      samples: modalities that `sensors` does not name are ignored.
      sensors: modality -> keys of the sensors that a model knows, in the order of its statistics.
      bands: modality -> the model's bands.
      size: modality -> rows and columns of pixels; native pixels where None or not named.

    Returns:
      Modality -> "values" (b, t, h, w, c) in the widest stored type, "days" (b, t), "valid" (b, t), "clear"
      (b, t, h, w), "sensor" (b,) row among `sensors`, "bands" (b, c). Dates are in order; samples of fewer dates are
      filled up with dates that are not valid, those without the modality have none.

    Raises:
      UserError: no sample has a valid date of these modalities, a sensor is not among `sensors`, or sizes differ.
    """
    batch = {}
    grounds = [shared_ground(sample, _present(sample, sensors)) for sample in samples]
    for modality, keys in sensors.items():
        found = [_present(sample, sensors).get(modality) for sample in samples]
        if all(sequence is None for sequence in found):
            continue
        cuts = [
            None if sequence is None else _cut(sample, modality, sequence, ground, keys, (size or {}).get(modality))
            for sample, sequence, ground in zip(samples, found, grounds, strict=True)
        ]
        batch[modality] = _stack(modality, found, cuts, keys, bands[modality])
    if not batch:
        raise UserError(
            f'sample "{samples[0].id}" has no valid date of {", ".join(sensors)}, which is what the model encodes'
        )
    return batch


Cut = tuple[np.ndarray, np.ndarray, np.ndarray]  # values, clear, days of the valid dates


def _present(sample: Sample, sensors: Mapping[str, Sequence[str]]) -> dict[str, Stored]:
    return {m: s for m, s in sample.sequences.items() if m in sensors and s.valid.any()}


def _cut(
    sample: Sample,
    modality: str,
    sequence: Stored,
    ground: Float[np.ndarray, "4"],
    sensors: Sequence[str],
    size: tuple[int, int] | None,
) -> Cut:
    if sequence.sensor not in sensors:
        raise UserError(
            f'sample "{sample.id}": sensor "{sequence.sensor}" is not among those that the model knows for {modality}'
            f" ({', '.join(sensors)}); name one of these if it is the same kind of image"
        )
    windows = [window(sequence, ground, 0.0, 1.0, axis) for axis in range(2)]
    pixels = size or tuple(max(1, round(length)) for _, length in windows)
    rows, columns = (Axis(start, length, n) for (start, length), n in zip(windows, pixels, strict=True))
    dates = np.flatnonzero(sequence.valid)
    values, clear = cut(sequence.values, sequence.clear, dates, rows, columns)
    return values, clear, sequence.days[dates]


def _stack(
    modality: str,
    sequences: Sequence[Stored | None],
    cuts: Sequence[Cut | None],
    sensors: Sequence[str],
    bands: Sequence[str],
) -> Images:
    there = [cut for cut in cuts if cut is not None]
    sizes = sorted({cut[0].shape[1:3] for cut in there})
    if len(sizes) > 1:
        raise UserError(
            f"samples of different {modality} sizes, {sizes[0]} and {sizes[-1]} pixels, do not stack; encode them one"
            f' at a time, or give size={{"{modality}": {sizes[0]}}}'
        )
    b, t, (h, w) = len(cuts), max(len(days) for _, _, days in there), sizes[0]
    images: Images = {
        "values": np.zeros((b, t, h, w, len(bands)), widest_type([values.dtype.name for values, _, _ in there])),
        "days": np.zeros((b, t), np.int32),
        "valid": np.zeros((b, t), bool),
        "clear": np.zeros((b, t, h, w), bool),
        "sensor": np.zeros(b, np.int32),
        "bands": np.zeros((b, len(bands)), bool),
    }
    for i, (sequence, part) in enumerate(zip(sequences, cuts, strict=True)):
        if sequence is None or part is None:
            continue
        values, clear, days = part
        slot, source = band_positions(sequence.sensor, sequence.bands, tuple(bands))
        n = len(days)
        images["values"][i, :n, :, :, slot] = np.moveaxis(values[..., source], -1, 0)
        images["clear"][i, :n], images["days"][i, :n], images["valid"][i, :n] = clear, days, True
        images["sensor"][i] = list(sensors).index(sequence.sensor)
        images["bands"][i, slot] = True
    return images
