"""The flags that several commands share: the model, its attention, the run that is read.

A command has its own flag values. It defines the flags that it shares with other commands by the
functions below, and the others beside its main function:

  FLAGS = absl_flags.FlagValues()
  flags.define_workdir_flag(FLAGS)
  Definer(FLAGS).integer("examples", 100, "Documents per task and length.", lower=1)

Model flags default to None, which means the value of the preset, or of the run that is loaded.
`sparsek.command_line.training_flags` defines those of training, `configs` turns parsed flags into
the dataclasses of `sparsek.config`, `main` parses a command line and runs a command.
"""

import os
from collections.abc import Sequence

from absl import flags

from sparsek import config as config_lib
from sparsek.command_line.definer import Definer
from sparsek.command_line.model_fields import ModelFlag
from sparsek.command_line.own_modules import define_import_flag
from sparsek.errors import UsageError

DATA_HELP = 'Folder of token files or "stdlib", made with the run\'s tokenizer.'


def define_attention_flags(flag_values: flags.FlagValues) -> None:
  """Defines the model flags that can be changed when a trained model is run.

  No parameter depends on them.
  """
  define = Definer(flag_values, "model")
  define_import_flag(flag_values)
  define.integer(
    "k",
    None,
    "Selected key/value pairs per query in sparsek layers. By default that of the preset or run.",
  )
  define.integer(
    "window",
    None,
    "Most recent tokens that each query sees, itself included. By default that of the preset or "
    "run.",
  )
  define.choice(
    "gate",
    None,
    config_lib.GATES,
    "How the selection mask enters attention. By default straight_through.",
  )
  define.choice(
    "implementation",
    None,
    config_lib.IMPLEMENTATIONS,
    "Implementation of attention. By default the fastest one that can run.",
  )
  define.choice(
    "dtype",
    None,
    config_lib.DTYPES,
    "Type of the activations; parameters stay float32. By default float32 for the preset tiny, "
    "bfloat16 for the others.",
  )


def define_model_flags(flag_values: flags.FlagValues) -> None:
  """Defines all model flags: preset, architecture, scorer, and `define_attention_flags`."""
  define_attention_flags(flag_values)
  define = Definer(flag_values, "model")
  define.choice(
    "preset",
    "tiny",
    list(config_lib.PRESETS),
    "Size of the model. The other model flags replace single values of it.",
  )
  define.choice(
    "attention",
    None,
    config_lib.ATTENTION_KINDS,
    "Attention of all layers. By default sparsek. Not together with --layer_pattern.",
  )
  define.string(
    "layer_pattern",
    None,
    "Attention of each layer, repeated over the layers. Terms KIND or KIND*TIMES are separated by "
    'commas, such as "sparsek*5,full". KIND:kK:wWINDOW is a layer with a k or a window of its own: '
    "sliding_window:w256*5,sparsek:k1536:w256. Behind :h are KV heads with other values: "
    "sparsek:k16:w512:h1.3-5:k1040 (docs/heads.md).",
  )
  _define_scorer(Definer(flag_values, "scorer"))
  _define_architecture(define)


def _define_scorer(define: Definer) -> None:
  define.choice(
    "scorer", None, config_lib.SCORERS, "Scoring network; random is the control. By default linear."
  )
  define.integer(
    "scorer_lookahead",
    None,
    "Tokens after its own that a conv scorer may see, at most --window. By default 4.",
  )
  define.integer(
    "scorer_lookback", None, "Tokens before its own that a conv scorer sees. By default 3."
  )
  define.boolean(
    "scorer_normalize",
    None,
    "Normalise scores causally over time before the learned scale. By default true.",
  )
  define.real("scorer_init_scale", None, "Initial standard deviation of the scores. By default 1.")
  define.real(
    "scorer_init_slope",
    None,
    "Initial growth of the scores per 1024 tokens of position. By default 0.",
  )
  define.boolean(
    "scorer_shared",
    None,
    "One score per token for all key/value heads of a layer. By default false.",
  )
  define.real(
    "scorer_init_noise",
    None,
    "Initial amplitude of fixed noise in the scores; the amplitude is learned. By default 0, which "
    "means no noise.",
  )
  define.real(
    "scorer_init_sink",
    None,
    "Initial extra score of a document's first token; it is learned. By default 0, which means "
    "none.",
  )
  define.real(
    "scorer_noise",
    None,
    "Standard deviation of normal noise on the scores, in training only. By default 0.",
  )
  define.integer(
    "scorer_loss_queries", None, "Queries per row that --scorer_loss looks at. By default 128."
  )
  define.choice(
    "scorer_loss_kind",
    None,
    config_lib.SCORER_LOSSES,
    "What --scorer_loss teaches. divergence: the distribution of attention; ranking: which k "
    "tokens later queries read most, beyond the window. By default divergence.",
  )


def _define_architecture(define: Definer) -> None:
  of_preset = "By default that of the preset."
  define.integer("num_layers", None, f"Number of blocks. {of_preset}")
  define.integer("embed_dim", None, f"Width of the residual stream. {of_preset}")
  define.integer("num_heads", None, f"Query heads; a multiple of --num_kv_heads. {of_preset}")
  define.integer("num_kv_heads", None, f"Key/value heads. {of_preset}")
  define.integer("head_dim", None, f"Width of a head; even. {of_preset}")
  define.integer("mlp_dim", None, f"Hidden width of the MLP. {of_preset}")
  define.real("rope_theta", None, "Base of the rotary embedding. By default 10000.")
  define.flag(ModelFlag())
  define.choice(
    "remat",
    None,
    config_lib.REMAT_POLICIES,
    "What the backward pass recomputes. dots: all but attention and products with weights; "
    "attention: all but attention; full: everything. By default none, and in training attention "
    "where memory would not suffice.",
  )
  define.boolean(
    "scan_layers",
    None,
    "Scan over stacked layers, which compiles faster and runs slower. By default true for the "
    "presets tiny and mini where the layer pattern fits.",
  )


def define_workdir_flag(flag_values: flags.FlagValues) -> None:
  """Defines the folder of a run, which pretraining writes and other commands read."""
  Definer(flag_values, "run").path(
    "workdir", None, "Folder of a run: checkpoints, metrics.jsonl, flags.txt. Required."
  )


def define_step_flags(flag_values: flags.FlagValues) -> None:
  """Defines the flags that say which checkpoint of a run is read."""
  define = Definer(flag_values, "run")
  define.integer("step", None, "Step of the checkpoint. By default the newest.", lower=0)
  define.boolean(
    "allow_older_step",
    False,
    "Where the newest checkpoint is damaged, take the newest good one. By default the command "
    "stops there.",
  )


def define_alone_flag(flag_values: flags.FlagValues) -> None:
  """Defines the flag that lets a cluster start several processes of a command that is one."""
  Definer(flag_values, "devices").boolean(
    "distributed",
    True,
    "Refuse to run as one of several processes of SLURM, Open MPI, Kubernetes or a TPU pod. With "
    "--nodistributed each of them stands for itself.",
  )


def define_evaluation_flags(flag_values: flags.FlagValues) -> None:
  """Defines the flags that say which runs are evaluated, and under which attention."""
  define_attention_flags(flag_values)
  Definer(flag_values, "run").paths(
    "workdir", "Folder of a run, or several separated by commas. Required."
  )
  define_step_flags(flag_values)
  define_alone_flag(flag_values)


def check_runs(folders: Sequence[str]) -> None:
  """Raises UsageError unless --workdir names folders, each of which exists."""
  if not folders:
    raise UsageError("--workdir is required: the folder of a run, or several separated by commas")
  for folder in folders:
    if not os.path.isdir(folder):
      raise UsageError(f"--workdir={folder}: there is no such folder")


def define_data_of_runs_flag(flag_values: flags.FlagValues) -> None:
  """Defines the data on which runs are evaluated."""
  Definer(flag_values, "data").path(
    "data", None, f"{DATA_HELP} By default what the run was trained on.", words=("stdlib",)
  )
