"""What the fuzz tests share: every call ends in time, and well: it works, or it is one sentence and exit 2."""

import contextlib
import io
import logging
import os
import signal

from hypothesis import HealthCheck, Phase, settings

from skyjax.cli import main

SECONDS = 20  # for one call; what takes longer hangs

# One seed for all runs, so that a failure can be seen again; FUZZ=10 draws ten times as many, other ones each time.
TIMES = int(os.environ.get("FUZZ", "1"))
fuzz = settings(
    derandomize=TIMES == 1,
    max_examples=40 * TIMES,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    database=None,
    phases=(Phase.explicit, Phase.generate),  # to make a failing example small takes minutes where one takes a second
)


@contextlib.contextmanager
def deadline(seconds=SECONDS):
    """Fails what runs longer, in Python or in a library that looks for signals now and then."""

    def too_long(*_):
        raise AssertionError(f"it did not end within {seconds} s")

    before = signal.signal(signal.SIGALRM, too_long)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def ends_well(words):
    """Runs the command: exit 0, or exit 2 and one sentence. An exception of any kind fails the test that calls.

    Returns:
      The exit code and what stood on stderr.
    """
    out, errors = io.StringIO(), io.StringIO()
    logging.disable(logging.WARNING)  # bad records are told one by one
    try:
        with deadline(), contextlib.redirect_stdout(out), contextlib.redirect_stderr(errors):
            code = main([str(word) for word in words])
    finally:
        logging.disable(logging.NOTSET)
    told = [line for line in errors.getvalue().splitlines() if line.startswith("skyjax: ")]
    assert code in (0, 2), (code, errors.getvalue())
    assert len(told) == (code == 2), errors.getvalue()
    assert "Traceback" not in errors.getvalue()
    assert len(errors.getvalue()) < 4000
    return code, errors.getvalue()
