"""Shared by several tests."""

import functools

import jax
import pytest

from sparsek import flags

# Compiles twice as fast; the programs of these tests run for milliseconds.
quick_jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True})


def run_command(main, flag_values, *arguments):
  """Runs a script's main in this process, under its flags; returns the exit code."""
  for name in flag_values:
    flag_values[name].unparse()
  with pytest.raises(SystemExit) as exit_:
    flags.run(main, flag_values, [main.__module__, *arguments])
  return exit_.value.code
