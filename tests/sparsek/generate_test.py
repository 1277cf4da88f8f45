import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsek.config import TransformerConfig
from sparsek.generate import generate, sample, stream_text
from sparsek.model import Transformer, init_params
from sparsek.tokenizer import ByteTokenizer
from tests.sparsek.helpers import quick_jit

CONFIG = TransformerConfig(vocab_size=40, num_layers=2, embed_dim=16, num_heads=2, num_kv_heads=1, head_dim=8, mlp_dim=16, k=3, window=4,
                           attention="sparsek,full", scan_layers=True, implementation="reference")
PROMPT = [3, 1, 4, 1, 5]


@functools.cache
def params():
  tree = quick_jit(functools.partial(init_params, CONFIG))(jax.random.key(0))
  return {**tree, "embed": jax.tree.map(lambda x: 30 * x, tree["embed"])}


def run(**more):
  return list(generate(CONFIG, params(), PROMPT, **{"max_new_tokens": 12, "temperature": 0.0, **more}))


def test_greedy_takes_the_largest_logit_of_the_parallel_forward():
  tokens = run()
  assert len(tokens) == 12 and tokens == run(key=jax.random.key(7))
  logits = quick_jit(Transformer(CONFIG).apply)({"params": params()}, jnp.asarray([PROMPT + tokens]))[0]
  assert tokens == np.argmax(logits[len(PROMPT) - 1:-1], -1).tolist()


def test_stops_at_eos_and_at_nothing():
  tokens = run()
  assert run(eos_id=[tokens[5], CONFIG.vocab_size]) == tokens[:tokens.index(tokens[5])]
  assert run(max_new_tokens=0) == []
  assert run(max_new_tokens=1) == tokens[:1]


def test_keys_decide_the_text():
  draw = lambda seed: run(temperature=5.0, key=jax.random.key(seed))
  assert draw(0) == draw(0) != draw(1)
  assert run(temperature=5.0, top_p=1e-6, key=jax.random.key(0)) == run(), "a tiny nucleus is greedy"


def test_tokens_stream():
  config = dataclasses.replace(CONFIG, attention="sliding_window")
  tokens = generate(config, init_params(config, jax.random.key(0)), PROMPT, max_new_tokens=10**9, temperature=0.0)
  assert len([next(tokens) for _ in range(3)]) == 3, "a limit of 10^9 tokens must cost nothing"


def test_sample_draws_from_the_nucleus():
  probability = np.asarray([0.1, 0.5, 0.3, 0.06, 0.04])
  logits = jnp.log(jnp.asarray(probability)) + 3
  draw = quick_jit(lambda temperature, top_p: sample(jnp.broadcast_to(logits, (20000, 5)), jax.random.key(0), temperature, top_p))
  share = lambda *args: np.bincount(draw(*args), minlength=5) / 20000
  np.testing.assert_allclose(share(1.0, 1.0), probability, atol=0.015)
  np.testing.assert_allclose(share(1.0, 0.7), [0, 0.625, 0.375, 0, 0], atol=0.015)
  np.testing.assert_allclose(share(0.5, 1.0), probability**2 / np.sum(probability**2), atol=0.015)
  np.testing.assert_array_equal(share(0.0, 1.0), [0, 1, 0, 0, 0])
  np.testing.assert_array_equal(share(1.0, 0.01), [0, 1, 0, 0, 0])


@pytest.mark.parametrize("arguments, message", [
    (dict(prompt_tokens=[]), "prompt_tokens has shape"),
    (dict(prompt_tokens=[[1]]), "prompt_tokens has shape"),
    (dict(prompt_tokens=[1, 40]), "from 0 to 39"),
    (dict(prompt_tokens=[-1]), "from 0 to 39"),
    (dict(prompt_tokens=[1.5]), "expected integers"),
    (dict(max_new_tokens=-1), "max_new_tokens=-1"),
    (dict(temperature=-0.5), "temperature=-0.5"),
    (dict(temperature=float("nan")), "temperature=nan"),
    (dict(top_p=0.0), "top_p=0.0"),
    (dict(top_p=1.5), "top_p=1.5"),
    (dict(temperature=1.0), "key=None"),
])
def test_bad_arguments_are_refused_at_the_call(arguments, message):
  arguments = dict(prompt_tokens=PROMPT, max_new_tokens=3, temperature=0.0) | arguments
  with pytest.raises(ValueError, match=message):
    generate(CONFIG, None, **arguments)


def test_more_tokens_than_learned_positions_are_refused_at_the_call():
  config = dataclasses.replace(CONFIG, positions="learned", max_positions=10)
  with pytest.raises(ValueError, match=f"max_new_tokens=9 after {len(PROMPT)} prompt tokens: the model has max_positions=10"):
    generate(config, None, PROMPT, max_new_tokens=9, temperature=0.0)


@pytest.mark.parametrize("text", ["plain", "naïve €5 — 日本語 🙂!", "🙂", ""])
def test_streamed_text_never_holds_half_a_character(text):
  pieces = list(stream_text(ByteTokenizer(), text.encode()))
  assert pieces == list(text)


def test_streamed_text_keeps_what_is_no_text():
  broken = b"a\xff\xfeb\xe2\x82"
  assert "".join(stream_text(ByteTokenizer(), broken)) == broken.decode(errors="replace")


class WordTokenizer:
  """Writes a space between words, so that a token reads differently after another."""

  def decode(self, ids):
    return " ".join("word" + str(i) for i in ids)


def test_streamed_text_of_tokens_that_join():
  assert list(stream_text(WordTokenizer(), [1, 2, 3])) == ["word1", " word2", " word3"]
