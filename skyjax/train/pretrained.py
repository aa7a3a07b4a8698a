"""A trained encoder for use: what `skyjax.load` returns."""

import dataclasses
import functools
import json
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self

import jax
import ml_collections
import numpy as np

from skyjax.errors import UserError
from skyjax.input.device import normalize
from skyjax.input.site import site_images
from skyjax.input.tokenizer import FILE as TOKENIZER
from skyjax.input.tokenizer import Tokenizer
from skyjax.models import skysense
from skyjax.models.listed import from_listed, to_listed
from skyjax.sample import Sample
from skyjax.train import checkpoint, weights, words_file
from skyjax.train import state as states
from skyjax.train.words import Words


@dataclasses.dataclass(frozen=True)
class Pretrained:
    """The teacher's encoder of a run, or an imported encoder; its config, and the statistics that it was trained with.

    Attributes:
      config: of the experiment; an imported encoder has `model` alone.
      params: the encoder's, a nested dict of float32 arrays.
      statistics: modality -> {"sensors", "bands", "mean", "std"} (train/loop.py, `statistics_table`).
      step: steps that it was trained for.
      prototypes: the table of geo-prototypes (regions, count, width) float32; None where the model has none.
      source: what the released file was like that it was imported from (convert/released.py): its tensors that the
        model does not use are under "tensors"; None for an encoder of our own.
      data: what it was trained on: the config's list of sources, or words; None where unknown.
      licence: of the weights, in words; None where unknown.
      words: the text side of what was trained with texts; None for others.
    """

    config: ml_collections.ConfigDict
    params: Mapping[str, Any]
    statistics: Mapping[str, Mapping[str, Any]]
    step: int
    prototypes: Any = None
    source: Mapping[str, Any] | None = None
    data: Any = None
    licence: str | None = None
    words: Words | None = None

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """The newest checkpoint of a run's directory or of its checkpoints folder, one checkpoint, or a weights folder.

        Raises:
          UserError: there is none, or it is damaged.
        """
        path = pathlib.Path(path)
        return cls._of_folder(path) if weights.is_folder(path) else cls._of_checkpoint(checkpoint.find(path))

    @classmethod
    def _of_folder(cls, folder: pathlib.Path) -> Self:
        found = weights.load(folder)
        here = jax.local_devices()[0]
        parts: dict[str, dict[str, np.ndarray]] = {}
        for name, value in found.listed.items():
            part, _, rest = name.partition(".")
            parts.setdefault(part, {})[rest] = value
        # Part by part: stacking copies, and a whole encoder more can be more than the host has.
        params = {part: jax.block_until_ready(jax.device_put(from_listed(own), here)) for part, own in parts.items()}
        return cls(
            config=found.config,
            params=params,
            statistics=found.statistics,
            step=found.step,
            prototypes=None if found.prototypes is None else jax.device_put(found.prototypes, here),
            source=found.source,
            data=found.data,
            licence=found.licence,
            words=None if found.words is None else words_file.load(folder, found.config, found.words),
        )

    @classmethod
    def _of_checkpoint(cls, found: pathlib.Path) -> Self:
        notes = checkpoint.read_notes(found)
        first = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])

        def here(tree: Any) -> Any:
            return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=first), tree)

        try:  # they may be a stranger's, and say what they like
            config = ml_collections.ConfigDict(notes["config"]).lock()
            step, statistics = int(notes["step"]), weights.check_statistics(notes["statistics"])
            data = [list(source) for source in config.get("data", {}).get("sources", ())] or None
            whole = states.abstract_params(config)
            # Of the heads, what images are projected to words by; the others ended with training.
            whole["heads"] = {name: head for name, head in whole["heads"].items() if name == "image_text"}
            wanted = {"teacher": here({name: part for name, part in whole.items() if part})}
            if config.model.get("prototypes") is not None:
                table = jax.eval_shape(lambda key: skysense.init_prototypes(config.model, key), jax.random.key(0))
                wanted["prototypes"] = here(table)
        except Exception as error:  # models know nothing of configs and raise what they like
            reason = str(error).split("\n")[0] or type(error).__name__
            raise UserError(f'checkpoint: "{found}": its notes describe no model: {reason[:200]}') from error
        state = checkpoint.load(found, wanted, partial=True)
        teacher = states.merged(config, state["teacher"])
        return cls(
            config=config,
            params=teacher["encoder"],
            statistics=statistics,
            step=step,
            prototypes=state.get("prototypes"),
            data=data,
            words=_words(found, config, teacher) if config.model.get("text") else None,
        )

    def listed(self) -> dict[str, np.ndarray]:
        """Listed name (models/listed.py) -> parameter; on a CPU these are views."""
        return to_listed(jax.tree.map(np.asarray, self.params))  # numpy first: jax would copy each layer

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Writes a weights folder (train/weights.py), with its words, into a folder that is there; `load` reads it."""
        kept = {name: getattr(self, name) for name in ("config", "statistics", "step", "source", "data", "licence")}
        table = None if self.prototypes is None else np.asarray(self.prototypes)
        words = None if self.words is None else self.words.tokenizer.digest
        weights.save(pathlib.Path(folder), weights.Weights(self.listed(), prototypes=table, words=words, **kept))
        if self.words is not None:
            words_file.save(pathlib.Path(folder), self.words)

    def encode(
        self, samples: Sample | Sequence[Sample], *, size: Mapping[str, tuple[int, int]] | None = None
    ) -> dict[str, Any]:
        """Features of whole sites, with every valid date of theirs.

        Args:
          samples: one, or several whose images have the same size, modality by modality. One shape of images, number
            of dates included, is compiled once.
          size: modality -> rows and columns of pixels that images are resampled to; native pixels where not given.

        Returns:
          numpy arrays as models/skysense.py describes them: "encoder", "spatial", "fused", "context", "pooled" and the
          rest, with a leading axis of samples (1 for a single one).

        Raises:
          UserError: nothing that the model can see, a sensor that it does not know, or sizes that differ.
        """
        samples = [samples] if isinstance(samples, Sample) else list(samples)
        sensors = {modality: table["sensors"] for modality, table in self.statistics.items()}
        bands = {modality: table["bands"] for modality, table in self.statistics.items()}
        images = site_images(samples, sensors, bands, size)
        tables = {m: {name: np.array(self.statistics[m][name], np.float32) for name in ("mean", "std")} for m in images}
        lonlat = np.stack([sample.lonlat for sample in samples]).astype(np.float32)
        encoder = _compiled(json.dumps(self.config.model.to_dict(), sort_keys=True))
        return jax.tree.map(np.asarray, encoder(self.params, images, tables, lonlat, self.prototypes))

    def encode_text(self, texts: Sequence[str]) -> np.ndarray:
        """Unit vectors (n, e) of texts, in the space that `words.project` puts images in.

        Raises:
          UserError: the model has no text tower.
        """
        if self.words is None:
            raise UserError("this model has no text tower; train one with model.text (configs/image_text.py)")
        return self.words.encode(list(texts))


def _words(found: pathlib.Path, config: ml_collections.ConfigDict, teacher: Mapping[str, Any]) -> Words:
    """The text side; the run's own tokenizer lies two folders above a checkpoint."""
    own = found.parent.parent / TOKENIZER
    tokenizer = Tokenizer(own if own.is_file() else config.data.text.tokenizer)
    towers = {name: teacher[name] for name in ("text", "decoder") if name in teacher}
    return Words(config, towers, teacher.get("heads", {}).get("image_text", {}), tokenizer)


@functools.lru_cache(maxsize=8)
def _compiled(model: str) -> Callable[..., dict[str, Any]]:
    """The jitted encoder of a model's config; one for trained and untrained parameters, so that it compiles once."""
    config = ml_collections.ConfigDict(json.loads(model))

    @jax.jit
    def encode(
        params: Any, images: Mapping[str, Any], tables: Mapping[str, Any], lonlat: Any, prototypes: Any
    ) -> dict[str, Any]:
        normalized = {m: {**x, "values": normalize(x, **tables[m])} for m, x in images.items()}
        return skysense.apply(config, params, normalized, lonlat=lonlat, prototypes=prototypes)

    return encode
