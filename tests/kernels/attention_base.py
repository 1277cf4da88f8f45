"""The tests that each implementation of SPARSEK attention must pass; an implementation's test is a
subclass that names it.
"""

import dataclasses
import functools
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sparsek
from sparsek.attention import api
from sparsek.attention.documents import document_bounds
from sparsek.attention.prefix_selection import select
from sparsek.kernels import reference, specs

PLAIN = specs.SPECS[0]
NO_WINDOW = next(spec for spec in specs.SPECS if spec.name == "window_0")
BATCH, DOCUMENTS = (
  next(spec for spec in specs.SPECS if spec.name == name) for name in ("grouped_heads", "documents")
)
ARGUMENTS = ("query", "key", "value", "scores")


@functools.lru_cache(maxsize=None)
def problem(spec):
  """Fresh inputs for this spec and a cotangent of the output."""
  return *_inputs(spec), specs.segment_ids(spec)


@functools.partial(jax.jit, static_argnums=0)
def _inputs(spec):
  inputs = specs.make_inputs(spec, seed=zlib.crc32(spec.name.encode()))
  return inputs, jax.random.normal(jax.random.key(7), inputs[0].shape).astype(spec.dtype)


@functools.lru_cache(maxsize=None)
def configured(attention, **options):
  """Returns the same function for equal options, so that tests share what is compiled for it."""
  return functools.partial(attention, **options)


def output_and_gradients(attention, inputs, cotangent, segment_ids=None):
  """(out, dquery, dkey, dvalue, dscores) in one compiled function."""
  packed = {} if segment_ids is None else {"segment_ids": segment_ids}
  return _output_and_gradients(attention, tuple(inputs), cotangent, packed)


@functools.partial(jax.jit, static_argnums=0)
def _output_and_gradients(attention, inputs, cotangent, packed):
  out, vjp = jax.vjp(functools.partial(attention, **packed), *inputs)
  return out, *vjp(cotangent.astype(out.dtype))


@functools.lru_cache(maxsize=None)
def truth(spec, gate, first=0):
  """The reference in float64, where the outputs of queries from `first` on matter."""
  inputs, cotangent, ids = problem(spec)
  cotangent = np.asarray(cotangent.astype(jnp.float32))
  with jax.enable_x64(True):
    inputs = [jnp.asarray(np.asarray(x.astype(jnp.float32)), jnp.float64) for x in inputs]
    scale = spec.head_dim**-0.5 if spec.scale is None else spec.scale
    attention = configured(
      reference.attention, k=spec.k, window=spec.window, gate=gate, scale=scale
    )
    cotangent = jnp.asarray(cotangent, jnp.float64).at[:, :first].set(0)
    return [np.asarray(x) for x in output_and_gradients(attention, inputs, cotangent, ids)]


def relative_error(x, y):
  """|x - y| / |y| over the whole array and for its largest element; |x - y| where y is 0
  throughout.
  """
  x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
  if np.max(np.abs(y), initial=0) < 1e-12:
    return np.max(np.abs(x - y), initial=0)
  return max(np.linalg.norm(x - y) / np.linalg.norm(y), np.max(np.abs(x - y)) / np.max(np.abs(y)))


def error_beyond_rounding(x, y):
  """Relative error of x, stored in a dtype, against the truth y: for a 16-bit dtype against y
  rounded to it, in norm (one element is off by a whole step).
  """
  # float64 noise where the truth is 0, as for the only token
  if x.dtype.itemsize > 2 or np.max(np.abs(y), initial=0) < 1e-12:
    return relative_error(x.astype(jnp.float32), y)
  stored = np.asarray(jnp.asarray(y, jnp.float32).astype(x.dtype), np.float64)
  return np.linalg.norm(np.asarray(x, np.float64) - stored) / np.linalg.norm(stored)


def dense_attention(*args, **kwargs):
  """jax.nn.dot_product_attention, without TF32 where a GPU has it."""
  with jax.default_matmul_precision("highest"):
    return jax.nn.dot_product_attention(*args, **kwargs)


class AttentionTest:
  """Subclasses set `implementation`; `specs` and `gates` to compare on some of them only; `dtype`
  where it takes one only; `remat` where it cannot be computed again; `batch` for a smaller one.

  `tolerance` holds for results of 32 bits and `tolerance_16` for those of 16, beyond their own
  rounding: matrix units may round softmax weights too. `tolerance_from_16`, if there is one, is
  that of results of 32 bits from inputs of 16, where the backward pass reads the rounded output.
  """

  implementation: str
  dtype = None
  remat = True
  batch = BATCH
  tolerance = 1e-5
  tolerance_16 = 1e-3
  tolerance_from_16 = None
  gates = specs.ALL_GATES
  specs = tuple(spec.name for spec in specs.SPECS)

  def pytest_generate_tests(self, metafunc):
    if {"spec", "gate"} <= set(metafunc.fixturenames):
      metafunc.parametrize(
        "spec, gate",
        [
          pytest.param(s, g, id=f"{s.name}-{g}")
          for s in dict.fromkeys((*specs.SPECS, self.batch))
          if s.name in self.specs
          for g in s.gates
          if g in self.gates
        ],
      )

  def retype(self, spec):
    return dataclasses.replace(spec, dtype=self.dtype) if self.dtype else spec

  def problem(self, spec):
    return problem(self.retype(spec))

  def close(self, x, y, looser=1):
    """Are results of this implementation equal up to rounding?"""
    x, y = (np.asarray(z, np.float64) for z in (x, y))
    return relative_error(x, y) < looser * (1e-2 if self.dtype else self.tolerance)

  def attend(self, spec, gate="straight_through", segment_ids=None):
    attention = configured(
      sparsek.sparsek_attention,
      k=spec.k,
      window=spec.window,
      gate=gate,
      scale=spec.scale,
      implementation=self.implementation,
    )
    return (
      functools.partial(attention, segment_ids=segment_ids)
      if segment_ids is not None
      else attention
    )

  def test_matches_truth(self, spec, gate):
    inputs, cotangent, ids = self.problem(spec)
    found = output_and_gradients(self.attend(spec, gate), inputs, cotangent, ids)
    for name, x, y, like in zip(
      ("out", *ARGUMENTS), found, truth(self.retype(spec), gate), (inputs[0], *inputs)
    ):
      assert x.dtype == like.dtype and x.shape == like.shape, name
      of_32 = (
        self.tolerance_from_16
        if self.tolerance_from_16 and inputs[0].dtype.itemsize == 2
        else self.tolerance
      )
      tolerance = of_32 if x.dtype.itemsize > 2 else self.tolerance_16
      error = error_beyond_rounding(x, y)
      assert error < tolerance, f"{name}: relative error {error:.2e}"

  @pytest.mark.parametrize("k, window", [(200, 0), (1, 200), (200, 200)])
  def test_is_dense_when_the_budget_covers_everything(self, k, window):
    (q, key, v, u), _, _ = self.problem(PLAIN)
    dense = dense_attention(q, key, v, is_causal=True)
    sparse = sparsek.sparsek_attention(
      q, key, v, u, k=k, window=window, implementation=self.implementation
    )
    assert self.close(sparse, dense)

  def test_a_batch_may_be_empty(self):
    inputs = [x[:0] for x in self.problem(PLAIN)[0]]
    out, *gradients = output_and_gradients(self.attend(PLAIN), inputs, inputs[0])
    for x, y in zip((out, *gradients), (inputs[0], *inputs)):
      assert x.shape == y.shape and x.dtype == y.dtype
    assert sparsek.sliding_window_attention(*inputs[:3], window=3).shape == inputs[0].shape

  def test_is_causal(self):
    """The gradient of output i with respect to every later input is exactly zero, and not zero
    before.
    """
    inputs, cotangent, _ = self.problem(PLAIN)
    i = 70
    at_i = jnp.zeros_like(cotangent).at[:, i].set(cotangent[:, i])
    _, *grads = output_and_gradients(self.attend(PLAIN, "key_value"), inputs, at_i)
    for name, g in zip(ARGUMENTS, grads):
      assert not np.any(g[:, i + 1 :]), name
      assert np.any(g[:, : i + 1]), name
    # a token is judged only once it has left the window
    assert not np.any(grads[3][:, i - PLAIN.window + 1 :])

  def test_scores_gradient_of_straight_through_is_that_of_value(self):
    """With gates all but hard both forwards agree, so the score gradients must too."""
    inputs, cotangent, _ = self.problem(PLAIN)
    grads = [
      output_and_gradients(self.attend(PLAIN, gate), inputs, cotangent)[-1]
      for gate in ("straight_through", "value")
    ]
    assert relative_error(*grads) < 0.5 and np.any(grads[0])

  def test_documents_do_not_mix(self):
    """A document's output is that of a row that begins with it, whatever follows."""
    inputs, cotangent, _ = self.problem(DOCUMENTS)
    run = functools.partial(output_and_gradients, self.attend(DOCUMENTS, "key_value"))
    one = jnp.ones(inputs[0].shape[:2], jnp.int32)
    packed, *_ = run(inputs, cotangent, one.at[:, 90:].set(2))
    for begin, end in ((0, 90), (90, DOCUMENTS.n)):
      first, *_ = run([jnp.roll(x, -begin, axis=1) for x in inputs], cotangent, one)
      assert self.close(packed[:, begin:end], first[:, : end - begin])

  def batch_of_two(self):
    """Returns (inputs, cotangent, attention, gradients) of two rows."""
    inputs, cotangent, _ = self.problem(self.batch)
    attention = self.attend(self.batch, "key_value")
    _, *gradients = output_and_gradients(attention, inputs, cotangent)
    return inputs, cotangent, attention, gradients

  def test_vmap_and_remat(self):
    inputs, cotangent, attention, gradients = self.batch_of_two()
    of_row = lambda *row: attention(*(y[None] for y in row))[0]
    mapped = jax.vmap(jax.checkpoint(of_row) if self.remat else of_row)
    _, *again = output_and_gradients(mapped, inputs, cotangent)
    for x, y in zip(again, gradients):
      assert self.close(x, y)

  def test_scan_and_shard_map(self):
    """Layers stacked in a scan, whose loops hand slices in and stack results: the same as one after
    the other. Of shard_map the types, on a mesh of one device; sequence_parallel_test and xla_test
    compare values over several.
    """
    (query, *rest), cotangent, attention, _ = self.batch_of_two()
    scales = jnp.array([0.5, 1.5], jnp.float32)
    scaled = lambda xs, scale: [x * scale.astype(x.dtype) for x in xs]

    def stacked(query, *rest):
      layer = lambda query, scale: (attention(query, *scaled(rest, scale)), None)
      return jax.lax.scan(layer, query, scales)[0]

    def of_shard(cotangent, *inputs):
      return jax.vjp(stacked, *inputs)[1](cotangent)

    mesh = jax.make_mesh((1, 1), ("data", "heads"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    part = jax.sharding.PartitionSpec("data", None, "heads")
    sharded = jax.shard_map(of_shard, mesh=mesh, in_specs=part, out_specs=part)
    grads = jax.jit(sharded)(cotangent, query, *rest)

    layer = lambda query, scale, cotangent: output_and_gradients(
      attention, (query, *scaled(rest, scale)), cotangent
    )
    queries = [query]
    for scale in scales[:-1]:
      queries.append(layer(queries[-1], scale, cotangent)[0])
    expected = [jnp.zeros_like(x) for x in rest]
    for query, scale in zip(queries[::-1], scales[::-1]):
      _, cotangent, *of_layer = layer(query, scale, cotangent)
      expected = [total + x for total, x in zip(expected, scaled(of_layer, scale))]
    for name, x, y in zip(ARGUMENTS, grads, (cotangent, *expected)):
      assert self.close(x, y), name

  def test_queries_of_the_last_tokens(self):
    """Queries of the last tokens see what they do among all; only their keys get gradients."""
    spec = DOCUMENTS
    inputs, cotangent, ids = self.problem(spec)
    start, end = document_bounds(ids, *inputs[0].shape[:2])
    options = api.Options(spec.k, spec.window, "key_value", spec.head_dim**-0.5)

    def attend(query, key, value, scores):
      by_head = jnp.swapaxes(scores.astype(jnp.float32), 1, 2)
      selection = select(by_head, start, end, spec.k, spec.window, True)
      return api.attend_selected(
        self.implementation, query, key, value, by_head, selection, start, end, options
      )

    for count in (spec.n - 128 if spec.n > 128 else 1, 7):
      late = jnp.zeros_like(cotangent).at[:, -count:].set(cotangent[:, -count:])
      out, d_query, *expected = output_and_gradients(
        self.attend(spec, "key_value"), inputs, late, ids
      )
      last = (inputs[0][:, -count:], *inputs[1:])
      found = output_and_gradients(attend, last, cotangent[:, -count:])
      expected = (out[:, -count:], d_query[:, -count:], *expected)
      for name, x, y in zip(("out", *ARGUMENTS), found, expected):
        assert self.close(x, y), (name, count)

  def test_repeats_to_the_bit(self):
    inputs, cotangent, _ = self.problem(PLAIN)
    first, second = (
      output_and_gradients(self.attend(PLAIN, "key_value"), inputs, cotangent) for _ in range(2)
    )
    jax.tree.map(np.testing.assert_array_equal, first, second)

  def test_scores_of_minus_infinity(self):
    """No candidates: the window alone, and zeros where there is none."""
    (q, key, v, u), cotangent, _ = self.problem(PLAIN)
    inputs = q, key, v, jnp.full_like(u, -jnp.inf)
    gate = "straight_through" if "straight_through" in self.gates else "key_value"
    out, *grads = output_and_gradients(self.attend(PLAIN, gate), inputs, cotangent)
    assert self.close(out, sparsek.sliding_window_attention(q, key, v, window=PLAIN.window))
    assert all(np.all(np.isfinite(g)) for g in grads)
    out, *grads = output_and_gradients(self.attend(NO_WINDOW, gate), inputs, cotangent)
    assert not np.any(out) and all(np.all(np.isfinite(g)) for g in grads)

  @pytest.mark.parametrize(
    "change, words",
    [
      (dict(k=0), "k=0"),
      (dict(k=2.5), "k=2.5"),
      (dict(window=-1), "window=-1"),
      (dict(gate="soft"), "gate='soft'"),
      (dict(scale="big"), "scale='big'"),
      (dict(query=(1, 8, 3, 4)), "3 heads"),
      (dict(query=(1, 8, 4)), "query must have shape"),
      (dict(key=(1, 7, 2, 4)), "key|value"),
      (dict(value=(1, 8, 2, 5)), "value"),
      (dict(scores=(1, 8, 4)), "scores must have shape"),
      (dict(segment_ids=np.zeros((1, 7), int)), "segment_ids"),
      (dict(segment_ids=np.zeros((1, 8))), "segment_ids"),
      (
        dict(query=(1, 0, 4, 4), key=(1, 0, 2, 4), value=(1, 0, 2, 4), scores=(1, 0, 2)),
        "at least one token",
      ),
      (dict(query=(1, 8, 4, 0), key=(1, 8, 2, 0), value=(1, 8, 2, 0)), "head_dim 1"),
      (dict(query=(1, 8, 0, 4)), "one head"),
    ],
  )
  def test_bad_arguments(self, change, words):
    shapes = dict(query=(1, 8, 4, 4), key=(1, 8, 2, 4), value=(1, 8, 2, 4), scores=(1, 8, 2))
    arrays = {
      name: jnp.zeros(change.get(name, shape), self.dtype) for name, shape in shapes.items()
    }
    options = {
      "k": 2,
      "window": 2,
      "implementation": self.implementation,
      **{key: x for key, x in change.items() if key not in shapes},
    }
    with pytest.raises(ValueError, match=words):
      sparsek.sparsek_attention(**arrays, **options)

  @pytest.mark.parametrize(
    "name, dtype, words",
    [
      ("query", "int32", "query must be floating"),
      ("key", "float16", "dtype"),
      ("scores", "int32", "scores must be floating"),
    ],
  )
  def test_bad_dtypes(self, name, dtype, words):
    shapes = dict(query=(1, 8, 4, 4), key=(1, 8, 2, 4), value=(1, 8, 2, 4), scores=(1, 8, 2))
    arrays = {name: jnp.zeros(shape, self.dtype) for name, shape in shapes.items()}
    arrays[name] = arrays[name].astype(dtype)
    with pytest.raises(ValueError, match=words):
      sparsek.sparsek_attention(**arrays, k=2, window=2, implementation=self.implementation)
