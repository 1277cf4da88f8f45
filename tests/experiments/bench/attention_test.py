import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsek.attention.api import sliding_window_attention
from sparsek.attention.operator import causal_sparsek
from sparsek.experiments.bench import attention as attention_bench
from sparsek.experiments.bench import cells

PROBLEM = attention_bench.Problem(
  40, heads=2, kv_heads=1, head_dim=8, k=6, window=5, dtype="float32"
)


def output(name, problem=PROBLEM):
  inputs, _ = attention_bench.make_inputs(problem)
  return jax.jit(attention_bench.make_baseline(name, problem).function)(*inputs)[0]


def test_the_sliding_window_sees_as_many_keys_as_sparsek():
  (query, key, value, _), _ = attention_bench.make_inputs(PROBLEM)
  attend = functools.partial(
    jax.nn.dot_product_attention, query, key, value, is_causal=True, implementation="xla"
  )
  np.testing.assert_allclose(
    output("sliding_window"), attend(local_window_size=(10, 0)), rtol=1e-4, atol=1e-5
  )
  np.testing.assert_allclose(output("dense"), attend(), rtol=1e-5, atol=1e-5)
  assert not np.allclose(output("sliding_window"), attend(local_window_size=(9, 0)), atol=1e-3)


@pytest.mark.parametrize("implementation", ["xla", "mosaic_gpu"])
def test_thresholds_are_computed_with_expiry_lists_and_gradient(implementation):
  inputs, cotangents = attention_bench.make_inputs(PROBLEM)
  baseline = attention_bench.make_baseline("thresholds", PROBLEM, implementation)
  threshold, (expiry, lists), gradient = jax.jit(
    attention_bench.make_pass(baseline, attention_bench.BOTH)
  )(*inputs, cotangents[3])
  select = lambda scores: causal_sparsek(scores, 6, delay=5)
  truth, pull = jax.vjp(lambda scores: select(scores).threshold, inputs[3])
  np.testing.assert_array_equal(threshold, truth)
  np.testing.assert_array_equal(expiry, select(inputs[3]).expiry)
  np.testing.assert_allclose(gradient[0], pull(cotangents[3])[0], rtol=1e-6)
  listed = set(np.asarray(jax.tree.leaves(lists)[0]).ravel())
  assert {j for j in range(40) if expiry[0, j, 0] > j + 5 and j + 5 < 40} <= listed


@pytest.mark.parametrize("name, gradients", [("sparsek", 4), ("dense", 3)])
def test_both_directions_give_the_output_and_the_gradients_of_all_that_is_read(name, gradients):
  inputs, cotangents = attention_bench.make_inputs(PROBLEM)
  baseline = attention_bench.make_baseline(name, PROBLEM, "reference")
  out, _, result = jax.jit(attention_bench.make_pass(baseline, attention_bench.BOTH))(
    *inputs, cotangents[0]
  )

  def loss(*inputs):
    out = baseline.function(*inputs)[0]
    return jnp.sum(out * cotangents[0]), out

  truth, truth_out = jax.jit(jax.grad(loss, argnums=baseline.argnums, has_aux=True))(*inputs)
  np.testing.assert_allclose(out, truth_out, rtol=1e-4, atol=1e-5)
  assert len(result) == len(truth) == gradients
  for x, y in zip(result, truth):
    np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5)


def test_baselines_are_chosen_by_device_length_and_wish(monkeypatch):
  problem = dataclasses.replace(PROBLEM, n=8192, dtype="bfloat16")
  chosen = lambda *args, **kwargs: (
    attention_bench.choose_baselines([problem], *args, **kwargs)[0].baselines
  )
  monkeypatch.setattr(attention_bench, "on_nvidia_gpu", lambda: False)
  monkeypatch.setattr(attention_bench.devices, "hopper_refusal", lambda query: "there is no GPU")
  # sparsek is xla here, and dense would not fit
  assert chosen() == ("sparsek", "sliding_window", "thresholds")
  assert chosen(implementation="reference", max_dense=8192) == attention_bench.BASELINES
  assert chosen(("xla", "dense")) == ("xla",)
  assert attention_bench.make_baseline("dense", problem).label == "XLA dense"
  assert [
    attention_bench.make_baseline("sparsek", problem, x).label for x in (None, "reference")
  ] == ["sparsek, xla", "sparsek, reference"]
  monkeypatch.setattr(attention_bench, "on_nvidia_gpu", lambda: True)
  monkeypatch.setattr(attention_bench.devices, "hopper_refusal", lambda query: None)
  assert attention_bench.make_baseline("sparsek", problem).label == "sparsek, mosaic_gpu"
  assert chosen() == attention_bench.BASELINES
  assert chosen(implementation="xla", max_dense=8191) == ("sparsek", "sliding_window", "thresholds")
  assert chosen(max_xla=4096) == ("sparsek", "sliding_window", "dense", "thresholds")
  assert [
    attention_bench.make_baseline(name, problem).label for name in ("dense", "sliding_window")
  ] == ["cuDNN dense", "cuDNN window"]
  # cuDNN takes no float32
  assert attention_bench.make_baseline("sliding_window", PROBLEM).label == "XLA window"


def test_headline_holds_the_shapes_behind_the_goals():
  problems = attention_bench.headline()
  main = {
    problem.n: problem
    for problem in problems
    if problem.scores == "normal" and (problem.kv_heads, problem.head_dim) == (16, 128)
  }
  assert {4096, 32768, 131072} < set(main) and all(
    {"sparsek", "sliding_window", "dense"} <= set(problem.baselines) for problem in main.values()
  )
  assert {"thresholds", "xla"} < set(main[32768].baselines)
  assert "thresholds" in main[8192].baselines
  assert (8192, 64) in {(p.n, p.head_dim) for p in problems}
  assert [(p.scores, p.heads, p.kv_heads, p.head_dim) for p in problems if p.n == 32768][1:] == [
    ("rising", 16, 16, 128),
    ("falling", 16, 16, 128),
    ("normal", 32, 8, 128),
    ("normal", 16, 16, 64),
    ("normal", 8, 8, 256),
  ]
  assert all((p.k, p.window, p.dtype) == (512, 512, "bfloat16") for p in problems)
  small = attention_bench.headline((64, 16), head_dim=8, heads=4, kv_heads=2)
  assert [(p.n, p.heads, p.kv_heads, p.head_dim, p.scores) for p in small] == [
    (16, 4, 2, 8, "normal"),
    (64, 4, 2, 8, "normal"),
    (16, 4, 2, 8, "rising"),
    (16, 4, 2, 8, "falling"),
  ]
  assert small[0].baselines == attention_bench.BASELINES


@pytest.mark.parametrize(
  "error, why",
  [
    (
      jax.errors.JaxRuntimeError(
        "RESOURCE_EXHAUSTED: Out of memory while trying to allocate 9 bytes\nmore"
      ),
      "out of memory",
    ),
    (
      jax.errors.JaxRuntimeError("INTERNAL: CUDA_ERROR_OUT_OF_MEMORY: out of memory"),
      "out of memory",
    ),
    (MemoryError(), "out of memory"),
    (
      jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Shared memory: out of memory"),
      "JaxRuntimeError: RESOURCE_EXHAUSTED: Shared memory: out of memory",
    ),
    (NotImplementedError("Q must be fp16\nmore"), "NotImplementedError: Q must be fp16"),
    (jax.errors.JaxRuntimeError(""), "JaxRuntimeError: "),
  ],
)
def test_failures_are_told_and_the_rest_goes_on(error, why):
  calls = []

  def bad():
    calls.append("bad")
    if len(calls) > 3:
      raise error

  bad_and_good = [cells.Cell(bad, ()), cells.Cell(lambda: calls.append("good"), ())]
  assert list(cells.run_rounds(bad_and_good, 4, 60)) == [1, 2, 3, 4]
  # there and back, without the one that failed
  assert calls == ["bad", "good", "good", "bad", "good", "good"]
  assert bad_and_good[0].record() == {"failed": why, "mib": None}
  assert bad_and_good[1].record()["rounds"] == 4 and bad_and_good[1].record()["ms"] >= 0


def test_a_bug_is_not_hidden():
  cell = cells.Cell(lambda: None + 1, ())
  with pytest.raises(TypeError):
    cell.attempt(cell.sample)


@pytest.fixture
def clock(monkeypatch):
  """A clock that only its `sleep` moves."""

  class Clock:
    now = 0.0

    def sleep(self, seconds):
      self.now += seconds

    def perf_counter(self):
      return self.now

  clock = Clock()
  monkeypatch.setattr(cells, "time", clock)
  return clock


def test_rounds_end_in_time(clock):
  cell = cells.Cell(lambda: clock.sleep(1), ())
  assert list(cells.run_rounds([cell], 100, 3.5)) == [1, 2, 3]
  assert list(cells.run_rounds([cell], 100, 0)) == [1]  # one always


def test_samples_last_long_enough(clock):
  cell = cells.Cell(lambda: clock.sleep(0.001), ())
  cell.calibrate(0.01)
  assert cell.inner == 11
  cell.sample()
  assert cell.seconds == [pytest.approx(0.001)]
  endless = cells.Cell(lambda: None, ())
  endless.calibrate(0)
  assert endless.inner == 1


def test_a_trace_gives_the_time_of_each_kind_of_kernels(monkeypatch):
  calls = []
  cell = cells.Cell(lambda: calls.append(1), ())
  cell.sample()
  assert "kinds_ms" not in cell.record()
  of_kernels = [("sparsek_walk_3", 1.0), ("sparsek_forward_mosaic_gpu_kernel", 3.0)] * cells.TRACED
  monkeypatch.setattr(cells.trace, "kernels", lambda folder: of_kernels)
  cell.trace()
  assert "kinds_ms" not in cell.record()  # a CPU has no kernels
  monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
  cell.trace()
  assert len(calls) == 1 + cells.TRACED
  assert cell.record()["kinds_ms"] == {"thresholds and lists": 1.0, "attention": 3.0}


def test_rows(monkeypatch):
  """Two families of scores and a baseline without memory give a row a family; what reads no scores
  is timed once for both.
  """

  def dense(*args, **kwargs):
    raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")

  monkeypatch.setattr(jax.nn, "dot_product_attention", dense)
  problems = [
    dataclasses.replace(PROBLEM, baselines=("sparsek", "sliding_window", "dense"), scores=scores)
    for scores in ("normal", "rising")
  ]
  said = []
  (_, first), (done, rows) = attention_bench.time_problems(
    problems, rounds=2, sample_seconds=0, say=said.append
  )
  assert done == 2 and len(said) == 5 and [row["scores"] for row in rows] == ["normal", "rising"]
  for row in rows:
    assert row["labels"] == {
      "sparsek": "sparsek, xla",
      "sliding_window": "XLA window",
      "dense": "XLA dense",
    }
    assert row["rivals"]["dense"] == {
      direction: {"failed": "out of memory", "mib": None}
      for direction in (attention_bench.FORWARD, attention_bench.BOTH)
    }
    forward, both = row["rivals"]["sparsek"].values()
    assert (
      both["rounds"] == 2
      and both["fastest"] <= both["ms"] <= both["slowest"]
      and both["mib"] > forward["mib"] > 4 * 40 * 8 * 3 / 2**20
    )
  assert (
    rows[0]["rivals"]["sliding_window"] == rows[1]["rivals"]["sliding_window"]
    and rows[0]["rivals"]["sparsek"] != rows[1]["rivals"]["sparsek"]
  )
  assert first[0]["rivals"]["sparsek"][attention_bench.BOTH]["rounds"] == 1


def test_errors_are_those_of_rounding():
  result = attention_bench.errors(
    dataclasses.replace(PROBLEM, heads=4, kv_heads=2, dtype="bfloat16", baselines=("sparsek",))
  )
  assert not result["failed"] and list(result["relative"]) == ["sparsek", "rounding alone"]
  ours, rounding = result["relative"].values()
  assert (
    list(ours) == ["out", "dquery", "dkey", "dvalue", "dscores"]
    and ours["dscores"] < 1e-5
    and rounding["dscores"] == 0
  )
  assert all(
    1e-4 < rounding[name] <= ours[name] * 1.0001 and ours[name] < 1.2 * rounding[name]
    for name in ("out", "dquery", "dkey", "dvalue")
  )


@pytest.mark.gpu
@pytest.mark.parametrize(
  "n, heads, kv_heads, head_dim", [(1000, 16, 16, 128), (2048, 32, 8, 128), (300, 4, 4, 64)]
)
def test_cudnn_baselines_attend_to_what_they_say(n, heads, kv_heads, head_dim):
  """With k + window = 512: cuDNN's sliding window and dense attention are those of our own XLA
  implementation, gradients too.
  """
  problem = attention_bench.Problem(
    n, heads=heads, kv_heads=kv_heads, head_dim=head_dim, k=256, window=256
  )
  inputs, cotangents = attention_bench.make_inputs(problem)
  for name, window in (("sliding_window", 512), ("dense", n)):
    baseline = attention_bench.make_baseline(name, problem)
    assert baseline.label.startswith("cuDNN")
    ours = dataclasses.replace(
      baseline,
      function=lambda query, key, value, scores: (
        sliding_window_attention(query, key, value, window=window),
        (),
      ),
    )
    result, truth = (
      jax.tree.leaves(
        jax.jit(attention_bench.make_pass(x, attention_bench.BOTH))(*inputs, cotangents[0])
      )
      for x in (baseline, ours)
    )
    for x, y in zip(result, truth):
      x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
      assert np.linalg.norm(x - y) < 0.01 * np.linalg.norm(y)
