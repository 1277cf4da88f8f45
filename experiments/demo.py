# ruff: noqa: E402 (see sparsek.command_line.main)
"""Demonstration of SPARSEK: facts far back, kept words, and constant memory.

  python -m experiments.demo

Tiny models learn to answer what a pass key was that they have read long before: with SPARSEK, with
a sliding window and with random keys of the same budget, and with full attention, from two random
starts each. One run is stopped half-way and resumed in a new process. Takes minutes on two CPU
cores. Everything goes to demo/; the same command again goes on where it was stopped. Each command
is printed before it runs.
"""

import dataclasses
import functools
import json
import os
import statistics
import time
from collections.abc import Mapping, Sequence

from absl import flags as absl_flags

from sparsek.command_line import outputs
from sparsek.command_line.main import parse_first, run

FLAGS = absl_flags.FlagValues()  # the demo takes no flags
KIND = outputs.record("record of the demo", "accuracy", "decoding")

if __name__ == "__main__":
  parse_first(FLAGS, __doc__)

import jax
import jax.numpy as jnp
import numpy as np

from sparsek.command_line.invocation import command
from sparsek.config import TransformerConfig
from sparsek.data.token_files import write_token_files
from sparsek.data.tokenizer import Tokenizer
from sparsek.evaluation import tasks
from sparsek.experiments import demo_commands, demo_documents
from sparsek.experiments.bench import decoding
from sparsek.experiments.demo_commands import FOLDER, title
from sparsek.experiments.reports import demo_picture, plots, results_sections
from sparsek.experiments.reports.plots import NAMES, kept_tokens
from sparsek.generation.cache import cache_bytes, decode_step
from sparsek.generation.inference import inference_params
from sparsek.model.transformer import Params
from sparsek.parallel.mesh import make_mesh
from sparsek.runs import checkpoint, run_directory, run_record
from sparsek.storage import files

DATA, PICTURE, RECORD = (
  os.path.join(FOLDER, name) for name in ("documents", "demo.png", "demo.json")
)
SEQ_LEN, NUM_STEPS, SEEDS = 192, 110, (0, 1)
K = WINDOW = 4
PRETRAIN = (
  f"--data={DATA}",
  "--preset=tiny",
  "--num_layers=2",
  "--scan_layers",
  "--embed_dim=64",
  "--num_heads=2",
  "--num_kv_heads=2",
  "--mlp_dim=128",
  f"--seq_len={SEQ_LEN}",
  "--batch_size=16",
  f"--num_steps={NUM_STEPS}",
  "--learning_rate=7e-3",
  "--warmup_steps=16",
  "--eval_every=0",
  f"--log_every={NUM_STEPS // 2}",
  f"--checkpoint_every={NUM_STEPS // 2}",
)
NUM_DOCUMENTS = 16 * NUM_STEPS * 11 // 10  # each is seen once
# All but full attention see 8 keys a query.
KINDS = {
  "sparsek": (f"--k={K}", f"--window={WINDOW}"),
  "sliding_window": (f"--window={K + WINDOW}",),
  "random": (f"--k={K}", f"--window={WINDOW}"),
  "full": (),
}
DISTANCES, EXAMPLES = (8, 12, 16, 24, 32, 64, 96, 128, 160), 50  # documents a distance and seed
SHOWN_DISTANCE = 96
NOT_SHOWN = (
  "What this does not show: on plain text, where most of what matters is near, a longer window is "
  "still ahead of SPARSEK at this size; the demo on plain text, below, trains both."
)
LENGTHS, ROUNDS, STEPS = (1024, 4096, 16384, 65536), 7, 16  # of a text; to time a step

Accuracies = dict[str, dict[int, list[float]]]  # kind -> distance -> share of each seed
Costs = dict[str, list[dict[str, float]]]  # kind -> a row for each of LENGTHS


def workdir(kind: str, seed: int) -> str:
  """Returns the folder of a run."""
  return os.path.join(FOLDER, f"{kind}_{seed}")


def train() -> None:
  """Makes the documents and trains every kind of attention, from each seed."""
  if not os.path.exists(DATA):
    documents = demo_documents.training_documents(SEQ_LEN - 1, NUM_DOCUMENTS)
    write_token_files(DATA, documents, demo_documents.tokenizer(), ["experiments.demo_documents"])
  for kind, flags in KINDS.items():
    for seed in SEEDS:
      folder = workdir(kind, seed)
      arguments = (*PRETRAIN, f"--attention={kind}", *flags, f"--seed={seed}")
      if NUM_STEPS in checkpoint.saved_steps(folder):
        print(f"{folder} is complete")
      elif (kind, seed) == ("sparsek", 0):
        demo_commands.pretrain_in_two(folder, *arguments)
      else:
        demo_commands.run("pretrain", f"--workdir={folder}", *arguments)


def questions(tokenizer: Tokenizer, length: int, distance: int) -> tuple[np.ndarray, np.ndarray]:
  """Returns EXAMPLES documents, padded to `length` tokens, and the position of their answers."""
  tokens_BxN = np.zeros((EXAMPLES, length), np.int32)
  positions_B = np.zeros(EXAMPLES, np.int32)
  for i in range(EXAMPLES):
    rng = np.random.default_rng([1, distance, i])
    ids = tokenizer.encode(" ".join(demo_documents.question(rng, length, distance)))
    tokens_BxN[i, : len(ids)], positions_B[i] = ids, len(ids) - 1
  return tokens_BxN, positions_B


def accuracies(config: TransformerConfig, params: Params, tokenizer: Tokenizer) -> list[float]:
  """Returns the share of right answers at each of DISTANCES."""
  mesh, shares = make_mesh(devices=jax.devices()[:1]), []
  for distance in DISTANCES:
    tokens_BxN, positions_B = questions(tokenizer, SEQ_LEN, distance)
    positions_Bx1 = positions_B[:, None]
    given = tasks.predicted(config, mesh, params, tokens_BxN, positions_Bx1)
    right = np.asarray(given) == np.take_along_axis(tokens_BxN, positions_Bx1, axis=1)
    shares.append(float(right.mean()))
  return shares


def load(kind: str, seed: int) -> tuple[TransformerConfig, Params]:
  """Returns the model of a run."""
  config, _ = run_record.load_run_config(workdir(kind, seed))
  return config, checkpoint.load_params(workdir(kind, seed), config)[0]


def evaluate(tokenizer: Tokenizer) -> Accuracies:
  """Returns the share of right answers by kind and distance, one for each seed."""
  found: Accuracies = {}
  for kind in KINDS:
    by_seed = [accuracies(*load(kind, seed), tokenizer) for seed in SEEDS]
    found[kind] = {d: list(shares) for d, shares in zip(DISTANCES, zip(*by_seed))}
  return found


def kept_words(tokenizer: Tokenizer) -> tuple[list[str], np.ndarray]:
  """Returns the words of a document up to the end of its question, and what SPARSEK sees there.

  Returns:
    the words; for each, -1 if it is in the last one's window, 1 if a head of any layer keeps it, 2
    if it is the pass key too, otherwise 0.
  """
  config, params = load("sparsek", SEEDS[0])
  rng = np.random.default_rng([2, SHOWN_DISTANCE])
  *words, key = demo_documents.question(rng, SHOWN_DISTANCE + 40, SHOWN_DISTANCE)
  kept = kept_tokens(config, params, tokenizer.encode(" ".join(words)))
  marks = np.where(np.sum([layer.heads[-1] for layer in kept], axis=0) > 0, 1, 0)
  marks *= 1 + (np.array(words) == key)
  marks[-config.window :] = -1
  return words, marks


def costs(config: TransformerConfig, params: Params) -> list[dict[str, float]]:
  """Returns the bytes of the cache, and the median seconds of a step, after each of LENGTHS."""
  rows, given = [], inference_params(config, params)
  step = jax.jit(functools.partial(decode_step, config), donate_argnums=1)
  token = jnp.ones(1, jnp.int32)
  for length in LENGTHS:
    cache = decoding.filled(config, 1, length)
    size, seconds = cache_bytes(cache), []
    logits, cache = step(given, cache, token)  # compiles
    for _ in range(ROUNDS):
      jax.block_until_ready(logits)
      begin = time.perf_counter()
      for _ in range(STEPS):
        logits, cache = step(given, cache, token)
      jax.block_until_ready(logits)
      seconds.append((time.perf_counter() - begin) / STEPS)
    rows.append({"tokens": length, "bytes": size, "seconds": statistics.median(seconds)})
  return rows


def cost_table(found: Mapping[str, Sequence[Mapping[str, float]]]) -> str:
  """Returns a table in Markdown: the memory and time of a token by length of the text."""
  lines = ["| tokens so far | " + " | ".join(f"{n // 1024}k" for n in LENGTHS) + " |"]
  lines.append("|" + "---|" * (len(LENGTHS) + 1))
  for kind, rows in found.items():
    name = NAMES[kind]
    for label, key, scale in (("cache, MB", "bytes", 1e6), ("ms a token", "seconds", 1e-3)):
      values = (row[key] / scale for row in rows)
      lines.append(f"| {name}: {label} | " + " | ".join(f"{x:.3g}" for x in values) + " |")
  return "\n".join(lines)


def main() -> None:
  """Runs all acts, one after the other."""
  started = time.monotonic()
  demo_commands.prepare(PICTURE)
  outputs.check(RECORD, RECORD, KIND)
  draws = plots.can_draw("the demo goes on, and prints its tables")
  title(
    f"1. Train tiny models to answer what a pass key was: each word sees {K + WINDOW} words, or all"
  )
  train()
  title("2. Ask for pass keys near and far")
  tokenizer = demo_documents.tokenizer()
  found = evaluate(tokenizer)
  table = "\n".join(results_sections.demo({"accuracy": found}))
  print(
    f"% of {EXAMPLES} answers right, for each of two random starts; "
    f"guessing: {100 * demo_documents.CHANCE:.0f} %\n{table}"
  )
  title("3. The words that SPARSEK keeps of one document, and what a token of a long text costs")
  words, marks = kept_words(tokenizer)
  print("kept at the question:", " ".join(dict.fromkeys(np.array(words)[marks > 0])))
  config, params = load("sparsek", SEEDS[0])
  spent: Costs = {kind: costs(decoding.under(kind, config), params) for kind in ("sparsek", "full")}
  print(cost_table(spent))
  if draws:
    answers = demo_picture.Answers(
      found, K + WINDOW, demo_documents.CHANCE, config.num_layers * (K + WINDOW)
    )
    demo_picture.save(PICTURE, answers, (words, marks), spent)
  record = {
    "accuracy": found,
    "chance": demo_documents.CHANCE,
    "examples": EXAMPLES,
    "seeds": SEEDS,
    "decoding": spent,
    "model": dataclasses.asdict(config),
    "flags": PRETRAIN,
    "versions": run_directory.versions(),
  }
  files.save(RECORD, json.dumps(record, indent=1) + "\n")
  to_go_on = (
    ("keep fewer words", command("evaluate", f"--workdir={workdir('sparsek', 0)}", "--k=1")),
    ("plain text", command("demo_text")),
    ("your own text", command("prepare_data", "--sources=FOLDER", "--output=data/mine")),
    ("", command("pretrain", "--data=data/mine", "--workdir=runs/mine")),
    ("all flags", command("pretrain", "--help")),
  )
  written = ", ".join([*[PICTURE] * draws, RECORD])
  print(f"\n{written}: done in {time.monotonic() - started:.0f} s.\n{NOT_SHOWN}")
  print("To go on:", *(f"  {what:18}{how}" for what, how in to_go_on), sep="\n")


if __name__ == "__main__":
  run(main, FLAGS)
