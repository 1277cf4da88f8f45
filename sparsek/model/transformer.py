"""The decoder language model."""

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.core import DenyList

from sparsek.config import TransformerConfig, check_config, check_type, parse_term
from sparsek.kernels import cudnn, saved
from sparsek.model.baselines import ATTENTION_MODULES
from sparsek.model.layers import MLP, make_norm, row_keys, sample_loss_queries
from sparsek.model.random_keys import random_keys
from sparsek.parallel import sharding
from sparsek.parallel.mesh import CONTEXT, FSDP, axis_size, is_sharded
from sparsek.parallel.sharded_scores import token_positions

Params = dict[str, Any]


class Block(nn.Module):
  """A layer: y = x + attention(norm(x)), then y + mlp(norm(y)), or y + mlp(norm(x)) with
  `parallel_residual`.
  """

  config: TransformerConfig
  term: str  # of the attention pattern

  def setup(self) -> None:
    self.attention_norm, self.mlp_norm = make_norm(self.config), make_norm(self.config)
    self.attention = ATTENTION_MODULES[parse_term(self.term)[0]](self.config.for_term(self.term))
    self.mlp = MLP(self.config)

  def __call__(
    self,
    x_BxNxE: jax.Array,
    segment_ids: jax.Array | None,
    layer: jax.Array | int,
    row_index: jax.Array | None = None,
    loss_queries: jax.Array | None = None,
    score_factor: jax.Array | None = None,
  ) -> jax.Array:
    rest = segment_ids, layer, row_index, loss_queries, score_factor
    if not is_sharded():
      return self._output(x_BxNxE, *rest)
    tied = [x_BxNxE]

    def whole(variables):
      params, tied[0] = sharding.gather(variables["params"], self._specs(), x_BxNxE)
      return {"params": params}

    def output(block, *args):
      return block._output(tied[0], *args)

    return nn.map_variables(output, "params", trans_in_fn=whole)(self, *rest)

  def _output(self, x_BxNxE, segment_ids, layer, row_index, loss_queries, score_factor):
    x_BxNxE, normed_BxNxE = self.attention_norm.branch(x_BxNxE)
    mixed_BxNxE = self.attention(
      normed_BxNxE,
      segment_ids,
      layer,
      row_index,
      loss_queries=loss_queries,
      score_factor=score_factor,
    )
    if self.config.parallel_residual:
      x_BxNxE, normed_BxNxE = self.mlp_norm.branch(x_BxNxE)
      return x_BxNxE + mixed_BxNxE + self.mlp(normed_BxNxE)
    y_BxNxE, normed_BxNxE = self.mlp_norm.branch(x_BxNxE + mixed_BxNxE)
    return y_BxNxE + self.mlp(normed_BxNxE)

  def _specs(self) -> Params | None:
    """Returns how the parameters of this layer are split; None where they are not."""
    if axis_size(FSDP) == 1:
      return None
    specs = parameter_specs(self.config, axis_size(FSDP))
    for name in self.path:
      specs = specs[name]
    if self.path[0] != sharding.STACKED:
      return specs
    # A scan has removed the first axis.
    return jax.tree.map(lambda spec: jax.sharding.PartitionSpec(*spec[1:]), specs)


@functools.lru_cache(maxsize=64)
def parameter_specs(config: TransformerConfig, parts: int) -> Params:
  """Returns how the parameters of a model are split over `fsdp` of that size, as PartitionSpecs.

  A step computes them before its `jax.shard_map`, where the layers ask for them again.
  """
  shapes = jax.eval_shape(functools.partial(init_params, config), jax.random.key(0))
  return sharding.partition_specs(shapes, parts)


def select_params(config: TransformerConfig, params: Params) -> Params:
  """Returns those of a run's parameters that the model of one of its stages has."""

  def selected(specs, params):
    return {
      name: selected(spec, params[name]) if isinstance(spec, dict) else params[name]
      for name, spec in specs.items()
    }

  return selected(parameter_specs(config, axis_size(FSDP)), params)


def _gathering(module: type, config: TransformerConfig, name: str) -> Any:
  """Returns a module class that gathers its parameters when it is called; see
  `sparsek.parallel.sharding.gather`.

  Args:
    module: the class.
    config: of the model.
    name: of the module in the model.
  """
  if not is_sharded():
    return module
  specs = parameter_specs(config, axis_size(FSDP))[name] if axis_size(FSDP) > 1 else None

  def whole(variables):
    return {"params": sharding.gather(variables["params"], specs)[0]}

  return nn.map_variables(module, "params", trans_in_fn=whole)


def _block_class(config: TransformerConfig) -> type[Block]:
  """Returns Block, wrapped so that the backward pass recomputes what `config.remat` says.

  Where the parameters are split, "none" is computed as "dots": gathered parameters are not kept.
  """
  remat = "dots" if config.remat == "none" and axis_size(FSDP) > 1 else config.remat
  if remat == "none":
    return Block
  policies = jax.checkpoint_policies
  attention = policies.save_from_both_policies(
    policies.save_only_these_names(saved.NAME), cudnn.saveable
  )
  # Products with weights have no batch dimensions; attention's own do, and would take O(n * keys)
  # memory.
  policy = {
    "dots": policies.save_from_both_policies(policies.dots_with_no_batch_dims_saveable, attention),
    "attention": attention,
    "full": None,
  }
  return nn.remat(Block, policy=policy[remat], prevent_cse=not config.scan_layers)


class Group(nn.Module):
  """One repetition of the attention pattern: the body of the scan over layers."""

  config: TransformerConfig

  def setup(self) -> None:
    cfg = self.config
    self.blocks = [_block_class(cfg)(cfg, term) for term in cfg.attention]

  def __call__(self, x_BxNxE, segment_ids, first_layer, row_index, loss_queries, score_factor):
    for i, block in enumerate(self.blocks):
      queries = None if loss_queries is None else loss_queries[i]
      x_BxNxE = block(x_BxNxE, segment_ids, first_layer + i, row_index, queries, score_factor)
    return x_BxNxE, None


class Matrix(nn.Module):
  """A float32 parameter of that name and shape: an embedding [V, E], or the output matrix [E, V] of
  a model with untied embeddings.
  """

  parameter: str
  shape: tuple[int, int]

  @nn.compact
  def __call__(self) -> jax.Array:
    return self.param(self.parameter, nn.initializers.normal(0.02), self.shape, jnp.float32)


class Transformer(nn.Module):
  """A decoder language model whose layers attend as `config.attention` says.

  Parameters, all float32: embed/embedding [V, E]; positions/embedding [max_positions, E] if
  learned; layers_<i>/{attention_norm, attention, mlp_norm, mlp}; final_norm/scale (and the bias of
  a layer_norm); lm_head/kernel [E, V] unless tied. With `scan_layers` the layers are stacked
  instead: layers/blocks_<p>/..., p the index in the attention pattern, with a leading axis of
  num_layers / len(pattern). All matrices are called `kernel` (or `embedding`).

  With `trace_once`, inside `jax.jit`, layers with equal settings are traced and lowered once.
  Outside, every call would compile them again.

  Example:
    config = sparsek.preset("tiny")
    params = sparsek.init_params(config, jax.random.key(0))
    logits = sparsek.Transformer(config).apply({"params": params}, tokens)
  """

  config: TransformerConfig
  trace_once: bool = False

  def setup(self) -> None:
    check_config(self.config)
    cfg = self.config
    embedding = lambda name, size: _gathering(Matrix, cfg, name)("embedding", (size, cfg.embed_dim))
    self.embed = embedding("embed", cfg.vocab_size)
    if cfg.positions == "learned":
      self.positions = embedding("positions", cfg.max_positions)
    if cfg.scan_layers:
      scanned = nn.scan(
        Group,
        variable_axes={"params": 0, "diagnostics": 0, "scorer_loss": 0, "scorer_warmup": 0},
        split_rngs={"params": True, "scorer_noise": True, "scorer_loss": True},
        in_axes=(nn.broadcast, 0, nn.broadcast, 0, nn.broadcast),
        length=cfg.num_layers // len(cfg.attention),
      )
      self.layers = scanned(cfg)
    else:
      block = _block_class(cfg)
      if self.trace_once:  # the key of the scorers' loss would be folded for each layer
        block = nn.jit(block, rngs=DenyList("scorer_loss"))
      self.layers = [block(cfg, term) for term in cfg.layer_terms]  # type: ignore[assignment]
    norm = make_norm(cfg)
    self.final_norm = _gathering(type(norm), cfg, "final_norm")(norm.epsilon)
    if not cfg.tie_embeddings:
      self.lm_head = _gathering(Matrix, cfg, "lm_head")("kernel", (cfg.embed_dim, cfg.vocab_size))

  def __call__(self, tokens: jax.Array, segment_ids: jax.Array | None = None) -> jax.Array:
    """Computes the logits of the next token.

    Args:
      tokens: [B, N] integers, N >= 1.
      segment_ids: [B, N] integers or None; a run of equal ids is a document, and everything
        (attention, scores, positions) restarts.

    Returns:
      [B, N, vocab_size] float32. Under `jax.jit` they are NaN where a token that is seen is no id
      of the vocabulary.

    Raises:
      ValueError: where a shape or dtype is not as above, a row is longer than max_positions of
        learned positions, or a token, whose value is known, is no id of the vocabulary.
    """
    hidden_BxNxE = self.hidden(tokens, segment_ids)
    return hidden_to_logits(
      hidden_BxNxE, self.embed().T if self.config.tie_embeddings else self.lm_head()
    )

  def hidden(
    self,
    tokens: jax.Array,
    segment_ids: jax.Array | None = None,
    row_index: jax.Array | None = None,
    score_factor: jax.Array | None = None,
  ) -> jax.Array:
    """Returns the final normalised hidden states [B, N, E] in the activation dtype; times
    `output_matrix` they are the logits.

    Args:
      tokens: [B, N], of whole rows, or this shard's inside `jax.shard_map` over `context`.
      segment_ids: [B, n] of whole rows, or None.
      row_index: [B] int32, each row's index in the batch of all devices, from which the noise on
        its scores and the queries of the scorers' loss derive; 0 .. B - 1 by default.
      score_factor: scalar by which the scores of sparsek layers are multiplied where they select
        and gate: the larger, the harder the gates; None: 1.
    """
    x_BxNxE = self.embedded(tokens, segment_ids)
    queries_LxBxC = self._loss_queries(tokens, row_index)
    if self.config.scan_layers:
      period = len(self.config.attention)
      if queries_LxBxC is not None:
        queries_LxBxC = queries_LxBxC.reshape(-1, period, *queries_LxBxC.shape[1:])
      x_BxNxE, _ = self.layers(
        x_BxNxE,
        segment_ids,
        jnp.arange(0, self.config.num_layers, period),
        row_index,
        queries_LxBxC,
        score_factor,
      )
    else:
      for i, block in enumerate(self.layers):
        queries = None if queries_LxBxC is None else queries_LxBxC[i]
        x_BxNxE = block(x_BxNxE, segment_ids, i, row_index, queries, score_factor)
    return self.final_norm(x_BxNxE)

  def _loss_queries(self, tokens, row_index):
    """Draws the queries of the scorers' loss of all layers, [L, B, C]; None where none is computed.

    All at once: generators of random numbers are long programs, which XLA would compile for each
    layer.
    """
    computed = any(map(self.is_mutable_collection, ("scorer_loss", "scorer_warmup")))
    if self.is_initializing() or not (computed and self.has_rng("scorer_loss")):
      return None
    (batch, length), layers = tokens.shape, self.config.num_layers
    row_index = jnp.arange(batch) if row_index is None else row_index
    layer_keys = jax.random.split(self.make_rng("scorer_loss"), layers)
    keys = jax.vmap(row_keys, (0, None))(layer_keys, row_index).reshape(-1)
    return sample_loss_queries(self.config, keys, length).reshape(layers, batch, -1)

  def embedded(self, tokens: jax.Array, segment_ids: jax.Array | None = None) -> jax.Array:
    """Returns the input of the first block, [B, N, E] in the activation dtype."""
    check_type("tokens", tokens, (jax.Array, np.ndarray), "an array of integers [batch, length]")
    if tokens.ndim != 2 or not tokens.shape[1] or not jnp.issubdtype(tokens.dtype, jnp.integer):
      raise ValueError(
        f"tokens must be integers [batch, length] with length >= 1, got {tokens.dtype} "
        f"{tokens.shape}"
      )
    check_ids("tokens", tokens, self.config.vocab_size)
    x_BxNxE = rows_of(self.embed(), tokens)
    if self.config.positions == "learned":
      row = axis_size(CONTEXT) * tokens.shape[1]
      if row > self.config.max_positions:
        raise ValueError(
          f"tokens has {row} tokens a row, more than "
          f"max_positions={self.config.max_positions} of learned positions"
        )
      positions_BxN = token_positions(segment_ids, *tokens.shape)
      x_BxNxE += jnp.take(self.positions(), positions_BxN, axis=0)
    return x_BxNxE.astype(self.config.activation_dtype)


def check_ids(name: str, ids: jax.Array | np.ndarray, vocab_size: int) -> None:
  """Raises ValueError, with the place and the value, unless integers are ids of a vocabulary.

  Those that JAX traces, or that lie on devices of other processes, are not looked at.
  """
  if isinstance(ids, jax.core.Tracer) or not getattr(ids, "is_fully_addressable", True):
    return
  values = jax.device_get(ids)
  bad = np.argwhere((values < 0) | (values >= vocab_size))
  if len(bad):
    place = tuple(bad[0].tolist())
    raise ValueError(
      f"{name}{list(place)}={values[place]} must be an id of the vocabulary, from 0 to "
      f"{vocab_size - 1}"
    )


def rows_of(table_VxE: jax.Array, ids: jax.Array) -> jax.Array:
  """Returns the rows [..., E] of a table at integers [...]; NaN for ids that it does not have.

  `jnp.take` would count negative ids from the table's end.
  """
  wide = jnp.uint64 if ids.dtype.itemsize == 8 else jnp.uint32
  return jnp.take(table_VxE, ids.astype(wide), axis=0, mode="fill")


def hidden_to_logits(hidden: jax.Array, matrix_ExV: jax.Array) -> jax.Array:
  """Multiplies [..., E] by [E, V] in the dtype of `hidden`, summed and returned in float32."""
  return jnp.matmul(hidden, matrix_ExV.astype(hidden.dtype), preferred_element_type=jnp.float32)


def output_matrix(config: TransformerConfig, params: Params) -> jax.Array:
  """Returns the float32 [E, vocab_size] matrix from `hidden` to logits: the transposed embedding,
  or the head's kernel when untied; inside `jax.shard_map` gathered from its parts.
  """
  name = "embed" if config.tie_embeddings else "lm_head"
  specs = parameter_specs(config, axis_size(FSDP))[name] if axis_size(FSDP) > 1 else None
  matrix, _ = sharding.gather(params[name], specs)
  return matrix["embedding"].T if config.tie_embeddings else matrix["kernel"]


def init_params(config: TransformerConfig, key: jax.Array) -> Params:
  """Draws initial float32 parameters.

  Kernels are normal with variance 1 / fan-in (1 / (2 num_layers fan-in) where they write to the
  residual stream), embeddings normal with standard deviation 0.02. No shape depends on the sequence
  length.

  Args:
    config: the model.
    key: random key, such as `jax.random.key(0)`.
  Raises:
    ValueError: for a key that is none, or a config that is no TransformerConfig.
  """
  check_config(config)
  # What changes no parameter is alike, so that such models share what is traced and compiled.
  config = dataclasses.replace(config, implementation="reference", remat="none")
  return _init_params(config, random_keys("key", key))


@functools.partial(jax.jit, static_argnums=0)
def _init_params(config: TransformerConfig, key: jax.Array) -> Params:
  # The forward pass gives the shapes only and is not computed; the reference is traced fastest.
  # Drawing random numbers for all layers at once compiles in a fraction of the time that it takes
  # layer by layer, and gives the same values in both layouts.
  repeats = config.num_layers % len(config.attention) == 0
  stacked = dataclasses.replace(
    config, scan_layers=True, attention=config.attention if repeats else config.layer_terms
  )
  params = Transformer(stacked).init(key, jnp.zeros((1, 2), jnp.int32))["params"]
  return params if config.scan_layers else unstack_layers(stacked, params)


def count_params(params: Params) -> int:
  """Counts parameters, also given their shapes only, from `jax.eval_shape`.

  Raises:
    ValueError: for what holds anything but arrays or shapes.
  """
  leaves = [None] if params is None else jax.tree.leaves(params)
  for leaf in leaves:
    arrays = (jax.Array, np.ndarray, jax.ShapeDtypeStruct)
    check_type("params", leaf, arrays, "parameters: a dict of arrays, such as init_params returns")
  return sum(leaf.size for leaf in leaves)


def layer_params(config: TransformerConfig, params: Params, index: int) -> Params:
  """Returns the parameters of one block, stacked or not."""
  if not config.scan_layers:
    return params[f"layers_{index}"]
  group, index = divmod(index, len(config.attention))
  return jax.tree.map(lambda leaf: leaf[group], params["layers"][f"blocks_{index}"])


def unstack_layers(config: TransformerConfig, params: Params) -> Params:
  """Returns the parameters of `config` in the layout of scan_layers=False."""
  return {name: leaf for name, leaf in params.items() if name != "layers"} | {
    f"layers_{i}": layer_params(config, params, i) for i in range(config.num_layers)
  }


def stack_layers(config: TransformerConfig, params: Params) -> Params:
  """Returns unstacked parameters in the layout of `config`: undoes `unstack_layers`."""
  if not config.scan_layers:
    return params
  period = len(config.attention)
  groups = lambda index: [params[f"layers_{i}"] for i in range(index, config.num_layers, period)]
  return {name: leaf for name, leaf in params.items() if not name.startswith("layers_")} | {
    "layers": {
      f"blocks_{index}": jax.tree.map(lambda *leaves: jnp.stack(leaves), *groups(index))
      for index in range(period)
    }
  }
