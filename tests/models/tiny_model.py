"""The smallest model with every part, and images for it."""

import pathlib

import ml_collections
import numpy as np

from skyjax.config import load_config

CONFIG = load_config(pathlib.Path(__file__).parents[2] / "configs" / "pretrain_sample.py")
SIZES = {"optical": (1, 16), "multispectral": (3, 6), "sar": (2, 6)}  # dates, pixels


def tiny(**changes):
    """The sample config's keys with the smallest values, none of them left to that file."""
    config = ml_collections.ConfigDict(CONFIG.model.to_dict())
    vit = {"patch_size": 2, "image_size": 8, "width": 8, "depth": 1, "heads": 2, "up_factor": 2}
    for m, bands in (("multispectral", ("B02", "B03", "B04")), ("sar", ("VV", "VH"))):
        config.modalities[m].update(vit | {"bands": bands})
    config.modalities.optical.update(
        {"patch_size": 4, "width": 8, "depths": (2, 2), "heads": (1, 2), "window": 2, "extra_norm_every": 6}
    )
    config.update({"dtype": "float32", "scan": True, "remat": "none", "spatial_width": 16, "drop_path": 0.2})
    config.fusion.update({"width": 16, "depth": 2, "heads": 2})
    with config.ignore_type():
        config.update_from_flattened_dict(changes)
    return config


def random_images(batch=2, sizes=SIZES, seed=0):
    rng = np.random.default_rng(seed)
    images = {}
    for m, (dates, pixels) in sizes.items():
        bands = len(tiny().modalities[m].bands)
        images[m] = {
            "values": rng.normal(size=(batch, dates, pixels, pixels, bands)).astype(np.float32),
            "days": rng.integers(15_000, 20_000, (batch, dates)).astype(np.int32),
            "valid": np.ones((batch, dates), bool),
            "clear": np.ones((batch, dates, pixels, pixels), bool),
            "bands": np.ones((batch, bands), bool),
        }
    return images


def changed(images, modality, **arrays):
    return images | {modality: images[modality] | arrays}
