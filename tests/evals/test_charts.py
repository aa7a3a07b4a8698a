import math
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.testing import assert_allclose

from skyjax.evals.charts import (
    MAX_POINTS,
    Mark,
    Series,
    confusion_matrix,
    interval,
    line_chart,
    log_ticks,
    short,
    smooth,
    ticks,
)


def series(values, steps=None, name="fused"):
    values = np.asarray(values, float)
    return Series(name, "s-fused", np.asarray(steps if steps is not None else np.arange(len(values)), float), values)


def paths(svg, kind):
    """The points of each path of a class, as lists of (x, y)."""
    found = re.findall(rf'class="{kind} [^"]*" d="([^"]*)"', svg)
    return [[tuple(map(float, point.split())) for point in re.split("[ML]", data) if point] for data in found]


def test_a_line_goes_through_its_points():
    # The plot is 200 wide from x = 48 and 100 high from y = 10 down to 110; values 0 to 10 fill it.
    svg = line_chart([series([0, 5, 10], steps=[0, 50, 100])], label="known", size=(258, 136))
    assert paths(svg, "raw") == [[(48, 110), (148, 60), (248, 10)]]


def test_a_logarithmic_line_is_straight_for_powers():
    svg = line_chart([series([1, 10, 100, 0], steps=[0, 50, 100, 100])], label="log", size=(258, 136), log=True)
    assert paths(svg, "raw") == [[(48, 110), (148, 60), (248, 10)]]


def test_a_value_that_is_not_finite_breaks_the_line():
    svg = line_chart([series([0, math.nan, 10, 10], steps=[0, 25, 50, 100])], label="gap", size=(258, 136))
    assert re.search(r'class="raw [^"]*" d="M48.0 110.0M148.0 10.0L248.0 10.0"', svg)


def test_one_point_is_a_dot():
    svg = line_chart([series([3.0], steps=[7])], label="one", size=(258, 136))
    assert '<circle class="point s-fused" cx="248.0"' in svg


def test_marks_stand_at_their_steps_and_references_widen_the_axis():
    marks = [Mark(50, "skipped", "two & more"), Mark(500, "skipped", "beyond the axis")]
    svg = line_chart(
        [series([10, 20], steps=[0, 100])],
        label="x",
        size=(258, 136),
        from_zero=True,
        references=[(40, "a<b")],
        marks=marks,
    )
    assert 'd="M148.0 101l5 9h-10z"' in svg
    assert "two &amp; more" in svg
    assert "beyond" not in svg
    assert "a&lt;b" in svg
    assert paths(svg, "raw") == [[(48, 85), (248, 60)]]


def test_hover_titles_tell_all_values_of_a_step():
    svg = line_chart([series([1, 2], name="a"), series([3, 4], name="b")], label="two")
    assert "step 1\na 2\nb 4</title>" in svg


def test_smoothing_fits_a_line_to_each_window():
    rng = np.random.default_rng(0)
    values = rng.normal(size=200)
    got = smooth(values)
    for i in (0, 3, 100, 199):
        window = np.arange(max(i - 5, 0), min(i + 6, 200))
        want = np.polyval(np.polyfit(window, values[window], 1), i)
        assert_allclose(got[i], want, atol=1e-9)


def test_smoothing_leaves_lines_and_gaps_alone():
    values = 3 - 0.5 * np.arange(120.0)
    values[17] = np.nan
    assert_allclose(smooth(values), values, atol=1e-9)


@given(st.floats(-1e6, 1e6), st.floats(1e-2, 1e6))
def test_ticks_enclose_at_equal_steps(low, extent):
    marks = ticks(low, low + extent)
    step = marks[1] - marks[0]
    assert marks[0] <= low + 1e-6 * step
    assert marks[-1] >= low + extent - 1e-6 * step
    assert_allclose(np.diff(marks), step, rtol=1e-5, atol=1e-11)
    assert 2 <= len(marks) <= 7


@given(st.floats(1e-9, 1e9), st.floats(1, 1e6))
def test_log_ticks_enclose(low, ratio):
    marks = log_ticks(low, low * ratio)
    assert marks[0] <= low * 1.000001
    assert marks[-1] >= low * ratio * 0.999999
    assert marks == sorted(marks)
    assert len(marks) >= 2


def test_ticks_that_are_close_have_digits_enough_to_differ():
    svg = line_chart([series([0.99001, 0.99009])], label="momentum")
    texts = re.findall(r'text-anchor="end">(0\.99[^<]*)<', svg)
    assert texts == ["0.99", "0.99002", "0.99004", "0.99006", "0.99008", "0.9901"]


def test_ticks_of_steps_are_whole_numbers():
    assert ticks(0, 24, 5, whole=True) == [0, 5, 10, 15, 20, 25]
    assert ticks(0, 24, 10, whole=True) == [0, 5, 10, 15, 20, 25]
    assert ticks(0, 2, 5, whole=True) == [0, 1, 2]


def test_equal_values_still_have_an_axis():
    for value in (0.0, 5.0, -2.0):
        marks = ticks(value, value)
        assert marks[0] < value < marks[-1]


def test_a_long_line_is_thinned_but_keeps_its_spikes():
    values = np.zeros(50_000)
    values[31_234] = 9.0
    values[2_000] = -4.0
    svg = line_chart([series(values)], label="long", size=(258, 136))
    (points,) = paths(svg, "raw")
    assert len(points) <= MAX_POINTS + 2
    heights = [y for _, y in points]
    plain = max(set(heights), key=heights.count)
    assert min(heights) < plain < max(heights)


def test_an_interval_lies_where_its_axis_says():
    svg = interval(75, 70, 80, [50, 75, 100], colour="ours", title="<x>", best=60)
    assert 'x1="40.00%" x2="60.00%"' in svg
    assert 'cx="50.00%"' in svg
    assert 'class="beat" x1="20.00%"' in svg
    assert "&lt;x&gt;" in svg


def test_a_confusion_matrix_has_a_cell_for_each_pair():
    svg = confusion_matrix(np.array([[8, 2], [0, 0]]), ["cat", "<dog>"])
    assert svg.count('class="cell') == 4
    assert "cat called &lt;dog&gt;: 2 (20.0 %)" in svg
    assert 'fill-opacity="0.89"' in svg  # the square root of 0.8


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0"),
        (1234.5, "1234"),
        (12_000, "12k"),
        (2.5e6, "2.5M"),
        (0.00025, "2.5e−4"),
        (-3.5, "−3.5"),
        (math.nan, "–"),
    ],
)
def test_short_numbers(value, text):
    assert short(value) == text
