"""What many tests share: the pretrain_sample config shrunk to a size that compiles in seconds, and records for it."""

import contextlib
import dataclasses
import functools
import os
import pathlib

import jax
import ml_collections
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache

from skyjax.config import load_config
from skyjax.input import records
from skyjax.sample import MODALITIES, Sample, Sequence

ROOT = pathlib.Path(__file__).parents[1]

# What makes configs/pretrain_sample.py small; everything else stays as users run it.
TINY = {
    "steps": 6,
    "batch_size": 4,
    "checkpoint.every": 3,
    "log.every": 1,
    "optimizer.warmup_steps": 2,
    "optimizer.teacher_momentum": 0.99,
    "optimizer.final_teacher_momentum": 1.0,
    "data.threads": 1,
    "data.prefetch": 1,
    "data.dates.multispectral": 2,
    "data.dates.sar": 2,
    "data.global_views.size.optical": 16,
    "data.global_views.size.multispectral": 8,
    "data.global_views.size.sar": 8,
    "data.local_views.count": 1,
    "data.local_views.size.optical": 8,
    "data.local_views.size.multispectral": 4,
    "data.local_views.size.sar": 4,
    "data.local_views.dates.multispectral": 1,
    "data.local_views.dates.sar": 1,
    "model.spatial_width": 16,
    "model.modalities.optical.patch_size": 2,
    "model.modalities.optical.width": 8,
    "model.modalities.optical.depths": (2, 2),
    "model.modalities.optical.heads": (1, 2),
    "model.modalities.multispectral.bands": ("B02", "B03", "B04"),
    "model.modalities.multispectral.width": 8,
    "model.modalities.multispectral.patch_size": 2,
    "model.modalities.multispectral.up_factor": 2,
    "model.modalities.multispectral.depth": 1,
    "model.modalities.multispectral.heads": 1,
    "model.modalities.sar.width": 8,
    "model.modalities.sar.patch_size": 2,
    "model.modalities.sar.up_factor": 2,
    "model.modalities.sar.depth": 1,
    "model.modalities.sar.heads": 1,
    "model.fusion.width": 16,
    "model.fusion.depth": 1,
    "model.fusion.heads": 1,
    "objective.kind": "dino",  # with Sinkhorn-Knopp, classes and temperatures: more of the program than InfoNCE
    "objective.classes": 16,
    "objective.head_norm": "none",  # every term by sample adds up over micro-batches
    "objective.head_hidden": 8,
    "objective.head_bottleneck": 8,
    "objective.pixel.tokens": 4,
    "objective.object.clusters": 2,
}


def make_tiny_config(records_folder, modalities=MODALITIES, **changes):
    """configs/pretrain_sample.py shrunk; `changes` are written with __ for the dot: objective__classes=8."""
    settings = TINY | {key.replace("__", "."): value for key, value in changes.items()}
    overrides = [
        f"{key}={value!r}" if not isinstance(value, str) else f"{key}={value}" for key, value in settings.items()
    ]
    config = load_config(ROOT / "configs" / "pretrain_sample.py", overrides)
    with config.unlocked():
        config.data.sources = ((str(records_folder), 1.0),)
        for modality in set(MODALITIES) - set(modalities):
            del config.model.modalities[modality]
    return config


def random_sample(rng, number):
    """A site of 40 m: an aerial image, Sentinel-2 and Sentinel-1 at irregular dates; now and then one is missing."""
    extent = np.array([20, -20, -20, 20], np.float32)

    def sequence(sensor, bands, dates, pixels, values):
        clear = rng.random((dates, pixels, pixels)) > 0.1
        days = np.sort(rng.integers(18000, 18700, dates)).astype(np.int32)
        return Sequence(values, days, np.ones(dates, bool), clear, sensor, bands, extent)

    dates = 1 + number % 3
    sequences = {
        "optical": sequence("rgb", ("red", "green", "blue"), 1, 40, rng.integers(0, 255, (1, 40, 40, 3), np.uint8)),
        "multispectral": sequence(
            "sentinel2-l2a", ("B02", "B03", "B04", "B08"), dates, 8, rng.integers(0, 4000, (dates, 8, 8, 4), np.uint16)
        ),
        "sar": sequence(
            "sentinel1-grd", ("VV", "VH"), dates, 8, rng.normal(-12, 4, (dates, 8, 8, 2)).astype(np.float32)
        ),
    }
    for absent in {5: ["optical"], 6: ["sar"], 7: ["multispectral", "sar"]}.get(number % 8, []):
        del sequences[absent]
    lonlat = [(7.0, 50.0), (7.1, 50.1), (-60.0, -3.0), (np.nan, np.nan)][number % 4]
    return Sample(sequences, np.array(lonlat, np.float32), id=f"site {number}", source="random")


@pytest.fixture(scope="session")
def compile_cache(tmp_path_factory):
    """A folder where this test run, its workers and the processes that they start keep what they compiled."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "compiled"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture(scope="session")
def compiled_quickly(compile_cache):
    """A context: what is compiled here runs for milliseconds, and optimising it would take longer than all tests."""

    @contextlib.contextmanager
    def context():
        settings = {
            "jax_compilation_cache_dir": (None, str(compile_cache)),
            "jax_persistent_cache_min_compile_time_secs": (1.0, 0.3),
            "jax_disable_most_optimizations": (False, True),
        }
        for name, (_, value) in settings.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()
        yield
        for name, (default, _) in settings.items():
            jax.config.update(name, default)
        compilation_cache.reset_cache()

    return context


@pytest.fixture(scope="module")
def quick_compilation(compiled_quickly):
    """`compiled_quickly` for all of a module that uses it."""
    with compiled_quickly():
        yield


@pytest.fixture(scope="session")
def sample_records(tmp_path_factory):
    """A folder of 24 random samples in the real format, all three modalities, some of them missing."""
    rng = np.random.default_rng(0)
    folder = tmp_path_factory.mktemp("records") / "random"
    records.write([random_sample(rng, number) for number in range(24)], folder)
    return folder


@pytest.fixture(scope="session")
def more_records(sample_records, tmp_path_factory):
    """A folder of other samples, none of which has SAR."""
    found = [sample for sample in records.RecordSource(sample_records) if "multispectral" in sample.sequences][10:]
    folder = tmp_path_factory.mktemp("records") / "without SAR"
    records.write(
        [
            dataclasses.replace(sample, sequences={"multispectral": sample.sequences["multispectral"]})
            for sample in found
        ],
        folder,
    )
    return folder


@pytest.fixture(scope="session")
def tiny_config(sample_records):
    """A function (modalities=.., objective__classes=8) that gives a config which trains in seconds on `sample_records`.

    All modalities compile in half a minute; fewer in less.
    """
    return functools.partial(make_tiny_config, sample_records)


@pytest.fixture(scope="session")
def add_words():
    """A function (config, tokenizer, length) that gives a config of `tiny_config` a text tower, a decoder and terms."""

    def add(config, tokenizer, length, captions=2, from_labels=2, kind="sigmoid"):
        tower = {"vocabulary": tokenizer.size, "length": length, "width": 16, "depth": 1, "heads": 2}
        with config.unlocked():
            config.data.text = ml_collections.ConfigDict(
                {
                    "tokenizer": str(tokenizer.path),
                    "length": length,
                    "captions": captions,
                    "from_labels": from_labels,
                    "metadata": False,
                }
            )
            config.model.text = ml_collections.ConfigDict({**tower, "embed_dim": 8, "causal": False, "pool": "last"})
            config.model.decoder = ml_collections.ConfigDict({**tower, "tied": True})
            config.objective.weights.update({"text": 1.0, "words": 0.5, "caption": 1.0})
            config.objective.text = ml_collections.ConfigDict(
                {
                    "kind": kind,
                    "streams": ("sar", "fused"),
                    "temperature": 0.1,
                    "bias": -5.0,
                    "bounds": (0.01, 1.0),
                    "chunk": 2,
                    "words": {"scales": (1, 2), "group": 2, "sharpness": 0.1, "temperature": 0.1},
                }
            )
            config.optimizer.learning_rate_multipliers = ((".*", 1.0),)
        return config

    return add
