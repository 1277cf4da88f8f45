"""Shapes that cuDNN is asked for, on GPUs that are not here: JAX's wrapper checks them in
tracing.
"""

import functools
import itertools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.cudnn import fused_attention_stablehlo as wrapper

import sparsek
from sparsek.config import TransformerConfig
from sparsek.kernels import cudnn, devices
from sparsek.model.layers import full_attention

GPUS = {
  "Hopper": ("9.0", 91000),
  "Ampere": ("8.0", 90800),
  "Blackwell Ultra, old cuDNN": ("10.3", 91000),
}


@pytest.fixture
def gpu(monkeypatch):
  """Lets JAX see a GPU of a compute capability, with a cuDNN of a version; None: without one."""

  def see(capability, version):
    client = types.SimpleNamespace(platform_version="cuda 13000")
    device = types.SimpleNamespace(
      platform="gpu", device_kind="NVIDIA GPU", client=client, compute_capability=capability
    )
    numbers = lambda text: tuple(map(int, text.split(".")))
    monkeypatch.setattr(jax, "devices", lambda *_: [device])
    monkeypatch.setattr(devices, "can_run", lambda: False)
    monkeypatch.setattr(devices, "can_run_portable", lambda: False)
    monkeypatch.setattr(
      wrapper, "check_compute_capability", lambda least: numbers(capability) >= numbers(least)
    )
    monkeypatch.setattr(
      wrapper,
      "is_cuda_compute_capability_equal",
      lambda other: numbers(capability) == numbers(other),
    )
    monkeypatch.setattr(
      wrapper,
      "cuda_versions",
      None if version is None else types.SimpleNamespace(cudnn_get_version=lambda: version),
    )

  return see


def array(*shape, dtype="bfloat16"):
  return jax.ShapeDtypeStruct(shape, dtype)


def refusal_of_the_wrapper(n, head_dim, window, dtype="bfloat16", heads=4, groups=2):
  """Why JAX raises when it is asked for gradients of just this, or None."""

  def run(query, key, value):
    before = None if window >= n else (window - 1, 0)
    attend = functools.partial(
      jax.nn.dot_product_attention, is_causal=True, local_window_size=before, implementation="cudnn"
    )
    out, vjp = jax.vjp(attend, query, key, value)
    return vjp(out)

  query, key = array(2, n, heads, head_dim, dtype=dtype), array(2, n, groups, head_dim, dtype=dtype)
  try:
    jax.eval_shape(run, query, key, key)
  except (NotImplementedError, RuntimeError, ValueError) as error:
    return str(error)
  return None


@pytest.mark.parametrize("name", GPUS)
def test_refuses_what_the_wrapper_refuses(name, gpu):
  gpu(*GPUS[name])
  shapes = itertools.product((1, 9, 128), (4, 64, 128, 136, 256, 264), (1, 2, 128), ("bfloat16",))
  for case in (*shapes, (128, 64, 128, "float16"), (128, 64, 128, "float32")):
    n, head_dim, window, dtype = case
    ours = cudnn.refusal(array(2, n, 4, head_dim, dtype=dtype), None, window)
    theirs = refusal_of_the_wrapper(*case)
    if ours is None:  # an odd row is filled up
      assert theirs is None or n % 2 and "sequence length" in theirs, case
    else:  # wide heads and a window of 1 only we refuse
      assert theirs or head_dim > cudnn.LARGEST_HEAD_DIM or window == 1, (case, ours)


@pytest.mark.parametrize("name", GPUS)
def test_takes_heads_of_256_on_hopper(name, gpu):
  gpu(*GPUS[name])
  reason = cudnn.refusal(array(2, 128, 4, 256), None, 64)
  assert reason is None if name == "Hopper" else "head_dim 256, for which cuDNN needs" in reason


def test_refuses_a_cudnn_that_is_missing_or_too_old(gpu):
  query = array(1, 64, 2, 64)
  gpu("9.0", None)
  assert "cuDNN is not detected" in cudnn.refusal(query, None, 64)
  gpu("10.3", 91000)
  assert "9.11" in cudnn.refusal(query, None, 64)
  gpu("10.3", 91100)
  assert cudnn.refusal(query, None, 64) is None


@pytest.mark.parametrize(
  "name, n", [("Hopper", 1), ("Hopper", 129), ("Ampere", 1023), ("Blackwell Ultra, old cuDNN", 128)]
)
def test_the_default_never_raises_by_shape(name, n, gpu):
  """Output and gradients of whatever runs by default, traced."""
  gpu(*GPUS[name])
  query, key, scores = array(2, n, 4, 64), array(2, n, 2, 64), array(2, n, 2, dtype="float32")
  config = TransformerConfig(head_dim=64, num_heads=4, num_kv_heads=2, embed_dim=256)
  attentions = [lambda q, k, v, u: full_attention(config, q, k, v, None)]
  for window in (1, n, 512):
    sparse = functools.partial(sparsek.sparsek_attention, k=3, window=window)
    attentions += [
      sparse,
      lambda q, k, v, u, window=window: sparsek.sliding_window_attention(q, k, v, window=window),
    ]

  def run(attend, *inputs):
    out, vjp = jax.vjp(attend, *inputs)
    return out, vjp(out)

  for attend in attentions:
    out, gradients = jax.eval_shape(functools.partial(run, attend), query, key, key, scores)
    shapes = [x.shape for x in (query, query, key, key, scores)]
    assert [x.shape for x in (out, *gradients)] == shapes


def test_an_odd_row_gets_a_token_that_nobody_sees(monkeypatch):
  lengths, dense = [], jax.nn.dot_product_attention

  def plain(query, *args, implementation, **options):
    lengths.append(query.shape[1])
    return dense(query, *args, implementation="xla", **options)

  keys = jax.random.split(jax.random.key(0), 4)
  query, key, value, cotangent = (
    jax.random.normal(key, (1, 9, heads, 8)) for key, heads in zip(keys, (4, 2, 2, 4))
  )
  monkeypatch.setattr(jax.nn, "dot_product_attention", plain)
  for window in (3, 9):

    def run(attend, **options):
      attend = functools.partial(attend, window=window, scale=0.3, **options)
      out, vjp = jax.vjp(attend, query, key, value)
      return [out, *vjp(cotangent)]

    ours = run(cudnn.attention)
    expected = run(sparsek.sliding_window_attention, implementation="xla")
    for x, y in zip(ours, expected):
      np.testing.assert_allclose(x, y, atol=1e-5)
  assert lengths == [10, 10]


def test_refusals_are_asked_inside_shard_map(gpu):
  gpu("9.0", 91000)
  mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
  part = jax.sharding.PartitionSpec("data")

  def run(query):
    assert cudnn.refusal(query, None, 64) is None
    return query

  x = jnp.zeros((2, 64, 2, 64), jnp.bfloat16)
  jax.jit(jax.shard_map(run, mesh=mesh, in_specs=part, out_specs=part)).trace(x)
