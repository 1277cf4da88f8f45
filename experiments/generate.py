"""Continues a prompt with a pretrained model, printing text as it comes.

  python -m experiments.generate --workdir=/tmp/run --prompt="def main" --max_new_tokens=200

Memory and time per token do not depend on how much was written before (but for models with full attention layers). --k and --window
may differ from those of training. The text goes to stdout; a last line on stderr says how fast it came.
"""

import os
import sys
import time

import jax

from sparsek import checkpoint, flags
from sparsek.errors import UsageError
from sparsek.generate import generate, stream_text
from sparsek.tokenizer import as_valid_unicode, load_tokenizer

flags.define_generation_flags()


def flag(name: str):
  """The value of a parsed flag."""
  return flags.FLAGS[name].value


def main() -> None:
  """Loads the run, then prints the prompt and its continuation."""
  workdir = flag("workdir")
  if not workdir:
    raise UsageError("--workdir is required: the folder of a pretraining run")
  config, run = checkpoint.load_run_config(workdir)
  config = flags.override_config(config)
  name = run["tokenizer"]["name"]
  tokenizer = load_tokenizer(name if name == "byte" else os.path.join(workdir, "tokenizer"))
  prompt = as_valid_unicode(flag("prompt"))
  ids = list(tokenizer.encode(prompt, flag("special_tokens"))) or [tokenizer.eos_id]
  params, step = checkpoint.load_params(workdir, config, flag("step"))
  try:
    tokens = generate(config, params, ids, max_new_tokens=flag("max_new_tokens"), temperature=flag("temperature"), top_p=flag("top_p"),
                      key=jax.random.key(flag("sampling_seed")), eos_id=run["tokenizer"].get("eos_ids", tokenizer.eos_id))
  except ValueError as error:
    raise UsageError(f"--{error}") from None

  times = []

  def timed():
    for token in tokens:
      times.append(time.perf_counter())
      yield token
  print(prompt, end="", flush=True)
  for text in stream_text(tokenizer, timed()):
    print(text, end="", flush=True)
  print()
  speed = f", {(len(times) - 1) / (times[-1] - times[0]):.0f} tokens/s" if len(times) > 1 else ""
  print(f"[step {step}: {len(ids)} prompt tokens, {len(times)} new ones{speed}]", file=sys.stderr)


if __name__ == "__main__":
  flags.run(main)
