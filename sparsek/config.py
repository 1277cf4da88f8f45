"""Frozen dataclasses that configure the library, and the presets. Flags are turned into these;
nothing here reads a flag.
"""

import dataclasses
import math
import re

import jax.numpy as jnp

ATTENTION_KINDS = (
  "sparsek",
  "sliding_window",
  "full",
  "random",
  "attention_sinks",
  "strided",
  "lsh",
  "block_topk",
  "linear",
)
NEED_WINDOW = ("sliding_window", "block_topk", "linear")
GATES = ("straight_through", "value", "key_value")
SCORERS = ("linear", "conv", "random")
IMPLEMENTATIONS = ("reference", "xla", "mosaic_gpu", "mosaic_tpu")
REMAT_POLICIES = ("none", "dots", "attention", "full")
DTYPES = ("float32", "bfloat16")
NORMS = ("rms_norm", "layer_norm")
MLPS = ("swiglu", "gelu", "gelu_tanh")
TRAINABLE = ("all", "attention", "scorer")
ON_SPIKE = ("skip", "stop")
POSITIONS = ("rope", "learned")
ROPE_SCALINGS = {
  "linear": ("factor",),
  "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_positions"),
}


def check_choice(name: str, value, choices) -> None:
  """Raises ValueError unless `value` is one of `choices`, naming all three."""
  if value not in choices:
    raise ValueError(f"{name}={value!r} is not one of {', '.join(map(str, choices))}")


def check_at_least(name: str, value, minimum) -> None:
  """Raises ValueError unless `value >= minimum`."""
  if not value >= minimum:
    raise ValueError(f"{name}={value} must be at least {minimum}")


_TERM = re.compile(r"([a-z_]+)(?::k(\d+))?(?::w(\d+))?(?:\*(\d+))?")


def parse_layer_pattern(pattern) -> tuple[str, ...]:
  """Turns "sparsek*5,full" or "sliding_window:w256*5,sparsek:k1536:w256" (or a sequence of such
  terms) into a tuple of terms without *TIMES, each a kind of attention with a k and a window of its
  own, if given; the tuple repeats over the layers.
  """
  terms = []
  for term in pattern.split(",") if isinstance(pattern, str) else pattern:
    match = _TERM.fullmatch(term.strip())
    if not match or match[1] not in ATTENTION_KINDS or match[4] and int(match[4]) == 0:
      raise ValueError(
        f"attention pattern {pattern!r}: the term {term!r} is not KIND, KIND:kK, KIND:wWINDOW "
        "or KIND:kK:wWINDOW, or one of them and *TIMES, "
        f"with KIND one of {', '.join(ATTENTION_KINDS)}"
      )
    terms += [term.strip().partition("*")[0]] * int(match[4] or 1)
  return tuple(terms)


def parse_term(term: str) -> tuple[str, int | None, int | None]:
  """(kind, k, window) of a term of `parse_layer_pattern`; None where the model's is meant."""
  kind, k, window, _ = _TERM.fullmatch(term).groups()
  return kind, k and int(k), window and int(window)


def parse_rope_scaling(scaling) -> tuple | None:
  """Turns "linear:FACTOR" or "llama3:FACTOR:LOW:HIGH:ORIGINAL" (or a sequence of the same) into a
  tuple of the name and numbers; see `sparsek.model.layers.rope_frequencies`.
  """
  if scaling is None:
    return None
  kind, *numbers = scaling.split(":") if isinstance(scaling, str) else scaling
  names = ROPE_SCALINGS.get(kind, ())
  try:
    numbers = tuple(map(float, numbers))
  except (TypeError, ValueError):
    numbers = ()
  fits = (
    kind in ROPE_SCALINGS
    and len(numbers) == len(names)
    and all(0 < number < math.inf for number in numbers)
  )
  if not fits or (kind == "llama3" and numbers[1] >= numbers[2]):
    forms = " or ".join(
      ":".join((kind, *map(str.upper, names))) for kind, names in ROPE_SCALINGS.items()
    )
    raise ValueError(
      f"rope_scaling={scaling} must be {forms}, with positive numbers and "
      "LOW_FREQ_FACTOR below HIGH_FREQ_FACTOR"
    )
  return (kind, *numbers)


def parse_profile_steps(steps) -> tuple[int, int] | None:
  """Turns "A:B" into (A, B)."""
  if steps is None:
    return None
  first, colon, last = (
    steps.partition(":") if isinstance(steps, str) else (str(steps[0]), ":", str(steps[1]))
  )
  if not (colon and first.isdecimal() and last.isdecimal() and 1 <= int(first) <= int(last)):
    raise ValueError(
      f"profile_steps={steps} must be A:B, the first and the last step to trace, 1 <= A <= B"
    )
  return int(first), int(last)


@dataclasses.dataclass(frozen=True)
class TransformerConfig:
  """A decoder language model. No parameter depends on `k`, `window` or `gate`, so a checkpoint
  restores under other values of them.

  Attributes:
    vocab_size: number of token ids.
    num_layers: number of blocks.
    embed_dim: width of the residual stream.
    num_heads: query heads H.
    num_kv_heads: key/value heads G; H must be a multiple of G.
    head_dim: width D of a head; even, for the rotary embedding.
    mlp_dim: hidden width of the MLP.
    attention: attention kind per layer as a pattern that repeats over the layers: "sparsek",
      "sparsek*5,full" or a tuple. Kinds: sparsek, sliding_window, full, and the baselines of
      `sparsek.model.baselines`: random, attention_sinks, strided, lsh, block_topk, linear. A layer
      may have a k and a window of its own, "sliding_window:w256*5,sparsek:k1536:w256"; the others
      have those below.
    k: selected key/value pairs per query (all kinds but sliding_window, full and linear).
    window: most recent tokens each query sees, itself included (all kinds but full; lsh sees k +
      window of its bucket instead).
    gate: how the selection mask enters; see `sparsek.sparsek_attention`.
    scorer: scoring network: "linear", "conv" (a short convolution), "random" (fixed noise, the
      control).
    scorer_lookahead: tokens after its own that a conv scorer may see; at most `window`, since a
      token is judged only after `window` steps.
    scorer_lookback: tokens before its own that a conv scorer sees.
    scorer_normalize: normalise logits causally over time before the learned scale.
    scorer_init_scale: initial standard deviation of the scores.
    scorer_init_slope: initial growth of the scores per 1024 tokens of position.
    scorer_shared: one score per token for all KV heads of a layer.
    scorer_init_noise: initial amplitude of fixed noise in the scores, which is learned; 0: none.
      Tokens that look alike are then not kept or dropped together.
    scorer_init_sink: initial extra score of a document's first token, which is learned; 0: none.
      Pretrained models need that token kept.
    scorer_noise: standard deviation of normal noise on the scores, in training only, so that tokens
      are tried which would be dropped.
    scorer_loss_queries: queries per row, spread evenly, whose attention the scorers' auxiliary loss
      looks at; see `TrainConfig.scorer_loss`.
    positions: "rope" (rotary embedding of queries and keys) or "learned" (a table added to the
      embedding of the tokens).
    max_positions: rows of the learned table, and the most tokens of a row; with "rope" a note of
      the context that a model is meant for, which limits nothing.
    rope_theta: base of the rotary embedding.
    rope_fraction: share of the head dimension that is rotated; what is left passes through.
    rope_scaling: how frequencies are stretched for longer contexts: None, "linear:FACTOR" or
      "llama3:FACTOR:LOW:HIGH:ORIGINAL"; see `sparsek.model.layers.rope_frequencies`.
    norm: "rms_norm" or "layer_norm" (with a bias).
    norm_eps: epsilon of the norms.
    qk_norm: RMSNorm over the head dimension of queries and keys.
    mlp: "swiglu": down(silu(gate(x)) * up(x)); "gelu": down(gelu(up(x))); "gelu_tanh": the same
      with the tanh approximation.
    use_bias: biases on the query, key and value projections.
    out_bias: a bias on attention's output projection.
    mlp_bias: biases on the MLP's projections.
    parallel_residual: x + attention(norm(x)) + mlp(norm'(x)) instead of one after the other.
    tie_embeddings: the output matrix is the embedding.
    lora_rank: rank R of adapters beside the matrices of attention and MLPs, which are frozen then;
      0: none. See `sparsek.model.lora`.
    lora_alpha: their products count alpha / R times; None: R.
    dtype: of activations and matrix inputs; parameters, scores, softmax and loss are float32.
    remat: what the backward pass recomputes per block: "none"; "dots": all but attention and
      products with weights; "attention": all but attention; "full": everything.
    scan_layers: stack the layers' parameters and scan over them; compiles faster, runs slower and
      in more memory.
    implementation: of attention; None takes the fastest that can run.
  """

  vocab_size: int = 257
  num_layers: int = 4
  embed_dim: int = 128
  num_heads: int = 4
  num_kv_heads: int = 2
  head_dim: int = 32
  mlp_dim: int = 384
  attention: str | tuple[str, ...] = "sparsek"
  k: int = 64
  window: int = 64
  gate: str = "straight_through"
  scorer: str = "linear"
  scorer_lookahead: int = 4
  scorer_lookback: int = 3
  scorer_normalize: bool = True
  scorer_init_scale: float = 1.0
  scorer_init_slope: float = 0.0
  scorer_shared: bool = False
  scorer_init_noise: float = 0.0
  scorer_init_sink: float = 0.0
  scorer_noise: float = 0.0
  scorer_loss_queries: int = 128
  positions: str = "rope"
  max_positions: int = 2048
  rope_theta: float = 10000.0
  rope_fraction: float = 1.0
  rope_scaling: str | tuple | None = None
  norm: str = "rms_norm"
  norm_eps: float = 1e-6
  qk_norm: bool = False
  mlp: str = "swiglu"
  use_bias: bool = False
  out_bias: bool = False
  mlp_bias: bool = False
  parallel_residual: bool = False
  tie_embeddings: bool = True
  lora_rank: int = 0
  lora_alpha: float | None = None
  dtype: str = "float32"
  remat: str = "none"
  scan_layers: bool = False
  implementation: str | None = None

  def __post_init__(self):
    object.__setattr__(self, "attention", parse_layer_pattern(self.attention))
    object.__setattr__(self, "rope_scaling", parse_rope_scaling(self.rope_scaling))
    for name in (
      "vocab_size",
      "num_layers",
      "embed_dim",
      "num_heads",
      "num_kv_heads",
      "head_dim",
      "mlp_dim",
      "k",
      "scorer_loss_queries",
    ):
      check_at_least(name, getattr(self, name), 1)
    for name in (
      "window",
      "scorer_lookahead",
      "scorer_lookback",
      "scorer_init_noise",
      "scorer_noise",
      "lora_rank",
    ):
      check_at_least(name, getattr(self, name), 0)
    if self.num_heads % self.num_kv_heads:
      raise ValueError(
        f"num_heads={self.num_heads} must be a multiple of num_kv_heads={self.num_kv_heads}"
      )
    if self.head_dim % 2:
      raise ValueError(f"head_dim={self.head_dim} must be even, for the rotary embedding")
    check_at_least("max_positions", self.max_positions, 2)
    if not 0 < self.rope_fraction <= 1 or self.rope_dim < 2 or self.rope_dim % 2:
      raise ValueError(
        f"rope_fraction={self.rope_fraction} must be above 0, at most 1, and rotate an even "
        f"number of head_dim={self.head_dim} features"
      )
    if self.lora_alpha is not None and not (0 < self.lora_alpha < math.inf and self.lora_rank):
      raise ValueError(
        f"lora_alpha={self.lora_alpha} must be above 0, finite, and go with a lora_rank "
        f"above 0; lora_rank={self.lora_rank}"
      )
    check_choice("positions", self.positions, POSITIONS)
    check_choice("norm", self.norm, NORMS)
    check_choice("mlp", self.mlp, MLPS)
    check_choice("gate", self.gate, GATES)
    check_choice("scorer", self.scorer, SCORERS)
    check_choice("dtype", self.dtype, DTYPES)
    check_choice("remat", self.remat, REMAT_POLICIES)
    check_choice("implementation", self.implementation, (None, *IMPLEMENTATIONS))
    for kind, k, window in map(parse_term, self.attention):
      window = self.window if window is None else window
      check_at_least(f"attention={','.join(self.attention)}: k", 1 if k is None else k, 1)
      if kind == "sparsek" and self.scorer == "conv" and self.scorer_lookahead > window:
        raise ValueError(
          f"scorer_lookahead={self.scorer_lookahead} must be at most window={window}: a token "
          "is judged when it leaves the window"
        )
      if kind in NEED_WINDOW and window < 1:
        raise ValueError(f"window={window} must be at least 1 for {kind} layers")
    if len(self.attention) > self.num_layers:
      raise ValueError(
        f"the attention pattern names {len(self.attention)} layers, more than "
        f"num_layers={self.num_layers}"
      )
    if self.scan_layers and self.num_layers % len(self.attention):
      raise ValueError(
        f"scan_layers needs num_layers={self.num_layers} to be a multiple of the attention "
        f"pattern's length {len(self.attention)}"
      )

  @property
  def layer_terms(self) -> tuple[str, ...]:
    """The term of the attention pattern of each layer."""
    return tuple(self.attention[i % len(self.attention)] for i in range(self.num_layers))

  @property
  def layer_kinds(self) -> tuple[str, ...]:
    """The attention kind of each layer."""
    return tuple(parse_term(term)[0] for term in self.layer_terms)

  @property
  def learns_scores(self) -> bool:
    """Whether a layer has a scorer with parameters, for `TrainConfig.scorer_loss` to teach."""
    return "sparsek" in self.layer_kinds and self.scorer != "random"

  def for_term(self, term: str) -> "TransformerConfig":
    """The same with the k and window that a layer of this term has."""
    _, k, window = parse_term(term)
    if k is None and window is None:
      return self
    return dataclasses.replace(
      self, k=self.k if k is None else k, window=self.window if window is None else window
    )

  @property
  def layer_configs(self) -> tuple["TransformerConfig", ...]:
    """The same for each layer, with its own k and window."""
    return tuple(map(self.for_term, self.layer_terms))

  @property
  def rope_dim(self) -> int:
    """Features of a head that are rotated."""
    return int(self.head_dim * self.rope_fraction)

  @property
  def lora_scale(self) -> float:
    """What adapters' products are multiplied with: alpha / R."""
    return 1.0 if self.lora_alpha is None else self.lora_alpha / self.lora_rank

  @property
  def activation_dtype(self):
    return jnp.dtype(self.dtype)


PRESETS = {
  # name: (layers, width, heads, kv heads, head_dim, mlp, vocabulary, k, window)
  "tiny": (4, 128, 4, 2, 32, 384, 257, 64, 64),
  "mini": (8, 384, 6, 2, 64, 1024, 8192, 256, 256),
  "gpt2_small": (12, 768, 12, 12, 64, 2048, 50257, 512, 512),
  "gpt2_medium": (24, 1024, 16, 16, 64, 2736, 50257, 512, 512),
  "1b": (20, 2048, 32, 8, 64, 5632, 50257, 1024, 1024),
}
QUICK = ("tiny", "mini")  # presets to try things with


def preset(name: str, **overrides) -> TransformerConfig:
  """The configuration called `name` with some fields replaced.

  The two small ones scan over the layers where their pattern allows it, which compiles faster; the
  others do not, which runs faster and in less memory.

  Presets: "tiny" (1M parameters, bytes, for a CPU), "mini" (16M), "gpt2_small" (124M),
    "gpt2_medium" (355M), "1b" (1.0B).

  Raises:
    ValueError: for an unknown preset, an unknown field or a value out of range.
  """
  check_choice("preset", name, PRESETS)
  fields = (
    "num_layers",
    "embed_dim",
    "num_heads",
    "num_kv_heads",
    "head_dim",
    "mlp_dim",
    "vocab_size",
    "k",
    "window",
  )
  known = [f.name for f in dataclasses.fields(TransformerConfig)]
  for field in overrides:
    check_choice("configuration field", field, known)
  values = {
    **dict(zip(fields, PRESETS[name])),
    "dtype": "float32" if name == "tiny" else "bfloat16",
    **overrides,
  }
  pattern = parse_layer_pattern(values.get("attention", TransformerConfig.attention))
  return TransformerConfig(
    **{"scan_layers": name in QUICK and values["num_layers"] % len(pattern) == 0, **values}
  )


@dataclasses.dataclass(frozen=True)
class DataConfig:
  """Where tokens come from and how they are cut into rows.

  Attributes:
    data: "stdlib" (the source of Python's standard library, byte tokens) or the folder that
      `experiments.prepare_data` wrote.
    seq_len: tokens per row that the model sees (a row stores one more, the last target).
    batch_size: rows per optimizer step, over all processes and accumulation steps.
    seed: of the shuffle.
    segment_documents: give packed documents segment ids of their own, so that attention and loss
      restart at each.
  """

  data: str = "stdlib"
  seq_len: int = 512
  batch_size: int = 8
  seed: int = 0
  segment_documents: bool = True

  def __post_init__(self):
    for name in ("seq_len", "batch_size"):
      check_at_least(name, getattr(self, name), 1)


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
  """AdamW with linear warm-up and cosine decay.

  Attributes:
    learning_rate: peak learning rate.
    warmup_steps: steps from 0 to the peak.
    num_steps: length of the schedule, warm-up included.
    final_lr_ratio: learning rate at the end over the peak.
    weight_decay: decoupled, on matrices only (not on norms, biases, scales, slopes or embeddings).
    grad_clip: largest global gradient norm; 0 turns clipping off.
    b1, b2: decay of the first and second moments.
    trainable: which parameters change: "all"; "attention": those of the attention modules, scorers
      included; "scorer": scorers only.
    scorer_lr_multiplier: learning rate of the scoring networks over that of everything else.
  """

  learning_rate: float = 1e-3
  warmup_steps: int = 100
  num_steps: int = 1000
  final_lr_ratio: float = 0.1
  weight_decay: float = 0.1
  grad_clip: float = 1.0
  b1: float = 0.9
  b2: float = 0.95
  trainable: str = "all"
  scorer_lr_multiplier: float = 5.0

  def __post_init__(self):
    check_choice("trainable", self.trainable, TRAINABLE)
    check_at_least("num_steps", self.num_steps, 1)
    for name in (
      "learning_rate",
      "warmup_steps",
      "final_lr_ratio",
      "weight_decay",
      "grad_clip",
      "scorer_lr_multiplier",
    ):
      check_at_least(name, getattr(self, name), 0)
    if self.warmup_steps > self.num_steps:
      raise ValueError(
        f"warmup_steps={self.warmup_steps} must be at most num_steps={self.num_steps}"
      )


@dataclasses.dataclass(frozen=True)
class TrainConfig:
  """A training run: everything but the model, which is a TransformerConfig.

  Attributes:
    workdir: where checkpoints, metrics.jsonl, flags.txt and versions.json go.
    data, optimizer: see their classes.
    seed: of the parameters, the noise on the scores and the queries of the scorers' loss.
    scorer_loss: weight of the scorers' auxiliary loss,
      `sparsek.attention.scorer_loss.attention_mass_loss`, a mean over rows and sparsek layers;
      nothing where no scorer learns.
    scorer_warmup: scorers learn from that loss alone while sparsek layers attend to everything: the
      first stage of converting a dense model. There is no cross-entropy and no backward pass but
      the scorers' own; the "loss" of a step is the scorers'.
    distill: weight w of a teacher in the objective (1 - w) cross-entropy + w KL(teacher || model),
      at temperature 1. Its operations do not count in "mfu".
    distill_from: the teacher, with attention of its own: "hf:DIR", "DIR" or "DIR@STEP" as in
      init_from. Checkpoints do not hold it.
    spike_factor: a step whose loss or gradient norm is above this many times its running mean, or
      not finite, changes nothing; 0: no step is looked at.
    on_spike: "skip": go on with the next step; "stop": raise RunError.
    restore_step: go on from the checkpoint of this step, and set later ones aside; as
      `sparsek.runs.set_aside` says, once. None: from the newest.
    stop_at: step at which to stop, before the end of the schedule; the run may then go on under
      another k, window, gate or noise. None: at its end.
    grad_accumulation: micro-batches per optimizer step; divides the batch size.
    loss_chunk: tokens whose logits exist at once in the cross-entropy.
    log_every, eval_every, checkpoint_every: steps between metrics, held-out evaluations and
      checkpoints; 0 turns evaluation off.
    eval_batches: batches per evaluation.
    keep_checkpoints: newest checkpoints kept.
    init_from: "DIR" or "DIR@STEP": take parameters (only) from that run; "hf:DIR": from a folder in
      Hugging Face's format; and draw the scorers it lacks.
    tensorboard: also write TensorBoard events.
    profile_steps: (first, last) step of a trace that goes to WORKDIR/profile; "A:B" is taken too.
  """

  workdir: str
  data: DataConfig = DataConfig()
  optimizer: OptimizerConfig = OptimizerConfig()
  seed: int = 0
  scorer_loss: float = 1.0
  scorer_warmup: bool = False
  distill: float = 0.0
  distill_from: str | None = None
  spike_factor: float = 0.0
  on_spike: str = "skip"
  restore_step: int | None = None
  stop_at: int | None = None
  grad_accumulation: int = 1
  loss_chunk: int = 2048
  log_every: int = 10
  eval_every: int = 200
  eval_batches: int = 8
  checkpoint_every: int = 200
  keep_checkpoints: int = 3
  init_from: str | None = None
  tensorboard: bool = False
  profile_steps: str | tuple[int, int] | None = None

  def __post_init__(self):
    object.__setattr__(self, "profile_steps", parse_profile_steps(self.profile_steps))
    for name in (
      "grad_accumulation",
      "loss_chunk",
      "log_every",
      "eval_batches",
      "checkpoint_every",
      "keep_checkpoints",
    ):
      check_at_least(name, getattr(self, name), 1)
    if self.stop_at is not None:
      check_at_least("stop_at", self.stop_at, 1)
    for name in ("eval_every", "scorer_loss", "distill"):
      check_at_least(name, getattr(self, name), 0)
    if self.spike_factor and not self.spike_factor > 1:
      raise ValueError(
        f"spike_factor={self.spike_factor} must be above 1, or 0 to look for no spikes"
      )
    check_choice("on_spike", self.on_spike, ON_SPIKE)
    if self.distill > 1 or (self.distill > 0) != bool(self.distill_from):
      raise ValueError(
        f"distill={self.distill} must be at most 1 and go with distill_from, its teacher: both "
        f"or neither; distill_from={self.distill_from}"
      )
    if self.scorer_warmup and not (
      self.scorer_loss and self.optimizer.trainable == "scorer" and not self.distill
    ):
      raise ValueError(
        f"scorer_warmup={self.scorer_warmup} needs trainable=scorer, scorer_loss "
        "above 0 and no distill; "
        f"trainable={self.optimizer.trainable}, scorer_loss={self.scorer_loss}, "
        f"distill={self.distill}"
      )
    if self.data.batch_size % self.grad_accumulation:
      raise ValueError(
        f"batch_size={self.data.batch_size} must be a multiple of "
        f"grad_accumulation={self.grad_accumulation}"
      )
