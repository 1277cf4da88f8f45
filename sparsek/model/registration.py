"""Scorers and kinds of attention that users add by name, without changing the library.

A name holds until the process ends. Configurations accept it, and commands that import the module
which registers it: `--import=MODULE` (`sparsek.command_line.own_modules`).
"""

from collections.abc import Callable

import flax.linen as nn

from sparsek.config import ATTENTION_KINDS, SCORERS, TransformerConfig
from sparsek.config.layer_patterns import NAME
from sparsek.model.baselines import ATTENTION_MODULES
from sparsek.model.layers import Attention
from sparsek.model.scorers import SCORER_FACTORIES


def register_scorer(name: str, factory: Callable[[TransformerConfig], nn.Module]) -> None:
  """Registers a scoring network, which `scorer=name` then chooses.

  The module is called as `module(x, segment_ids, layer)`, with hidden states x [batch, n, E], the
  segment_ids [batch, n] or None, and the index of the layer. It returns float32 scores [batch, n,
  num_kv_heads], one per token and key/value head. A token's score may depend on `delay` later
  tokens, at most `window`; `delay` is an attribute of the module, 0 without it. With 0 the model is
  causal only if no score depends on later tokens.

  Generation needs two more methods, and NotImplementedError says so where they are missing:

    initial_state(batch_size): the state before the first token, any tree of arrays [batch_size,
      ...].
    stream(x, state, seen, layer, count, linear): (scores, state). x [batch, C, E] are the next C
      tokens, the first of them at position `seen` [batch]; of row b only the first `count[b]`
      exist (None: all), and the state must not depend on others. Scores [batch, C, num_kv_heads]
      are those of positions seen - delay .. seen - delay + C - 1. `linear` is None.

  Rows must not be spread over several devices.

  Args:
    name: lower-case letters, digits and _, beginning with a letter.
    factory: makes the module for a configuration, such as a module class whose one field is the
      `TransformerConfig`.

  Raises:
    ValueError: for a name of another form, or one that is taken.

  Example:
    class Norm(nn.Module):  # keeps the tokens of largest norm
      config: sparsek.TransformerConfig

      def __call__(self, x, segment_ids=None, layer=0):
        norm = jnp.linalg.norm(x.astype(jnp.float32), axis=-1, keepdims=True)
        return jnp.broadcast_to(norm, (*x.shape[:2], self.config.num_kv_heads))

    register_scorer("norm", Norm)
    config = sparsek.TransformerConfig(scorer="norm")
  """
  if not callable(factory) or isinstance(factory, nn.Module):
    raise ValueError(
      f"factory={factory!r} must be a function of a TransformerConfig that makes the module"
    )
  _add("scorer", name, SCORERS, SCORER_FACTORIES.get(name), factory)
  SCORER_FACTORIES[name] = factory


def register_attention(name: str, module: type[Attention]) -> None:
  """Registers a kind of attention, which `attention=name` and layer patterns then accept.

  Projections, rotary embedding and output projection are those of `Attention`; the method `mix` of
  the subclass lets queries attend to keys. The counts of operations take it to see `k` + `window`
  keys a query. There is no cache for it: generation raises NotImplementedError.

  Args:
    name: lower-case letters, digits and _, beginning with a letter.
    module: a subclass of `Attention`. With `shardable = True` it promises that `mix` also works on
      a part of each row, inside `jax.shard_map` over `context`.

  Raises:
    ValueError: for a name of another form, one that is taken, or another class.

  Example:
    class MeanOfPast(Attention):
      def mix(self, tokens):  # [B, N, H, D] of values [B, N, G, D]
        count = 1 + jnp.arange(tokens.value.shape[1])[:, None, None]
        mean = jnp.cumsum(tokens.value, axis=1) / count
        return jnp.repeat(mean, self.config.num_heads // self.config.num_kv_heads, axis=2)

    register_attention("mean_of_past", MeanOfPast)
    config = sparsek.TransformerConfig(attention="mean_of_past*3,sparsek")
  """
  if not (isinstance(module, type) and issubclass(module, Attention)):
    raise ValueError(f"module={module!r} must be a subclass of sparsek.model.layers.Attention")
  _add("attention", name, ATTENTION_KINDS, ATTENTION_MODULES.get(name), module)
  ATTENTION_MODULES[name] = module


def _add(what, name, names, present, new):
  """Appends a name to the names that are allowed; raises ValueError for a bad one.

  A name never changes its meaning: compiled functions and caches of parameters' shapes depend on
  it.
  """
  if not isinstance(name, str) or not NAME.fullmatch(name):
    raise ValueError(
      f"{what} name {name!r} must be lower-case letters, digits and _, beginning with a letter"
    )
  if present is new:
    return
  if name in names:
    raise ValueError(f"{what} name {name!r} is taken; taken are {', '.join(names)}")
  names.append(name)
