"""What the flags of experiments.benchmark ask to measure."""

from absl import flags as absl_flags

from sparsek import flags, measure, measure_decode, measure_train
from sparsek.config import preset
from sparsek.errors import UsageError
from sparsek.kernels.cudnn import on_nvidia_gpu
from sparsek.kernels.specs import SCORE_FAMILIES

FLAGS = absl_flags.FlagValues()  # apart from those of pretraining, whose defaults are others
flags.define_benchmark_flags(FLAGS)
FIELDS = ("heads", "kv_heads", "head_dim", "k", "window", "gate", "dtype")     # of measure.Problem, named like their flags
MODEL_FIELDS = ("k", "window", "gate", "dtype", "implementation", "remat", "scorer_init_slope")      # of the trained or generating model
K = WINDOW = 128                 # where --suite=attention is not told
CONTEXTS = (1024, 8192, 65536, 524288, 1048576)


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


def lengths(name="lengths", most=26):
  """Numbers of the flag of that name, rising."""
  given = flag(name).split(",")
  if not all(n.isdecimal() and 1 <= int(n) <= 2 ** most for n in given):
    raise UsageError(f"--{name}={flag(name)}: must be numbers from 1 to 2^{most} separated by commas, such as {FLAGS[name].default}")
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


def model(default):
  """The model that the flags describe."""
  overrides = {name: flag(name) for name in MODEL_FIELDS if flag(name) is not None}
  return preset(flag("preset", default), vocab_size=flag("vocab_size"), **overrides)


def decode_jobs():
  """What the flags ask to generate."""
  config, contexts = model("1b"), lengths() if FLAGS["lengths"].present else CONTEXTS
  found = [measure_decode.Job(config, n, batch) for batch in lengths("batch_sizes", 10) for n in contexts]
  return found + [measure_decode.Job(config, n, 1, "prefill") for n in (lengths("prompts") if flag("prompts") else ())]


def jobs():
  """What the flags ask to train."""
  config = model("gpt2_small")
  return [measure_train.Job(config, n, flag("batch_size", 1), flag("documents"), flag("loss_chunk"), flag("scorer_loss")) for n in lengths()]
