"""The layers of `Transformer` as generation computes them: parameters cast once, products that read
the same input made in one.

The values are those of the modules in sparsek/model/layers.py; only rounding differs.
"""

import functools
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from sparsek.attention.exact_product import scorer_logits, scorer_rows
from sparsek.config import TransformerConfig
from sparsek.kernels.hopper import small_batch_matmul
from sparsek.kernels.hopper.small_batch_matmul import Parts
from sparsek.model import lora
from sparsek.model.layers import RMSNorm, make_norm, rotary_embedding
from sparsek.model.transformer import Params, hidden_to_logits, layer_params


class InferenceParams(NamedTuple):
  """What `inference_params` returns; matrices in the activation dtype, all else float32.

  Attributes:
    embedding: [V, E].
    positions: [max_positions, E], the learned table, or None.
    layers: a dict for each layer: qkv [(H + 2 G) D, E], out [E, H D], up [F, E] (of swiglu gate and
      up, [2 F, E]) and down [E, F], each a transposed kernel with its bias if it has one; norms;
      scorer, and of a linear one in a bfloat16 model the rows of `scorer_rows`. Transposed, because
      a product with one row reads whole rows of the matrix then, and XLA's GPU backend makes it one
      kernel; of some others it would write the elements' products to memory before it sums them.
    final_norm: its parameters.
    output: [E, V], or None where the embedding is used.
  """

  embedding: jax.Array
  positions: jax.Array | None
  layers: tuple[dict[str, Any], ...]
  final_norm: Params
  output: jax.Array | None


@functools.partial(jax.jit, static_argnums=0)
def _convert(config, params):
  params = lora.merge(config, params)
  cast = lambda x: x.astype(config.activation_dtype)

  def join(*parts):
    """Projections of the same input, side by side; [E, H, D] becomes [H D, E]."""
    flat = lambda name, axes: jnp.concatenate(
      [part[name].reshape(*part[name].shape[:axes], -1) for part in parts], axis=-1
    )
    return {"kernel": cast(flat("kernel", 1).T)} | (
      {"bias": flat("bias", 0)} if "bias" in parts[0] else {}
    )

  def layer(block):
    attention, mlp = block["attention"], block["mlp"]
    out = attention["out"] | {"kernel": attention["out"]["kernel"].reshape(-1, config.embed_dim)}
    small = {
      name: attention[name] for name in ("query_norm", "key_norm", "scorer") if name in attention
    }
    if (
      config.scorer == "linear"
      and "scorer" in attention
      and config.activation_dtype == jnp.bfloat16
    ):
      small["scorer_rows"] = scorer_rows(
        attention["scorer"]["linear"]["kernel"], small_batch_matmul.COLUMNS
      )
    return {
      "attention_norm": block["attention_norm"],
      "mlp_norm": block["mlp_norm"],
      **small,
      "qkv": join(*(attention[name] for name in ("query", "key", "value"))),
      "out": join(out),
      "up": join(*(mlp[name] for name in ("gate", "up") if name in mlp)),
      "down": join(mlp["down"]),
    }

  return InferenceParams(
    cast(params["embed"]["embedding"]),
    params["positions"]["embedding"] if config.positions == "learned" else None,
    tuple(layer(layer_params(config, params, i)) for i in range(config.num_layers)),
    params["final_norm"],
    None if config.tie_embeddings else cast(params["lm_head"]["kernel"]),
  )


def inference_params(
  config: TransformerConfig, params: Params | InferenceParams
) -> InferenceParams:
  """Parameters as generation reads them, which `prefill` and `decode_step` take in place of the
  model's; made once, they save every step the cast.

  Returns `params` itself where they are of that kind already.
  """
  return params if isinstance(params, InferenceParams) else _convert(config, params)


def dense(params: Params, x: jax.Array | Parts, residual: jax.Array | None = None) -> jax.Array:
  """x times the kernel, plus the bias if there is one, plus the residual if there is one, which
  there must be for Parts.
  """
  if isinstance(x, Parts):
    if "bias" not in params and small_batch_matmul.supports(
      len(residual), params["kernel"], residual.dtype
    ):
      return small_batch_matmul.product(x, params["kernel"], residual=residual)
    x = x.joined(residual.dtype)
  rows = x.reshape(-1, x.shape[-1])
  if _skinny(params, rows):
    residual = None if residual is None else residual.reshape(len(rows), -1)
    return small_batch_matmul.product(rows, params["kernel"], residual=residual).reshape(
      *x.shape[:-1], -1
    )
  # XLA's GPU backend sums the products of a single row itself, in the dtype that it is told; those
  # of more rows are summed in float32 anyway.
  dtype = jnp.float32 if x.size == x.shape[-1] else x.dtype
  y = jax.lax.dot_general(
    x, params["kernel"], (((x.ndim - 1,), (1,)), ((), ())), preferred_element_type=dtype
  )
  y = (y + params["bias"].astype(dtype) if "bias" in params else y).astype(x.dtype)
  return y if residual is None else residual + y


def _skinny(params, rows, config=None):
  """Whether Mosaic's product is to be taken, with the norm before it where `config` is given."""
  return (
    (config is None or config.norm == "rms_norm")
    and "bias" not in params
    and small_batch_matmul.supports(len(rows), params["kernel"], rows.dtype)
  )


def norm(config: TransformerConfig, params: Params, x: jax.Array) -> jax.Array:
  return make_norm(config).apply({"params": params}, x)


def embed(
  config: TransformerConfig, params: InferenceParams, tokens: jax.Array, positions: jax.Array
) -> jax.Array:
  """tokens and positions [B, C] -> [B, C, E] in the activation dtype; NaN beyond a learned table:
  loud, not wrong.
  """
  x = jnp.take(params.embedding, tokens, axis=0)
  if params.positions is None:
    return x
  return (
    x.astype(jnp.float32) + jnp.take(params.positions, positions, axis=0, mode="fill")
  ).astype(x.dtype)


def projected(
  config: TransformerConfig, layer: dict, x: jax.Array, more: list[jax.Array]
) -> jax.Array:
  """The attention's norm of x [B, E], times the kernel of queries, keys and values, which has no
  bias, and at most one more: [B, N] float32.
  """
  if _skinny(layer["qkv"], x, config):
    scale = layer["attention_norm"]["scale"]
    return small_batch_matmul.product(
      x, layer["qkv"]["kernel"], *more, scale=scale, epsilon=config.norm_eps, dtype=jnp.float32
    )
  x = norm(config, layer["attention_norm"], x)
  return jnp.concatenate(
    [
      jnp.matmul(x, kernel.T, preferred_element_type=jnp.float32)
      for kernel in (layer["qkv"]["kernel"], *more)
    ],
    axis=-1,
  )


def project(
  config: TransformerConfig, layer: dict, x_BxCxE: jax.Array, positions_BxC: jax.Array
) -> tuple[jax.Array, ...]:
  """The attention's norm, then as `sparsek.model.layers.Attention.project`: query [B, C, H, D], key
  and value [B, C, G, D]; and the input of the scoring network, the normed x or, where that is
  linear and was multiplied too, its logits [B, C, G]: (query, key, value, normed or None, logits or
  None).
  """
  heads, groups = config.num_heads, config.num_kv_heads
  rows, normed, scores = x_BxCxE.reshape(-1, config.embed_dim), None, None
  if _skinny(layer["qkv"], rows, config) and ("scorer" not in layer or "scorer_rows" in layer):
    every = projected(config, layer, rows, [layer["scorer_rows"]] if "scorer_rows" in layer else [])
    every, scores = jnp.split(
      every.reshape(*x_BxCxE.shape[:2], -1), [len(layer["qkv"]["kernel"])], axis=-1
    )
    scores = (
      scorer_logits(scores, layer["scorer"]["linear"]["kernel"].shape[1])
      if "scorer" in layer
      else None
    )
    every = every.astype(x_BxCxE.dtype)
  else:
    normed = norm(config, layer["attention_norm"], x_BxCxE)
    every = dense(layer["qkv"], normed)
  every = every.reshape(*x_BxCxE.shape[:2], heads + 2 * groups, config.head_dim)
  query_and_key, value = every[:, :, : heads + groups], every[:, :, heads + groups :]
  if config.qk_norm:
    head_norm = lambda name, x: RMSNorm(config.norm_eps).apply({"params": layer[name]}, x)
    query_and_key = jnp.concatenate(
      [
        head_norm("query_norm", query_and_key[:, :, :heads]),
        head_norm("key_norm", query_and_key[:, :, heads:]),
      ],
      axis=2,
    )
  if config.positions == "rope":
    query_and_key = rotary_embedding(
      query_and_key, positions_BxC, config.rope_theta, config.rope_dim, config.rope_scaling
    )
  return query_and_key[:, :, :heads], query_and_key[:, :, heads:], value, normed, scores


def mlp(config: TransformerConfig, layer: dict, x: jax.Array, residual: jax.Array) -> jax.Array:
  """The MLP's norm, then as `sparsek.model.layers.MLP`, plus the residual."""
  rows = x.reshape(-1, config.embed_dim)
  if config.mlp == "swiglu" and _skinny(layer["up"], rows, config):
    hidden = small_batch_matmul.product(
      rows,
      layer["up"]["kernel"],
      scale=layer["mlp_norm"]["scale"],
      epsilon=config.norm_eps,
      swiglu=True,
    )
    return dense(layer["down"], hidden.reshape(*x.shape[:-1], -1), residual)
  hidden = dense(layer["up"], norm(config, layer["mlp_norm"], x))
  if config.mlp == "swiglu":
    gate, up = jnp.split(hidden, 2, axis=-1)
    return dense(layer["down"], nn.silu(gate) * up, residual)
  return dense(layer["down"], nn.gelu(hidden, approximate=config.mlp == "gelu_tanh"), residual)


def logits(config: TransformerConfig, params: InferenceParams, x: jax.Array) -> jax.Array:
  """The last norm of x [..., E], and the logits of that: [..., V] float32."""
  rows = x.reshape(-1, config.embed_dim)
  if params.output is None and _skinny({"kernel": params.embedding}, rows, config):
    found = small_batch_matmul.product(
      rows,
      params.embedding,
      scale=params.final_norm["scale"],
      epsilon=config.norm_eps,
      dtype=jnp.float32,
    )
    return found.reshape(*x.shape[:-1], -1)
  return hidden_to_logits(
    norm(config, params.final_norm, x),
    params.embedding.T if params.output is None else params.output,
  )
