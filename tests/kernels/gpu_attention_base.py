"""The tests that the attention kernels for GPUs must pass on one, besides those of all
implementations.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sparsek
from sparsek.kernels.specs import Spec, make_inputs, segment_ids
from tests.kernels.attention_base import (
  ARGUMENTS,
  AttentionTest,
  output_and_gradients,
  relative_error,
)

LONG_ROWS = (
  Spec("several_chunks", n=5000, heads=4, groups=2, head_dim=128, k=300, window=200),
  Spec(
    "several_chunks_rising",
    n=4500,
    heads=2,
    groups=2,
    head_dim=128,
    k=500,
    window=77,
    scores="rising",
  ),
  Spec(
    "several_chunks_64",
    n=4100,
    heads=2,
    groups=1,
    head_dim=64,
    k=130,
    window=0,
    documents=(1500, 3, 700),
  ),
  Spec("large_budget", n=6000, heads=1, groups=1, head_dim=128, k=4096, window=128),
)


class GpuAttentionTest(AttentionTest):
  dtype = "bfloat16"
  tolerance = 2e-3
  tolerance_16 = 1e-2

  @pytest.mark.parametrize("dtype", ("bfloat16", "float16"))
  @pytest.mark.parametrize("spec", LONG_ROWS, ids=lambda spec: spec.name)
  def test_long_rows_match_xla(self, spec, dtype):
    self.check_long_rows(spec, dtype)

  def check_long_rows(self, spec, dtype):
    """Compares with XLA, and with a second run."""
    inputs = [x.astype(dtype) for x in make_inputs(spec)[:3]] + [make_inputs(spec)[3]]
    cotangent, ids = (
      jax.random.normal(jax.random.key(1), inputs[0].shape).astype(dtype),
      segment_ids(spec),
    )
    attend = lambda implementation: functools.partial(
      sparsek.sparsek_attention,
      k=spec.k,
      window=spec.window,
      gate="value",
      segment_ids=ids,
      implementation=implementation,
    )
    ours, plain = (
      output_and_gradients(attend(implementation), inputs, cotangent)
      for implementation in (self.implementation, "xla")
    )
    again = output_and_gradients(attend(self.implementation), inputs, cotangent)
    for name, x, y, z in zip(("out", "query", "key", "value", "scores"), ours, plain, again):
      assert relative_error(x.astype(jnp.float32), y.astype(jnp.float32)) < 1e-2, name
      np.testing.assert_array_equal(
        np.asarray(x.astype(jnp.float32)), np.asarray(z.astype(jnp.float32))
      )

  @pytest.mark.parametrize(
    "n, window, head_dim, documents",
    [
      (4100, 300, 64, (1500, 3, 700)),
      (2500, 2500, 128, ()),
      (1023, 1023, 64, ()),
      (129, 5, 40, ()),
      (130, 1, 40, ()),
    ],
  )
  def test_sliding_window_matches_xla(self, n, window, head_dim, documents):
    self.check_sliding_window(n, window, head_dim, documents)

  def check_sliding_window(self, n, window, head_dim, documents):
    """Compares with XLA; full attention is a window as long as the row."""
    spec = Spec(
      "window",
      n=n,
      heads=4,
      groups=2,
      head_dim=head_dim,
      k=1,
      window=window,
      documents=documents,
      dtype=self.dtype,
    )
    *inputs, _ = make_inputs(spec)
    cotangent, ids = (
      jax.random.normal(jax.random.key(1), inputs[0].shape).astype(self.dtype),
      segment_ids(spec),
    )

    def run(implementation):
      attend = functools.partial(
        sparsek.sliding_window_attention,
        window=window,
        segment_ids=ids,
        implementation=implementation,
      )
      out, vjp = jax.vjp(attend, *inputs)
      return out, *vjp(cotangent)

    expected = jax.jit(run, static_argnums=0)("xla")
    names = (self.implementation,) if documents or window == 1 else (self.implementation, "cudnn")
    for implementation in names:
      for name, x, y in zip(
        ("out", *ARGUMENTS), jax.jit(run, static_argnums=0)(implementation), expected
      ):
        assert relative_error(x.astype(jnp.float32), y.astype(jnp.float32)) < 1e-2, (
          implementation,
          name,
        )
