"""Helpers that several tests share."""

import contextlib
import functools
import json

import jax
import pytest
import tokenizers

from sparsek.command_line.main import run
from sparsek.config import ATTENTION_KINDS, SCORERS, TransformerConfig
from sparsek.data.tokenizer import BPETokenizer
from sparsek.model import baselines, scorers

# Compiles twice as fast; the programs of these tests run for milliseconds.
quick_jit = functools.partial(
  jax.jit,
  compiler_options={"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True},
)

# A model that compiles fast.
SMALLEST = TransformerConfig(
  num_layers=1,
  embed_dim=8,
  num_heads=1,
  num_kv_heads=1,
  head_dim=8,
  mlp_dim=8,
  k=4,
  window=4,
  implementation="reference",
)


@contextlib.contextmanager
def restored_registries():
  """Removes the scorers and kinds of attention that are registered meanwhile."""
  lengths = [(names, len(names)) for names in (SCORERS, ATTENTION_KINDS)]
  try:
    yield
  finally:
    for names, length in lengths:
      for name in names[length:]:
        scorers.SCORER_FACTORIES.pop(name, None)
        baselines.ATTENTION_MODULES.pop(name, None)
      del names[length:]


def run_command(main, flag_values, *arguments):
  """Runs a script's main in this process, under its flags; returns the exit code."""
  for name in flag_values:
    flag_values[name].unparse()
  with pytest.raises(SystemExit) as exit_:
    run(main, flag_values, [main.__module__, *arguments])
  return exit_.value.code


@functools.cache
def spm():
  """Returns a tokenizer as SentencePiece makes them.

  Bytes are tokens too, and decoding leaves out the space before the first word.
  """
  pieces = [
    "<unk>",
    "<s>",
    "</s>",
    *(f"<0x{byte:02X}>" for byte in range(256)),
    *"▁Helowrd",
    "▁w",
    "or",
    *"€日",
  ]
  vocabulary, merges = {piece: i for i, piece in enumerate(pieces)}, [("▁", "w"), ("o", "r")]
  tokenizer = tokenizers.Tokenizer(
    tokenizers.models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True)
  )
  normalizers, decoders = tokenizers.normalizers, tokenizers.decoders
  tokenizer.normalizer = normalizers.Sequence(
    [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
  )
  tokenizer.decoder = decoders.Sequence(
    [
      decoders.Replace("▁", " "),
      decoders.ByteFallback(),
      decoders.Fuse(),
      decoders.Strip(" ", 1, 0),
    ]
  )
  tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
  tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
    "<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
  )
  return BPETokenizer(tokenizer)


@functools.cache
def metaspace():
  """Returns the same tokenizer in the newer form of tokenizer.json."""
  content = json.loads(spm()._tokenizer.to_str()) | {"normalizer": None}
  content["pre_tokenizer"] = {
    "type": "Metaspace",
    "replacement": "▁",
    "prepend_scheme": "always",
    "split": False,
  }
  return BPETokenizer(tokenizers.Tokenizer.from_str(json.dumps(content)))
