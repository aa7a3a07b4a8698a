"""Batches of views in an order that depends on the seed alone, and their way to the devices.

In: the config, folders of records or of images, where to go on. Out: host batches (sample.py), or device batches with
the position to save for them. The sample at global position p is the same whatever the number of hosts, threads or
restarts: a host takes its slice of each global batch, and the whole state of the iterator is one integer.
"""

import functools
import logging
import pathlib
import queue
import threading
from collections.abc import Generator, Mapping
from typing import Any

import grain
import jax
import ml_collections
import numpy as np
from jaxtyping import Int

from skyjax.errors import UserError
from skyjax.input import augment
from skyjax.input.image_folder import ImageFolder
from skyjax.input.records import DESCRIPTION, RecordSource, folder_at, widest_type
from skyjax.input.texts import Texts
from skyjax.input.views import Plan, make_views, plan_views
from skyjax.sample import Batch, Sample, empty_sample

# A run may go on with this share of bad records. It is judged from this many records on: one bad in ten says nothing.
_BAD_SHARE = 0.01
_JUDGED_FROM = 1000
# Samples. Grain's own endless length is the largest integer and overflows where its slices are batched and sliced.
_ENDLESS = 2**48
# How the records of a source follow each other; a run keeps the order that it began with. 1: all sources by Grain's
# shuffle, which takes up to 6 ms a draw from few records with the interpreter's lock held. 2: small ones by `_Epochs`.
ORDER = 2
_SMALL = 1024  # records; a draw from more takes Grain 20 us at most

Source = RecordSource | ImageFolder
Place = tuple[Source, int]


class Loader:
    """An endless iterator over this process' slices of the global batches.

    Attributes:
      position: samples of the global order that were yielded to all processes together; what a checkpoint keeps.
      sizes: records of each source.
      tokenizer: of the captions; None where the model has no text tower.
      bad: name of each bad record that was met -> reason.
      types: modality -> the type of its values in a batch: the widest that a source stores.
    """

    def __init__(
        self,
        config: ml_collections.ConfigDict,
        *,
        position: int = 0,
        order: int = ORDER,
        process_index: int = 0,
        process_count: int = 1,
    ):
        """Opens the sources and checks them against the model; reads no record yet.

        Args:
          config: the whole experiment's.
          position: where to go on, from `state()`.
          order: that the run began with (ORDER).
          process_index: of this process among those that share the global batch.
          process_count: how many share it; it may differ from the run that was stopped.

        Raises:
          UserError: a source is missing, empty or of a sensor that the model doesn't name; the config makes no sense.
        """
        _check(config, process_count)
        sources, weights = _open(config)
        self.types = _types(sources)
        _check_sensors(sources, config.model)
        self.bad: dict[str, str] = {}
        self.position = position
        self._batch_size, self._seed = config.batch_size, config.seed
        self._plan: Plan = plan_views(config.data, config.model, self.types)
        self.sizes = [len(source) for source in sources]
        self._texts = Texts(config.data.text, config.model, config.seed) if config.model.get("text") else None
        self.tokenizer = None if self._texts is None else self._texts.tokenizer
        self._records, self._read = sum(self.sizes), 0
        self._lock = threading.Lock()

        # Positions first, then views: an element's index in the mixed order is its global position.
        places = _order(sources, weights, config.seed, order)
        views = places.map_with_index(self._views)[position : position + _ENDLESS]
        # Slices of process_count consecutive host batches make one global batch.
        batches = views.batch(config.batch_size // process_count)[process_index::process_count]
        threads = config.data.threads
        options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=config.data.prefetch if threads else 0)
        self._batches = iter(batches.to_iter_dataset(options))

    def __iter__(self) -> "Loader":
        return self

    def __next__(self) -> Batch:
        batch = next(self._batches)
        self.position += self._batch_size
        return batch

    def begin(self) -> None:
        """Starts to read ahead, so that the first batch is there when it is asked for. No need to call it."""
        self._batches.start_prefetch()

    def state(self) -> dict[str, int]:
        """What a checkpoint keeps; `Loader(config, **state)` goes on with the next batch."""
        return {"position": self.position}

    def close(self) -> None:
        """Ends the reading threads."""
        self._batches.close()

    def check_bad(self) -> None:
        """Ends a run on bad data.

        Raises:
          UserError: more than 1 % of the records that were read, but of at least 1,000 or all, are bad.
        """
        with self._lock:
            judged = max(min(self._read, self._records), min(self._records, _JUDGED_FROM))
            if len(self.bad) > _BAD_SHARE * judged:
                name, reason = next(iter(self.bad.items()))
                raise UserError(
                    f"{len(self.bad):,} of {judged:,} records are bad, more than {_BAD_SHARE:.0%}; the first is {name}"
                    f" ({reason}); build the data set again"
                )

    def _views(self, index: int, place: Place) -> dict[str, Any]:
        """The views at a global position. A bad record keeps its place as an empty sample."""
        source, number = place
        with self._lock:
            self._read += 1
        try:
            return self._sample(source[number], source, index)
        except UserError as error:  # BadRecord, or a file that is gone: then each of its records counts
            name = f"{source.folder.name}/{source.name(number)}"
            self._note(name, str(error))
            return self._sample(empty_sample(name, ""), source, index) | {"bad": np.bool_(True)}

    def _sample(self, sample: Sample, source: Source, index: int) -> dict[str, Any]:
        views = make_views(sample, self._plan, self._seed, index)
        if self._texts is not None:
            views["text"] = self._texts(sample, source.description.get("label_names", {}), index)
        return views

    def _note(self, name: str, reason: str) -> None:
        with self._lock:
            known, count = name in self.bad, len(self.bad) + 1
            self.bad.setdefault(name, reason)
        if not known:
            logging.warning("%s: %s; skipped, %d of %s so far", name, reason, count, f"{self._records:,}")


def _check(config: ml_collections.ConfigDict, process_count: int) -> None:
    if config.batch_size < 1 or config.batch_size % process_count:
        raise UserError(
            f"config: batch_size is {config.batch_size}; set it to a positive multiple of the {process_count} processes"
        )
    if not 0 <= config.seed < 2**32:
        raise UserError(f"config: seed is {config.seed}; set it between 0 and 4,294,967,295")
    for key, least in (("threads", 0), ("prefetch", 1)):
        if config.data[key] < least:
            raise UserError(f"config: data.{key} is {config.data[key]}; set it to {least} or more")
    augment.check(config.data.augment)


def open_source(path: str) -> Source:
    """A folder made by `skyjax data build`, here or in a bucket (gs://BUCKET/PATH), or any local folder of images.

    Raises:
      UserError: it is neither.
    """
    folder = folder_at(path)
    if isinstance(folder, pathlib.Path) and not (folder / DESCRIPTION).is_file() and folder.is_dir():
        return ImageFolder(folder)
    return RecordSource(path)


def _open(config: ml_collections.ConfigDict) -> tuple[list[Source], list[float]]:
    if not config.data.sources:
        raise UserError(
            "config: data.sources is empty; name at least one folder of images or made by `skyjax data build`"
        )
    sources, weights = [], []
    for path, weight in config.data.sources:
        if not weight > 0:
            raise UserError(f'config: data.sources gives "{path}" the share {weight}; set it above 0 or leave it out')
        source = open_source(path)
        if not len(source):
            raise UserError(f'"{path}" has no samples; build it from at least one file')
        sources.append(source)
        weights.append(float(weight))
    return sources, weights


def _types(sources: list[Source]) -> dict[str, str]:
    stored: dict[str, list[str]] = {}
    for source in sources:
        for modality, told in source.description["modalities"].items():
            stored.setdefault(modality, []).append(told["dtype"])
    return {modality: widest_type(names) for modality, names in stored.items()}


def _check_sensors(sources: list[Source], model: ml_collections.ConfigDict) -> None:
    """A sensor that the model doesn't name has no row in its statistics; better told here than at record 1312."""
    for source in sources:
        told: Mapping[str, Any] = source.description["modalities"]
        shared = [modality for modality in told if modality in model.modalities]
        if not shared:
            raise UserError(
                f'"{source.folder}" has {", ".join(told) or "no modality"}, the model has'
                f" {', '.join(model.modalities)}; leave it out of data.sources or add to model.modalities"
            )
        for modality in shared:
            known = tuple(model.modalities[modality].sensors)
            for sensor in told[modality]["sensors"]:
                if sensor not in known:
                    raise UserError(
                        f'"{source.folder}" has {modality} images of sensor "{sensor}", which is not among'
                        f" model.modalities.{modality}.sensors ({', '.join(known)}); add it there"
                    )


class _Places:
    """A source's records by reference: they are read together with their views, where a bad one can be replaced."""

    def __init__(self, source: Source):
        self._source = source

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, number: int) -> Place:
        return self._source, int(number)


class _Epochs:
    """A small source's records by reference, epoch after epoch without end, each in a random order of its own."""

    def __init__(self, source: Source, seed: int, number: int):
        self._source, self._count, self._seed, self._number = source, len(source), seed, number
        self._epoch = functools.lru_cache(maxsize=8)(self._drawn)  # threads are not all in the same one

    def __len__(self) -> int:
        return _ENDLESS

    def __getitem__(self, index: int) -> Place:
        epoch, place = divmod(int(index), self._count)
        return self._source, int(self._epoch(epoch)[place])

    def _drawn(self, epoch: int) -> Int[np.ndarray, "records"]:
        """Numpy promises that these numbers stay; it does not for `Generator.permutation`."""
        keys = np.random.SeedSequence(self._seed, spawn_key=(self._number, epoch)).generate_state(
            self._count, np.uint64
        )
        return np.argsort(keys, kind="stable")


def _order(sources: list[Source], weights: list[float], seed: int, order: int = ORDER) -> grain.MapDataset:
    """Every source in a new random order each epoch, without end, mixed by weight. Random access throughout."""
    ordered = []
    for number, source in enumerate(sources):
        if order >= 2 and len(source) < _SMALL:
            ordered.append(grain.MapDataset.source(_Epochs(source, seed, number)))
            continue
        # Grain adds the epoch to the seed: neighbouring seeds would give each other's orders one epoch later.
        own_seed = int(np.random.SeedSequence((seed, number)).generate_state(1)[0])
        ordered.append(grain.MapDataset.source(_Places(source)).shuffle(seed=own_seed).repeat())
    return grain.MapDataset.mix(ordered, weights) if len(ordered) > 1 else ordered[0]


def device_batches(
    loader: Loader, sharding: jax.sharding.Sharding, depth: int = 2
) -> Generator[tuple[int, Batch], None, None]:
    """Batches on the devices, `depth` of them ahead of the consumer, so that a step never waits for a transfer.

    Args:
      loader: this process' slices. From now on its own position runs ahead: save the one that comes with a batch.
      sharding: of every array, by its first axis.
      depth: batches on the devices beside the one in use, 2 or more.

    Yields:
      The position after a batch, to save once it is consumed, and the batch as global arrays.

    Raises:
      Whatever the loader raises. Closing the generator ends its thread; the loader stays open.
    """
    ready: queue.Queue[Any] = queue.Queue(max(depth - 1, 1))  # one more waits in the thread's hand
    stop = threading.Event()

    def offer(item: Any) -> bool:
        while not stop.is_set():
            try:
                ready.put(item, timeout=0.1)
            except queue.Full:
                continue
            return True
        return False

    def transfer() -> None:
        try:
            for batch in loader:
                put = jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, x), batch)
                if not offer((loader.position, put)):
                    return
            offer(None)
        except BaseException as error:  # handed to the consumer, who raises it
            offer(error)

    thread = threading.Thread(target=transfer, name="skyjax-transfer", daemon=True)
    thread.start()
    try:
        while (item := ready.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        stop.set()
        thread.join()
