"""Settings of the whole test suite."""

import os

# Tests compile hundreds of small functions once each: optimising them costs more than running them. Inherited by the processes that tests start.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")

import jax  # noqa: E402
import pytest  # noqa: E402


def pytest_collection_modifyitems(items):
  if jax.default_backend() == "gpu":
    return
  for item in items:
    if item.get_closest_marker("gpu"):
      item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU; JAX sees none here"))
