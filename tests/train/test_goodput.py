"""Where the time went: all of it is charged once, and what a killed run did in vain is lost."""

import json
import threading
import time

import pytest

from skyjax.errors import UserError
from skyjax.train import goodput


@pytest.fixture
def clock(monkeypatch):
    """A clock that the test turns."""

    class Clock:
        now = 1000.0

    monkeypatch.setattr(goodput.time, "monotonic", lambda: Clock.now)
    return Clock


def spend(ledger, clock, **seconds):
    for account, amount in seconds.items():
        with ledger.measure(account):
            clock.now += amount


def test_all_time_is_charged_once(clock, tmp_path):
    ledger = goodput.Ledger(tmp_path, began=990.0)
    clock.now += 5
    ledger.turn_to("step")
    clock.now += 20
    with ledger.measure("evaluate"):
        clock.now += 3
        with ledger.measure("checkpoint"):
            clock.now += 2
        clock.now += 1
    clock.now += 4
    found = ledger.totals(7)
    want = {"initialise": 15, "step": 24, "evaluate": 4, "checkpoint": 2, "compile": 0, "data": 0, "lost": 0}
    assert found == {"step": 7, "starts": 1, "seconds": want}
    assert sum(found["seconds"].values()) == clock.now - 990
    ledger.write(7)
    assert goodput.read(tmp_path / goodput.FILE) == found


@pytest.mark.parametrize(("finished", "charged"), [(None, 0), (998.0, 6), (1004.0, 2)])
def test_waiting_for_data_counts_while_the_device_is_idle(clock, finished, charged):
    """The device computes on for `finished` - 1000 s of a wait of 6 s."""
    ledger, device = goodput.Ledger(), goodput.Device()
    device._dispatched, device._finished = 3, 2 if finished is None else 3
    ledger.turn_to("step")
    with ledger.waiting_for_data(device):
        clock.now += 6
        device._idle_since = finished or 0.0
    assert ledger.seconds["data"] == charged
    assert ledger.seconds["step"] == 6 - charged


def test_the_device_clock_notes_when_a_step_ends():
    class Result:
        """Something that is ready when the test says so."""

        def __init__(self):
            self.ready = threading.Event()

        def block_until_ready(self):
            self.ready.wait(10)

    result = Result()
    with goodput.Device() as device:
        start = time.monotonic()
        device.dispatched(result)
        time.sleep(0.05)
        assert device.idle_seconds(start, time.monotonic()) == 0
        result.ready.set()
        while device._finished < 1:
            time.sleep(0.001)
        time.sleep(0.05)
        end = time.monotonic()
        assert 0.05 <= device.idle_seconds(start, end) <= end - start - 0.05


def test_a_killed_run_loses_what_it_did_after_its_checkpoint(clock, tmp_path):
    first = goodput.Ledger(tmp_path)
    spend(first, clock, initialise=10, compile=30, step=100)
    saved = first.totals(50)
    spend(first, clock, checkpoint=2, step=40)
    first.write(70)  # and is killed

    second = goodput.Ledger(tmp_path)
    second.resume(50, saved)
    spend(second, clock, initialise=10, step=40)
    found = second.totals(70)
    assert found["starts"] == 2
    assert found["seconds"] == {
        "initialise": 20, "compile": 30, "data": 0, "step": 140, "checkpoint": 0, "evaluate": 0, "lost": 42
    }  # fmt: skip
    assert goodput.summary(found).startswith("goodput: 60.3% of 232 s in 2 starts went into steps; lost 18.1%, compile")


def test_a_preempted_run_loses_nothing(clock, tmp_path):
    first = goodput.Ledger(tmp_path)
    spend(first, clock, step=100)
    saved = first.totals(50)
    spend(first, clock, checkpoint=5)
    first.write(50)
    second = goodput.Ledger(tmp_path)
    second.resume(50, saved)
    assert second.totals(50)["seconds"] == first.totals(50)["seconds"]
    assert second.seconds["lost"] == 0


def test_before_the_first_checkpoint_all_is_lost(clock, tmp_path):
    first = goodput.Ledger(tmp_path)
    spend(first, clock, initialise=10, step=5)
    first.write(3)
    second = goodput.Ledger(tmp_path)
    second.resume(0, None)
    assert second.seconds["lost"] == 15
    assert second.seconds["step"] == 0


@pytest.mark.parametrize("text", ["", "[]", '{"step": 3}', '{"step": 1, "starts": 1, "seconds": {"step": "much"}}'])
def test_a_file_that_cannot_be_read_counts_as_none(tmp_path, text):
    (tmp_path / goodput.FILE).write_text(text)
    assert goodput.read(tmp_path / goodput.FILE) is None
    goodput.Ledger(tmp_path).resume(3, None)


def test_a_folder_that_cannot_be_written_is_told(tmp_path):
    with pytest.raises(UserError, match=r"goodput.json.* cannot be written"):
        goodput.Ledger(tmp_path / "none").write(1)


def test_a_run_accounts_for_its_time(tmp_path, config, first, monkeypatch):
    """The loop itself: killed between two checkpoints and started again."""
    import jax

    from skyjax.train import loop

    class Killed(Exception):
        pass

    killed_at = [6]

    def step(state, batch):
        if int(state["step"]) == killed_at[0]:
            raise Killed
        time.sleep(0.05)
        names = ("loss", "rank/fused", "spread/fused", "skipped", "nonfinite_in_a_row")
        optimizer = jax.tree.map(lambda x: x + 1 if x.ndim == 0 else x, state["optimizer"])
        return {**state, "step": state["step"] + 1, "optimizer": optimizer}, dict.fromkeys(names, 0.0)

    monkeypatch.setattr(loop, "jit_step", lambda *_: step)
    monkeypatch.setattr(loop.states, "create", lambda *_: first)
    short = config.copy_and_resolve_references()
    short.steps, short.checkpoint.every = 8, 4
    began = time.monotonic()
    with pytest.raises(Killed):
        loop.train(short, tmp_path)
    killed_at[0] = 99
    assert loop.train(short, tmp_path) == 0
    wall = time.monotonic() - began
    found = json.loads((tmp_path / goodput.FILE).read_text())
    seconds = found["seconds"]
    assert (found["step"], found["starts"]) == (8, 2)
    assert seconds["lost"] >= 0.1  # steps 5 and 6
    assert seconds["step"] >= 0.3  # the others, but the two first, which count as compilation
    assert seconds["compile"] >= 0.1
    assert seconds["checkpoint"] > 0
    assert seconds["initialise"] > 0
    assert 0.8 * wall < sum(seconds.values()) <= wall
