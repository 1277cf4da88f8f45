"""Continues a prompt with a pretrained model, printing text as it comes.

  python -m experiments.generate --workdir=/tmp/run --prompt="def main" --max_new_tokens=200

Memory and time per token do not depend on how much was written before (but for models with full attention layers). --k and --window
may differ from those of training. The text goes to stdout; a last line on stderr says how fast it came.
"""

import os
import sys
import time

from absl import flags as absl_flags
import jax

from sparsek import checkpoint, flags
from sparsek.errors import UsageError
from sparsek.generate import generate, stream_text
from sparsek.tokenizer import as_valid_unicode, load_tokenizer

flags.define_workdir_flag()
flags.define_attention_flags()
PROMPT = absl_flags.DEFINE_string("prompt", "", "Text to continue; empty: a new document.")
MAX_NEW_TOKENS = absl_flags.DEFINE_integer("max_new_tokens", 200, "Most tokens to write; the document may end before.", lower_bound=0)
TEMPERATURE = absl_flags.DEFINE_float("temperature", 0.8, "Divides the logits; 0 always takes the most probable token.", lower_bound=0)
TOP_P = absl_flags.DEFINE_float("top_p", 0.95, "Draw from the fewest most probable tokens that have this probability together; above 0.",
                                lower_bound=0, upper_bound=1)
SAMPLING_SEED = absl_flags.DEFINE_integer("sampling_seed", 0, "The same seed gives the same text.", lower_bound=0)
STEP = absl_flags.DEFINE_integer("step", None, "Of the checkpoint. Default: the newest.", lower_bound=0)


def main() -> None:
  """Loads the run, then prints the prompt and its continuation."""
  workdir = flags.FLAGS["workdir"].value
  if not workdir:
    raise UsageError("--workdir is required: the folder of a pretraining run")
  config, run = checkpoint.load_run_config(workdir)
  config = flags.override_config(config)
  name = run["tokenizer"]["name"]
  tokenizer = load_tokenizer(name if name == "byte" else os.path.join(workdir, "tokenizer"))
  prompt = as_valid_unicode(PROMPT.value)
  ids = list(tokenizer.encode(prompt)) or [tokenizer.eos_id]
  params, step = checkpoint.load_params(workdir, config, STEP.value)
  try:
    tokens = generate(config, params, ids, max_new_tokens=MAX_NEW_TOKENS.value, temperature=TEMPERATURE.value, top_p=TOP_P.value,
                      key=jax.random.key(SAMPLING_SEED.value), eos_id=tokenizer.eos_id)
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
