"""Reading at random from data many times larger than what may stay in memory. Two gigabytes: benchmarks/input.py."""

import pathlib

import numpy as np

from skyjax.config import load_config
from skyjax.input import records
from skyjax.input.loader import Loader
from skyjax.sample import Sample, make_sequence

ROOT = pathlib.Path(__file__).parents[2]
BANDS = ("B02", "B03", "B04", "B05", "B06", "B07", "B08", "B8A", "B11", "B12")


def anonymous():
    """MB of this process that are not page cache."""
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("RssAnon")).split()[1]) / 1000


def test_memory_does_not_grow_with_what_was_read(tmp_path):
    values = np.random.default_rng(0).integers(1, 4000, (8, 64, 64, 10), np.uint16)
    sample = Sample({"multispectral": make_sequence(values, "sentinel2-l2a", BANDS, days=np.arange(8))}, np.zeros(2))
    records.write([sample] * 48, tmp_path / "set", compression="none")
    config = load_config(ROOT / "configs" / "time_series.py", ["batch_size=32", "data.threads=2"])
    with config.unlocked():
        config.data.sources = ((str(tmp_path / "set"), 1.0),) * 8
    loader = Loader(config)
    next(loader)
    before, largest = anonymous(), 0.0
    for _ in range(16):
        next(loader)
        largest = max(largest, anonymous())
    loader.close()
    read = 16 * 32 * values.nbytes / 1e6
    assert read > 300
    assert largest - before < 100
