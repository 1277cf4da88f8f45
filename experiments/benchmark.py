"""Time and memory of SPARSEK attention against length, forward and forward + backward, thresholds and compaction included.

  python -m experiments.benchmark --lengths=4096,16384 --k=128 --window=128 --heads=2 --kv_heads=1 --head_dim=64

Every length is timed in turn, round after round, and medians are shown; the last columns are the ratios to the row before.
"""

import json
import os
import platform
import statistics
import time

import jax
import jax.numpy as jnp

import sparsek
from sparsek import flags
from sparsek.errors import UsageError
from sparsek.kernels import specs

flags.define_benchmark_flags()
K, WINDOW = 128, 128             # where --k and --window are not given


def flag(name, default=None):
  """The value of a parsed flag, or `default` where it was not given."""
  value = flags.FLAGS[name].value
  return default if value is None else value


def problem(n):
  """(compiled functions by name, inputs) for one length."""
  inputs = specs.make_inputs(specs.Spec(
      "benchmark", n=n, heads=flag("heads"), groups=flag("kv_heads"), head_dim=flag("head_dim"), dtype=flag("dtype", "float32"), scores=flag("scores")))

  def attend(*inputs):
    return sparsek.sparsek_attention(*inputs, k=flag("k", K), window=flag("window", WINDOW), gate=flag("gate", "straight_through"),
                                     implementation=flag("implementation"))

  def loss(*inputs):
    return jnp.sum(attend(*inputs).astype(jnp.float32) ** 2)

  functions = {"forward": attend, "forward+backward": jax.grad(loss, argnums=(0, 1, 2, 3))}
  return {name: jax.jit(f).lower(*inputs).compile() for name, f in functions.items()}, inputs


def measure(lengths):
  """[{n, name: {ms, mib}}]: median milliseconds and compiled temporary memory."""
  problems = [problem(n) for n in lengths]
  times = {(n, name): [] for n, (functions, _) in zip(lengths, problems) for name in functions}
  for turn in range(flag("rounds") + 1):
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
  lengths = flag("lengths").split(",")
  if not all(n.isdecimal() and int(n) for n in lengths):
    raise UsageError(f"--lengths={flag('lengths')}: must be numbers of at least 1 separated by commas, such as 4096,16384")
  if flag("heads") % flag("kv_heads"):
    raise UsageError(f"--heads={flag('heads')} must be a multiple of --kv_heads={flag('kv_heads')}")
  if flag("record") and not os.path.isdir(os.path.dirname(flag("record")) or "."):
    raise UsageError(f"--record={flag('record')}: its folder does not exist")
  rows = measure([int(n) for n in lengths])
  print(f"{'n':>8} {'what':>17} {'ms':>10} {'MiB':>9} {'x time':>7} {'x memory':>9}")
  for before, row in zip([None, *rows], rows):
    for name in ("forward", "forward+backward"):
      ratio = [f"{row[name][unit] / before[name][unit]:.2f}" if before else "" for unit in ("ms", "mib")]
      print(f"{row['n']:>8} {name:>17} {row[name]['ms']:>10.1f} {row[name]['mib']:>9.1f} {ratio[0]:>7} {ratio[1]:>9}")
  if flag("record"):
    record = {"rows": rows, "flags": flags.into_string().split(), "device": jax.devices()[0].device_kind,
              "versions": {"python": platform.python_version(), "jax": jax.__version__, "sparsek": sparsek.__version__}}
    with open(flag("record"), "w", encoding="utf-8") as file:
      json.dump(record, file, indent=1)


if __name__ == "__main__":
  flags.run(main)
