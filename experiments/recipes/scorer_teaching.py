r"""Comparison of what scorers are taught, in a small task of recall; minutes to hours on a CPU.

  python -m experiments.recipes.scorer_teaching --record=experiments/results/scorer_teaching.json

A document is filler, tokens that are drawn from eight which it has of its own, so that attending to
earlier filler tells what follows. In its first half stand facts, one for each key: tokens that name
a key and its value. In the second half keys are asked, and the token after that is the value. A
quarter of the keys is asked often, the others once. Text wants filler and what is read often to be
kept, retrieval every fact.

Protocol. For each seed a dense model learns such documents, with all keys asked alike. Each variant
goes on from it with SPARSEK attention, and the same documents in the same order. A variant is a
change of the defaults: no loss of the scorers; targets of maximum attention, alone, times the norm
of the value, with a ranking loss; soft gates, and soft ones that become hard; a teacher, which is
the dense model. Measured are the loss, and right answers of keys that are asked often and once, in
documents that no run was trained on. No seed is left out. Intervals are 95 % t intervals over
seeds. Each variant minus the default is paired by seed, with p values corrected (Holm) for all
variants and measures. A variant may become the default if it answers more of what is asked once
(p < .05) and its loss is not higher (p < .05).

All this was set before it was run, but for two: max_soft and max_anneal, and the last three of
eight seeds, were added after the first five. Then "pinball", quantile regression at the cut, was
taken out: it found little more than the default, and less than the maximum alone in each seed that
had learned the task; the record keeps its runs.

The record is written after every run; the same command goes on with what is missing. On a GPU:
--length=2048 --keys=64 --k=64 --window=64 --layers=2 --width=256 --dense_steps=2000 --steps=1000
--seeds=5 --record=FILE. A small task does not choose a default. What decides are the kinds
sparsek_512_... of experiments/recipes/baselines.py, the same variants on text and its tasks:

  python -m experiments.recipes.baselines --seeds=1 --more=--seed=SEED --record=FILE \
    --only="^dense_s|(^|_)full(_s|$)|sparsek_512(_s|$|_(max|ranking|anneal|no_loss|value|key))"
"""

import argparse
import dataclasses
import functools
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import tqdm

from sparsek.command_line import outputs
from sparsek.config import DataConfig, OptimizerConfig, TrainConfig, TransformerConfig
from sparsek.errors import UsageError
from sparsek.evaluation.statistics import holm, p_words, paired_t
from sparsek.experiments import script
from sparsek.experiments.reports import records
from sparsek.experiments.reports.baselines_report import with_interval
from sparsek.model.transformer import Params, Transformer, init_params
from sparsek.parallel.mesh import make_mesh, put_batch
from sparsek.runs import run_directory
from sparsek.storage import files
from sparsek.training.optimizer import make_optimizer
from sparsek.training.step import TrainState, make_train_step

RECORD = outputs.record("record of scorer_teaching", "options", "runs", "versions", no_others=True)
DEFAULT = "default"
VARIANTS: dict[str, dict[str, Any]] = {  # fields of TransformerConfig and TrainConfig
  DEFAULT: {},
  "no_loss": {"scorer_loss": 0.0, "scorer_init_scale": 4.0},
  "max": {"scorer_target": "max"},
  "max_value": {"scorer_target": "max", "scorer_target_value_norm": True},
  "ranking": {"scorer_target": "max", "scorer_loss_kind": "ranking"},
  "soft": {"gate": "value"},
  "anneal": {"gate_anneal": 30.0},
  "max_soft": {"scorer_target": "max", "gate": "value"},
  "max_anneal": {"scorer_target": "max", "gate_anneal": 30.0},
  "distill": {"distill": 0.5, "distill_from": "dense"},
}
VALUES, FILLER, OWN = 4, 32, 8  # values of facts, tokens of filler, those of a document
OFTEN = 4  # how many times a key is asked that is asked often
TESTED = 16  # batches
Batch = dict[str, np.ndarray]


def vocabulary(keys: int) -> int:
  """Returns the number of tokens: filler, values, questions, facts."""
  return FILLER + VALUES + keys * (1 + VALUES)


def documents(
  rng: np.random.Generator, count: int, length: int, keys: int, alike: bool = False
) -> tuple[Batch, Any]:
  """Draws documents of `length` + 1 tokens; with `alike` no key is asked more often than others.

  Returns:
    The batch, and [count, length + 1] integers: 1 for answers to keys that are asked often, 2 for
    those of keys that are asked once, 0 for all other tokens.
  """
  tokens = np.zeros((count, length + 1), np.int32)
  kinds = np.zeros_like(tokens)
  often = keys // 4
  asked = np.concatenate([np.repeat(np.arange(often), OFTEN), np.arange(often, keys)])
  half = length // 2
  for row, kind in zip(tokens, kinds):
    row[:] = rng.choice(FILLER, OWN, replace=False)[rng.integers(OWN, size=length + 1)]
    value = rng.integers(VALUES, size=keys)
    facts = rng.choice(half, keys, replace=False)
    row[facts] = FILLER + VALUES + keys + np.arange(keys) * VALUES + value
    at = half + 2 * rng.choice((length - half) // 2, len(asked), replace=False)
    order = rng.integers(keys, size=len(asked)) if alike else rng.permutation(asked)
    row[at], row[at + 1] = FILLER + VALUES + order, FILLER + value[order]
    kind[at + 1] = np.where(order < often, 1, 2)
  return {"tokens": tokens, "segment_ids": np.ones_like(tokens)}, kinds


def model(options: argparse.Namespace, **fields: Any) -> TransformerConfig:
  """Returns the model of a variant, or with attention="full" the dense one."""
  return TransformerConfig(
    **{
      "vocab_size": vocabulary(options.keys),
      "num_layers": options.layers,
      "embed_dim": options.width,
      "num_heads": options.width // 32,
      "num_kv_heads": options.width // 32,
      "mlp_dim": 2 * options.width,
      "rope_fraction": 0.25,
      "k": options.k,
      "window": options.window,
      "scorer_loss_queries": max(1, options.length // 8),
      **fields,
    }
  )


def run_of(options: argparse.Namespace, num_steps: int, **fields: Any) -> TrainConfig:
  """Returns the training of a variant or of the dense model."""
  schedule = OptimizerConfig(
    num_steps=num_steps, learning_rate=options.learning_rate, warmup_steps=num_steps // 10
  )
  data = DataConfig(batch_size=options.batch_size, seq_len=options.length)
  return TrainConfig(workdir="", data=data, optimizer=schedule, **fields)


def trainer(
  options: argparse.Namespace,
  config: TransformerConfig,
  train: TrainConfig,
  dense: Any = None,
  alike: bool = False,
) -> Callable[[Params, int, Params | None], Params]:
  """Returns a function (parameters, seed, teacher's parameters) -> trained parameters.

  All seeds share its compiled step.
  """
  mesh, optimizer = make_mesh(devices=jax.devices()[:1]), make_optimizer(train.optimizer)
  step = make_train_step(config, train, optimizer, mesh, dense if train.distill else None)

  def trained(params, seed, teacher):
    params = jax.tree.map(jnp.copy, params)  # a step donates them
    state = TrainState(jnp.int32(0), params, optimizer.init(params), jnp.int32(seed))
    rng = np.random.default_rng([seed, train.optimizer.num_steps])
    for _ in tqdm.trange(train.optimizer.num_steps, leave=False, disable=None):
      batch, _ = documents(rng, options.batch_size, options.length, options.keys, alike)
      more = (teacher,) if train.distill else ()
      state, _ = step(state, put_batch(mesh, batch), *more)
    return state.params

  return trained


@functools.partial(jax.jit, static_argnums=0)
def _judged(config, params, tokens):
  """Returns the loss of each target, and whether it is the most probable token, both [B, n]."""
  logits = Transformer(config).apply({"params": params}, tokens[:, :-1])
  assert isinstance(logits, jax.Array)
  logarithms = jax.nn.log_softmax(logits)
  losses = -jnp.take_along_axis(logarithms, tokens[:, 1:, None], axis=-1)[..., 0]
  return losses, jnp.argmax(logits, axis=-1) == tokens[:, 1:]


def tested(options: argparse.Namespace, config: TransformerConfig, params: Params) -> dict:
  """Returns the loss and the shares of right answers, the same documents for every run."""
  rng = np.random.default_rng(2**32)
  made = [documents(rng, options.batch_size, options.length, options.keys) for _ in range(TESTED)]
  losses, right = map(np.stack, zip(*(_judged(config, params, x["tokens"]) for x, _ in made)))
  kinds = np.stack([kind[:, 1:] for _, kind in made])
  shares = {name: float(right[kinds == i].mean()) for i, name in ((1, "often"), (2, "once"))}
  return {"loss": float(np.mean(losses)), **shares}


def first_params(options: argparse.Namespace, config: TransformerConfig, seed: int) -> Params:
  """Draws parameters in which a fact looks like its key and its value, added: then a model learns
  to find all keys at once.
  """
  params = init_params(config, jax.random.key(seed))
  table = params["embed"]["embedding"]
  _, value, question, _ = jnp.split(table, np.cumsum([FILLER, VALUES, options.keys]))
  facts = (question[:, None] + value).reshape(-1, table.shape[1])
  return params | {"embed": {"embedding": jnp.concatenate([table[: -len(facts)], facts])}}


def with_scorers(config: TransformerConfig, dense: Params, seed: int) -> Params:
  """Returns the parameters of a dense model beside new scorers."""
  new = flax.traverse_util.flatten_dict(init_params(config, jax.random.key(seed)))
  return flax.traverse_util.unflatten_dict(new | flax.traverse_util.flatten_dict(dense))


def comparisons(runs: Mapping[str, Mapping[str, Mapping[str, float]]]) -> dict[tuple, tuple]:
  """Returns {(variant, measure): (difference from the default, its interval, corrected p)}."""
  base, pairs = runs.get(DEFAULT, {}), {}
  for name, by_seed in runs.items():
    seeds = sorted(set(base) & set(by_seed))
    for measure in by_seed[seeds[0]] if name != DEFAULT and len(seeds) > 1 else ():
      first, second = ([of[seed][measure] for seed in seeds] for of in (by_seed, base))
      pairs[name, measure] = paired_t(first, second)
  corrected = holm([pair.p_value for pair in pairs.values()])
  return {key: (*pair[:3], p) for (key, pair), p in zip(pairs.items(), corrected)}


def table(runs: Mapping[str, Mapping[str, Mapping[str, float]]]) -> str:
  """Returns a table in Markdown: figures of each variant, and below them minus the default's."""
  compared, measures = comparisons(runs), ("loss", "often", "once")
  lines = ["| taught | " + " | ".join(measures) + " |", "|" + "---|" * (1 + len(measures))]
  for name, by_seed in runs.items():
    cells = [with_interval([run[key] for run in by_seed.values()], ".3f") for key in measures]
    lines.append(f"| {name} | " + " | ".join(cells) + " |")
    words: Sequence[str] = [
      f"{difference:+.3f} ({low:+.3f} to {high:+.3f}), {p_words(p_value)}"
      for difference, low, high, p_value in (
        compared[name, key] for key in measures if (name, key) in compared
      )
    ]
    if words:
      lines.append("| minus the default | " + " | ".join(words) + " |")
  return "\n".join(lines)


def settings(options: argparse.Namespace) -> dict[str, Any]:
  """Returns the options that change figures."""
  return {name: value for name, value in vars(options).items() if name not in ("record", "seeds")}


def earlier(options: argparse.Namespace) -> dict[str, dict[str, dict[str, float]]]:
  """Returns the runs of the record so far.

  Raises:
    UsageError: where it was made with other options.
  """
  if not os.path.exists(options.record):
    return {}
  record = files.read_json_object(options.record)
  if record["options"] != settings(options):
    raise UsageError(
      f"--record={options.record} was made with {record['options']}, here are "
      f"{settings(options)}: name another file"
    )
  return record["runs"]


def check(options: argparse.Namespace) -> None:
  """Raises UsageError for sizes that do not go together."""
  asked = options.keys // 4 * OFTEN + options.keys - options.keys // 4
  least = 4 * asked
  if options.length < least or options.keys < 4:
    raise UsageError(
      f"--length={options.length} must be at least {least} for --keys={options.keys}, and --keys "
      "at least 4"
    )
  if options.width < 32 or options.width % 32:
    raise UsageError(f"--width={options.width} must be a multiple of 32")
  try:
    model(options)
    for steps in (options.dense_steps, options.steps):
      run_of(options, steps)
  except ValueError as error:
    raise UsageError(str(error)) from None


def main(options: argparse.Namespace) -> None:
  """Trains what the record lacks, and prints its table."""
  check(options)
  runs = earlier(options)  # also of variants that are no more
  for name in VARIANTS:
    runs.setdefault(name, {})
  fields = {field.name for field in dataclasses.fields(TransformerConfig)}
  dense = model(options, attention="full")
  learn = trainer(options, dense, run_of(options, options.dense_steps), alike=True)
  trainers: dict[str, Any] = {}
  for seed in map(str, range(options.seeds)):
    missing = [name for name in VARIANTS if seed not in runs[name]]
    if not missing:
      continue
    start = learn(first_params(options, dense, int(seed)), int(seed), None)
    print(f"dense, seed {seed}: {tested(options, dense, start)}", flush=True)
    for name in missing:
      changes = VARIANTS[name]
      config = model(options, **{key: x for key, x in changes.items() if key in fields})
      if name not in trainers:
        of_run = {key: x for key, x in changes.items() if key not in fields}
        trainers[name] = trainer(options, config, run_of(options, options.steps, **of_run), dense)
      params = trainers[name](with_scorers(config, start, int(seed)), int(seed), start)
      runs[name][seed] = tested(options, config, params)
      print(f"{name}, seed {seed}: {runs[name][seed]}", flush=True)
      record = {"options": settings(options), "runs": runs, "versions": run_directory.versions()}
      files.save(options.record, records.dumps(record, 3) + "\n")
  print(table(runs))


def make_parser() -> argparse.ArgumentParser:
  """Returns the parser of the recipe's options."""
  parser = script.parser(__doc__)
  for option, number, text in (
    ("length", 160, "tokens of a document"),
    ("keys", 8, "facts of a document"),
    ("k", 8, "selected keys"),
    ("window", 8, "latest tokens"),
    ("layers", 1, "of the model"),
    ("width", 64, "of the model, a multiple of 32"),
    ("batch_size", 16, "documents of a step"),
    ("dense_steps", 600, "steps of the dense model"),
    ("steps", 200, "steps of a variant"),
    ("seeds", 3, "runs of each variant"),
  ):
    parser.add_argument(f"--{option}", default=number, type=int, help=f"{text}; default: {number}")
  parser.add_argument(
    "--learning_rate", default=5e-3, type=float, help="of both; default: %(default)s"
  )
  parser.add_argument(
    "--record",
    default="scorer_teaching.json",
    type=script.Output(RECORD),
    help="file for the record",
  )
  return parser


if __name__ == "__main__":
  script.run(main, make_parser())
