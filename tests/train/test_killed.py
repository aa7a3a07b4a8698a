"""SIGKILL at any moment: started again, a run ends with the state and the metrics of one that nobody touched."""

import dataclasses
import os
import random
import signal
import time

import pytest
from changed import changed
from real_runs import RealRun, final_state, lines, weight

from skyjax.train import checkpoint, loop


@pytest.fixture(scope="module")
def often(config):
    """A checkpoint every 4 steps, an evaluation every 6."""
    return changed(config, checkpoint__every=4, eval__every=6)


@pytest.fixture(scope="module")
def undisturbed(often, undisturbed_run):
    """The run that nobody touched. It has compiled the step, so that it lies in the cache."""
    return undisturbed_run(often, evaluators=[lambda state, step, stop: weight(state)])


@dataclasses.dataclass
class Moment:
    """Where a run is to be killed: some time after it has come to a phase.

    Attributes:
      phase: of a run's life.
      seconds: after that began.
      steps: that it may take before.
    """

    phase: str
    seconds: float = 0.0
    steps: int = 0

    def come(self, run):
        """Waits for the moment; False where the run ended before. And whether it was met, to be asked afterwards."""
        newest = max([0, *checkpoint.steps(run.folder)])
        conditions = {
            "start-up": (lambda: True, lambda: not run.started()),
            "compile": (run.started, lambda: not run.logged()),
            "mid-step": (lambda: run.logged() > newest + self.steps, lambda: True),
            "mid-save": (lambda: any(step > newest + self.steps for step in run.saving()), run.saving),
            "mid-evaluation": (run.evaluating, run.evaluating),
        }
        begun, met = conditions[self.phase]
        if not run.until(begun):
            return None
        time.sleep(self.seconds)
        return met


def assert_equals_undisturbed(workdir, undisturbed, config, assert_same_bits):
    assert lines(workdir) == lines(undisturbed)
    assert_same_bits(final_state(workdir, config), final_state(undisturbed, config))


def test_killed_once_in_each_phase(often, undisturbed, compile_cache, tmp_path, assert_same_bits):
    """One run, killed six times on its way."""
    workdir = tmp_path / "run"
    moments = [
        Moment("start-up", 0.5),
        Moment("compile", 0.3),
        Moment("mid-step", 0.02),
        Moment("mid-save"),
        Moment("mid-evaluation", 0.2),
        Moment("mid-save", steps=8),
    ]
    killed = []
    for moment in moments:
        for _ in range(3):  # a save may be over before the signal comes
            run = RealRun(often, workdir, compile_cache)
            met = moment.come(run)
            assert met, f"{moment}: {run.log.read_text()[-3000:]}"
            run.kill()
            if met():
                killed.append(moment)
                break
    assert killed == moments
    newest = checkpoint.steps(workdir / checkpoint.FOLDER)[-1]
    assert 8 <= newest < often.steps  # there is something left to do, and much was done
    run = RealRun(often, workdir, compile_cache)
    assert run.wait() == 0, run.log.read_text()[-3000:]
    assert not run.saving()
    assert_equals_undisturbed(workdir, undisturbed, often, assert_same_bits)


def test_an_evaluation_that_was_broken_off_is_made_up_for(often, undisturbed, quick, tmp_path, assert_same_bits):
    """Its numbers join the line that the first start wrote."""

    def preempted(state, step, stop):
        if step == 12:
            os.kill(os.getpid(), signal.SIGTERM)
            while not stop():
                time.sleep(0.01)
            return {}
        return weight(state)

    assert loop.train(often, tmp_path, evaluators=[preempted]) == 75
    assert checkpoint.steps(tmp_path / checkpoint.FOLDER)[-1] == 12
    assert loop.train(often, tmp_path, evaluators=[lambda state, step, stop: weight(state)]) == 0
    assert_equals_undisturbed(tmp_path, undisturbed, often, assert_same_bits)
    assert [line["step"] for line in lines(tmp_path) if "weight" in line] == [6, 12, 18, 24, 30]


@pytest.mark.slow
def test_killed_at_fifty_random_moments(often, undisturbed, compile_cache, tmp_path, assert_same_bits):
    """A run that ends before its moment is compared, and another begun."""
    rng = random.Random(20)
    number, killed, finished = 0, {}, 0
    phases = ["start-up", "compile", "mid-step", "mid-save", "mid-evaluation"]
    workdir = tmp_path / "0"
    while sum(killed.values()) < 50 or not finished:
        phase = phases[number % 5] if sum(killed.values()) < 50 else "to the end"
        longest = {"start-up": 3, "compile": 6, "mid-step": 0.3, "mid-save": 0.05, "mid-evaluation": 0.4}.get(phase, 0)
        moment = Moment(phase, rng.uniform(0, longest), rng.randrange(6))
        number += 1
        print(f"start {number}: {moment} of {workdir.name}")  # shown when it fails
        run = RealRun(often, workdir, compile_cache)
        met = moment.come(run) if phase != "to the end" else None
        if met:
            run.kill()
            where = phase if met() else "other"
            killed[where] = killed.get(where, 0) + 1
            continue
        assert run.wait() == 0, run.log.read_text()[-3000:]
        assert_equals_undisturbed(workdir, undisturbed, often, assert_same_bits)
        finished += 1
        workdir = tmp_path / f"{finished}"
    print(killed, finished)
    assert {phase for phase in phases if killed.get(phase, 0) >= 4} == set(phases)
