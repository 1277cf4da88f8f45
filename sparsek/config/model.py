"""The configuration of a model."""

import dataclasses
import math
from typing import TYPE_CHECKING, Annotated, NamedTuple

from sparsek.config.checks import (
  MAX_INT,
  UNREGISTERED,
  Count,
  Index,
  Positive,
  PositiveShare,
  Range,
  UnboundedCount,
  UnboundedIndex,
  Weight,
  check_choice,
  check_fields,
  check_number,
  check_type,
)
from sparsek.config.layer_patterns import (
  SETTINGS,
  fields_of_kind,
  fields_of_term,
  heads_text,
  parse_layer_pattern,
  parse_term,
)

if TYPE_CHECKING:
  import jax.numpy as jnp

NEED_WINDOW = ("sliding_window", "block_topk", "linear")
GATES = ("straight_through", "value", "key_value")
SCORER_LOSSES = ("ranking", "divergence")
SCORERS = ["linear", "conv", "random"]  # `sparsek.model.registration` appends to it
IMPLEMENTATIONS = ("reference", "xla", "mosaic_gpu", "mosaic_mma", "mosaic_tpu")
REMAT_POLICIES = ("none", "dots", "attention", "full")
DTYPES = ("float32", "bfloat16")
NORMS = ("rms_norm", "layer_norm")
MLPS = ("swiglu", "gelu", "gelu_tanh")
POSITIONS = ("rope", "learned")
ROPE_SCALINGS = {
  "linear": ("factor",),
  "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_positions"),
}


def parse_rope_scaling(scaling: str | tuple | list | None) -> tuple | None:
  """Returns (name, *numbers) of "linear:FACTOR" or "llama3:FACTOR:LOW:HIGH:ORIGINAL".

  Args:
    scaling: such a string, a sequence of the same parts, or None, which stays None. For the meaning
      of the numbers see `sparsek.model.layers.rope_frequencies`.
  Raises:
    ValueError: for anything else.
  """
  if scaling is None:
    return None
  kind, *parts = scaling.split(":") if isinstance(scaling, str) else scaling or ("",)
  names = ROPE_SCALINGS.get(kind, ()) if isinstance(kind, str) else ()
  try:
    numbers = tuple(map(float, parts))
  except (TypeError, ValueError):
    numbers = ()
  fits = len(numbers) == len(names) > 0 and all(0 < number < math.inf for number in numbers)
  if not fits or (kind == "llama3" and numbers[1] >= numbers[2]):
    forms = " or ".join(
      ":".join((kind, *map(str.upper, names))) for kind, names in ROPE_SCALINGS.items()
    )
    raise ValueError(
      f"rope_scaling={scaling} must be {forms}, with positive numbers and "
      "LOW_FREQ_FACTOR below HIGH_FREQ_FACTOR"
    )
  return (kind, *numbers)


class HeadGroup(NamedTuple):
  """KV heads of a layer that have the same k and window, and the query heads that read them.

  Attributes:
    heads: indices of the KV heads, ascending.
    config: that of a layer of these heads alone; its kind is sliding_window where they have k=0.
  """

  heads: tuple[int, ...]
  config: "TransformerConfig"

  @property
  def kind(self) -> str:
    """The attention kind of these heads."""
    return self.config.layer_kinds[0]


@dataclasses.dataclass(frozen=True)
class TransformerConfig:
  """A decoder language model.

  No parameter depends on `k`, `window` or `gate`, so a checkpoint can be restored with other values
  of them.

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
      `sparsek.model.baselines`: random, attention_sinks, strided, lsh, block_topk, linear, tova,
      h2o, snapkv, random_sink, kvzap; and what `sparsek.model.registration` has added. A term may
      set its own k and window, as in "sliding_window:w256*5,sparsek:k1536:w256", and those of some
      KV heads, as in "sparsek:k16:w512:h1.3-5:k1040"; by default a layer uses the values below.
      See `sparsek.config.parse_layer_pattern`.
    k: key/value pairs that are selected for each query (all kinds but sliding_window, full and
      linear).
    window: most recent tokens that each query sees, itself included (all kinds but full; lsh sees
      k + window tokens of its bucket instead).
    gate: how the selection mask enters attention; see `sparsek.sparsek_attention`.
    scorer: scoring network: "linear", "conv" (a short convolution), "random" (fixed noise, as a
      control) or a name that `sparsek.model.registration` has added.
    scorer_lookahead: tokens after the scored one that a conv scorer sees; at most `window`, since a
      token is selected or dropped only after `window` steps.
    scorer_lookback: tokens before the scored one that a conv scorer sees.
    scorer_normalize: normalise the scorer's logits causally over time before the learned scale.
    scorer_init_scale: initial standard deviation of the scores.
    scorer_init_slope: initial growth of the scores per 1024 tokens of position.
    scorer_shared: one score per token for all KV heads of a layer.
    scorer_init_noise: initial value of the learned amplitude of fixed noise in the scores, so that
      similar tokens are not all kept or all dropped; 0: no noise.
    scorer_init_sink: initial value of the learned extra score of a document's first token; 0: none.
      Pretrained models need that token kept.
    scorer_noise: standard deviation of normal noise on the scores in training only, so that tokens
      are also tried which would be dropped.
    scorer_loss_queries: queries per row, evenly spaced, whose attention the scorers' auxiliary loss
      uses; see `TrainConfig.scorer_loss`.
    scorer_loss_kind: that loss; "ranking": `sparsek.attention.ranking_loss.ranking_loss`,
      "divergence": `sparsek.attention.scorer_loss.attention_mass_loss`.
    positions: "rope" (rotary embedding of queries and keys) or "learned" (a table added to the
      embedding of the tokens).
    max_positions: rows of the learned table, and so the largest number of tokens in a row; with
      "rope" it only records the context length that the model is meant for, and limits nothing.
    rope_theta: base of the rotary embedding.
    rope_fraction: share of the head dimension that is rotated; the rest is unchanged.
    rope_scaling: how frequencies are scaled for longer contexts: None, "linear:FACTOR" or
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
    lora_rank: rank R of the adapters beside the matrices of attention and MLPs, which are then
      frozen; 0: no adapters. See `sparsek.model.lora`.
    lora_alpha: the adapters' products are scaled by alpha / R; None: alpha = R.
    dtype: of activations and matrix inputs; parameters, scores, softmax and loss are float32.
    remat: what the backward pass recomputes in each block: "none"; "dots": all but attention and
      products with weights; "attention": all but attention; "full": everything.
    scan_layers: stack the layers' parameters and scan over them, which compiles faster, but runs
      slower and needs more memory.
    implementation: of attention; None chooses the fastest one that can run.
  """

  vocab_size: Count = 257
  num_layers: Count = 4
  embed_dim: Count = 128
  num_heads: Count = 4
  num_kv_heads: Count = 2
  head_dim: Annotated[int, Range(2, MAX_INT)] = 32
  mlp_dim: Count = 384
  attention: str | tuple[str, ...] = "sparsek"
  k: UnboundedCount = 64
  window: UnboundedIndex = 64
  gate: str = "straight_through"
  scorer: str = "linear"
  scorer_lookahead: Index = 4
  scorer_lookback: Index = 3
  scorer_normalize: bool = True
  scorer_init_scale: Weight = 1.0
  scorer_init_slope: float = 0.0
  scorer_shared: bool = False
  scorer_init_noise: Weight = 0.0
  scorer_init_sink: float = 0.0
  scorer_noise: Weight = 0.0
  scorer_loss_queries: Count = 128
  scorer_loss_kind: str = "divergence"
  positions: str = "rope"
  max_positions: Annotated[int, Range(2, MAX_INT)] = 2048
  rope_theta: Annotated[float, Range(1)] = 10000.0
  rope_fraction: PositiveShare = 1.0
  rope_scaling: str | tuple | None = None
  norm: str = "rms_norm"
  norm_eps: Positive = 1e-6
  qk_norm: bool = False
  mlp: str = "swiglu"
  use_bias: bool = False
  out_bias: bool = False
  mlp_bias: bool = False
  parallel_residual: bool = False
  tie_embeddings: bool = True
  lora_rank: Index = 0
  lora_alpha: Positive | None = None
  dtype: str = "float32"
  remat: str = "none"
  scan_layers: bool = False
  implementation: str | None = None

  def __post_init__(self):
    check_fields(self)
    object.__setattr__(self, "attention", parse_layer_pattern(self.attention))
    object.__setattr__(self, "rope_scaling", parse_rope_scaling(self.rope_scaling))
    self._check_numbers()
    check_choice("positions", self.positions, POSITIONS)
    check_choice("norm", self.norm, NORMS)
    check_choice("mlp", self.mlp, MLPS)
    check_choice("gate", self.gate, GATES)
    if self.scorer not in SCORERS:
      raise ValueError(f"scorer={self.scorer!r} is not one of {', '.join(SCORERS)}{UNREGISTERED}")
    check_choice("scorer_loss_kind", self.scorer_loss_kind, SCORER_LOSSES)
    check_choice("dtype", self.dtype, DTYPES)
    check_choice("remat", self.remat, REMAT_POLICIES)
    check_choice("implementation", self.implementation, (None, *IMPLEMENTATIONS))
    self._check_layers()

  def _check_numbers(self) -> None:
    if self.num_heads % self.num_kv_heads:
      raise ValueError(
        f"num_heads={self.num_heads} must be a multiple of num_kv_heads={self.num_kv_heads}"
      )
    if self.head_dim % 2:
      raise ValueError(f"head_dim={self.head_dim} must be even, for the rotary embedding")
    if self.rope_dim < 2 or self.rope_dim % 2:
      raise ValueError(
        f"rope_fraction={self.rope_fraction} must rotate an even number of "
        f"head_dim={self.head_dim} features, at least 2"
      )
    if self.lora_alpha is not None and not self.lora_rank:
      raise ValueError(
        f"lora_alpha={self.lora_alpha} must go with a lora_rank above 0; lora_rank={self.lora_rank}"
      )

  def _check_layers(self) -> None:
    for term in self.attention:
      self._check_term(term)
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

  def _check_term(self, text: str) -> None:
    kind, k, window, own = parse_term(text)
    window = self.window if window is None else window
    name = f"attention={','.join(self.attention)}: k"
    check_number(name, 1 if k is None else k, UnboundedCount)
    windows = [window]
    if own is not None:
      heads, count = own.heads, self.num_kv_heads
      if heads[-1] >= count or len(heads) == count:
        raise ValueError(
          f"attention={','.join(self.attention)}: h{heads_text(heads)} must name some of the heads "
          f"from 0 to num_kv_heads - 1 = {count - 1}, and not all of them"
        )
      own_window = window if own.window is None else own.window
      if own.k == 0 and own_window < 1:
        raise ValueError(
          f"{name}0 needs a window of at least 1 in the same heads, got {own_window}"
        )
      windows += [own_window] * (own.k != 0)
    uses_scorer = "scorer" in fields_of_kind(kind)
    if uses_scorer and self.scorer == "conv" and self.scorer_lookahead > min(windows):
      raise ValueError(
        f"scorer_lookahead={self.scorer_lookahead} must be at most window={min(windows)}: a token "
        "is judged when it leaves the window"
      )
    if kind in NEED_WINDOW and min(windows) < 1:
      raise ValueError(f"window={min(windows)} must be at least 1 for {kind} layers")

  @property
  def layer_terms(self) -> tuple[str, ...]:
    """The term of the attention pattern of each layer."""
    return tuple(self.attention[i % len(self.attention)] for i in range(self.num_layers))

  @property
  def layer_kinds(self) -> tuple[str, ...]:
    """The attention kind of each layer."""
    return tuple(parse_term(term)[0] for term in self.layer_terms)

  def values_of(self, name: str) -> tuple[int, ...]:
    """Returns the different values of k or window in the layers, and heads, that use it, in their
    order.
    """
    groups = (group for layer in self.layer_configs for group in layer.head_groups)
    values = [getattr(of.config, name) for of in groups if name in fields_of_kind(of.kind)]
    return tuple(dict.fromkeys(values))

  def why_unused(self, name: str) -> str:
    """Returns why no layer takes the value of `name`; "" where one does.

    Args:
      name: k, window, gate, scorer, or a field of scorers.
    """
    kind, pattern = name.partition("_")[0], ",".join(self.attention)
    if not any(kind in fields_of_kind(layer) for layer in self.layer_kinds):
      return f"no layer of attention={pattern} has a {kind}"
    if not any(kind in fields_of_term(term) for term in self.attention):
      return f"each layer of attention={pattern} has its own {kind}, or none"
    if name in ("scorer_lookahead", "scorer_lookback") and self.scorer in ("linear", "random"):
      return f"scorer={self.scorer} sees no tokens beside the scored one"
    return ""

  @property
  def has_scorers(self) -> bool:
    """True if a layer has the scorer that `scorer` names."""
    return any("scorer" in fields_of_kind(kind) for kind in self.layer_kinds)

  @property
  def learns_scores(self) -> bool:
    """True if a layer has a scorer with parameters, which `TrainConfig.scorer_loss` can train."""
    return self.has_scorers and self.scorer != "random"

  def for_term(self, term: str) -> "TransformerConfig":
    """Returns this configuration with the k, the window and the scorer of a layer of this term."""
    kind, k, window, heads = parse_term(term)
    if term == kind and self.attention == (kind,) and kind not in SETTINGS:
      return self
    k, window = self.k if k is None else k, self.window if window is None else window
    own = SETTINGS.get(kind, {})
    attention = kind if heads is None else term
    return dataclasses.replace(self, attention=attention, k=k, window=window, **own)

  @property
  def layer_configs(self) -> tuple["TransformerConfig", ...]:
    """The configuration of each layer, by `for_term`."""
    return tuple(map(self.for_term, self.layer_terms))

  @property
  def head_groups(self) -> tuple[HeadGroup, ...]:
    """The KV heads of a layer by their k and window: one group of all heads, or two.

    This configuration must be that of a layer, from `layer_configs` or `for_term`.
    """
    kind, k, window, own = parse_term(self.attention[0])
    heads = tuple(range(self.num_kv_heads))
    if own is None:
      return (HeadGroup(heads, self),)
    others = tuple(head for head in heads if head not in own.heads)
    own_k = self.k if own.k is None else own.k
    own_window = self.window if own.window is None else own.window
    own_kind = kind if own_k else "sliding_window"
    return (
      self._of_heads(others, kind, self.k, self.window),
      self._of_heads(own.heads, own_kind, own_k or self.k, own_window),
    )

  @property
  def selecting_groups(self) -> tuple[HeadGroup, ...]:
    """Those of `head_groups` that have a k."""
    return tuple(group for group in self.head_groups if "k" in fields_of_kind(group.kind))

  def _of_heads(self, heads: tuple[int, ...], kind: str, k: int, window: int) -> HeadGroup:
    count = len(heads)
    queries = self.num_heads // self.num_kv_heads * count
    of_heads = dataclasses.replace(
      self, attention=kind, k=k, window=window, num_kv_heads=count, num_heads=queries
    )
    return HeadGroup(heads, of_heads)

  @property
  def rope_dim(self) -> int:
    """Number of features of a head that are rotated."""
    return int(self.head_dim * self.rope_fraction)

  @property
  def lora_scale(self) -> float:
    """Factor of the adapters' products: alpha / R."""
    return 1.0 if self.lora_alpha is None else self.lora_alpha / self.lora_rank

  @property
  def activation_dtype(self) -> "jnp.dtype":
    """The dtype of activations and matrix inputs."""
    import jax.numpy as jnp  # not above: the flags of a command need configurations, and no JAX

    return jnp.dtype(self.dtype)


def check_config(config: object) -> None:
  """Raises ValueError unless `config` is a TransformerConfig."""
  check_type(
    "config", config, TransformerConfig, "a TransformerConfig, such as sparsek.preset('tiny')"
  )
