"""Views of a sample: crops in space and time that agree between modalities on the ground, and know where they were cut.

In: a `Sample` as stored, a `Plan` read once from the config, and (seed, position in the global order), of which
everything random is a function. Out: one sample's part of a batch (sample.py), in stored types.

A sample's unit square is the ground that all its sequences share, row 0 in the north. A view is a box in it, square
on the ground, then one of the eight flips and quarter turns, the same for every modality. Views of a sample meet: a
later global view has its centre in the first one, a local view lies inside a global one where it fits, because only
shared ground is compared at pixel and object level.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import ml_collections
import numpy as np
from jaxtyping import Float, Int

from skyjax.errors import BadRecord, UserError
from skyjax.input.dates import deal_dates, drop_for_student
from skyjax.input.resample import Axis, cut
from skyjax.sample import MODALITIES, Images, Sample
from skyjax.sample import Sequence as Stored
from skyjax.sensors import get_sensor

GLOBAL_VIEWS = 2
# Sets the draw of dates that samples share apart from what is drawn for the sample of that number.
_DATES = 0xDA7E5
# Views, pixels a side or dates: more is a mistake.
_MOST = 10_000
# What agrees with a whole number of pixels but for the rounding of float32 metres.
_ROUNDING = 1e-4


@dataclasses.dataclass(frozen=True)
class Modality:
    """What the model wants of a modality: its sensors in the order of the statistics table, bands, the batch's type."""

    sensors: tuple[str, ...]
    bands: tuple[str, ...]
    dtype: np.dtype


@dataclasses.dataclass(frozen=True)
class Views:
    """The global or the local views.

    Attributes:
      count: views a sample.
      area: smallest and largest share of the site; None for crops at native scale.
      size: modality -> pixels a side.
      dates: modality -> dates a view.
    """

    count: int
    area: tuple[float, float] | None
    size: Mapping[str, int]
    dates: Mapping[str, int]


@dataclasses.dataclass(frozen=True)
class Plan:
    """All that cutting views needs of a config; see `plan_views`.

    `same_dates` samples in a row of the global order draw their dates alike, so that crops of one site have the same
    dates. Where each crop has its own, which dates they are tells it from all others, and nothing else need be learned.
    With `dates_apart` the global views share no date; see dates.py. A local view has dates of the view that it lies in.
    """

    modalities: Mapping[str, Modality]
    groups: Mapping[str, Views]
    date_jitter: int
    drop_date: float
    drop_modality: float
    same_dates: int = 1
    dates_apart: bool = False


@dataclasses.dataclass(frozen=True)
class Crop:
    """A box in the unit square, and the flip or turn that follows: transpose (1), flip rows (2), flip columns (4)."""

    top: float
    left: float
    bottom: float
    right: float
    element: int

    @property
    def to_view(self) -> Float[np.ndarray, "2 3"]:
        """The affine map from (row, column) in the sample's unit square to the view's."""
        height, width = self.bottom - self.top, self.right - self.left
        affine = np.array([[1 / height, 0, -self.top / height], [0, 1 / width, -self.left / width]])
        if self.element & 1:
            affine = affine[::-1].copy()
        for axis, flipped in enumerate((self.element & 2, self.element & 4)):
            if flipped:
                affine[axis] = [0, 0, 1] - affine[axis]
        return affine

    def turn(self, images: np.ndarray) -> np.ndarray:
        """(t, h, w, ...) cut from the box, flipped and turned as `to_view` says."""
        if self.element & 1:
            images = images.swapaxes(1, 2)
        return images[:, :: -1 if self.element & 2 else 1, :: -1 if self.element & 4 else 1]


def plan_views(data: ml_collections.ConfigDict, model: ml_collections.ConfigDict, types: Mapping[str, Any]) -> Plan:
    """Reads and checks the config once.

    Args:
      data: the config's `data`.
      model: the config's `model`, whose modalities name their sensors and bands.
      types: modality -> the type of its values in a batch, the widest of what the sources store.

    Raises:
      UserError: a size, share or number of dates makes no sense, or one is missing for a modality of the model.
    """
    modalities = {
        name: Modality(tuple(m.sensors), tuple(m.bands), np.dtype(types.get(name, np.uint8)))
        for name, m in model.modalities.items()
    }
    if not modalities or set(modalities) - set(MODALITIES):
        raise UserError(
            f"config: model.modalities has {sorted(modalities)}; it needs at least one of {', '.join(MODALITIES)}"
        )
    for name, modality in modalities.items():
        _check_bands(name, modality)
    groups = {"global": _views("global_views", data.global_views, GLOBAL_VIEWS, data.dates, "dates", modalities)}
    local = data.local_views
    if not isinstance(local.count, int) or not 0 <= local.count <= _MOST:
        raise UserError(f"config: data.local_views.count is {local.count}; set it to 0 or more, up to {_MOST:,}")
    if local.count:
        groups["local"] = _views("local_views", local, local.count, local.dates, "local_views.dates", modalities)
        for name in modalities:
            if local.dates[name] > data.dates[name]:
                raise UserError(
                    f"config: data.local_views.dates.{name} is {local.dates[name]}, more than data.dates.{name}"
                    f" = {data.dates[name]} of which they are drawn; set it to that or less"
                )
    augment = data.augment
    if not 0 <= augment.date_jitter <= 366:
        raise UserError(f"config: data.augment.date_jitter is {augment.date_jitter}; set it between 0 and 366 days")
    for key in ("drop_date", "drop_modality"):
        if not 0 <= augment[key] <= 1:
            raise UserError(f"config: data.augment.{key} is {augment[key]}; a probability lies between 0 and 1")
    same_dates = data.get("same_dates", 1)
    if not isinstance(same_dates, int) or same_dates < 1:
        raise UserError(f"config: data.same_dates is {same_dates}; set it to 1 or more samples")
    return Plan(
        modalities,
        groups,
        int(augment.date_jitter),
        augment.drop_date,
        augment.drop_modality,
        same_dates,
        bool(data.get("dates_apart", False)),
    )


def _check_bands(name: str, modality: Modality) -> None:
    """Refuses a band name that two sensors use for different things, as Landsat and Sentinel-2 do with B11."""
    for wanted in modality.bands:
        meanings = {}
        for key in modality.sensors:
            position = get_sensor(key).find(wanted)
            if position is not None:
                meanings[key] = get_sensor(key).bands[position].common
        if not meanings:
            raise UserError(
                f'config: model.modalities.{name}.bands has "{wanted}", which none of its sensors'
                f" ({', '.join(modality.sensors)}) has; correct the name or leave it out"
            )
        if len(set(meanings.values())) > 1:
            told = ", ".join(f"{common} of {key}" for key, common in meanings.items())
            raise UserError(
                f'config: model.modalities.{name}.bands: "{wanted}" means {told}; name the common name that you want'
            )


def _views(
    name: str, config: ml_collections.ConfigDict, count: int, dates: Any, dates_key: str, modalities: Mapping[str, Any]
) -> Views:
    for key, table, what in ((f"{name}.size", config.size, "pixels a side"), (dates_key, dates, "dates")):
        for modality in modalities:
            found = table.get(modality)
            if not isinstance(found, int) or not 1 <= found <= _MOST:
                raise UserError(
                    f"config: data.{key}.{modality} is {found}; set it to 1 or more {what}, up to {_MOST:,}"
                )
    area = config.area
    if area is not None and not (isinstance(area, tuple | list) and len(area) == 2 and 0 < area[0] <= area[1] <= 1):
        raise UserError(
            f"config: data.{name}.area is {area}; set two shares of the site, 0 < smallest <= largest <= 1,"
            " or None for native scale"
        )
    return Views(
        count,
        tuple(area) if area is not None else None,
        {m: config.size[m] for m in modalities},
        {m: dates[m] for m in modalities},
    )


def make_views(sample: Sample, plan: Plan, seed: int, index: int) -> dict[str, Any]:
    """One sample's views: a `Batch` without its axis `b`. A sample without any valid date has all masks False.

    Args:
      sample: as stored; modalities that the model does not have are ignored.
      plan: what to cut.
      seed: the run's seed.
      index: the sample's position in the global order; with `seed` it determines every draw.

    Raises:
      BadRecord: a sensor that the model does not name, no ground shared by the sequences, a type that the plan's
        cannot hold.
    """
    rng = np.random.default_rng((seed, index))
    present = {m: sample.sequences[m] for m in plan.modalities if m in sample.sequences}
    present = {m: sequence for m, sequence in present.items() if sequence.valid.any()}
    for m, sequence in present.items():
        _check(sample, m, sequence, plan.modalities[m])
    ground = shared_ground(sample, present)
    crops = _draw_crops(rng, plan, present, ground)
    of_dates = rng if plan.same_dates == 1 else np.random.default_rng((seed, index // plan.same_dates, _DATES))
    dates = {
        m: deal_dates(
            of_dates,
            np.flatnonzero(sequence.valid),
            slots=plan.groups["global"].dates[m],
            views=GLOBAL_VIEWS,
            apart=plan.dates_apart,
        )
        for m, sequence in present.items()
    }
    views: dict[str, Any] = {
        "index": np.uint32(index % 2**32),
        "lonlat": np.asarray(sample.lonlat, np.float32),
        "bad": np.bool_(False),
    }
    for name, group in plan.groups.items():
        images = {
            m: _images(rng, m, present.get(m), dates.get(m), plan, group, crops[name], ground) for m in plan.modalities
        }
        drop_for_student(rng, images, drop_date=plan.drop_date, drop_modality=plan.drop_modality)
        views[name] = {"to_view": np.stack([crop.to_view for crop in crops[name]]).astype(np.float32), **images}
    return views


def _check(sample: Sample, modality: str, sequence: Stored, wanted: Modality) -> None:
    if sequence.sensor not in wanted.sensors:
        raise BadRecord(
            f'{sample.id}: sensor "{sequence.sensor}" is not among model.modalities.{modality}.sensors'
            f" ({', '.join(wanted.sensors)}); add it there"
        )
    if not np.can_cast(sequence.values.dtype, wanted.dtype):
        raise BadRecord(
            f"{sample.id}: {modality} is stored as {sequence.values.dtype}, but its data set says {wanted.dtype};"
            " build the data set again"
        )


def shared_ground(sample: Sample, present: Mapping[str, Stored]) -> Float[np.ndarray, "4"]:
    """Top, left, bottom, right in metres of what all sequences cover; the unit square when there is none."""
    if not present:
        return np.array([1.0, 0.0, 0.0, 1.0])
    extents = np.array([sequence.extent for sequence in present.values()], np.float64)
    top, left, bottom, right = extents[:, 0].min(), extents[:, 1].max(), extents[:, 2].max(), extents[:, 3].min()
    if top <= bottom or right <= left:
        raise BadRecord(f"{sample.id}: its sequences share no ground (extents {extents.tolist()}); correct them")
    return np.array([top, left, bottom, right])


def _draw_crops(
    rng: np.random.Generator, plan: Plan, present: Mapping[str, Stored], ground: Float[np.ndarray, "4"]
) -> dict[str, list[Crop]]:
    crops: dict[str, list[Crop]] = {}
    for name, group in plan.groups.items():
        crops[name] = []
        for view in range(group.count):
            inside = name == "local"
            near = crops["global"][view % GLOBAL_VIEWS] if inside else next(iter(crops["global"]), None)
            sides, pixels = _sides(rng, group, present, ground)
            spans = ((near.top, near.bottom), (near.left, near.right)) if near is not None else (None, None)
            top = _start(rng, sides[0], spans[0], inside, pixels[0] if pixels else None)
            left = _start(rng, sides[1], spans[1], inside, pixels[1] if pixels else None)
            crops[name].append(Crop(top, left, top + sides[0], left + sides[1], int(rng.integers(8))))
    return crops


def _sides(
    rng: np.random.Generator, group: Views, present: Mapping[str, Stored], ground: Float[np.ndarray, "4"]
) -> tuple[tuple[float, float], tuple[tuple[float, float], tuple[float, float]] | None]:
    """A box's height and width as shares of the ground; at native scale also each axis' pixels: (offset, pitch)."""
    grid = next((m for m in ("multispectral", "optical", "sar") if m in present), None)
    if group.area is None and grid is not None:
        # Whole pixels of the common grid's modality, where that many lie on the shared ground.
        sequence, size = present[grid], group.size[grid]
        pixels = _pixels(sequence, ground, 0), _pixels(sequence, ground, 1)
        room = [np.floor((1 - offset) / pitch + _ROUNDING) for offset, pitch in pixels]
        if min(room) >= size:
            return (size * pixels[0][1], size * pixels[1][1]), pixels
    height, width = ground[0] - ground[2], ground[3] - ground[1]
    share = 1.0 if group.area is None else rng.uniform(*group.area)
    side = min(np.sqrt(share * height * width), height, width)
    return (side / height, side / width), None


def _pixels(sequence: Stored, ground: Float[np.ndarray, "4"], axis: int) -> tuple[float, float]:
    """Where the first whole pixel inside the ground starts and how wide a pixel is, in the unit square."""
    start, length = window(sequence, ground, 0.0, 1.0, axis)
    return (np.ceil(start - _ROUNDING) - start) / length, 1 / length


def _start(
    rng: np.random.Generator,
    side: float,
    near: tuple[float, float] | None,
    inside: bool,
    pixels: tuple[float, float] | None,
) -> float:
    """Where a box starts along one axis: inside `near` where asked and possible, else with its centre in it."""
    low, high = 0.0, 1 - side
    if near is not None:
        margin = 0.0 if inside and side <= near[1] - near[0] + _ROUNDING else side / 2
        low = min(max(near[0] - margin, 0.0), high)
        high = max(min(near[1] - side + margin, high), low)
    if pixels is None:
        return float(rng.uniform(low, high)) if high > low else low
    offset, pitch = pixels
    first = int(np.ceil((low - offset) / pitch - _ROUNDING))
    last = int(np.floor((high - offset) / pitch + _ROUNDING))
    return offset + pitch * int(rng.integers(first, max(last, first) + 1))


def window(
    sequence: Stored, ground: Float[np.ndarray, "4"], start: float, stop: float, axis: int
) -> tuple[float, float]:
    """Start and length, in a sequence's pixels, of an interval of the unit square along rows (0) or columns (1)."""
    extent = sequence.extent.astype(np.float64)
    pitch = (extent[2 + axis] - extent[axis]) / sequence.values.shape[1 + axis]
    span = ground[2 + axis] - ground[axis]
    return float((ground[axis] + start * span - extent[axis]) / pitch), float((stop - start) * span / pitch)


def _images(
    rng: np.random.Generator,
    modality: str,
    sequence: Stored | None,
    dates: list[Int[np.ndarray, "n"]] | None,
    plan: Plan,
    group: Views,
    crops: Sequence[Crop],
    ground: Float[np.ndarray, "4"],
) -> Images:
    wanted, size = plan.modalities[modality], group.size[modality]
    views, slots = len(crops), group.dates[modality]
    images: Images = {
        "values": np.zeros((views, slots, size, size, len(wanted.bands)), wanted.dtype),
        "days": np.zeros((views, slots), np.int32),
        "student_days": np.zeros((views, slots), np.int32),
        "valid": np.zeros((views, slots), bool),
        "student_valid": np.zeros((views, slots), bool),
        "clear": np.zeros((views, slots, size, size), bool),
        "sensor": np.int32(0),
        "bands": np.zeros(len(wanted.bands), bool),
    }
    if sequence is None or dates is None:
        return images
    images["sensor"] = np.int32(wanted.sensors.index(sequence.sensor))
    slot, source = band_positions(sequence.sensor, sequence.bands, wanted.bands)
    images["bands"][slot] = True
    for view, crop in enumerate(crops):
        own = dates[view % GLOBAL_VIEWS]
        chosen = np.sort(rng.permutation(own)[:slots]) if len(own) > slots else own
        n = len(chosen)
        rows = Axis(*window(sequence, ground, crop.top, crop.bottom, 0), size)
        columns = Axis(*window(sequence, ground, crop.left, crop.right, 1), size)
        values, clear = cut(sequence.values, sequence.clear, chosen, rows, columns)
        images["values"][view, :n, :, :, slot] = np.moveaxis(crop.turn(values)[..., source], -1, 0)
        images["clear"][view, :n] = crop.turn(clear)
        images["days"][view, :n] = sequence.days[chosen]
        images["valid"][view, :n] = True
    jitter = rng.integers(-plan.date_jitter, plan.date_jitter + 1, images["days"].shape, np.int32)
    images["student_days"] = np.where(images["valid"], images["days"] + jitter, 0).astype(np.int32)
    return images


@functools.lru_cache(maxsize=1024)
def band_positions(
    sensor: str, bands: tuple[str, ...], wanted: tuple[str, ...]
) -> tuple[Int[np.ndarray, "n"], Int[np.ndarray, "n"]]:
    """Which of the model's bands a sequence has, and where: positions in `wanted` and in `bands`.

    Both are looked up in the sensor's table, by exact name, else by common name ("red" is Sentinel-2's B04), so that
    values and statistics mean the same band.
    """
    find = get_sensor(sensor).find
    stored = {find(name): position for position, name in enumerate(bands)}
    found = [(slot, stored[find(name)]) for slot, name in enumerate(wanted) if find(name) in set(stored) - {None}]
    return np.array([slot for slot, _ in found], int), np.array([source for _, source in found], int)
