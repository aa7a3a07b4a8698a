"""Overrides of a config: a value that is taken, or a sentence; whatever is written behind --config."""

import contextlib
import pathlib

from fuzzing import TIMES, deadline, ends_well, fuzz
from hypothesis import example, given, settings
from hypothesis import strategies as st

from skyjax.config import keys, load_config
from skyjax.errors import UserError
from skyjax.input.loader import Loader

ROOT = pathlib.Path(__file__).parents[2]
CONFIG = ROOT / "configs" / "pretrain_sample.py"
KEYS = sorted(keys(load_config(CONFIG)))
few = settings(fuzz, max_examples=25 * TIMES)  # each traces a model

# What people mistype, and what they write on purpose.
likely = st.sampled_from(
    ["-1", "0", "1", "2", "3", "7", "64", "0.0", "0.5", "-1.0", "1e999", "nan", "None", "true", ""]
)
lists = st.sampled_from(
    ["()", "(0,)", "(1, 2)", "(0.2, 0.1)", "(2, 2, 2, 2)", "('a', 'b')", "(('a', 1.0),)", "(('a',),)"]
)
strange = st.one_of(
    st.sampled_from([str(2**31), str(2**62), "1" + "0" * 400, "9**9**9", "(" * 300, "-" * 5000 + "1", "\0", "\ud800"]),
    st.sampled_from(["__import__('os').system('false')", "{}", "{1: 2}", "((1, 2, 3),)", "(((),),)"]),
    st.text(max_size=12),
)
leaves = st.sampled_from([key for key in KEYS if not any(other.startswith(f"{key}.") for other in KEYS)])
change = st.tuples(leaves, st.one_of(likely, likely, lists, strange))
anything = st.tuples(st.one_of(st.sampled_from(KEYS), st.text(max_size=10)), strange)
overrides = st.lists(st.one_of(change, change, change, anything), min_size=1, max_size=2)


@fuzz
@given(overrides)
@example([("data.sources", "((" * 200)])
@example([("steps", "1" * 5000)])
def test_overrides_are_taken_or_refused(changes):
    with deadline(), contextlib.suppress(UserError):
        load_config(CONFIG, [f"{key}={text}" for key, text in changes])


@fuzz
@given(
    st.lists(change.filter(lambda pair: pair[0].startswith(("data.", "batch_size", "seed"))), min_size=1, max_size=3)
)
def test_the_loader_takes_or_refuses_them(sample_records, changes):
    """What it refuses, it refuses before training: a batch that is asked for comes."""
    source = f"data.sources=(({str(sample_records)!r}, 1.0),)"
    with deadline(), contextlib.suppress(UserError):
        config = load_config(CONFIG, [source, "data.threads=0", *(f"{key}={text}" for key, text in changes)])
        if max(config.batch_size, config.data.local_views.count, config.data.threads, config.data.prefetch) > 100:
            return  # large, and rightly so
        loader = Loader(config)
        next(loader)
        loader.close()


@few
@given(overrides)
def test_a_dry_run_takes_or_refuses_them(changes):
    ends_well(["train", f"--config={CONFIG}", "--dry-run", *(f"--config.{key}={text}" for key, text in changes)])
