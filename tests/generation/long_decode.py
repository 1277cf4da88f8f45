"""Decoding and chunked prefill against the parallel forward at a length that tests cannot wait for,
on the CPU:

  python -m tests.generation.long_decode --record=experiments/results/long_decode.json

Feeds the same random tokens to a small model in three ways: in parallel, in chunks, and one by one;
exit code 1 if the logits differ. The three select by the same rule, but scores that differ in their
last digit may swap two tokens of nearly equal score at the edge of a selection; so the distribution
of differences is told, not only the largest.
"""

import argparse
import functools
import json
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np

from sparsek.config import GATES, SCORERS, TransformerConfig
from sparsek.generation.cache import cache_bytes, decode_step, init_cache, lost_scores, prefill
from sparsek.generation.inference import inference_params
from sparsek.model.transformer import Transformer, hidden_to_logits, init_params
from sparsek.runs import run_directory

PARTS = 8  # of the length, told apart: differences must not grow with it
ALLOWED = 1e-2  # of the standard deviation of the logits, for all but a thousandth of the tokens


def main():
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--length", type=int, default=131072, help="tokens")
  parser.add_argument("--chunk", type=int, default=8192, help="tokens of a chunk")
  parser.add_argument("--gate", choices=GATES, default="straight_through")
  parser.add_argument("--scorer", choices=SCORERS, default="linear")
  parser.add_argument("--record", help="also write the figures to this .json file")
  options = parser.parse_args()
  n, chunk = options.length, options.chunk
  config = TransformerConfig(
    vocab_size=64,
    num_layers=2,
    embed_dim=32,
    num_heads=2,
    num_kv_heads=1,
    head_dim=16,
    mlp_dim=64,
    k=64,
    window=64,
    gate=options.gate,
    scorer=options.scorer,
    implementation="xla",
  )
  params = init_params(config, jax.random.key(0))
  params["embed"]["embedding"] *= 30  # logits that move with every change of the hidden state
  tokens, fast = (
    jax.random.randint(jax.random.key(1), (1, n), 0, config.vocab_size),
    inference_params(config, params),
  )
  seconds = {}

  def timed(name, function):
    begin = time.perf_counter()
    found = jax.block_until_ready(function())
    seconds[name] = round(time.perf_counter() - begin, 1)
    print(f"{name}: {seconds[name]} s", flush=True)
    return found

  hidden = timed(
    "parallel",
    lambda: jax.jit(functools.partial(Transformer(config).apply, method="hidden"))(
      {"params": params}, tokens
    ),
  )
  truth = np.asarray(hidden_to_logits(hidden, fast.embedding.T)[0])
  in_chunks, cache = timed(
    "chunks", lambda: prefill(config, fast, init_cache(config, 1), tokens, chunk_size=chunk)
  )

  @jax.jit
  def one_by_one(cache):
    def step(cache, token):
      out, cache = decode_step(config, fast, cache, token[None])
      return cache, out[0]

    return jax.lax.scan(step, cache, tokens[0])

  last, decoded = timed("one by one", lambda: one_by_one(init_cache(config, 1)))
  spread = float(truth.std())
  found = {}
  for name, other in (("chunks", np.asarray(in_chunks[0])), ("one by one", np.asarray(decoded))):
    error = np.abs(other - truth).max(axis=-1) / spread
    found[name] = {
      "median": float(np.median(error)),
      "99.9 %": float(np.quantile(error, 0.999)),
      "largest": float(error.max()),
      "share within 1e-5": float(np.mean(error < 1e-5)),
      "largest by eighths": [float(part.max()) for part in np.array_split(error, PARTS)],
    }
    print(name, {key: np.round(value, 8).tolist() for key, value in found[name].items()})
  record = {
    "options": vars(options),
    "versions": run_directory.versions(),
    "seconds": seconds,
    "cache_bytes": cache_bytes(cache),
    "lost_scores": int(lost_scores(last)[0] + lost_scores(cache)[0]),
    "difference over standard deviation of logits": found,
    "same most probable token": {
      name: float(np.mean(x.argmax(-1) == truth.argmax(-1)))
      for name, x in (("chunks", np.asarray(in_chunks[0])), ("one by one", np.asarray(decoded)))
    },
  }
  print({key: record[key] for key in ("cache_bytes", "lost_scores", "same most probable token")})
  if options.record:
    with open(options.record, "w", encoding="utf-8") as file:
      json.dump(record, file, indent=1)
  if max(found[name]["99.9 %"] for name in found) > ALLOWED or not jnp.all(last.seen == n):
    sys.exit(f"decoding is not the parallel forward: {found}")


if __name__ == "__main__":
  main()
