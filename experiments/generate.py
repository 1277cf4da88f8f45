# ruff: noqa: E402 (see sparsek.command_line.main)
"""Generation of text: continues a prompt with a pretrained model, and prints text as it comes.

  python -m experiments.generate --workdir=/tmp/run --prompt="def main" --max_new_tokens=200
  python -m experiments.generate --workdir=/tmp/run --prompt="def main" --save_cache=/tmp/text.npz
  python -m experiments.generate --workdir=/tmp/run --load_cache=/tmp/text.npz --prompt=" # and"

Memory and time per token do not depend on the length of the text so far, except in models with full
attention layers. --k and --window may differ from those of training. By default one device computes
everything; with --fsdp or --context all do, and texts are spread over them where their number is a
multiple of the devices'. The text goes to stdout. The last line on stderr says the speed of more
than 16 new tokens, without the time of the prompt and of compiling.
"""

import os
import sys
from collections.abc import Iterable, Sequence

from absl import flags as absl_flags

from sparsek.command_line.configs import override_config, refuse_unused
from sparsek.command_line.definer import Definer
from sparsek.command_line.flags import (
  define_alone_flag,
  define_attention_flags,
  define_step_flags,
  define_workdir_flag,
)
from sparsek.command_line.main import parse_first, run
from sparsek.command_line.terminal import said_if_slow
from sparsek.command_line.training_flags import define_mesh_flags
from sparsek.errors import UsageError


def define_flags(flag_values: absl_flags.FlagValues) -> None:
  """Defines the flags of this command."""
  define_workdir_flag(flag_values)
  define_attention_flags(flag_values)
  define_step_flags(flag_values)
  define_alone_flag(flag_values)
  define = Definer(flag_values)
  define.string("prompt", "", "Text to continue; empty for a new document.")
  define.path(
    "prompt_file",
    None,
    "File with a text to continue on each line. All are continued at the same time. Not together "
    "with --prompt.",
  )
  define.boolean(
    "special_tokens", False, "Names in the prompt, such as <|im_start|>, are special tokens."
  )
  _define_sampling(define)
  define_mesh_flags(flag_values)
  define.path(
    "load_cache",
    None,
    "Continue the text that --save_cache wrote to this file. It is not read again. --prompt, "
    "or a line of --prompt_file for each text, is appended to it first.",
  )
  define.path(
    "save_cache", None, "Write the cache of the text to this file, to continue the text later."
  )


def _define_sampling(define: Definer) -> None:
  define.integer(
    "max_new_tokens", 200, "Most tokens to write; the end of the document stops earlier.", lower=0
  )
  define.real(
    "temperature", 0.8, "Divides the logits; 0 always takes the most probable token.", lower=0
  )
  define.real(
    "top_p",
    0.95,
    "Draw from the most probable tokens only, up to this probability. They are as few as have it "
    "together; above 0.",
    lower=0,
    upper=1,
  )
  define.integer(
    "top_k", 0, "Draw from this many most probable tokens only; 0 means from all.", lower=0
  )
  define.strings(
    "stop",
    "Text that ends the output and is left out of it. It may begin and end within tokens. May be "
    "given several times.",
  )
  define.integer(
    "sampling_seed",
    0,
    "Seed of the draws: the same seed gives the same text. Line i of --prompt_file, from 0, draws "
    "with this seed + i.",
    lower=0,
  )


FLAGS = absl_flags.FlagValues()
define_flags(FLAGS)


def check_flags() -> None:
  """Raises UsageError without --workdir, and for prompts from two sources."""
  if not FLAGS.workdir:
    raise UsageError("--workdir is required: the folder of a pretraining run")
  if FLAGS.prompt_file is not None and FLAGS.prompt:
    raise UsageError("--prompt and --prompt_file exclude each other: give one of them")


if __name__ == "__main__":
  parse_first(FLAGS, __doc__, check_flags)

import jax
import jax.numpy as jnp

from sparsek.data.tokenizer import Tokenizer, as_valid_unicode
from sparsek.generation.prompts import (
  check_can_save,
  new_texts,
  read_prompts,
  save,
  shown_prompt,
  write_texts,
)
from sparsek.generation.session import AHEAD, Session
from sparsek.generation.text_stream import TextStream
from sparsek.model.baselines import context_refusal
from sparsek.parallel import clusters
from sparsek.parallel.mesh import make_mesh
from sparsek.runs import checkpoint, run_record


def prompts() -> list[str]:
  """Returns the texts to continue."""
  if FLAGS.prompt_file is None:
    return [as_valid_unicode(FLAGS.prompt)]
  return read_prompts(FLAGS.prompt_file)


def open_session(texts: Sequence[str]) -> tuple[Session, Tokenizer, dict, int]:
  """Opens a session with the texts of --load_cache, or with new ones.

  Returns:
    (session, tokenizer, model.json, step of the checkpoint).
  """
  source = FLAGS.load_cache
  config, record = run_record.load_run_config(FLAGS.workdir)
  config = override_config(config, FLAGS)
  refuse_unused([config], FLAGS)
  tokenizer = run_record.load_run_tokenizer(FLAGS.workdir)
  split = FLAGS.fsdp > 1 or FLAGS.context > 1
  mesh = make_mesh(FLAGS.fsdp, FLAGS.context) if split else None
  refusal = context_refusal(config) if FLAGS.context > 1 else ""
  if refusal:
    raise UsageError(f"--context={FLAGS.context}: {refusal}")
  params, step = checkpoint.load_params(
    FLAGS.workdir, config, FLAGS.step, mesh, allow_older=FLAGS.allow_older_step
  )
  try:
    session = (
      Session.load(source, config, params, mesh)
      if source
      else Session(config, params, len(texts), mesh)
    )
  except UsageError:
    raise
  except ValueError as error:
    raise UsageError(f"--{error}") from None
  if len(texts) != len(session.texts):
    path = FLAGS.prompt_file
    given = f"--prompt_file={path} has {len(texts)}" if path else "--prompt is 1"
    raise UsageError(
      f"--load_cache={source} holds {len(session.texts)} texts, {given}: give a line for each"
    )
  return session, tokenizer, record, step


def start_turn(session: Session, ids: Sequence[Sequence[int]], eos_id: int | list[int]) -> Iterable:
  """Reads the prompts and returns an iterator over the tokens that are written."""
  try:
    return session.generate(
      ids,
      max_new_tokens=FLAGS.max_new_tokens,
      temperature=FLAGS.temperature,
      top_p=FLAGS.top_p,
      top_k=FLAGS.top_k,
      keys=jnp.stack([jax.random.key(FLAGS.sampling_seed + i) for i in range(len(ids))]),
      eos_id=eos_id,
      ahead=0 if FLAGS.stop and FLAGS.save_cache else AHEAD,
    )
  except UsageError:
    raise
  except ValueError as error:
    raise UsageError(f"--{error}") from None


def main() -> None:
  """Loads the run, then prints the prompts and their continuations."""
  check_flags()
  clusters.check_alone("experiments.generate", FLAGS.distributed, os.environ)
  texts, target = prompts(), FLAGS.save_cache
  if target:
    check_can_save(target)
  with said_if_slow(f"loading {FLAGS.workdir} ..."):
    session, tokenizer, record, step = open_session(texts)
  if FLAGS.load_cache:
    ids = [tokenizer.encode(text, FLAGS.special_tokens, continues=True) for text in texts]
  else:
    ids = new_texts(tokenizer, texts, FLAGS.special_tokens)
  with said_if_slow("reading the prompt; for a new length this compiles ..."):
    turn = start_turn(session, ids, record["tokenizer"].get("eos_ids", tokenizer.eos_id))
  streams = [TextStream(tokenizer, FLAGS.stop, **state) for state in session.texts]
  written = list(map(shown_prompt, streams, texts, ids))
  speed = write_texts(session, turn, streams, written, goes_on=bool(target))
  if target:
    save(session, streams, target)
  lost = session.lost_scores
  if lost.any():
    print(
      f"warning: {lost.sum()} scores above the threshold had no room in the cache (of "
      f"{(lost > 0).sum()} of {len(ids)} texts): gates are slightly high",
      file=sys.stderr,
    )
  print(f"[step {step}: {sum(map(len, ids))} prompt tokens, {speed}]", file=sys.stderr)


if __name__ == "__main__":
  run(main, FLAGS)
