"""The compiled step of two small configs sends what was agreed on, and a mistake in it shows."""

import difflib

import golden_collectives
import mistakes
import pytest

pytest.importorskip("libtpu")


def difference(name, found):
    path = golden_collectives.file(name)
    accepted = path.read_text()
    if f"libtpu {golden_collectives.version()}." not in accepted:
        pytest.skip("written with another libtpu, whose programs differ: `make goldens`, and look at the difference")
    lines = (text.splitlines(keepends=True) for text in (accepted, found))
    return "".join(difflib.unified_diff(*lines, f"{path.name}, accepted", "now"))


@pytest.mark.parametrize("name", golden_collectives.SMALL)
def test_a_step_sends_what_was_agreed(name):
    found = difference(name, golden_collectives.compiled(golden_collectives.SMALL[name]))
    assert not found, f"chips send something else; if that is meant, `make goldens` accepts it\n{found}"


@pytest.mark.slow
@pytest.mark.parametrize("lower", [mistakes.on_every_chip, mistakes.gathering_loss])
def test_a_mistake_shows(lower):
    found = difference("sequences", golden_collectives.compiled(golden_collectives.SMALL["sequences"], lower))
    assert "+all-gather" in found or "+all-reduce" in found


def test_full_size_is_written_down():
    """The files of cases that are not compiled here are there, each of its own topology."""
    for name, case in golden_collectives.FULL.items():
        assert golden_collectives.file(name).read_text().startswith(case.topology), name
    names = {path.stem for path in golden_collectives.FOLDER.glob("*.txt")}
    assert names == {*golden_collectives.SMALL, *golden_collectives.FULL}
