"""Gates of logits and values, and their gradients: shared by XLA and the kernels for GPUs and TPUs.

With p_ij the softmax of the logits, g_ij the gate, x_ij = p_ij <dO_i, v_j> and
delta_i = <dO_i, O_i>, the gradients are

  of a logit    x_ij g_ij - p_ij delta_i
  of a gate     x_ij; with "key_value", where the logit is g_ij s_ij, plus s_ij times the gradient
                of the logit

That of a gate reaches the scores where 0 < u_j - tau_i < 1.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

Load = Callable[[], jax.Array]


def gated_logits(s: jax.Array, g: jax.Array, *, gate: str) -> jax.Array:
  """Returns the logits whose softmax is taken, of products s = q.k and gates g."""
  return s * g if gate == "key_value" else s


def through_gate(
  s: jax.Array, g: jax.Array | None, ds: jax.Array, *, gate: str, scale: float | None = None
) -> tuple[jax.Array, jax.Array | None]:
  """Passes the gradient of logits back through their gates.

  Args:
    s: products q.k.
    g: gates, or None if the weights have none.
    ds: gradient of the logits after the gates, x g - p delta.
    gate: kind of gate.
    scale: factor on s in the logits; None if s includes it already.

  Returns:
    The gradient of s, and what the logits add to that of the gates, or None.
  """
  if gate != "key_value" or g is None:
    return ds, None
  of_product = ds * g
  return of_product, ds * s if scale is None else ds * s * scale


def tile_weights(
  s: jax.Array, probability: Callable[[jax.Array], jax.Array], distance: Load | None, *, gate: str
) -> tuple[jax.Array, jax.Array | None, jax.Array]:
  """Computes the softmax of a tile's logits, its gates (None if the weights have none), and the
  weights of its values.

  Args:
    s: products q.k.
    probability: function from logits to their softmax.
    distance: function that loads u_j - tau_i of listed keys, called only when they are needed, to
      save registers; None for keys of the window, whose gate is 1.
    gate: kind of gate.
  """
  if distance is None or gate == "straight_through":
    p = probability(s)
    return p, None, p
  g = jnp.clip(distance(), 0.0, 1.0)
  p = probability(gated_logits(s, g, gate=gate))
  return p, g, p * g


def tile_gradients(
  s: jax.Array,
  p: jax.Array,
  g: jax.Array | None,
  dp: jax.Array,
  delta: jax.Array,
  distance: Load | None,
  *,
  gate: str,
  scale: float,
) -> tuple[jax.Array, Load | None]:
  """Computes the gradient of a tile's s, and returns it and a function that computes that of its
  gates, or None.

  Args:
    s, distance: as in `tile_weights`.
    p, g: its first two results.
    dp: products <dO_i, v_j>.
    delta: <dO_i, O_i>.
    gate: kind of gate.
    scale: factor on s in the logits.
  """
  if distance is None:
    return p * (dp - delta), None
  x = p * dp
  gated = x if g is None or gate == "straight_through" else x * g
  ds, dg = through_gate(s, g, gated - p * delta, gate=gate, scale=scale)

  def of_gates():
    u_less_tau = distance()
    fractional = jnp.logical_and(u_less_tau > 0.0, u_less_tau < 1.0)
    return jnp.where(fractional, x if dg is None else x + dg, 0.0)

  return ds, of_gates
