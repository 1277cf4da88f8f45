"""The Mosaic GPU kernels: the shared behaviours on a Hopper GPU; elsewhere the kernels interpreted,
and what they refuse.
"""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sparsek
from sparsek.attention.documents import document_bounds
from sparsek.attention.prefix_selection import select
from sparsek.config import GATES
from sparsek.kernels import cudnn, devices, gates
from sparsek.kernels.ampere import attention as ampere_attention
from sparsek.kernels.hopper import attention as hopper_attention
from sparsek.kernels.hopper.common import joined
from sparsek.kernels.hopper.work import ListWork, QueryWork, Work
from sparsek.kernels.specs import SPECS, Spec, make_inputs
from tests.kernels.attention_base import ARGUMENTS
from tests.kernels.gpu_attention_base import GpuAttentionTest
from tests.kernels.hopper import interpreted


@pytest.mark.gpu
class TestMosaicGpu(GpuAttentionTest):
  implementation = "mosaic_gpu"

  @pytest.mark.parametrize("dtype", ("bfloat16", "float16"))
  @pytest.mark.parametrize(
    "spec",
    [
      Spec(
        "several_chunks_256",
        n=4500,
        heads=4,
        groups=2,
        head_dim=256,
        k=300,
        window=200,
        documents=(1500, 3, 700),
      ),
      Spec("rising_256", n=4100, heads=2, groups=2, head_dim=256, k=500, window=0, scores="rising"),
    ],
    ids=lambda spec: spec.name,
  )
  def test_long_rows_of_wide_heads_match_xla(self, spec, dtype):
    self.check_long_rows(spec, dtype)

  @pytest.mark.parametrize("n, window, documents", [(4100, 300, (1500, 3, 700)), (2500, 600, ())])
  def test_sliding_window_of_wide_heads_matches_xla(self, n, window, documents):
    self.check_sliding_window(n, window, 256, documents)

  def test_is_the_default(self):
    inputs = self.problem(SPECS[0])[0]
    default, named = (
      sparsek.sparsek_attention(*inputs, k=9, window=9, implementation=name)
      for name in (None, "mosaic_gpu")
    )
    np.testing.assert_array_equal(np.asarray(default, np.float32), np.asarray(named, np.float32))


def test_a_window_as_long_as_the_row_needs_no_selection(monkeypatch):
  """cuDNN's dense attention runs then, where it can; here a window under XLA takes its place."""
  windows = []

  def dense(query, key, value, *, window, scale):
    windows.append(window)
    return sparsek.sliding_window_attention(
      query, key, value, window=window, scale=scale, implementation="xla"
    )

  refusal = lambda query, segment_ids, window: None if segment_ids is None else "documents"
  monkeypatch.setattr(cudnn, "refusal", refusal)
  monkeypatch.setattr(cudnn, "attention", dense)
  inputs = make_inputs(Spec("dense", n=20, heads=2, groups=1, head_dim=8, k=3, window=20))
  attend = lambda *inputs, **options: jnp.sum(
    sparsek.sparsek_attention(*inputs, k=3, **options) ** 2
  )
  gradients = [
    jax.grad(functools.partial(attend, window=20, implementation=name), argnums=(0, 1, 2, 3))(
      *inputs
    )
    for name in (None, "xla")
  ]
  jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-5), *gradients)
  (
    attend(*inputs, window=19),
    attend(*inputs, window=20, segment_ids=jnp.ones(inputs[0].shape[:2], jnp.int32)),
  )
  assert windows == [20]


@pytest.mark.parametrize("gate", GATES)
def test_arithmetic_of_a_tile_is_that_of_the_reference(gate):
  """Compares the formulas of the kernels with autodiff: one query a row, all of its keys in one
  tile.
  """
  shape, scale = (6, 10), 0.3
  keys = jax.random.split(jax.random.key(3), 3)
  s, dp = jax.random.normal(keys[0], shape) * 3, jax.random.normal(keys[1], shape)
  # u_j - tau_i
  distance = jax.random.uniform(keys[2], shape, minval=-0.2, maxval=1.2).at[:, 0].set(2.0)

  def out(s, distance, values):
    p = jnp.clip(distance, 0, 1)
    p = 1 + p - jax.lax.stop_gradient(p) if gate == "straight_through" else p
    logits = s * scale * (p if gate == "key_value" else 1)
    return jnp.sum(jax.nn.softmax(logits) * p * values, axis=1), jax.nn.logsumexp(logits, axis=1)

  (delta, lse), vjp = jax.vjp(lambda s, distance: out(s, distance, dp), s, distance)
  expected_s, expected_gate = vjp((jnp.ones(6), jnp.zeros(6)))
  probability = lambda logits: jnp.exp(logits * scale - lse[:, None])
  p, g, weights = gates.tile_weights(s, probability, lambda: distance, gate=gate)
  ds, of_gates = gates.tile_gradients(
    s, p, g, dp, delta[:, None], lambda: distance, gate=gate, scale=scale
  )
  np.testing.assert_allclose(jnp.sum(weights * dp, axis=1), delta, rtol=1e-5)
  np.testing.assert_allclose(ds * scale, expected_s, atol=1e-5)
  np.testing.assert_allclose(of_gates(), expected_gate, atol=1e-4)


@interpreted.slow
@pytest.mark.parametrize("name", interpreted.CASES)
def test_interpreted_kernels_match_the_truth(name):
  errors = interpreted.errors_of(name)
  assert set(errors) == {"out", *ARGUMENTS} and max(errors.values()) < 1e-2, errors


@pytest.mark.parametrize(
  "head_dim, kernels",
  [(128, hopper_attention.HOPPER), (256, hopper_attention.HOPPER), (128, ampere_attention.KERNELS)],
)
def test_gradients_trace_inside_shard_map(head_dim, kernels):
  """Checks types only: no GPU is needed."""
  spec = Spec(
    "sharded", n=80, batch=2, heads=4, groups=2, head_dim=head_dim, k=8, window=8, dtype="bfloat16"
  )
  mesh = jax.make_mesh((1, 1), ("data", "heads"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
  part = jax.sharding.PartitionSpec("data", None, "heads")

  def loss(query, key, value, scores):
    scores = jnp.swapaxes(scores, 1, 2)
    start, end = document_bounds(None, 2, spec.n)
    selection = select(scores, start, end, spec.k, spec.window, False, devices.SUPPORTED)
    out = hopper_attention.attention(
      query,
      key,
      value,
      scores,
      *selection,
      start,
      end,
      k=spec.k,
      window=spec.window,
      gate="value",
      scale=1.0,
      kernels=kernels,
    )
    return jnp.sum(out.astype(jnp.float32) ** 2)

  inputs = make_inputs(spec)
  traced = jax.jit(
    jax.shard_map(jax.grad(loss, argnums=(0, 1, 2, 3)), mesh=mesh, in_specs=part, out_specs=part)
  ).trace(*inputs)
  assert [x.shape for x in traced.out_info] == [x.shape for x in inputs]


@pytest.mark.parametrize(
  "dtype, head_dim, ids, words",
  [
    ("bfloat16", 64, True, "segment_ids"),
    ("float32", 64, False, "float32"),
    ("bfloat16", 20, False, "head_dim 20"),
    ("bfloat16", 64, False, "NVIDIA GPU"),
  ],
)
def test_cudnn_says_why_it_cannot_run(dtype, head_dim, ids, words):
  if words == "NVIDIA GPU" and jax.default_backend() == "gpu":
    pytest.skip("there is a GPU")
  x = jnp.zeros((1, 8, 1, head_dim), dtype)
  segments = jnp.ones((1, 8), jnp.int32) if ids else None
  with pytest.raises(
    NotImplementedError, match=f"implementation='cudnn' cannot run here: .*{words}"
  ):
    sparsek.sliding_window_attention(
      x, x, x, window=2, segment_ids=segments, implementation="cudnn"
    )
  assert sparsek.sliding_window_attention(x, x, x, window=2, segment_ids=segments).shape == x.shape


def test_cudnn_refuses_old_gpus(monkeypatch):
  old = types.SimpleNamespace(
    platform="gpu",
    device_kind="Tesla T4",
    compute_capability="7.5",
    client=types.SimpleNamespace(platform_version="cuda 12"),
  )
  monkeypatch.setattr(jax, "devices", lambda: [old])
  refusal = cudnn.refusal(jax.ShapeDtypeStruct((1, 8, 1, 64), jnp.bfloat16), None, 8)
  assert "compute capability 8.0 or newer; Tesla T4 has 7.5" in refusal


@pytest.mark.parametrize(
  "dtype, head_dim, words",
  [
    ("float32", 64, "float32"),
    ("bfloat16", 264, "head_dim 264; at most 256"),
    ("bfloat16", 64, "Hopper|compute capability"),
  ],
)
def test_says_why_it_cannot_run(dtype, head_dim, words):
  if words.startswith("Hopper") and jax.default_backend() == "gpu":
    pytest.skip("there is a GPU")
  x = jnp.zeros((1, 8, 1, head_dim), dtype)
  with pytest.raises(NotImplementedError, match=words):
    sparsek.sparsek_attention(
      x, x, x, jnp.zeros((1, 8, 1)), k=2, window=2, implementation="mosaic_gpu"
    )
  assert sparsek.sparsek_attention(x, x, x, jnp.zeros((1, 8, 1)), k=2, window=2).shape == x.shape


@pytest.mark.parametrize("n", (1, 128, 129, 2048, 2049, 5000, 10**6))
def test_padding_to_whole_chunks_is_small(n):
  chunk = hopper_attention.chunk_size(n)
  assert chunk % 128 == 0 and 0 <= -n % chunk < 128 * -(-n // chunk)


@pytest.mark.parametrize(
  "work",
  [
    Work(2, 5, 3, 16),
    Work(1, 700, 8, 16),
    Work(1, 1, 1, 4),
    ListWork(2, 3, 2, 20, 4, 2),
    ListWork(1, 2, 2, 5, 9, 3),
    ListWork(1, 1, 1, 1, 1, 2),
    ListWork(1, 2, 1, 7, 0, 2),
    ListWork(2, 2, 3, 12, 6, 1),
  ],
)
def test_programs_compute_every_block_once(work):
  programs, items = jnp.arange(work.programs), []
  for i in range(work.each):
    computed = work.blocks_of(programs) > i
    all_items = zip(*(np.asarray(x) for x in work.item(programs, jnp.int32(i))))
    items += [item for item, there in zip(all_items, computed) if there]
  blocks = work.blocks * getattr(work, "chunks", 1)
  assert len(items) == work.batch * blocks * work.heads
  assert set(items) == {
    (b, block, head)
    for b in range(work.batch)
    for block in range(blocks)
    for head in range(work.heads)
  }


def test_long_blocks_of_lists_come_first():
  work = ListWork(batch=1, chunks=1, heads=1, blocks=9, middle=4, most=2)
  order = [
    [int(work.item(jnp.int32(program), jnp.int32(i))[1]) for program in range(work.programs)]
    for i in range(work.each)
  ]
  assert order == [[4, 3, 5, 2, 6], [8, 8, 0, 7, 1]] and work.blocks_of(jnp.int32(0)) == 1


@pytest.mark.parametrize("number, programs", [(1, 1), (9, 4), (12, 4), (13, 4), (5, 1)])
def test_programs_compute_every_block_of_queries_once(number, programs):
  """In rounds, each of shorter blocks than the one before."""
  work, items = QueryWork(number, programs), []
  for i in range(-(-number // programs)):
    there = [p for p in range(programs) if work.blocks_of(p) > i]
    items.append(sorted(int(work.item(p, i)) for p in there))
  assert sum(items[::-1], []) == list(range(number))


@pytest.mark.parametrize(
  "ranges, expected",
  [
    (((2, 5), (4, 9)), (2, 9)),
    (((7, 7), (4, 9)), (4, 9)),
    (((4, 9), (0, 0)), (4, 9)),
    (((3, 3), (6, 6)), (6, 6)),
  ],
)
def test_ranges_are_joined(ranges, expected):
  assert tuple(map(int, joined(*ranges))) == expected
