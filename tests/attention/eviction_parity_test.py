"""TOVA, H2O and SnapKV against kvpress; needs pip install -e '.[test,parity]' kvpress."""

import dataclasses
import types

import numpy as np
import pytest

from sparsek.attention import eviction
from sparsek.huggingface import pretrained
from sparsek.model.transformer import Transformer
from tests.helpers import quick_jit

reason = "compares with kvpress, which is not installed here: pip install -e '.[parity]' kvpress"
torch = pytest.importorskip("torch", reason=reason)
transformers = pytest.importorskip("transformers", reason=reason)
kvpress = pytest.importorskip("kvpress", reason=reason)

N, HEADS, GROUPS, DIM, WINDOW = 64, 4, 2, 8, 79  # of 80 keys, with a border every 5 tokens


@pytest.fixture(scope="module")
def example():
  """Returns queries and keys, and their causal attention, [1, HEADS, N, N]."""
  draw = np.random.default_rng(0).normal
  query, key = draw(size=(1, 60, HEADS, DIM)), draw(size=(1, 60, GROUPS, DIM))
  logits = np.einsum("bihd,bjhd->bhij", query, np.repeat(key, HEADS // GROUPS, 2)) / DIM**0.5
  weights = np.exp(logits) * np.tri(60)
  return query, key, torch.tensor(weights / weights.sum(-1, keepdims=True))


def marks(rule, example):
  """Returns the marks [G, n] of all tokens, and those by which the next border would decide."""
  query, key = (x.astype(np.float32) for x in example[:2])
  n = query.shape[1]
  bounds = np.zeros((1, n), np.int32), np.full((1, n), n, np.int32)
  kept, _ = eviction.over_blocks(
    rule,
    eviction.nothing_kept(1, GROUPS, 1, WINDOW, (DIM, np.float32)),
    query,
    (key,),
    *bounds,
    np.full(1, n, np.int32),
    DIM**-0.5,
    lambda out, *_: out,
    np.zeros(()),
  )
  return kept.mark[0, :, -n:], eviction.smoothed(kept.mark[:, :, -n:])[0]


def score(press, example):
  """Returns kvpress's scores [G, n]."""
  query, key, attentions = example
  module = types.SimpleNamespace(config=types.SimpleNamespace(num_attention_heads=HEADS))
  keys, hidden = torch.tensor(key).transpose(1, 2), torch.zeros(1, query.shape[1], 1)
  return press.score(module, hidden, keys, keys, attentions, {})[0]


def test_the_marks_of_tova_are_its_scores(example):
  # kvpress always keeps the last token
  np.testing.assert_allclose(
    marks("tova", example)[0][:, :-1], score(kvpress.TOVAPress(), example)[:, :-1], atol=1e-6
  )


def test_the_marks_of_h2o_are_its_scores_times_the_number_of_queries(example):
  want = score(kvpress.ObservedAttentionPress(), example)
  np.testing.assert_allclose(
    marks("h2o", example)[0], want * torch.arange(want.shape[1], 0, -1), atol=1e-5
  )


def test_the_marks_of_snapkv_are_its_scores(example):
  size = eviction.block_size(1, WINDOW)
  press = kvpress.SnapKVPress(window_size=size, kernel_size=eviction.POOL)
  # those near the queries that are looked at have other neighbours in kvpress
  near = size + eviction.POOL // 2
  np.testing.assert_allclose(
    marks("snapkv", example)[1][:, :-near], size * score(press, example)[:, :-near], atol=1e-6
  )


@torch.no_grad
def test_tova_token_by_token_in_a_model(tmp_path):
  """It keeps the last token when it evicts, which is here a window of 2 at the next query."""
  torch.manual_seed(0)
  config = transformers.LlamaConfig(
    vocab_size=61,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=HEADS,
    num_key_value_heads=GROUPS,
    intermediate_size=48,
    initializer_range=0.2,
    attn_implementation="eager",
  )
  model, k = transformers.LlamaForCausalLM(config).eval(), 8
  tokens = np.random.default_rng(0).integers(0, 61, (1, N))
  press = kvpress.DecodingPress(
    kvpress.TOVAPress(), compression_interval=1, target_size=k + 1, hidden_states_buffer_size=1
  )
  cache, logits = transformers.DynamicCache(), []
  with press(model):
    for at in range(N):
      position = torch.tensor([at])
      output = model(
        torch.tensor(tokens[:, at : at + 1]),
        past_key_values=cache,
        position_ids=position[None],
        cache_position=position,
      )
      logits.append(output.logits[:, 0])
  want = torch.stack(logits, 1).numpy()
  model.save_pretrained(tmp_path)
  dense, params = pretrained.load(str(tmp_path))
  for size in (k, k + 1):
    ours = dataclasses.replace(dense, attention="tova", k=size, window=2)
    got = quick_jit(Transformer(ours).apply)({"params": params}, tokens)
    assert (np.abs(got - want).max() < 1e-4) == (size == k)
