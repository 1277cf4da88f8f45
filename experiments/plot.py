# ruff: noqa: E402 (see sparsek.command_line.main)
"""Picture of runs: losses, statistics of selection, the tokens that are kept.

  python -m experiments.plot --workdir=runs/a --output=a.png
  python -m experiments.plot --workdir=runs/a,runs/b --labels=SPARSEK,window --output=both.svg
  python -m experiments.plot --workdir=runs/a --prompt="The name is Ada. What is the name?"

The picture has the training and the held-out loss by step, the held-out loss by position where
`python -m experiments.evaluate` has recorded it, and statistics of selection by step: gate mass,
support, age of the selected keys, spread of the scores, the scorers' loss. One run has a line for
each layer; several runs have a line each, the mean over layers in a band from the least to the
greatest. Runs that are still training can be drawn, and folders that hold only metrics.jsonl.

--prompt and --prompt_file, which need a checkpoint, add the tokens of a text that each layer
keeps. What a run has not recorded is left out, and named on stderr.
"""

import os
import sys

from absl import flags as absl_flags

from sparsek.command_line.definer import Definer
from sparsek.command_line.flags import check_runs, define_step_flags
from sparsek.command_line.main import parse_first
from sparsek.command_line.main import run as run_command
from sparsek.command_line.own_modules import define_import_flag
from sparsek.errors import UsageError
from sparsek.storage import files

MOST_RUNS = 8  # that can be told apart
MOST_TOKENS = 1024  # of a text that is drawn
FORMATS = (".png", ".svg")


def define_flags(flag_values: absl_flags.FlagValues) -> None:
  """Defines the flags of this command."""
  define = Definer(flag_values)
  define.paths("workdir", f"Folder of a run, or up to {MOST_RUNS} separated by commas. Required.")
  define.path("output", None, "The picture, a .png or .svg file. By default plot.png.")
  define.words("labels", [], "Name of each run in the picture. By default those of the folders.")
  define.string("prompt", None, "Text of which the kept tokens are drawn.")
  define.path(
    "prompt_file",
    None,
    "File with the text of which the kept tokens are drawn. Not together with --prompt.",
  )
  define_step_flags(flag_values)
  define_import_flag(flag_values)


FLAGS = absl_flags.FlagValues()
define_flags(FLAGS)


def check_flags() -> None:
  """Raises UsageError for folders, names, a picture or texts that cannot be used."""
  check_runs(FLAGS.workdir)
  if len(FLAGS.workdir) > MOST_RUNS:
    raise UsageError(
      f"--workdir names {len(FLAGS.workdir)} runs: at most {MOST_RUNS} can be told apart"
    )
  _labels()
  output = _output()
  if not output.lower().endswith(FORMATS):
    raise UsageError(f"--output={output}: must end in {' or '.join(FORMATS)}")
  files.check_writable(output)
  if FLAGS.prompt is not None and FLAGS.prompt_file is not None:
    raise UsageError("--prompt and --prompt_file exclude each other: give one of them")
  if FLAGS.prompt == "":
    raise UsageError("--prompt is empty: give the text of which the kept tokens are drawn")


def _labels() -> list[str]:
  """Returns the names of the runs, as given or as short as their paths allow."""
  folders, given = FLAGS.workdir, FLAGS.labels
  if given:
    if len(given) != len(folders) or len(set(given)) != len(given) or not all(given):
      raise UsageError(
        f"--labels={','.join(given)}: must be {len(folders)} different name(s), one for each run"
      )
    return given
  parts = [os.path.normpath(folder).split(os.sep) for folder in folders]
  for length in range(1, max(map(len, parts)) + 1):
    labels = ["/".join(part[-length:]) for part in parts]
    if len(set(labels)) == len(labels):
      return labels
  raise UsageError(f"--workdir={','.join(folders)}: names a folder twice")


def _output() -> str:
  return FLAGS.output or os.path.abspath("plot.png")


if __name__ == "__main__":
  parse_first(FLAGS, __doc__, check_flags)

from sparsek.command_line.invocation import as_typed
from sparsek.data.tokenizer import as_valid_unicode
from sparsek.experiments.reports import plots, run_plots
from sparsek.generation.prompts import new_texts, read_prompts
from sparsek.runs import checkpoint, run_record


def _say(line: str) -> None:
  print(as_typed(line), file=sys.stderr)


def _text() -> str | None:
  """Returns the text of --prompt or --prompt_file, or None."""
  if FLAGS.prompt_file is not None:
    return "\n".join(read_prompts(FLAGS.prompt_file))
  return None if FLAGS.prompt is None else as_valid_unicode(FLAGS.prompt)


def _kept(folder: str, label: str, text: str) -> run_plots.KeptText | None:
  """Returns a text with the tokens of it that a run keeps; None if none of its layers selects."""
  config, _ = run_record.load_run_config(folder)
  if "sparsek" not in config.layer_kinds:
    _say(f"kept tokens: {label} has no sparsek layer")
    return None
  tokenizer = run_record.load_run_tokenizer(folder)
  (tokens,) = new_texts(tokenizer, [text])
  if len(tokens) > MOST_TOKENS:
    source = "--prompt" if FLAGS.prompt_file is None else f"--prompt_file={FLAGS.prompt_file}"
    raise UsageError(
      f"{source} has {len(tokens):,} tokens for {label}: at most {MOST_TOKENS:,} can be drawn"
    )
  params, _ = checkpoint.load_params(folder, config, FLAGS.step, allow_older=FLAGS.allow_older_step)
  pieces = [tokenizer.decode([token]) for token in tokens]
  return run_plots.KeptText(label, pieces, plots.kept_tokens(config, params, tokens))


def main() -> None:
  """Reads the runs, and writes the picture."""
  check_flags()
  plots.new_figure()  # raises without matplotlib, before any work
  runs = [run_plots.read_run(folder, label) for folder, label in zip(FLAGS.workdir, _labels())]
  text = _text()
  texts = [] if text is None else [_kept(run.folder, run.label, text) for run in runs]
  kept = [one for one in texts if one]
  panels = run_plots.panels(runs, _say)
  if not (panels or kept):
    raise UsageError("--workdir: no run has recorded anything that could be drawn")
  run_plots.save(_output(), runs, panels, kept)
  print(_output())


if __name__ == "__main__":
  run_command(main, FLAGS)
