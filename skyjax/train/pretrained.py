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

from skyjax.input.device import normalize
from skyjax.input.site import site_images
from skyjax.models import skysense
from skyjax.sample import Sample
from skyjax.train import checkpoint


@dataclasses.dataclass(frozen=True)
class Pretrained:
    """The teacher's encoder of a run, its config, and the statistics that it was trained with.

    Attributes:
      config: of the experiment.
      params: the encoder's, a nested dict of float32 arrays.
      statistics: modality -> {"sensors", "bands", "mean", "std"} (train/loop.py, `statistics_table`).
      step: steps that it was trained for.
    """

    config: ml_collections.ConfigDict
    params: Mapping[str, Any]
    statistics: Mapping[str, Mapping[str, Any]]
    step: int

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """The newest checkpoint of a run's directory or of its checkpoints folder, or one checkpoint.

        Raises:
          UserError: there is none, or it is damaged.
        """
        found = checkpoint.find(pathlib.Path(path))
        notes = checkpoint.read_notes(found)
        config = ml_collections.ConfigDict(notes["config"]).lock()
        shapes = jax.eval_shape(lambda key: skysense.init(config.model, key), jax.random.key(0))
        here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        wanted = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here), shapes)
        state = checkpoint.load(found, {"teacher": {"encoder": wanted}}, partial=True)
        return cls(config, state["teacher"]["encoder"], notes["statistics"], notes["step"])

    def encode(
        self, samples: Sample | Sequence[Sample], *, size: Mapping[str, tuple[int, int]] | None = None
    ) -> dict[str, Any]:
        """Features of whole sites, with every valid date of theirs.

        Args:
          samples: one, or several whose images have the same size, modality by modality. One shape of images, number
            of dates included, is compiled once.
          size: modality -> rows and columns of pixels that images are resampled to; native pixels where not given.

        Returns:
          numpy arrays as models/skysense.py describes them: "encoder", "spatial", "fused", "pooled" and the rest, with
          a leading axis of samples (1 for a single one).

        Raises:
          UserError: nothing that the model can see, a sensor that it does not know, or sizes that differ.
        """
        samples = [samples] if isinstance(samples, Sample) else list(samples)
        sensors = {modality: table["sensors"] for modality, table in self.statistics.items()}
        bands = {modality: table["bands"] for modality, table in self.statistics.items()}
        images = site_images(samples, sensors, bands, size)
        tables = {m: {name: np.array(self.statistics[m][name], np.float32) for name in ("mean", "std")} for m in images}
        encoder = _compiled(json.dumps(self.config.model.to_dict(), sort_keys=True))
        return jax.tree.map(np.asarray, encoder(self.params, images, tables))


@functools.lru_cache(maxsize=8)
def _compiled(model: str) -> Callable[..., dict[str, Any]]:
    """The jitted encoder of a model's config; one for trained and untrained parameters, so that it compiles once."""
    config = ml_collections.ConfigDict(json.loads(model))

    @jax.jit
    def encode(params: Any, images: Mapping[str, Any], tables: Mapping[str, Any]) -> dict[str, Any]:
        normalized = {m: {**x, "values": normalize(x, **tables[m])} for m, x in images.items()}
        return skysense.apply(config, params, normalized)

    return encode
