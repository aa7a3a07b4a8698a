"""What was measured: sensors and bands with their passbands, units and statistics, read from sensors.toml.

Bands are chosen by name, never by position: `Sensor.index` for a name that must be there, `Sensor.find` for a model's
band that a sensor may lack. A model's band meets a sensor's by its exact name, else by its STAC common name, so that
"red" is B04 of Sentinel-2 and B4 of Landsat.
"""

import dataclasses
import functools
import importlib.resources
import re
import tomllib
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Bool, Float, Shaped

from skyjax.errors import BadRecord, UserError, nearest


@dataclasses.dataclass(frozen=True)
class Band:
    """One band. Wavelength and width in nm (None for radar), gsd in metres, mean and std in the sensor's unit."""

    name: str
    gsd: float
    mean: float
    std: float
    common: str = ""
    wavelength: float | None = None
    width: float | None = None


@dataclasses.dataclass(frozen=True)
class Sensor:
    """One sensor's table entry.

    Attributes:
      key: its name in sensors.toml.
      modality: "optical", "multispectral" or "sar".
      title: its name for people.
      unit: of its values and statistics.
      bands: in the order of its products.
      nodata: values that mean "nothing was measured".
      valid_range: (low, high) of a pixel's mean over its bands.
      statistics_source: where mean and std come from, or that none are published.
    """

    key: str
    modality: str
    title: str
    unit: str
    bands: tuple[Band, ...]
    nodata: tuple[float, ...]
    valid_range: tuple[float, float]
    statistics_source: str

    @property
    def names(self) -> tuple[str, ...]:
        """The bands' names in order."""
        return tuple(band.name for band in self.bands)

    @property
    def gsd(self) -> float:
        """Metres a pixel of the sharpest band."""
        return min(band.gsd for band in self.bands)

    def find(self, name: str) -> int | None:
        """Position of the band of this name, else of the first with this common name; None where it has neither."""
        for known in (self.names, tuple(band.common for band in self.bands)):
            if name in known:
                return known.index(name)
        return None

    def index(self, name: str) -> int:
        """Position of a band that must be there, by its exact or common name.

        Raises:
          UserError: the sensor has no such band.
        """
        position = self.find(name)
        if position is None:
            mend = _unpadded(name, self.names) or nearest(name, self.names) or "."
            raise UserError(f'{self.key}: band "{name}" is not known{mend} Bands: {" ".join(self.names)}.')
        return position

    def measured(self, values: Shaped[np.ndarray, "*rest c"]) -> Bool[np.ndarray, "*rest"]:
        """Whether a pixel was measured: finite, no band at a nodata value, plausible by `valid_range`."""
        inside = np.isfinite(values).all(-1) if values.dtype.kind == "f" else np.ones(values.shape[:-1], bool)
        for gap in self.nodata:
            inside &= ~(values == gap).any(-1)
        with np.errstate(invalid="ignore"):
            mean = values.mean(-1, dtype=np.float32)
        return inside & (mean >= self.valid_range[0]) & (mean <= self.valid_range[1])

    def check_scale(self, values: Shaped[np.ndarray, "*rest c"], name: str = "") -> None:
        """Refuses values of another unit or scale, which a network would swallow without a word.

        Raises:
          BadRecord: the sensor has DN and the values are fractions, it has dB and the values are linear power, or most
            of the pixels that hold something are not plausible.
        """
        seen = np.isfinite(values).all(-1) if values.dtype.kind == "f" else np.ones(values.shape[:-1], bool)
        for gap in self.nodata:
            seen &= ~(values == gap).all(-1)
        pixels = values[seen]
        if not pixels.size:
            return
        low, high = pixels.min(), pixels.max()
        where = f"{name}: " if name else ""
        if values.dtype.kind == "f" and self.unit.startswith("DN") and low >= -1 and high <= 2 and high > 0:
            raise BadRecord(f"{where}values lie in {low:.3g} to {high:.3g}; {self.key} is in {self.unit}; rescale them")
        if self.unit.startswith("dB") and low >= 0:
            raise BadRecord(
                f"{where}values lie in {low:.3g} to {high:.3g}, as linear power does; {self.key} is in {self.unit};"
                " take 10 log10"
            )
        mean = pixels.mean(-1, dtype=np.float32)
        outside = np.mean((mean < self.valid_range[0]) | (mean > self.valid_range[1]))
        if outside > 0.5:
            raise BadRecord(
                f"{where}{100 * outside:.0f} % of the pixels lie outside {self.valid_range[0]:g} to"
                f" {self.valid_range[1]:g}; {self.key} is in {self.unit}; check the sensor and the scale"
            )


def _unpadded(name: str, known: Sequence[str]) -> str:
    """The band that differs by leading zeros only: "B8" is B08, though B8A has as many letters in common."""
    for band in known:
        if re.sub(r"\b([A-Za-z]+)0+", r"\1", band) == re.sub(r"\b([A-Za-z]+)0+", r"\1", name):
            return f'; did you mean "{band}"?'
    return ""


@functools.cache
def sensors() -> Mapping[str, Sensor]:
    """Every sensor of sensors.toml by its key."""
    table = tomllib.loads(importlib.resources.files("skyjax").joinpath("sensors.toml").read_text(encoding="utf-8"))
    return {key: _sensor(key, **entry) for key, entry in table.items()}


def _sensor(key: str, *, bands: list, nodata: list, valid_range: list, statistics_source: str, **words: str) -> Sensor:
    return Sensor(
        key=key,
        bands=tuple(Band(**band) for band in bands),
        nodata=tuple(nodata),
        valid_range=(valid_range[0], valid_range[1]),
        statistics_source=statistics_source.strip(),
        **words,
    )


def get_sensor(key: str) -> Sensor:
    """The sensor of a key.

    Raises:
      UserError: there is none.
    """
    if key not in sensors():
        raise UserError(f'sensor "{key}" is not known{nearest(key, sensors()) or "."} Sensors: {" ".join(sensors())}.')
    return sensors()[key]


def same_band(a: Band, b: Band) -> bool:
    """Whether two sensors' bands are one, by STAC common name where both have one, else by name.

    A name alone says too little: B11 is short-wave infrared at Sentinel-2, and thermal at Landsat.
    """
    return a.common == b.common if a.common and b.common else a.name == b.name


def ambiguity(sensor_keys: Sequence[str], bands: Sequence[str]) -> str | None:
    """What is wrong, in words, where a name means different bands at these sensors: one input would get both."""
    for name in bands:
        met = [(sensor, sensor.find(name)) for sensor in map(get_sensor, sensor_keys)]
        found = [(sensor.key, sensor.bands[position]) for sensor, position in met if position is not None]
        odd = [key for key, band in found if not same_band(found[0][1], band)]
        if odd:
            return f'"{name}" is not the same band at {found[0][0]} and {odd[0]}; take common names, as red or nir'
    return None


def statistics(
    sensor_keys: Sequence[str], bands: Sequence[str]
) -> tuple[Float[np.ndarray, "s c"], Float[np.ndarray, "s c"]]:
    """Mean and std of a model's bands for each sensor, in that sensor's unit.

    A row is a sensor, in the order of `sensor_keys`. A band that a sensor lacks has mean 0 and std 1: it is masked.

    Raises:
      UserError: a sensor is not known, or a name means different bands at two of them.
    """
    if wrong := ambiguity(sensor_keys, bands):
        raise UserError(wrong)
    mean = np.zeros((len(sensor_keys), len(bands)), np.float32)
    std = np.ones_like(mean)
    for row, key in enumerate(sensor_keys):
        sensor = get_sensor(key)
        for column, name in enumerate(bands):
            position = sensor.find(name)
            if position is not None:
                mean[row, column], std[row, column] = sensor.bands[position].mean, sensor.bands[position].std
    return mean, std
