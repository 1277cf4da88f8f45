"""The chunked divergence from a teacher against the plain one, in value and gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsek.training.distillation import chunked_distillation
from tests.helpers import quick_jit
from tests.training.loss_test import example, plain


def teacher(n=13, width=5, vocab=11):
  rng = np.random.default_rng(1)
  return jnp.asarray(rng.normal(size=(n, width)), jnp.float32), jnp.asarray(
    rng.normal(size=(width, vocab)), jnp.float32
  )


def plain_divergence(hidden, matrix, theirs, their_matrix, counted):
  p, q = jax.nn.softmax(theirs @ their_matrix), jax.nn.softmax(hidden @ matrix)
  return jnp.sum(jnp.sum(p * jnp.log(p / q), axis=-1) * counted)


@pytest.mark.parametrize("chunk, weight", [(1, 1.0), (4, 0.3), (100, 0.0)])
def test_value_and_gradients_equal_the_plain_ones(chunk, weight):
  hidden, matrix, targets, counted = example(jnp.float32)
  theirs = teacher()
  arguments = hidden, matrix, *theirs
  got = lambda *args: chunked_distillation(*args, targets, counted, weight, chunk)
  want = lambda *args: (
    (1 - weight) * plain(*args[:2], targets, counted) + weight * plain_divergence(*args, counted)
  )
  sums, (also, gradients) = (
    quick_jit(got)(*arguments),
    quick_jit(jax.value_and_grad(lambda *args: 3 * sum(got(*args)), argnums=(0, 1, 2, 3)))(
      *arguments
    ),
  )
  np.testing.assert_allclose(
    sums,
    (
      want(*arguments),
      plain(hidden, matrix, targets, counted),
      plain_divergence(*arguments, counted),
    ),
    rtol=1e-5,
  )
  assert also == pytest.approx(3 * float(sum(sums)), rel=1e-5)
  expected = jax.grad(lambda *args: 3 * want(*args), argnums=(0, 1))(*arguments)
  jax.tree.map(
    functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5), gradients[:2], expected
  )
  assert not np.any(gradients[2]) and not np.any(gradients[3])


def test_a_model_has_nothing_to_learn_from_itself():
  hidden, matrix, targets, counted = example(jnp.float32)
  loss = lambda hidden: chunked_distillation(hidden, matrix, *arguments, 1.0, 5)[0]
  arguments = hidden, matrix, targets, counted
  value, gradient = jax.value_and_grad(loss)(hidden)
  np.testing.assert_allclose(value, 0, atol=1e-5)
  np.testing.assert_allclose(gradient, 0, atol=1e-6)


def test_no_array_holds_all_logits():
  hidden, matrix, targets, counted = example(jnp.bfloat16, n=64, vocab=512)
  theirs = [x.astype(jnp.bfloat16) for x in teacher(n=64, vocab=512)]
  grad = jax.jit(
    jax.grad(
      lambda h, m, chunk: chunked_distillation(h, m, *theirs, targets, counted, 0.5, chunk)[0],
      argnums=(0, 1),
    ),
    static_argnums=2,
  )
  bytes_used = [
    grad.lower(hidden, matrix, chunk).compile().memory_analysis().temp_size_in_bytes
    for chunk in (8, 64)
  ]
  assert bytes_used[0] < bytes_used[1] / 2, bytes_used
  assert (
    grad(hidden, matrix, 8)[0].dtype == jnp.bfloat16
    and grad(hidden, matrix, 8)[1].dtype == jnp.float32
  )
