"""Continues a prompt with a pretrained model, printing text as it comes.

  python -m experiments.generate --workdir=/tmp/run --prompt="def main" --max_new_tokens=200
  python -m experiments.generate --workdir=/tmp/run --prompt="def main" --save_cache=/tmp/text.npz
  python -m experiments.generate --workdir=/tmp/run --load_cache=/tmp/text.npz --prompt=" # and"

Memory and time per token do not depend on how much was written before (but for models with full
attention layers). --k and --window may differ from those of training. The text goes to stdout; a
last line on stderr says how fast it came.
"""

import os
import sys
import time

import jax
import jax.numpy as jnp

from sparsek.command_line import flags
from sparsek.data.tokenizer import as_valid_unicode
from sparsek.errors import UsageError
from sparsek.generation.session import AHEAD, Session
from sparsek.generation.text_stream import TextStream
from sparsek.runs import checkpoint
from sparsek.storage.files import cannot_write, check_regular, read_at_most

MAX_PROMPTS = 2**26  # bytes of --prompt_file

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
  content = read_at_most(path, MAX_PROMPTS, "--prompt_file")
  try:
    text = content.decode("utf-8-sig").replace("\r\n", "\n")
  except UnicodeDecodeError as error:
    line = content.count(b"\n", 0, error.start) + 1
    raise UsageError(
      f"--prompt_file={path} is not UTF-8: byte 0x{content[error.start]:02x} in line {line}"
    ) from None
  if not text:
    raise UsageError(f"--prompt_file={path} has no lines")
  return text.removesuffix("\n").split("\n")


def cache_paths() -> tuple[str | None, str | None]:
  """The caches to load and to save."""
  source, target = flag("load_cache"), flag("save_cache")
  if target:
    folder = os.path.dirname(target) or "."
    if not (os.path.isdir(folder) and os.access(folder, os.W_OK)):
      raise UsageError(
        f"--save_cache={target}: must be a file in a folder that exists and can be written"
      )
    if os.path.lexists(target):
      check_regular(target, "--save_cache")
  return source, target


def begin(tokenizer, texts: list[str]) -> list[list[int]]:
  """The tokens of new texts; they begin as documents of the run's data do, once."""
  rows = []
  for text in texts:
    ids, bos = tokenizer.encode(text, flag("special_tokens")), tokenizer.bos_ids
    rows.append([*(bos if ids[: len(bos)] != bos else []), *ids] or [tokenizer.eos_id])
  return rows


def shown_prompt(stream: TextStream, text: str, ids: list[int]) -> str:
  """Returns the prompt as it was given, after what its tokens bring before it.

  That may be the rest of an earlier turn's last character, or a space.
  """
  brought = stream.turn(ids)
  if brought.endswith(text):
    return brought
  return "\ufffd" * brought.startswith("\ufffd") * (not text.startswith("\ufffd")) + text


def main() -> None:
  """Loads the run, then prints the prompts and their continuations."""
  workdir, texts, (source, target) = flag("workdir"), prompts(), cache_paths()
  if not workdir:
    raise UsageError("--workdir is required: the folder of a pretraining run")
  config, run = checkpoint.load_run_config(workdir)
  config = flags.override_config(config)
  tokenizer = checkpoint.load_run_tokenizer(workdir)
  if source:
    ids = [tokenizer.encode(text, flag("special_tokens"), continues=True) for text in texts]
  else:
    ids = begin(tokenizer, texts)
  params, step = checkpoint.load_params(
    workdir, config, flag("step"), allow_older=flag("allow_older_step")
  )
  try:
    session = Session.load(source, config, params) if source else Session(config, params, len(ids))
    if len(texts) != len(session.texts):
      file = flag("prompt_file")
      given = f"--prompt_file={file} has {len(texts)}" if file else "--prompt is 1"
      raise UsageError(
        f"--load_cache={source} holds {len(session.texts)} texts, {given}: give a line for each"
      )
    del params  # in float32; the session has its own
    turn = session.generate(
      ids,
      max_new_tokens=flag("max_new_tokens"),
      temperature=flag("temperature"),
      top_p=flag("top_p"),
      top_k=flag("top_k"),
      keys=jnp.stack([jax.random.key(flag("sampling_seed") + i) for i in range(len(ids))]),
      eos_id=run["tokenizer"].get("eos_ids", tokenizer.eos_id),
      ahead=0 if flag("stop") and target else AHEAD,
    )
  except UsageError:
    raise
  except ValueError as error:
    raise UsageError(f"--{error}") from None

  streams = [TextStream(tokenizer, flag("stop"), **state) for state in session.texts]
  times, new = [], 0
  written = list(map(shown_prompt, streams, texts, ids))
  show = (lambda text: print(text, end="", flush=True)) if len(ids) == 1 else lambda text: None
  show(written[0])
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
    text = stream.end_turn() if target else stream.finish()
    written[row] += text
    show(text)
  print("" if len(ids) == 1 else "\n".join(f"[{row}] {text}" for row, text in enumerate(written)))
  if target:
    session.texts = [stream.state for stream in streams]
    try:
      session.save(target)
    except OSError as error:
      raise cannot_write(target, error) from None
  lost = session.lost_scores
  if lost.any():
    print(
      (
        f"warning: {lost.sum()} scores above the threshold had no room in the cache (of "
        f"{(lost > 0).sum()} of {len(ids)} texts): gates are slightly high"
      ),
      file=sys.stderr,
    )
  speed = (
    f", {(new - len(ids)) / (times[-1] - times[0]):.0f} tokens/s"
    if len(times) > 1 and new > len(ids)
    else ""
  )
  print(
    f"[step {step}: {sum(map(len, ids))} prompt tokens, {new} new ones{speed}]", file=sys.stderr
  )


if __name__ == "__main__":
  flags.run(main)
