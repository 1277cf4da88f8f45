"""Generation with memory and time per token that do not depend on the length so far.

A sparsek layer keeps, per KV head, a ring of the last `window` keys and values, k slots (key, value, score, position) for the selected
tokens, and the scores, not the keys, of the rest of the SPARSEK support, which the threshold needs. A token that leaves the window
takes the slot of the worst selected token if it scores strictly higher; a score at or below the threshold is forgotten, since
thresholds never decrease. Logits equal those of `Transformer` at every position. Keys are kept after their rotation.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from sparsek import cached_attention
from sparsek.cached_attention import NOWHERE, KeysAndValues, SelectionCache
from sparsek.config import TransformerConfig, check_at_least
from sparsek.baselines import ATTENTION_MODULES, BASELINES
from sparsek.layers import MLP, make_norm, scoring_network
from sparsek.model import Params, hidden_to_logits, layer_params, output_matrix

PREFILL_CHUNK = 512


class Cache(NamedTuple):
  """seen: int32 scalar, tokens so far; layers: per layer a SelectionCache (sparsek) or KeysAndValues (sliding_window, full)."""
  seen: jax.Array
  layers: tuple[SelectionCache | KeysAndValues, ...]


def init_cache(config: TransformerConfig, batch_size: int, *, max_length: int | None = None, support_size: int | None = None) -> Cache:
  """The empty cache.

  Args:
    config: of the model; its k and window fix the size.
    batch_size: rows that are fed together.
    max_length: tokens that full layers can hold; needed, and used, by them only. Logits beyond it are NaN.
    support_size: scores kept per head beyond the k slots; default 8 k + 64. Supports that are larger (nearly equal scores) lose their
      lowest members, which makes the threshold slightly low and gates slightly high.
  Raises:
    ValueError: for sizes below 1 (support_size below 0), max_length=None where a layer is full, or a layer that is a baseline.
  """
  check_at_least("batch_size", batch_size, 1)
  support_size = 8 * config.k + 64 if support_size is None else support_size
  check_at_least("support_size", support_size, 0)
  for kind in config.attention:
    if kind in BASELINES:
      raise ValueError(f"attention={kind!r}: there is no cache for baselines; sparsek, sliding_window and full layers have one")
  if "full" in config.attention:
    if max_length is None:
      raise ValueError("max_length=None: a model with full attention layers keeps every token, so init_cache needs max_length >= 1")
    check_at_least("max_length", max_length, 1)
  heads = (batch_size, config.num_kv_heads)
  rows = lambda length: KeysAndValues(*(jnp.zeros((*heads, length, config.head_dim), config.activation_dtype),) * 2)
  empty = lambda size: jnp.full((*heads, size), -jnp.inf)

  def layer(kind):
    if kind != "sparsek":
      return rows(config.window if kind == "sliding_window" else max_length)
    scorer = scoring_network(config)
    pending = jnp.zeros((batch_size, config.window - scorer.delay, config.num_kv_heads))
    return SelectionCache(rows(config.window), rows(config.k), empty(config.k), jnp.full((*heads, config.k), NOWHERE), empty(support_size),
                          pending, scorer.initial_state(batch_size))
  return Cache(jnp.int32(0), tuple(layer(kind) for kind in config.layer_kinds))


def prefill(config: TransformerConfig, params: Params, cache: Cache, tokens: jax.Array, *, last_only: bool = False,
            chunk_size: int = PREFILL_CHUNK) -> tuple[jax.Array, Cache]:
  """Feeds tokens, in chunks, after those that the cache has seen.

  Args:
    config, params: the model.
    cache: from `init_cache`, `prefill` or `decode_step`.
    tokens: [B, m] integers, m >= 1. Every m compiles anew; the rows are one document each.
    last_only: return the logits of the last token only; those of a long prompt are large.
    chunk_size: tokens processed at a time.
  Returns:
    Logits [B, m, vocab_size] float32 ([B, 1, vocab_size] with last_only), and the cache after these tokens.
  Raises:
    ValueError: for bad shapes, or a cache made for another configuration or batch.
  """
  if tokens.ndim != 2 or tokens.shape[1] < 1:
    raise ValueError(f"tokens has shape {tokens.shape}, expected [batch, m] with m >= 1")
  check_at_least("chunk_size", chunk_size, 1)
  _check_cache(config, cache, tokens)
  return _prefill(config, params, cache, tokens, last_only, chunk_size)


def decode_step(config: TransformerConfig, params: Params, cache: Cache, token: jax.Array) -> tuple[jax.Array, Cache]:
  """Feeds one token a row: token [B] integers -> (logits [B, vocab_size] float32 of the next one, cache). ValueError as `prefill`."""
  if token.ndim != 1:
    raise ValueError(f"token has shape {token.shape}, expected [batch]")
  _check_cache(config, cache, token)
  logits, cache = _prefill(config, params, cache, token[:, None], True, 1)
  return logits[:, 0], cache


def _check_cache(config, cache, tokens):
  if not jnp.issubdtype(tokens.dtype, jnp.integer):
    raise ValueError(f"tokens has dtype {tokens.dtype}, expected integers")
  if len(cache.layers) != config.num_layers:
    raise ValueError(f"cache has {len(cache.layers)} layers, the configuration num_layers={config.num_layers}")
  delay = scoring_network(config).delay
  for i, (kind, layer) in enumerate(zip(config.layer_kinds, cache.layers)):
    if isinstance(layer, SelectionCache) != (kind == "sparsek"):
      raise ValueError(f"cache does not fit the configuration: layer {i} is {kind}")
    got, want = {}, {"batch": tokens.shape[0], "num_kv_heads": config.num_kv_heads, "head_dim": config.head_dim}
    ring = layer.ring if kind == "sparsek" else layer
    got["batch"], got["num_kv_heads"], length, got["head_dim"] = ring.key.shape
    if kind != "full":
      got["window"], want["window"] = length, config.window
    if kind == "sparsek":
      got |= {"k": layer.score.shape[-1], "lookahead": length - layer.pending.shape[1]}
      want |= {"k": config.k, "lookahead": delay}
    if got != want:
      differ = ", ".join(f"{name}={got[name]} (needed: {want[name]})" for name in want if got[name] != want[name])
      raise ValueError(f"cache was made for {differ}")


@functools.partial(jax.jit, static_argnums=(0, 4, 5))
def _prefill(config, params, cache, tokens, last_only, chunk_size):
  length = tokens.shape[1]
  whole = length // chunk_size if length > chunk_size else 0
  hidden = []
  if whole:
    def step(cache, tokens):
      hidden, cache = _extend(config, params, cache, tokens)
      return cache, hidden[:, -1:] if last_only else hidden
    chunks = jnp.swapaxes(tokens[:, :whole * chunk_size].reshape(tokens.shape[0], whole, chunk_size), 0, 1)
    cache, outs = jax.lax.scan(step, cache, chunks)
    hidden.append(outs[-1] if last_only else jnp.swapaxes(outs, 0, 1).reshape(tokens.shape[0], whole * chunk_size, -1))
  if whole * chunk_size < length:
    rest, cache = _extend(config, params, cache, tokens[:, whole * chunk_size:])
    hidden.append(rest)
  hidden = hidden[-1][:, -1:] if last_only else jnp.concatenate(hidden, axis=1)
  return hidden_to_logits(hidden, output_matrix(config, params)), cache


def _extend(config, params, cache, tokens_BxC):
  """One chunk through all layers: final hidden states and the next cache."""
  length = tokens_BxC.shape[1]
  x_BxCxE = jnp.take(params["embed"]["embedding"], tokens_BxC, axis=0)
  if config.positions == "learned":                       # NaN beyond the table: loud, not wrong
    x_BxCxE += jnp.take(params["positions"]["embedding"], cache.seen + jnp.arange(length), axis=0, mode="fill")
  x_BxCxE = x_BxCxE.astype(config.activation_dtype)
  norm = lambda params, x: make_norm(config).apply({"params": params}, x)
  layers = []
  for i, (kind, layer) in enumerate(zip(config.layer_kinds, cache.layers)):
    block = layer_params(config, params, i)
    attention = functools.partial(ATTENTION_MODULES[kind](config).apply, {"params": block["attention"]})
    h_BxCxE = norm(block["attention_norm"], x_BxCxE)
    query, key, value = attention(h_BxCxE, cache.seen + jnp.arange(length), method="project")
    new = KeysAndValues(jnp.swapaxes(key, 1, 2), jnp.swapaxes(value, 1, 2))
    if kind == "full":
      mixed, layer = cached_attention.full_attention(config, layer, cache.seen, query, new)
    elif kind == "sliding_window":
      mixed, layer = cached_attention.window_attention(config, layer, cache.seen, query, new)
    else:
      scorer = functools.partial(scoring_network(config).apply, {"params": block["attention"].get("scorer", {})}, method="stream")
      scores, state = scorer(h_BxCxE, layer.scorer, cache.seen, i)
      advance = cached_attention.select_token if length == 1 else cached_attention.select_chunk
      mixed, layer = advance(config, layer._replace(scorer=state), cache.seen, query, new, scores)
    y_BxCxE = x_BxCxE + attention(mixed, method="output")
    x_BxCxE = y_BxCxE + MLP(config).apply({"params": block["mlp"]}, norm(block["mlp_norm"], x_BxCxE if config.parallel_residual else y_BxCxE))
    layers.append(layer)
  return norm(params["final_norm"], x_BxCxE), Cache(cache.seen + length, tuple(layers))
