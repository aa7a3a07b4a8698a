"""`--profile=2:3`: a trace of whole steps, and of these alone."""

import jax
import jax.numpy as jnp
import pytest

from skyjax.errors import UserError
from skyjax.train import profiling


@pytest.mark.parametrize("text", ["100", "7:5", "0:3", "5:31", "a:b", "-1:4", "3:4:5", ""])
def test_what_is_no_window_is_refused(text):
    with pytest.raises(UserError, match="--profile"):
        profiling.parse_window(text, 30)


def test_a_window_has_both_ends():
    assert profiling.parse_window("5:30", 30) == (5, 30)
    assert profiling.parse_window("5:5", 30) == (5, 5)


@pytest.mark.parametrize(("window", "steps", "traced"), [((2, 3), 6, [2, 3]), ((4, 6), 5, [4, 5])])
def test_the_trace_holds_the_steps_of_the_window(tmp_path, window, steps, traced):
    """A run that ends within the window keeps what it has."""
    step = jax.jit(lambda x: jnp.tanh(x) + 1)
    state = step(jnp.ones(8))
    with profiling.Profiler(window, tmp_path) as profiler:
        for number in range(1, steps + 1):
            with profiler.step(number, state):
                state = step(state)
    (path,) = (tmp_path / profiling.FOLDER).rglob("*.xplane.pb")
    found = set()
    for plane in jax.profiler.ProfileData.from_file(str(path)).planes:
        for line in plane.lines:
            for event in line.events:
                found |= {value for name, value in event.stats if event.name == "train" and name == "step_num"}
    assert sorted(found) == traced


def test_without_a_window_nothing_is_written(tmp_path):
    with profiling.Profiler(None, tmp_path) as profiler, profiler.step(1, jnp.ones(1)):
        pass
    assert not list(tmp_path.iterdir())
