"""The flags of experiments.benchmark."""

from absl import flags as absl_flags

from sparsek import config as config_lib
from sparsek.command_line.definer import Definer
from sparsek.command_line.flags import check_runs, define_attention_flags
from sparsek.errors import UsageError
from sparsek.kernels.score_families import SCORE_FAMILIES

BASELINES = (
  "What to time, separated by commas. In the suites of attention: sparsek, sliding_window, dense, "
  "xla, thresholds. In the train suite: sparsek, sliding_window, full; where PyTorch is installed "
  "pytorch_window, a plain model with FlexAttention and a window of k + window; and Hugging Face's "
  "Llama as transformers (compiled as a whole) and transformers_layers (layer by layer). In the "
  "decode suite: sparsek, full, transformers. By default all; xla only beside another "
  "implementation."
)


def define_flags(flag_values: absl_flags.FlagValues) -> None:
  """Defines the flags of the benchmark."""
  define_attention_flags(flag_values)
  define = Definer(flag_values)
  define.choice(
    "suite",
    "attention",
    ("attention", "headline", "train", "decode"),
    "What is timed. attention: the shape that the flags describe. headline: the shapes behind the "
    "published figures; flags that are given replace theirs. train: whole training steps of a "
    "model. decode: tokens after contexts of --lengths, and prompts.",
  )
  _define_problems(define)
  define.string("baselines", None, BASELINES)
  _define_model(define)
  _define_limits(define)
  _define_record(define)


def _define_problems(define: Definer) -> None:
  define.string(
    "lengths",
    "4096,16384",
    "Sequence lengths, separated by commas. In the decode suite lengths of contexts, by default "
    "1024,8192,65536,524288,1048576.",
  )
  define.string(
    "batch_sizes", "1,8,64", "Decode suite: numbers of texts at a time, separated by commas."
  )
  define.string(
    "prompts",
    "8192,131072",
    "Decode suite: lengths of prompts, separated by commas. Empty for none.",
  )
  define.integer("heads", 2, "Query heads; a multiple of --kv_heads.", lower=1)
  define.integer("kv_heads", 1, "Key/value heads.", lower=1)
  define.integer("head_dim", 64, "Width of a head.", lower=1)
  define.string(
    "scores",
    "normal",
    "Families of the scores, separated by commas. A family is one of "
    f"{', '.join(SCORE_FAMILIES)}. With rising scores every token enters the selection, with "
    "falling ones none.",
  )


def _define_model(define: Definer) -> None:
  define.choice(
    "preset",
    None,
    list(config_lib.PRESETS),
    "Model of the train and decode suites. By default gpt2_small in the train suite, 1b in the "
    "decode suite.",
  )
  define.path(
    "workdir", None, "Decode suite: the model of this run, with random weights, not a preset."
  )
  define.integer("vocab_size", 32768, "Vocabulary of the model.", lower=1)
  define.real(
    "scorer_init_slope",
    None,
    "Initial growth of the model's scores per 1024 tokens of position. With 1 more tokens enter "
    "the selection than with 0. By default 0.",
  )
  define.real(
    "scorer_loss",
    config_lib.TrainConfig.scorer_loss,
    "Train suite: weight of the scorers' loss. It is that of experiments.pretrain.",
    lower=0,
  )
  define.choice(
    "scorer_loss_kind",
    None,
    config_lib.SCORER_LOSSES,
    "Train suite: which of them. By default that of experiments.pretrain.",
  )
  define.choice(
    "remat",
    None,
    config_lib.REMAT_POLICIES,
    "What the backward pass of the model recomputes. By default none.",
  )
  define.integer("batch_size", None, "Rows per training step. By default 1.", lower=1)
  define.integer("documents", 1, "Documents per row, each half as long as the one before.", lower=1)
  define.integer(
    "loss_chunk",
    config_lib.TrainConfig.loss_chunk,
    "Tokens whose logits exist at the same time in training.",
    lower=1,
  )


def _define_limits(define: Definer) -> None:
  define.integer(
    "max_dense",
    None,
    "Longest length for dense. By default any length with cuDNN, else 4096.",
    lower=0,
  )
  define.integer("max_xla", 32768, "Longest length for xla.", lower=0)
  define.integer("max_transformers", 32768, "Longest length for PyTorch's models.", lower=0)
  define.integer(
    "rounds", 10, "Most rounds to run; each times everything once. Medians are shown.", lower=1
  )
  define.real(
    "seconds", 150.0, "Time limit of all rounds; none begins that would end later.", lower=0
  )
  define.integer(
    "errors_at",
    None,
    "Length at which to compare with the float32 reference; 0 for none. The reference is "
    "quadratic. By default 4096 in the headline suite, else 0.",
    lower=0,
  )


def _define_record(define: Definer) -> None:
  define.path(
    "record",
    None,
    "Also write a record to this .json file, and a picture beside it. The record holds flags, "
    "figures, versions and device.",
  )
  define.boolean(
    "extend",
    False,
    "Train and decode suites: keep rows of --record. Rows of another length, number of documents, "
    "remat or batch size stay, if they are of this commit and device.",
  )
  define.path("show", None, "Time nothing; print this record and draw its picture again.")


FLAGS = absl_flags.FlagValues()
define_flags(FLAGS)


def check_workdir() -> None:
  """Raises UsageError where --workdir names no folder, or goes with flags that it excludes."""
  folder = FLAGS.workdir
  if not folder:
    return
  if FLAGS.suite != "decode":
    raise UsageError(f"--workdir={folder} needs --suite=decode, got --suite={FLAGS.suite}")
  for name in ("preset", "vocab_size"):
    if FLAGS[name].present:
      raise UsageError(f"--workdir={folder} and --{name}={FLAGS[name].value} exclude each other")
  check_runs([folder])
