# ruff: noqa: E402 (see sparsek.command_line.main)
"""Benchmark of SPARSEK beside dense attention and a window of the same budget.

  python -m experiments.benchmark --lengths=4096,16384 --k=128 --window=128 --heads=2 \\
    --kv_heads=1 --head_dim=64
  python -m experiments.benchmark --suite=headline \\
    --record=experiments/results/attention_h100.json
  python -m experiments.benchmark --suite=train --lengths=8192,32768 --remat=attention
  python -m experiments.benchmark --suite=decode --k=512 --window=512

The suites of attention measure time and memory of a call; the baselines are cuDNN's on an NVIDIA
GPU, XLA's elsewhere. Everything that a call needs is included: thresholds, expiry, compaction, and
for forward + backward the gradients of all inputs. All functions are timed in turn, round after
round, and medians are shown; the record is written after every round.
"""

import dataclasses
import functools
import os
from collections.abc import Callable
from types import ModuleType
from typing import Any

from sparsek.command_line import outputs
from sparsek.command_line.definer import into_string
from sparsek.command_line.main import parse_first
from sparsek.command_line.main import run as run_command
from sparsek.errors import RunError, UsageError
from sparsek.experiments.bench.flags import FLAGS, check_workdir
from sparsek.storage import files

RECORD = outputs.record("record of experiments.benchmark", "flags", "rows", "summary")


def check_flags() -> None:
  """Raises UsageError unless --show or --record can be read or written, and for --workdir."""
  if FLAGS.show:
    outputs.check_name("show", FLAGS.show)
    outputs.check_picture("show", FLAGS.show)
  elif FLAGS.record:
    outputs.check_record("record", FLAGS.record, RECORD, has_picture=True)
  check_workdir()


if __name__ == "__main__":
  parse_first(FLAGS, __doc__, check_flags)

from sparsek.experiments.bench import attention as attention_bench
from sparsek.experiments.bench import attention_report, decoding_report, training_step_report
from sparsek.experiments.bench import decoding as decoding_bench
from sparsek.experiments.bench import training_step as training_step_bench
from sparsek.experiments.bench.cells import environment
from sparsek.experiments.bench.suites import (
  check_same_model,
  decode_jobs,
  flag,
  jobs,
  names,
  problems,
)
from sparsek.experiments.reports import plots, records

Record = dict[str, Any]
REFERENCE_LENGTH = 4096
# suites of whole models: the module that times them, names of what can be compared
MODELS = {
  "train": (training_step_bench, (*training_step_bench.KINDS, *training_step_bench.OTHERS)),
  "decode": (decoding_bench, (*decoding_bench.KINDS, *decoding_bench.OTHERS)),
}
MOST_BYTES = 60e9  # larger caches of transformers are not tried


def report_of(record: Record) -> ModuleType:
  """Returns the module that prints and draws a record."""
  of_suite = {"train": training_step_report, "decode": decoding_report}
  return of_suite.get(record.get("suite", ""), attention_report)


def load(path: str) -> Record:
  """Returns a record that an earlier run wrote, after checking that all of it can be printed."""
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


def given_flags() -> list[str]:
  """Returns the flags of this command, without those that name the record."""
  lines = into_string(FLAGS).splitlines()
  return [line for line in lines if line.split("=")[0] not in ("--record", "--show", "--extend")]


def load_to_extend(path: str | None) -> Record | None:
  """Returns the record that --extend continues, if there is one."""
  suite = flag("suite")
  if flag("extend") and not (suite in MODELS and path):
    raise UsageError("--extend: needs --suite=train or decode, and --record")
  if not (flag("extend") and path and os.path.exists(path)):
    return None
  old = load(path)
  if old.get("suite") == suite:  # otherwise `rows_to_keep` refuses it
    check_same_model(old, suite, report_of(old).IDENTITY)
  return old


def run(path: str | None) -> Record:
  """Times what the flags ask for; returns the record, which it writes to `path` each round."""
  suite, old = flag("suite"), load_to_extend(path)
  of_suite: dict[str, Callable[[], list]] = {"train": jobs, "decode": decode_jobs}
  chosen = of_suite.get(suite, problems)()
  limits, say = (flag("rounds"), flag("seconds")), functools.partial(print, flush=True)
  if suite in MODELS:  # PyTorch first, before JAX takes the memory
    measurer, allowed = MODELS[suite]
    kinds = names("baselines", allowed) if flag("baselines") else measurer.kinds_here()
    most = flag("max_transformers") if suite == "train" else MOST_BYTES
    others = measurer.time_transformers(chosen, kinds, most, flag("rounds"), say)
  record = {"suite": suite, **environment(), "flags": given_flags(), "errors": None}
  kept = report_of(record).rows_to_keep(old, record) if old else []

  def save(**figures: Any) -> None:
    record.update(figures)
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
  if suite not in MODELS and (n := reference_length(chosen)):
    save(errors=errors_at(n, chosen[0]))
  return record


def reference_length(chosen: list[attention_bench.Problem]) -> int:
  """Returns the length at which to compare with the float32 reference; 0 for no comparison."""
  longest = max(problem.n for problem in chosen)
  return flag("errors_at", min(REFERENCE_LENGTH, longest) if flag("suite") == "headline" else 0)


def errors_at(n: int, problem: attention_bench.Problem) -> Record:
  """Returns the errors of a problem of this length, beside the float32 reference."""
  problem = dataclasses.replace(problem, n=n, baselines=("sparsek", "xla"))
  (problem,) = attention_bench.choose_baselines([problem], None, flag("implementation"))
  return attention_bench.errors(problem, flag("implementation"))


def main() -> None:
  """Measures or loads, prints, draws."""
  check_flags()
  path = flag("show", flag("record"))
  draws = bool(path) and plots.can_draw("the figures are printed and recorded without them")
  if flag("show"):
    record = load(path)
  else:
    record = run(path)
  report = report_of(record)
  print("\n".join(report.lines(record)), flush=True)
  if path:
    written = [path]
    if draws:
      written.append(outputs.picture_of(path))
      report.draw(written[-1], record)
    print(", ".join(written))
  failed = report.failures(record)
  if failed:
    raise RunError("not everything could be timed\n" + "\n".join(failed))


if __name__ == "__main__":
  run_command(main, FLAGS)
