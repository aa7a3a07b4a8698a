"""A trained encoder for other bands: each band's slice of the patch embedding is found by name.

In: a modality's parameters, config and statistics. Out: the same for the bands wanted, and where each slice came from.

A band takes, in this order, the slice of the same band (by name or by STAC common name, so that Landsat's B4 and
Sentinel-2's B04 are one), of the nearest centre wavelength (near infrared then comes from red, as in SkySense's own
conversion of RGB weights), or for radar of the nearest polarisation.

Slices are scaled, unless told otherwise, so that the embedding keeps its size: the adapted encoder sees exactly what
the source would see of an image that holds, in each source band, the mean of the bands that take its slice, and whose
other bands are masked. Copied slices alone would count red twice in RGB + NIR, and lose half the signal where five of
ten bands are dropped; a ViT has no norm behind the embedding that would mend it.
"""

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import ml_collections
import numpy as np
from jaxtyping import Float

from skyjax.errors import UserError, nearest
from skyjax.sensors import Band, Sensor, ambiguity, get_sensor, same_band, sensors, statistics

# Of which polarisation a band takes the slice, best first: the same kind (co- or cross-polarised) before the other.
POLARISATIONS = {
    "VV": ("HH", "VH", "HV"),
    "HH": ("VV", "HV", "VH"),
    "VH": ("HV", "VV", "HH"),
    "HV": ("VH", "HH", "VV"),
}


@dataclasses.dataclass(frozen=True)
class Origin:
    """Where the slice of one band comes from.

    Attributes:
      band: the band that is wanted.
      source: the band whose slice it takes.
      reason: why that one.
      factor: what the slice is multiplied by.
    """

    band: str
    source: str
    reason: str
    factor: float

    def __str__(self) -> str:
        scaled = "" if self.factor == 1 else f", times {self.factor:.4g}"
        return f"{self.band} takes the slice of {self.source}: {self.reason}{scaled}"


@dataclasses.dataclass(frozen=True)
class Adapted:
    """A modality for other bands.

    Attributes:
      params: of its encoder.
      part: its config, `config.model.modalities.M`, with the new bands and sensors.
      statistics: its table: "sensors", "bands", "mean", "std" (train/loop.py, `statistics_table`).
      origins: one a band.
      dropped: bands of the source that nothing was taken from.
    """

    params: dict[str, Any]
    part: ml_collections.ConfigDict
    statistics: dict[str, Any]
    origins: tuple[Origin, ...]
    dropped: tuple[str, ...]

    def __str__(self) -> str:
        lines = [*map(str, self.origins), f"sensors: {' '.join(self.statistics['sensors'])}"]
        if self.dropped:
            lines.append(f"dropped: {' '.join(self.dropped)}")
        return "\n".join(lines)


def adapt_modality(
    modality: str,
    params: Mapping[str, Any],
    part: ml_collections.ConfigDict,
    table: Mapping[str, Any],
    bands: Sequence[str],
    *,
    sensor_keys: Sequence[str] = (),
    keep_size: bool = True,
) -> Adapted:
    """A modality's encoder for other bands.

    Args:
      modality: its name.
      params: its encoder's, `params[modality]`; not changed.
      part: its config; "bands" and "sensors" name what the parameters were trained with.
      table: its statistics.
      bands: names wanted, in order.
      sensor_keys: of the images to come. Not given: those of the model that have all the bands, else every sensor of
        the modality that has; the model's other sensors stay where they know some of the names, and mean the same by
        them.
      keep_size: as in `adapt_bands`.

    Returns:
      Everything that names bands, anew. A row of statistics is the source's where it has the sensor and the band, else
      that of sensors.toml.

    Raises:
      UserError: a band or sensor is not known, or the sensors mean different bands by one name.
    """
    keys = list(sensor_keys) or _choose_keys(modality, part.sensors, bands)
    _check_keys(modality, keys, bands)
    embedding = params["patch_embed"]
    first = embedding.get("patches", embedding)  # of the convolutional stem
    kernel, origins = adapt_bands(
        first["kernel"],
        part.bands,
        bands,
        modality=modality,
        from_sensors=part.sensors,
        to_sensors=keys,
        keep_size=keep_size,
    )
    first = {**first, "kernel": kernel}
    embedding = {**embedding, "patches": first} if "patches" in embedding else first
    config = ml_collections.ConfigDict(part.to_dict())
    config.bands, config.sensors = tuple(bands), tuple(keys)
    used = {origin.source for origin in origins}
    return Adapted(
        params={**params, "patch_embed": embedding},
        part=config,
        statistics=_statistics(table, keys, bands),
        origins=origins,
        dropped=tuple(band for band in part.bands if band not in used),
    )


def adapt_bands(
    kernel: Float[Any, "p p c d"],
    from_bands: Sequence[str],
    to_bands: Sequence[str],
    *,
    modality: str,
    from_sensors: Sequence[str] = (),
    to_sensors: Sequence[str] = (),
    keep_size: bool = True,
) -> tuple[Float[np.ndarray, "p p e d"], tuple[Origin, ...]]:
    """The kernel of a patch embedding for other bands.

    Args:
      kernel: its third axis is `from_bands`.
      from_bands, to_bands: names; `c` and `e` of them.
      modality: whose sensors say what a name means.
      from_sensors, to_sensors: keys of the sensors to ask first what a name means.
      keep_size: slices are scaled as the module's docstring says: by one over the number of bands that share a slice,
        and by c over the number of slices in use, which is the model's own rule for masked bands. False: slices are
        copied as they are, as SkySense's published conversion does.

    Returns:
      The kernel, and where each band's slice comes from.

    Raises:
      UserError: a band is not known, stands there twice, or has nothing like it in the source.
    """
    if kernel.shape[2] != len(from_bands):
        raise ValueError(f"a kernel of {kernel.shape[2]} bands does not go with the {len(from_bands)} named")
    if not to_bands or len(set(to_bands)) < len(to_bands):
        raise UserError(f'{modality}: bands "{" ".join(to_bands)}": name one or more, each once')
    sources = [_meaning(modality, name, from_sensors) for name in from_bands]
    taken = [_take(modality, _meaning(modality, name, to_sensors), sources) for name in to_bands]
    shared = Counter(index for index, _ in taken)
    scale = len(sources) / len(shared)
    factors = [scale / shared[index] if keep_size else 1.0 for index, _ in taken]
    kernel = np.asarray(kernel)
    adapted = kernel[:, :, [index for index, _ in taken]] * np.array(factors, kernel.dtype)[:, None]
    origins = tuple(
        Origin(name, from_bands[index], reason, factor)
        for name, (index, reason), factor in zip(to_bands, taken, factors, strict=True)
    )
    return adapted, origins


def _take(modality: str, band: Band, sources: Sequence[Band]) -> tuple[int, str]:
    """Which of the sources a band takes its slice from, and why."""
    for i, source in enumerate(sources):
        if same_band(band, source):
            return i, "its own" if band.name == source.name else f"the same band ({band.common})"
    if band.name in POLARISATIONS:
        names = [source.name for source in sources]
        for name in POLARISATIONS[band.name]:
            if name in names:
                return names.index(name), "the nearest polarisation"
    lengths = [
        (abs(source.wavelength - band.wavelength), i)
        for i, source in enumerate(sources)
        if source.wavelength and band.wavelength
    ]
    if not lengths:
        raise UserError(
            f'{modality}: band "{band.name}" has nothing like it among {" ".join(s.name for s in sources)}, neither'
            " a wavelength nor a polarisation"
        )
    i = min(lengths)[1]
    return i, f"the nearest centre wavelength ({sources[i].wavelength:g} nm for {band.wavelength:g} nm)"


def _of_modality(modality: str) -> list[Sensor]:
    return [sensor for sensor in sensors().values() if sensor.modality == modality]


def _meaning(modality: str, name: str, first: Sequence[str]) -> Band:
    """The band of a name, of the sensors asked first, else of any of the modality."""
    for sensor in [*map(get_sensor, first), *_of_modality(modality)]:
        position = sensor.find(name)
        if position is not None:
            return sensor.bands[position]
    if modality == "sar" and name in POLARISATIONS:
        return Band(name=name, gsd=0.0, mean=0.0, std=1.0, common=name)
    raise _unknown(modality, name)


def _unknown(modality: str, name: str) -> UserError:
    bands = [band for sensor in _of_modality(modality) for band in sensor.bands]
    names = dict.fromkeys(word for band in bands for word in (band.name, band.common) if word)
    return UserError(f'{modality}: band "{name}" is not known{nearest(name, names) or "."} Bands: {" ".join(names)}.')


def _choose_keys(modality: str, own: Sequence[str], bands: Sequence[str]) -> list[str]:
    """Sensors for these bands; `own` are the model's."""

    def whole(keys: Sequence[str]) -> list[str]:
        return [key for key in keys if all(get_sensor(key).find(name) is not None for name in bands)]

    known = [sensor.key for sensor in _of_modality(modality)]
    chosen = whole(own) or whole(known)
    if not chosen:
        for name in bands:
            if all(get_sensor(key).find(name) is None for key in known):
                raise _unknown(modality, name)
        raise UserError(
            f"{modality}: no sensor has all of {' '.join(bands)}; take the names of one of {' '.join(known)}, or name"
            " the sensors of your images"
        )
    kept = [key for key in own if any(get_sensor(key).find(name) is not None for name in bands)]
    kept = [key for key in kept if key in chosen or ambiguity([chosen[0], key], bands) is None]
    return [*kept, *(key for key in chosen if key not in kept)]


def _check_keys(modality: str, keys: Sequence[str], bands: Sequence[str]) -> None:
    for key in keys:
        if get_sensor(key).modality != modality:
            raise UserError(f'sensor "{key}" is {get_sensor(key).modality}, not {modality}')
    for name in bands:
        if all(get_sensor(key).find(name) is None for key in keys):
            get_sensor(keys[0]).index(name)  # raises, and says what is near
    if wrong := ambiguity(keys, bands):
        raise UserError(f"{modality}: {wrong}")


def _statistics(table: Mapping[str, Any], keys: Sequence[str], bands: Sequence[str]) -> dict[str, Any]:
    """Rows of the sensors for the bands; what the source's table has goes before sensors.toml."""
    mean, std = statistics(keys, bands)
    for row, key in enumerate(keys):
        if key not in table["sensors"]:
            continue
        own = list(table["sensors"]).index(key)
        sensor = get_sensor(key)
        trained = [sensor.find(name) for name in table["bands"]]
        for column, name in enumerate(bands):
            position = sensor.find(name)
            if position is not None and position in trained:
                at = trained.index(position)
                mean[row, column], std[row, column] = table["mean"][own][at], table["std"][own][at]
    return {"sensors": list(keys), "bands": list(bands), "mean": mean.tolist(), "std": std.tolist()}
