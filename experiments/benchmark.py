"""Time and memory of SPARSEK attention against length, forward and forward + backward, thresholds and compaction included.

  python -m experiments.benchmark --n=4096,16384 --k=128 --window=128 --heads=2 --kv_heads=1 --head_dim=64

Every length is timed in turn, round after round, and medians are shown; the last columns are the ratios to the row before.
"""

import json
import os
import platform
import statistics
import sys
import time

from absl import flags as absl_flags
import jax
import jax.numpy as jnp

import sparsek
from sparsek import config, flags
from sparsek.errors import UsageError
from sparsek.kernels import specs

LENGTHS = absl_flags.DEFINE_list("n", ["4096", "16384"], "Sequence lengths.")
K = absl_flags.DEFINE_integer("k", 128, "Selected keys per query.", lower_bound=1)
WINDOW = absl_flags.DEFINE_integer("window", 128, "Most recent tokens per query.", lower_bound=0)
HEADS = absl_flags.DEFINE_integer("heads", 2, "Query heads.", lower_bound=1)
KV_HEADS = absl_flags.DEFINE_integer("kv_heads", 1, "Key/value heads.", lower_bound=1)
HEAD_DIM = absl_flags.DEFINE_integer("head_dim", 64, "Width of a head.", lower_bound=1)
DTYPE = absl_flags.DEFINE_enum("dtype", "float32", config.DTYPES, "Of query, key and value.")
GATE = absl_flags.DEFINE_enum("gate", "straight_through", config.GATES, "How the mask enters.")
SCORES = absl_flags.DEFINE_enum("scores", "normal", specs.SCORE_FAMILIES, "Family of the scores; rising: every token enters the selection.")
IMPLEMENTATION = absl_flags.DEFINE_enum("implementation", None, config.IMPLEMENTATIONS, "Default: the fastest that can run.")
ROUNDS = absl_flags.DEFINE_integer("rounds", 5, "Timed rounds after one that is not.", lower_bound=1)
RECORD = absl_flags.DEFINE_string("record", None, "Also write the figures, versions and device to this JSON file.")


def problem(n):
  """(compiled functions by name, inputs) for one length."""
  spec = specs.Spec("benchmark", n=n, heads=HEADS.value, groups=KV_HEADS.value, head_dim=HEAD_DIM.value, dtype=DTYPE.value, scores=SCORES.value)
  inputs = specs.make_inputs(spec)

  def attend(*inputs):
    return sparsek.sparsek_attention(*inputs, k=K.value, window=WINDOW.value, gate=GATE.value, implementation=IMPLEMENTATION.value)

  def loss(*inputs):
    return jnp.sum(attend(*inputs).astype(jnp.float32) ** 2)

  functions = {"forward": attend, "forward+backward": jax.grad(loss, argnums=(0, 1, 2, 3))}
  return {name: jax.jit(f).lower(*inputs).compile() for name, f in functions.items()}, inputs


def measure(lengths):
  """[{n, name: {ms, mib}}]: median milliseconds and compiled temporary memory."""
  problems = [problem(n) for n in lengths]
  times = {(n, name): [] for n, (functions, _) in zip(lengths, problems) for name in functions}
  for turn in range(ROUNDS.value + 1):
    for n, (functions, inputs) in zip(lengths, problems):
      for name, f in functions.items():
        begin = time.perf_counter()
        jax.block_until_ready(f(*inputs))
        if turn:
          times[n, name].append(time.perf_counter() - begin)
  memory = lambda f: f.memory_analysis().temp_size_in_bytes / 2 ** 20
  return [{"n": n, **{name: {"ms": 1e3 * statistics.median(times[n, name]), "mib": memory(f)} for name, f in functions.items()}}
          for n, (functions, _) in zip(lengths, problems)]


def main() -> None:
  """Measures, prints the table, writes the record."""
  if not all(n.isdecimal() and int(n) for n in LENGTHS.value):
    raise UsageError(f"--n={','.join(LENGTHS.value)} must be a list of lengths of at least 1, such as 4096,16384")
  if HEADS.value % KV_HEADS.value:
    raise UsageError(f"--heads={HEADS.value} must be a multiple of --kv_heads={KV_HEADS.value}")
  if RECORD.value and not os.path.isdir(os.path.dirname(RECORD.value) or "."):
    raise UsageError(f"--record={RECORD.value}: its folder does not exist")
  rows = measure([int(n) for n in LENGTHS.value])
  print(f"{'n':>8} {'what':>17} {'ms':>10} {'MiB':>9} {'x time':>7} {'x memory':>9}")
  for before, row in zip([None, *rows], rows):
    for name in ("forward", "forward+backward"):
      ratio = [f"{row[name][unit] / before[name][unit]:.2f}" if before else "" for unit in ("ms", "mib")]
      print(f"{row['n']:>8} {name:>17} {row[name]['ms']:>10.1f} {row[name]['mib']:>9.1f} {ratio[0]:>7} {ratio[1]:>9}")
  if RECORD.value:
    device = jax.devices()[0]
    record = {"rows": rows, "flags": {f.name: f.value for f in absl_flags.FLAGS.get_key_flags_for_module(sys.modules[main.__module__])},
              "versions": {"python": platform.python_version(), "jax": jax.__version__, "sparsek": sparsek.__version__}, "device": device.device_kind}
    with open(RECORD.value, "w", encoding="utf-8") as file:
      json.dump(record, file, indent=1)


if __name__ == "__main__":
  flags.run(main)
