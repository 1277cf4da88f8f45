"""Time and memory of SPARSEK attention beside dense attention and a sliding window of the same
budget: cuDNN's on an NVIDIA GPU, XLA's elsewhere.

  python -m experiments.benchmark --lengths=4096,16384 --k=128 --window=128 --heads=2 --kv_heads=1
  --head_dim=64 python -m experiments.benchmark --suite=headline
  --record=experiments/results/attention_h100.json python -m experiments.benchmark --suite=train
  --lengths=8192,32768 --remat=attention python -m experiments.benchmark --suite=decode --k=512
  --window=512

Everything that a call needs is included: thresholds, expiry, compaction, and for forward + backward
the gradients of all inputs. All functions are timed in turn, round after round, and medians are
shown; the record is written after every round.
"""

import dataclasses
import functools
import os

from experiments.bench import attention as attention_bench
from experiments.bench import (
  attention_report,
  decoding_report,
  training_step_report,
  transformers_llama,
)
from experiments.bench import decoding as decoding_bench
from experiments.bench import training_step as training_step_bench
from experiments.bench.cells import environment
from experiments.bench.suites import (
  FLAGS,
  check_same_model,
  decode_jobs,
  flag,
  jobs,
  names,
  problems,
)
from experiments.reports import records
from sparsek.command_line import flags
from sparsek.errors import RunError, UsageError
from sparsek.storage import files

REFERENCE_LENGTH = 4096
# suites of whole models: who measures, what there is to compare
MODELS = {
  "train": (training_step_bench, (*training_step_bench.KINDS, *transformers_llama.KINDS)),
  "decode": (decoding_bench, (*decoding_bench.KINDS, *decoding_bench.OTHERS)),
}
MOST_BYTES = 60e9  # of a cache of transformers


def report_of(record):
  """What tells of a record."""
  return {"train": training_step_report, "decode": decoding_report}.get(
    record.get("suite"), attention_report
  )


def load(path):
  """A record that an earlier run wrote, all of which can be printed."""
  record = files.read_json_object(path)
  if "summary" not in record:
    raise UsageError(f"{path}: no record of this benchmark")
  try:
    report_of(record).lines(record), report_of(record).failures(record)
  except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
    raise UsageError(
      f"{path}: a record of this benchmark that cannot be understood: "
      f"{type(error).__name__}: {str(error)[:200]}"
    ) from None
  return record


def said():
  """Returns the flags of this command but for those that say where the record is."""
  lines = flags.into_string(FLAGS).splitlines()
  return [line for line in lines if line.split("=")[0] not in ("--record", "--show", "--extend")]


def run(path):
  """Measures and returns the record, which it writes to `path` after every round."""
  suite, path_exists = flag("suite"), path and os.path.exists(path)
  if flag("extend") and not (suite in MODELS and path):
    raise UsageError("--extend: needs --suite=train or decode, and --record")
  old = load(path) if flag("extend") and path_exists else None
  if old and old.get("suite") == suite:  # else `rows_to_keep` says so
    check_same_model(old, suite, report_of(old).IDENTITY)
  chosen = {"train": jobs, "decode": decode_jobs}.get(suite, problems)()
  limits, say = (flag("rounds"), flag("seconds")), functools.partial(print, flush=True)
  if suite in MODELS:  # PyTorch's first: JAX takes the memory
    measurer, allowed = MODELS[suite]
    kinds = names("rivals", allowed) if flag("rivals") else measurer.kinds_here()
    others = measurer.time_transformers(
      chosen,
      kinds,
      flag("max_transformers") if suite == "train" else MOST_BYTES,
      flag("rounds"),
      say,
    )
  record = {"suite": suite, **environment(), "flags": said(), "errors": None}
  kept = report_of(record).rows_to_keep(old, record) if old else []

  def save(**more):
    record.update(more)
    record["summary"] = report_of(record).summary(record["rows"], record["errors"])
    if path:
      files.save(path, records.dumps(record) + "\n")

  if suite in MODELS:
    measured = measurer.time_jobs(chosen, kinds, *limits, others=others, say=say)
  else:
    measured = attention_bench.time_problems(chosen, flag("implementation"), *limits, say=say)
  for rounds, rows in measured:
    save(
      rows=report_of(record).merge(kept, rows) if suite in MODELS else rows,
      rounds=max(rounds, old["rounds"] if old else 0),
    )
  at = (
    0
    if suite in MODELS
    else flag(
      "errors_at",
      min(REFERENCE_LENGTH, max(problem.n for problem in chosen))
      if flag("suite") == "headline"
      else 0,
    )
  )
  if at:
    (problem,) = attention_bench.choose_baselines(
      [dataclasses.replace(chosen[0], n=at, baselines=("sparsek", "xla"))],
      None,
      flag("implementation"),
    )
    save(errors=attention_bench.errors(problem, flag("implementation")))
  return record


def main() -> None:
  """Measures or loads, prints, draws."""
  path = flag("show", flag("record"))
  if path and not (path.endswith(".json") and os.path.isdir(os.path.dirname(path) or ".")):
    raise UsageError(
      f"--{'show' if flag('show') else 'record'}={path}: must be a .json file in "
      "a folder that exists"
    )
  if flag("show"):
    record = load(path)
  else:
    record = run(path)
  report = report_of(record)
  print("\n".join(report.lines(record)), flush=True)
  if path:
    picture = os.path.splitext(path)[0] + ".png"
    report.draw(picture, record)
    print(f"{path}, {picture}")
  failed = report.failures(record)
  if failed:
    raise RunError("not everything could be timed\n" + "\n".join(failed))


if __name__ == "__main__":
  flags.run(main, FLAGS)
