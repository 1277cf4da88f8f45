# ruff: noqa: E402 (see sparsek.command_line.main)
"""Layers or heads of a dense model that need distant tokens, and a --layer_pattern for them.

  python -m experiments.layer_reach --workdir=runs/imported --data=data/long --seq_len=8192 \\
    --window=512 --budget=1024 --record=reach.json

Each layer in turn sees only the first --sinks and the latest tokens of a document, --window in all,
while the other layers see everything. The rise of the held-out loss shows how much this layer needs
distant tokens. The pattern has most keys in these layers, and --budget keys per query, the mean
over layers. With --by_heads each KV head of each layer in turn sees so little, and the pattern has
most keys in the heads that need them.
"""

import json
import os
import sys

from absl import flags as absl_flags

from sparsek.command_line import outputs
from sparsek.command_line.definer import Definer, into_string
from sparsek.command_line.flags import (
  define_data_of_runs_flag,
  define_step_flags,
  define_workdir_flag,
)
from sparsek.command_line.main import parse_first, run
from sparsek.command_line.own_modules import define_import_flag
from sparsek.command_line.training_flags import define_mesh_flags
from sparsek.config import DataConfig
from sparsek.errors import UsageError
from sparsek.storage import files

RECORD = outputs.record("record of experiments.layer_reach", "rises", "layer_pattern")


def define_flags(flag_values: absl_flags.FlagValues) -> None:
  """Defines the flags of this command."""
  define_workdir_flag(flag_values)
  define_step_flags(flag_values)
  define_data_of_runs_flag(flag_values)
  define_import_flag(flag_values)
  define = Definer(flag_values)
  define.integer("seq_len", 4096, "Tokens per row.", lower=2)
  define.integer("batch_size", 1, "Rows per batch, over all devices.", lower=1)
  define.integer("eval_batches", 8, "Evaluate on at most this many batches.", lower=1)
  define.integer(
    "window", 256, "Tokens that the layer under test sees. Also the window of the pattern.", lower=1
  )
  define.integer(
    "sinks",
    4,
    "How many of these are the first tokens of the document. Without them pretrained models fail.",
    lower=0,
  )
  define.boolean(
    "by_heads",
    False,
    "Test each KV head by itself. Takes as many times longer as a layer has them.",
  )
  define.integer(
    "k",
    16,
    "Selected keys in layers, or heads, that need no distant tokens. 0: they see the window alone.",
    lower=0,
  )
  define.integer(
    "budget", 512, "Keys per query in the pattern, the mean over layers and heads.", lower=2
  )
  define.integer(
    "long_layers",
    None,
    "Layers of the pattern that get most of the keys. By default a sixth of all.",
    lower=1,
  )
  define.integer(
    "long_heads",
    None,
    "KV heads of the pattern that get most of the keys. By default a sixth of all layers' heads.",
    lower=1,
  )
  define_mesh_flags(flag_values)
  define.path(
    "record", None, "Also write a record to this .json file. It holds flags, figures and versions."
  )


FLAGS = absl_flags.FlagValues()
define_flags(FLAGS)


def check_flags() -> None:
  """Raises UsageError unless --workdir is a folder and --record can be written."""
  if not os.path.isdir(FLAGS.workdir or ""):
    raise UsageError(f"--workdir={FLAGS.workdir}: must be the folder of a run")
  if FLAGS.record:
    outputs.check_record("record", FLAGS.record, RECORD, has_picture=False)
  if FLAGS.sinks >= FLAGS.window:
    raise UsageError(f"--sinks={FLAGS.sinks} must be below --window={FLAGS.window}")
  for name, by_heads in (("long_layers", False), ("long_heads", True)):
    if FLAGS[name].value is not None and FLAGS.by_heads != by_heads:
      raise UsageError(
        f"--{name}={FLAGS[name].value} {'needs' if by_heads else 'does not go with'} --by_heads"
      )


if __name__ == "__main__":
  parse_first(FLAGS, __doc__, check_flags)

from tqdm import tqdm

from sparsek.data.batches import eval_batches
from sparsek.evaluation import layer_reach
from sparsek.evaluation.heldout import Run
from sparsek.parallel.mesh import make_mesh
from sparsek.runs import checkpoint, run_directory, run_record
from sparsek.training.checks import check_batch, check_context, check_length


def main() -> None:
  """Prints the table and the pattern."""
  check_flags()
  config, record = run_record.load_run_config(FLAGS.workdir)
  if set(config.layer_kinds) != {"full"}:
    raise UsageError(
      f"--workdir={FLAGS.workdir}: all layers must have full attention; it has "
      f"{','.join(config.attention)}"
    )
  heads = config.num_kv_heads if FLAGS.by_heads else 1
  tested = config.num_layers * heads
  long = min(FLAGS.long_layers or FLAGS.long_heads or max(1, tested // 6), tested)
  sizes = long, FLAGS.k, FLAGS.window, FLAGS.budget
  try:
    layer_reach.pattern([[0.0] * heads] * config.num_layers, *sizes)
  except ValueError as error:
    raise UsageError(f"--{error}") from None
  data = DataConfig(seq_len=FLAGS.seq_len, batch_size=FLAGS.batch_size)
  mesh = make_mesh(FLAGS.fsdp, FLAGS.context)
  check_batch(mesh, data.batch_size)
  check_length(config, data.seq_len)
  check_context(config, mesh, data.seq_len)
  dataset = Run(FLAGS.workdir, config, record).open_data(FLAGS.data)
  params, step = checkpoint.load_params(
    FLAGS.workdir, config, FLAGS.step, mesh, allow_older=FLAGS.allow_older_step
  )
  term = (
    f"attention_sinks:k{FLAGS.sinks}:w{FLAGS.window - FLAGS.sinks}"
    if FLAGS.sinks
    else f"sliding_window:w{FLAGS.window}"
  )
  changes = layer_reach.of_layers(config, term)
  if FLAGS.by_heads:
    changes = layer_reach.of_heads(config, term, data.seq_len)
  dense, short = layer_reach.losses(
    config,
    params,
    eval_batches(dataset, data, FLAGS.eval_batches),
    changes,
    progress=lambda batches: tqdm(batches, unit="batch", disable=None),
    mesh=mesh,
  )
  rises = [loss - dense for loss in short]
  by_layer = [rises[i : i + heads] for i in range(0, tested, heads)]
  pattern = layer_reach.pattern(by_layer, *sizes)
  alone = "KV head g of layer i" if FLAGS.by_heads else "layer i"
  print(f"loss {dense:.4f} nats a token; with {alone} alone on {term}:")
  for i, rise in enumerate(rises):
    place = f"{i // heads:4}" + f" {i % heads:3}" * FLAGS.by_heads
    print(f"{place} {rise:+.4f} {'#' * max(0, round(40 * rise / max(max(rises), 1e-9)))}")
  print(f"--layer_pattern={pattern}")
  if FLAGS.record:
    content = {
      "loss": dense,
      "rises": by_layer if FLAGS.by_heads else rises,
      "term": term,
      "layer_pattern": pattern,
      "step": step,
      "flags": into_string(FLAGS).splitlines(),
      "versions": run_directory.versions(),
    }
    files.save(FLAGS.record, json.dumps(content, indent=1))
    print(FLAGS.record, file=sys.stderr)


if __name__ == "__main__":
  run(main, FLAGS)
