"""Which layers of a dense model need what stands far back, and a --layer_pattern that gives these
layers most of the keys.

  python -m experiments.layer_reach --workdir=runs/imported --data=data/long --seq_len=8192
  --window=512 --budget=1024 --record=reach.json

Each layer in turn sees the first --sinks and the latest tokens only, --window together, all others
everything; what the loss of held-out rows rises by is what distance is worth to it. The pattern has
--budget keys a query in the mean over layers.
"""

import json
import os
import sys

from absl import flags as absl_flags
from tqdm import tqdm

from sparsek.command_line import flags
from sparsek.config import DataConfig
from sparsek.data.batches import eval_batches, open_data
from sparsek.errors import UsageError
from sparsek.evaluation import layer_reach
from sparsek.parallel.mesh import make_mesh
from sparsek.runs import checkpoint, run_directory, run_record
from sparsek.storage import files
from sparsek.training.checks import check_batch, check_length

FLAGS = absl_flags.FlagValues()
flags.define_reach_flags(FLAGS)


def main() -> None:
  """Prints the table and the pattern."""
  if not os.path.isdir(FLAGS.workdir or ""):
    raise UsageError(f"--workdir={FLAGS.workdir}: must be the folder of a run")
  if FLAGS.record and not (
    FLAGS.record.endswith(".json") and os.path.isdir(os.path.dirname(FLAGS.record) or ".")
  ):
    raise UsageError(f"--record={FLAGS.record}: must be a .json file in a folder that exists")
  if FLAGS.record:
    files.check_writable(FLAGS.record)
  config, run = run_record.load_run_config(FLAGS.workdir)
  if set(config.layer_kinds) != {"full"}:
    raise UsageError(
      f"--workdir={FLAGS.workdir}: all layers must have full attention; it has "
      f"{','.join(config.attention)}"
    )
  if FLAGS.sinks >= FLAGS.window:
    raise UsageError(f"--sinks={FLAGS.sinks} must be below --window={FLAGS.window}")
  long_layers = min(FLAGS.long_layers or max(1, config.num_layers // 6), config.num_layers)
  try:
    layer_reach.pattern([0.0] * config.num_layers, long_layers, FLAGS.k, FLAGS.window, FLAGS.budget)
  except ValueError as error:
    raise UsageError(f"--{error}") from None
  data = DataConfig(seq_len=FLAGS.seq_len, batch_size=FLAGS.batch_size)
  check_batch(make_mesh(), data.batch_size)
  check_length(config, data.seq_len)
  name = run["tokenizer"]["name"]
  source = name if name == "byte" else os.path.join(FLAGS.workdir, "tokenizer")
  dataset = open_data(FLAGS.data or run["data"]["data"], source, run["tokenizer"]["fingerprint"])
  params, step = checkpoint.load_params(
    FLAGS.workdir, config, FLAGS.step, allow_older=FLAGS.allow_older_step
  )
  term = (
    f"attention_sinks:k{FLAGS.sinks}:w{FLAGS.window - FLAGS.sinks}"
    if FLAGS.sinks
    else f"sliding_window:w{FLAGS.window}"
  )
  dense, short = layer_reach.losses(
    config,
    params,
    eval_batches(dataset, data, FLAGS.eval_batches),
    term,
    progress=lambda batches: tqdm(batches, unit="batch", disable=None),
  )
  rises = [loss - dense for loss in short]
  pattern = layer_reach.pattern(rises, long_layers, FLAGS.k, FLAGS.window, FLAGS.budget)
  print(f"loss {dense:.4f} nats a token; with layer i alone on {term}:")
  for i, rise in enumerate(rises):
    print(f"{i:4} {rise:+.4f} {'#' * max(0, round(40 * rise / max(max(rises), 1e-9)))}")
  print(f"--layer_pattern={pattern}")
  if FLAGS.record:
    record = {
      "loss": dense,
      "rises": rises,
      "term": term,
      "layer_pattern": pattern,
      "step": step,
      "flags": flags.into_string(FLAGS).splitlines(),
      "versions": run_directory.versions(),
    }
    files.save(FLAGS.record, json.dumps(record, indent=1))
    print(FLAGS.record, file=sys.stderr)


if __name__ == "__main__":
  flags.run(main, FLAGS)
