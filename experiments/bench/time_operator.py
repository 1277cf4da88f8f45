"""Timing of thresholds and expiry, and of the thresholds' VJP.

  python -m experiments.bench.time_operator [HEADS N K]

It prints milliseconds a call.
"""

import argparse
import functools
import statistics
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp

from sparsek.attention import prefix_selection
from sparsek.experiments import script
from sparsek.kernels import devices


def milliseconds(f: Callable, *args: jax.Array, repeats: int = 20) -> float:
  """Returns the median of five samples of a call of the jitted function."""
  f = jax.jit(f)
  jax.block_until_ready(f(*args))
  times = []
  for _ in range(5):
    start = time.perf_counter()
    for _ in range(repeats):
      out = f(*args)
    jax.block_until_ready(out)
    times.append((time.perf_counter() - start) / repeats * 1e3)
  return statistics.median(times)


def main(options: argparse.Namespace) -> None:
  """Prints a line for each function."""
  heads, n, k = options.heads, options.n, options.k
  scores = jax.random.normal(jax.random.key(0), (1, heads, n))
  start, end = jnp.zeros((1, n), jnp.int32), jnp.full((1, n), n, jnp.int32)
  repeats = 20 if jax.default_backend() == "gpu" else 1

  def report(name, f, *args):
    print(f"{name:40s} {milliseconds(f, *args, repeats=repeats):9.3f} ms", flush=True)

  print(f"{heads} heads x {n} tokens, k = delay = {k}, {jax.devices()[0].device_kind}")

  kernels = devices.can_run_portable()

  def select(packed, scores, start, end):
    return prefix_selection.select(scores, start, end, k, k, packed, kernels)

  for packed in (False, True):
    name = f"thresholds and expiry{', packed' * packed}"
    report(name, functools.partial(select, packed), scores, start, end)
  threshold = jax.jit(functools.partial(select, True))(scores, start, end)[0]

  def backward(cotangent):
    residuals = (scores, threshold, end)
    return prefix_selection.select_backward(k, k, False, kernels, residuals, (cotangent,))[0]

  report("VJP of the thresholds", backward, jnp.ones_like(threshold))


def make_parser() -> argparse.ArgumentParser:
  """Returns the parser of the script's arguments."""
  parser = script.parser(__doc__)
  for name, default in (("heads", 16), ("n", 32768), ("k", 512)):
    parser.add_argument(name, nargs="?", type=int, default=default)
  return parser


if __name__ == "__main__":
  script.run(main, make_parser())
