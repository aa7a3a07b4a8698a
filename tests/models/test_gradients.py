"""Gradients of a random linear functional of each part's outputs, against PyTorch's autograd in float64."""

import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import parity
import pytest
from quick import quick_jit

CASES = pathlib.Path(__file__).parent / "cases"
NAMES = sorted(path.parent.name for path in CASES.glob("*/exact.npz"))


@functools.cache
def gradients(name):
    """Ours and PyTorch's, of inputs and of all weights under their published names."""
    case = parity.load_case(CASES / name)
    exact = dict(np.load(CASES / name / "exact.npz"))
    part = parity.build(case)

    def functional(params, inputs):
        return sum(
            jnp.sum(exact[f"factors.{output}"] * got)
            for source, x in inputs.items()
            for output, got in zip(parity.output_names(case, source), part.call(params, x), strict=True)
        )

    of_params, of_inputs = quick_jit(jax.grad(functional, argnums=(0, 1)))(part.params, case.inputs)
    ours = {f"weights.{key}": x for key, x in part.released(of_params).items()}
    ours |= {f"inputs.{key}": np.asarray(x) for key, x in of_inputs.items()}
    return ours, {key: x for key, x in exact.items() if key.startswith(("inputs.", "weights."))}


@pytest.mark.parametrize("name", NAMES)
def test_gradients_are_pytorchs(name):
    ours, theirs = gradients(name)
    assert ours.keys() == theirs.keys()
    # Array by array and without a floor: none is all but 0, so that each has to agree by itself.
    assert min(np.abs(x).max() for x in theirs.values()) > 1e-3 * max(np.abs(x).max() for x in theirs.values())
    errors = {key: parity.error(ours[key], x) for key, x in theirs.items()}
    assert max(errors.values()) <= 1e-4, sorted(errors, key=errors.get)[-5:]


def test_a_scale_over_the_limit_gets_no_gradient():
    for found in gradients("gradients_swin_v2"):
        below, over = found["weights.stages.1.blocks.0.attn.w_msa.logit_scale"].ravel()
        assert abs(below) > 1
        assert over == 0


def test_each_part_has_a_case():
    parts = {parity.load_case(CASES / name).part for name in NAMES}
    assert parts == set(parity.SIGNS)
