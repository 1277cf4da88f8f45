"""The adapter for lm-eval by its methods, without lm-eval."""

import dataclasses
import json

import jax

from sparsek.data.tokenizer import train_bpe
from sparsek.model.transformer import init_params
from tests.experiments.evaluate_test import write_run
from tests.helpers import SMALLEST

TEMPLATE = (
  "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] | trim }}"
  "<|endoftext|>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
CONFIG = dataclasses.replace(
  SMALLEST, num_layers=2, embed_dim=16, num_heads=2, head_dim=8, vocab_size=300, dtype="float32"
)


def make_run(folder, seq_len=64, **fields):
  """Writes a run with a BPE tokenizer and a chat template."""
  config = dataclasses.replace(CONFIG, **fields)
  params = init_params(config, jax.random.key(0))
  # Texts are not all the same token.
  params["embed"]["embedding"] = 8 * params["embed"]["embedding"]
  write_run(folder, "data", config, seq_len, params)
  tokenizer = train_bpe(["def return class value name list text while for"] * 3, 300)
  (folder / "tokenizer").mkdir()
  tokenizer.save(str(folder / "tokenizer"))
  (folder / "tokenizer" / "tokenizer_config.json").write_text(
    json.dumps(
      {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|endoftext|>",
        "pad_token": "<|endoftext|>",
        "chat_template": TEMPLATE,
      }
    )
  )
  record = json.loads((folder / "model.json").read_text())
  made = {
    "name": tokenizer.name,
    "fingerprint": tokenizer.fingerprint,
    "vocab_size": tokenizer.vocab_size,
  }
  (folder / "model.json").write_text(json.dumps({**record, "tokenizer": made}))
  return folder
