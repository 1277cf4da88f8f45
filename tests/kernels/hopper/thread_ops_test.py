"""The logic of the kernels of single threads, emulated lane by lane in NumPy: their loads and
stores are inlined instructions, which no interpreter knows.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl

from sparsek.attention import prefix_selection
from sparsek.attention.documents import document_bounds
from sparsek.kernels import prefix_events, tiles
from sparsek.kernels import rms_norm as norms
from sparsek.kernels.hopper import (
  gather_rows,
  prefix_gradients,
  rms_norm,
  selection_lists,
  sorting,
  staircase,
  staircase_sums,
  staircase_tile,
  thread_ops,
  thread_sums,
)
from sparsek.kernels.hopper import prefix_thresholds as hopper_thresholds
from sparsek.kernels.sentinels import NEVER
from sparsek.kernels.sort_keys import INTEGERS
from sparsek.kernels.specs import make_scores


class Ref:
  """A reference to a NumPy array; `at` gives views. All lanes must stay inside, used or not."""

  def __init__(self, array):
    self.array = array
    self.shape, self.ndim, self.dtype = array.shape, array.ndim, array.dtype

  at = property(lambda self: self)

  def __getitem__(self, index):
    if index is Ellipsis:
      return jnp.asarray(self.array)
    index = tuple(int(i) for i in (index if isinstance(index, tuple) else (index,)))
    part = self.array[index]
    return Ref(part) if isinstance(part, np.ndarray) else part

  def indices(self, index, offset, stride):
    """Returns the indices of the elements in 16 bytes, in each lane."""
    indices = (np.asarray(index, np.int64) * stride + np.asarray(offset))[:, None] + np.arange(
      16 // self.dtype.itemsize
    )
    assert indices.min() >= 0 and indices.max() < self.array.size
    return indices


def gather(ref, index):
  assert ref.ndim == 1 and np.min(index) >= 0 and np.max(index) < ref.shape[0]
  return jnp.asarray(ref.array[np.asarray(index)])


def gather_bytes(ref, index, offset, stride):
  words = ref.array.reshape(-1)[ref.indices(index, offset, stride)].view(np.int32)
  return tuple(jnp.asarray(x) for x in words.T)


def scatter(ref, index, value, where, atomic=None):
  where = np.broadcast_to(where, np.shape(index))
  index, value = np.asarray(index)[where], np.broadcast_to(value, where.shape)[where]
  assert np.all((index >= 0) & (index < ref.shape[0])) and (atomic or len(set(index)) == len(index))
  {None: lambda *args: ref.array.__setitem__(*args[1:]), "add": np.add.at, "min": np.minimum.at}[
    atomic
  ](ref.array, index, value)


def scatter_bytes(ref, index, offset, stride, values, where):
  where = np.asarray(where)
  indices = ref.indices(np.where(where, index, 0), np.where(where, offset, 0), stride)[where]
  assert len(set(indices.ravel())) == indices.size
  ref.array.reshape(-1)[indices] = (
    np.stack([np.broadcast_to(x, where.shape) for x in values], axis=-1)
    .astype(np.int32)[where]
    .view(ref.dtype)
  )


def widen(words, dtype):
  return list(jnp.asarray(np.stack(words, axis=-1).view(dtype).astype(np.float32)).T)


def narrow(numbers, dtype):
  return list(jnp.asarray(np.stack(numbers, axis=-1).astype(dtype).view(np.int32)).T)


def warp_prefix_sums(x):
  return jnp.cumsum(x.reshape(-1, 32), axis=1, dtype=x.dtype).reshape(-1)


def warp_value(x, lane):
  return jnp.repeat(x.reshape(-1, 32)[:, lane], 32)


def warp_count(flag):
  return jnp.repeat(jnp.sum(flag.reshape(-1, 32), axis=1, dtype=jnp.int32), 32)


def shuffle_xor(x, distance):
  return x[np.arange(thread_ops.LANES) ^ distance]


def poisoned(x):
  """Returns a Ref of that shape and dtype that nobody has written."""
  return Ref(
    np.full(
      x.shape, np.nan if jnp.issubdtype(x.dtype, jnp.inexact) else np.iinfo(x.dtype).min, x.dtype
    )
  )


def kernel(body, rows, size, *extra, name, out_type=(), scratch_types=()):
  def run(*args):
    out = jax.tree.map(poisoned, list(out_type))
    args = jax.tree.map(lambda x: x if isinstance(x, Ref) else Ref(np.array(x)), args)
    extras = extra[0] if extra else 1
    lanes = jnp.arange(thread_ops.LANES, dtype=jnp.int32)
    for program, (block, row, e) in enumerate(
      itertools.product(range(-(-size // thread_ops.LANES)), range(rows), range(extras))
    ):
      current["sparsek_program"] = program
      scratch = jax.tree.map(poisoned, list(scratch_types))
      body(row, e, lanes + block * thread_ops.LANES, *args, *out, *scratch)
    return jax.tree.map(lambda x: jnp.asarray(x.array), out)

  return run


current = {}


def fori_loop(low, high, body, state):
  for i in range(low, int(high)):
    state = body(i, state)
  return state


def while_loop(condition, body, state):
  while condition(state):
    state = body(state)
  return state


def loop(low, high):
  def run(body):
    for i in range(low, high):
      body(i)

  return run


def when(condition):
  def run(body):
    if condition:
      body()

  return run


@pytest.fixture
def emulated(monkeypatch):
  functions = (
    gather,
    gather_bytes,
    scatter,
    scatter_bytes,
    widen,
    narrow,
    shuffle_xor,
    warp_count,
    warp_value,
    warp_prefix_sums,
    kernel,
  )
  for module in (
    thread_ops,
    selection_lists,
    gather_rows,
    hopper_thresholds,
    prefix_gradients,
    staircase,
    staircase_sums,
    staircase_tile,
    sorting,
    thread_sums,
    rms_norm,
  ):
    for f in functions:
      monkeypatch.setattr(module, f.__name__, f, raising=False)
  lanes = jnp.arange(thread_ops.LANES, dtype=jnp.int32)
  for module in (gather_rows, rms_norm):
    monkeypatch.setattr(module, "lane_index", lambda: lanes)
  for module in (selection_lists, sorting, staircase_sums, thread_sums):
    monkeypatch.setattr(module, "sync_threads", lambda: None)
  monkeypatch.setattr(staircase_tile, "sync_warp", lambda: None)
  for module in (gather_rows, hopper_thresholds, selection_lists, staircase, staircase_tile):
    monkeypatch.setattr(module, "warp_any", jnp.any)
  monkeypatch.setattr(jax, "new_ref", lambda x: Ref(np.array(x)))
  monkeypatch.setattr(jax.lax, "axis_index", current.__getitem__)
  monkeypatch.setattr(jax.lax, "fori_loop", fori_loop)
  monkeypatch.setattr(jax.lax, "while_loop", while_loop)
  monkeypatch.setattr(pl, "loop", loop)
  monkeypatch.setattr(pl, "when", when)


def make(n, packed, kind):
  rng = np.random.default_rng(n)
  scores = rng.normal(size=(2, 2, n)).astype(np.float32) * 2
  if kind == "ties":
    scores = np.round(scores)
    scores[0, 0, n // 2] = np.nan
    scores[1, 1, ::5] = -np.inf
  if kind == "rising":
    scores = 0.05 * scores + 0.05 * np.arange(n, dtype=np.float32)
  ids = np.sort(rng.integers(0, 5, (2, n)), axis=1) if packed else np.zeros((2, n), int)
  start, end = document_bounds(jnp.asarray(ids), 2, n)
  return (
    jnp.asarray(scores),
    start,
    end,
    jnp.asarray(rng.normal(size=scores.shape).astype(np.float32)),
  )


@pytest.mark.parametrize(
  "n, k, delay, packed, kind, copied, block",
  [
    (1, 1, 0, False, "normal", 512, None),
    (133, 5, 9, False, "normal", 512, None),
    (150, 4, 3, True, "ties", 512, None),
    (150, 4, 3, True, "ties", 0, None),
    (700, 9, 20, False, "normal", 512, 512),  # tiles that take several batches
    (700, 64, 0, False, "rising", 512, None),  # the staircase ends far above the last query
  ],
)
def test_selection(n, k, delay, packed, kind, copied, block, monkeypatch, request):
  monkeypatch.setattr(staircase_tile, "COPIED", copied)
  if block:
    tiling = prefix_events.Tiling(block, -(-n // block))
    monkeypatch.setattr(staircase, "outer_tiling", lambda _: tiling)
  scores, start, end, cotangent = make(n, packed, kind)
  expected, vjp = jax.vjp(
    lambda scores: prefix_selection.select(scores, start, end, k, delay, packed)[0], scores
  )
  (_, expected_expiry, expected_order), gradient = (
    prefix_selection.select(scores, start, end, k, delay, packed),
    vjp(cotangent)[0],
  )
  request.getfixturevalue("emulated")
  monkeypatch.setattr(hopper_thresholds, "over_batch", lambda f, *args: f(*args))
  for module, f in (
    (sorting, "sort"),
    (hopper_thresholds, "_solve"),
    (prefix_gradients, "_scores_gradient"),
  ):
    monkeypatch.setattr(module, f, getattr(module, f).__wrapped__)
  threshold, expiry, order = prefix_selection.select.fun.__wrapped__(
    scores, start, end, k, delay, packed, True
  )
  np.testing.assert_array_equal(threshold, expected)
  np.testing.assert_array_equal(expiry, expected_expiry)
  np.testing.assert_array_equal(order, expected_order)
  result = prefix_gradients.scores_gradient(cotangent, scores, threshold, end, delay)
  np.testing.assert_allclose(result, gradient, rtol=1e-5, atol=1e-6)


@pytest.mark.gpu
@pytest.mark.parametrize(
  "n, k, delay, packed, family",
  [
    (4096, 100, 100, False, "normal"),
    (20000, 512, 500, True, "ties"),
    (33000, 512, 0, False, "rising"),
    (5000, 300, 77, True, "huge"),
    (70, 500, 9, True, "tiny"),
  ],
)
def test_kernels_match_plain_selection(n, k, delay, packed, family):
  """The tests of attention cannot find errors in long rows: all implementations there take the
  thresholds from these kernels.
  """
  scores = make_scores(family, jax.random.key(n), (2, n, 3)).swapaxes(1, 2)
  start, end = document_bounds(
    jnp.sort(jax.random.randint(jax.random.key(1), (2, n), 0, 5), axis=1) if packed else None, 2, n
  )
  cotangent = jax.random.normal(jax.random.key(2), scores.shape)

  def run(kernels):
    selection, vjp = jax.vjp(
      lambda scores: prefix_selection.select(scores, start, end, k, delay, packed, kernels), scores
    )
    return *selection, *vjp(
      (cotangent, *(np.zeros(x.shape, jax.dtypes.float0) for x in selection[1:]))
    )

  *results, gradient = run(True)
  *expected, expected_gradient = run(False)
  for x, y in zip(results, expected):
    np.testing.assert_array_equal(x, y)
  np.testing.assert_allclose(gradient, expected_gradient, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
  "n, k, window, chunk, rise",
  [(128, 1, 0, 128, 0.0), (512, 20, 30, 256, 0.004), (768, 300, 1, 128, 0.1)],
)
def test_lists(n, k, window, chunk, rise, request, monkeypatch):
  batch, groups = (2, 2) if n < 500 else (1, 2)
  monkeypatch.setattr(selection_lists, "SEGMENTS", 4)  # the last of longer segments is not full
  scores = jax.random.normal(jax.random.key(n), (batch, groups, n)) + rise * jnp.arange(n)
  start, end = document_bounds(jnp.arange(batch * n).reshape(batch, n) // (n // 3 + 1), batch, n)
  _, expiry, order = prefix_selection.select(scores, start, end, k, window, True)
  expected = jax.vmap(
    jax.vmap(functools.partial(tiles.selection_lists, k=k, window=window, chunk=chunk))
  )(expiry, order)
  window_start = jnp.maximum(jnp.arange(n) - window + 1, start)
  lifetimes, blocks = tiles.list_tiles(expected), ((64, 128), (64, 64))
  bounds = [
    tiles.query_bounds(lifetimes, window_start, chunk=chunk, block_q=block_q, block_kv=block_kv)
    for block_q, block_kv in blocks
  ]
  request.getfixturevalue("emulated")
  results = selection_lists.selection_lists(expiry, order, k=k, window=window, chunk=chunk)
  held = expected.old_count > 0
  for name, x, y in zip(results._fields, results, expected):
    assert x.shape == y.shape and x.dtype == y.dtype, name
    if name == "old_begin":
      x, y = x[held], y[held]
    elif name == "old_place":  # of the copies that there are
      there = jnp.arange(x.shape[-1]) < jnp.sum(expected.old_count, axis=-1, keepdims=True)
      x, y = x[there], y[there]
    np.testing.assert_array_equal(x, y, err_msg=name)
  results = selection_lists.bound_tiles(expected, window_start, chunk=chunk, blocks=blocks)
  jax.tree.map(np.testing.assert_array_equal, results, (lifetimes, bounds))


@pytest.mark.parametrize("dim, dtype, chunk", [(64, jnp.bfloat16, 256), (128, jnp.float16, 64)])
def test_rows(dim, dtype, chunk, request, monkeypatch):
  """Tokens in many lists, in the second case."""
  monkeypatch.setattr(gather_rows, "PROGRAMS", 4)  # each takes several tokens
  n, k, window, groups = 512, 20, 30, 2
  keys = jax.random.split(jax.random.key(dim), 8)
  scores = jax.random.normal(keys[0], (1, groups, n)) + 0.004 * jnp.arange(n)
  start, end = document_bounds(None, 1, n)
  _, expiry, order = prefix_selection.select(scores, start, end, k, window, False)
  lists = jax.vmap(
    jax.vmap(functools.partial(tiles.selection_lists, k=k, window=window, chunk=chunk))
  )(expiry, order)
  request.getfixturevalue("emulated")
  key, value, dkey, dvalue = (
    jax.random.normal(x, (1, n, groups, dim)).astype(dtype) for x in keys[1:5]
  )
  listed_key, listed_value, listed_score = gather_rows.gather_rows(key, value, scores, lists)
  places = listed_score.shape[-1]
  used = (lists.first < NEVER).reshape(1, groups, -1)
  token = lists.token.reshape(1, groups, -1)
  for g in range(groups):
    at = np.flatnonzero(used[0, g])
    for listed, x in (
      (listed_key, key[0, :, g]),
      (listed_value, value[0, :, g]),
      (listed_score, scores[0, g]),
    ):
      np.testing.assert_array_equal(listed[0, g][at], x[token[0, g][at]])
  # Gradients of places without a token may hold anything.
  rows = [
    jnp.where(used.reshape(1, groups, places, *[1] * (x.ndim - 3)), x, jnp.nan)
    for x in (
      jax.random.normal(keys[5], (1, groups, places, dim)).astype(dtype),
      jax.random.normal(keys[6], (1, groups, places, dim)).astype(dtype),
      jax.random.normal(keys[7], (1, groups, places)),
    )
  ]
  results = gather_rows.sum_rows(dkey, dvalue, rows, lists)
  for g in range(groups):
    at = np.flatnonzero(used[0, g])
    for result, window_part, row in zip(
      results, (dkey[0, :, g], dvalue[0, :, g], jnp.zeros(n)), rows
    ):
      expected = np.array(window_part, np.float64)
      np.add.at(expected, np.asarray(token[0, g][at]), np.asarray(row[0, g][at], np.float64))
      result = result[0, g] if result.ndim == 3 else result[0, :, g]
      np.testing.assert_allclose(
        np.asarray(result, np.float64), expected, atol=0.04 if dtype == jnp.bfloat16 else 0.006
      )


@pytest.mark.parametrize("n", [1, 300, 513, 700])
def test_sort(n, emulated, monkeypatch):
  """Parts of 64 elements, merged by three: twice, or once, or not at all."""
  monkeypatch.setattr(sorting, "SMALLEST", 32)
  monkeypatch.setattr(sorting, "LARGEST", 64)
  monkeypatch.setattr(sorting, "FAN", 3)
  key = np.random.default_rng(n).integers(-n, n // 2, (2, n)).astype(np.int32)
  ranked, order = sorting.sort.__wrapped__(INTEGERS, jnp.asarray(key))
  expected = np.stack([np.lexsort((-np.arange(n), row)) for row in key])
  np.testing.assert_array_equal(order, expected)
  np.testing.assert_array_equal(ranked, np.take_along_axis(key, expected, axis=1))


@pytest.mark.parametrize("batch, n, width, programs", [(1, 3, 256, 1), (2, 21, 512, 2)])
def test_rms_norm(batch, n, width, programs, emulated, monkeypatch):
  """Against float64; rows that a warp does not have are not written and not counted."""
  monkeypatch.setattr(rms_norm, "PROGRAMS", 1)
  monkeypatch.setattr(rms_norm, "MULTIPROCESSORS", programs)
  random, epsilon = np.random.default_rng(n), 0.5
  scale = random.normal(size=(batch, width)).astype(np.float32)
  x, d_x, d_normed = (
    jnp.asarray(random.normal(size=(batch, n, width)), jnp.bfloat16) for _ in range(3)
  )
  normed = rms_norm.rms_norm(x, scale, epsilon)
  got = rms_norm.rms_norm_gradients(x, scale, d_x, d_normed, epsilon)

  def definition(x, scale):
    return x / jnp.sqrt(jnp.mean(x**2, axis=-1, keepdims=True) + epsilon) * scale[:, None]

  with jax.enable_x64(True):
    wide = [np.asarray(a.astype(jnp.float32), np.float64) for a in (x, d_x, d_normed)]
    want_normed, vjp = jax.vjp(definition, jnp.asarray(wide[0]), jnp.asarray(scale, jnp.float64))
    want_normed, want_x, want_scale = map(np.asarray, (want_normed, *vjp(jnp.asarray(wide[2]))))
  narrow_error = lambda a, b: np.max(np.abs(np.asarray(a, np.float64) - b) / (np.abs(b) + 0.1))
  assert narrow_error(normed, want_normed) < 2**-8
  assert narrow_error(got[0], wide[1] + want_x) < 2**-8
  np.testing.assert_allclose(got[1], want_scale, rtol=1e-4, atol=1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(1, 32768, 768), (3, 1001, 1536), (600, 5, 256)])
def test_rms_norm_kernels(shape):
  """The kernels against XLA's norm, also mapped over a further axis."""
  keys = jax.random.split(jax.random.key(1), 4)
  x, d_x, d_normed = (jax.random.normal(key, (2, *shape), jnp.bfloat16) for key in keys[:3])
  scale = 1 + jax.random.normal(keys[3], shape[-1:]) / 8

  def plain(x, scale):
    return x, norms.rms_norm(x, scale, 1e-6)

  def branched(x, scale):
    out = norms.branched_rms_norm(x, scale, 1e-6)
    assert norms.has_kernels(x)
    return out

  def run(norm, x, cotangents):
    (_, normed), vjp = jax.vjp(norm, x, scale)
    return normed, *vjp(cotangents)

  def mapped(norm):
    return jax.jit(jax.vmap(lambda *args: run(norm, args[0], args[1:])))(x, d_x, d_normed)

  for got, want in zip(mapped(branched), mapped(plain)):
    got, want = (np.asarray(a.astype(jnp.float32)) for a in (got, want))
    assert np.max(np.abs(got - want)) < 2**-6 * np.max(np.abs(want))
