"""The probes' way to a real encoder; tests/evals/test_probe.py has the rest, with a stand-in."""

import jax
import ml_collections
import numpy as np
import PIL.Image
import pytest
from numpy.testing import assert_allclose

from skyjax.errors import UserError
from skyjax.evals import probe
from skyjax.evals.datasets import open_dataset
from skyjax.evals.features import encoder_features, extract_all, untrained
from skyjax.models import skysense
from skyjax.train.loop import statistics_table
from skyjax.train.pretrained import Pretrained

CONFIG = {
    "model": {
        "dtype": "float32",
        "remat": "none",
        "scan": True,
        "drop_path": 0.0,
        "modalities": {
            "optical": {
                "kind": "vit",
                "sensors": ("rgb",),
                "bands": ("red", "green", "blue"),
                "patch_size": 4,
                "image_size": 8,
                "width": 8,
                "depth": 1,
                "heads": 2,
                "up_factor": 2,
            }
        },
        "spatial_width": 8,
        "fusion": {"width": 8, "depth": 1, "heads": 2},
    },
    "data": {"global_views": {"size": {"optical": 8}}},
}


@pytest.fixture(scope="module")
def model():
    config = ml_collections.ConfigDict(CONFIG).lock()
    return Pretrained(config, skysense.init(config.model, jax.random.key(1)), statistics_table(config.model), 0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("classes")
    for name, low in (("dark", 10), ("light", 150)):
        (folder / name).mkdir()
        for i in range(6):
            image = np.random.default_rng(low + i).integers(low, low + 90, (8, 8, 3), np.uint8)
            PIL.Image.fromarray(image).save(folder / name / f"{name}_{i}.png")
    return folder


def test_features_are_those_of_one_image_at_a_time(model, folder):
    data = open_dataset(str(folder))
    which = data.parts["test"]
    extractors = {kind: encoder_features(model, kind=kind, batch_size=4) for kind in ("fused", "optical")}
    features, seconds = extract_all(data, which, extractors)
    assert set(seconds) == {"fused", "optical"}
    for row, i in enumerate(which.tolist()):
        output = model.encode(data.read(i))
        assert_allclose(features["fused"][row], output["pooled"][0], atol=1e-5)
        assert_allclose(features["optical"][row], output["encoder"]["optical"][0].mean((0, 1, 2)), atol=1e-5)


def test_the_untrained_twin_differs_in_its_parameters_alone(model, folder):
    data = open_dataset(str(folder))
    sample = data.read(0)
    fresh, other = untrained(model, 0), untrained(model, 7)
    assert fresh.config is model.config
    assert jax.tree.structure(fresh.params) == jax.tree.structure(model.params)
    pooled = [m.encode(sample)["pooled"] for m in (model, fresh, untrained(model, 0), other)]
    assert_allclose(pooled[1], pooled[2])
    assert np.abs(pooled[1] - pooled[0]).max() > 1e-3
    assert np.abs(pooled[1] - pooled[3]).max() > 1e-3


def test_images_that_the_model_cannot_see_are_named(model, folder):
    options = probe.Options("knn", str(folder), sensor="sentinel2-l2a", bands=("B04", "B03", "B02"))
    with pytest.raises(
        UserError, match="has multispectral images, but this checkpoint encodes optical; say by --sensor"
    ):
        probe.compare(model, model, options)


def test_a_missing_checkpoint_is_named(tmp_path, folder):
    with pytest.raises(UserError, match="nowhere"):
        probe.run(tmp_path / "nowhere", "knn", str(folder))
