"""Shared by the tests of the model."""

import functools

import jax

# Compiles twice as fast; the programs of these tests run for milliseconds.
quick_jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True})
