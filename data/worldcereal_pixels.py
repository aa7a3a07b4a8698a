"""WorldCereal field pixels in Flanders: 16 monthly composites of Sentinel-2 and Sentinel-1 of one pixel a field.

Source: pixels extracted for WorldCereal, as the projects worldcereal-classification and prometheo ship them for their
tests, MIT; the fields are of the Flemish land parcel register (LPIS).
Input: Parquet files of two forms: a row a field and month (`S2-L2A-B02` .., `S1-SIGMA0-VV`, `timestamp`, `ewoc_code`),
or a row a field (`OPTICAL-B02-ts0-10m` .., `SAR-VV-ts0-20m`, `start_date`, `LANDCOVER_LABEL`).

Traps:
- 65535 is nodata. A month is clear where all bands are there. B8A has no value in either file and is left out.
- The 20 m bands were interpolated across nodata: where they are 13,000 to 30,000 beside common values at 10 m, part of
  65535 is in them. A month with a band above a reflectance of 1 is not clear.
- Sentinel-1 is stored as a digital number: dB = 20 log10(DN) - 83.
- A composite has no day. It gets the 15th of its month.
- The two forms have codes of two legends. Label `land_cover` is by the older one, which the sites of worldcereal.py
  have too: 11 arable land, 12 permanent crops, 13 grassland. Of the newer, ten-digit codes, the first two digits
  decide: 10 and 11 are 11, 12 is 12, 20 is 13; others keep their two digits, of which 16 is frequent and not explained
  by the files. 99 of the older legend says nothing and becomes -1.
"""

import pathlib
from collections.abc import Iterator, Mapping

import numpy as np
import pyarrow
import pyarrow.parquet
from jaxtyping import Float, Int, Shaped

from skyjax.errors import UserError
from skyjax.input.build import list_files
from skyjax.sample import Sample, Sequence, make_sequence

TITLE = "WorldCereal field pixels, Flanders: 16 months of Sentinel-2 and Sentinel-1"
LICENCE = "MIT"
ATTRIBUTION = (
    "worldcereal-classification and prometheo (WorldCereal consortium); contains modified Copernicus Sentinel data"
)
BANDS = ("B02", "B03", "B04", "B05", "B06", "B07", "B08", "B8A", "B11", "B12")
RADAR = ("VV", "VH")
BANDS_10M = ("B02", "B03", "B04", "B08")
NODATA = 65_535
BRIGHTEST = 10_000  # a reflectance of 1
MONTHS = 16
LAND_COVER = {10: 11, 11: 11, 12: 12, 20: 13}  # first two digits of the newer code -> the older code
UNSPECIFIED = 99

Table = Mapping[str, np.ndarray]


def samples(folder: pathlib.Path) -> Iterator[Sample]:
    """One sample a field, of one pixel."""
    for path in list_files(folder, "*.parquet"):
        table = _read(path)
        yield from _fields_by_month(table) if "timestamp" in table else _fields(table)


def _read(path: pathlib.Path) -> Table:
    try:
        table = pyarrow.parquet.read_table(path)
    except pyarrow.ArrowInvalid as error:
        raise UserError(f'"{path}" is not a Parquet file: {error}') from error
    return {name: table[name].to_numpy() for name in table.column_names if name != "geometry"}


def _fields_by_month(table: Table) -> Iterator[Sample]:
    for name in dict.fromkeys(table["sample_id"].tolist()):
        rows = np.flatnonzero(table["sample_id"] == name)
        rows = rows[np.argsort(table["timestamp"][rows])]
        first = rows[0]
        months = table["timestamp"][rows].astype("datetime64[M]")
        optical = {band: table[f"S2-L2A-{band}"][rows] for band in BANDS}
        radar = np.stack([table[f"S1-SIGMA0-{band}"][rows] for band in RADAR], -1)
        code = int(table["ewoc_code"][first]) // 10**8
        yield _sample(name, months, optical, radar, table, first, LAND_COVER.get(code, code))


def _fields(table: Table) -> Iterator[Sample]:
    for row, name in enumerate(table["sample_id"].tolist()):
        first = np.datetime64(table["start_date"][row], "M")
        optical = {
            band: _months(table, f"OPTICAL-{band}", "10m" if band in BANDS_10M else "20m", row) for band in BANDS
        }
        radar = np.stack([_months(table, f"SAR-{band}", "20m", row) for band in RADAR], -1)
        code = int(table["LANDCOVER_LABEL"][row])
        label = -1 if code == UNSPECIFIED else LAND_COVER.get(code, code)
        yield _sample(name, first + np.arange(MONTHS), optical, radar, table, row, label)


def _months(table: Table, name: str, resolution: str, row: int) -> Int[np.ndarray, "t"]:
    return np.array([table[f"{name}-ts{month}-{resolution}"][row] for month in range(MONTHS)])


def _sample(
    name: str,
    months: Shaped[np.ndarray, "t"],
    optical: Mapping[str, Int[np.ndarray, "t"]],
    radar: Int[np.ndarray, "t 2"],
    table: Table,
    row: int,
    land_cover: int,
) -> Sample:
    days = (months.astype("datetime64[D]") + 14).astype(np.int64)
    there = tuple(band for band in BANDS if (optical[band] != NODATA).any())
    sequences = {
        "multispectral": _one_pixel(
            np.stack([optical[band] for band in there], -1), "sentinel2-l2a", there, days, name
        ),
        "sar": _one_pixel(_decibels(radar), "sentinel1-grd", RADAR, days, name),
    }
    lonlat = np.array([table["lon"][row], table["lat"][row]], np.float32)
    return Sample(
        sequences, lonlat, labels={"land_cover": np.array(land_cover, np.int16)}, id=name, source="worldcereal-pixels"
    )


def _decibels(digital: Int[np.ndarray, "t 2"]) -> Float[np.ndarray, "t 2"]:
    """WorldCereal's scaling undone; NaN where there is nothing."""
    there = (digital != NODATA) & (digital > 0)
    return np.where(there, 20 * np.log10(np.maximum(digital, 1)) - 83, np.nan).astype(np.float32)


def _one_pixel(
    values: Shaped[np.ndarray, "t c"], sensor: str, bands: tuple[str, ...], days: Int[np.ndarray, "t"], name: str
) -> Sequence:
    clear = (values <= BRIGHTEST).all(-1) & np.isfinite(values).all(-1)
    return make_sequence(values[:, None, None], sensor, bands, days=days, clear=clear[:, None, None], gsd=10, name=name)
