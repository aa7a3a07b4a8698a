"""BioMassters: a year of monthly Sentinel-2 and Sentinel-1 composites of Finnish forest.

Source: BioMassters (Nascetti et al., 2023) as packed by GEO-Bench-2, CC-BY-4.0.
Input: one .npz and one .json a patch: `ID_S2_MONTH` (11, 32, 32), `ID_S1_MONTH` (4, 32, 32), months from September to
August; `ID_AGBM` (1, 32, 32), above-ground biomass.

Traps:
- Patches were resized by the source from 256 to 32 pixels of the same 2.56 km, so a pixel is 80 m.
- No year and no place is given: months get the 15th of September 2019 to August 2020, and the position is unknown.
- Sentinel-2's eleventh band is the probability of cloud in percent; a pixel is clear below 50. -9999 and 0 are nodata.
- Sentinel-1 has VV and VH of the ascending, then of the descending pass, in dB: two images of one day.
- Months can be missing, in either sensor.
- Biomass is a quantity, not a class: no label is kept.
"""

import pathlib
from collections.abc import Iterator, Mapping

import numpy as np
from jaxtyping import Float, Int

from skyjax.errors import BadRecord
from skyjax.input.build import FileSamples, channels_last, list_files, load_arrays
from skyjax.sample import Sample, Sequence, make_sequence

TITLE = "BioMassters: a year of monthly Sentinel-2 and Sentinel-1"
LICENCE = "CC-BY-4.0"
ATTRIBUTION = "BioMassters (Nascetti et al. 2023), GEO-Bench-2; contains modified Copernicus Sentinel data"
BANDS = ("B02", "B03", "B04", "B05", "B06", "B07", "B08", "B8A", "B11", "B12")
MONTHS = (
    *("September", "October", "November", "December", "January", "February", "March", "April", "May", "June"),
    *("July", "August"),
)
FIRST = np.datetime64("2019-09")  # made up, see above
NODATA = -9999
GSD = 80


def samples(folder: pathlib.Path) -> Iterator[Sample]:
    """One sample a patch."""
    return FileSamples(list_files(folder, "*.npz"), _patch)


def _patch(path: pathlib.Path) -> Sample:
    arrays = load_arrays(path)
    optical, optical_days = _stack(arrays, "S2", path)
    radar, radar_days = _stack(arrays, "S1", path)
    clear = (optical[:, -1] < 50) & (optical[:, : len(BANDS)] != NODATA).all(1)
    passes = np.concatenate([radar[:, :2], radar[:, 2:]])
    sequences: dict[str, Sequence] = {
        "multispectral": make_sequence(
            channels_last(optical[:, : len(BANDS)]),
            "sentinel2-l2a",
            BANDS,
            days=optical_days,
            clear=clear,
            gsd=GSD,
            name=path.name,
        ),
        "sar": make_sequence(
            channels_last(np.where(passes == NODATA, np.nan, passes).astype(np.float32)),
            "sentinel1-grd",
            ("VV", "VH"),
            days=np.concatenate([radar_days, radar_days]),
            gsd=GSD,
            name=path.name,
        ),
    }
    return Sample(sequences, np.full(2, np.nan, np.float32), id=path.stem, source="biomassters")


def _stack(
    arrays: Mapping[str, np.ndarray], sensor: str, path: pathlib.Path
) -> tuple[Float[np.ndarray, "t c h w"], Int[np.ndarray, "t"]]:
    """The months that are there, in order, and their days."""
    named = {
        month: arrays[f"{path.stem}_{sensor}_{month}"] for month in MONTHS if f"{path.stem}_{sensor}_{month}" in arrays
    }
    if not named:
        raise BadRecord(f'"{path}" has no month of {sensor}')
    months = FIRST + np.array([MONTHS.index(month) for month in named])
    return np.stack(list(named.values())), (months.astype("datetime64[D]") + 14).astype(np.int64)
