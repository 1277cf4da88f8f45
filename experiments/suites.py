"""What the flags of experiments.benchmark ask to measure."""

from absl import flags as absl_flags

from sparsek import flags, measure, measure_train
from sparsek.config import preset
from sparsek.errors import UsageError
from sparsek.kernels.cudnn import on_nvidia_gpu
from sparsek.kernels.specs import SCORE_FAMILIES

FLAGS = absl_flags.FlagValues()  # apart from those of pretraining, whose defaults are others
flags.define_benchmark_flags(FLAGS)
FIELDS = ("heads", "kv_heads", "head_dim", "k", "window", "gate", "dtype")     # of measure.Problem, named like their flags
K = WINDOW = 128                 # where --suite=attention is not told


def flag(name, default=None):
  """The value of a parsed flag, or `default` where it was not given."""
  value = FLAGS[name].value
  return default if value is None else value


def names(name, allowed):
  """The values of a flag that lists some of `allowed`."""
  values = tuple(dict.fromkeys(flag(name).split(",")))
  for value in values:
    if value not in allowed:
      raise UsageError(f"--{name}={flag(name)}: {value!r} must be one of {', '.join(allowed)}")
  return values


def lengths():
  """Those of the flag, rising."""
  given = flag("lengths").split(",")
  if not all(n.isdecimal() and 1 <= int(n) <= 2 ** 26 for n in given):
    raise UsageError(f"--lengths={flag('lengths')}: must be numbers from 1 to 2^26 separated by commas, such as 4096,16384")
  return sorted({int(n) for n in given})


def problems():
  """What the flags ask to time."""
  families = names("scores", SCORE_FAMILIES)
  if flag("suite") == "headline":
    given = {name: flag(name) for name in FIELDS if FLAGS[name].present}
    chosen = measure.headline(lengths() if FLAGS["lengths"].present else measure.HEADLINE_LENGTHS, **given)
    if FLAGS["scores"].present:
      chosen = [problem for problem in chosen if problem.scores in families]
  else:
    given = {"k": K, "window": WINDOW, "dtype": "bfloat16" if on_nvidia_gpu() else "float32"}
    given |= {name: flag(name) for name in FIELDS if flag(name) is not None}
    chosen = [measure.Problem(n, scores=scores, **given) for scores in families for n in lengths()]
  for problem in chosen:
    if problem.heads % problem.kv_heads:
      raise UsageError(f"--heads={problem.heads} must be a multiple of --kv_heads={problem.kv_heads}")
  rivals = names("rivals", measure.RIVALS) if flag("rivals") else None
  return measure.choose_rivals(chosen, rivals, flag("implementation"), max_dense=FLAGS["max_dense"].value, max_xla=flag("max_xla"))


def jobs():
  """What the flags ask to train."""
  overrides = {name: flag(name) for name in ("k", "window", "gate", "dtype", "implementation", "remat", "scorer_init_slope") if flag(name) is not None}
  config = preset(flag("preset", "gpt2_small"), vocab_size=flag("vocab_size"), **overrides)
  return [measure_train.Job(config, n, flag("batch_size", 1), flag("documents"), flag("loss_chunk")) for n in lengths()]
