"""The layers of `Transformer` as generation computes them.

Parameters are cast once, and products that read the same input are made in one. The values are
those of the modules in sparsek/model/layers.py; only rounding differs.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from sparsek.attention.exact_product import scorer_logits, scorer_rows
from sparsek.config import TransformerConfig, check_config, check_type, fields_of_kind
from sparsek.kernels import devices
from sparsek.model import lora
from sparsek.model.layers import RMSNorm, make_norm, rotary_embedding
from sparsek.model.scorers import SCORER_FACTORIES
from sparsek.model.transformer import Params, hidden_to_logits, init_params, layer_params, rows_of
from sparsek.parallel.mesh import FSDP, axis_size
from sparsek.parallel.sharding import computed_on, gather, partition_specs, placements

SCORER_ROWS = 16  # a linear scorer's rows are padded to a multiple of it, as the kernels need


class InferenceParams(NamedTuple):
  """The parameters of a model as generation reads them.

  Matrices have the activation dtype; all else is float32.

  Attributes:
    embedding: [V, E].
    positions: [max_positions, E], the learned table, or None.
    layers: a dict for each layer: qkv [(H + 2 G) D, E], out [E, H D], up [F, E] (gate and up of
      swiglu, [2 F, E]) and down [E, F], each a transposed kernel with its bias if it has one;
      norms; scorer. Where a scorer of a bfloat16 model is linear, its `scorer_rows` follow the rows
      of qkv, so that one product makes all (`has_scorer_rows`). The kernels are transposed because
      XLA's GPU backend then makes a product with one row in one kernel, which reads whole rows of
      the matrix. Of some other layouts it writes the products of all elements to memory before it
      sums them.
    final_norm: its parameters.
    output: [E, V], or None where the embedding is used.
  """

  embedding: jax.Array
  positions: jax.Array | None
  layers: tuple[dict[str, Any], ...]
  final_norm: Params
  output: jax.Array | None


class Projections(NamedTuple):
  """The input of a layer's attention.

  Attributes:
    query: [B, C, H, D].
    key, value: [B, C, G, D].
    scorer_input: [B, C, E], the normed hidden states; not normed where `scorer_logits` are known,
      since only its shape is read then.
    scorer_logits: [B, C, G], the product of a linear scorer, or None where it is still to be made.
  """

  query: jax.Array
  key: jax.Array
  value: jax.Array
  scorer_input: jax.Array
  scorer_logits: jax.Array | None


def small_batch_product(
  params: Params, rows: jax.Array, config: TransformerConfig | None = None
) -> Callable[..., jax.Array] | None:
  """Returns the kernel for a product of a few rows with a matrix, or None.

  It is None where XLA makes this product.

  Args:
    params: of the product; the kernel adds no bias.
    rows: [B, K], the input.
    config: of the model, if the kernel is to compute the norm before the product too.
  """
  normed = config is None or config.norm == "rms_norm"
  if not devices.can_run_portable() or "bias" in params or not normed:
    return None
  from sparsek.kernels.hopper import small_batch_matmul  # needs private names of JAX

  if not small_batch_matmul.supports(len(rows), params["kernel"], rows.dtype):
    return None
  return small_batch_matmul.product


@functools.partial(jax.jit, static_argnums=0)
def _convert(config, params):
  params = lora.merge(config, params)
  cast = lambda x: x.astype(config.activation_dtype)

  def join(*parts):
    """Concatenates projections of the same input; [E, H, D] becomes [H D, E]."""
    flat = lambda name, axes: jnp.concatenate(
      [part[name].reshape(*part[name].shape[:axes], -1) for part in parts], axis=-1
    )
    joined = {"kernel": cast(flat("kernel", 1).T)}
    return joined | ({"bias": flat("bias", 0)} if "bias" in parts[0] else {})

  def layer(block, kind):
    attention, mlp = block["attention"], block["mlp"]
    out = attention["out"] | {"kernel": attention["out"]["kernel"].reshape(-1, config.embed_dim)}
    small = {
      name: attention[name] for name in ("query_norm", "key_norm", "scorer") if name in attention
    }
    if "scorer" in fields_of_kind(kind) and config.scorer in SCORER_FACTORIES:
      small.setdefault("scorer", {})  # without parameters it reads hidden states all the same
    qkv = join(*(attention[name] for name in ("query", "key", "value")))
    is_linear = config.scorer == "linear" and "scorer" in attention
    if is_linear and config.activation_dtype == jnp.bfloat16:
      rows = scorer_rows(attention["scorer"]["linear"]["kernel"], SCORER_ROWS)
      qkv["kernel"] = jnp.concatenate([qkv["kernel"], rows])
    return {
      "attention_norm": block["attention_norm"],
      "mlp_norm": block["mlp_norm"],
      **small,
      "qkv": qkv,
      "out": join(out),
      "up": join(*(mlp[name] for name in ("gate", "up") if name in mlp)),
      "down": join(mlp["down"]),
    }

  return InferenceParams(
    cast(params["embed"]["embedding"]),
    params["positions"]["embedding"] if config.positions == "learned" else None,
    tuple(
      layer(layer_params(config, params, i), kind) for i, kind in enumerate(config.layer_kinds)
    ),
    params["final_norm"],
    None if config.tie_embeddings else cast(params["lm_head"]["kernel"]),
  )


def inference_params(
  config: TransformerConfig, params: Params | InferenceParams, mesh: Mesh | None = None
) -> InferenceParams:
  """Returns the parameters as generation reads them.

  `prefill` and `decode_step` take them in place of the model's parameters, which they would cast at
  every call. Those that are converted already are returned as they are.

  Args:
    config, params: of the model.
    mesh: devices over which the result is spread, split over `fsdp`; None leaves it where it is.
  Raises:
    ValueError: for a config or params of another type.
  """
  check_config(config)
  check_type(
    "params", params, (Mapping, InferenceParams), "parameters, such as sparsek.init_params returns"
  )
  if mesh is None:
    return params if isinstance(params, InferenceParams) else _convert(config, params)
  params = jax.device_put(params, placements(mesh, params))
  if isinstance(params, InferenceParams):
    return params
  return computed_on(mesh, functools.partial(_convert, config), params)


@functools.lru_cache(maxsize=64)
def inference_specs(config: TransformerConfig, parts: int) -> InferenceParams:
  """Returns how the parameters are split over `fsdp` of that size, as PartitionSpecs.

  They are computed before a `jax.shard_map`, where `whole` and `whole_layer` ask for them again.
  """
  shapes = jax.eval_shape(functools.partial(init_params, config), jax.random.key(0))
  return partition_specs(jax.eval_shape(functools.partial(_convert, config), shapes), parts)


def _gathered(parts: Any, specs: Any, x: jax.Array) -> tuple[Any, jax.Array]:
  """Returns whole parameters, and x, the array that they are needed for.

  They are gathered when x is known: else the compiler could gather the whole model, before a loop
  over tokens.
  """
  parts, x = jax.lax.optimization_barrier((parts, x))
  return gather(parts, specs)[0], x


def whole(
  config: TransformerConfig, params: InferenceParams, names: Sequence[str], x: jax.Array
) -> tuple[InferenceParams, jax.Array]:
  """Returns parameters in which the fields of these names are whole, and x.

  Inside `jax.shard_map` over `fsdp` they are gathered, once x is known.
  """
  if axis_size(FSDP) == 1:
    return params, x
  pick = lambda tree: {name: getattr(tree, name) for name in names}
  fields, x = _gathered(pick(params), pick(inference_specs(config, axis_size(FSDP))), x)
  return params._replace(**fields), x


def whole_layer(
  config: TransformerConfig, params: InferenceParams, i: int, x: jax.Array
) -> tuple[dict[str, Any], jax.Array]:
  """Returns the parameters of layer i and x, as `whole` does."""
  if axis_size(FSDP) == 1:
    return params.layers[i], x
  return _gathered(params.layers[i], inference_specs(config, axis_size(FSDP)).layers[i], x)


def dense(params: Params, x: jax.Array, residual: jax.Array | None = None) -> jax.Array:
  """Returns x times the kernel, plus the bias and the residual where there are any."""
  rows = x.reshape(-1, x.shape[-1])
  product = small_batch_product(params, rows)
  if product is not None:
    residual = None if residual is None else residual.reshape(len(rows), -1)
    y = product(rows, params["kernel"], residual=residual)
    return y.reshape(*x.shape[:-1], -1)
  # XLA's GPU backend sums the product of a single row in the dtype that it is given; products of
  # several rows are summed in float32 anyway.
  dtype = jnp.float32 if x.size == x.shape[-1] else x.dtype
  y = jax.lax.dot_general(
    x, params["kernel"], (((x.ndim - 1,), (1,)), ((), ())), preferred_element_type=dtype
  )
  y = (y + params["bias"].astype(dtype) if "bias" in params else y).astype(x.dtype)
  return y if residual is None else residual + y


def norm(config: TransformerConfig, params: Params, x: jax.Array) -> jax.Array:
  """Returns the norm of x."""
  return _apply(make_norm(config), params, x)


def _apply(module: nn.Module, params: Params, x: jax.Array) -> jax.Array:
  y = module.apply({"params": params}, x)
  assert isinstance(y, jax.Array)
  return y


def embed(
  config: TransformerConfig, params: InferenceParams, tokens: jax.Array, positions: jax.Array
) -> jax.Array:
  """Returns the embeddings [B, C, E] of tokens [B, C] at positions [B, C], in the activation dtype.

  They are NaN for tokens outside the vocabulary and beyond a learned table, so that the mistake is
  seen.
  """
  params, tokens = whole(config, params, ("embedding", "positions"), tokens)
  x = rows_of(params.embedding, tokens)
  if params.positions is None:
    return x
  sum_ = x.astype(jnp.float32) + rows_of(params.positions, positions)
  return sum_.astype(x.dtype)


def qkv_width(config: TransformerConfig) -> int:
  """Returns (H + 2 G) D."""
  return (config.num_heads + 2 * config.num_kv_heads) * config.head_dim


def has_scorer_rows(config: TransformerConfig, layer: dict[str, Any]) -> bool:
  """Returns whether a scorer's rows follow those of queries, keys and values."""
  return len(layer["qkv"]["kernel"]) > qkv_width(config)


def project_rows(config: TransformerConfig, layer: dict[str, Any], x: jax.Array) -> jax.Array:
  """Returns the products of attention's norm of x with the matrix of the projections.

  Args:
    config: of the model.
    layer: its parameters; the projection of queries, keys and values has no bias.
    x: [B, E].
  Returns:
    [B, (H + 2 G) D + M] float32: queries, keys, values, and the products with M scorer's rows.
  """
  product = small_batch_product(layer["qkv"], x, config)
  if product is not None:
    scale = layer["attention_norm"]["scale"]
    return product(
      x, layer["qkv"]["kernel"], scale=scale, epsilon=config.norm_eps, dtype=jnp.float32
    )
  x = norm(config, layer["attention_norm"], x)
  return jnp.matmul(x, layer["qkv"]["kernel"].T, preferred_element_type=jnp.float32)


def project(
  config: TransformerConfig, layer: dict[str, Any], x_BxCxE: jax.Array, positions_BxC: jax.Array
) -> Projections:
  """Returns the attention's norm and projections, as `sparsek.model.layers.Attention.project`."""
  heads, groups = config.num_heads, config.num_kv_heads
  rows, scorer_input, logits = x_BxCxE.reshape(-1, config.embed_dim), x_BxCxE, None
  width = qkv_width(config)
  has_rows = "scorer" not in layer or has_scorer_rows(config, layer)
  if has_rows and small_batch_product(layer["qkv"], rows, config) is not None:
    products = project_rows(config, layer, rows).reshape(*x_BxCxE.shape[:2], -1)
    qkv, scores = jnp.split(products, [width], axis=-1)
    if "scorer" in layer:
      logits = scorer_logits(scores, layer["scorer"]["linear"]["kernel"].shape[1])
    qkv = qkv.astype(x_BxCxE.dtype)
  else:
    scorer_input = norm(config, layer["attention_norm"], x_BxCxE)
    qkv = dense(layer["qkv"] | {"kernel": layer["qkv"]["kernel"][:width]}, scorer_input)
  qkv = qkv.reshape(*x_BxCxE.shape[:2], heads + 2 * groups, config.head_dim)
  query_and_key, value = qkv[:, :, : heads + groups], qkv[:, :, heads + groups :]
  if config.qk_norm:
    head_norm = RMSNorm(config.norm_eps)
    query = _apply(head_norm, layer["query_norm"], query_and_key[:, :, :heads])
    key = _apply(head_norm, layer["key_norm"], query_and_key[:, :, heads:])
    query_and_key = jnp.concatenate([query, key], axis=2)
  if config.positions == "rope":
    assert not isinstance(config.rope_scaling, str)  # parsed
    query_and_key = rotary_embedding(
      query_and_key, positions_BxC, config.rope_theta, config.rope_dim, config.rope_scaling
    )
  query, key = query_and_key[:, :, :heads], query_and_key[:, :, heads:]
  return Projections(query, key, value, scorer_input, logits)


def mlp(
  config: TransformerConfig, layer: dict[str, Any], x: jax.Array, residual: jax.Array
) -> jax.Array:
  """Returns the residual plus the MLP of the norm of x, as `sparsek.model.layers.MLP`."""
  rows = x.reshape(-1, config.embed_dim)
  product = small_batch_product(layer["up"], rows, config) if config.mlp == "swiglu" else None
  if product is not None:
    scale = layer["mlp_norm"]["scale"]
    hidden = product(rows, layer["up"]["kernel"], scale=scale, epsilon=config.norm_eps, swiglu=True)
    return dense(layer["down"], hidden.reshape(*x.shape[:-1], -1), residual)
  hidden = dense(layer["up"], norm(config, layer["mlp_norm"], x))
  if config.mlp == "swiglu":
    gate, up = jnp.split(hidden, 2, axis=-1)
    return dense(layer["down"], nn.silu(gate) * up, residual)
  return dense(layer["down"], nn.gelu(hidden, approximate=config.mlp == "gelu_tanh"), residual)


def logits(config: TransformerConfig, params: InferenceParams, x: jax.Array) -> jax.Array:
  """Returns the logits [..., V] float32 of the final norm of x [..., E]."""
  matrix = "embedding" if params.output is None else "output"
  params, x = whole(config, params, (matrix, "final_norm"), x)
  rows = x.reshape(-1, config.embed_dim)
  kernel = {"kernel": params.embedding}
  product = small_batch_product(kernel, rows, config) if params.output is None else None
  if product is not None:
    scale = params.final_norm["scale"]
    y = product(rows, params.embedding, scale=scale, epsilon=config.norm_eps, dtype=jnp.float32)
    return y.reshape(*x.shape[:-1], -1)
  return hidden_to_logits(
    norm(config, params.final_norm, x),
    params.embedding.T if params.output is None else params.output,
  )
