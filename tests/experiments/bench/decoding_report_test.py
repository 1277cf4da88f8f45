"""The decode benchmark: what is timed, and what is said of it."""

import dataclasses
import sys

import jax
import numpy as np
import pytest

from sparsek.command_line.main import parse
from sparsek.config import TransformerConfig
from sparsek.experiments.bench import decoding as decoding_bench
from sparsek.experiments.bench import decoding_report, suites, transformers_decode
from sparsek.generation.cache import cache_bytes, decode_step, init_cache
from sparsek.generation.cached_attention import NOWHERE
from sparsek.model.transformer import init_params
from tests.experiments.evaluate_test import write_run

CONFIG = TransformerConfig(
  vocab_size=17,
  num_layers=1,
  embed_dim=8,
  num_heads=2,
  num_kv_heads=1,
  head_dim=4,
  mlp_dim=8,
  k=3,
  window=5,
  implementation="reference",
)


def row(n, batch_size=1, what="decode", **milliseconds):
  result = lambda ms: (
    {"failed": ms}
    if isinstance(ms, str)
    else {"ms": ms, "tokens_per_second": 1e3 * batch_size / ms, "cache_bytes": 2**20}
  )
  return {
    "what": what,
    "n": n,
    "batch_size": batch_size,
    "model": "1M parameters, bfloat16",
    "k": 3,
    "window": 5,
    "gate": "value",
    "weights_ms": 0.5,
    "rivals": {kind: result(ms) for kind, ms in milliseconds.items()},
  }


ROWS = [
  row(16, sparsek=1.0, full=2.0),
  row(64, sparsek=1.25, full="out of memory", transformers=10.0),
  row(16, 8, sparsek=2.0),
  row(64, what="prefill", sparsek=3.0, full=12.0),
]


def test_summary():
  assert {line["what"]: line["value"] for line in decoding_report.summary(ROWS)} == {
    "batch 1: latency at 64 over latency at 16": 1.25,
    "batch 1: cache bytes at 64 over those at 16": 1.0,
    "batch 1: time to read the weights once over the time of a token at 16": 0.5,
    "batch 1: tokens/s over those of full attention at 16": 2.0,
    "batch 1: tokens/s over those of transformers at 64": 8.0,
    "prefill: tokens/s over those of full attention at 64": 4.0,
  }


def test_table_and_failures():
  lines = decoding_report.table(ROWS)
  assert (
    len(lines) == 10
    and "out of memory" in lines[4]
    and lines[1].split() == ["decode", "16", "1", "sparsek", "1.00", "1,000", "1.00"]
  )
  assert decoding_report.failures({"rows": ROWS}) == []
  assert decoding_report.failures({"rows": [row(4, full="RuntimeError: no")]}) == [
    "decode, full attention, n=4, batch 1: RuntimeError: no"
  ]
  assert decoding_report.curves(ROWS) == {
    "Batch 1": {
      "sparsek": [(16, 1.0), (64, 1.25)],
      "full attention": [(16, 2.0)],
      "transformers": [(64, 10.0)],
    },
    "Batch 8": {"sparsek": [(16, 2.0)]},
  }


def test_extending_a_record():
  merged = decoding_report.merge(
    ROWS, [row(16, transformers=5.0), row(16, 8, sparsek=9.0), row(32, sparsek=7.0)]
  )
  assert [
    (
      x["what"],
      x["batch_size"],
      x["n"],
      {kind: result.get("ms") for kind, result in x["rivals"].items()},
    )
    for x in merged
  ] == [
    ("decode", 1, 16, {"sparsek": 1.0, "full": 2.0, "transformers": 5.0}),
    ("decode", 1, 32, {"sparsek": 7.0}),
    ("decode", 1, 64, {"sparsek": 1.25, "full": None, "transformers": 10.0}),
    ("decode", 8, 16, {"sparsek": 9.0}),
    ("prefill", 1, 64, {"sparsek": 3.0, "full": 12.0}),
  ]


def jobs_of(*words):
  """Returns the jobs of flags, whatever other tests have left in them."""
  for name in suites.FLAGS:
    suites.FLAGS[name].unparse()
  parse(["benchmark", "--suite=decode", *words], suites.FLAGS)
  try:
    return suites.decode_jobs()
  finally:
    suites.FLAGS["workdir"].unparse()


def test_jobs():
  jobs = jobs_of("--k=512", "--batch_sizes=8,1", "--prompts=300")
  assert [(job.what, job.batch_size, job.n) for job in jobs] == [
    ("decode", batch, n) for batch in (1, 8) for n in (1024, 8192, 65536, 524288, 1048576)
  ] + [("prefill", 1, 300)]
  assert jobs[0].config.num_layers == 20 and jobs[0].config.k == 512


def test_jobs_of_the_model_of_a_run(tmp_path):
  write_run(tmp_path / "run", "data", CONFIG, 32, init_params(CONFIG, jax.random.key(0)))
  words = ("--lengths=16", "--batch_sizes=1", "--prompts=", "--k=2")
  (job,) = jobs_of(*words, f"--workdir={tmp_path}/run")
  assert job.config == dataclasses.replace(CONFIG, k=2) != CONFIG


def test_a_filled_cache_is_one_that_has_seen_so_many_tokens():
  config = dataclasses.replace(CONFIG, attention="sparsek,full", num_layers=2)
  for n in (2, 7, 1000):
    cache = decoding_bench.filled(config, 2, n)
    like = init_cache(config, 2, max_length=n + decoding_bench.ROOM)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), cache) == jax.tree.map(
      lambda x: (x.shape, x.dtype), like
    )
    layer, left = cache.layers[0], max(n - 5, 0)
    position = np.asarray(layer.position)
    assert (
      cache.seen.tolist() == [n, n]
      and np.all((position < left) | (position == NOWHERE))
      and np.sum(position[0, 0] < left) == min(left, 3)
    )
    assert np.array_equal(np.asarray(layer.score)[..., :3] > -np.inf, position < NOWHERE)
  logits, _ = decode_step(
    config, init_params(config, jax.random.key(0)), cache, np.zeros(2, np.int32)
  )
  assert np.all(np.isfinite(logits))


def test_measuring(monkeypatch):
  """Ours here; PyTorch's part needs a GPU, and what it answers is put beside it."""
  answer = lambda text: monkeypatch.setattr(
    transformers_decode,
    "COMMAND",
    (sys.executable, "-c", f"import json, sys; job = json.load(sys.stdin); {text}"),
  )
  answer(
    "print('noise'); print(json.dumps({'seconds': [.3, .1, .2], 'mib': "
    "job['model']['hidden_size']}))"
  )
  jobs = [
    decoding_bench.Job(CONFIG, 9, 2),
    decoding_bench.Job(CONFIG, 30, 2),
    decoding_bench.Job(CONFIG, 12, 1, "prefill"),
  ]
  said = []
  others = decoding_bench.time_transformers(jobs, ("transformers", "full"), 500, 3, said.append)
  assert others == {
    0: {
      "ms": 200.0,
      "fastest": 100.0,
      "slowest": 300.0,
      "rounds": 3,
      "inner": 16,
      "mib": 8,
      "tokens_per_second": 10.0,
      "cache_bytes": 288,
    },
    1: {"failed": "out of memory", "cache_bytes": 960},
  }
  assert list(decoding_bench.time_jobs(jobs[:1], ("transformers",), others={0: others[0]}))[0][1][
    0
  ]["rivals"] == {"transformers": others[0]}
  *_, (done, rows) = decoding_bench.time_jobs(
    jobs,
    ("sparsek", "full", "transformers"),
    rounds=1,
    sample_seconds=0.05,
    others=others,
    say=said.append,
  )
  assert [sorted(row["rivals"]) for row in rows] == [["full", "sparsek", "transformers"]] * 2 + [
    ["full", "sparsek"]
  ]
  ours = [row["rivals"]["sparsek"] for row in rows]
  assert all(
    result["inner"] * decoding_bench.AHEAD <= decoding_bench.ROOM for result in ours[:2]
  ), "a full layer's rows have room for no more"
  assert (
    ours[0]["cache_bytes"]
    == ours[1]["cache_bytes"]
    == cache_bytes(init_cache(CONFIG, 2))
    < rows[0]["rivals"]["full"]["cache_bytes"] + 9999
  )
  assert all(
    result["ms"] > 0 and result["tokens_per_second"] > 0
    for row in rows
    for result in row["rivals"].values()
    if "failed" not in result
  )
  assert ours[0]["tokens_per_second"] == pytest.approx(
    2e3 / ours[0]["ms"]
  ) and not decoding_report.failures({"rows": rows})
  answer("sys.exit('no GPU')")
  assert transformers_decode.run(CONFIG, 12, 1, 1) == {"failed": "no GPU"}


def test_too_little_memory_is_told(monkeypatch):
  monkeypatch.setattr(decoding_bench, "cache_bytes", lambda cache: 2**60)
  monkeypatch.setattr(decoding_bench.math, "inf", 2.0**40)
  *_, (_, rows) = decoding_bench.time_jobs(
    [decoding_bench.Job(CONFIG, 9)], ("full",), rounds=1, seconds=1
  )
  assert (
    rows[0]["rivals"]["full"]["failed"] == "out of memory"
    and rows[0]["rivals"]["full"]["cache_bytes"] == 2**60
  )
