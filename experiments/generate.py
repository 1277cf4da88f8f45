"""Continues a prompt with a pretrained model, printing text as it comes.

  python -m experiments.generate --workdir=/tmp/run --prompt="def main" --max_new_tokens=200
  python -m experiments.generate --workdir=/tmp/run --prompt="def main" --save_cache=/tmp/text.npz
  python -m experiments.generate --workdir=/tmp/run --load_cache=/tmp/text.npz --prompt=" # and"

Memory and time per token do not depend on how much was written before (but for models with full attention layers). --k and --window
may differ from those of training. The text goes to stdout; a last line on stderr says how fast it came.
"""

import os
import sys
import time

import jax
import jax.numpy as jnp

from sparsek import checkpoint, flags
from sparsek.errors import UsageError
from sparsek.generate import AHEAD, Session, TextStream
from sparsek.tokenizer import as_valid_unicode, load_tokenizer

flags.define_generation_flags()


def flag(name: str):
  """The value of a parsed flag."""
  return flags.FLAGS[name].value


def prompts() -> list[str]:
  """The texts to continue."""
  path = flag("prompt_file")
  if path is None:
    return [as_valid_unicode(flag("prompt"))]
  if flag("prompt"):
    raise UsageError("--prompt and --prompt_file exclude each other: give one of them")
  try:
    with open(path, encoding="utf-8", errors="replace") as file:
      texts = file.read().splitlines()
  except OSError as error:
    raise UsageError(f"--prompt_file={path} cannot be read: {error.strerror}") from None
  if not texts:
    raise UsageError(f"--prompt_file={path} has no lines")
  return texts


def main() -> None:
  """Loads the run, then prints the prompts and their continuations."""
  workdir, texts, target = flag("workdir"), prompts(), flag("save_cache")
  if not workdir:
    raise UsageError("--workdir is required: the folder of a pretraining run")
  if target and not os.path.isdir(os.path.dirname(target) or "."):
    raise UsageError(f"--save_cache={target}: must be a file in a folder that exists")
  config, run = checkpoint.load_run_config(workdir)
  config = flags.override_config(config)
  name = run["tokenizer"]["name"]
  tokenizer = load_tokenizer(name if name == "byte" else os.path.join(workdir, "tokenizer"))
  ids = [list(tokenizer.encode(text, flag("special_tokens"))) for text in texts]
  params, step = checkpoint.load_params(workdir, config, flag("step"),
                                        allow_older=flag("allow_older_step"))
  if flag("load_cache"):
    session = Session.load(flag("load_cache"), config, params)
  else:
    ids = [row or [tokenizer.eos_id] for row in ids]
    session = Session(config, params, len(ids))
  del params                                              # in float32; the session has its own
  try:
    turn = session.generate(
        ids, max_new_tokens=flag("max_new_tokens"), temperature=flag("temperature"), top_p=flag("top_p"), top_k=flag("top_k"),
        keys=jnp.stack([jax.random.key(flag("sampling_seed") + i) for i in range(len(ids))]), eos_id=run["tokenizer"].get("eos_ids", tokenizer.eos_id),
        ahead=0 if flag("stop") and target else AHEAD)
  except ValueError as error:
    raise UsageError(f"--{error}") from None

  streams, times, new, written = [TextStream(tokenizer, flag("stop")) for _ in ids], [], 0, list(texts)
  show = (lambda text: print(text, end="", flush=True)) if len(ids) == 1 else lambda text: None
  show(texts[0])
  for tokens in turn:
    times.append(time.perf_counter())
    for row, token in enumerate(tokens):
      if token is None or streams[row].stopped:
        continue
      new += 1
      text = streams[row].push(token)
      written[row] += text
      show(text)
      if streams[row].stopped:
        session.stop(row)
  for row, stream in enumerate(streams):
    text = stream.finish()
    written[row] += text
    show(text)
  print("" if len(ids) == 1 else "\n".join(f"[{row}] {text}" for row, text in enumerate(written)))
  if target:
    session.save(target)
  lost = session.lost_scores
  if lost.any():
    print(f"warning: {lost.sum()} scores above the threshold had no room in the cache (of {(lost > 0).sum()} of {len(ids)} texts): gates are slightly high",
          file=sys.stderr)
  speed = f", {(new - len(ids)) / (times[-1] - times[0]):.0f} tokens/s" if len(times) > 1 and new > len(ids) else ""
  print(f"[step {step}: {sum(map(len, ids))} prompt tokens, {new} new ones{speed}]", file=sys.stderr)


if __name__ == "__main__":
  flags.run(main)
