"""What gates do to one tile of logits and to its gradients: shared by the kernels for GPUs and
TPUs.

With p_ij the softmax of the logits, g_ij the gate and x_ij = p_ij <dO_i, v_j>, the gradient of a
logit is `x_ij g_ij - p_ij delta_i`, delta_i = <dO_i, O_i>, and that of a gate x_ij (with
"key_value", where the logit is g_ij s_ij, more: s_ij times that of the logit). It reaches the
scores where 0 < u_j - tau_i < 1.
"""

import jax.numpy as jnp


def tile_weights(s, probability, distance, *, gate):
  """(softmax of the logits, gates or None where the weights do without, weights of the values) of
  one tile.

  Args:
    s: products q.k. probability(logits): the softmax of logits.
    distance: function that loads u_j - tau_i of listed keys, when it is needed, to save registers;
      None for the window's, whose gate is 1.
  """
  if distance is None or gate == "straight_through":
    p = probability(s)
    return p, None, p
  g = jnp.clip(distance(), 0.0, 1.0)
  p = probability(s * g if gate == "key_value" else s)
  return p, g, p * g


def tile_gradients(s, p, g, dp, delta, distance, *, gate, scale):
  """(gradient of s, gradient of the gates or None) of one tile.

  Args:
    s, distance: as of `tile_weights`, p, g: its results. dp: products <dO_i, v_j>. delta: <dO_i,
      O_i>.
  """
  if distance is None:
    return p * (dp - delta), None
  x = p * dp
  distance = distance()
  fractional = jnp.logical_and(distance > 0.0, distance < 1.0)
  if gate == "straight_through":
    return x - p * delta, jnp.where(fractional, x, 0.0)
  ds = x * g - p * delta
  if gate == "value":
    return ds, jnp.where(fractional, x, 0.0)
  return ds * g, jnp.where(fractional, x + ds * s * scale, 0.0)
