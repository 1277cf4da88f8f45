# ruff: noqa: E402 (see sparsek.command_line.main)
"""Held-out loss of one or several runs side by side.

The loss is shown in nats per token, with an interval over documents, in bits per byte, by position,
also beyond the training length, and of far repeats: tokens that end a rare n-gram which their
document had far back. Each run is compared with the first one over the same documents.

  python -m experiments.evaluate --workdir=/tmp/run
  python -m experiments.evaluate --workdir=/tmp/sparsek,/tmp/sliding_window --seq_len=4096

All runs are evaluated on the same rows. --k, --window and --gate may differ from those of training.
A line with the figures, the losses of documents, the flags and the versions is added to each run's
WORKDIR/evaluation.jsonl.
"""

import os
import sys

from absl import flags as absl_flags

from sparsek.command_line import path_flags
from sparsek.command_line.configs import override_config, refuse_unused
from sparsek.command_line.definer import Definer, into_string
from sparsek.command_line.flags import check_runs, define_data_of_runs_flag, define_evaluation_flags
from sparsek.command_line.invocation import as_typed
from sparsek.command_line.main import parse_first
from sparsek.command_line.main import run as run_command
from sparsek.command_line.terminal import said_if_slow
from sparsek.command_line.training_flags import define_loss_chunk_flag, define_mesh_flags
from sparsek.config import FarRepeatRule
from sparsek.errors import UsageError
from sparsek.storage import files

RECORDS = "evaluation.jsonl"


def define_flags(flag_values: absl_flags.FlagValues) -> None:
  """Defines the flags of this command; None means the value of the run itself."""
  define_evaluation_flags(flag_values)
  define_data_of_runs_flag(flag_values)
  define = Definer(flag_values)
  define.integer(
    "seq_len", None, "Tokens per row; may be more than in training. By default as in training."
  )
  define.integer(
    "batch_size",
    None,
    "Rows per batch. By default as in training, or the next multiple of the devices.",
  )
  define.integer("eval_batches", 32, "Evaluate on at most this many batches.")
  define.integer(
    "far_repeats",
    None,
    "Tokens after which a rare n-gram that comes again is a far repeat. The losses of the last "
    "tokens of such n-grams are shown apart. By default a quarter of a row.",
  )
  define.integer(
    "far_repeats_ngram",
    FarRepeatRule.far_repeats_ngram,
    "Tokens of such an n-gram. Of bytes take more, such as 16.",
  )
  define.integer(
    "far_repeats_most",
    FarRepeatRule.far_repeats_most,
    "An n-gram is rare if the rows have it at most this often.",
  )
  define_mesh_flags(flag_values)
  define_loss_chunk_flag(flag_values)


FLAGS = absl_flags.FlagValues()
define_flags(FLAGS)


def check_flags() -> None:
  """Raises UsageError unless --workdir names folders."""
  check_runs(FLAGS.workdir)


if __name__ == "__main__":
  parse_first(FLAGS, __doc__, check_flags)

from tqdm import tqdm

from sparsek.data.tokenizer import Tokenizer, describe_documents
from sparsek.evaluation.heldout import Run, evaluation_record, heldout_rows, other_beginning
from sparsek.evaluation.loss_by_position import bits_per_byte, bucket_edges, evaluate
from sparsek.evaluation.loss_table import format_table
from sparsek.parallel import clusters
from sparsek.parallel.mesh import make_mesh
from sparsek.runs import checkpoint, run_record
from sparsek.runs.metrics import append_record


def _runs() -> list[Run]:
  """Returns the runs of --workdir, with the flags of attention applied to their models."""
  loaded = [(folder, *run_record.load_run_config(folder)) for folder in FLAGS.workdir]
  configs = [override_config(config, FLAGS) for _, config, _ in loaded]
  refuse_unused(configs, FLAGS)
  return [Run(folder, config, record) for config, (folder, _, record) in zip(configs, loaded)]


def _say_how_documents_begin(run: Run, tokenizer: Tokenizer) -> None:
  """Prints the tokens that begin and end documents; warns if the run was trained with others."""
  print(f"{run.workdir}: {describe_documents(tokenizer)}", file=sys.stderr)
  warning = other_beginning(run, tokenizer)
  if warning:
    print(as_typed(f"warning: {warning}"), file=sys.stderr)


def _append_record(run: Run, record: dict) -> None:
  """Appends the figures of a run to its WORKDIR/evaluation.jsonl, with the flags."""
  path = os.path.join(run.workdir, RECORDS)
  append_record(path, {**record, "flags": into_string(FLAGS).splitlines()})
  print(f"written to {path}", file=sys.stderr)


def _settings(run: Run, step: int) -> dict[str, object]:
  """Returns the columns of the table that describe a run."""
  return {
    "step": step,
    "attention": ",".join(run.config.attention),
    "training length": run.record["data"]["seq_len"],
    **{name: ", ".join(map(str, run.config.values_of(name))) or "-" for name in ("window", "k")},
  }


def main() -> None:
  """Evaluates all runs, prints the table, and writes the records."""
  check_flags()
  clusters.check_alone("experiments.evaluate", FLAGS.distributed, os.environ)
  runs, mesh = _runs(), make_mesh(FLAGS.fsdp, FLAGS.context)
  dataset, data, batches = heldout_rows(
    runs, mesh, FLAGS.eval_batches, FLAGS.data, FLAGS.seq_len, FLAGS.batch_size
  )
  trained_lengths = [run.record["data"]["seq_len"] for run in runs]
  edges = bucket_edges(data.seq_len, trained_lengths)
  for run in runs:
    files.check_writable(os.path.join(run.workdir, RECORDS))
  rule = FarRepeatRule(FLAGS.far_repeats, FLAGS.far_repeats_ngram, FLAGS.far_repeats_most)
  results, settings, bits = [], [], []
  for run in runs:
    with said_if_slow(f"loading {run.workdir} ..."):
      params, step = checkpoint.load_params(
        run.workdir, run.config, FLAGS.step, mesh, allow_older=FLAGS.allow_older_step
      )
    _say_how_documents_begin(run, dataset.tokenizer)
    rows = f"{len(batches)} batches of {data.batch_size} x {data.seq_len} tokens"
    print(f"evaluating {run.workdir} at step {step} on {rows}", file=sys.stderr)
    try:
      progress = tqdm(batches, unit="batch", disable=None)
      result = evaluate(
        run.config, params, progress, edges, rule, loss_chunk=FLAGS.loss_chunk, mesh=mesh
      )
    except NotImplementedError as error:
      raise UsageError(f"--implementation={FLAGS.implementation}: {error}") from None
    results.append(result)
    settings.append(_settings(run, step))
    bits.append(bits_per_byte(result.loss, dataset.split("heldout")))
    # Now, not at the end: a failure of a later run must not lose the figures of this one.
    _append_record(run, evaluation_record(run, step, result, data, dataset))
  names = [path_flags.shown(run.workdir) for run in runs]
  print(format_table(names, results, bits, trained_lengths, settings))


if __name__ == "__main__":
  run_command(main, FLAGS)
