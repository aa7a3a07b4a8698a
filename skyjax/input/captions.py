"""Captions for samples that have none: words from labels, questions with answers, sensor, place and date.

In: a sample, and the names of its classes as dataset.json tells them (`label_names`). Out: strings. A caption depends
on the sample's id, the seed and the caption's number alone. The words are data: captions.toml. What it makes of what,
with examples: docs/text.md.
"""

import functools
import importlib.resources
import re
import string
import tomllib
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np

from skyjax.sample import Sample
from skyjax.sample import Sequence as Images

Names: TypeAlias = Mapping[str, Sequence[str] | Mapping[int, str]]
Content: TypeAlias = Callable[[np.random.Generator], str]

SMALLEST_SHARE = 0.02  # of a class that is worth a word
MOST_NAMES = 4
STATEMENTS = (2, 4)  # how many answers make a caption: least, most
_TRIES = 8  # for a caption that differs from those before it
_MONTHS = (
    *("January", "February", "March", "April", "May", "June", "July", "August", "September", "October"),
    *("November", "December"),
)
_SEASONS = ("winter", "spring", "summer", "autumn")
_TROPICS = 23.4  # degrees of latitude; nearer the equator the year has no four seasons


def captions(
    sample: Sample,
    names: Names | None = None,
    *,
    seed: int,
    number: int,
    metadata: bool = True,
    questions: Sequence[tuple[str, str]] = (),
) -> tuple[str, ...]:
    """Up to `number` different captions of a sample; none where nothing is known of it.

    Labels take turns. A class number gives its name; a multi-hot vector up to four names; a vector of fractions or a
    map of class numbers gives shares, of labelled pixels for a map. A label whose numbers have no names, and what is
    unlabelled (-1), says nothing.

    Args:
      sample: its own texts are not looked at.
      names: label -> names of its numbers, as in dataset.json. Where it has none, captions.toml may, by the sample's
        source.
      seed: of the experiment.
      number: caption i is the same whatever the number.
      metadata: tell of sensor, place and date; otherwise an image is an image.
      questions: (question, answer) pairs, which are a source of words as a label is.
    """
    whole = zlib.crc32(f"{sample.source}/{sample.id}".encode())
    contents = _contents(sample, names or {}, questions)
    if not contents and not (metadata and sample.sequences):
        return ()
    first = int(np.random.default_rng((seed, whole)).integers(max(len(contents), 1)))
    found: list[str] = []
    for i in range(number):
        rng = np.random.default_rng((seed, whole, i))
        for _ in range(_TRIES):
            content = contents[(first + i) % len(contents)] if contents else None
            text = _caption(sample, content, metadata, rng)
            if text not in found:
                found.append(text)
                break
    return tuple(found)


def prompts(name: str) -> tuple[str, ...]:
    """What a class is called for zero-shot classification: its words in every template of captions.toml."""
    return tuple(template.replace("{}", class_words(name)) for template in _words()["zero_shot"])


def class_words(name: str) -> str:
    """A class's name in words: "SeaLake" is "a sea or lake", "Herbaceous_wetland" is "herbaceous wetland"."""
    known = _words()["names"].get(name)
    if known:
        return known
    apart = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name)
    return " ".join(re.sub(r"[_\W]*_[_\W]*", " ", apart).lower().split())


def statement(question: str, answer: str) -> str:
    """A question and its answer as a phrase: ("Is there a forest?", "no") is "no forest".

    Where captions.toml knows no such question, the question itself with the answer behind it.
    """
    asked = re.sub(r"\s*\?\s*$", "", " ".join(question.split()))
    told = answer.strip()
    short = re.sub(r" in the image$", "", asked)
    for kind in _words()["questions"]:
        match = re.fullmatch(kind["pattern"], short, re.IGNORECASE)
        phrase = kind["answers"].get(told.lower(), kind["answers"].get("")) if match else None
        if match and phrase:
            fields = match.groupdict()
            an = "an" if told[:1].lower() in tuple("aeiou") else "a"
            bare = re.sub(r"^(an?|any|some) ", "", fields.get("x", ""))
            return phrase.format(**fields, answer=told, an=an, bare=bare)
    return f"{asked}: {told}"


def _contents(sample: Sample, names: Names, questions: Sequence[tuple[str, str]]) -> list[Content]:
    """What a caption may be about: one function a label, and one for all questions."""
    codes = _words()["codes"].get(sample.source, {})
    found: list[Content | None] = []
    for label, value in sorted(sample.labels.items()):
        known: Sequence[str] | Mapping[int, str] = names.get(label, ())
        table = dict(known) if isinstance(known, Mapping) else dict(enumerate(known))
        table = table or {int(code): name for code, name in codes.get(label, {}).items()}
        if table:
            found.append(_of_label(np.asarray(value), table))
    if questions:
        phrases = list(dict.fromkeys(statement(*pair) for pair in questions))
        found.append(lambda rng: _listed(_some(phrases, int(rng.integers(STATEMENTS[0], STATEMENTS[1] + 1)), rng)))
    return [content for content in found if content]


def _of_label(value: np.ndarray, table: Mapping[int, str]) -> Content | None:
    """The content of one label, or None where it says nothing."""
    if value.ndim == 0:
        shares = [(int(value), 1.0)]
    elif value.ndim == 1 and value.dtype.kind == "f":
        shares = [(number, float(share)) for number, share in enumerate(value) if share >= SMALLEST_SHARE]
    elif value.ndim == 1:
        if (value < 0).any():
            return None
        flags = _named([(int(number), 1.0) for number in np.flatnonzero(value)], table)
        return (lambda rng: _listed(_some([name for name, _ in flags], MOST_NAMES, rng))) if flags else None
    elif value.ndim == 2 and value.dtype.kind in "iu":
        numbers, counts = np.unique(value[value >= 0], return_counts=True)
        total = max(int(counts.sum()), 1)
        shares = [(int(n), count / total) for n, count in zip(numbers, counts, strict=True)]
    else:
        return None
    named = sorted(_named(shares, table), key=lambda pair: -pair[1])
    named = [pair for pair in named if pair[1] >= SMALLEST_SHARE]
    if value.ndim == 0:
        return (lambda _: named[0][0]) if named else None
    return (lambda rng: _with_shares(named, rng)) if named else None


def _named(shares: Iterable[tuple[int, float]], table: Mapping[int, str]) -> list[tuple[str, float]]:
    silent = _words()["silent"]["names"]
    return [(class_words(table[n]), share) for n, share in shares if n in table and table[n].lower() not in silent]


def _with_shares(named: Sequence[tuple[str, float]], rng: np.random.Generator) -> str:
    (first, largest), rest = named[0], named[1:MOST_NAMES]
    kinds = (("mostly", 0.5), ("shares", 0.0)) if rest else (("throughout", 0.9), ("alone", 0.0))
    kind = next(name for name, least in kinds if largest > least)
    percents = _listed([f"{100 * share:.0f} % {name}" for name, share in named[:MOST_NAMES]])
    every, others = ([name for name, _ in pairs] for pairs in (named[:MOST_NAMES], rest))
    template = _pick(_words()[kind], rng)
    return template.format(first=first, names=_listed(every), rest=_listed(others), percents=percents)


def _caption(sample: Sample, content: Content | None, metadata: bool, rng: np.random.Generator) -> str:
    """One caption; what is drawn for it comes from `rng` in a fixed order."""
    words = _words()
    modality = _pick(sorted(sample.sequences), rng) if metadata and sample.sequences else None
    images = sample.sequences[modality] if modality else None
    days = _days(images)
    kinds = words["series" if len(days) > 1 else "images"]
    image = _pick(kinds.get(images.sensor if images else "", kinds[""]), rng)
    fields = {"image": image, "content": content(rng) if content else ""}
    text = _pick(words["templates" if content else "bare"], rng).format(**fields)
    if not metadata:
        return text
    place, date = _place(sample), _date(days, float(sample.lonlat[1]))
    spans = date and date["first"] != date["last"]
    for known, templates in ((place, words["places"]), (date, words["spans" if spans else "dates"])):
        fitting = [template for template in templates if _fields(template) <= known.keys()]
        if fitting and rng.random() < 0.5:
            text += " " + _pick(fitting, rng).format(**known)
    return text


def _place(sample: Sample) -> dict[str, str]:
    longitude, latitude = map(float, sample.lonlat)
    if not (np.isfinite(longitude) and np.isfinite(latitude)):
        return {}
    north = latitude >= 0
    zone = next(words for reach, words in _words()["zones"] if abs(latitude) <= reach or reach >= 90)
    return {
        "latitude": f"{abs(latitude):.0f}° {'N' if north else 'S'}",
        "longitude": f"{abs(longitude):.0f}° {'E' if longitude >= 0 else 'W'}",
        "zone": zone.format(side="northern" if north else "southern"),
    }


def _days(images: Images | None) -> np.ndarray:
    """Known days of the dates that are there; 0 is unknown."""
    return np.zeros(0, int) if images is None else images.days[images.valid & (images.days != 0)]


def _date(days: np.ndarray, latitude: float) -> dict[str, str]:
    if not len(days):
        return {}
    first, last = (np.datetime64(int(day), "D") for day in (days[0], days[-1]))
    month = first.astype("datetime64[M]").astype(int) % 12
    known = {"month": _MONTHS[month], "year": str(first.astype("datetime64[Y]"))}
    known |= {"first": _month_year(first), "last": _month_year(last), "count": str(len(days))}
    if np.isfinite(latitude) and abs(latitude) >= _TROPICS:
        # Meteorological: winter in the north is December to February.
        known["season"] = _SEASONS[((month + 1) // 3 + (2 if latitude < 0 else 0)) % 4]
    return known


def _month_year(day: np.datetime64) -> str:
    return f"{_MONTHS[day.astype('datetime64[M]').astype(int) % 12]} {day.astype('datetime64[Y]')}"


def _fields(template: str) -> set[str]:
    return {name for _, name, _, _ in string.Formatter().parse(template) if name}


def _some(items: Sequence[str], most: int, rng: np.random.Generator) -> list[str]:
    return [items[i] for i in rng.permutation(len(items))[:most]]


def _pick(items: Sequence[str], rng: np.random.Generator) -> str:
    return items[int(rng.integers(len(items)))]


def _listed(items: Sequence[str]) -> str:
    return " and ".join([", ".join(items[:-1]), items[-1]]) if len(items) > 1 else "".join(items)


@functools.cache
def _words() -> dict[str, Any]:
    return tomllib.loads(
        importlib.resources.files("skyjax.input").joinpath("captions.toml").read_text(encoding="utf-8")
    )
