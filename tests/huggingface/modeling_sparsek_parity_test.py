"""The PyTorch file of exported SPARSEK models against this library; needs `.[parity]`."""

import copy
import functools
import importlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsek.config import TransformerConfig
from sparsek.data.tokenizer import ByteTokenizer, load_tokenizer, train_bpe
from sparsek.generation.session import generate
from sparsek.huggingface import pretrained
from sparsek.model.transformer import Transformer, init_params
from tests.helpers import quick_jit

reason = "compares with transformers, which is not installed here: pip install -e '.[parity]'"
torch = pytest.importorskip("torch", reason=reason)
transformers = pytest.importorskip("transformers", reason=reason)

V, N, PADDING = 61, 40, 5
BASE = dict(
  vocab_size=V,
  num_layers=2,
  embed_dim=32,
  num_heads=4,
  num_kv_heads=2,
  head_dim=8,
  mlp_dim=48,
  k=5,
  window=6,
)
BIASES = dict(use_bias=True, out_bias=True, mlp_bias=True)
CASES = {
  "linear, untied": dict(tie_embeddings=False),
  "conv, value": dict(
    scorer="conv",
    gate="value",
    attention="sparsek:k3:w7,full",
    scorer_init_scale=2.0,
    scorer_init_slope=0.3,
    scorer_init_noise=0.2,
    scorer_init_sink=1.5,
  ),
  "shared, key_value": dict(
    gate="key_value",
    attention="sparsek,sliding_window:w4",
    scorer_shared=True,
    qk_norm=True,
    use_bias=True,
    rope_scaling="llama3:8:1:4:16",
  ),
  "like GPT-NeoX, random": dict(
    norm="layer_norm",
    mlp="gelu",
    rope_fraction=0.5,
    parallel_residual=True,
    num_kv_heads=4,
    scorer="random",
    scorer_init_sink=1.0,
    rope_scaling="linear:2",
    **BIASES,
  ),
  "like GPT-2, without a window": dict(
    norm="layer_norm",
    mlp="gelu_tanh",
    positions="learned",
    max_positions=64,
    scorer_normalize=False,
    window=0,
    scan_layers=True,
    **BIASES,
  ),
  "heads of their own, conv, value": dict(
    num_kv_heads=4,
    gate="value",
    scorer="conv",
    attention="sparsek:h1-2:k0:w7,sparsek:k3:h0.2:k9:w20",
  ),
  "heads of their own window": dict(attention="sparsek:w0:h0:k3:w8,sliding_window:h1:w9"),
}
TOKENS = np.random.default_rng(0).integers(1, V, (2, N)).astype(np.int32)
IDS = torch.tensor(TOKENS).long()


def load(folder, **kwargs):
  """Returns the model of a folder; it attends from 16 queries at a time, so from several blocks."""
  kwargs = {"trust_remote_code": True, **kwargs}
  model = transformers.AutoModelForCausalLM.from_pretrained(str(folder), **kwargs)
  sys.modules[type(model).__module__].QUERIES = 16
  return model.eval()


@pytest.fixture(scope="module", params=CASES)
def case(request, tmp_path_factory):
  """Returns (configuration, our parameters, exported folder, model in PyTorch)."""
  config = TransformerConfig(**{**BASE, **CASES[request.param]})
  generator = np.random.default_rng(0)
  params = jax.tree.map(
    lambda leaf: leaf + 0.2 * generator.normal(size=leaf.shape).astype(np.float32),
    init_params(config, jax.random.key(0)),
  )
  folder = tmp_path_factory.mktemp("exported") / "model"
  pretrained.save(str(folder), config, params)
  return config, params, folder, load(folder)


@pytest.fixture(scope="module")
def ours(case):
  """Returns this library's (loss, logits, gradients under the names of PyTorch's parameters)."""
  config, params, folder, _ = case

  def loss(params):
    logits = Transformer(config).apply({"params": params}, jnp.asarray(TOKENS))
    log_probability = jax.nn.log_softmax(logits[:, :-1])
    return -jnp.mean(jnp.take_along_axis(log_probability, TOKENS[:, 1:, None], -1)), logits

  (value, logits), gradients = quick_jit(jax.value_and_grad(loss, has_aux=True))(params)
  pretrained.save(str(folder.parent / "gradients"), config, gradients)
  gradients = load(folder.parent / "gradients").state_dict()
  return float(value), torch.tensor(np.asarray(logits)), gradients


def cached(model, parts, **kwargs):
  """Returns the logits of parts of a row, each fed after those before it, and the cache."""
  cache, logits = None, []
  for part in parts:
    output = model(part, use_cache=True, past_key_values=cache, **kwargs)
    cache = output["cache" if "cache" in output else "past_key_values"]
    logits.append(output.logits)
  return torch.cat(logits, 1), cache


def test_logits_and_gradients(case, ours):
  """Those of all parameters, the scorers' among them."""
  model, (loss, logits, gradients) = case[-1], ours
  output = model(IDS, labels=IDS)
  assert (output.logits - logits).abs().max() < 1e-4 and abs(output.loss.item() - loss) < 1e-5
  model.zero_grad()
  output.loss.backward()
  largest = max(gradient.abs().max() for gradient in gradients.values())
  for name, parameter in model.named_parameters():
    want = gradients[name]
    tolerance = 1e-4 * want.abs().max() + 1e-6 * largest  # of key biases it is 0
    assert (parameter.grad - want).abs().max() < tolerance, name
    assert "scorer" not in name or want.abs().max() > 1e-5 * largest, f"{name} does not learn"


@torch.no_grad
def test_a_cache_of_constant_size(case, ours):
  parts = IDS.split([13, 1, 1, 17, 1, 7], 1)
  logits, cache = cached(case[-1], parts)
  assert (logits - ours[1]).abs().max() < 1e-4
  size = lambda cache: sum(x.numel() for state in cache.states.values() for x in state.values())
  grows = "full" in case[0].layer_kinds
  first = cached(case[-1], parts[:1])[1]
  assert grows != (size(cache) == size(first))
  for state in first.states.values():
    for name, x in state.items():
      assert x.untyped_storage().nbytes() == x.nbytes, f"{name} keeps more than it shows"


@torch.no_grad
def test_padding_on_either_side(case, ours):
  """Rows of different lengths, with and without a cache."""
  model, short = case[-1], N - PADDING
  for first in (PADDING, 0):
    ids, mask = IDS.clone(), torch.ones_like(IDS)
    ids[0, first : first + short] = IDS[0, :short]
    padding = slice(0, PADDING) if first else slice(short, N)
    ids[0, padding], mask[0, padding] = 0, 0
    logits = model(ids, attention_mask=mask, use_cache=False).logits
    assert (logits[0, first : first + short] - ours[1][0, :short]).abs().max() < 1e-4
    assert (logits[1] - ours[1][1]).abs().max() < 1e-4


@torch.no_grad
def test_greedy_texts_of_a_padded_batch(case):
  config, params, _, model = case
  lengths, count = (N - 20, N - 10), 8
  want = [
    list(generate(config, params, row[:length], max_new_tokens=count, temperature=0))
    for row, length in zip(TOKENS, lengths)
  ]
  longest = max(lengths)
  rows = [torch.nn.functional.pad(x[:n], (longest - n, 0)) for x, n in zip(IDS, lengths)]
  ids = torch.stack(rows)
  settings = dict(max_new_tokens=count, do_sample=False, eos_token_id=None, pad_token_id=0)
  for use_cache in (True, False):
    texts = model.generate(ids, attention_mask=(ids > 0).long(), use_cache=use_cache, **settings)
    assert texts[:, longest:].tolist() == want
  chunks = model.generate(ids, attention_mask=(ids > 0).long(), prefill_chunk_size=7, **settings)
  assert chunks[:, longest:].tolist() == want
  beams = [
    model.generate(
      ids, attention_mask=(ids > 0).long(), num_beams=3, use_cache=use_cache, **settings
    )
    for use_cache in (True, False)
  ]
  assert torch.equal(*beams)


def test_what_transformers_saves_comes_back(case, tmp_path):
  """A model that was tuned there is a model here, and there again."""
  config, params, _, model = case
  model.save_pretrained(tmp_path / "tuned")
  back, tuned = pretrained.load(str(tmp_path / "tuned"))
  assert back == config
  jax.tree.map(np.testing.assert_array_equal, tuned, params)
  assert torch.equal(load(tmp_path / "tuned").lm_head.weight, model.lm_head.weight)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
  """Returns the folder of a model with every kind of layer, and the model."""
  config = TransformerConfig(**BASE | dict(num_layers=3, attention="sparsek,sliding_window,full"))
  folder = tmp_path_factory.mktemp("small") / "model"
  params = quick_jit(functools.partial(init_params, config))(jax.random.key(0))
  pretrained.save(str(folder), config, params)
  return folder, load(folder)


@torch.no_grad
def test_of_equal_scores_the_earlier_token_stays(small, tmp_path):
  config, params = pretrained.load(str(small[0]))
  linear = params["layers_0"]["attention"]["scorer"]["linear"]
  linear["kernel"] = jnp.zeros_like(linear["kernel"])
  pretrained.save(str(tmp_path / "model"), config, params)
  want = quick_jit(Transformer(config).apply)({"params": params}, jnp.asarray(TOKENS))
  logits, _ = cached(load(tmp_path / "model"), IDS.split([20, 1, 19], 1))
  assert np.abs(logits.numpy() - want).max() < 1e-4


def test_what_cannot_be_computed_is_refused(small):
  model, mask = small[1], torch.ones_like(IDS)
  mask[0, 3] = 0
  with pytest.raises(ValueError, match="padding between the tokens"):
    model(IDS, attention_mask=mask)
  _, cache = cached(model, [IDS], attention_mask=mask.fliplr().cummin(1).values)
  with pytest.raises(ValueError, match="padding between the tokens"):
    model(IDS[:, :1], past_key_values=cache)
  with pytest.raises(ValueError, match="packed rows are not supported"):
    model(IDS, position_ids=torch.arange(N) % 20)
  assert model(IDS, position_ids=torch.arange(N)[None]).logits.shape == (2, N, V)
  with pytest.raises(ValueError, match=r"attention_mask has shape \(2, 1, 40, 40\)"):
    model(IDS, attention_mask=torch.ones(2, 1, N, N))
  with pytest.raises(TypeError, match="needs a SparsekCache"):
    model(IDS, past_key_values=transformers.DynamicCache())

  for inputs in ({}, {"input_ids": IDS, "inputs_embeds": torch.zeros(2, N, 32)}):
    with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
      model(**inputs)
  with pytest.raises(ValueError, match="there are no new tokens"):
    model(IDS[:, :0])
  with pytest.raises(NotImplementedError, match="cannot be cropped"):
    cache.crop(-1)


@torch.no_grad
def test_what_is_done_to_a_cache(small):
  """A cache that is reset, repeated or of chosen rows goes on as one that was made so."""
  model, first, rest = small[1], IDS[:, :30], IDS[:, 30:]
  name = "cache" if "cache" in model(first, use_cache=True) else "past_key_values"
  logits = lambda cache, ids: model(ids, past_key_values=cache).logits
  want = model(IDS, use_cache=False).logits

  def filled():
    return model(first, use_cache=True)[name]

  cache = filled()
  cache.batch_repeat_interleave(2)
  assert torch.allclose(logits(cache, rest[[0, 0, 1, 1]]), want[[0, 0, 1, 1], 30:], atol=1e-5)
  cache = filled()
  cache.batch_select_indices(torch.tensor([1]))
  assert torch.allclose(logits(cache, rest[1:]), want[1:, 30:], atol=1e-5)
  cache.reset()
  assert cache.get_seq_length() == 0
  assert torch.allclose(logits(cache, IDS), want, atol=1e-5)


@torch.no_grad
def test_generation_goes_on_with_its_cache(small):
  """The same text comes as from the whole at once, as in a chat of several turns."""
  model, mask = small[1], torch.ones_like(IDS)
  options = dict(max_new_tokens=4, do_sample=False, pad_token_id=0, eos_token_id=None)
  turn = model.generate(IDS, attention_mask=mask, return_dict_in_generate=True, **options)
  longer = torch.cat([turn.sequences, IDS[:, :7]], 1)
  mask = torch.ones_like(longer)
  name = "cache" if "cache" in turn else "past_key_values"
  want = model.generate(longer, attention_mask=mask, **options)
  for chunk in (None, 3):
    cache = {name: copy.deepcopy(turn[name])}
    text = model.generate(longer, attention_mask=mask, prefill_chunk_size=chunk, **cache, **options)
    assert torch.equal(text, want)
  cache = {name: copy.deepcopy(turn[name])}
  new = longer[:, turn[name].get_seq_length() :]  # as it may be fed, too
  text = model.generate(new, attention_mask=mask, **cache, **options)
  assert torch.equal(text[:, new.shape[1] :], want[:, longer.shape[1] :])


def test_half_precision_keeps_scorers_in_float32(small):
  model = load(small[0], dtype=torch.bfloat16)
  kinds = {name: str(parameter.dtype) for name, parameter in model.named_parameters()}
  assert {kinds[name] for name in kinds if "scorer" in name} == {"torch.float32"}
  assert {kinds[name] for name in kinds if "scorer" not in name} == {"torch.bfloat16"}
  wide, narrow = small[1](IDS).logits, model(IDS).logits
  assert narrow.dtype == torch.float32 and (narrow - wide).std() < 0.05 * wide.std()


def test_mixed_precision_keeps_scores_in_float32(small):
  """Under autocast, as trainers use it; the scores of the first layer are those of float32."""
  model, scores = small[1], []
  scorer = model.model.layers[0].self_attn.scorer
  hook = scorer.register_forward_hook(lambda module, inputs, output: scores.append(output[0]))
  with torch.autocast("cpu", dtype=torch.bfloat16):
    loss = model(IDS, labels=IDS).loss
  loss.backward()
  model(IDS)
  hook.remove()
  assert torch.equal(*scores) and scorer.linear.weight.grad.abs().max() > 0
  model.zero_grad()


def test_gradients_are_the_same_with_checkpointing(small):
  model = small[1]
  gradients = []
  for checkpoints in (False, True):
    if checkpoints:
      model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train().zero_grad()
    model(IDS, labels=IDS).loss.backward()
    gradients.append([parameter.grad.clone() for parameter in model.parameters()])
  model.gradient_checkpointing_disable()
  model.eval()
  assert all(map(torch.equal, *gradients))


def test_compiled_as_a_whole(small):
  """The forward pass with its gradients, and steps of decoding, with few recompilations."""
  model = small[1]
  whole = torch.compile(model, fullgraph=True, backend="aot_eager")
  output, want = whole(IDS, labels=IDS, use_cache=False), model(IDS, labels=IDS)
  assert (output.logits - want.logits).abs().max() < 1e-5
  gradients = []
  for loss in (output.loss, want.loss):
    model.zero_grad()
    loss.backward()
    gradients.append([parameter.grad.clone() for parameter in model.parameters()])
  assert all((a - b).abs().max() < 1e-6 for a, b in zip(*gradients))
  torch._dynamo.reset()
  torch._dynamo.utils.counters.clear()
  with torch.no_grad():
    _, cache = cached(model, [IDS[:, :20]])
    for i in range(20, 30):
      logits = whole(IDS[:, i : i + 1], past_key_values=cache).logits[:, 0]
      assert (logits - want.logits[:, i]).abs().max() < 1e-5
  assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 3


@torch.no_grad
@pytest.mark.parametrize("kind", ["byte", "bpe"])
def test_the_tokenizer_of_an_export_pads_on_the_left(kind, tmp_path):
  """Prompts go through AutoTokenizer and `generate` together, and give the texts of each alone."""
  ours, source = ByteTokenizer(), "byte"
  if kind == "bpe":
    ours, source = train_bpe(["some text, some more text; " * 9], 300), str(tmp_path)
    ours.save(source)
  config = TransformerConfig(**BASE | dict(vocab_size=300, max_positions=64))
  params = init_params(config, jax.random.key(0))
  folder = tmp_path / "model"
  pretrained.save(
    str(folder), config, params, fields={"eos_token_id": ours.eos_id}, tokenizer=source
  )
  theirs = transformers.AutoTokenizer.from_pretrained(str(folder), trust_remote_code=True)
  assert theirs.eos_token_id == theirs.pad_token_id == ours.eos_id
  assert (theirs.padding_side, theirs.model_max_length) == ("left", 64)
  prompts = ["some text, s", "more; h\u00e9  \n"]
  assert [theirs(prompt).input_ids for prompt in prompts] == list(map(ours.encode, prompts))
  inputs = theirs(prompts, padding=True, return_tensors="pt")
  texts = load(folder).generate(**inputs, max_new_tokens=5, do_sample=False)
  for prompt, text in zip(prompts, texts[:, inputs.input_ids.shape[1] :].tolist()):
    ids, end = ours.encode(prompt), ours.eos_id
    want = list(generate(config, params, ids, max_new_tokens=5, temperature=0, eos_id=end))
    assert text == [*want, *[end] * (5 - len(want))]
    assert theirs.decode(text, skip_special_tokens=True) == ours.decode(text)
  theirs.save_pretrained(tmp_path / "tuned")
  again = load_tokenizer(str(tmp_path / "tuned"))
  assert again.name == ours.name and again.encode(prompts[0]) == ours.encode(prompts[0])


FRESH = """
import sys
for name in ("sparsek", "jax", "jaxlib", "flax", "optax"):
  sys.modules[name] = None  # an import of it fails
import torch, transformers
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
ids = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5]])
mask = torch.ones_like(ids)
text = model.generate(ids, attention_mask=mask, max_new_tokens=12, do_sample=False, pad_token_id=0)
print(text[0].tolist())
"""


@pytest.mark.slow
def test_a_fresh_environment_generates(small, tmp_path):
  """A process that can import nothing of this library and no JAX."""
  importlib.invalidate_caches()
  done = subprocess.run(
    [sys.executable, "-c", FRESH, str(small[0])], cwd=tmp_path, capture_output=True, text=True
  )
  assert done.returncode == 0, done.stderr
  config, params = pretrained.load(str(small[0]))
  prompt = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5]
  want = list(generate(config, params, np.array(prompt), max_new_tokens=12, temperature=0))
  assert done.stdout.split("\n")[-2] == str(prompt + want)
