"""Times thresholds and expiry, and the thresholds' VJP: `python -m experiments.bench.time_operator
[heads n k]`.
"""

import statistics
import time

import jax
import jax.numpy as jnp

from experiments import script
from sparsek.attention import prefix_selection
from sparsek.kernels import devices


def milliseconds(f, *args, repeats=20):
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


def main(options):
  heads, n, k = options.heads, options.n, options.k
  scores = jax.random.normal(jax.random.key(0), (1, heads, n))
  start, end = jnp.zeros((1, n), jnp.int32), jnp.full((1, n), n, jnp.int32)
  repeats = 20 if jax.default_backend() == "gpu" else 1
  report = lambda name, f, *args: print(
    f"{name:40s} {milliseconds(f, *args, repeats=repeats):9.3f} ms", flush=True
  )
  print(f"{heads} heads x {n} tokens, k = delay = {k}, {jax.devices()[0].device_kind}")

  kernels = devices.can_run()
  for packed in (False, True):
    select = lambda scores, start, end: prefix_selection.select(
      scores, start, end, k, k, packed, kernels
    )
    report(f"thresholds and expiry{', packed' * packed}", select, scores, start, end)
  threshold = jax.jit(select)(scores, start, end)[0]
  report(
    "VJP of the thresholds",
    lambda x: prefix_selection.select_backward(
      k, k, False, kernels, (scores, threshold, end), (x,)
    )[0],
    jnp.ones_like(threshold),
  )


def make_parser():
  """Returns the parser of the script's arguments."""
  parser = script.parser(__doc__)
  for name, default in (("heads", 16), ("n", 32768), ("k", 512)):
    parser.add_argument(name, nargs="?", type=int, default=default)
  return parser


if __name__ == "__main__":
  script.run(main, make_parser())
