"""GGUF files as folders in Hugging Face's format: config.json, safetensors and the tokenizer.

Families llama and qwen2, whose tokenizers are byte-level BPE. Nothing is passed over silently: a
field of the family, a tensor, a quantisation or a tokenizer that is not known is refused. Format:
https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import functools
import json
import os
import pathlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from sparsek.errors import UsageError
from sparsek.huggingface import safetensors
from sparsek.storage import files

if TYPE_CHECKING:
  import tokenizers

ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM"}
# Families whose files pair neighbouring features for the rotary embedding; Hugging Face pairs those
# half a head apart.
NEIGHBOURS = ("llama",)
SIZES = {  # field of a GGUF file -> field of config.json
  "embedding_length": "hidden_size",
  "feed_forward_length": "intermediate_size",
  "block_count": "num_hidden_layers",
  "attention.head_count": "num_attention_heads",
  "attention.head_count_kv": "num_key_value_heads",
  "context_length": "max_position_embeddings",
  "rope.freq_base": "rope_theta",
  "attention.layer_norm_rms_epsilon": "rms_norm_eps",
}
IMPLIED = ("vocab_size", "rope.dimension_count")  # by the tensors' shapes
TENSORS = {
  "token_embd": "model.embed_tokens",
  "output_norm": "model.norm",
  "output": "lm_head",
  "attn_norm": "input_layernorm",
  "ffn_norm": "post_attention_layernorm",
  "attn_q": "self_attn.q_proj",
  "attn_k": "self_attn.k_proj",
  "attn_v": "self_attn.v_proj",
  "attn_output": "self_attn.o_proj",
  "ffn_gate": "mlp.gate_proj",
  "ffn_up": "mlp.up_proj",
  "ffn_down": "mlp.down_proj",
}
# What splits a text before the merges, by the name that llama.cpp has for it.
SPLITS = {
  "smollm": None,  # into single digits and what GPT-2 splits into
  "qwen2": (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
  ),
}
CONTROL, USER_DEFINED, UNUSED = 3, 4, 5  # types of tokens


def write_model(reader: Any, folder: str, dtype: np.dtype) -> None:
  """Writes all files of a model.

  Args:
    reader: a GGUFReader of the package gguf.
    folder: to write into.
    dtype: of the tensors.
  Raises:
    UsageError: for a model that is not understood, before anything is written.
  """
  fields = {name: field.contents() for name, field in reader.fields.items()}
  config = model_config(reader, fields)
  tensors = _tensors(reader, config, dtype)
  tokenizer = make_tokenizer(fields)
  tokens = _required(fields, "tokenizer.ggml.tokens")
  ids = {
    f"{name}_token": _required(fields, f"tokenizer.ggml.{key}_token_id")
    for name, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"))
  }
  ends = sorted({ids["eos_token"], ids["pad_token"]})
  written = {
    "config.json": config | {"torch_dtype": dtype.name},
    "generation_config.json": {
      **{f"{name}_id": i for name, i in ids.items()},
      "eos_token_id": ends if len(ends) > 1 else ends[0],
    },
    "tokenizer_config.json": {
      "tokenizer_class": "PreTrainedTokenizerFast",
      **{name: tokens[i] for name, i in ids.items()},
      "chat_template": _required(fields, "tokenizer.chat_template"),
    },
  }
  tokenizer.save(os.path.join(folder, "tokenizer.json"))
  for name, content in written.items():
    pathlib.Path(folder, name).write_text(json.dumps(content, indent=2), encoding="utf-8")
  safetensors.write_folder(folder, tensors, 5 * 10**9)


def _required(fields: Mapping[str, Any], name: str) -> Any:
  """Returns a field of a GGUF file; raises UsageError where it is missing."""
  if name not in fields:
    raise UsageError(f"the GGUF file lacks {name}")
  return fields[name]


def model_config(reader: Any, fields: Mapping[str, Any]) -> dict[str, Any]:
  """Returns config.json, without the dtype.

  Raises:
    UsageError: for another family, and for a field that is missing or not known.
  """
  family = _required(fields, "general.architecture")
  if family not in ARCHITECTURES:
    raise UsageError(f"general.architecture={family!r} must be one of {', '.join(ARCHITECTURES)}")
  for name, value in fields.items():
    prefix, _, rest = name.partition(".")
    if prefix == family and rest not in {*SIZES, *IMPLIED}:
      raise UsageError(f"{name}={files.shown(value)} is not supported")
  given = {name: _required(fields, f"{family}.{name}") for name in SIZES}
  head_dim = given["embedding_length"] // given["attention.head_count"]
  rotated = fields.get(f"{family}.rope.dimension_count", head_dim)
  if rotated != head_dim:
    raise UsageError(f"{family}.rope.dimension_count={rotated} must be that of a head, {head_dim}")
  shapes = {tensor.name: tensor.shape for tensor in reader.tensors}
  return {
    "model_type": family,
    "architectures": [ARCHITECTURES[family]],
    "vocab_size": int(_required(shapes, "token_embd.weight")[1]),
    # shortest decimals of the float32 numbers of the file
    **{
      SIZES[name]: float(str(np.float32(value))) if isinstance(value, float) else value
      for name, value in given.items()
    },
    "hidden_act": "silu",
    "tie_word_embeddings": "output.weight" not in shapes,
    "bos_token_id": _required(fields, "tokenizer.ggml.bos_token_id"),
    "eos_token_id": _required(fields, "tokenizer.ggml.eos_token_id"),
  }


def _tensors(
  reader: Any, config: Mapping[str, Any], dtype: np.dtype
) -> dict[str, safetensors.Pending]:
  """Returns the tensors of a GGUF file under their names in Hugging Face's format.

  Raises:
    UsageError: for a tensor or a quantisation that is not known.
  """
  import gguf

  heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
  if config["model_type"] not in NEIGHBOURS:
    heads = {}
  for quantisation in {tensor.tensor_type for tensor in reader.tensors}:
    example = next(tensor for tensor in reader.tensors if tensor.tensor_type == quantisation)
    try:
      gguf.quants.dequantize(example.data[:1], quantisation)
    except NotImplementedError:
      raise UsageError(f"tensor {example.name}: {quantisation.name} is not supported") from None
  tensors = {}
  for tensor in reader.tensors:
    *layer, kind, parameter = tensor.name.split(".")
    if kind not in TENSORS or layer[:1] not in ([], ["blk"]):
      raise UsageError(f"tensor {tensor.name!r:.100} is not supported")
    prefix = f"model.layers.{layer[1]}." if layer else ""
    shape = tuple(map(int, reversed(tensor.shape)))
    read = functools.partial(_dequantised, tensor, heads.get(kind), dtype)
    tensors[f"{prefix}{TENSORS[kind]}.{parameter}"] = safetensors.Pending(dtype, shape, read)
  return tensors


def _dequantised(tensor: Any, heads: int | None, dtype: np.dtype) -> np.ndarray:
  """Returns a tensor as floats; `heads` are those whose features have to change places."""
  import gguf

  array = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
  if heads is not None:
    array = array.reshape(heads, -1, 2, *array.shape[1:]).swapaxes(1, 2).reshape(array.shape)
  return np.ascontiguousarray(array, dtype)


def make_tokenizer(fields: Mapping[str, Any]) -> tokenizers.Tokenizer:
  """Returns the byte-level BPE that a GGUF file describes.

  Raises:
    UsageError: for another kind of tokenizer.
  """
  import tokenizers

  tokens, types, merges, model, split = (
    _required(fields, f"tokenizer.ggml.{name}")
    for name in ("tokens", "token_type", "merges", "model", "pre")
  )
  for name, value, known in (("model", model, ("gpt2",)), ("pre", split, tuple(SPLITS))):
    if value not in known:
      raise UsageError(f"tokenizer.ggml.{name}={value!r} must be one of {', '.join(known)}")
  vocabulary = {token: i for i, token in enumerate(tokens) if types[i] != UNUSED}
  pairs = [(first, second) for first, second in (merge.split(" ") for merge in merges)]
  tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, pairs))
  pre = tokenizers.pre_tokenizers
  pattern = SPLITS[split]
  if pattern is None:
    steps = [pre.Digits(individual_digits=True), pre.ByteLevel(add_prefix_space=False)]
  else:
    tokenizer.normalizer = tokenizers.normalizers.NFC()
    steps = [
      pre.Split(tokenizers.Regex(pattern), "isolated"),
      pre.ByteLevel(add_prefix_space=False, use_regex=False),
    ]
  tokenizer.pre_tokenizer = pre.Sequence(steps)
  tokenizer.decoder = tokenizers.decoders.ByteLevel()
  of_type = lambda wanted: [token for token, kind in zip(tokens, types) if kind == wanted]
  tokenizer.add_special_tokens(of_type(CONTROL))
  tokenizer.add_tokens(of_type(USER_DEFINED))
  return tokenizer
