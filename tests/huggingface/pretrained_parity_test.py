"""Every family against transformers itself; needs `.[parity]`: pip install -e '.[test,parity]'."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsek.config import TransformerConfig
from sparsek.generation.session import generate
from sparsek.huggingface import pretrained
from sparsek.model.transformer import Transformer, init_params
from tests.helpers import quick_jit

reason = "compares with transformers, which is not installed here: pip install -e '.[parity]'"
torch = pytest.importorskip("torch", reason=reason)
transformers = pytest.importorskip("transformers", reason=reason)

V, N = 61, 40
LLAMA = dict(
  vocab_size=V,
  hidden_size=32,
  num_hidden_layers=2,
  num_attention_heads=4,
  num_key_value_heads=2,
  intermediate_size=48,
  max_position_embeddings=64,
  bos_token_id=1,
  eos_token_id=2,
)
NEOX = dict(
  vocab_size=V,
  hidden_size=32,
  num_hidden_layers=2,
  num_attention_heads=4,
  intermediate_size=48,
  max_position_embeddings=64,
)
LLAMA3 = {
  "rope_type": "llama3",
  "factor": 4.0,
  "low_freq_factor": 1.0,
  "high_freq_factor": 4.0,
  "original_max_position_embeddings": 16,
}
CASES = {
  "llama": ("LlamaConfig", LLAMA),
  "llama, tied, llama3, biases": (
    "LlamaConfig",
    {
      **LLAMA,
      "tie_word_embeddings": True,
      "rope_scaling": LLAMA3,
      "attention_bias": True,
      "mlp_bias": True,
      "rms_norm_eps": 1e-3,
    },
  ),
  "llama, linear, head_dim": (
    "LlamaConfig",
    {
      **LLAMA,
      "rope_scaling": {"rope_type": "linear", "factor": 3.0},
      "rope_theta": 500.0,
      "head_dim": 16,
    },
  ),
  "mistral, sliding window": ("MistralConfig", {**LLAMA, "sliding_window": 7}),
  "mistral, full": ("MistralConfig", {**LLAMA, "sliding_window": None, "head_dim": 16}),
  "qwen2": ("Qwen2Config", LLAMA),
  "qwen2, upper layers slide": (
    "Qwen2Config",
    {**LLAMA, "use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
  ),
  "qwen3": ("Qwen3Config", {**LLAMA, "head_dim": 16, "tie_word_embeddings": True}),
  "qwen3, biases": ("Qwen3Config", {**LLAMA, "head_dim": 8, "attention_bias": True}),
  "gpt_neox": ("GPTNeoXConfig", NEOX),
  "gpt_neox, sequential, gelu_new": (
    "GPTNeoXConfig",
    {
      **NEOX,
      "use_parallel_residual": False,
      "hidden_act": "gelu_new",
      "rotary_pct": 1.0,
      "rotary_emb_base": 500,
    },
  ),
  "gpt_neox, no attention bias, half": (
    "GPTNeoXConfig",
    {**NEOX, "attention_bias": False, "rotary_pct": 0.5},
  ),
  "gpt2": ("GPT2Config", dict(vocab_size=V, n_embd=32, n_layer=2, n_head=4, n_positions=64)),
  "gpt2, n_inner": (
    "GPT2Config",
    dict(
      vocab_size=V,
      n_embd=32,
      n_layer=1,
      n_head=2,
      n_positions=64,
      n_inner=40,
      activation_function="gelu",
    ),
  ),
}
TOKENS = np.random.default_rng(0).integers(0, V, (2, N))


def random_model(name):
  """Returns a model of transformers with all weights changed, also those of biases and scales."""
  kind, fields = CASES[name]
  torch.manual_seed(0)
  model = transformers.AutoModelForCausalLM.from_config(
    getattr(transformers, kind)(**fields), attn_implementation="eager"
  ).eval()
  with torch.no_grad():
    for parameter in model.parameters():
      parameter += 0.3 * torch.randn_like(parameter)
  return model


def their_logits(model):
  with torch.no_grad():
    return model(torch.tensor(TOKENS)).logits.float().numpy()


def our_logits(config, params):
  return np.asarray(
    quick_jit(Transformer(config).apply)({"params": params}, jnp.asarray(TOKENS, jnp.int32))
  )


def assert_bit_equal(a, b):
  jax.tree.map(
    lambda x, y: np.testing.assert_array_equal(
      np.asarray(x).view(np.uint8), np.asarray(y).view(np.uint8)
    ),
    a,
    b,
  )


@pytest.fixture(scope="module", params=CASES)
def case(request, tmp_path_factory):
  model = random_model(request.param)
  folder = tmp_path_factory.mktemp("theirs")
  model.save_pretrained(folder, max_shard_size="30KB")
  return model, folder


def test_import_gives_the_same_logits(case):
  model, folder = case
  config, params = pretrained.load(str(folder))
  want, got = their_logits(model), our_logits(config, params)
  print(f"largest difference {np.abs(got - want).max():.1e}, spread {want.std():.2f}")
  assert want.std() > 0.3 and np.abs(got - want).max() < 1e-4


def test_export_read_back_by_transformers_gives_the_same_logits(case, tmp_path):
  model, folder = case
  config, params = pretrained.load(str(folder))
  pretrained.save(
    str(tmp_path / "ours"), config, params, family=model.config.model_type, max_shard_bytes=30_000
  )
  back, report = transformers.AutoModelForCausalLM.from_pretrained(
    tmp_path / "ours", attn_implementation="eager", output_loading_info=True
  )
  assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), (
    report
  )
  assert np.abs(their_logits(back.eval()) - our_logits(config, params)).max() < 1e-4
  again = pretrained.load(str(tmp_path / "ours"))
  assert again[0] == config
  assert_bit_equal(again[1], params)


LINEAR = {"rope_type": "linear", "factor": 4.0}
NEOX_451 = {
  "rope_parameters": None,
  "rope_theta": 500,
  "rotary_emb_base": 500,
  "rotary_pct": 0.5,
  "partial_rotary_factor": 0.5,
}


@pytest.mark.parametrize(
  "name, changes",
  [
    ("llama", {"rope_scaling": LINEAR}),  # wins over rope_parameters
    ("llama", {"rope_parameters": None, "rope_scaling": LINEAR, "rope_theta": 500.0}),
    ("gpt_neox", NEOX_451),
  ],
)
def test_several_spellings_in_one_file(name, changes, tmp_path):
  random_model(name).save_pretrained(tmp_path)
  path = tmp_path / "config.json"
  fields = json.loads(path.read_text()) | changes
  del fields["hidden_act"]
  path.write_text(json.dumps({key: value for key, value in fields.items() if value is not None}))
  model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
  ours = our_logits(*pretrained.load(str(tmp_path)))
  assert np.abs(their_logits(model.eval()) - ours).max() < 1e-4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype, tmp_path):
  model = random_model("qwen2").to(dtype)
  model.save_pretrained(tmp_path / "theirs")
  config, params = pretrained.load(str(tmp_path / "theirs"), dtype=None)
  assert {str(leaf.dtype) for leaf in jax.tree.leaves(params)} == {
    str(dtype).removeprefix("torch.")
  }
  assert config.dtype == ("bfloat16" if dtype == torch.bfloat16 else "float32")
  wide = dataclasses.replace(config, dtype="float32")
  # model.float() would keep the rounded RoPE frequencies
  exact = transformers.AutoModelForCausalLM.from_pretrained(
    tmp_path / "theirs", dtype=torch.float32
  )
  assert np.abs(our_logits(wide, params) - their_logits(exact)).max() < 1e-4
  pretrained.save(str(tmp_path / "ours"), config, params)
  back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours", dtype="auto")
  assert back.dtype == dtype
  for name, parameter in back.named_parameters():
    assert torch.equal(parameter, model.to(dtype).get_parameter(name)), name


def test_greedy_generation_writes_the_same_tokens(tmp_path):
  """Decoding from the cache, with partial rotation, parallel residual and biases."""
  model = random_model("gpt_neox")
  model.save_pretrained(tmp_path)
  config, params = pretrained.load(str(tmp_path))
  want = model.generate(
    torch.tensor(TOKENS[:1, :8]),
    max_new_tokens=12,
    do_sample=False,
    eos_token_id=None,
    pad_token_id=0,
  )[0, 8:].tolist()
  assert list(generate(config, params, TOKENS[0, :8], max_new_tokens=12, temperature=0)) == want


def test_transformers_reads_a_sparsek_model_as_the_dense_one(tmp_path):
  config = TransformerConfig(
    vocab_size=V,
    num_layers=2,
    embed_dim=32,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    mlp_dim=48,
    k=4,
    window=4,
    scorer="conv",
    attention="sparsek,full",
  )
  params = quick_jit(functools.partial(init_params, config))(jax.random.key(0))
  pretrained.save(str(tmp_path), config, params, dense=True)
  assert json.loads((tmp_path / "config.json").read_text())["sparsek"]["scorer"] == "conv"
  back = transformers.AutoModelForCausalLM.from_pretrained(
    tmp_path, attn_implementation="eager"
  ).eval()
  dense = dataclasses.replace(config, attention="full")
  assert np.abs(their_logits(back) - our_logits(dense, params)).max() < 1e-4
