"""`skyjax export`: a checkpoint or a weights folder -> files for others, each checked as it is written.

    skysense       X.pth or X.safetensors by the released names (convert/exchange.py); the encoder alone
    safetensors    a weights folder (train/weights.py), the text side included (train/words_file.py)
    pytorch        a folder with a PyTorch module (convert/pytorch), of the text side all but the decoder

The written file is read back and compared with skyjax before it is put in place. A MODEL_CARD.md lies beside or in it.
"""

import dataclasses
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from skyjax.convert import exchange, files, model_card, pytorch, skysense, trial
from skyjax.convert.importing import say
from skyjax.convert.released import DEFAULT_WINDOW, default_heads, understand
from skyjax.errors import UserError, nearest
from skyjax.train import weights, words_file
from skyjax.train.pretrained import Pretrained

PYTORCH_AGREES = 1e-5


@dataclasses.dataclass(frozen=True)
class Check:
    """What reading an export back showed.

    Attributes:
      error: the largest max |difference| / max |skyjax's| of any output.
      sentence: the same in words.
      about: more, as JSON values.
    """

    error: float
    sentence: str
    about: dict[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Format:
    """One kind of export.

    Attributes:
      write: writes it at a path.
      check: reads it back from there.
      notes: what its users must know beside.
      marker: the file by which such a folder is known; None: the export is one file.
    """

    write: Callable[[Pretrained, pathlib.Path], None]
    check: Callable[[Pretrained, pathlib.Path], Check]
    notes: Callable[[Pretrained], list[str]]
    marker: str | None = None


def run(checkpoint: pathlib.Path, format: str, out: pathlib.Path) -> dict[str, Any]:
    """Writes and checks an export; an earlier one at `out` is replaced once the new one is whole and checked.

    Args:
      checkpoint: a run's directory, one of its checkpoints, or a weights folder.
      format: a key of FORMATS.
      out: the file or folder.

    Returns:
      What was written and how it compares with skyjax, as JSON values; `describe` makes lines of it.

    Raises:
      UserError: the checkpoint cannot be read, or the format has no place for a part of the model.
    """
    if format not in FORMATS:
        raise UserError(f"--format={format} is not known{nearest(format, FORMATS)} Formats: {', '.join(FORMATS)}")
    kind = FORMATS[format]
    if kind.marker is None:
        files.check_name(out)
    say(f"Reading {checkpoint}")
    model = Pretrained.load(checkpoint)
    model = dataclasses.replace(model, data=model_card.training_data(model))
    notes = kind.notes(model)
    with files.beside(out, kind.marker) as new:
        say(f"Writing {out}")
        kind.write(model, new)
        say("Reading it back and comparing")
        check = kind.check(model, new)
        card = model_card.write(model, format=format, out=out, check=check.sentence, notes=notes)
        if kind.marker is not None:
            (new / model_card.NAME).write_text(card, encoding="utf-8")
    card_path = out / model_card.NAME if kind.marker is not None else _beside(out, card)
    return {
        "checkpoint": str(checkpoint),
        "format": format,
        "out": str(out),
        "parameters": model_card.parameters(model),
        "words": 0,  # parameters of the text side that the format carries
        "step": int(model.step),
        "error": check.error,
        "check": check.sentence,
        "notes": notes,
        "model_card": str(card_path),
        **check.about,
    }


def describe(result: Mapping[str, Any]) -> str:
    """The lines that the command prints."""
    beside = f" of the encoder, {result['words']:,} of words" if result["words"] else ""
    about = f"{result['out']}: {result['parameters']:,} parameters{beside}, as {result['format']}"
    return "\n".join([about, result["check"], *result["notes"], f"Model card: {result['model_card']}"])


def _beside(out: pathlib.Path, card: str) -> pathlib.Path:
    """Writes the card of a file next to it, under another name where a card of something else lies there."""
    path = out.absolute().parent / model_card.NAME
    if path.exists() and path.read_text(encoding="utf-8", errors="replace").splitlines()[:1] != [f"# {out.name}"]:
        path = path.with_name(f"{out.name}.{model_card.NAME}")
    path.write_text(card, encoding="utf-8")
    return path


def _write_skysense(model: Pretrained, path: pathlib.Path) -> None:
    files.write(path, exchange.to_released(model.listed(), model.config.model, model.source))


def _check_skysense(model: Pretrained, path: pathlib.Path) -> Check:
    """Every parameter that the file can hold is in it bit for bit, and it computes the same."""
    tensors, _ = files.read(path)
    (modality,) = list(model.config.model.modalities)[:1]
    released = understand(path, tensors, lambda _: modality)
    back, _ = exchange.from_released(released, model.config.model)
    listed = model.listed()
    rows = slice(None)
    if "fusion.dates" in listed and not _keeps_leap_day(model):
        rows = slice(skysense.DAYS_RELEASED)
    different = [
        name
        for name, value in listed.items()
        if name in back and not exchange.same(*(x[rows] if name == "fusion.dates" else x for x in (value, back[name])))
    ]
    lost = [name for name in listed if name not in back and not name.startswith("prototypes.")]
    if different or lost:
        raise RuntimeError(f"the export is not lossless, which is a bug of skyjax: {(different + lost)[:8]}")
    # What is now known to be the same in every bit is not held twice: a whole encoder is 6.6 GB. That leaves the dates.
    params = model.params
    if "fusion.dates" in back:
        params = {**params, "fusion": {**params["fusion"], "dates": back["fusion.dates"]}}
    again = dataclasses.replace(model, params=params)
    error = _compare(model, again, leap_day=False)
    sentence = (
        f"Read back: {len(back)} parameters equal skyjax's in every bit; largest error on random images with missing"
        f" dates and modalities: {error:.1e}."
    )
    return Check(error, sentence, {"tensors": len(tensors), "equal_parameters": len(back)})


def _keeps_leap_day(model: Pretrained) -> bool:
    """Whether the file's row of 31 December, read as released files are, gives our row of leap years."""
    return model.source is not None


def _notes_skysense(model: Pretrained) -> list[str]:
    config = model.config.model
    notes = []
    if model.words is not None:
        notes.append(
            "Text tower, projections to words and decoder are left out: released files have no names for them."
        )
    if config.get("prototypes") is not None:
        notes.append("Geo-prototypes are left out: released files have no names for them.")
    if model.source is None:
        notes += _notes_of_our_own(model)
    else:
        changed = ", ".join(model.source["adapted"])
        if changed:
            notes.append(f"Bands were changed on import, so the patch embedding is not the source's: {changed}.")
        notes.append(f"Names, order, shapes and types are those of {model.source['file']}.")
    heads = {m: part for m, part in config.modalities.items() if part.kind == "vit"}
    if config.fusion is not None:
        heads["fusion"] = config.fusion
    unusual = {name: part.heads for name, part in heads.items() if part.heads != default_heads(part.width)}
    if unusual:
        words = ",".join(f"{name}:{count}" for name, count in unusual.items())
        notes.append(f"The file does not tell heads; they are {words} (skyjax import --heads={words}).")
    return notes


def _notes_of_our_own(model: Pretrained) -> list[str]:
    config = model.config.model
    notes = ["The file does not tell statistics: normalise by those of the model card."]
    if config.fusion is not None:
        notes.append("Of the dates' 366 rows, that of 31 December of leap years is left out: released tables have 365.")
        notes.append("skyjax adds dates to every modality and masks what is missing; the published code does neither.")
    optical = config.modalities.get("optical")
    if optical is not None:
        if optical.get("mask_padding", True):
            notes.append(
                "Windows' padding was masked in training; the published code attends to it, so sizes that are no whole"
                " number of windows differ there."
            )
        if optical.window != DEFAULT_WINDOW:
            notes.append(f"The window is {optical.window}, which PyTorch users give to the class.")
    return notes


def _write_safetensors(model: Pretrained, path: pathlib.Path) -> None:
    model.save(path)


def _check_safetensors(model: Pretrained, path: pathlib.Path) -> Check:
    again = Pretrained.load(path)
    listed, back = model.listed(), again.listed()
    equal = listed.keys() == back.keys() and all(exchange.same(value, back[name]) for name, value in listed.items())
    if not equal:
        raise RuntimeError("the export is not lossless, which is a bug of skyjax")
    error = _compare(model, again)
    read = _words_read_back(model, again)
    texts = ", and so do vectors of texts" if read else ""
    sentence = (
        f"Read back: {len(back) + read} parameters equal skyjax's in every bit{texts}; largest error on random images"
        f" with missing dates and modalities: {error:.1e}."
    )
    return Check(error, sentence, {"equal_parameters": len(back) + read, "words": model_card.words_parameters(model)})


def _words_read_back(model: Pretrained, again: Pretrained) -> int:
    """How many parameters of words are the same in every bit: all; and so are the vectors of some texts."""
    if model.words is None or again.words is None:
        if model.words is not again.words:
            raise RuntimeError("the export lost its words, which is a bug of skyjax")
        return 0
    wrote, read = words_file.listed(model.words), words_file.listed(again.words)
    equal = wrote.keys() == read.keys() and all(exchange.same(value, read[name]) for name, value in wrote.items())
    if not equal or not np.array_equal(model.words.encode(trial.TEXTS), again.words.encode(trial.TEXTS)):
        raise RuntimeError("the export of words is not lossless, which is a bug of skyjax")
    return len(read)


def _write_pytorch(model: Pretrained, path: pathlib.Path) -> None:
    pytorch.write(model, path)


def _check_pytorch(model: Pretrained, path: pathlib.Path) -> Check:
    error = pytorch.check(model, path)
    verdict = "" if error <= PYTORCH_AGREES else f" That is more than the usual {PYTORCH_AGREES:g}."
    texts = " and on a few texts" if model.words is not None else ""
    sentence = (
        f"Run by PyTorch and by skyjax in float32 on random images with missing dates and modalities{texts}: largest"
        f" error {error:.1e}.{verdict}"
    )
    words = {} if model.words is None else pytorch.words_state_dict(model.words)
    return Check(error, sentence, {"words": sum(value.size for value in words.values())})


def _notes_pytorch(model: Pretrained) -> list[str]:
    if model.words is None:
        return []
    notes = ["Text tower and projections to words: SkyjaxWords in skyjax_encoder.py."]
    if model.words.can_caption:
        notes.append("The decoder is left out: captions and open answers are written by skyjax alone.")
    return notes


def _compare(model: Pretrained, again: Pretrained, leap_day: bool = True) -> float:
    ours, theirs = trial.encoder(model), trial.encoder(again)
    return max(
        trial.largest_error(jax.device_get(ours(images)), jax.device_get(theirs(images)))
        for images in trial.cases(model, leap_day=leap_day)
    )


FORMATS = {
    "skysense": Format(_write_skysense, _check_skysense, _notes_skysense),
    "safetensors": Format(_write_safetensors, _check_safetensors, lambda _: [], marker=weights.NOTES),
    "pytorch": Format(_write_pytorch, _check_pytorch, _notes_pytorch, marker=pytorch.MODULE),
}
