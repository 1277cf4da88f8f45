"""Times thresholds and expiry, and the thresholds' VJP, part by part: `python -m experiments.time_operator [heads n k]`."""

import statistics
import sys
import time

import jax
import jax.numpy as jnp

from sparsek import causal


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


def main(heads=16, n=32768, k=512):
  scores = jax.random.normal(jax.random.key(0), (1, heads, n))
  start, end = jnp.zeros((1, n), jnp.int32), jnp.full((1, n), n, jnp.int32)
  per_head = lambda f: jax.vmap(jax.vmap(f))
  repeats = 20 if jax.default_backend() == "gpu" else 1
  report = lambda name, f, *args: print(f"{name:40s} {milliseconds(f, *args, repeats=repeats):9.3f} ms", flush=True)
  print(f"{heads} heads x {n} tokens, k = delay = {k}, {jax.devices()[0].device_kind}")

  whole = lambda scores, start, end: causal.select(scores, start, end, k, k, False)
  report("select", whole, scores, start, end)
  packed = lambda scores, start, end: causal.select(scores, start, end, k, k, True)
  report("select, packed", packed, scores, start, end)
  threshold, expiry, order = jax.jit(whole)(scores, start, end)
  _, vjp = jax.vjp(lambda scores: whole(scores, start, end)[0], scores)
  report("VJP of the thresholds", vjp, jnp.ones_like(threshold))

  key, order = jax.jit(per_head(lambda s: causal._sorted(s, start[0], False)))(scores)
  u, index = causal._score(key), jnp.arange(n, dtype=jnp.int32)
  rank = jnp.argsort(order, axis=-1).astype(jnp.int32)
  entry = jnp.where(order + k < n, order + k, causal.NEVER)
  newest = jnp.where(index >= k, jnp.take_along_axis(rank, jnp.broadcast_to(jnp.maximum(index - k, 0), rank.shape), -1), 0)
  report("  sort", per_head(lambda s: causal._sorted(s, start[0], False)), scores)
  report("  inverse of the order", per_head(lambda o: jnp.zeros(n, jnp.int32).at[o].set(index, unique_indices=True)), order)
  report("  one search of n in n", per_head(lambda a, b: causal._leading(lambda i, x: x <= a, n, b)), u, causal.minus_one(u))
  report("  running maximum", per_head(lambda a: causal._running(jnp.max, jnp.maximum, -jnp.inf, a)), scores)
  ranks = lambda e, r: causal._cuts(e, jnp.ones((1, n), jnp.int32), jnp.where(index >= k, r, -1)[None], lambda sums, position: sums[0] >= k)
  report("  cuts among ranks", per_head(ranks), entry, newest)
  report("  thresholds", per_head(lambda u, e, r: causal._thresholds(u, e, r, index >= k, start[0], end[0], k)), u, entry, newest)


if __name__ == "__main__":
  main(*map(int, sys.argv[1:]))
