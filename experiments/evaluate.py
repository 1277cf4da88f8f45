"""Held-out loss of one or several runs side by side: nats per token, bits per byte, and by
position, also beyond the training length.

  python -m experiments.evaluate --workdir=/tmp/run
  python -m experiments.evaluate --workdir=/tmp/sparsek,/tmp/sliding_window --seq_len=4096

All runs are evaluated on the same rows. --k, --window and --gate may differ from those of training.
Each run's WORKDIR/evaluation.jsonl gets a line with the numbers and what they were measured with;
earlier lines stay.
"""

import dataclasses
import os
import sys

from absl import flags as absl_flags
from tqdm import tqdm

from sparsek.command_line import flags, path_flags
from sparsek.config import DataConfig
from sparsek.data.batches import eval_batches, open_data
from sparsek.data.tokenizer import describe_documents, read_bos
from sparsek.errors import UsageError
from sparsek.evaluation.loss_by_position import bits_per_byte, bucket_edges, evaluate, format_table
from sparsek.parallel.mesh import make_mesh, replicated
from sparsek.runs import checkpoint, run_directory, run_record
from sparsek.runs.metrics import append_record
from sparsek.storage import files
from sparsek.training.checks import check_batch, check_length

RECORDS = "evaluation.jsonl"
# Apart from the flags of pretraining, whose defaults are no run's own values.
FLAGS = absl_flags.FlagValues()
flags.define_evaluation_flags(FLAGS)


@dataclasses.dataclass(frozen=True)
class Run:
  """A folder to evaluate, its model with the flags applied, and its model.json."""

  workdir: str
  config: object
  record: dict

  def open_data(self):
    name, fingerprint = (self.record["tokenizer"][key] for key in ("name", "fingerprint"))
    if not (FLAGS.data or self.record["data"]["data"]):
      raise UsageError(
        f"--data is required: {self.workdir} was imported; make data with "
        f"experiments.prepare_data --tokenizer={self.workdir}/tokenizer"
      )
    source = name if name == "byte" else os.path.join(self.workdir, "tokenizer")
    return open_data(FLAGS.data or self.record["data"]["data"], source, fingerprint)


def _runs() -> list[Run]:
  workdirs = FLAGS.workdir
  if not workdirs:
    raise UsageError(
      "--workdir is required: the folder of a pretraining run, or several separated by commas"
    )
  for folder in workdirs:
    if not os.path.isdir(folder):
      raise UsageError(f"--workdir={folder}: there is no such folder")
  loaded = [(folder, *run_record.load_run_config(folder)) for folder in workdirs]
  return [
    Run(folder, flags.override_config(config, FLAGS), record) for folder, config, record in loaded
  ]


def _heldout(runs: list[Run]):
  """The dataset and its batches, the same for every run."""
  datasets = [run.open_data() for run in runs]
  for run, dataset in zip(runs, datasets):
    if dataset.fingerprint != datasets[0].fingerprint:
      raise UsageError(
        f"{runs[0].workdir} and {run.workdir} read different tokens "
        f"({datasets[0].folder} and {dataset.folder}): "
        f"evaluate them one by one, or give --data"
      )
  seq_len = FLAGS.seq_len or max(run.record["data"]["seq_len"] for run in runs)
  available = datasets[0].split("heldout").num_tokens - 1
  if seq_len > max(available, 1):
    raise UsageError(
      f"--seq_len={seq_len} must be at most {available}: "
      f"the held-out split of {datasets[0].folder} has {available + 1:,} tokens"
    )
  data = DataConfig(
    seq_len=seq_len,
    batch_size=FLAGS.batch_size or max(run.record["data"]["batch_size"] for run in runs),
    segment_documents=runs[0].record["data"]["segment_documents"],
  )
  check_batch(make_mesh(), data.batch_size)
  for run in runs:
    check_length(run.config, seq_len)
  return datasets[0], data, eval_batches(datasets[0], data, FLAGS.eval_batches)


def _say_how_documents_begin(run: Run, tokenizer) -> None:
  """Says what begins and ends the documents, and warns where those of the run began otherwise."""
  print(f"{run.workdir}: {describe_documents(tokenizer)}", file=sys.stderr)
  bos_ids = read_bos(run.record["tokenizer"], tokenizer, os.path.join(run.workdir, "model.json"))
  if bos_ids != tokenizer.bos_ids:
    trained = " ".join(map(tokenizer.token, bos_ids)) or "nothing"
    print(
      f"warning: the documents of {run.workdir} began with {trained}: its loss on these means "
      f"little; make the data anew with experiments.prepare_data",
      file=sys.stderr,
    )


def main() -> None:
  """Evaluates every run, prints the table, and writes the numbers down."""
  runs = _runs()
  dataset, data, batches = _heldout(runs)
  trained_lengths = [run.record["data"]["seq_len"] for run in runs]
  edges = bucket_edges(data.seq_len, trained_lengths)
  for run in runs:
    files.check_writable(os.path.join(run.workdir, RECORDS))
  results, steps, bits, everywhere = [], [], [], replicated(make_mesh())
  versions = run_directory.versions()
  for run, trained in zip(runs, trained_lengths):
    params, step = checkpoint.load_params(
      run.workdir, run.config, FLAGS.step, everywhere, allow_older=FLAGS.allow_older_step
    )
    _say_how_documents_begin(run, dataset.tokenizer)
    rows = f"{len(batches)} batches of {data.batch_size} x {data.seq_len} tokens"
    print(f"evaluating {run.workdir} at step {step} on {rows}", file=sys.stderr)
    try:
      progress = tqdm(batches, unit="batch", disable=None)
      result = evaluate(run.config, params, progress, edges, loss_chunk=FLAGS.loss_chunk)
    except NotImplementedError as error:
      raise UsageError(f"--implementation={FLAGS.implementation}: {error}") from None
    results.append(result)
    steps.append(step)
    bits.append(bits_per_byte(result.loss, dataset.split("heldout")))
    # At once: what a later run meets must not cost this one's figures.
    path = os.path.join(run.workdir, RECORDS)
    append_record(
      path,
      {
        "step": step,
        **dataclasses.asdict(result),
        "bits_per_byte": bits[-1],
        "flags": flags.into_string(FLAGS).splitlines(),
        "model": dataclasses.asdict(run.config),
        "data": {
          **dataclasses.asdict(data),
          "data": dataset.folder,
          "fingerprint": dataset.fingerprint,
        },
        "trained_seq_len": trained,
        "versions": versions,
      },
    )
    print(f"written to {path}", file=sys.stderr)

  settings = [
    {
      "step": step,
      "attention": ",".join(run.config.attention),
      "training length": length,
      "window": run.config.window,
      "k": run.config.k
      if set(run.config.layer_kinds) - {"sliding_window", "full", "linear"}
      else "-",
    }
    for run, step, length in zip(runs, steps, trained_lengths)
  ]
  names = [path_flags.shown(run.workdir) for run in runs]
  print(format_table(names, results, bits, trained_lengths, settings))


if __name__ == "__main__":
  flags.run(main, FLAGS)
