"""The chunked cross-entropy against the plain one, in value and gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsek.training.loss import chunked_cross_entropy, next_token_targets


def plain(hidden, matrix, targets, counted):
  logits = jnp.matmul(hidden, matrix.astype(hidden.dtype), preferred_element_type=jnp.float32)
  losses = -jnp.take_along_axis(jax.nn.log_softmax(logits), targets[:, None], axis=-1)[:, 0]
  return jnp.sum(losses * counted)


def example(dtype, n=13, width=6, vocab=11):
  rng = np.random.default_rng(0)
  hidden, matrix = rng.normal(size=(n, width)), rng.normal(size=(width, vocab))
  targets, counted = rng.integers(0, vocab, n), rng.random(n) < 0.7
  return (
    jnp.asarray(hidden, dtype),
    jnp.asarray(matrix, jnp.float32),
    jnp.asarray(targets),
    jnp.asarray(counted),
  )


@pytest.mark.parametrize("chunk", [1, 4, 13, 100])
def test_value_and_gradients_equal_the_plain_loss(chunk):
  hidden, matrix, targets, counted = example(jnp.float32)
  chunked = functools.partial(chunked_cross_entropy, chunk=chunk)
  np.testing.assert_allclose(
    chunked(hidden, matrix, targets, counted), plain(hidden, matrix, targets, counted), rtol=1e-6
  )
  actual = jax.grad(lambda h, m: 0.3 * chunked(h, m, targets, counted), argnums=(0, 1))(
    hidden, matrix
  )
  expected = jax.grad(lambda h, m: 0.3 * plain(h, m, targets, counted), argnums=(0, 1))(
    hidden, matrix
  )
  jax.tree.map(
    functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), actual, expected
  )


def test_bfloat16_products_keep_a_float32_loss_and_matrix_gradient():
  hidden, matrix, targets, counted = example(jnp.bfloat16)
  loss, (d_hidden, d_matrix) = jax.value_and_grad(chunked_cross_entropy, argnums=(0, 1))(
    hidden, matrix, targets, counted, 4
  )
  assert (loss.dtype, d_hidden.dtype, d_matrix.dtype) == (jnp.float32, jnp.bfloat16, jnp.float32)
  np.testing.assert_allclose(loss, plain(hidden, matrix, targets, counted), rtol=1e-5)
  np.testing.assert_allclose(
    d_matrix, jax.grad(plain, argnums=1)(hidden, matrix, targets, counted), rtol=0.02, atol=0.02
  )


def test_no_array_holds_all_logits():
  hidden, matrix, targets, counted = example(jnp.float32, n=64, vocab=512)
  grad = jax.jit(jax.grad(chunked_cross_entropy, argnums=(0, 1)), static_argnums=4)
  bytes_used = [
    grad.lower(hidden, matrix, targets, counted, chunk)
    .compile()
    .memory_analysis()
    .temp_size_in_bytes
    for chunk in (8, 64)
  ]
  assert bytes_used[0] < bytes_used[1] / 2, bytes_used


def test_targets_across_documents_and_padding_do_not_count():
  batch = {
    "tokens": jnp.asarray([[5, 6, 7, 8, 9, 0]]),
    "segment_ids": jnp.asarray([[1, 1, 2, 2, 0, 0]]),
  }
  targets, counted = next_token_targets(batch)
  assert targets.tolist() == [[6, 7, 8, 9, 0]]
  assert counted.tolist() == [[True, False, True, False, False]]
  batch["counted"] = jnp.asarray([[True, False, True, True, True, True]])
  assert next_token_targets(batch)[1].tolist() == [[False, False, True, False, False]]
