"""The problems and jobs that the flags of experiments.benchmark ask for."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from absl import flags as absl_flags

from sparsek.command_line.main import parse
from sparsek.config import TransformerConfig, preset, whole_number
from sparsek.errors import UsageError
from sparsek.experiments.bench import attention as attention_bench
from sparsek.experiments.bench import decoding as decoding_bench
from sparsek.experiments.bench import training_step as training_step_bench
from sparsek.experiments.bench.flags import FLAGS, define_flags
from sparsek.kernels.devices import on_nvidia_gpu
from sparsek.kernels.score_families import SCORE_FAMILIES
from sparsek.runs import run_record
from sparsek.runs.settings import differences

# fields of attention_bench.Problem that flags of the same name set
FIELDS = ("heads", "kv_heads", "head_dim", "k", "window", "gate", "dtype")
# fields of the model that flags of the same name set
MODEL_FIELDS = (
  "k",
  "window",
  "gate",
  "dtype",
  "implementation",
  "remat",
  "scorer_init_slope",
  "scorer_loss_kind",
)
PRESET = {"train": "gpt2_small", "decode": "1b"}
K = WINDOW = 128  # defaults of --suite=attention
CONTEXTS = (1024, 8192, 65536, 524288, 1048576)


def flag(name: str, default: Any = None) -> Any:
  """Returns the value of a parsed flag, or `default` where it was not given."""
  value = FLAGS[name].value
  return default if value is None else value


def names(name: str, allowed: Sequence[str]) -> tuple[str, ...]:
  """Returns the values of a flag that lists some of `allowed`."""
  values = tuple(dict.fromkeys(flag(name).split(",")))
  for value in values:
    if value not in allowed:
      raise UsageError(f"--{name}={flag(name)}: {value!r} must be one of {', '.join(allowed)}")
  return values


def lengths(name: str = "lengths", most: int = 26) -> list[int]:
  """Returns the numbers of the flag of that name, in rising order."""
  given = [whole_number(text, 1) or 0 for text in flag(name).split(",")]
  if not all(1 <= n <= 2**most for n in given):
    raise UsageError(
      f"--{name}={flag(name)}: must be numbers from 1 to 2^{most} separated by commas, "
      f"such as {FLAGS[name].default}"
    )
  return sorted(set(given))


def problems() -> list[attention_bench.Problem]:
  """Returns the problems that the flags ask to time."""
  families = names("scores", SCORE_FAMILIES)
  if flag("suite") == "headline":
    given = {name: flag(name) for name in FIELDS if FLAGS[name].present}
    chosen = attention_bench.headline(
      lengths() if FLAGS["lengths"].present else attention_bench.HEADLINE_LENGTHS, **given
    )
    if FLAGS["scores"].present:
      chosen = [problem for problem in chosen if problem.scores in families]
  else:
    given = {"k": K, "window": WINDOW, "dtype": "bfloat16" if on_nvidia_gpu() else "float32"}
    given |= {name: flag(name) for name in FIELDS if flag(name) is not None}
    chosen = [
      attention_bench.Problem(n, scores=scores, **given) for scores in families for n in lengths()
    ]
  for problem in chosen:
    if problem.heads % problem.kv_heads:
      raise UsageError(
        f"--heads={problem.heads} must be a multiple of --kv_heads={problem.kv_heads}"
      )
  baselines = names("baselines", attention_bench.BASELINES) if flag("baselines") else None
  return attention_bench.choose_baselines(
    chosen,
    baselines,
    flag("implementation"),
    max_dense=FLAGS["max_dense"].value,
    max_xla=flag("max_xla"),
  )


def model(suite: str, flag_values: absl_flags.FlagValues = FLAGS) -> TransformerConfig:
  """Returns the model that the flags describe.

  Raises:
    UsageError: for a folder of --workdir that holds no run.
  """
  value: Callable[[str], Any] = lambda name: flag_values[name].value
  overrides = {name: value(name) for name in MODEL_FIELDS if value(name) is not None}
  if value("workdir"):
    config, _ = run_record.load_run_config(value("workdir"))
    return dataclasses.replace(config, **overrides)
  return preset(value("preset") or PRESET[suite], vocab_size=value("vocab_size"), **overrides)


def check_same_model(old: Mapping[str, Any], suite: str, varying: Sequence[str]) -> None:
  """Refuses to extend a record of another model.

  Args:
    old: the record that --extend names.
    suite: "train" or "decode".
    varying: fields that a row of the record holds, in which rows may differ.
  Raises:
    UsageError: naming the flags that differ.
  """
  values = absl_flags.FlagValues()
  define_flags(values)
  try:
    parse(["benchmark", *old.get("flags", [])], values)
  except UsageError as error:
    raise UsageError(f"--extend: the record is not of this version: {error}") from None
  there, here = (dataclasses.asdict(model(suite, at)) for at in (values, FLAGS))
  lines = [line for line in differences(there, here) if line.split(":")[0][2:] not in varying]
  if lines:
    raise UsageError(f"--extend: the record is of another model (old -> new): {', '.join(lines)}")


def decode_jobs() -> list[decoding_bench.Job]:
  """Returns the contexts and prompts that the flags ask to time."""
  config, contexts = model("decode"), lengths() if FLAGS["lengths"].present else CONTEXTS
  batches, prompts = lengths("batch_sizes", 10), lengths("prompts") if flag("prompts") else []
  return [decoding_bench.Job(config, n, batch) for batch in batches for n in contexts] + [
    decoding_bench.Job(config, n, 1, "prefill") for n in prompts
  ]


def jobs() -> list[training_step_bench.Job]:
  """Returns the training steps that the flags ask to time."""
  config = model("train")
  return [
    training_step_bench.Job(
      config, n, flag("batch_size", 1), flag("documents"), flag("loss_chunk"), flag("scorer_loss")
    )
    for n in lengths()
  ]
