"""Registered scorers and kinds of attention."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl import flags

from sparsek.command_line.flags import define_model_flags
from sparsek.config import ATTENTION_KINDS, SCORERS, TransformerConfig
from sparsek.generation import cache
from sparsek.model import baselines
from sparsek.model.implementations import describe_choice
from sparsek.model.layers import SlidingWindowAttention
from sparsek.model.registration import register_attention, register_scorer
from sparsek.model.transformer import Transformer, init_params
from tests.helpers import quick_jit, restored_registries

SMALL = TransformerConfig(
  vocab_size=11,
  num_layers=1,
  embed_dim=16,
  num_heads=2,
  num_kv_heads=1,
  head_dim=8,
  mlp_dim=16,
  k=2,
  window=3,
  implementation="reference",
)
TOKENS = jnp.asarray([[1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 1, 5]])


class Feature(nn.Module):
  """A scorer without parameters: a token's score is a feature of it."""

  config: TransformerConfig

  def __call__(self, x, segment_ids=None, layer=0):
    return jnp.repeat(x[..., :1].astype(jnp.float32), self.config.num_kv_heads, axis=-1)


class DelayedFeature(Feature):
  """The score of a token is the feature of the next one."""

  delay = 1

  def __call__(self, x, segment_ids=None, layer=0):
    scores = super().__call__(x)
    return jnp.concatenate([scores[:, 1:], jnp.zeros_like(scores[:, :1])], axis=1)

  def initial_state(self, batch_size):
    return ()

  def stream(self, x, state, seen, layer=0, count=None, linear=None):
    return super().__call__(x), state


@pytest.fixture
def registry():
  with restored_registries():
    yield


@pytest.mark.usefixtures("registry")
def test_a_scorer_chooses_the_tokens_and_streams():
  register_scorer("next", DelayedFeature)
  config = dataclasses.replace(SMALL, scorer="next")
  params = init_params(config, jax.random.key(0))
  assert "scorer" not in params["layers_0"]["attention"]
  model = Transformer(config)
  wanted, sown = quick_jit(lambda *a: model.apply(*a, mutable=["diagnostics"]))(
    {"params": params}, TOKENS
  )
  scores = sown["diagnostics"]["layers_0"]["attention"]["scores"][0][0, :, 0]
  assert len(set(np.asarray(scores[:10]).tolist())) > 5  # not all alike
  first, state = cache.prefill(config, params, cache.init_cache(config, 1), TOKENS[:, :7])
  np.testing.assert_allclose(first, wanted[:, :7], atol=2e-6)
  for t in range(7, 12):
    logits, state = cache.decode_step(config, params, state, TOKENS[:, t])
    np.testing.assert_allclose(logits, wanted[:, t], atol=2e-6)
  # A cache of another scorer is refused.
  with pytest.raises(ValueError, match="lookahead=0"):
    cache.decode_step(config, params, cache.init_cache(SMALL, 1), TOKENS[:, 0])


@pytest.mark.usefixtures("registry")
def test_a_scorer_of_whole_rows_does_not_generate():
  register_scorer("feature", Feature)
  config = dataclasses.replace(SMALL, scorer="feature")
  with pytest.raises(NotImplementedError, match="'feature' has no method stream and no initial_st"):
    cache.init_cache(config, 1)
  assert "scorer 'feature' needs whole rows" in baselines.context_refusal(
    dataclasses.replace(config, implementation=None)
  )


@pytest.mark.usefixtures("registry")
def test_a_kind_of_attention():
  class Near(SlidingWindowAttention):
    shardable = False

  register_attention("near2", Near)
  register_attention("near2", Near)  # no harm
  config = dataclasses.replace(SMALL, num_layers=2, attention="near2:w2,sparsek")
  same = dataclasses.replace(config, attention="sliding_window:w2,sparsek")
  params = init_params(config, jax.random.key(0))
  np.testing.assert_array_equal(
    Transformer(config).apply({"params": params}, TOKENS),
    Transformer(same).apply({"params": params}, TOKENS),
  )
  with pytest.raises(NotImplementedError, match="attention='near2' is registered, and only"):
    cache.init_cache(config, 1)
  assert "'near2' needs whole rows" in baselines.context_refusal(config)
  assert "attention of near2:w2: its own code on" in "".join(describe_choice(config, 12))


@pytest.mark.usefixtures("registry")
def test_flags_and_errors_name_what_is_registered():
  register_scorer("feature", Feature)
  register_attention("near2", SlidingWindowAttention)
  values = flags.FlagValues()
  define_model_flags(values)
  values(["", "--scorer=feature", "--attention=near2"])
  with pytest.raises(flags.IllegalFlagValueError, match="conv|random|feature"):
    values(["", "--scorer=other"])
  with pytest.raises(ValueError, match="linear, conv, random, feature; a name"):
    dataclasses.replace(SMALL, scorer="other")
  with pytest.raises(ValueError, match="kvzap, near2; a name"):
    dataclasses.replace(SMALL, attention="other")


@pytest.mark.parametrize(
  "register, name, value, message",
  [
    (register_scorer, "Big", Feature, "scorer name 'Big' must be lower-case letters"),
    (register_scorer, "a:b", Feature, "scorer name 'a:b' must be lower-case letters"),
    (register_scorer, "conv", Feature, "'conv' is taken; taken are linear, conv, random"),
    (register_scorer, "new", Feature(SMALL), "must be a function of a TransformerConfig"),
    (register_attention, "full", SlidingWindowAttention, "attention name 'full' is taken"),
    (register_attention, "new", Feature, "must be a subclass of"),
  ],
)
def test_bad_registrations_are_refused(register, name, value, message):
  before = list(SCORERS), list(ATTENTION_KINDS)
  with pytest.raises(ValueError, match=message):
    register(name, value)
  assert (SCORERS, ATTENTION_KINDS) == before
