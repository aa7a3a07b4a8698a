"""What flows: a sample of one site as it is stored, and the batch of views that training consumes.

A `Sample` is what a record holds and what a user hands to `model.encode`. A batch is a plain nested dict of arrays
with static shapes, so that grain, `jax.jit` and `device_put` see no types of ours. Axis letters: `b` batch, `v` views,
`t` dates, `h w` pixels, `c` bands.

A batch as the loader yields it (numpy, stored types) and as the device receives it:

    {"index": (b,) uint32 position in the global order, "lonlat": (b, 2) float32, "bad": (b,) bool,
     "global": views, "local": views,                                            # "local" only where local views exist
     "text": words}                                        # only where the model has a text tower: input/texts.py

    views = {"to_view": (b, v, 2, 3) float32, MODALITY: images, ...}

    images = {"values": (b, v, t, h, w, c) as stored, "days": (b, v, t) int32, "student_days": (b, v, t) int32,
              "valid": (b, v, t) bool, "student_valid": (b, v, t) bool, "clear": (b, v, t, h, w) bool,
              "sensor": (b,) int32 row of the statistics table, "bands": (b, c) bool}

`valid` is what the teacher sees; `student_valid` and `student_days` are after dropping and jitter. `to_view` maps
(row, column) in the sample's unit square to the view's unit square, flips and quarter turns included.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int, Int32, Shaped

from skyjax.errors import BadRecord
from skyjax.sensors import get_sensor

MODALITIES = ("optical", "multispectral", "sar")
STORED_TYPES = ("uint8", "uint16", "int16", "float32")

Batch = dict[str, Any]
Images = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Sequence:
    """One modality's images of one site.

    Attributes:
      values: pixels in the sensor's unit, as stored.
      days: days since 1970-01-01 of each date, in order.
      valid: whether a date is there.
      clear: whether a pixel was measured and is not cloud, shadow, snow or nodata.
      sensor: key in sensors.toml.
      bands: names of `values`' last axis, in order.
      extent: top, left, bottom, right in metres north and east of `Sample.lonlat`; top > bottom, right > left.
    """

    values: np.ndarray  # (t, h, w, c), one of STORED_TYPES
    days: Int32[np.ndarray, "t"]
    valid: Bool[np.ndarray, "t"]
    clear: Bool[np.ndarray, "t h w"]
    sensor: str
    bands: tuple[str, ...]
    extent: Float[np.ndarray, "4"]

    def __post_init__(self) -> None:
        values, names = self.values, get_sensor(self.sensor).names
        t = len(self.days) if self.days.ndim else 0
        strange = [band for band in self.bands if band not in names]
        if strange:
            get_sensor(self.sensor).index(strange[0])  # names the nearest; passes where the common name was used
            raise BadRecord(f'{self.sensor}: band "{strange[0]}" goes by its own name in a sequence: {" ".join(names)}')
        expect = {
            "values has four axes (t, h, w, c), and pixels": values.ndim == 4 and min(values.shape[1:]) > 0,
            f"values is one of {', '.join(STORED_TYPES)}": values.dtype.name in STORED_TYPES,
            "there are as many band names as bands": values.ndim == 4 and values.shape[3] == len(self.bands),
            "band names differ": len(set(self.bands)) == len(self.bands),
            "every date has a day": self.days.shape == values.shape[:1] and self.days.dtype.kind == "i",
            "every date has a valid flag": self.valid.shape == (t,) and self.valid.dtype == bool,
            "clear has the shape (t, h, w)": self.clear.shape == values.shape[:3] and self.clear.dtype == bool,
            "dates are in order": bool(np.all(np.diff(self.days) >= 0)),
            "extent is top, left, bottom, right with top > bottom and right > left": self.extent.shape == (4,)
            and bool(self.extent[0] > self.extent[2] and self.extent[3] > self.extent[1])
            and bool(np.abs(self.extent).max() < 1e8),
        }
        for rule, holds in expect.items():
            if not holds:
                raise BadRecord(
                    f"{self.sensor}: a sequence of shape {values.shape}, {values.dtype}, {len(self.bands)} bands and"
                    f" {t} days breaks the rule that {rule}"
                )


@dataclasses.dataclass(frozen=True)
class Sample:
    """One place with its sequences, position and texts. An absent modality is not in `sequences`.

    Attributes:
      sequences: modality -> sequence.
      lonlat: degrees, NaN where unknown.
      texts: captions; may be empty.
      labels: name -> class number, multi-hot vector or (h, w) map; -1 unlabelled. Or a float32 vector of shares.
      id: unique within its source.
      source: name of the collection.
    """

    sequences: Mapping[str, Sequence]
    lonlat: Float[np.ndarray, "2"]
    texts: tuple[str, ...] = ()
    labels: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)
    id: str = ""
    source: str = ""

    def __post_init__(self) -> None:
        unknown = set(self.sequences) - set(MODALITIES)
        if unknown:
            raise BadRecord(f"{self.id}: unknown modality {sorted(unknown)}; known: {', '.join(MODALITIES)}")
        for modality, sequence in self.sequences.items():
            own = get_sensor(sequence.sensor).modality
            if own != modality:
                raise BadRecord(f"{self.id}: {sequence.sensor} is {own}, not {modality}")
        if self.lonlat.shape != (2,) or self.lonlat.dtype.kind != "f":
            raise BadRecord(f"{self.id}: lonlat has the shape {self.lonlat.shape}, {self.lonlat.dtype}; not two floats")
        if np.any(np.abs(self.lonlat) > (360, 90)):
            raise BadRecord(f"{self.id}: lonlat {self.lonlat.tolist()} is no place on Earth; it is in degrees")


def make_sequence(
    values: Shaped[np.ndarray, "t h w c"],
    sensor: str,
    bands: tuple[str, ...],
    *,
    days: Int[np.ndarray, "t"],
    clear: Bool[np.ndarray, "t h w"] | None = None,
    gsd: float | None = None,
    extent: Float[np.ndarray, "4"] | None = None,
    name: str = "",
) -> Sequence:
    """A sequence from pixels as a source has them: dates put in order, gaps found, another unit or scale refused.

    Args:
      values: pixels of any number type that a stored type holds.
      sensor: key in sensors.toml.
      bands: names, exact or common, in the order of c.
      days: days since 1970-01-01, in any order; dates of one day keep theirs.
      clear: False where the source knows of cloud, shadow, snow or nodata. What the sensor's table says is added: a
        pixel with nodata, NaN or an implausible value is not clear, and a date without a measured pixel is not valid.
      gsd: metres a pixel; the sensor's where left out. The image is centred at the sample's lonlat.
      extent: in the place of `gsd`, where the image is not centred.
      name: of the file, for messages.

    Raises:
      BadRecord: the number of bands or dates is wrong, or the values are of another unit or scale.
      UserError: the sensor or a band is not known.
    """
    table = get_sensor(sensor)
    names = tuple(table.names[table.index(band)] for band in bands)
    where = f"{name}: " if name else ""
    if values.ndim != 4 or values.shape[3] != len(names):
        found = values.shape[3] if values.ndim == 4 else f"shape {values.shape}"
        raise BadRecord(f"{where}{found} bands; {sensor} was asked for {len(names)}: {' '.join(names)}")
    if days.shape != values.shape[:1]:
        raise BadRecord(f"{where}{len(days)} days for {len(values)} images of {sensor}; each image needs its date")
    order = np.argsort(days, kind="stable")
    values, days = stored(values)[order], days[order].astype(np.int32)
    clear = np.ones(values.shape[:3], bool) if clear is None else clear[order]
    table.check_scale(values[clear], name)
    measured = table.measured(values)
    _, height, width, _ = values.shape
    return Sequence(
        values,
        days,
        np.any(measured, (1, 2)),
        measured & clear,
        sensor,
        names,
        centred(height, width, gsd or table.gsd) if extent is None else extent,
    )


def stored(values: np.ndarray) -> np.ndarray:
    """The values in the first of STORED_TYPES that holds them all; float64 is rounded to float32."""
    if values.dtype.name in STORED_TYPES:
        return values
    if values.dtype.kind in "biu":
        low, high = (int(values.min()), int(values.max())) if values.size else (0, 0)
        for name in STORED_TYPES[:3]:
            if np.iinfo(name).min <= low and high <= np.iinfo(name).max:
                return values.astype(name)
    return values.astype(np.float32)


def centred(height: int, width: int, gsd: float) -> Float[np.ndarray, "4"]:
    """Extent (top, left, bottom, right) in metres of an image whose middle is the sample's lonlat."""
    y, x = height * gsd / 2, width * gsd / 2
    return np.array([y, -x, -y, x], np.float32)


def empty_sample(sample_id: str, source: str) -> Sample:
    """What stands in the place of a bad record: no valid date of any modality."""
    return Sample({}, np.full(2, np.nan, np.float32), id=sample_id, source=source)
