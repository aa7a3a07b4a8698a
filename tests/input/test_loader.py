import collections
import json
import threading
import time

import grain
import jax
import ml_collections
import numpy as np
import pytest
from array_record.python.array_record_module import ArrayRecordWriter

from skyjax.errors import UserError
from skyjax.input.loader import Loader, device_batches
from skyjax.input.records import encode, write
from skyjax.sample import Sample, Sequence


def sample(number, source, dtype="uint8", sensor="rgb"):
    """One optical image; `lonlat` tells which sample it is."""
    rng = np.random.default_rng(number)
    sequence = Sequence(
        values=rng.integers(1, 200, (1, 8, 8, 3)).astype(dtype),
        days=np.array([19_000], np.int32),
        valid=np.ones(1, bool),
        clear=np.ones((1, 8, 8), bool),
        sensor=sensor,
        bands=("red", "green", "blue"),
        extent=np.array([4, -4, -4, 4], np.float32),
    )
    lonlat = np.array([number, {"a": 0, "b": 1}.get(source, 2)], np.float32)
    return Sample({"optical": sequence}, lonlat, id=f"{source}{number}", source=source)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Source a of 10 samples in several files, source b of 7, stored wider."""
    root = tmp_path_factory.mktemp("records")
    write([sample(n, "a") for n in range(10)], root / "a", shard_size=2000)
    write([sample(n, "b", "uint16") for n in range(7)], root / "b")
    return root


def config(folders, sources=(("a", 2.0), ("b", 1.0)), batch_size=4, threads=2, **changes):
    sizes = {"optical": 4}
    return ml_collections.ConfigDict(
        {
            "seed": changes.get("seed", 5),
            "batch_size": batch_size,
            "data": {
                "sources": tuple((str(folders / name), weight) for name, weight in sources),
                "threads": threads,
                "prefetch": changes.get("prefetch", 3),
                "dates": {"optical": 1},
                "global_views": {"size": sizes, "area": (0.5, 1.0)},
                "local_views": {"count": 1, "size": {"optical": 2}, "area": (0.1, 0.3), "dates": {"optical": 1}},
                "augment": {
                    **{"date_jitter": 1, "drop_date": 0.1, "drop_modality": 0.1},
                    **{"brightness": changes.get("brightness", 0.1), "contrast": 0.1, "saturation": 0.1, "blur": 0.1},
                    **{"solarize": 0.1, "speckle": 0.1, "gain": 0.1},
                },
            },
            "model": {
                "modalities": {"optical": {"sensors": ("rgb",), "bands": ("red", "green", "blue")}},
            },
        }
    )


def take(loader, count):
    batches = [next(loader) for _ in range(count)]
    loader.close()
    return batches


def assert_same(got, want):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


def names(batches):
    return [tuple(row.astype(int)) for batch in batches for row in batch["lonlat"]]


def test_a_batch_has_the_layout_and_types_of_the_contract(folders):
    (batch,) = take(Loader(config(folders)), 1)
    images = batch["global"]["optical"]
    shapes = {key: (value.shape, value.dtype.name) for key, value in images.items()}
    assert shapes == {
        "values": ((4, 2, 1, 4, 4, 3), "uint16"),  # the wider of the two sources
        "days": ((4, 2, 1), "int32"),
        "student_days": ((4, 2, 1), "int32"),
        "valid": ((4, 2, 1), "bool"),
        "student_valid": ((4, 2, 1), "bool"),
        "clear": ((4, 2, 1, 4, 4), "bool"),
        "sensor": ((4,), "int32"),
        "bands": ((4, 3), "bool"),
    }
    assert batch["local"]["optical"]["values"].shape == (4, 1, 1, 2, 2, 3)
    assert batch["global"]["to_view"].shape == (4, 2, 2, 3)
    assert {batch[key].dtype.name for key in ("index", "lonlat", "bad")} == {"uint32", "float32", "bool"}
    np.testing.assert_array_equal(batch["index"], np.arange(4))


def test_an_epoch_holds_every_sample_once_and_the_next_has_another_order(folders):
    order = names(take(Loader(config(folders, sources=(("a", 1.0),), batch_size=5)), 6))
    epochs = [order[i : i + 10] for i in (0, 10, 20)]
    for epoch in epochs:
        assert sorted(epoch) == [(n, 0) for n in range(10)]
    assert len(set(map(tuple, epochs))) == 3


def test_the_order_is_what_it_was(folders):
    """Runs go on in it. 1: Grain's shuffle, here by Grain itself; 2: as written down when it was introduced."""
    own_seed = int(np.random.SeedSequence((5, 0)).generate_state(1)[0])
    grains = grain.MapDataset.range(10).shuffle(seed=own_seed).repeat()
    first = names(take(Loader(config(folders, sources=(("a", 1.0),), batch_size=5), order=1), 6))
    assert [number for number, _ in first] == [grains[place] for place in range(30)]
    second = names(take(Loader(config(folders, sources=(("a", 1.0),), batch_size=5), order=2), 4))
    assert [number for number, _ in second] == [6, 2, 1, 8, 3, 0, 9, 4, 5, 7, 5, 2, 0, 4, 7, 1, 9, 3, 6, 8]


def test_sources_of_some_size_have_the_same_order_in_both(tmp_path):
    write([sample(number % 300, "a") for number in range(1024)], tmp_path / "many")
    one, other = (take(Loader(config(tmp_path, sources=(("many", 1.0),), batch_size=8), order=n), 2) for n in (1, 2))
    for a, b in zip(one, other, strict=True):
        assert_same(a, b)


def test_what_was_begun_is_what_comes(folders):
    loader = Loader(config(folders))
    loader.begin()
    for a, b in zip(take(loader, 3), take(Loader(config(folders)), 3), strict=True):
        assert_same(a, b)


def test_sources_are_mixed_by_weight_and_small_ones_start_again(folders):
    order = names(take(Loader(config(folders)), 45))
    counts = collections.Counter(source for _, source in order)
    assert counts == {0: 120, 1: 60}
    of_b = [number for number, source in order if source == 1]
    assert sorted(of_b[:7]) == sorted(of_b[7:14]) == list(range(7))


def test_sources_of_one_size_have_orders_of_their_own(folders):
    order = names(take(Loader(config(folders, sources=(("a", 1.0), ("a", 1.0)))), 5))
    assert order[::2] != order[1::2]
    assert sorted(order[::2]) == sorted(order[1::2])


@pytest.mark.parametrize("hosts", [2, 4])
def test_the_slices_of_all_hosts_make_the_batches_of_one(folders, hosts):
    alone = take(Loader(config(folders)), 5)
    shared = [take(Loader(config(folders), process_index=i, process_count=hosts), 5) for i in range(hosts)]
    for step, want in enumerate(alone):
        together = jax.tree.map(lambda *x: np.concatenate(x), *(batches[step] for batches in shared))
        assert_same(together, want)


@pytest.mark.parametrize("threads", [0, 3])
def test_threads_change_nothing(folders, threads):
    want, got = take(Loader(config(folders, threads=1)), 6), take(Loader(config(folders, threads=threads)), 6)
    for a, b in zip(got, want, strict=True):
        assert_same(a, b)


def test_it_goes_on_where_it_was_stopped_with_other_hosts(folders):
    want = take(Loader(config(folders)), 8)
    loader = Loader(config(folders), process_index=1, process_count=2)
    assert loader.position == 0
    for _ in range(5):
        next(loader)
    state = json.loads(json.dumps(loader.state()))
    loader.close()
    assert state == {"position": 20}
    resumed = Loader(config(folders), **state)
    for a, b in zip(take(resumed, 3), want[5:], strict=True):
        assert_same(a, b)
    assert resumed.position == 32
    np.testing.assert_array_equal(take(Loader(config(folders), position=10), 1)[0]["index"], [10, 11, 12, 13])


def test_the_seed_decides_order_and_views(folders):
    assert names(take(Loader(config(folders)), 4)) != names(take(Loader(config(folders, seed=6)), 4))


def damage(folder, samples, bad):
    """Writes a dataset whose records of these numbers are cut off in the middle."""
    write(samples, folder)
    (shard,) = folder.glob("*.array_record")
    writer = ArrayRecordWriter(str(shard), "group_size:1,zstd:1")
    for number, one in enumerate(samples):
        record = encode(one)
        writer.write(record[: len(record) // 2] if number in bad else record)
    writer.close()


def test_a_bad_record_keeps_its_place_empty_and_is_named_once(folders, tmp_path, caplog):
    samples = [sample(n, "a") for n in range(10)]
    damage(tmp_path / "a", samples, bad={3})
    loader = Loader(config(tmp_path, sources=(("a", 1.0),), batch_size=5))
    got = take(loader, 4)
    want = take(Loader(config(folders, sources=(("a", 1.0),), batch_size=5)), 4)
    for batch, whole in zip(got, want, strict=True):
        np.testing.assert_array_equal(batch["bad"], whole["lonlat"][:, 0] == 3)
        assert not whole["bad"].any()
        for key in ("valid", "student_valid", "clear", "bands"):
            assert not batch["global"]["optical"][key][batch["bad"]].any()
        good = jax.tree.map(lambda x, batch=batch: x[~batch["bad"]], (batch, whole))
        assert_same(*good)
    assert sum(batch["bad"].sum() for batch in got) == 2  # two epochs
    assert len(loader.bad) == 1
    (name,) = loader.bad
    assert name == "a/samples-00000.array_record: record 3"
    assert "truncated or corrupt" in loader.bad[name]
    assert len([r for r in caplog.records if "record 3" in r.message]) == 1
    with pytest.raises(UserError, match=r"1 of 10 records are bad, more than 1%; the first is a/samples-00000"):
        loader.check_bad()


def test_one_bad_record_in_a_hundred_is_borne(tmp_path):
    samples = [sample(n, "a") for n in range(100)]
    damage(tmp_path / "a", samples, bad={50})
    loader = Loader(config(tmp_path, sources=(("a", 1.0),), batch_size=50))
    take(loader, 2)
    assert len(loader.bad) == 1
    loader.check_bad()


def test_sources_that_do_not_fit_the_model_are_refused_at_once(folders, tmp_path):
    write([sample(0, "c", sensor="naip")], tmp_path / "c")
    with pytest.raises(UserError, match=r'c" has optical images of sensor "naip", which is not among.*\(rgb\); add it'):
        Loader(config(tmp_path, sources=(("c", 1.0),)))
    other = config(folders)
    other.model.modalities = ml_collections.ConfigDict(
        {"sar": {"sensors": ("sentinel1-grd",), "bands": ("VV",)}},
    )
    with pytest.raises(UserError, match=r'a" has optical, the model has sar'):
        Loader(other)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sources": ()}, "data.sources is empty"),
        ({"sources": (("a", 0.0),)}, r'gives ".*a" the share 0.0'),
        ({"sources": (("nowhere", 1.0),)}, "nowhere"),
        ({"batch_size": 3}, "batch_size is 3; set it to a positive multiple of the 2 processes"),
        ({"threads": -1}, "data.threads is -1"),
        ({"prefetch": 0}, "data.prefetch is 0"),
        ({"brightness": 3.0}, "data.augment.brightness is 3.0"),
        ({"seed": -1}, "seed is -1"),
    ],
)
def test_a_config_that_makes_no_sense_is_refused(folders, changes, message):
    with pytest.raises(UserError, match=message):
        Loader(config(folders, **changes), process_count=2)


def sharding():
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))


def transfer_threads():
    return [thread for thread in threading.enumerate() if thread.name == "skyjax-transfer"]


def test_device_batches_are_the_loaders_with_the_position_after_each(folders):
    want = take(Loader(config(folders)), 4)
    loader = Loader(config(folders))
    batches = device_batches(loader, sharding())
    for step, host in enumerate(want):
        position, batch = next(batches)
        assert position == 4 * (step + 1)
        assert all(isinstance(x, jax.Array) and x.sharding == sharding() for x in jax.tree.leaves(batch))
        assert_same(jax.tree.map(np.asarray, batch), host)
    assert len(transfer_threads()) == 1
    batches.close()
    assert not transfer_threads()
    loader.close()


class Counting:
    """A loader of tiny batches that says how far it was read, and fails where asked."""

    def __init__(self, fails_at=None):
        self.position, self._fails_at = 0, fails_at

    def __iter__(self):
        return self

    def __next__(self):
        if self.position == self._fails_at:
            raise UserError("the disk is gone")
        self.position += 1
        return {"index": np.full(1, self.position, np.uint32)}


def wait_until(condition):
    deadline = time.monotonic() + 10
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)


@pytest.mark.parametrize("depth", [1, 2, 4])
def test_the_transfer_runs_ahead_by_its_depth_and_no_more(depth):
    loader = Counting()
    batches = device_batches(loader, sharding(), depth)
    assert next(batches)[0] == 1
    ahead = max(depth, 2)  # one in the queue, one in the thread's hand
    wait_until(lambda: loader.position == 1 + ahead)
    time.sleep(0.2)
    assert loader.position == 1 + ahead
    batches.close()


def test_an_error_of_the_loader_reaches_the_consumer_after_what_came_before():
    batches = device_batches(Counting(fails_at=3), sharding())
    assert [next(batches)[0] for _ in range(3)] == [1, 2, 3]
    with pytest.raises(UserError, match="the disk is gone"):
        next(batches)
    assert not transfer_threads()


def test_a_consumer_that_is_gone_ends_the_thread():
    batches = device_batches(Counting(), sharding())
    next(batches)
    del batches
    wait_until(lambda: not transfer_threads())
    assert not transfer_threads()
