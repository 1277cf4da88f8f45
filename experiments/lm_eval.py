"""EleutherAI's evaluation harness (lm-eval) with runs as models.

  python -m experiments.lm_eval --model sparsek --model_args workdir=/tmp/run --tasks lambada_openai
  python -m experiments.lm_eval --model sparsek --model_args workdir=/tmp/run,k=512,window=512 \\
    --tasks hellaswag --batch_size 16 --output_path results
  python -m experiments.lm_eval run --help

This is lm-eval's own program, with all of its options and models, and the model `sparsek` beside
them. The extra `lm-eval` brings the package. --model_args takes the folder of a run as workdir, and
k, window, gate, dtype, implementation, step, allow_older_step, fsdp and context as the flags of
other commands; max_length, the most tokens of a text; max_gen_toks, for tasks that do not say how
many tokens an answer may have; prefix_token_id, the token before an empty context; seed; and
import, for scorers of your own. --batch_size is per device, and all devices compute. --device is
left to JAX.

Without --include_path the tasks ruler_prompts are there too: the prompts that evaluate-ruler
--write_prompts wrote to FOLDER, --metadata prompts=FOLDER, scored by lm-eval.
"""

import importlib.util
import linecache
import os
import re
import sys
import traceback

from absl import flags as absl_flags

from sparsek.command_line.main import run
from sparsek.errors import UsageError

FLAGS = absl_flags.FlagValues()  # none: the options are lm-eval's
NAME = "sparsek"
TASKS = os.path.join(os.path.dirname(os.path.abspath(__file__)), "lm_eval_tasks")
# Options, by their beginnings, with which lm-eval is told itself where tasks are.
OWN_TASKS = ("--include_path", "--config", "-C")


def evaluate(arguments: list[str]) -> None:
  """Runs lm-eval's program with these arguments.

  Raises:
    UsageError: where lm-eval is not installed, or finds fault with an argument.
  """
  if importlib.util.find_spec("lm_eval") is None:
    raise UsageError("lm-eval is not installed: pip install lm-eval transformers")
  import lm_eval.models  # noqa: F401  registers its own models only where there are no others
  from lm_eval.__main__ import cli_evaluate
  from lm_eval.api.registry import model_registry

  if NAME not in model_registry:
    model_registry.register(NAME, target="sparsek.lm_eval:SparsekLM")
  has_tasks = any(argument.startswith(OWN_TASKS) for argument in arguments)
  sys.argv = ["lm-eval", *arguments, *([] if has_tasks else ["--include_path", TASKS])]
  try:
    cli_evaluate()
  except (ValueError, TypeError, FileNotFoundError) as error:
    if isinstance(error, UsageError) or not _is_refusal(error):
      raise
    is_of_tasks = re.search("tasks|specify task", str(error).lower())
    advice = "; `sparsek lm-eval ls tasks` lists all tasks" if is_of_tasks else ""
    raise UsageError(f"lm-eval: {error}{advice}") from None


def _is_refusal(error: Exception) -> bool:
  """Returns whether a `raise` in lm-eval made an error, and not a fault in what it calls."""
  *_, (frame, number) = traceback.walk_tb(error.__traceback__)
  line = linecache.getline(frame.f_code.co_filename, number).strip()
  return frame.f_globals["__name__"].startswith("lm_eval.") and line.startswith("raise ")


def main() -> None:
  """Runs lm-eval's program, with the arguments of the process."""
  evaluate(sys.argv[1:])


if __name__ == "__main__":
  given = sys.argv[1:]
  if given not in ([], ["--help"], ["-h"], ["--helpfull"]):
    sys.argv = sys.argv[:1]
    run(lambda: evaluate(given), FLAGS)
  sys.argv.append("--help")
  run(main, FLAGS)
