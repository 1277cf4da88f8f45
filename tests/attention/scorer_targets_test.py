"""The losses that compare scores with one target a token, against their definitions in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from sparsek.attention import scorer_loss as blocks
from sparsek.attention.scorer_loss import attention_mass_loss
from sparsek.attention.scorer_targets import scorer_loss
from tests.attention.scorer_loss_base import Case, changed_scores, example
from tests.helpers import quick_jit

K = 3
CASES = {
  "documents": Case(n=40, window=2, documents=((1, 21), (2, 9), (1, 5), (0, 5))),
  "some_queries": Case(n=60, heads=3, groups=3, window=0, queries=13),
  "window_beyond_row": Case(heads=2, groups=1, window=30),
}
OPTIONS = [("mean", "divergence", True), ("max", "divergence", False), ("max", "ranking", True)]
COMPARED = [
  *(("documents", options) for options in OPTIONS),
  ("some_queries", ("max", "divergence", True)),
  ("some_queries", ("mean", "ranking", False)),
  ("window_beyond_row", ("max", "ranking", True)),
]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
  """Computes few queries at once, so that there are several blocks, the last one filled up."""
  monkeypatch.setattr(blocks, "BLOCK_LOGITS", 2 * 4 * 40 * 7)


def value_of(case):
  """Returns values [2, n, G, D] whose norms differ."""
  rng = np.random.default_rng(1)
  shape = 2, case.n, case.groups, case.head_dim
  return jnp.asarray(rng.normal(size=shape) * np.exp(rng.normal(size=(*shape[:3], 1))), jnp.float32)


def written_out(scores, query, key, value, queries, case, options):
  """Returns the loss by its definition, over all pairs of queries and tokens at once."""
  target, kind, value_norm = options
  ids = np.ones((2, case.n)) if case.segment_ids is None else case.segment_ids
  of_row = functools.partial(_row_written_out, target, kind, value_norm, case.window)
  return sum(of_row(*(x[b] for x in (scores, query, key, value, queries, ids))) for b in range(2))


def _row_written_out(target, kind, value_norm, window, scores, query, key, value, queries, ids):
  i, j = np.asarray(queries)[:, None], np.arange(len(ids))
  document = np.cumsum(np.append(True, np.diff(ids) != 0))
  seen = (document[i] == document) & (j <= i)
  candidate, counted = seen & (j + window <= i), ids[i] != 0
  total, groups = 0.0, key.shape[1]
  for g, queries_of_g in enumerate(jnp.split(query[i[:, 0]], groups, axis=1)):
    logits = jnp.einsum("ihd,jd->hij", queries_of_g, key[:, g]) / key.shape[-1] ** 0.5
    attention = jnp.mean(jax.nn.softmax(jnp.where(seen, logits, -jnp.inf)), axis=0)
    reads = jnp.where(candidate & counted, attention, 0)
    t = jnp.max(reads, axis=0)
    if target == "mean":
      t = jnp.sum(reads, axis=0) / np.maximum(np.sum(candidate & counted, axis=0), 1)
    t *= jnp.linalg.norm(value[:, g], axis=-1) if value_norm else 1
    losses = jax.vmap(functools.partial(KINDS[kind], scores[:, g], t))(candidate)
    total += jnp.sum(jnp.where(counted[:, 0], losses, 0)) / max(np.sum(counted), 1) / groups
  return total


def divergence(u, t, candidate):
  t, has_any = jnp.where(candidate, t, 0), jnp.any(candidate)
  share = t / jnp.where(has_any, jnp.sum(t), 1)
  expected = jax.nn.softmax(jnp.where(candidate, u, -1e9))
  ratio = jnp.where(share > 0, share, 1) / jnp.where(share > 0, expected, 1)
  return jnp.where(has_any, jnp.sum(share * jnp.log(ratio)), 0)


def cut(u, t, candidate):
  """Returns the distance of scores to their cut, log ratios of targets, and what counts."""
  u_cut, t_cut = (jnp.sort(jnp.where(candidate, x, -jnp.inf))[-K] for x in (u, t))
  counts = candidate & (jnp.sum(candidate) > K)
  ratio = jnp.where(counts, t, 1) / jnp.where(counts, t_cut, 1)
  return jnp.where(counts, u - lax.stop_gradient(u_cut), 0), jnp.log(ratio), counts


def ranking(u, t, candidate):
  distance, gap, counts = cut(u, t, candidate)
  weight = jnp.where(counts, jnp.minimum(1, jnp.abs(gap)), 0)
  losses = weight * jax.nn.softplus(jnp.where(gap >= 0, -distance, distance))
  over = lambda side: jnp.sum(losses * side) / jnp.maximum(jnp.sum(weight * side), 1e-30)
  return over(gap >= 0) / 2 + over(gap < 0) / 2


KINDS = {"divergence": divergence, "ranking": ranking}


def loss_of(case, options, **others):
  """Returns the loss of (scores, query, key, value, queries)."""
  target, kind, value_norm = options
  fields = {"k": K, "window": case.window, "segment_ids": case.segment_ids} | others
  return functools.partial(scorer_loss, target=target, kind=kind, value_norm=value_norm, **fields)


@pytest.mark.parametrize("name, options", COMPARED, ids=str)
def test_value_and_gradient(name, options):
  case = CASES[name]
  (scores, query, key), queries = example(case)
  arrays = scores, query, key, value_of(case)
  run = jax.value_and_grad(lambda *args: 3 * loss_of(case, options)(*args, queries), (0, 1, 2, 3))
  got, gradients = quick_jit(run)(*arrays)
  with jax.enable_x64(True):
    exact = [jnp.asarray(np.asarray(x), jnp.float64) for x in arrays]
    of_scores = lambda u: written_out(u, *exact[1:], np.asarray(queries), case, options)
    want, gradient = map(np.asarray, jax.jit(jax.value_and_grad(of_scores))(exact[0]))
  np.testing.assert_allclose(got, 3 * want, rtol=1e-4, atol=1e-6)
  np.testing.assert_allclose(gradients[0], 3 * gradient, rtol=1e-3, atol=2e-6)
  assert not any(map(np.any, gradients[1:]))
  empty = case.window >= case.n
  assert (want > 1e-3) != empty and np.any(gradient) != empty


def test_the_default_is_the_loss_of_attention_mass():
  case = CASES["documents"]
  (scores, query, key), queries = example(case)
  got = loss_of(case, ("mean", "divergence", False))(scores, query, key, value_of(case), queries)
  same = {"window": case.window, "segment_ids": case.segment_ids}
  assert got == attention_mass_loss(scores, query, key, queries, **same)


@pytest.mark.parametrize("options", OPTIONS[1:], ids=lambda options: "-".join(map(str, options)))
def test_what_no_query_sees_does_not_matter_and_scores_may_be_large(options):
  case = Case(n=50, window=1, documents=((1, 20), (2, 20), (1, 10)))
  (scores, query, key), _ = example(case)
  value, seen = value_of(case), jnp.zeros((2, 50), bool).at[:, 20:30].set(True)
  queries = jnp.tile(jnp.asarray([[22, 27, 29]], jnp.int32), (2, 1))
  run = quick_jit(
    jax.value_and_grad(
      loss_of(
        case,
        options,
        segment_ids=np.tile(np.repeat([1, 2, 1], [20, 20, 10]).astype(np.int32), (2, 1)),
      )
    )
  )
  poisoned = lambda x: jnp.where(seen.reshape(2, 50, *[1] * (x.ndim - 2)), x, jnp.nan)
  want = run(scores, query, key, value, queries)
  got = run(*(poisoned(x) for x in (scores,)), query, *map(poisoned, (key, value)), queries)
  np.testing.assert_array_equal(got[0], want[0])
  np.testing.assert_array_equal(got[1], want[1])
  assert want[0] > 0 and not np.any(want[1][~np.asarray(seen)])
  for change in ("equal", "large", "falling"):
    loss, gradient = run(changed_scores(scores, change), query, key, value, queries)
    assert np.isfinite(loss) and np.all(np.isfinite(gradient)) and np.any(gradient)


def test_scores_that_are_logarithms_of_the_targets_have_no_loss():
  case = Case(n=60, heads=2, groups=2, window=4)
  (drawn, query, key), queries = example(case)
  options = {kind: ("max", kind, True) for kind in KINDS}
  arrays = query, key, value_of(case), queries
  attention = jnp.einsum("bihd,bjhd->bhij", query, key) / case.head_dim**0.5
  i, j = np.arange(60)[:, None], np.arange(60)
  attention = jax.nn.softmax(jnp.where(j <= i, attention, -jnp.inf))
  later = jnp.where(
    (j + 4 <= i) & (queries[..., None] == i.T).any(1)[:, None, :, None], attention, 0
  )
  targets = jnp.max(later, axis=2).swapaxes(1, 2) * jnp.linalg.norm(arrays[2], axis=-1)
  for kind, option in options.items():
    loss = quick_jit(loss_of(case, option))
    far, near = loss(drawn, *arrays), loss(jnp.log(targets) + 7, *arrays)
    assert near < (0.6 if kind == "ranking" else 0.01) * far, (kind, near, far)


@pytest.mark.parametrize("change", [{"target": "median"}, {"kind": "hinge"}])
def test_unknown_names_are_refused(change):
  case = CASES["window_beyond_row"]
  (scores, query, key), queries = example(case)
  with pytest.raises(ValueError, match="|".join(change.values())):
    scorer_loss(scores, query, key, value_of(case), queries, k=K, window=2, **change)
