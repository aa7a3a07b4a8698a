"""From files to batches for a device: skyjax beside PyTorch's DataLoader on the same sites and the same crops.

    PYTHONPATH=. python benchmarks/input.py [--parts=speed,wait,memory] [--workers=1] [--json=FILE]

speed: samples a second of the sequence data in data/sample, cut as configs/time_series.py does. Each peer is a torch
  Dataset that reads the same arrays, from .npz, from .npy or from a GeoTIFF a date, draws the same dates and crops by
  the same code, and normalises in float32 on the host. Before anything is timed, all sides give equal batches.
wait: what share of a short training's time went into waiting for data, from its own ledger.
memory: anonymous memory of shuffled reading from 2 GB of records that are listed 50 times.
"""

import argparse
import contextlib
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time
import types
import warnings
from collections.abc import Iterator
from typing import Any

import jax
import ml_collections
import numpy as np
import psutil
import rasterio
import rasterio.errors
import rasterio.windows

from skyjax.config import load_config
from skyjax.input import records
from skyjax.input.build import load_builder
from skyjax.input.dates import deal_dates, drop_for_student
from skyjax.input.device import normalize
from skyjax.input.loader import Loader, _order, device_batches, open_source
from skyjax.input.views import GLOBAL_VIEWS, _draw_crops, band_positions, plan_views, shared_ground, window
from skyjax.sample import Sample, Sequence
from skyjax.sensors import statistics

ROOT = pathlib.Path(__file__).parents[1]
SITES = ("worldcereal", "worldcereal_monthly", "pastis")
RECORDS = 256  # the sites again and again
BATCH = 32
FIELDS = ("values", "days", "valid", "clear", "extent")


def config_for(folders: list[pathlib.Path], workers: int) -> ml_collections.ConfigDict:
    config = load_config(ROOT / "configs" / "time_series.py", [f"batch_size={BATCH}", f"data.threads={workers}"])
    with config.unlocked():
        config.data.sources = tuple((str(folder), 1.0) for folder in folders)
    return config


def sites() -> list[Sample]:
    """The sequences of data/sample whose modalities have dates and one pixel grid: cutting them is slicing."""
    found = []
    for name in SITES:
        for sample in load_builder(ROOT / "data" / f"{name}.py").samples(ROOT / "data" / "sample" / name):
            sequences = {m: sample.sequences[m] for m in ("multispectral", "sar")}
            if len({sequence.values.shape[1:3] for sequence in sequences.values()}) == 1:
                found.append(Sample(sequences, sample.lonlat, id=sample.id))
    return found


# The peers: how a site's arrays lie on the disk, and how one window of some dates is read from them


class Npz:
    """One compressed file a site, as data/sample has them; numpy unpacks an array whole."""

    name = "npz"

    def write(self, sample: Sample, folder: pathlib.Path) -> None:
        """Writes a site into its folder."""
        np.savez_compressed(folder / "site.npz", **flat(sample))

    def open(self, folder: pathlib.Path) -> dict[str, Any]:
        """The arrays of a site by MODALITY.FIELD."""
        with np.load(folder / "site.npz") as arrays:
            return dict(arrays)

    def read(self, array: Any, dates: np.ndarray, rows: slice, columns: slice) -> np.ndarray:
        """A window of some dates."""
        return array[dates, rows, columns]


class Npy(Npz):
    """One uncompressed file an array, read whole."""

    name, mode = "npy", None

    def write(self, sample: Sample, folder: pathlib.Path) -> None:
        for name, array in flat(sample).items():
            np.save(folder / f"{name}.npy", array)

    def open(self, folder: pathlib.Path) -> dict[str, Any]:
        return {path.stem: np.load(path, mmap_mode=self.mode) for path in folder.glob("*.npy")}


class Mapped(Npy):
    """The same files, mapped: what the crop does not touch is not read. It needs a local disk and no compression."""

    name, mode = "npy mapped", "r"


class GeoTiffs(Npz):
    """A file a date and modality with all bands, deflated, and one with its clear pixels; read by windows."""

    name = "GeoTIFF"

    def write(self, sample: Sample, folder: pathlib.Path) -> None:
        about = {}
        for name, array in flat(sample).items():
            if array.ndim < 3:
                about[name] = array
                continue
            for date, image in enumerate(array.astype(np.uint8) if array.dtype == bool else array):
                bands = np.moveaxis(image, -1, 0) if image.ndim == 3 else image[None]
                shape = {"count": len(bands), "height": bands.shape[1], "width": bands.shape[2], "dtype": bands.dtype}
                options = {"compress": "deflate", "tiled": True, "blockxsize": 64, "blockysize": 64}
                with rasterio.open(folder / f"{name}.{date:03d}.tif", "w", driver="GTiff", **shape, **options) as file:
                    file.write(bands)
        np.savez(folder / "about.npz", **about)

    def open(self, folder: pathlib.Path) -> dict[str, Any]:
        with np.load(folder / "about.npz") as arrays:
            found: dict[str, Any] = dict(arrays)
        for modality in ("multispectral", "sar"):
            for field in ("values", "clear"):
                first = f"{modality}.{field}"
                with rasterio.open(folder / f"{first}.000.tif") as file:
                    shape = (len(found[f"{modality}.days"]), file.height, file.width)
                found[first] = types.SimpleNamespace(shape=shape, start=str(folder / first))
        return found

    def read(self, array: Any, dates: np.ndarray, rows: slice, columns: slice) -> np.ndarray:
        part = rasterio.windows.Window(columns.start, rows.start, columns.stop - columns.start, rows.stop - rows.start)
        images = []
        for date in dates:
            with rasterio.open(f"{array.start}.{date:03d}.tif") as file:
                images.append(np.moveaxis(file.read(window=part), 0, -1))
        found = np.stack(images)
        return found[..., 0].astype(bool) if array.start.endswith("clear") else found


PEERS = (Npz(), Npy(), Mapped(), GeoTiffs())


def flat(sample: Sample) -> dict[str, np.ndarray]:
    return {f"{m}.{field}": getattr(s, field) for m, s in sample.sequences.items() for field in FIELDS}


class Views:
    """A torch Dataset: item p is the sample at global position p, cut and normalised in plain numpy."""

    def __init__(
        self, peer: Npz, config: ml_collections.ConfigDict, folders: list[pathlib.Path], samples: list[Sample]
    ):
        types_ = {"multispectral": "uint16", "sar": "float32"}
        self.peer, self.plan, self.seed = peer, plan_views(config.data, config.model, types_), config.seed
        self.folders, self.kinds = folders, [{m: (s.sensor, s.bands) for m, s in x.sequences.items()} for x in samples]
        self.tables = {m: statistics(p.sensors, p.bands) for m, p in self.plan.modalities.items()}
        source = open_source(config.data.sources[0][0])
        order = _order([source], [1.0], config.seed)
        self.order = [int(order[position][1]) % len(folders) for position in range(BATCH * 64)]

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, position: int) -> dict[str, dict[str, np.ndarray]]:
        number = self.order[position]
        arrays, plan = self.peer.open(self.folders[number]), self.plan
        rng = np.random.default_rng((self.seed, position))
        of_dates = np.random.default_rng((self.seed, position // plan.same_dates, 0xDA7E5))
        present = {
            m: types.SimpleNamespace(values=arrays[f"{m}.values"], extent=arrays[f"{m}.extent"])
            for m in plan.modalities
        }
        ground = shared_ground(None, present)
        group, crops = plan.groups["global"], _draw_crops(rng, plan, present, ground)["global"]
        dates = {
            m: deal_dates(
                of_dates,
                np.flatnonzero(arrays[f"{m}.valid"]),
                slots=group.dates[m],
                views=GLOBAL_VIEWS,
                apart=plan.dates_apart,
            )
            for m in plan.modalities
        }
        batch = {}
        for m, wanted in plan.modalities.items():
            size, slots = group.size[m], group.dates[m]
            sensor, bands = self.kinds[number][m]
            row, (slot, source) = wanted.sensors.index(sensor), band_positions(sensor, bands, wanted.bands)
            mean, std = (np.float32(table[row])[slot] for table in self.tables[m])
            images = {
                "values": np.zeros((2, slots, size, size, len(wanted.bands)), np.float32),
                "days": np.zeros((2, slots), np.int32),
                "valid": np.zeros((2, slots), bool),
                "clear": np.zeros((2, slots, size, size), bool),
            }
            for view, crop in enumerate(crops):
                chosen = dates[m][view]
                if len(chosen) > slots:
                    chosen = np.sort(rng.permutation(chosen)[:slots])
                spans = (
                    window(present[m], ground, crop.top, crop.bottom, 0),
                    window(present[m], ground, crop.left, crop.right, 1),
                )
                rows, columns = (slice(round(start), round(start) + size) for start, _ in spans)
                values = self.peer.read(arrays[f"{m}.values"], chosen, rows, columns)[..., source].astype(np.float32)
                clear = self.peer.read(arrays[f"{m}.clear"], chosen, rows, columns) & np.isfinite(values).all(-1)
                values = np.where(clear[..., None], (values - mean) / std, 0)
                images["values"][view, : len(chosen), :, :, slot] = np.moveaxis(crop.turn(values), -1, 0)
                images["clear"][view, : len(chosen)] = crop.turn(clear)
                images["days"][view, : len(chosen)] = arrays[f"{m}.days"][chosen]
                images["valid"][view, : len(chosen)] = True
            jitter = rng.integers(-plan.date_jitter, plan.date_jitter + 1, images["days"].shape, np.int32)
            images["student_days"] = np.where(images["valid"], images["days"] + jitter, 0).astype(np.int32)
            batch[m] = images
        drop_for_student(rng, batch, drop_date=plan.drop_date, drop_modality=plan.drop_modality)
        return batch


def numpy_collate(items: list[Any]) -> Any:
    import torch.utils.data

    return torch.utils.data.default_collate(items)


def one_thread(_: int) -> None:
    import torch

    torch.set_num_threads(1)


@contextlib.contextmanager
def torch_side(views: Views, workers: int) -> Iterator[Iterator[Any]]:
    import torch.utils.data

    one_thread(0)
    loader = torch.utils.data.DataLoader(
        views, BATCH, num_workers=workers, collate_fn=numpy_collate, worker_init_fn=one_thread
    )
    yield iter(loader)


@contextlib.contextmanager
def skyjax_side(config: ml_collections.ConfigDict, *, normalised: bool) -> Iterator[Iterator[Any]]:
    """Batches on the device in stored types, as training takes them, or normalised there too."""
    loader = Loader(config)
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    batches = device_batches(loader, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data")))
    tables = {m: statistics(part.sensors, part.bands) for m, part in config.model.modalities.items()}
    ready = jax.jit(lambda views: {m: normalize(views[m], *tables[m]) for m in tables})

    def stream() -> Iterator[Any]:
        for _, batch in batches:
            views = {m: batch["global"][m] for m in tables}
            if normalised:
                values = jax.block_until_ready(ready(views))
                views = {m: {**images, "values": values[m]} for m, images in views.items()}
            yield views

    yield stream()
    batches.close()
    loader.close()


def check_equal(want: Any, got: Any) -> float:
    """The largest difference of a normalised value; everything else must be equal."""
    worst = 0.0
    for m, images in want.items():
        for field in ("days", "student_days", "valid", "student_valid", "clear"):
            # skyjax keeps pixels of dates that are not there as not clear, and so do its peers.
            np.testing.assert_array_equal(np.asarray(images[field]), np.asarray(got[m][field]), err_msg=f"{m} {field}")
        worst = max(worst, float(np.abs(np.asarray(images["values"]) - np.asarray(got[m]["values"])).max()))
    assert worst < 1e-4, worst
    return worst


def cpu_seconds() -> float:
    """Of this process and of the workers that it started."""
    here = psutil.Process()
    return sum(sum(each.cpu_times()[:2]) for each in (here, *here.children(recursive=True)))


def time_side(side: Any, batches: int) -> tuple[float, float]:
    """Samples a second of processor time, and of the clock; start-up is left out."""
    with side as stream:
        for _ in range(3):
            next(stream)
        cpu, clock = cpu_seconds(), time.perf_counter()
        for _ in range(batches):
            next(stream)
        return BATCH * batches / (cpu_seconds() - cpu), BATCH * batches / (time.perf_counter() - clock)


def speed(workers: int, rounds: int, batches: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as place:
        samples, root = sites(), pathlib.Path(place)
        records.write((samples[i % len(samples)] for i in range(RECORDS)), root / "records")
        records.write((samples[i % len(samples)] for i in range(RECORDS)), root / "plain", compression="none")
        config, plain = (config_for([root / name], workers) for name in ("records", "plain"))
        runs: dict[str, Any] = {
            "skyjax": lambda: skyjax_side(config, normalised=False),
            "skyjax, normalised by XLA on this CPU": lambda: skyjax_side(config, normalised=True),
            "skyjax, records not compressed": lambda: skyjax_side(plain, normalised=False),
        }
        with runs["skyjax, normalised by XLA on this CPU"]() as stream:
            want = [jax.device_get(next(stream)) for _ in range(3)]
        differences = {}
        for peer in PEERS:
            folders = [root / peer.name.replace(" ", "_") / str(i) for i in range(len(samples))]
            for sample, folder in zip(samples, folders, strict=True):
                folder.mkdir(parents=True)
                peer.write(sample, folder)
            views = Views(peer, config, folders, samples)
            with torch_side(views, 0) as stream:
                differences[peer.name] = max(check_equal(one, next(stream)) for one in want)
            runs[f"DataLoader, {peer.name}"] = lambda views=views: torch_side(views, workers)
        found: dict[str, list[tuple[float, float]]] = {name: [] for name in runs}
        for _ in range(rounds):
            for name, run in runs.items():
                found[name].append(time_side(run(), batches))
    best = {name: [max(column) for column in zip(*each, strict=True)] for name, each in found.items()}
    rows = []
    print(
        f"{'':42s} {'samples/s a core':>18s} {'ratio':>8s} {'uncompressed':>13s} {'samples/s':>10s} {workers} worker(s)"
    )
    for name, (core, clock) in best.items():
        ratio, plain_ratio = (best[f"skyjax{side}"][0] / core for side in ("", ", records not compressed"))
        print(f"{name:42s} {core:18.0f} {ratio:8.2f} {plain_ratio:13.2f} {clock:10.0f}", flush=True)
        rows.append({"side": name, "per_core": core, "ratio": ratio, "plain_ratio": plain_ratio, "per_second": clock})
    size = sum(a.nbytes for s in samples for a in flat(s).values()) / len(samples)
    return {"workers": workers, "megabytes_a_sample": size / 1e6, "largest_difference": differences, "rows": rows}


def wait(steps: int) -> dict[str, float]:
    """Share of the time after compilation in which nothing ran but the wait for data."""
    found = {}
    for name in ("pretrain_sample", "time_series"):
        with tempfile.TemporaryDirectory() as workdir:
            words = ["train", f"--config=configs/{name}.py", f"--workdir={workdir}", f"--config.steps={steps}"]
            command = [sys.executable, "-c", "import sys; from skyjax.cli import main; sys.exit(main())", *words]
            subprocess.run(
                command, check=True, cwd=ROOT, stderr=subprocess.DEVNULL, env={**os.environ, "JAX_PLATFORMS": "cpu"}
            )
            seconds = json.loads((pathlib.Path(workdir) / "goodput.json").read_text())["seconds"]
        found[name] = seconds["data"] / (seconds["data"] + seconds["step"])
        print(f"{name}: {found[name]:.2%} of {seconds['data'] + seconds['step']:.0f} s waited for data", flush=True)
    return found


def memory(gigabytes: float, times: int, batches: int) -> dict[str, float]:
    """Anonymous memory of this process while it reads at random from a file that is listed many times."""
    rng = np.random.default_rng(0)
    dates, pixels = 8, 64

    def noise(number: int) -> Sample:
        values = rng.integers(0, 4096, (dates, pixels, pixels, 10), np.uint16)
        days, valid = np.arange(dates, dtype=np.int32), np.ones(dates, bool)
        bands = ("B02", "B03", "B04", "B05", "B06", "B07", "B08", "B8A", "B11", "B12")
        clear, extent = np.ones(values.shape[:3], bool), np.float32([320, -320, -320, 320])
        sequence = Sequence(values, days, valid, clear, "sentinel2-l2a", bands, extent)
        return Sample({"multispectral": sequence}, np.float32([5, 50]), id=str(number), source="noise")

    with tempfile.TemporaryDirectory() as place:
        folder, size = pathlib.Path(place) / "noise", noise(0).sequences["multispectral"].values.nbytes
        written = records.write(
            (noise(i) for i in range(int(gigabytes * 1e9 / size))), folder, shard_size=2**62, compression="none"
        )
        loader = Loader(config_for([folder] * times, 2))
        largest, start, passed = 0.0, anonymous(), 0
        for _ in range(batches):
            next(loader)
            passed += BATCH * size
            largest = max(largest, anonymous())
        loader.close()
    found = {
        "file_gb": written.size / 1e9,
        "times": times,
        "read_gb": passed / 1e9,
        "before_mib": start,
        "largest_mib": largest,
    }
    print(
        f"{found['read_gb']:.1f} GB read at random from {found['file_gb']:.2f} GB listed {times} times:"
        f" anonymous memory at most {largest:.0f} MiB, {start:.0f} before the first batch",
        flush=True,
    )
    return found


def anonymous() -> float:
    """MiB of this process that are not page cache."""
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("RssAnon")).split()[1]) / 1024


def main() -> None:
    warnings.filterwarnings("ignore", category=rasterio.errors.NotGeoreferencedWarning)
    warnings.filterwarnings("ignore", message="os.fork")  # the workers never touch JAX
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default="speed,wait,memory")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batches", type=int, default=12)
    parser.add_argument(
        "--steps", type=int, default=40, help="of the trainings of wait, whose data sets `make records` builds"
    )
    parser.add_argument("--gigabytes", type=float, default=2.0)
    parser.add_argument("--json", type=pathlib.Path)
    arguments = parser.parse_args()
    parts = {
        "speed": lambda: speed(arguments.workers, arguments.rounds, arguments.batches),
        "wait": lambda: wait(arguments.steps),
        "memory": lambda: memory(arguments.gigabytes, 50, 200),
    }
    result: dict[str, Any] = {}
    if arguments.json and arguments.json.is_file():
        result = json.loads(arguments.json.read_text())
    for name in arguments.parts.split(","):
        if name not in parts:
            sys.exit(f'--parts: "{name}" is not one of {", ".join(parts)}')
        result[name] = parts[name]()
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
