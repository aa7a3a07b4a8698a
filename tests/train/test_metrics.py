"""What a run writes down: each step once, on the disk, and readable by others."""

import io
import json
import subprocess
import sys

import numpy as np
import pytest
from rich.console import Console
from tbparse import SummaryReader

from skyjax.errors import UserError
from skyjax.train import metrics


def lines(workdir):
    return [json.loads(line) for line in (workdir / metrics.FILE).read_text().splitlines()]


def write(workdir, start, steps):
    with metrics.MetricsFiles(workdir, start) as files:
        for step in steps:
            files.write(step, {"loss": step / 2, "rank/fused": float("nan")})
        files.flush()


def test_lines_beyond_the_restored_step_are_dropped(tmp_path):
    write(tmp_path, 0, [2, 4, 6, 8])
    write(tmp_path, 5, [6, 8, 10])
    assert [line["step"] for line in lines(tmp_path)] == [2, 4, 6, 8, 10]
    assert lines(tmp_path)[2] == {"step": 6, "loss": 3.0, "rank/fused": None}


def test_no_start_loads_torch(tmp_path):
    """Where it is installed, as here, TensorBoard's writer would."""
    code = """
import pathlib, sys
from skyjax.train import loop, metrics
metrics.MetricsFiles(pathlib.Path(sys.argv[1]), 0)
print("torch" in sys.modules)
import torch
"""
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


def test_a_line_cut_by_a_crash_is_dropped(tmp_path):
    write(tmp_path, 0, [1, 2])
    with (tmp_path / metrics.FILE).open("a") as file:
        file.write('{"step": 3, "lo')
    assert [line["step"] for line in metrics.read(tmp_path / metrics.FILE)] == [1, 2]
    write(tmp_path, 3, [4])
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 4]


def test_flush_puts_lines_on_the_disk_before_it_returns(tmp_path):
    files = metrics.MetricsFiles(tmp_path, 0)
    files.write(1, {"loss": 1.0})
    files.flush()
    assert len(lines(tmp_path)) == 1  # read by another handle while the writer is open
    files.close()


def test_tensorboard_has_the_same_numbers(tmp_path):
    write(tmp_path, 0, [1, 2, 3])
    write(tmp_path, 2, [3, 4])
    scalars = SummaryReader(str(tmp_path / "tensorboard")).scalars
    loss = scalars[scalars.tag == "loss"].drop_duplicates("step", keep="last")
    assert dict(zip(loss.step, loss.value, strict=True)) == {1: 0.5, 2: 1.0, 3: 1.5, 4: 2.0}
    assert "rank/fused" not in set(scalars.tag)


def test_a_full_disk_is_told(tmp_path):
    files = metrics.MetricsFiles(tmp_path, 0)
    files._file.close()
    files._file = open("/dev/full", "w")  # noqa: SIM115  # closed by the files
    files.write(1, {"loss": 1.0})
    with pytest.raises(UserError, match=r"No space left on device; free space or choose another --workdir"):
        files.flush()


def test_a_folder_that_cannot_be_written_is_told(tmp_path):
    (tmp_path / metrics.FILE).mkdir()
    with pytest.raises(UserError, match="cannot be written"):
        metrics.MetricsFiles(tmp_path, 0)


def test_clock_counts_all_starts_and_leaves_compilation_out_of_the_speed(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(metrics.time, "monotonic", lambda: now[0])
    clock = metrics.Clock(7.0)
    now[0] += 30  # compiling
    clock.mark(1)
    assert np.isnan(clock.steps_per_second(1))
    now[0] += 2
    clock.mark(5)
    assert clock.steps_per_second(5) == pytest.approx(2.0)
    assert clock.seconds == pytest.approx(39.0)


@pytest.mark.parametrize("is_terminal", [True, False])
def test_progress_shows_loss_speed_and_time_left(is_terminal):
    text = io.StringIO()
    console = Console(file=text, force_terminal=is_terminal, width=120)
    with metrics.ProgressLine(100, 10, console) as progress:
        progress.step(20)
        progress.log(20, 3.25, 0.5, 8)
    for part in ("loss 3.2500", "4.0 samples/s", "20/100", "ETA"):
        assert part in text.getvalue()
    if not is_terminal:
        assert text.getvalue().splitlines() == ["step 20/100  loss 3.2500  4.0 samples/s  ETA 0:02:40"]


def test_due():
    assert [step for step in range(7) if metrics.is_due(3, step)] == [3, 6]
    assert not any(metrics.is_due(0, step) for step in range(7))
