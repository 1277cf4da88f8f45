"""Behaviours of the scorers' loss that every implementation is tested for, against its definition,
written out in float64 over all pairs.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsek.attention.scorer_loss import attention_mass_loss, sample_queries
from tests.helpers import quick_jit


class Case(NamedTuple):
  """A problem: two rows, whose documents have these ids, a run of a number of tokens each."""

  n: int = 20
  heads: int = 4
  groups: int = 2
  head_dim: int = 8
  window: int = 4
  scale: float | None = None
  documents: tuple = ()  # (id, tokens) of the first row; the second has them reversed
  queries: int | None = None  # all by default

  @property
  def segment_ids(self) -> np.ndarray | None:
    """The documents of both rows, [2, n], or None."""
    if not self.documents:
      return None
    row = np.repeat(*np.transpose(self.documents)).astype(np.int32)
    return np.stack([row, row[::-1]])


DOCUMENTS = ((1, 9), (2, 6), (0, 5))
CASES = {
  "documents": Case(documents=DOCUMENTS),
  "one_group": Case(heads=3, groups=1, window=0, scale=0.2, documents=DOCUMENTS),
  "window_1": Case(heads=2, window=1),
  "window_beyond_row": Case(heads=2, groups=1, window=30, documents=DOCUMENTS),
  "one_token": Case(n=1, window=0),
  "odd_length": Case(n=301, head_dim=40, window=37, documents=((3, 200), (0, 31), (5, 70))),
  "several_blocks": Case(n=400, heads=3, groups=3, head_dim=128, window=0, queries=150),
  "many_heads": Case(n=260, heads=8, groups=1, head_dim=64, window=100, queries=7),
  "scores": Case(n=300, heads=2, window=7, documents=((1, 280), (0, 20)), queries=150),
  "negative_scale": Case(scale=-0.3),
}


def example(
  case: Case, dtype: str = "float32"
) -> tuple[tuple[jax.Array, jax.Array, jax.Array], jax.Array]:
  """Returns (scores, query, key) and the positions of the queries."""
  rng = np.random.default_rng(0)
  scores, query, key = (
    rng.normal(size=(2, case.n, case.groups)) * 2,
    rng.normal(size=(2, case.n, case.heads, case.head_dim)) * 2,
    rng.normal(size=(2, case.n, case.groups, case.head_dim)),
  )
  queries = sample_queries(jax.random.split(jax.random.key(0), 2), case.queries or case.n, case.n)
  query, key = (jnp.asarray(x, jnp.float32).astype(dtype) for x in (query, key))
  return (jnp.asarray(scores, jnp.float32), query, key), queries


CHANGES = {
  "equal": lambda drawn, steps: jnp.full_like(drawn, 3.0),
  "large": lambda drawn, steps: drawn * 1e30,
  "tiny": lambda drawn, steps: drawn * 1e-30,
  "rising": lambda drawn, steps: steps,
  "falling": lambda drawn, steps: -steps,
  "low": lambda drawn, steps: drawn - 3e30,
}


def changed_scores(scores: jax.Array, name: str) -> jax.Array:
  """Returns scores of the same shape, with a property that a name of CHANGES tells."""
  steps = jnp.broadcast_to(jnp.arange(scores.shape[1])[:, None], scores.shape) * 40.0
  return CHANGES[name](scores, steps)


def written_out(scores, query, key, queries, window, segment_ids, scale):
  """Returns the loss and its gradient in the scores, query by query."""
  scores, query, key = (
    np.asarray(jnp.asarray(x, jnp.float32), np.float64) for x in (scores, query, key)
  )
  (batch, n, groups), heads = scores.shape, query.shape[2]
  scale = query.shape[-1] ** -0.5 if scale is None else scale
  total, gradient = 0.0, np.zeros(scores.shape)
  for b in range(batch):
    ids = np.ones(n) if segment_ids is None else segment_ids[b]
    counted = [i for i in np.asarray(queries)[b] if ids[i]]
    for i in counted:
      start = i - np.argmax(np.append(ids[i::-1] != ids[i], True)) + 1
      seen, candidates = np.arange(start, i + 1), np.arange(start, i - window + 1)
      for g in range(groups if len(candidates) else 0):
        attention = np.zeros(n)
        for h in range(g * heads // groups, (g + 1) * heads // groups):
          logits = scale * key[b, seen, g] @ query[b, i, h]
          weights = np.exp(logits - logits.max())
          attention[seen] += weights / weights.sum() * groups / heads
        u = scores[b, candidates, g]
        log_expected = u - u.max() - np.log(np.sum(np.exp(u - u.max())))
        mass = attention[candidates].sum()
        share = attention[candidates] / mass
        weight = 1 / len(counted) / groups
        total += mass * np.sum(share * (np.log(share) - log_expected)) * weight
        gradient[b, candidates, g] += (mass * np.exp(log_expected) - attention[candidates]) * weight
  return total, gradient


class ScorerLossTest:
  """Tests of an implementation, which a subclass names."""

  implementation: str
  dtype: str

  def loss(self, case: Case, **others):
    """Returns the loss of (scores, query, key, queries)."""
    arguments = {"implementation": self.implementation, "segment_ids": case.segment_ids} | others
    return functools.partial(attention_mass_loss, window=case.window, scale=case.scale, **arguments)

  def check(self, case: Case, arrays, queries):
    """Compares loss and gradients with the definition."""
    loss = self.loss(case)
    run = quick_jit(jax.value_and_grad(lambda *args: 3 * loss(*args, queries), argnums=(0, 1, 2)))
    got, gradients = run(*arrays)
    want, gradient = written_out(*arrays, queries, case.window, case.segment_ids, case.scale)
    np.testing.assert_allclose(got, 3 * want, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(gradients[0], 3 * gradient, rtol=1e-3, atol=1e-6)
    assert not np.any(gradients[1]) and not np.any(gradients[2])
    return want

  @pytest.mark.parametrize("name", CASES)
  def test_value_and_gradient(self, name):
    case = CASES[name]
    want = self.check(case, *example(case, self.dtype))
    assert (want > 0.1) == (case.window < case.n and case.n > 1)

  @pytest.mark.parametrize("scores", CHANGES)
  def test_scores_of_any_size(self, scores):
    case = CASES["scores"]
    (drawn, query, key), queries = example(case, self.dtype)
    self.check(case, (changed_scores(drawn, scores), query, key), queries)

  def test_what_no_query_sees_does_not_matter(self):
    case = Case(n=150, documents=((1, 60), (2, 20), (1, 70)))
    (scores, query, key), _ = example(case, self.dtype)
    seen = jnp.zeros((2, case.n), bool).at[:, 60:80].set(True).at[1, 60:70].set(False)
    queries = jnp.tile(jnp.asarray([[70, 75, 79]], jnp.int32), (2, 1))
    run = jax.value_and_grad(self.loss(case), argnums=0)
    poison = jnp.where(seen[..., None, None], key, jnp.nan)
    want, got = (
      run(scores, query, key, queries),
      run(jnp.where(seen[..., None], scores, jnp.nan), query, poison, queries),
    )
    np.testing.assert_array_equal(got[0], want[0])
    np.testing.assert_array_equal(got[1], want[1])
    assert want[0] > 0 and not np.any(want[1][~np.asarray(seen)])

  def test_vmap(self):
    case = CASES["documents"]
    (scores, query, key), queries = example(case, self.dtype)
    loss = self.loss(case, segment_ids=None)
    arrays = [jnp.stack([x, x[::-1] * 0.5]) for x in (scores, query, key)]
    run = jax.value_and_grad(lambda *args: loss(*args, queries))
    got = jax.vmap(run)(*arrays)
    for i in range(2):
      want = run(*(x[i] for x in arrays))
      np.testing.assert_allclose(got[0][i], want[0], rtol=1e-5)
      np.testing.assert_allclose(got[1][i], want[1], rtol=1e-4, atol=1e-7)

  def test_scores_that_explain_the_attention_have_no_loss(self):
    case = Case(heads=1, groups=1, window=3)
    (_, query, key), queries = example(case, self.dtype)
    # every query asks the same, and one score can do for all
    query = jnp.broadcast_to(query[:, :1], query.shape)
    product = jnp.einsum("bhd,bjhd->bjh", *(x.astype(jnp.float32) for x in (query[:, 0], key)))
    run = jax.value_and_grad(self.loss(case))
    loss, gradient = run(product / 8**0.5 + 100, query, key, queries)
    np.testing.assert_allclose(loss, 0, atol=1e-5)
    np.testing.assert_allclose(gradient, 0, atol=1e-6)
