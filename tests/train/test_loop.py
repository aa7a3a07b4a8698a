"""The loop: stopped at any step and started again, a run is the run that was never stopped."""

import dataclasses
import json
import os
import pathlib
import shutil
import signal
import time

import jax
import numpy as np
import pytest
from changed import changed
from real_runs import RealRun, final_state, lines

from skyjax.config import to_json
from skyjax.errors import UserError
from skyjax.input.device import prepare
from skyjax.input.records import RecordSource, write
from skyjax.sample import Sample
from skyjax.train import checkpoint, loop, state


def test_a_finished_run_has_everything(straight, config):
    assert [line["step"] for line in lines(straight)] == list(range(1, config.steps + 1))
    assert checkpoint.steps(straight / checkpoint.FOLDER) == [20, 30]
    assert json.loads((straight / "config.json").read_text()) == json.loads(to_json(config))
    versions = json.loads((straight / "versions.json").read_text())
    assert versions["jax"] == jax.__version__
    assert {"skyjax", "python", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy"} <= versions.keys()
    notes = checkpoint.read_notes(straight / checkpoint.FOLDER / "30")
    assert notes["position"] == 30 * config.batch_size
    assert notes["statistics"]["sar"]["bands"] == ["VV", "VH"]
    assert np.shape(notes["statistics"]["multispectral"]["mean"]) == (1, 3)


def test_every_term_is_logged_by_its_name_and_they_add_up(straight, config):
    streams = ("multispectral", "sar", "fused")
    names = {f"{level}/{stream}" for level in ("pixel", "object", "image", "spread") for stream in streams}
    names |= {"alignment/multispectral-sar"}
    for line in lines(straight):
        assert {name.removeprefix("loss/") for name in line if name.startswith("loss/")} == names
        terms = {name: line[f"loss/{name}"] or 0 for name in names}  # None: nothing of it in the batch
        weighted = sum(config.objective.weights[name.split("/")[0]] * value for name, value in terms.items())
        assert line["loss"] == pytest.approx(weighted, rel=1e-5)


def test_training_lowers_the_loss(straight):
    loss = [line["loss"] for line in lines(straight)]
    assert np.mean(loss[-5:]) < np.mean(loss[:5])


def test_preempted_and_resumed_equals_never_stopped(straight, config, quick, jitted, tmp_path, assert_same_bits):
    """SIGTERM while step 13 is evaluated: its checkpoint, which was due at 20 only, and no other evaluation."""
    reports, evaluated = [], []

    def preempted(_, step, stop):
        evaluated.append(step)
        assert not stop()
        os.kill(os.getpid(), signal.SIGTERM)
        while not stop():
            time.sleep(0.01)
        return {}

    evaluators = [preempted, preempted]
    first = loop.train(changed(config, eval__every=13), tmp_path, evaluators=evaluators, report=reports.append)
    assert first == 75
    assert evaluated == [13]
    assert not reports
    assert checkpoint.steps(tmp_path / checkpoint.FOLDER) == [10, 13]
    assert loop.train(config, tmp_path, report=reports.append) == 0
    assert reports == [tmp_path]
    assert lines(tmp_path) == lines(straight)
    assert_same_bits(final_state(tmp_path, config), final_state(straight, config))
    assert jitted._cache_size() == 1  # neither a restored state nor a new start compiles again


def test_a_damaged_newest_checkpoint_costs_its_steps_only(straight, config, quick, tmp_path, assert_same_bits, caplog):
    workdir = pathlib.Path(shutil.copytree(straight, tmp_path / "run"))
    newest = workdir / checkpoint.FOLDER / "30"
    biggest = max((path for path in newest.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    os.truncate(biggest, 1000)
    assert loop.train(config, workdir) == 0
    assert "going on from step 20" in caplog.text
    assert lines(workdir) == lines(straight)
    assert_same_bits(final_state(workdir, config), final_state(straight, config))


def test_a_run_goes_on_in_the_order_of_small_sources_that_it_began_with(config, straight, quick, tmp_path, monkeypatch):
    """Here that of the revisions before there was another."""
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    with monkeypatch.context() as patch:
        patch.setattr(loop, "ORDER", 1)
        assert loop.train(changed(config, steps=9), whole) == 0
        assert loop.train(changed(config, steps=4), stopped) == 0
    assert loop.train(changed(config, steps=9), stopped) == 0
    first, second, newest = ([line["samples"] for line in lines(run)][:9] for run in (whole, stopped, straight))
    assert first == second
    assert first != newest


def test_a_finished_run_started_again_does_nothing(straight, config, quick, tmp_path):
    workdir = pathlib.Path(shutil.copytree(straight, tmp_path / "run"))
    reports = []
    assert loop.train(config, workdir, report=reports.append) == 0
    assert (lines(workdir), reports) == (lines(straight), [workdir])


def test_another_config_is_refused_with_every_key(straight, config):
    with pytest.raises(UserError) as error:
        loop.train(changed(config, seed=7, optimizer__weight_decay=0.1, log__every=3), straight)
    assert "optimizer.weight_decay=0.1 (was 0.05), seed=7 (was 0)" in str(error.value)
    assert "log.every" not in str(error.value)


@pytest.fixture
def fake_step(monkeypatch, config, first):
    """A step that only counts: what the loop does around it is in question. Returns the steps it was called with."""
    called = []

    def step(state, batch):
        called.append(int(batch["index"][0]))
        names = ("loss", "rank/fused", "spread/fused", "skipped", "nonfinite_in_a_row")
        values = dict.fromkeys(names, 3.0) | {"nonfinite_in_a_row": fake.nonfinite}
        values |= {"rank/fused": fake.rank, "spread/fused": fake.spread}
        fake.nonfinite += fake.nonfinite > 0
        return {**state, "step": state["step"] + 1}, values

    def fake(*_):
        return step

    fake.nonfinite, fake.rank, fake.spread, fake.called = 0, 3.0, 0.05, called
    monkeypatch.setattr(loop, "jit_step", fake)
    monkeypatch.setattr(loop.states, "create", lambda *_: first)
    return fake


def test_every_batch_is_consumed_once_in_order(fake_step, config, tmp_path):
    assert loop.train(config, tmp_path) == 0
    assert fake_step.called == [step * config.batch_size for step in range(config.steps)]


def test_at_most_two_steps_are_in_flight(monkeypatch, config, first, tmp_path):
    """Metrics are read one step late, and never later."""
    in_flight, most = set(), []

    class Pending:
        """A scalar on the device."""

        def __init__(self, step):
            self.step = step

        def __array__(self, *_, **__):
            in_flight.discard(self.step)
            return np.float32(3)

    def step(state, batch):
        number = int(state["step"]) + 1
        in_flight.add(number)
        most.append(len(in_flight))
        names = ("loss", "rank/fused", "spread/fused", "skipped", "nonfinite_in_a_row")
        return {**state, "step": state["step"] + 1}, dict.fromkeys(names, 0.0) | {"loss": Pending(number)}

    monkeypatch.setattr(loop, "jit_step", lambda *_: step)
    monkeypatch.setattr(loop.states, "create", lambda *_: first)
    assert loop.train(changed(config, checkpoint__every=0), tmp_path) == 0
    assert most == [1] + [2] * (config.steps - 1)


def test_evaluators_see_the_old_state_and_join_its_line(fake_step, config, tmp_path, caplog):
    seen = []

    def count(state, step, stop):
        seen.append((int(state["step"]), step, step in checkpoint.steps(tmp_path / checkpoint.FOLDER)))
        return {"knn": step / 100}

    def fail(state, step, stop):
        raise RuntimeError("no labels")

    assert loop.train(changed(config, eval__every=10, log__every=4), tmp_path, evaluators=[fail, count]) == 0
    assert seen == [(10, 10, False), (20, 20, False), (30, 30, False)]  # evaluated before it is saved
    assert {line["step"]: line["knn"] for line in lines(tmp_path) if "knn" in line} == {10: 0.1, 20: 0.2, 30: 0.3}
    assert [line["step"] for line in lines(tmp_path)] == [4, 8, 10, 12, 16, 20, 24, 28, 30]
    assert "step 10: an evaluation failed" in caplog.text


def test_ten_in_a_row_that_are_not_finite_end_the_run(fake_step, config, tmp_path, capfd):
    fake_step.nonfinite = 1
    assert loop.train(changed(config, checkpoint__every=4), tmp_path) == 1
    assert len(fake_step.called) == 11  # the tenth is known when the eleventh is under way
    assert checkpoint.steps(tmp_path / checkpoint.FOLDER) == [4, 8]
    errors = capfd.readouterr().err
    assert "step 1: loss or gradient is not finite; update skipped" in errors
    assert "the last good checkpoint is that of step 8" in " ".join(errors.split())


@pytest.mark.parametrize(
    ("rank", "spread", "said"),
    [
        (1.25, 0.05, "effective rank 1.25 (alarm below 2)"),
        (3.0, 0.001, "spread 0.001 (alarm below 0.005)"),
        (3, 0.05, ""),
    ],
)
def test_a_collapse_is_said_once(fake_step, config, tmp_path, capfd, rank, spread, said):
    fake_step.rank, fake_step.spread = rank, spread
    assert loop.train(config, tmp_path) == 0
    errors = " ".join(capfd.readouterr().err.split())
    assert errors.count("features collapse") == bool(said)
    assert said in errors


def test_bad_records_end_the_run(fake_step, config, tmp_path, monkeypatch):
    def check_bad(_):
        raise UserError("5 of 24 records are bad")

    monkeypatch.setattr(loop.Loader, "check_bad", check_bad)
    with pytest.raises(UserError, match="5 of 24"):
        loop.train(config, tmp_path)


def test_no_permission_is_told(config, tmp_path):
    folder = tmp_path / "closed"
    folder.mkdir(mode=0o500)
    is_root = os.geteuid() == 0
    if is_root:  # who may write everywhere; the kernel asks for the effective user
        tmp_path.chmod(0o755)
        for parent in list(tmp_path.parents)[:2]:
            parent.chmod(0o755)
        os.seteuid(65534)
    try:
        with pytest.raises(UserError, match=r"Permission denied; free space or choose another --workdir"):
            loop.write_files(folder / "run", {"config.json": "{}"})
    finally:
        if is_root:
            os.seteuid(0)


def test_dry_run_prints_config_and_parameters_and_allocates_nothing(config):
    before = len(jax.live_arrays())
    text = loop.dry_run(config)
    assert len(jax.live_arrays()) <= before + 1  # the key of the seed
    assert '"batch_size": 8' in text
    assert "encoder/sar/patch_embed/kernel  (2, 2, 2, 8)  64" in text
    shapes = state.abstract(config)
    counts = [leaf.size for leaf in jax.tree.leaves([shapes["params"], shapes["prototypes"]])]
    assert [f"{sum(counts):,}" in line for line in text.splitlines() if line.startswith("= total")] == [True]


def test_statistics_of_the_config_stand_in_for_the_sensors(config):
    model = changed(config).model
    with model.unlocked():
        model.modalities.sar.statistics = {"sentinel1-grd": {"mean": (-11.0, -18.0), "std": (3.0, 4.0)}}
    found, before = loop.statistics_table(model), loop.statistics_table(config.model)
    assert found["sar"] == before["sar"] | {"mean": [[-11.0, -18.0]], "std": [[3.0, 4.0]]}
    assert {name: table for name, table in found.items() if name != "sar"} == {
        name: table for name, table in before.items() if name != "sar"
    }


def test_sources_of_a_mixture_are_normalised_by_the_statistics_of_their_sensors(tiny_config, sample_records, tmp_path):
    """Two sources of one sensor and one of another, each image of one value: by hand it is (value - mean) / std."""
    of_sensor = {"rgb": ((100.0, 90.0, 80.0), (50.0, 40.0, 25.0)), "aerial": ((60.0, 70.0, 10.0), (5.0, 8.0, 2.0))}
    places = {"pictures": "rgb", "more pictures": "rgb", "flights": "aerial"}
    optical = RecordSource(sample_records)[0].sequences["optical"]
    for number, (name, sensor) in enumerate(places.items()):
        values = np.full_like(optical.values, 40 * number + 10) + np.array((0, 3, 7), np.uint8)
        sequence = dataclasses.replace(optical, values=values, sensor=sensor, clear=np.ones_like(optical.clear))
        write([Sample({"optical": sequence}, np.float32([number, 0]), id=name, source=name)], tmp_path / name)
    config = tiny_config(modalities=("optical",), batch_size=9, data__augment__drop_modality=0.0)
    with config.unlocked():
        config.data.sources = tuple((str(tmp_path / name), 1.0) for name in places)
        config.model.modalities.optical.statistics = {
            sensor: {"mean": mean, "std": std} for sensor, (mean, std) in of_sensor.items()
        }
    loader = loop.Loader(config)
    batch = next(loader)
    loader.close()
    table = loop.statistics_table(config.model)["optical"]
    views = prepare(batch, statistics={"optical": (table["mean"], table["std"])}, augment=None, seed=config.seed)
    seen = batch["lonlat"][:, 0].astype(int).tolist()
    assert sorted(seen) == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    for group in ("global", "local"):
        images = views[group]["optical"]
        for values, number in zip(np.asarray(images["values"]), seen, strict=True):
            mean, std = of_sensor[list(places.values())[number]]
            want = (np.array((0.0, 3.0, 7.0)) + 40 * number + 10 - mean) / np.array(std)
            np.testing.assert_allclose(values, np.broadcast_to(want, values.shape), rtol=1e-5)


@pytest.mark.parametrize(
    ("statistics", "said"),
    [
        ({"sentinel2-l2a": {"mean": (0.0, 0.0), "std": (1.0, 1.0)}}, "sensors are sentinel1-grd; name one of them"),
        ({"sentinel1-grd": {"mean": (0.0,), "std": (1.0, 1.0)}}, "mean has 1 numbers for 2 bands"),
        ({"sentinel1-grd": {"mean": (0.0, 0.0), "std": (1.0, 0.0)}}, "std has a number of 0 or less"),
    ],
)
def test_statistics_that_cannot_be_are_told(config, statistics, said):
    model = changed(config).model
    with model.unlocked():
        model.modalities.sar.statistics = statistics
    with pytest.raises(UserError, match=said):
        loop.statistics_table(model)


def test_a_batch_that_does_not_divide_is_told(config, tmp_path):
    with pytest.raises(UserError, match="batch_size=8 is not a multiple of micro_batches=3"):
        loop.train(changed(config, micro_batches=3), tmp_path)


def test_a_window_beyond_the_run_is_told(config, tmp_path):
    with pytest.raises(UserError, match=r"--profile=29:31 is not a range inside of the run's steps, 1:30"):
        loop.train(config, tmp_path / "run", profile="29:31")
    assert not (tmp_path / "run").exists()


def test_a_model_that_contradicts_itself_is_told(config, tmp_path):
    with pytest.raises(UserError, match=r"config: model.modalities.sar: up_factor 3"):
        loop.train(changed(config, model__modalities__sar__up_factor=3), tmp_path)


def test_sigterm_while_compiling_ends_it_at_once(config, tmp_path):
    run = RealRun(config, tmp_path / "run", tmp_path / "cold")
    assert run.until(run.started)
    time.sleep(0.5)  # in the initialisation or the compilation of the step
    run.process.send_signal(signal.SIGTERM)
    assert run.process.wait(timeout=10) == 75
    assert "SIGTERM: nothing to save" in run.log.read_text()


def test_sigterm_while_a_resumed_run_compiles_saves_nothing_and_loses_nothing(
    straight, config, tmp_path, assert_same_bits
):
    """It has restored step 20 and goes on to 30: until its own first step there is nothing that is not on the disk."""
    workdir = pathlib.Path(shutil.copytree(straight, tmp_path / "run"))
    shutil.rmtree(workdir / checkpoint.FOLDER / "30")
    before = {path: path.stat().st_mtime_ns for path in (workdir / checkpoint.FOLDER).rglob("*")}
    run = RealRun(config, workdir, tmp_path / "cold")
    assert run.until(lambda: "going on from step 20" in run.log.read_text())
    run.process.send_signal(signal.SIGTERM)
    assert run.process.wait(timeout=10) == 75
    assert {path: path.stat().st_mtime_ns for path in (workdir / checkpoint.FOLDER).rglob("*")} == before
    assert lines(workdir) == lines(straight)[:20]
