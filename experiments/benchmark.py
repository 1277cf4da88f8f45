"""Time and memory of SPARSEK attention beside dense attention and a sliding window of the same budget: cuDNN's on an NVIDIA GPU, XLA's elsewhere.

  python -m experiments.benchmark --lengths=4096,16384 --k=128 --window=128 --heads=2 --kv_heads=1 --head_dim=64
  python -m experiments.benchmark --suite=headline --record=experiments/results/attention_h100.json

Everything that a call needs is included: thresholds, expiry, compaction, and for forward + backward the gradients of all inputs. All functions are timed in
turn, round after round, and medians are shown; the record is written after every round.
"""

import dataclasses
import json
import os

from sparsek import benchmark_report as report
from sparsek import flags, measure, plots
from sparsek.errors import RunError, UsageError
from sparsek.kernels.specs import SCORE_FAMILIES

flags.define_benchmark_flags()
FLAGS = flags.FLAGS
FIELDS = ("heads", "kv_heads", "head_dim", "k", "window", "gate", "dtype")     # of measure.Problem, named like their flags
K = WINDOW = 128                 # where --suite=attention is not told
REFERENCE_LENGTH = 4096


def flag(name, default=None):
  """The value of a parsed flag, or `default` where it was not given."""
  value = FLAGS[name].value
  return default if value is None else value


def names(name, allowed):
  """The values of a flag that lists some of `allowed`."""
  values = tuple(dict.fromkeys(flag(name).split(",")))
  for value in values:
    if value not in allowed:
      raise UsageError(f"--{name}={flag(name)}: {value!r} must be one of {', '.join(allowed)}")
  return values


def problems():
  """What the flags ask to time."""
  lengths = flag("lengths").split(",")
  if not all(n.isdecimal() and 1 <= int(n) <= 2 ** 26 for n in lengths):
    raise UsageError(f"--lengths={flag('lengths')}: must be numbers from 1 to 2^26 separated by commas, such as 4096,16384")
  lengths = sorted({int(n) for n in lengths})
  families = names("scores", SCORE_FAMILIES)
  if flag("suite") == "headline":
    given = {name: flag(name) for name in FIELDS if FLAGS[name].present}
    chosen = measure.headline(lengths if FLAGS["lengths"].present else measure.HEADLINE_LENGTHS, **given)
    if FLAGS["scores"].present:
      chosen = [problem for problem in chosen if problem.scores in families]
  else:
    given = {"k": K, "window": WINDOW, "dtype": "bfloat16" if measure.on_nvidia_gpu() else "float32"}
    given |= {name: flag(name) for name in FIELDS if flag(name) is not None}
    chosen = [measure.Problem(n, scores=scores, **given) for scores in families for n in lengths]
  for problem in chosen:
    if problem.heads % problem.kv_heads:
      raise UsageError(f"--heads={problem.heads} must be a multiple of --kv_heads={problem.kv_heads}")
  rivals = names("rivals", measure.RIVALS) if flag("rivals") else None
  return measure.choose_rivals(chosen, rivals, flag("implementation"), max_dense=FLAGS["max_dense"].value, max_xla=flag("max_xla"))


def picture(path, record):
  """Draws the picture beside a record; returns its path."""
  path = os.path.splitext(path)[0] + ".png"
  row = record["rows"][0]
  plots.save_times(path, report.curves(record["rows"]), f"{record['device']}, {report.shape_text(row)} {report.budget_text(row)}")
  return path


def run(path):
  """Measures and returns the record, which it writes to `path` after every round."""
  chosen = problems()
  record = {**measure.environment(), "flags": flags.into_string().split(), "errors": None}

  def save(**more):
    record.update(more)
    record["summary"] = report.summary(record["rows"], record["errors"])
    if path:
      with open(path + ".new", "w", encoding="utf-8") as file:
        json.dump(record, file, indent=1)
      os.replace(path + ".new", path)

  for rounds, rows in measure.measure(chosen, flag("implementation"), flag("rounds"), flag("seconds"), say=lambda text: print(text, flush=True)):
    save(rows=rows, rounds=rounds)
  at = flag("errors_at", min(REFERENCE_LENGTH, max(problem.n for problem in chosen)) if flag("suite") == "headline" else 0)
  if at:
    problem, = measure.choose_rivals([dataclasses.replace(chosen[0], n=at, rivals=("sparsek", "xla"))], None, flag("implementation"))
    save(errors={"problem": dataclasses.asdict(problem), **measure.errors(problem, flag("implementation"))})
  return record


def main() -> None:
  """Measures or loads, prints, draws."""
  path = flag("show", flag("record"))
  if path and not (path.endswith(".json") and os.path.isdir(os.path.dirname(path) or ".")):
    raise UsageError(f"--{'show' if flag('show') else 'record'}={path}: must be a .json file in a folder that exists")
  if flag("show"):
    try:
      with open(path, encoding="utf-8") as file:
        record = json.load(file)
    except (OSError, ValueError) as error:
      raise UsageError(f"--show={path} cannot be read: {error}") from None
    if "summary" not in record:
      raise UsageError(f"--show={path}: no record of this benchmark")
  else:
    record = run(path)
  print("\n".join(report.lines(record)), flush=True)
  if path:
    print(f"{path}, {picture(path, record)}")
  failed = report.failures(record)
  if failed:
    raise RunError("not everything could be timed\n" + "\n".join(failed))


if __name__ == "__main__":
  flags.run(main)
