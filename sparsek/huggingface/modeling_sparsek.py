"""SPARSEK models (Lou et al. 2024, arXiv 2406.16747) in plain PyTorch, for transformers 5:

  AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True)

A scorer gives every token a score per key/value head. A query attends to the last `window` tokens
and to the k best-scored ones before them, so a cache holds k + window keys however long the text
is. Scores u become gates clip(u - tau, 0, 1), whose sum is k: through them the scorer learns; it
learns nothing from tokens fed after a cache. Time and memory are O(n (k + window)). Rows may be
padded, in generation on the left, but not packed. Thresholds need float64, which MPS lacks. Shapes:
B batch, N new tokens, H query heads, G key/value heads, D head dimension.
"""

import math
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils import can_return_tuple

QUERIES, CHANNELS = 256, 32  # that attend at a time; of a scorer's convolution
SLOTS = "slot_key", "slot_value", "slot_score"  # in the state of a layer
PRIOR_COUNT = 8.0  # pseudo-tokens of variance 1 in the moments of a scorer's logits
# What transformers calls a cache: the first name from 5.24 on.
CACHE = "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"
State, Maybe, Rope = dict[str, Tensor], Tensor | None, tuple[Tensor, Tensor] | None


class SparsekConfig(PretrainedConfig):
  """Settings of a model; its section `sparsek` holds those that other models do not have."""

  model_type = "sparsek"
  keys_to_ignore_at_inference = [CACHE]

  def __init__(self, sparsek=None, use_cache=True, **kwargs):
    super().__init__(**kwargs)
    self.sparsek, self.use_cache = sparsek or {}, use_cache

  def norm(self) -> nn.Module:
    kind = nn.LayerNorm if self.sparsek["norm"] == "layer_norm" else nn.RMSNorm
    return kind(self.hidden_size, eps=self.norm_eps)

  def layer(self, index: int) -> tuple[str, list[tuple[list[int], int, int]]]:
    """Returns the kind of attention of a layer, and key/value heads with their k and window.

    Its term is like "sparsek:k64:w8" or "sparsek:k64:w8:h0.2-3:k9", where heads 0, 2, 3 have k 9.
    """
    pattern, groups = self.sparsek["attention"], []
    kind, *parts = pattern[index % len(pattern)].split(":")
    k, window, heads = self.sparsek["k"], self.sparsek["window"], range(self.num_key_value_heads)
    for name, value in ((part[0], part[1:]) for part in parts):
      if name == "h":
        ends = [list(map(int, run.split("-"))) for run in value.split(".")]
        own = [head for run in ends for head in range(run[0], run[-1] + 1)]
        groups.append(([head for head in heads if head not in own], k, window))
        heads = own
      k, window = int(value) if name == "k" else k, int(value) if name == "w" else window
    return kind, [*groups, (list(heads), k, window)]


class SparsekCache(Cache):
  """State of generation: `length` in columns; of each row, its tokens (`position`) and whether
  padding came after them (`ended`); `states` of the layers, see `Attention`."""

  is_croppable = False  # dropped keys cannot be brought back
  is_linear = (False,)  # so that transformers feeds only tokens that come after it

  def __init__(self):
    super().__init__(layers=[])
    self.reset()

  def get_seq_length(self, layer_idx: int = 0) -> int:
    return self.length

  def reorder_cache(self, beam_idx: Tensor) -> None:
    row = lambda x: x[beam_idx.to(x.device)]
    self.position, self.ended = row(self.position), row(self.ended)
    for state in self.states.values():
      state.update({name: row(x) for name, x in state.items()})

  batch_select_indices = reorder_cache

  def batch_repeat_interleave(self, repeats: int) -> None:
    rows = torch.arange(len(self.position), device=self.position.device)
    self.reorder_cache(rows.repeat_interleave(repeats))

  def reset(self) -> None:
    self.length, self.position, self.ended, self.states = 0, None, None, {}

  def crop(self, *args, **kwargs) -> None:
    raise NotImplementedError("a SparsekCache cannot be cropped: dropped keys do not come back")


def thresholds(scores: Tensor, enters: Tensor, k: int, queries: int) -> Tensor:
  """Returns tau [..., queries] of each query's candidates; -inf while they are at most k.

  tau never decreases, so with a guess for all queries each candidate's gate is 1, a fraction and 0
  on intervals of queries, and sums over candidates are prefix sums. Bisection over the sorted
  breakpoints u - 1 and u finds the linear piece that holds tau. Scores [..., M] are -inf for what
  is no candidate; they enter [M] with their first query, and get the thresholds' gradient.
  """
  present = scores > -math.inf
  u, weight = torch.where(present, scores, 0).double(), present.double()
  z, enters = u.detach(), enters.expand(u.shape)
  points = torch.cat([z - 1, z], -1).sort(-1).values

  def sums(x, first, end):
    """Returns, for each query, the sum of the x whose interval of queries it is in."""
    zeros = x.new_zeros(*x.shape[:-1], queries + 1)
    return zeros.scatter_add(-1, first, x).scatter_add(-1, end, -x).cumsum(-1)[..., :queries]

  def pieces(rank):
    """Returns points; right of them, the number of gates of 1, that of fractions, their sum."""
    t = points.gather(-1, rank)
    at_one = torch.maximum(torch.searchsorted(t, z - 1), enters)
    above = torch.maximum(torch.searchsorted(t, z), at_one)
    ones, count = sums(weight, enters, at_one), sums(weight, at_one, above)
    return t, ones, count, sums(u * weight, at_one, above)

  low = torch.zeros(*z.shape[:-1], queries, dtype=torch.long, device=z.device)
  high = low + points.shape[-1] - 1
  with torch.no_grad():
    for _ in range((points.shape[-1] - 1).bit_length()):
      middle = (low + high) // 2
      t, ones, count, total = pieces(middle)
      below = ones + total - t * count > k + 1e-9
      low = torch.where(below, middle, low).cummax(-1).values
      high = torch.where(below, high, middle).flip(-1).cummin(-1).values.flip(-1)
  _, ones, count, total = pieces(low)
  tau = (total + ones - k) / count.round().clamp(min=1)
  candidates = sums(weight, enters, torch.full_like(enters, queries)).round()
  return torch.where(candidates > k, tau, -math.inf).float()


def best(scores: Tensor, k: int) -> Tensor:
  """Returns indices of the k best scores, best first; of equal ones the earlier comes first."""
  return scores.detach().sort(dim=-1, descending=True, stable=True).indices[..., :k]


def fixed_noise(layer: int, position: Tensor, heads: int) -> Tensor:
  """Returns standard normal noise [B, N, heads], a hash of layer, head and position."""

  def mix(bits):
    bits = ((bits ^ (bits >> 16)) * 0x85EBCA6B) % 2**32
    bits = ((bits ^ (bits >> 13)) * 0xC2B2AE35) % 2**32
    return bits ^ (bits >> 16)

  head = torch.arange(heads, device=position.device) * 0x7F4A7C15
  salt = mix((mix((layer * 0x9E3779B1 + 1) % 2**32) + head) % 2**32)
  bits = mix(mix(position % 2**32)[..., None] ^ salt)
  return torch.special.ndtri(((bits >> 9).float() + 0.5) / 2**23)


class Scorer(nn.Module):
  """Scores u of tokens, in float32, from the hidden states that attention reads.

  u = scale z + slope position / 1024 + ..., with z the product x W ("linear"), plus a convolution
  of the neighbours ("conv"), normalised causally over time. "random" has fixed noise for z.
  """

  def __init__(self, config: SparsekConfig, layer: int):
    super().__init__()
    self.settings = s = config.sparsek
    self.layer, self.heads = layer, config.num_key_value_heads
    self.outputs = 1 if s["scorer_shared"] else self.heads
    self.is_conv = s["scorer"] == "conv"
    reach = (s["scorer_lookback"], s["scorer_lookahead"]) if self.is_conv else (0, 0)
    (self.lookback, self.delay), self.taps = reach, 1 + sum(reach)  # final `delay` tokens later
    if s["scorer"] == "random":
      return
    self.linear = nn.Linear(config.hidden_size, self.outputs, bias=False)
    if self.is_conv:
      self.conv_in = nn.Linear(config.hidden_size, CHANNELS, bias=False)
      self.conv = nn.Linear(self.taps * CHANNELS, CHANNELS, bias=False)
      self.conv_out = nn.Linear(CHANNELS, self.outputs, bias=False)
    start = lambda name: nn.Parameter(torch.full((self.outputs,), float(s[f"scorer_init_{name}"])))
    self.scale, self.slope = start("scale"), start("slope")
    self.amplitude = start("noise") if s["scorer_init_noise"] else None
    self.sink = start("sink") if s["scorer_init_sink"] else None

  def empty(self, batch: int, device: torch.device) -> State:
    """Returns the state before the first token."""
    zeros = lambda *shape: torch.zeros(batch, *shape, device=device)
    columns, late = self.outputs + CHANNELS * self.is_conv, zeros(self.delay).long() - 1
    moments = zeros(self.outputs, 2).double()
    return {"columns": zeros(self.taps - 1, columns), "moments": moments, "late": late}

  def forward(self, x: Tensor, position: Tensor, state: State) -> tuple[Tensor, State]:
    """Returns the scores [B, G, N] of N columns, up to `delay` before the last, and the state."""
    s, length = self.settings, x.shape[1]
    position, real = torch.cat([state["late"], position], 1), (position >= 0)[..., None]
    state, position = state | {"late": position[:, length:]}, position[:, :length]
    if s["scorer"] == "random":
      u = s["scorer_init_scale"] * fixed_noise(self.layer, position, self.outputs)
      u = u + s["scorer_init_slope"] * position[..., None] / 1024
      u = u + s["scorer_init_sink"] * (position == 0)[..., None]
    else:
      with torch.autocast(x.device.type, enabled=False):
        z, state = self._logits(x, real, position, state)
      u = self.scale * z + self.slope * position[..., None] / 1024
      if self.amplitude is not None:
        u = u + self.amplitude * fixed_noise(self.layer, position, self.outputs)
      if self.sink is not None:
        u = u + self.sink * (position == 0)[..., None]
    u = torch.where((position >= 0)[..., None], u, -math.inf).transpose(1, 2)
    return u.expand(-1, self.heads, -1), state

  def _logits(self, x, real, position, state):
    """Returns z [B, N, scores], and the next state."""
    product = lambda module, x: module(x.to(module.weight.dtype)).float()
    inputs = [self.linear, self.conv_in] if self.is_conv else [self.linear]
    new = torch.cat([product(module, x) for module in inputs], -1) * real
    columns = torch.cat([state["columns"], new], 1)
    z = columns[:, self.lookback : self.lookback + x.shape[1], : self.outputs]
    if self.is_conv:
      taps = columns[..., self.outputs :].unfold(1, self.taps, 1).transpose(2, 3).flatten(2)
      z = z + product(self.conv_out, F.silu(product(self.conv, taps)))
    state = state | {"columns": columns[:, x.shape[1] :]}
    if not self.settings["scorer_normalize"]:
      return z, state
    counted = torch.where(position[..., None] >= 0, z.double(), 0)
    count = (position + 1).clamp(min=1)[..., None]
    sums = state["moments"][:, None] + torch.stack([counted, counted**2], -1).cumsum(1)
    mean = sums[..., 0] / count
    deviation = (sums[..., 1] - sums[..., 0] * mean).clamp(min=0)
    z = (counted - mean) / ((deviation + PRIOR_COUNT) / (count + PRIOR_COUNT)).sqrt()
    return z.float(), state | {"moments": sums[:, -1]}


class Attention(nn.Module):
  """SPARSEK attention, or attention to a sliding window or to all tokens.

  State of a layer: that of its `Heads`, under names that begin with their number, and that of its
  scorer.
  """

  def __init__(self, config: SparsekConfig, layer: int):
    super().__init__()
    self.head_dim, self.has_norm = config.head_dim, config.qk_norm
    self.groups = config.num_key_value_heads
    width, bias, wide = config.hidden_size, config.attention_bias, self.groups * self.head_dim
    self.k_proj, self.v_proj = nn.Linear(width, wide, bias), nn.Linear(width, wide, bias)
    wide = config.num_attention_heads * self.head_dim
    self.q_proj = nn.Linear(width, wide, bias)
    self.o_proj = nn.Linear(wide, width, config.attention_out_bias)
    if self.has_norm:
      self.q_norm, self.k_norm = (nn.RMSNorm(self.head_dim, config.norm_eps) for _ in "qk")
    kind, groups = config.layer(layer)
    self.scorer = Scorer(config, layer) if kind == "sparsek" else None
    self.heads = [Heads(config.sparsek["gate"], self.scorer, kind, *group) for group in groups]

  def forward(
    self, x: Tensor, rope: Rope, position: Tensor, state: State | None, keep: bool
  ) -> tuple[Tensor, State]:
    """Returns attention's output, and the layer's next state if it is to be kept."""
    by_head = lambda y: y.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
    query, key, value = by_head(self.q_proj(x)), by_head(self.k_proj(x)), by_head(self.v_proj(x))
    if self.has_norm:
      query, key = self.q_norm(query), self.k_norm(key)
    if rope is not None:
      query, key = rotate(query, *rope), rotate(key, *rope)
    state, scores, new, mixed = state or {}, None, {}, {}
    if self.scorer:
      scores, new = self.scorer(x, position, state or self.scorer.empty(len(x), x.device))
    arrays = query.unflatten(1, (self.groups, -1)), key, value, scores
    for i, heads in enumerate(self.heads):
      own = {name[2:]: y for name, y in state.items() if name[0] == str(i)}
      of_heads = [y if y is None else y[:, heads.index] for y in arrays]
      part, own = heads(*of_heads, position, own, keep)
      mixed |= zip(heads.index, part.unbind(1))
      new |= {f"{i}.{name}": y for name, y in own.items()}
    mixed = torch.cat([mixed[head] for head in range(self.groups)], 1)
    # Copies, since views would keep all columns in memory.
    new = {name: y.clone() for name, y in new.items()} if keep and len(x[0]) > 1 else new
    return self.o_proj(mixed.transpose(1, 2).flatten(2)), new


class Heads:
  """Attention of key/value heads that have the same k and window, and of their query heads.

  With k 0 they see their window alone. State: `key`, `value` and `real` (False for padding) of the
  last `window` columns, or of all with full attention, which alone grows. With SPARSEK also keys,
  values and scores of the best candidates (`slot_...`), scores of columns that are no candidates
  yet (`pending`), and, for gates that need thresholds, other candidates' scores above the threshold
  (`support`).
  """

  def __init__(self, gate, scorer, kind, index, k, window):
    self.gate, self.index, self.k, self.window = gate, index, k, window
    self.is_full, self.selects = kind == "full", kind == "sparsek" and k > 0
    self.delay = scorer.delay if self.selects else 0

  def empty(self, value: Tensor, keep: bool) -> State:
    """Returns the state before the first token; without `keep`, no larger than it must be."""
    batch, groups, length, head_dim = value.shape
    front = self.window if keep else min(self.window, max(length, self.delay))
    front, slots = 0 if self.is_full else front, self.k if keep and self.selects else 0
    support = 8 * self.k + 64 if keep and self.gate != "straight_through" else 0
    rows = lambda size: value.new_zeros(batch, groups, size, head_dim)
    scores = lambda size: torch.full((batch, groups, size), -math.inf, device=value.device)
    state = {"key": rows(front), "value": rows(front), "real": scores(front)[:, 0] > 0}
    state |= zip(SLOTS, (rows(slots), rows(slots), scores(slots)))
    if self.selects:
      state |= {"pending": scores(front - self.delay), "support": scores(support)}
    return state

  def __call__(self, query, key, value, scores, position, state, keep):
    """Returns what N new queries [B, G, H / G, N, D] read, and the next state if it is to be kept.

    `scores` [B, G, N] have become final. An empty `state` is that before the first token.
    """
    length, learns = query.shape[3], not state and torch.is_grad_enabled()
    state = state or self.empty(value, keep)
    key, value = torch.cat([state["key"], key], 2), torch.cat([state["value"], value], 2)
    real = torch.cat([state["real"], position >= 0], 1)
    slots, entering, tau = [state[name] for name in SLOTS], None, None
    if self.selects:
      scores = torch.cat([state["pending"], scores], 2)
      entering = scores[..., :length]
      known = torch.cat([slots[2], state["support"], entering], 2)
      if self.gate != "straight_through" or (learns and entering.requires_grad):
        index = torch.arange(known.shape[2], device=query.device)
        tau = thresholds(known, (index - known.shape[2] + length).clamp(min=0), self.k, length)
    mixed, slots = self._attend(query, key, value, real, slots, entering, tau, keep)
    if keep:
      first = slice(0 if self.is_full else length, None)
      state = state | {"key": key[:, :, first], "value": value[:, :, first], "real": real[:, first]}
      state |= zip(SLOTS, slots)
    if keep and self.selects:
      state["pending"], size = scores[..., length:], state["support"].shape[2]
      if size:
        rest = known.sort(-1, descending=True).values[..., self.k : self.k + size]
        state["support"] = torch.where(rest > tau[..., -1:], rest, -math.inf)
    return mixed, state

  def _attend(self, query, key, value, real, slots, entering, tau, keep):
    """Attends from blocks of queries; returns what they read, and the slots after the last one."""
    length, mixed, saves = query.shape[3], [], query.shape[3] > QUERIES and torch.is_grad_enabled()
    run = partial(checkpoint, self._mix, use_reentrant=False) if saves else self._mix
    for first in range(0, length, QUERIES):
      now = slice(first, min(first + QUERIES, length))
      near = slice(0 if self.is_full else first, now.stop + key.shape[2] - length)
      part = lambda x: None if x is None else x[:, :, now]
      block = query[:, :, :, now], key[:, :, near], value[:, :, near], real[:, near], slots
      mixed.append(run(*block, part(entering), part(tau)))
      if entering is not None and (keep or now.stop < length):
        both = [torch.cat([old, part(x)], 2) for old, x in zip(slots, (key, value, entering))]
        index = best(both[2], self.k)
        rows = [x.take_along_dim(index[..., None], 2) for x in both[:2]]
        slots = [*rows, both[2].gather(2, index)]
    return torch.cat(mixed, 3), slots

  def _mix(self, query, key, value, real, slots, entering, tau):
    """Returns what C consecutive queries [B, G, H / G, C, D] read.

    Keys and values [B, G, T, D] and `real` [B, T] are those from the first query's window to the
    last query, `slots` the keys, values and scores of the best candidates before these queries.
    The first C keys become candidates, each with the query of its index: `entering` [B, G, C] are
    their scores, None without selection. `tau` [B, G, C] is None where all gates are 1.
    """
    count, length, old = query.shape[3], key.shape[2], slots[2].shape[2]
    i = torch.arange(count, device=query.device)[:, None]
    j = torch.arange(length, device=query.device)
    near = (j <= i + length - count) & ((j > i) | self.is_full)
    visible, gates = (near & real[:, None])[:, None], None
    if entering is not None:
      u = torch.cat([slots[2], entering], 2)[:, :, None]
      known = (torch.arange(u.shape[-1], device=u.device) <= old + i) & (u > -math.inf)
      chosen = best(torch.where(known, u, -math.inf), self.k)
      chosen = torch.zeros_like(known).scatter(-1, chosen, True) & known
      pad = lambda x: F.pad(x, (0, length - count))
      visible = torch.cat([chosen[..., :old], visible | pad(chosen[..., old:])], -1)
      key, value = torch.cat([slots[0], key], 2), torch.cat([slots[1], value], 2)
      if tau is not None:
        p = torch.where(known, u - tau[..., None], 0)
        p = torch.where((p > 0) & (p < 1), p, (p >= 1).float())
        p = p + (1 - p).detach() if self.gate == "straight_through" else p
        gates = torch.cat([p[..., :old], torch.where(near, 1, pad(p[..., old:]))], -1)[:, :, None]
    visible = visible[:, :, None]
    logits = (query @ key[:, :, None].transpose(-1, -2)).float() * query.shape[-1] ** -0.5
    if gates is not None and self.gate == "key_value":
      logits = logits * gates
    weights = logits.masked_fill(~visible, torch.finfo(logits.dtype).min).softmax(-1)
    weights = weights * (visible if gates is None else visible * gates)
    return weights.to(value.dtype) @ value[:, :, None]


def rope_angles(config: SparsekConfig, position: Tensor) -> tuple[Tensor, Tensor]:
  """Returns cosine and sine [B, 1, N, pairs] of the angles of the rotated pairs of features."""
  s = config.sparsek
  half = int(config.head_dim * s["rope_fraction"]) // 2
  f = s["rope_theta"] ** (-torch.arange(half, dtype=torch.double, device=position.device) / half)
  kind, *numbers = s["rope_scaling"] or ["none"]
  if kind == "linear":
    f = f / numbers[0]
  elif kind == "llama3":
    factor, low, high, original = numbers
    stay = ((original * f / (2 * math.pi) - low) / (high - low)).clamp(0, 1)
    f = stay * f + (1 - stay) * f / factor
  angle = position[:, None, :, None] * f
  return angle.cos().float(), angle.sin().float()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
  """Rotates the first pairs of features of x [B, heads, N, D]."""
  half = cos.shape[-1]
  a, b = x[..., :half].float(), x[..., half : 2 * half].float()
  rotated = torch.cat([a * cos - b * sin, b * cos + a * sin], -1).to(x.dtype)
  return torch.cat([rotated, x[..., 2 * half :]], -1)


class MLP(nn.Module):
  """down(silu(gate(x)) up(x)), or down(gelu(up(x)))."""

  def __init__(self, config: SparsekConfig):
    super().__init__()
    self.kind, sizes = config.sparsek["mlp"], (config.hidden_size, config.intermediate_size)
    if self.kind == "swiglu":
      self.gate_proj = nn.Linear(*sizes, config.mlp_bias)
    self.up_proj = nn.Linear(*sizes, config.mlp_bias)
    self.down_proj = nn.Linear(*sizes[::-1], config.mlp_bias)

  def forward(self, x: Tensor) -> Tensor:
    if self.kind == "swiglu":
      return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
    kind = {"gelu": "none", "gelu_tanh": "tanh"}[self.kind]
    return self.down_proj(F.gelu(self.up_proj(x), approximate=kind))


class Layer(GradientCheckpointingLayer):
  """Attention and MLP, one after the other or side by side."""

  def __init__(self, config: SparsekConfig, index: int):
    super().__init__()
    self.is_parallel, self.input_layernorm = config.use_parallel_residual, config.norm()
    self.self_attn, self.post_attention_layernorm = Attention(config, index), config.norm()
    self.mlp = MLP(config)

  def forward(self, x: Tensor, *args) -> tuple[Tensor, State]:
    mixed, state = self.self_attn(self.input_layernorm(x), *args)
    y = x + mixed
    return y + self.mlp(self.post_attention_layernorm(x if self.is_parallel else y)), state


class SparsekPreTrainedModel(PreTrainedModel):
  config_class, base_model_prefix = SparsekConfig, "model"
  _no_split_modules = ["Layer"]
  _keep_in_fp32_modules = _keep_in_fp32_modules_strict = ["scorer"]
  supports_gradient_checkpointing = _is_stateful = True


class SparsekModel(SparsekPreTrainedModel):
  """The decoder, up to its final norm."""

  def __init__(self, config: SparsekConfig):
    super().__init__(config)
    self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
    count = config.max_position_embeddings if config.sparsek["positions"] == "learned" else 0
    self.embed_positions = nn.Embedding(count, config.hidden_size) if count else None
    self.layers = nn.ModuleList(Layer(config, i) for i in range(config.num_hidden_layers))
    self.norm = config.norm()
    self.post_init()

  def forward(
    self, input_ids: Maybe = None, attention_mask: Maybe = None, position_ids: Maybe = None,
    inputs_embeds: Maybe = None, use_cache: bool | None = None, output_hidden_states: bool = False,
    **kwargs,
  ) -> BaseModelOutputWithPast:  # fmt: skip
    if (input_ids is None) == (inputs_embeds is None):
      raise ValueError("give exactly one of input_ids and inputs_embeds")
    x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
    if not x.shape[1]:
      raise ValueError("there are no new tokens: input_ids has none after those of the cache")
    use_cache = self.config.use_cache and not self.training if use_cache is None else use_cache
    cache = kwargs["cache"] if kwargs.get("cache") is not None else kwargs.get("past_key_values")
    cache = SparsekCache() if use_cache and cache is None else cache
    if cache is not None and not isinstance(cache, SparsekCache):
      raise TypeError(f"{CACHE} is a {type(cache).__name__}, and this model needs a SparsekCache")
    position = self._positions(x, attention_mask, position_ids, cache)
    at = position.clamp(min=0)
    rope = rope_angles(self.config, at) if self.embed_positions is None else None
    x = x if rope else x + self.embed_positions(at)
    states, hidden = {} if cache is None else cache.states, [x]
    for i, layer in enumerate(self.layers):
      x, states[i] = layer(x, rope, position, states.get(i), cache is not None)
      hidden.append(x)
    hidden[-1] = x = self.norm(x)
    hidden = tuple(hidden) if output_hidden_states else None
    return BaseModelOutputWithPast(last_hidden_state=x, hidden_states=hidden, **{CACHE: cache})

  def _positions(self, x, attention_mask, position_ids, cache):
    """Returns the position [B, N] of each new token in its row, -1 for padding."""
    real = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
    if attention_mask is not None:
      if attention_mask.ndim != 2:
        raise ValueError(f"attention_mask has shape {tuple(attention_mask.shape)}, not [batch, n]")
      real = attention_mask[:, -x.shape[1] :].to(x.device).bool()
    seen, ended = real.cumsum(1), torch.zeros_like(real)
    if cache is not None and cache.position is not None:
      seen, ended = seen + cache.position[:, None], ended | cache.ended[:, None]
    ended = ended | (((seen > 0) & ~real).cumsum(1) > 0)
    position = torch.where(real, seen - 1, -1)
    if not torch.compiler.is_compiling():
      if (ended & real).any():
        raise ValueError("attention_mask has padding between the tokens of a row: pad on the left")
      if position_ids is not None and ((position_ids != position) & real).any():
        raise ValueError("position_ids must count each row's tokens: packed rows are not supported")
    if cache is not None:
      cache.length += x.shape[1]
      cache.position, cache.ended = seen[:, -1], ended[:, -1]
    return position


class SparsekForCausalLM(SparsekPreTrainedModel, GenerationMixin):
  """The decoder with the output matrix."""

  _supports_default_dynamic_cache = classmethod(lambda cls: False)  # it makes its own cache
  _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

  def __init__(self, config: SparsekConfig):
    super().__init__(config)
    self.model = SparsekModel(config)
    self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
    self.post_init()

  @can_return_tuple
  def forward(
    self, input_ids: Maybe = None, attention_mask: Maybe = None, position_ids: Maybe = None,
    inputs_embeds: Maybe = None, labels: Maybe = None, logits_to_keep: int | Tensor = 0,
    cache: SparsekCache | None = None, past_key_values: SparsekCache | None = None, **kwargs,
  ) -> CausalLMOutputWithPast:  # fmt: skip
    """Returns logits [B, N, vocabulary] float32, and the loss where there are labels [B, N], which
    are the tokens themselves, or -100.

    The mask [B, N], or [B, columns so far] after a cache, is 0 for padding; position_ids may only
    count each row's tokens. logits_to_keep: number of last columns that get logits, 0 for all, or
    their indices. cache and past_key_values are the same. kwargs: use_cache, output_hidden_states.
    """
    cache = past_key_values if cache is None else cache
    inputs = input_ids, attention_mask, position_ids, inputs_embeds
    output = self.model(*inputs, cache=cache, **kwargs)
    keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
    logits, loss = self.lm_head(output.last_hidden_state[:, keep]).float(), None
    if labels is not None:
      loss = self.loss_function(logits, labels, self.config.vocab_size, **kwargs)
    return CausalLMOutputWithPast(
      loss=loss, logits=logits, hidden_states=output.hidden_states, **{CACHE: output.get(CACHE)}
    )

  def _prepare_cache_for_generation(self, generation_config, model_kwargs, *args, **kwargs) -> None:
    super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)
    chunks = generation_config.prefill_chunk_size and generation_config.use_cache is not False
    if chunks and model_kwargs.get(CACHE) is None:
      model_kwargs[CACHE] = SparsekCache()  # which is made later for a prompt that is read at once

  def prepare_inputs_for_generation(self, input_ids: Tensor, **kwargs) -> dict:
    names = CACHE, "attention_mask", "use_cache", "logits_to_keep", "output_hidden_states"
    inputs = {name: kwargs[name] for name in names if name in kwargs}
    cache, mask, length = inputs.get(CACHE), inputs.get("attention_mask"), input_ids.shape[1]
    new = kwargs.get("next_sequence_length")  # absent for a chunk, whose ids are all new
    new = length if new is None else new
    if mask is not None:  # it is dropped where there is no padding
      new = mask.shape[1] - (0 if cache is None else cache.length)
    return inputs | {"input_ids": input_ids[:, length - new :]}
