"""Mean and standard deviation of every band over valid, clear pixels, in one pass and constant memory."""

import dataclasses
import logging
import os
import sys
from collections.abc import Iterable, Sequence
from typing import TypedDict

import numpy as np
import rich.box
import rich.console
import rich.table
from jaxtyping import Float, Shaped

from skyjax.errors import BadRecord
from skyjax.input.loader import Source, open_source
from skyjax.sample import Sample
from skyjax.sensors import get_sensor, sensors

logger = logging.getLogger("skyjax")


class Row(TypedDict):
    """One band's statistics, measured and from sensors.toml, in the sensor's unit; None where no pixel counts."""

    sensor: str
    band: str
    count: int
    mean: float | None
    std: float | None
    table_mean: float
    table_std: float


@dataclasses.dataclass(frozen=True)
class Moments:
    """Number, mean and sum of squared deviations of a stream of pixels, a value a band, in float64."""

    count: Float[np.ndarray, "c"]
    mean: Float[np.ndarray, "c"]
    squares: Float[np.ndarray, "c"]

    @classmethod
    def of(cls, pixels: Shaped[np.ndarray, "n c"]) -> "Moments":
        """Of pixels at hand."""
        values = pixels.astype(np.float64)
        count = np.full(values.shape[1], len(values), np.float64)
        mean = values.mean(0) if len(values) else np.zeros(values.shape[1])
        return cls(count, mean, ((values - mean) ** 2).sum(0))

    def merge(self, other: "Moments") -> "Moments":
        """Of both streams together (Chan, Golub and LeVeque 1979): no sum of squares, which would cancel."""
        count = self.count + other.count
        share = np.divide(other.count, count, out=np.zeros_like(count), where=count > 0)
        shift = other.mean - self.mean
        return Moments(count, self.mean + shift * share, self.squares + other.squares + shift**2 * self.count * share)

    @property
    def std(self) -> Float[np.ndarray, "c"]:
        """Of the population, not of a sample."""
        return np.sqrt(np.divide(self.squares, self.count, out=np.full_like(self.mean, np.nan), where=self.count > 0))


def stats(folder: str | os.PathLike[str]) -> list[Row]:
    """A row for each sensor and band of a dataset, in the order of sensors.toml. Bad records are named and left out.

    Raises:
      UserError: the folder is neither a dataset nor one of images.
    """
    return rows(_samples(open_source(os.fspath(folder))))


def _samples(source: Source) -> Iterable[Sample]:
    for index in range(len(source)):
        try:
            yield source[index]
        except BadRecord as error:
            logger.warning("%s; left out", error)


def rows(samples: Iterable[Sample]) -> list[Row]:
    """As `stats`, of samples in hand."""
    moments: dict[tuple[str, str], Moments] = {}
    for sample in samples:
        for sequence in sample.sequences.values():
            pixels = sequence.values[sequence.clear & sequence.valid[:, None, None]]
            pixels = pixels[np.isfinite(pixels).all(-1)] if pixels.dtype.kind == "f" else pixels
            image = Moments.of(pixels)
            for c, band in enumerate(sequence.bands):
                key = (sequence.sensor, band)
                one = Moments(image.count[c : c + 1], image.mean[c : c + 1], image.squares[c : c + 1])
                moments[key] = moments[key].merge(one) if key in moments else one
    order = [(key, band.name) for key, sensor in sensors().items() for band in sensor.bands]
    return [_row(key, band, moments[key, band]) for key, band in order if (key, band) in moments]


def _row(key: str, name: str, moments: Moments) -> Row:
    band = get_sensor(key).bands[get_sensor(key).index(name)]
    count = int(moments.count[0])
    return Row(
        sensor=key,
        band=name,
        count=count,
        mean=float(moments.mean[0]) if count else None,
        std=float(moments.std[0]) if count else None,
        table_mean=band.mean,
        table_std=band.std,
    )


def print_table(table: Sequence[Row]) -> None:
    """Prints the rows, measured beside known, a sensor after the other."""
    page = rich.table.Table(box=rich.box.SIMPLE_HEAD)
    for column in ("sensor", "band", "pixels", "mean", "std", "table mean", "table std", "unit"):
        page.add_column(column, justify="left" if column in ("sensor", "band", "unit") else "right", no_wrap=True)
    previous = ""
    for row in table:
        if previous and row["sensor"] != previous:
            page.add_section()
        numbers = [row[key] for key in ("mean", "std", "table_mean", "table_std")]
        page.add_row(
            row["sensor"] if row["sensor"] != previous else "",
            row["band"],
            f"{row['count']:,}",
            *("none" if number is None else f"{number:,.2f}" for number in numbers),
            get_sensor(row["sensor"]).unit if row["sensor"] != previous else "",
        )
        previous = row["sensor"]
    rich.console.Console(width=None if sys.stdout.isatty() else 120).print(page)
