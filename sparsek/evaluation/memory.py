"""Errors for batches that memory does not hold."""

import contextlib
from collections.abc import Iterator

import jax

from sparsek.errors import RunError


@contextlib.contextmanager
def memory_that_holds(batch: str, advice: str) -> Iterator[None]:
  """Raises RunError where memory does not hold what the block computes.

  Args:
    batch: what it is, in words that name its flags.
    advice: what to do, after "lower".
  """
  try:
    yield
  except (MemoryError, jax.errors.JaxRuntimeError) as error:
    if isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" not in str(error):
      raise
    raise RunError(f"memory does not hold {batch}: lower {advice}") from error
