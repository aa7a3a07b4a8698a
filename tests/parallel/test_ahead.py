"""A program compiled in another process: what its plan says against the compiler's own analysis."""

import ahead_programs as programs
import pytest

from skyjax.errors import UserError
from skyjax.parallel.ahead import CompilerError, compile_ahead, read_allocations

pytest.importorskip("libtpu")


def test_the_plan_is_the_program_that_is_compiled():
    said = []
    plan = compile_ahead(programs.sized, (1,), say=said.append)
    whole = compile_ahead(programs.sized, (1,), code=True, say=said.append)
    assert plan.code_bytes is None
    assert (plan.argument_bytes, plan.temporary_bytes) == (whole.argument_bytes, whole.temporary_bytes)
    assert plan.text == whole.text
    # (1024, 1024) over fsdp=2 and (512, 1024) over all four, float32.
    assert plan.argument_bytes == 4 * (programs.WIDTH**2 // 2 + programs.ROWS * programs.WIDTH // 4)
    assert whole.live_bytes >= whole.argument_bytes
    assert whole.code_bytes > 0
    assert any("traced" in words for words in said)


def test_what_does_not_fit_is_planned_all_the_same():
    plan = compile_ahead(programs.sized, (16_000,), say=lambda _: None)
    assert plan.argument_bytes + plan.temporary_bytes > 15.75 * 2**30


def test_refusals_and_deaths_are_told():
    with pytest.raises(UserError, match="this cannot be lowered"):
        compile_ahead(programs.refused, (), say=lambda _: None)
    with pytest.raises(CompilerError, match="ended from outside"):
        compile_ahead(programs.killed, (), say=lambda _: None)


def test_allocations_of_other_memories_and_of_fusions_do_not_count():
    text = """BufferAssignment:
allocation 0: size 100, parameter 0, shape |f32[25]| at ShapeIndex {}, maybe-live-out:
allocation 1: size 7, constant:
allocation 2: size 512, thread-local:
allocation 3: size 40, color 1, preallocated-temp:
allocation 4: size 1000, preallocated-temp:
allocation 5: size 64, output shape is |(f32[1])|, maybe-live-out:
"""
    assert read_allocations(text) == (100, 1071)
