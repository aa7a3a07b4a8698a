"""Compilation without optimisation: it is most of these tests' time, and what they check doesn't hang on fast code."""

import jax


def quick_jit(function):
    return jax.jit(function, compiler_options={"xla_backend_optimization_level": 0})
