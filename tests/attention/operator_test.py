"""The SPARSEK operator against float64 brute force and finite differences."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import sparsek
from tests.attention import brute_force

FAMILIES = ("normal", "equal", "ties", "rising", "falling", "offset", "huge", "tiny")
# (n, k, delay): few, for every one is compiled
SHAPES = ((1, 1, 0), (33, 4, 1), (33, 1, 9), (60, 32, 0), (60, 4, 100), (60, 100, 9))


def make_scores(family, spread, n, seed):
  rng = np.random.default_rng(seed)
  x = rng.normal(size=n)
  return {
    "normal": x * spread,
    "equal": np.full(n, spread),
    "ties": rng.integers(0, 4, n) * spread,
    "rising": np.arange(n) * spread + 0.1 * x,
    "falling": -np.arange(n) * spread + 0.1 * x,
    "offset": 1000 + x * spread,
    "huge": np.where(rng.random(n) < 0.5, x, np.round(x)) * 1e30,
    "tiny": x * 1e-30,
  }[family].astype(np.float32)


def tolerance(u):
  """Gates cannot be finer than the spacing of the scores; beyond 2^23 they are 0 or 1."""
  size = float(np.max(np.abs(u), initial=1))
  return 1 if size >= 2**22 else 4 * np.spacing(np.float32(size)) + 2e-7


inputs = dict(
  family=st.sampled_from(FAMILIES),
  spread=st.sampled_from((1e-3, 0.03, 1.0, 5.0, 1e3)),
  shape=st.sampled_from(SHAPES),
  seed=st.integers(0, 2**20),
)
quick = settings(max_examples=60, deadline=None)
causal = jax.jit(sparsek.causal_sparsek, static_argnames=("k", "delay"))
operator = jax.jit(sparsek.sparsek, static_argnums=1)


class TestSparsek:
  @quick
  @given(**inputs)
  def test_gates_match_brute_force(self, family, spread, shape, seed):
    n, k, _ = shape
    z = make_scores(family, spread, n, seed)
    p = np.asarray(operator(z, k))
    np.testing.assert_allclose(p, brute_force.gates(z, k), atol=tolerance(z), rtol=0)
    assert np.all(p[list(brute_force.top_k(z, k))] > 0) and p.min() >= 0 and p.max() <= 1
    if family != "huge":
      np.testing.assert_allclose(p.sum(), min(k, n), atol=n * tolerance(z))

  def test_huge_ties_keep_gate_one(self):
    np.testing.assert_array_equal(
      sparsek.sparsek(jnp.array([1e30, 1e30, 2e30, -1e30]), 2), [1, 1, 1, 0]
    )
    np.testing.assert_array_equal(
      sparsek.sparsek(jnp.array([1e30, 1e30, 1e30, 5.0, -2.0]), 2), [1, 1, 1, 0, 0]
    )

  @pytest.mark.parametrize("spread", (0.05, 1.0, 3.0))
  def test_gradient_matches_finite_differences(self, spread):
    rng = np.random.default_rng(0)
    z, cotangent, step = rng.normal(size=40) * spread, rng.normal(size=40), 1e-7
    f = lambda z: cotangent @ brute_force.gates(z, 7)
    expected = [(f(z + step * e) - f(z - step * e)) / (2 * step) for e in np.eye(40)]
    gradient = jax.grad(lambda z: jnp.sum(cotangent.astype(np.float32) * sparsek.sparsek(z, 7)))(
      jnp.float32(z)
    )
    np.testing.assert_allclose(gradient, expected, atol=2e-5)
    assert np.any(np.abs(expected) > 0.1)

  def test_zero_gradient_where_nothing_is_fractional(self):
    z = jnp.array([5.0, 3.0, 1.0, -1.0])
    np.testing.assert_array_equal(sparsek.sparsek(z, 2), [1, 1, 0, 0])
    np.testing.assert_array_equal(
      jax.jacobian(lambda z: sparsek.sparsek(z, 2))(z), np.zeros((4, 4))
    )
    np.testing.assert_array_equal(
      jax.jacobian(lambda z: sparsek.sparsek(z, 9))(z), np.zeros((4, 4))
    )

  def test_non_finite_scores(self):
    z = jnp.array([jnp.inf, -jnp.inf, 0.5, 0.25, -jnp.inf])
    np.testing.assert_allclose(sparsek.sparsek(z, 2), [1, 0, 0.625, 0.375, 0], atol=1e-6)
    np.testing.assert_array_equal(sparsek.sparsek(z, 3), [1, 0, 1, 1, 0])
    rows = sparsek.sparsek(jnp.array([[0.0, jnp.nan], [0.0, 1.0]]), 1)
    assert np.all(np.isnan(rows[0])) and not np.any(np.isnan(rows[1]))

  def test_batch_axes_dtype_and_vmap(self):
    z = jax.random.normal(jax.random.key(0), (2, 3, 17))
    rows = sparsek.sparsek(z, 4)
    np.testing.assert_array_equal(rows[1, 2], sparsek.sparsek(z[1, 2], 4))
    np.testing.assert_array_equal(rows, jax.vmap(lambda z: sparsek.sparsek(z, 4))(z))
    assert sparsek.sparsek(z.astype(jnp.bfloat16), 4).dtype == jnp.bfloat16

  @pytest.mark.parametrize(
    "scores, k, words",
    [([1.0, 2.0], 0, "k=0"), ([1.0, 2.0], 1.5, "k=1.5"), ([1, 2], 1, "int32"), (1.0, 1, "axis")],
  )
  def test_bad_arguments(self, scores, k, words):
    with pytest.raises(ValueError, match=words):
      sparsek.sparsek(jnp.asarray(scores), k)


def check_causal(u, k, delay, segment_ids, tol):
  """Thresholds and expiry of scores [n] against brute force; returns the gates found."""
  n = len(u)
  ids = None if segment_ids is None else jnp.asarray(segment_ids)[None]
  tau, expiry = (
    np.asarray(x)[0, :, 0] for x in causal(u[None, :, None], k=k, delay=delay, segment_ids=ids)
  )
  segments = np.zeros(n, int) if segment_ids is None else segment_ids
  expected, selected = brute_force.causal_gates(u, k, delay, segments)
  index = np.arange(n)
  for first, end in brute_force.documents(segments):
    assert np.all(np.diff(np.where(np.isneginf(tau[first:end]), -3e38, tau[first:end])) >= 0)
    for i in range(first, end):
      candidate = (index >= first) & (index <= i - delay) & (u > -np.inf)
      assert np.isneginf(tau[i]) == (candidate.sum() <= k)
      with np.errstate(over="ignore", invalid="ignore"):
        gate = np.where(candidate, np.clip(u.astype(np.float64) - tau[i], 0, 1), 0)
      np.testing.assert_allclose(gate, expected[i], atol=tol, rtol=0)
      chosen = set(np.flatnonzero((index >= first) & (index + delay <= i) & (i < expiry)).tolist())
      assert chosen == selected[i]
      assert np.all(gate[list(chosen)] > 0)
  assert np.all(expiry <= n)


class TestCausalSparsek:
  @quick
  @given(**inputs)
  def test_matches_brute_force(self, family, spread, shape, seed):
    n, k, delay = shape
    u = make_scores(family, spread, n, seed)
    check_causal(u, k, delay, None, tolerance(u))

  @quick
  @given(**inputs, cuts=st.lists(st.integers(0, 59), max_size=6))
  def test_documents_restart(self, family, spread, shape, seed, cuts):
    n, k, delay = shape
    u = make_scores(family, spread, n, seed)
    # ids may return later: a run is a document
    ids = np.searchsorted(np.sort(cuts), np.arange(n), side="right") % 3 + 1
    check_causal(u, k, delay, ids, tolerance(u))

  def test_many_tokens(self):
    """Sums over a long row do not round, whatever the scores were before."""
    n, k = 20000, 50
    u = (np.random.default_rng(0).normal(size=n) * 2 + np.linspace(0, 3000, n)).astype(np.float32)
    tau = np.asarray(causal(u[None, :, None], k=k, delay=3).threshold)[0, :, 0]
    for i in (5000, 12345, n - 1):
      z = u[: i - 2].astype(np.float64)
      np.testing.assert_allclose(
        np.clip(z - tau[i], 0, 1), np.clip(z - brute_force_tail(z, k), 0, 1), atol=3e-4
      )

  def test_non_finite_scores(self):
    u = make_scores("normal", 2.0, 33, 3)
    u[[0, 1, 7, 20]] = -np.inf
    check_causal(u, 4, 1, None, tolerance(u[np.isfinite(u)]))
    u[[3, 4, 5, 6, 8]] = np.inf
    _, expiry = (np.asarray(x)[0, :, 0] for x in causal(u[None, :, None], k=4, delay=1))
    assert set(np.flatnonzero((np.arange(33) < 32) & (expiry > 32))) == {3, 4, 5, 6}
    u = make_scores("normal", 2.0, 33, 3)
    u[10] = np.nan
    ids = (np.arange(33) >= 20)[None].astype(np.int32)
    tau, expiry = (
      np.asarray(x)[0, :, 0] for x in causal(u[None, :, None], k=4, delay=2, segment_ids=ids)
    )
    assert (
      not np.any(np.isnan(tau[:12]))
      and np.all(np.isnan(tau[12:20]))
      and not np.any(np.isnan(tau[20:]))
    )
    assert expiry[10] <= 12

  @pytest.mark.parametrize("spread", (0.05, 1.0, 4.0))
  @pytest.mark.parametrize("ids", (None, np.repeat([1, 2, 3], [5, 30, 10])))
  def test_gradient_matches_finite_differences(self, spread, ids):
    rng = np.random.default_rng(1)
    n, k, delay, step = 45, 6, 2, 1e-7
    u, cotangent = rng.normal(size=n) * spread, rng.normal(size=n)
    segments = np.zeros(n, int) if ids is None else ids

    def total(u):
      out = 0.0
      for first, end in brute_force.documents(segments):
        for i in range(first, end):
          z = u[first : max(first, i - delay + 1)]
          tau = brute_force.threshold(z, k)
          # elsewhere tau is not unique and only the gates, constant there, matter
          if np.any((z - 1 < tau) & (z > tau)):
            out += cotangent[i] * tau
      return out

    expected = [(total(u + step * e) - total(u - step * e)) / (2 * step) for e in np.eye(n)]

    def loss(u):
      tau = sparsek.causal_sparsek(
        u[None, :, None],
        k,
        delay=delay,
        segment_ids=None if ids is None else jnp.asarray(ids)[None],
      ).threshold[0, :, 0]
      return jnp.sum(jnp.where(tau > -jnp.inf, tau, 0) * cotangent.astype(np.float32))

    np.testing.assert_allclose(jax.grad(loss)(jnp.float32(u)), expected, atol=1e-5)
    assert np.any(np.abs(expected) > 0.1)

  def test_zero_gradient_where_nothing_is_fractional(self):
    u = jnp.arange(20.0)[None, :, None] * 3
    assert np.isfinite(sparsek.causal_sparsek(u, 4).threshold[0, 4:]).all()
    finite_sum = lambda u: jnp.sum(
      jnp.where(jnp.isfinite(tau := sparsek.causal_sparsek(u, 4).threshold), tau, 0)
    )
    np.testing.assert_array_equal(jax.grad(finite_sum)(u), np.zeros((1, 20, 1)))

  def test_heads_and_rows_are_independent(self):
    u = jax.random.normal(jax.random.key(0), (2, 50, 3)) * 3
    whole = sparsek.causal_sparsek(u, 5, delay=4)
    one = sparsek.causal_sparsek(u[1:, :, 2:], 5, delay=4)
    np.testing.assert_array_equal(whole.threshold[1:, :, 2:], one.threshold)
    np.testing.assert_array_equal(whole.expiry[1:, :, 2:], one.expiry)

  @pytest.mark.parametrize(
    "kwargs, words",
    [
      (dict(k=0), "k=0"),
      (dict(k=True), "k=True"),
      (dict(k=2, delay=-1), "delay=-1"),
      (dict(k=2, segment_ids=np.zeros((1, 3), int)), "segment_ids"),
      (dict(k=2, segment_ids=np.zeros((1, 8))), "segment_ids"),
      (dict(k=2, shape=(8,)), "batch, n, heads"),
      (dict(k=2, shape=(1, 0, 1)), "n=0"),
    ],
  )
  def test_bad_arguments(self, kwargs, words):
    kwargs = dict(kwargs)
    scores = jnp.zeros(kwargs.pop("shape", (1, 8, 1)))
    with pytest.raises(ValueError, match=words):
      sparsek.causal_sparsek(scores, **kwargs)


def brute_force_tail(z, k):
  """Threshold over the 2000 largest scores only: the others are far below."""
  return brute_force.threshold(np.sort(z)[-2000:], k)


def test_k_beyond_every_integer_and_rows_without_entries():
  np.testing.assert_array_equal(sparsek.sparsek(jnp.arange(3.0), 2**31), jnp.ones(3))
  assert sparsek.sparsek(jnp.zeros((3, 0)), 2).shape == (3, 0)
