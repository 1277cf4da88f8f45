"""Every command-line flag, defined once, and the functions that turn parsed flags into the frozen
dataclasses of `sparsek.config`.

A script picks its groups of flags and runs its main under `run`:

  flags.define_model_flags()
  flags.define_train_flags()

  def main():
    config = flags.model_config()

  if __name__ == "__main__":
    flags.run(main)

Model flags default to None, which means the preset's value (or, in a script that loads a run, the
value the run was trained with).
"""

import dataclasses
import math
import signal
import sys
from collections.abc import Callable, Sequence

from absl import flags

from sparsek import config as config_lib
from sparsek.command_line import flagfiles, path_flags, terminal
from sparsek.errors import RunError, UsageError
from sparsek.kernels.specs import SCORE_FAMILIES
from sparsek.storage import files

FLAGS = flags.FLAGS
MAX_INT = 2**31 - 1
OUR_FLAGS: list[str] = []  # names in the order of definition, for flags.txt and --help


class _Number(flags.ArgumentParser):
  """Parses a number and says what is allowed; unlike absl's own parsers it refuses nan and inf and
  names the bounds in words.
  """

  def __init__(self, kind: type, lower=None, upper=None, upper_is_open: bool = False):
    self.kind, self.lower, self.upper, self.upper_is_open = kind, lower, upper, upper_is_open
    self.syntactic_help = f"{'an integer' if kind is int else 'a number'}{self._bounds()}"

  def _bounds(self) -> str:
    above = "" if self.lower is None else f" of at least {self.lower}"
    if self.upper is None or self.upper == MAX_INT:
      return above
    return (
      f"{above}{' and' if above else ''} "
      f"{'below' if self.upper_is_open else 'at most'} {self.upper}"
    )

  def parse(self, argument):
    try:
      value = self.kind(argument)
    except (TypeError, ValueError, OverflowError):
      raise ValueError(f"must be {self.syntactic_help}") from None
    if self.upper == MAX_INT and value > MAX_INT:
      raise ValueError(f"must be at most {MAX_INT}")
    too_large = self.upper is not None and (
      value > self.upper or (self.upper_is_open and value == self.upper)
    )
    if not math.isfinite(value) or (self.lower is not None and value < self.lower) or too_large:
      raise ValueError(f"must be {self.syntactic_help}")
    return value

  def flag_type(self) -> str:
    return self.kind.__name__


class _Boolean(flags.BooleanParser):
  def parse(self, argument):
    try:
      return super().parse(argument)
    except (TypeError, ValueError):
      raise ValueError("must be true or false") from None


class _Definer:
  """Defines flags on `flag_values`, each at most once, so that groups may overlap and several
  scripts live in one process.
  """

  def __init__(self, flag_values: flags.FlagValues):
    self.flag_values = flag_values

  def _define(self, name: str, define: Callable, *args, **kwargs) -> None:
    if name not in OUR_FLAGS:
      OUR_FLAGS.append(name)
    if name not in self.flag_values:
      define(*args, flag_values=self.flag_values, **kwargs)

  def number(
    self,
    name: str,
    default,
    help_text: str,
    *,
    lower=None,
    upper=None,
    upper_is_open: bool = False,
    kind: type = int,
  ) -> None:
    upper = MAX_INT if kind is int and upper is None else upper
    parser = _Number(kind, lower, upper, upper_is_open)
    self._define(
      name, flags.DEFINE, parser, name, default, help_text, serializer=flags.ArgumentSerializer()
    )

  def string(self, name: str, default: str | None, help_text: str) -> None:
    self._define(name, flags.DEFINE_string, name, default, help_text)

  def path(self, name: str, default: str | None, help_text: str, **options) -> None:
    """Defines a flag that holds a path; `options` are those of `path_flags.parse_path`."""
    flag = path_flags.path_flag(name, default, help_text, **options)
    self._define(name, flags.DEFINE_flag, flag)

  def paths(self, name: str, help_text: str) -> None:
    """Defines a flag that holds a list of paths, empty by default."""
    self._define(name, flags.DEFINE_flag, path_flags.paths_flag(name, help_text))

  def strings(self, name: str, help_text: str) -> None:
    self._define(name, flags.DEFINE_multi_string, name, [], help_text)

  def choice(self, name: str, default: str | None, choices: Sequence[str], help_text: str) -> None:
    self._define(name, flags.DEFINE_enum, name, default, list(choices), help_text)

  def boolean(self, name: str, default: bool | None, help_text: str) -> None:
    flag = flags.BooleanFlag(name, default, help_text)
    flag.parser = _Boolean()
    self._define(name, flags.DEFINE_flag, flag)


def define_attention_flags(flag_values: flags.FlagValues = FLAGS) -> None:
  """The model flags that no parameter depends on: a trained model can be run under other values of
  them.
  """
  define = _Definer(flag_values)
  define.number(
    "k",
    None,
    "Selected key/value pairs per query in sparsek layers. Default: the preset's.",
    lower=1,
  )
  define.number(
    "window",
    None,
    "Most recent tokens each query sees, itself included. Default: the preset's.",
    lower=0,
  )
  define.choice(
    "gate",
    None,
    config_lib.GATES,
    "How the selection mask enters attention. Default: straight_through.",
  )
  define.choice(
    "implementation",
    None,
    config_lib.IMPLEMENTATIONS,
    "Of attention. Default: the fastest that can run.",
  )
  define.choice(
    "dtype",
    None,
    config_lib.DTYPES,
    "Of activations; parameters stay float32. Default: float32 for tiny, else bfloat16.",
  )


def define_model_flags(flag_values: flags.FlagValues = FLAGS) -> None:
  """All model flags: preset, architecture, scorer, and those of `define_attention_flags`."""
  define_attention_flags(flag_values)
  define = _Definer(flag_values)
  define.choice(
    "preset",
    "tiny",
    list(config_lib.PRESETS),
    "Model size; the flags below replace single values of it.",
  )
  define.choice(
    "attention",
    None,
    config_lib.ATTENTION_KINDS,
    "Of every layer. Default: sparsek. Not together with --layer_pattern.",
  )
  define.string(
    "layer_pattern",
    None,
    'Attention per layer, repeated over the layers: KIND or KIND*TIMES, ..., as "sparsek*5,full"; '
    "KIND:kK:wWINDOW is a layer with a k or a window of its own: "
    "sliding_window:w256*5,sparsek:k1536:w256.",
  )
  define.choice(
    "scorer", None, config_lib.SCORERS, "Scoring network; random is the control. Default: linear."
  )
  define.number(
    "scorer_lookahead",
    None,
    "Tokens after its own that a conv scorer may see; at most --window. Default: 4.",
    lower=0,
  )
  define.number(
    "scorer_lookback", None, "Tokens before its own that a conv scorer sees. Default: 3.", lower=0
  )
  define.boolean(
    "scorer_normalize",
    None,
    "Normalise scores causally over time before the learned scale. Default: true.",
  )
  define.number(
    "scorer_init_scale",
    None,
    "Initial standard deviation of the scores. Default: 1.",
    lower=0,
    kind=float,
  )
  define.number(
    "scorer_init_slope",
    None,
    "Initial growth of the scores per 1024 tokens of position. Default: 0.",
    kind=float,
  )
  define.boolean(
    "scorer_shared", None, "One score per token for all KV heads of a layer. Default: false."
  )
  define.number(
    "scorer_init_noise",
    None,
    "Initial amplitude of fixed noise in the scores, which is learned. Default: 0, none.",
    lower=0,
    kind=float,
  )
  define.number(
    "scorer_init_sink",
    None,
    "Initial extra score of a document's first token, which is learned. Default: 0, none.",
    kind=float,
  )
  define.number(
    "scorer_noise",
    None,
    "Standard deviation of normal noise on the scores, in training only. Default: 0.",
    lower=0,
    kind=float,
  )
  define.number(
    "scorer_loss_queries",
    None,
    "Queries per row that --scorer_loss looks at. Default: 128.",
    lower=1,
  )
  define.number("num_layers", None, "Number of blocks. Default: the preset's.", lower=1)
  define.number("embed_dim", None, "Width of the residual stream. Default: the preset's.", lower=1)
  define.number(
    "num_heads", None, "Query heads; a multiple of --num_kv_heads. Default: the preset's.", lower=1
  )
  define.number("num_kv_heads", None, "Key/value heads. Default: the preset's.", lower=1)
  define.number("head_dim", None, "Width of a head; even. Default: the preset's.", lower=2)
  define.number("mlp_dim", None, "Hidden width of the MLP. Default: the preset's.", lower=1)
  define.choice(
    "positions",
    None,
    config_lib.POSITIONS,
    "Rotary embedding, or a table that is added to the tokens. Default: rope.",
  )
  define.number(
    "max_positions", None, "Rows of the learned table: the longest row. Default: 2048.", lower=2
  )
  define.number(
    "rope_theta", None, "Base of the rotary embedding. Default: 10000.", lower=1, kind=float
  )
  define.number(
    "rope_fraction",
    None,
    "Share of the head dimension that is rotated; above 0. Default: 1.",
    lower=0,
    upper=1,
    kind=float,
  )
  define.string(
    "rope_scaling",
    None,
    (
      "Stretches the rotary embedding: linear:FACTOR or "
      "llama3:FACTOR:LOW:HIGH:ORIGINAL. Default: not."
    ),
  )
  define.choice("norm", None, config_lib.NORMS, "Of the residual stream. Default: rms_norm.")
  define.boolean(
    "qk_norm", None, "RMSNorm over the head dimension of queries and keys. Default: false."
  )
  define.choice("mlp", None, config_lib.MLPS, "Hidden layer of a block. Default: swiglu.")
  define.boolean(
    "use_bias", None, "Biases on the query, key and value projections. Default: false."
  )
  define.boolean("out_bias", None, "A bias on attention's output projection. Default: false.")
  define.boolean("mlp_bias", None, "Biases in the MLP. Default: false.")
  define.boolean(
    "parallel_residual", None, "Attention and MLP of a block read the same input. Default: false."
  )
  define.boolean("tie_embeddings", None, "The output matrix is the embedding. Default: true.")
  define.choice(
    "remat",
    None,
    config_lib.REMAT_POLICIES,
    "What the backward pass recomputes. dots: all but attention and products with "
    "weights; attention: all but attention. Default: none; to train, attention "
    "where memory would not suffice.",
  )
  define.boolean(
    "scan_layers",
    None,
    (
      "Scan over stacked layers, which compiles faster, runs slower. Default: true for "
      "tiny and mini where the pattern fits."
    ),
  )


def define_data_flags(flag_values: flags.FlagValues = FLAGS) -> None:
  """Where tokens come from and how they are cut into rows."""
  define, default = _Definer(flag_values), config_lib.DataConfig()
  define.path(
    "data",
    default.data,
    'Folder that experiments.prepare_data wrote, or "stdlib", the '
    "source of Python's standard library.",
    words=("stdlib",),
  )
  define.path(
    "tokenizer",
    None,
    '"byte", a tokenizer.json or its folder; must match the data. '
    "Default: the one the data was made with.",
    words=("byte",),
  )
  define.number("seq_len", default.seq_len, "Tokens per row.", lower=1)
  define.number(
    "batch_size",
    default.batch_size,
    "Rows per optimizer step, over all devices and accumulation steps.",
    lower=1,
  )
  define.boolean(
    "segment_documents",
    default.segment_documents,
    "Attention and loss restart at each document of a packed row.",
  )


def _define_step(define: _Definer) -> None:
  define.number("step", None, "Of the checkpoint. Default: the newest.", lower=0)
  define.boolean(
    "allow_older_step",
    False,
    "Where the newest checkpoint is damaged, take the newest good one. Default: stop.",
  )


def define_workdir_flag(flag_values: flags.FlagValues = FLAGS) -> None:
  """The folder of a run, which pretraining writes and evaluation and generation read."""
  _Definer(flag_values).path(
    "workdir", None, "Folder of a run: checkpoints, metrics.jsonl, flags.txt. Required."
  )


def define_evaluation_flags(flag_values: flags.FlagValues = FLAGS) -> None:
  """Which run to evaluate, under which attention, on which held-out rows; None means the run's own
  value.
  """
  define_attention_flags(flag_values)
  define, default = _Definer(flag_values), config_lib.TrainConfig(workdir="")
  define.paths("workdir", "Folder of a run, or several separated by commas. Required.")
  _define_step(define)
  define.path(
    "data",
    None,
    'Token files or "stdlib", made with the run\'s tokenizer. Default: what it was trained on.',
    words=("stdlib",),
  )
  define.number(
    "seq_len",
    None,
    "Tokens per row; may be more than in training. Default: as in training.",
    lower=1,
  )
  define.number("batch_size", None, "Rows per batch. Default: as in training.", lower=1)
  define.number("eval_batches", 32, "Most batches to evaluate on.", lower=1)
  define.number(
    "loss_chunk",
    default.loss_chunk,
    "Tokens whose logits exist at once in the cross-entropy, per device.",
    lower=1,
  )


def define_task_flags(flag_values: flags.FlagValues = FLAGS) -> None:
  """Which runs to ask, under which attention, which tasks of which lengths."""
  define_attention_flags(flag_values)
  define = _Definer(flag_values)
  define.paths("workdir", "Folder of a run, or several separated by commas. Required.")
  _define_step(define)
  define.string("tasks", "passkey,needle,recall,variables,copy", "Names, separated by commas.")
  define.string(
    "lengths",
    "1024,4096",
    "Tokens of a document, separated by commas; may be more than in training.",
  )
  define.number("examples", 100, "Documents per task and length.", lower=1)
  define.number(
    "min_distance",
    0,
    (
      "Tokens at least between the facts and the question. From layers x window on no "
      "sliding window reaches the facts."
    ),
    lower=0,
  )
  define.number(
    "batch_size", None, "Documents at a time, over all devices. Default: one per device.", lower=1
  )
  define.number("seed", 0, "Of the documents.", lower=0)
  define.path(
    "record",
    None,
    "Also write flags, figures and versions to this .json file, and a picture beside it.",
  )


def define_reach_flags(flag_values: flags.FlagValues = FLAGS) -> None:
  """Which dense run to look into, on which rows, and what its layers may see."""
  define_workdir_flag(flag_values)
  define = _Definer(flag_values)
  _define_step(define)
  define.path(
    "data",
    None,
    'Token files or "stdlib", made with the run\'s tokenizer. Default: what it was trained on.',
    words=("stdlib",),
  )
  define.number("seq_len", 4096, "Tokens per row.", lower=2)
  define.number("batch_size", 1, "Rows per batch, over all devices.", lower=1)
  define.number("eval_batches", 8, "Most batches to evaluate on.", lower=1)
  define.number(
    "window",
    256,
    "Tokens that a layer sees whose reach is cut, and the window of the pattern.",
    lower=1,
  )
  define.number(
    "sinks",
    4,
    "Of them the first ones of the document, without which pretrained models fail.",
    lower=0,
  )
  define.number("k", 16, "Selected keys in the pattern's layers that need no distance.", lower=1)
  define.number("budget", 512, "Keys a query in the pattern, the mean over layers.", lower=2)
  define.number(
    "long_layers",
    None,
    "Layers of the pattern with most of the keys. Default: a sixth of all.",
    lower=1,
  )
  define.path("record", None, "Also write flags, figures and versions to this .json file.")


def define_generation_flags(flag_values: flags.FlagValues = FLAGS) -> None:
  """Which run to generate from, under which attention, and how to draw tokens."""
  define_workdir_flag(flag_values)
  define_attention_flags(flag_values)
  define = _Definer(flag_values)
  _define_step(define)
  define.string("prompt", "", "Text to continue; empty: a new document.")
  define.path(
    "prompt_file",
    None,
    "File with a text to continue on every line; all are continued "
    "at the same time. Not together with --prompt.",
  )
  define.boolean(
    "special_tokens",
    False,
    "Names of special tokens in the prompt, such as <|im_start|>, are these tokens.",
  )
  define.number(
    "max_new_tokens", 200, "Most tokens to write; the end of the document stops earlier.", lower=0
  )
  define.number(
    "temperature",
    0.8,
    "Divides the logits; 0 always takes the most probable token.",
    lower=0,
    kind=float,
  )
  define.number(
    "top_p",
    0.95,
    "Draw from the fewest most probable tokens that have this probability together; above 0.",
    lower=0,
    upper=1,
    kind=float,
  )
  define.number("top_k", 0, "Draw from so many most probable tokens only; 0: from all.", lower=0)
  define.strings(
    "stop",
    (
      "Text that ends the text, itself left out, wherever tokens begin and end; "
      "may be given several times."
    ),
  )
  define.number(
    "sampling_seed",
    0,
    "The same seed gives the same text; line i of --prompt_file, from 0, draws with this seed + i.",
    lower=0,
  )
  define.path(
    "load_cache",
    None,
    "Go on with what --save_cache wrote, without reading its text "
    "again; --prompt, or a line a text, is what comes next.",
  )
  define.path(
    "save_cache", None, "Write what the model keeps of the text to this file, to go on later."
  )


def define_import_flags(flag_values: flags.FlagValues = FLAGS) -> None:
  """What to read or write in Hugging Face's format, and with attention of which kind it is read."""
  define_model_flags(flag_values)
  define = _Definer(flag_values)
  define.path("workdir", None, "Folder of a run: made by --from, read by --export. Required.")
  define.path("from", None, "Folder with config.json, safetensors and tokenizer.json to import.")
  define.path("export", None, "Folder to write config.json, safetensors and tokenizer.json to.")
  _define_step(define)


def define_benchmark_flags(flag_values: flags.FlagValues = FLAGS) -> None:
  """The attention problems to time."""
  define_attention_flags(flag_values)
  define = _Definer(flag_values)
  define.choice(
    "suite",
    "attention",
    ("attention", "headline", "train", "decode"),
    "attention: the shape that the flags describe. headline: those behind "
    "the published figures; flags that are given replace theirs. train: whole training steps "
    "of a model. decode: tokens after contexts of "
    "--lengths, and prompts.",
  )
  define.string(
    "lengths",
    "4096,16384",
    (
      "Sequence lengths, separated by commas; of the decode suite contexts, by default "
      "1024,8192,65536,524288,1048576."
    ),
  )
  define.string(
    "batch_sizes",
    "1,8,64",
    "Of the decode suite: texts that are written at the same time, separated by commas.",
  )
  define.string(
    "prompts",
    "8192,131072",
    "Of the decode suite: lengths of prompts to read, separated by commas; empty: none.",
  )
  define.number("heads", 2, "Query heads; a multiple of --kv_heads.", lower=1)
  define.number("kv_heads", 1, "Key/value heads.", lower=1)
  define.number("head_dim", 64, "Width of a head.", lower=1)
  define.string(
    "scores",
    "normal",
    f"Families of the scores, separated by commas: {', '.join(SCORE_FAMILIES)}. With "
    "rising ones every token enters the "
    "selection, with falling ones none.",
  )
  define.string(
    "rivals",
    None,
    "What to time, separated by commas: sparsek, sliding_window, dense, xla, "
    "thresholds; of the train suite sparsek, "
    "sliding_window, full, and Hugging Face's Llama where installed: transformers (compiled as "
    "a whole), transformers_layers (layer by "
    "layer); of the decode suite sparsek, full, transformers. Default: all; xla only "
    "beside another implementation.",
  )
  define.choice(
    "preset",
    None,
    list(config_lib.PRESETS),
    "Model of the train and decode suites. Default: gpt2_small; to decode, 1b.",
  )
  define.number("vocab_size", 32768, "Of the model.", lower=1)
  define.number(
    "scorer_init_slope",
    None,
    "Of the model, a new one: at 1 more tokens enter the selection than at 0. Default: 0.",
    kind=float,
  )
  define.number(
    "scorer_loss",
    config_lib.TrainConfig.scorer_loss,
    "Of training: as of experiments.pretrain.",
    lower=0,
    kind=float,
  )
  define.choice(
    "remat",
    None,
    config_lib.REMAT_POLICIES,
    "What the backward pass of the model recomputes. Default: none.",
  )
  define.number("batch_size", None, "Rows per training step. Default: 1.", lower=1)
  define.number("documents", 1, "Documents per row: half of it, a quarter, and so on.", lower=1)
  define.number(
    "loss_chunk",
    config_lib.TrainConfig.loss_chunk,
    "Tokens whose logits exist at once in training.",
    lower=1,
  )
  define.number(
    "max_dense", None, "Longest length for dense. Default: any with cuDNN, else 4096.", lower=0
  )
  define.number("max_xla", 32768, "Longest length for xla.", lower=0)
  define.number("max_transformers", 32768, "Longest length for transformers.", lower=0)
  define.number(
    "rounds", 10, "Most timed rounds over everything, of which medians are taken.", lower=1
  )
  define.number(
    "seconds",
    150.0,
    "No round is begun that would end later than this after the first began.",
    lower=0,
    kind=float,
  )
  define.number(
    "errors_at",
    None,
    "Length at which to compare with the float32 reference, which is quadratic; 0: do "
    "not. Default: 4096 in the headline, "
    "else 0.",
    lower=0,
  )
  define.path(
    "record",
    None,
    "Also write flags, figures, versions and device to this .json file, and a picture beside it.",
  )
  define.boolean(
    "extend",
    False,
    "Of the train and decode suites: keep the rows that --record has of other lengths, "
    "documents, remat or batch size, if of "
    "this commit and device.",
  )
  define.path("show", None, "Time nothing; print this record and draw its picture again.")


def define_ablation_flags(flag_values: flags.FlagValues = FLAGS) -> None:
  """A grid of pretraining runs."""
  define = _Definer(flag_values)
  define.path("workdir", None, "Folder for the runs of the grid and the report.")
  define.path("base", None, "Flagfile of experiments.pretrain that all runs share.")
  define.string(
    "more",
    None,
    'Further flags that all runs share, in one string: --more="--num_steps=500 --seq_len=2048".',
  )
  define.string(
    "attention",
    "sparsek,sliding_window",
    f"Kinds, separated by commas: {', '.join(config_lib.ATTENTION_KINDS)}; or "
    "patterns of layers, such as "
    "sparsek*5+full.",
  )
  define.string(
    "k", "64", "Selected keys per query, separated by commas; of the kinds that select."
  )
  define.string("window", "64", "Latest tokens every query sees, separated by commas.")
  define.string(
    "gate", "straight_through", f"Of sparsek, separated by commas: {', '.join(config_lib.GATES)}."
  )
  define.string(
    "scorer", "linear", f"Of sparsek, separated by commas: {', '.join(config_lib.SCORERS)}."
  )
  define.number("seeds", 1, "Runs of each combination, with --seed=0, 1, ...", lower=1)
  define.string(
    "job",
    "0/1",
    (
      "i/N: train only every N-th cell from the i-th on, i from 0, as one of N "
      "jobs that share --workdir."
    ),
  )
  define.boolean(
    "retrain",
    False,
    "Move cells that other flags made aside, to WORKDIR/cells/replaced, and train them again.",
  )


def define_train_flags(flag_values: flags.FlagValues = FLAGS) -> None:
  """The optimizer and the run."""
  define_workdir_flag(flag_values)
  define, run_default, default = (
    _Definer(flag_values),
    config_lib.TrainConfig(workdir=""),
    config_lib.OptimizerConfig(),
  )
  define.number(
    "num_steps",
    default.num_steps,
    "Optimizer steps of the whole run, and length of the learning-rate schedule.",
    lower=1,
  )
  define.number(
    "stop_at",
    None,
    "Stop at this step, before --num_steps; repeated with another --k, --window, --gate or "
    "--scorer_noise the command goes on "
    "under it, as to anneal them. Default: --num_steps.",
    lower=1,
  )
  define.number("learning_rate", default.learning_rate, "Peak learning rate.", lower=0, kind=float)
  define.number(
    "warmup_steps",
    None,
    "Steps of linear warm-up, at most --num_steps. Default: a tenth of them, at most 100.",
    lower=0,
  )
  define.number(
    "final_lr_ratio",
    default.final_lr_ratio,
    "Learning rate at the end over the peak.",
    lower=0,
    upper=1,
    kind=float,
  )
  define.number(
    "weight_decay",
    default.weight_decay,
    "Decoupled weight decay, on matrices only.",
    lower=0,
    kind=float,
  )
  define.number(
    "grad_clip",
    default.grad_clip,
    "Largest global gradient norm; 0 turns clipping off.",
    lower=0,
    kind=float,
  )
  define.number(
    "spike_factor",
    run_default.spike_factor,
    "A step whose loss or gradient norm is more than this many times its running mean, "
    "or not finite, is a spike, whose update is not applied; above 1. 0: no step is "
    "one.",
    lower=0,
    kind=float,
  )
  define.choice(
    "on_spike",
    run_default.on_spike,
    config_lib.ON_SPIKE,
    "skip: go on without its update, but end after 10 spikes in a row; metrics.jsonl "
    "counts them. stop: end the run.",
  )
  define.number(
    "b1",
    default.b1,
    "Decay of Adam's first moment.",
    lower=0,
    upper=1,
    upper_is_open=True,
    kind=float,
  )
  define.number(
    "b2",
    default.b2,
    "Decay of Adam's second moment.",
    lower=0,
    upper=1,
    upper_is_open=True,
    kind=float,
  )
  define.choice(
    "trainable",
    default.trainable,
    config_lib.TRAINABLE,
    "Which parameters change: all, those of attention with its scorers, or the scorers.",
  )
  define.number(
    "lora_rank",
    config_lib.TransformerConfig.lora_rank,
    "Rank R of adapters (LoRA) beside the matrices of attention and MLPs. They and scorers "
    "learn, as far as --trainable says; all else is frozen: matrices, biases, norms, "
    "embeddings. Needs --init_from, whose own adapters are merged "
    "before; so does whatever reads the run. 0: no adapters.",
    lower=0,
  )
  define.number(
    "lora_alpha",
    None,
    "The adapters' products count alpha / R times. Default: --lora_rank.",
    lower=0,
    kind=float,
  )
  define.number(
    "scorer_lr_multiplier",
    default.scorer_lr_multiplier,
    "Learning rate of the scoring networks over that of all else.",
    lower=0,
    kind=float,
  )
  define.number(
    "scorer_loss",
    run_default.scorer_loss,
    "Weight of the auxiliary loss that teaches scorers which tokens full attention reads; 0: "
    "they learn by the gates' gradient alone, as in the paper.",
    lower=0,
    kind=float,
  )
  define.boolean(
    "scorer_warmup",
    run_default.scorer_warmup,
    "Scorers learn from --scorer_loss alone, sparsek layers attend to everything, and no other "
    "gradient is computed: the first stage of a conversion. Needs --trainable=scorer.",
  )
  define.number(
    "distill",
    run_default.distill,
    (
      "Weight w of the teacher --distill_from: the objective is (1 - w) "
      "cross-entropy + w KL(teacher || model)."
    ),
    lower=0,
    upper=1,
    kind=float,
  )
  define.path(
    "distill_from",
    None,
    "The teacher of --distill, with its own attention: DIR, DIR@STEP or hf:DIR, as in --init_from.",
    reference=True,
  )
  define.number(
    "seed",
    run_default.seed,
    (
      "Of the initial parameters, the order of the data, the noise on the scores, "
      "the queries of --scorer_loss."
    ),
    lower=0,
  )
  define.number(
    "grad_accumulation",
    run_default.grad_accumulation,
    "Micro-batches per optimizer step; divides --batch_size.",
    lower=1,
  )
  define.number(
    "loss_chunk",
    run_default.loss_chunk,
    "Tokens whose logits exist at once in the cross-entropy, per device.",
    lower=1,
  )
  define.number(
    "log_every", run_default.log_every, "Steps between lines of metrics.jsonl.", lower=1
  )
  define.number(
    "eval_every",
    run_default.eval_every,
    "Steps between held-out evaluations; 0 turns them off.",
    lower=0,
  )
  define.number(
    "eval_batches", run_default.eval_batches, "Batches per held-out evaluation.", lower=1
  )
  define.number(
    "checkpoint_every", run_default.checkpoint_every, "Steps between checkpoints.", lower=1
  )
  define.number(
    "keep_checkpoints", run_default.keep_checkpoints, "Newest checkpoints kept.", lower=1
  )
  define.number(
    "restore_step",
    None,
    "Go on from the checkpoint of this step; later ones, and the "
    "metrics so far, are set aside in WORKDIR/set_aside. The same command again does "
    "not go back again, but on from the newest checkpoint. Default: the newest.",
    lower=0,
  )
  define.path(
    "init_from",
    None,
    "DIR or DIR@STEP: a new run takes its parameters (only) from that "
    "run's workdir, and without --preset its model flags; under another kind of "
    "attention it draws the scorers that run has not. hf:DIR: from a folder in Hugging "
    "Face's format, which replaces --preset; give the --attention that it shall have.",
    reference=True,
  )
  define.boolean(
    "tensorboard", run_default.tensorboard, "Also write TensorBoard events (needs tensorboardX)."
  )
  define.string(
    "profile_steps",
    None,
    "A:B: write a trace of steps A to B to WORKDIR/profile, for TensorBoard or ui.perfetto.dev.",
  )


def define_dry_run_flag(flag_values: flags.FlagValues = FLAGS) -> None:
  """Whether pretraining only says what it would take."""
  _Definer(flag_values).boolean(
    "dry_run",
    False,
    (
      "Only compile, and print parameters, operations and memory of a step; needs no "
      "--workdir, writes nothing."
    ),
  )


def parse(
  argv: Sequence[str],
  flag_values: flags.FlagValues = FLAGS,
  say: Callable[[str], object] | None = None,
) -> None:
  """Parses `argv` (program name first).

  Args:
    argv: the command line.
    flag_values: the flags that are defined.
    say: takes a line for each flag of a flagfile that gives way; prints on stderr by default.
  Raises:
    UsageError: for an unknown flag, a value out of range or an argument that is no flag; names the
      flag, the value and what is allowed.
  """
  try:
    rest = flag_values([argv[0], *flagfiles.expand(argv[1:], flag_values, say or _say)])
  except RecursionError:
    # absl looks for a flag of a similar name, letter by letter.
    raise UsageError("a flag is unknown, and its name is of hundreds of letters") from None
  except flags.Error as error:
    raise UsageError(
      " ".join(str(error).replace("flag --", "--", 1).removeprefix("ERROR:: ").split())
    ) from None
  if rest[1:]:
    raise UsageError(f"unexpected argument {rest[1]!r}: every option is written --name=value")


def _say(line: str) -> None:
  print(line, file=sys.stderr)


def run(
  main: Callable[[], object],
  flag_values: flags.FlagValues = FLAGS,
  argv: Sequence[str] | None = None,
) -> None:
  """Parses the command line, runs `main()` and exits.

  Exit code 0 when it returns; 2 and one sentence on stderr for a UsageError; 1 and one sentence
  for a RunError; 130 and one word for Ctrl-C. Anything else is a bug and keeps its traceback.

  Args:
    main: what the command does; its module's docstring describes it in --help.
    flag_values: where the flags are defined.
    argv: the command line, program name first. None for that of the process, which then also gets
      standard streams that may be closed, loses no Ctrl-C, and ends in time:
      `sparsek.command_line.terminal`.
  """
  whole_process, at_interrupt = argv is None, signal.getsignal(signal.SIGINT)
  code = 1
  files.let_stdout_take_any_text()
  if whole_process:
    terminal.make_lenient()
    terminal.keep_interrupts()
  try:
    if at_interrupt != signal.SIG_IGN:
      signal.signal(signal.SIGINT, signal.default_int_handler)
    code = _run(main, flag_values, sys.argv if whole_process else argv)
  except KeyboardInterrupt:
    code = 130
    print("interrupted", file=sys.stderr)
  finally:
    signal.signal(signal.SIGINT, at_interrupt)
    if whole_process:
      terminal.end_within(terminal.END_SECONDS, code)
  sys.exit(code)


def _run(main: Callable[[], object], flag_values: flags.FlagValues, argv: Sequence[str]) -> int:
  """Returns the exit code."""
  if any(argument in ("--help", "-help", "-h", "--helpfull") for argument in argv[1:]):
    description = (sys.modules[main.__module__].__doc__ or "").strip()
    print(f"{description}\n\n{flag_values.main_module_help()}\n{flag_values.module_help(__name__)}")
    return 0
  try:
    parse(argv, flag_values)
    main()
    sys.stdout.flush()
  except (UsageError, RunError) as error:
    print(f"error: {error}", file=sys.stderr)
    return 2 if isinstance(error, UsageError) else 1
  except NotImplementedError as error:  # so implementations of attention refuse
    print(f"error: {error}", file=sys.stderr)
    return 2
  return 0


def into_string(flag_values: flags.FlagValues = FLAGS) -> str:
  """Returns a flagfile that reproduces this command line, defaults spelled out, one flag a line.

  A preset that was not given is left out where the model is that of another run or folder: beside
  --preset it would not be.
  """
  names = [name for name in OUR_FLAGS if name in flag_values]
  if any(flag_values[name].value for name in ("init_from", "from") if name in names):
    names = [name for name in names if name != "preset" or flag_values[name].present]
  return "".join(line + "\n" for line in (flag_values[name].serialize() for name in names) if line)


def not_default(flag_values: flags.FlagValues) -> str:
  """Returns the flags that have another value than by default, without --workdir, one a line."""
  return "".join(
    flag_values[name].serialize() + "\n"
    for name in OUR_FLAGS
    if name in flag_values
    and name != "workdir"
    and flag_values[name].value != flag_values[name].default
  )


def _build(constructor: Callable, *args, **fields):
  """Calls a dataclass's constructor; what it refuses is the user's to correct."""
  try:
    return constructor(*args, **fields)
  except ValueError as error:
    raise UsageError(
      f"--{error}" if str(error).split("=")[0] in OUR_FLAGS else str(error)
    ) from None


def model_overrides(flag_values: flags.FlagValues = FLAGS) -> dict[str, object]:
  """The TransformerConfig fields given by flags; flags that were not given or not defined are left
  out.
  """
  names = [field.name for field in dataclasses.fields(config_lib.TransformerConfig)]
  given = {name: flag_values[name].value for name in names if name in flag_values}
  pattern = flag_values["layer_pattern"].value if "layer_pattern" in flag_values else None
  if pattern is not None:
    if given["attention"] is not None:
      raise UsageError(
        f"--attention={given['attention']} and --layer_pattern={pattern} exclude each "
        "other: give one of them"
      )
    given["attention"] = pattern
  return {name: value for name, value in given.items() if value is not None}


def model_config(
  flag_values: flags.FlagValues = FLAGS,
  vocab_size: int | None = None,
  pretrained: config_lib.TransformerConfig | None = None,
) -> config_lib.TransformerConfig:
  """The preset with the given flags applied.

  Args:
    flag_values: parsed flags that include those of `define_model_flags`.
    vocab_size: of the data's tokenizer; None leaves the preset's, which is enough to check the
      other flags before any data is read.
    pretrained: a model to take instead of the preset, its vocabulary included.

  Raises:
    UsageError: for values that do not go together.
  """
  if pretrained is not None:
    if flag_values["preset"].present:
      raise UsageError(
        f"--preset={flag_values['preset'].value} and a pretrained model's architecture "
        "exclude each other: leave it out"
      )
    return override_config(pretrained, flag_values)
  overrides = model_overrides(flag_values)
  return _build(
    config_lib.preset,
    flag_values["preset"].value,
    **overrides,
    **({} if vocab_size is None else {"vocab_size": vocab_size}),
  )


def override_config(
  config: config_lib.TransformerConfig, flag_values: flags.FlagValues = FLAGS
) -> config_lib.TransformerConfig:
  """A loaded run's configuration with the given flags applied; raises UsageError for values that do
  not go together.
  """
  return _build(dataclasses.replace, config, **model_overrides(flag_values))


def data_config(flag_values: flags.FlagValues = FLAGS) -> config_lib.DataConfig:
  """Raises UsageError for values that do not go together. The seed is --seed where that flag is
  defined.
  """
  names = ("data", "seq_len", "batch_size", "segment_documents", "seed")
  return _build(
    config_lib.DataConfig,
    **{name: flag_values[name].value for name in names if name in flag_values},
  )


def train_config(flag_values: flags.FlagValues = FLAGS) -> config_lib.TrainConfig:
  """The whole run but for the model. Raises UsageError for a missing --workdir and for values that
  do not go together.
  """
  value = {name: flag_values[name].value for name in OUR_FLAGS if name in flag_values}
  if not value["workdir"] and not value.get("dry_run"):
    raise UsageError("--workdir is required: the folder for this run's checkpoints and metrics")
  if value["warmup_steps"] is None:
    value["warmup_steps"] = min(100, value["num_steps"] // 10)
  value["workdir"] = value["workdir"] or ""
  names = [field.name for field in dataclasses.fields(config_lib.OptimizerConfig)]
  optimizer = _build(config_lib.OptimizerConfig, **{name: value[name] for name in names})
  names = [
    field.name
    for field in dataclasses.fields(config_lib.TrainConfig)
    if field.name not in ("data", "optimizer")
  ]
  return _build(
    config_lib.TrainConfig,
    data=data_config(flag_values),
    optimizer=optimizer,
    **{name: value[name] for name in names},
  )
