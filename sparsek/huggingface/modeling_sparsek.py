"""SPARSEK models (Lou et al. 2024, arXiv 2406.16747) in plain PyTorch, for transformers 5.

  model = AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True)

A layer with SPARSEK attention scores every token once per key/value head. A query attends to its
last `window` tokens and to the k best-scored tokens before them, so a cache holds k + window keys
and values per head however long the text is. The scores of a query's candidates become gates
between 0 and 1, `p_j = clip(u_j - tau, 0, 1)` with `sum p = k`, through which the scorer learns.
Time and memory are O(n (k + window)). Rows may be padded on one side, left in generation; packed
documents are not supported. Thresholds tau are computed in float64, which MPS devices lack.

Shapes: B batch, N new tokens, H query heads, G key/value heads, D head dimension, E width.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils import can_return_tuple

QUERIES = 256  # that attend at a time
CHANNELS = 32  # of a scorer's convolution
PRIOR_COUNT = 8.0  # pseudo-tokens of variance 1 in the moments of a scorer's logits
# transformers 5.24 renames past_key_values to cache.
IS_NEW = "cache" in CausalLMOutputWithPast.__dataclass_fields__
CACHE = "cache" if IS_NEW else "past_key_values"
State = dict[str, torch.Tensor]


class SparsekConfig(PretrainedConfig):
  """Settings of a model; the section `sparsek` holds those that other models do not have."""

  model_type = "sparsek"
  keys_to_ignore_at_inference = [CACHE]

  def __init__(self, sparsek=None, use_cache=True, **kwargs):
    super().__init__(**kwargs)
    self.sparsek, self.use_cache = sparsek or {}, use_cache

  def layer(self, index: int) -> tuple[str, int, int]:
    """Returns the kind of attention, k and window of a layer, of a term like "sparsek:k64:w8"."""
    pattern = self.sparsek["attention"]
    kind, *numbers = pattern[index % len(pattern)].split(":")
    if kind not in ("sparsek", "sliding_window", "full"):
      raise NotImplementedError(f"attention {kind!r} is not sparsek, sliding_window or full")
    own = {number[0]: int(number[1:]) for number in numbers}
    return kind, own.get("k", self.sparsek["k"]), own.get("w", self.sparsek["window"])


class SparsekCache(Cache):
  """State of generation.

  Attributes:
    length: columns so far, padding included.
    position: [B] tokens of each row so far; None before the first.
    ended: [B] whether padding followed a row's tokens.
    states: tensors of each layer, see `Attention`; their size does not depend on the length, except
      in layers with full attention.
  """

  is_croppable = False

  def __init__(self):
    super().__init__(layers=[])
    self.reset()

  def reset(self) -> None:
    self.length, self.position, self.ended = 0, None, None
    self.states: dict[int, State] = {}

  def rows(self, zeros: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return (zeros, zeros > 0) if self.position is None else (self.position, self.ended)

  def get_seq_length(self, layer_idx: int = 0) -> int:
    return self.length

  def get_max_length(self, layer_idx: int | None = None) -> int:
    return -1

  get_max_cache_shape = get_max_length

  def batch_select_indices(self, indices: torch.Tensor) -> None:
    self.position, self.ended = self.position[indices], self.ended[indices]
    for state in self.states.values():
      state.update({name: x[indices] for name, x in state.items()})

  reorder_cache = batch_select_indices

  def batch_repeat_interleave(self, repeats: int) -> None:
    rows = torch.arange(len(self.position), device=self.position.device)
    self.batch_select_indices(rows.repeat_interleave(repeats))

  def crop(self, *_) -> None:
    raise NotImplementedError("dropped keys cannot be brought back: the cache cannot be cropped")


def thresholds(scores: torch.Tensor, enters: torch.Tensor, k: int, queries: int) -> torch.Tensor:
  """Returns tau [..., queries] of every query's candidates; -inf while they are at most k.

  tau never decreases, so a guess for all queries puts each candidate's time as 1, as a fraction and
  as 0 on intervals of queries, and sums over candidates are prefix sums. Bisection over the sorted
  breakpoints u - 1 and u finds the linear piece that holds tau.

  Args:
    scores: [..., M], -inf for what is no candidate. The thresholds' gradient reaches them.
    enters: [M] first query of which a token is a candidate.
  """
  present = scores > -math.inf
  u = torch.where(present, scores, 0).double()
  z, weight = u.detach(), present.double()
  points = torch.cat([z - 1, z], -1).sort(-1).values
  enters = enters.expand(z.shape)

  def sums(x, first, end):
    """Returns the sum, for each query, of the x whose interval of queries holds it."""
    zeros = x.new_zeros(*x.shape[:-1], queries + 1)
    return zeros.scatter_add(-1, first, x).scatter_add(-1, end, -x).cumsum(-1)[..., :queries]

  def pieces(rank):
    """Returns points, number at 1, number of fractions and their sum right of these points."""
    t = points.gather(-1, rank)
    at_one = torch.maximum(torch.searchsorted(t, z - 1), enters)
    above = torch.maximum(torch.searchsorted(t, z), at_one)
    count = sums(weight, at_one, above)
    return t, sums(weight, enters, at_one), count, sums(u * weight, at_one, above)

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
  candidates = sums(weight, enters, torch.full_like(enters, queries))
  return torch.where(candidates.round() > k, tau, -math.inf).float()


def best(scores: torch.Tensor, k: int) -> torch.Tensor:
  """Returns the indices of the k best scores, best first; of equal ones the earlier."""
  return scores.detach().sort(dim=-1, descending=True, stable=True).indices[..., :k]


def fixed_noise(layer: int, position: torch.Tensor, heads: int) -> torch.Tensor:
  """Returns standard normal noise [B, N, heads], a hash of layer, head and position."""
  mask = 2**32 - 1

  def mix(bits):
    bits = ((bits ^ (bits >> 16)) * 0x85EBCA6B) & mask
    bits = ((bits ^ (bits >> 13)) * 0xC2B2AE35) & mask
    return bits ^ (bits >> 16)

  head = torch.arange(heads, device=position.device)
  salt = mix((mix((layer * 0x9E3779B1 + 1) & mask) + head * 0x7F4A7C15) & mask)
  bits = mix(mix(position)[..., None] ^ salt)
  return torch.special.ndtri(((bits >> 9).float() + 0.5) / 2**23)


class Scorer(nn.Module):
  """Scores u of tokens, in float32, from the hidden states that attention reads.

  u = scale z + slope position / 1024 + ..., with z the product x W ("linear"), plus a convolution
  of the neighbours ("conv"), normalised causally over time. "random" is fixed noise alone.
  """

  def __init__(self, config: SparsekConfig, layer: int):
    super().__init__()
    self.settings = s = config.sparsek
    self.layer, self.heads = layer, config.num_key_value_heads
    self.outputs = 1 if s["scorer_shared"] else self.heads
    is_conv = s["scorer"] == "conv"
    self.delay = s["scorer_lookahead"] if is_conv else 0  # tokens until a score is final
    self.taps = s["scorer_lookback"] + self.delay + 1 if is_conv else 1
    if s["scorer"] == "random":
      return
    linear = lambda inputs, outputs: nn.Linear(inputs, outputs, bias=False)
    self.linear = linear(config.hidden_size, self.outputs)
    if is_conv:
      self.conv_in = linear(config.hidden_size, CHANNELS)
      self.conv = linear(self.taps * CHANNELS, CHANNELS)
      self.conv_out = linear(CHANNELS, self.outputs)
    for name, field in (
      ("scale", "scale"),
      ("slope", "slope"),
      ("amplitude", "noise"),
      ("sink",) * 2,
    ):
      start = float(s[f"scorer_init_{field}"])
      has_it = start or field in ("scale", "slope")
      setattr(self, name, nn.Parameter(torch.full((self.outputs,), start)) if has_it else None)

  def empty(self, batch: int, device: torch.device) -> State:
    """Returns the state before the first token."""
    zeros = lambda *shape: torch.zeros(batch, *shape, device=device)
    return {
      "late_position": zeros(self.delay).long() - 1,
      "late_logits": zeros(self.delay, self.outputs),
      "channels": zeros(self.taps - 1, CHANNELS),
      "sum": zeros(self.outputs).double(),
      "squares": zeros(self.outputs).double(),
    }

  def forward(self, x: torch.Tensor, position: torch.Tensor, state: State):
    """Returns the N scores [B, G, N] that become final with N new tokens, and the next state.

    They are those of the columns `delay` before the new ones; -inf for padding.
    """
    s, length = self.settings, x.shape[1]
    positions = torch.cat([state["late_position"], position], 1)
    final = positions[:, :length]
    if s["scorer"] == "random":
      noise = fixed_noise(self.layer, final, self.outputs)
      u = s["scorer_init_scale"] * noise + s["scorer_init_slope"] * final[..., None] / 1024
      return self.for_heads(u, final), state
    product = lambda module, x: F.linear(x.float(), module.weight.float())
    logits = torch.cat([state["late_logits"], product(self.linear, x)], 1)
    new = {"late_position": positions[:, length:], "late_logits": logits[:, length:]}
    logits = logits[:, :length]
    if s["scorer"] == "conv":
      real = (position >= 0)[..., None]
      channels = torch.cat([state["channels"], product(self.conv_in, x) * real], 1)
      taps = channels.unfold(1, self.taps, 1).transpose(2, 3).flatten(2)
      logits = logits + product(self.conv_out, F.silu(product(self.conv, taps)))
      new["channels"] = channels[:, length:]
    if s["scorer_normalize"]:
      counted = torch.where(final[..., None] >= 0, logits.double(), 0)
      count = (final + 1).clamp(min=1)[..., None].double()
      total = state["sum"][:, None] + counted.cumsum(1)
      squares = state["squares"][:, None] + counted.square().cumsum(1)
      new |= {"sum": total[:, -1], "squares": squares[:, -1]}
      deviation = (squares - total.square() / count).clamp(min=0)
      spread = ((deviation + PRIOR_COUNT) / (count + PRIOR_COUNT)).sqrt()
      logits = ((counted - total / count) / spread).float()
    u = self.scale * logits + self.slope * final[..., None] / 1024
    if self.amplitude is not None:
      u = u + self.amplitude * fixed_noise(self.layer, final, self.outputs)
    if self.sink is not None:
      u = u + self.sink * (final == 0)[..., None]
    return self.for_heads(u, final), state | new

  def for_heads(self, u: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
    u = torch.where((position >= 0)[..., None], u, -math.inf).transpose(1, 2)
    return u.expand(-1, self.heads, -1)


class Attention(nn.Module):
  """SPARSEK attention, or attention to a sliding window or to all tokens.

  The state of a layer holds the columns before the new tokens (`key`, `value`, and `real`, False
  for padding): the last `window`, or all with full attention. With SPARSEK it also holds the best
  candidates (`slot_...`), the scores of columns that are no candidates yet (`pending`), and, for
  gates that need thresholds, other candidates' scores that are above the threshold (`support`).
  """

  def __init__(self, config: SparsekConfig, layer: int):
    super().__init__()
    self.kind, self.k, self.window = config.layer(layer)
    self.gate, self.head_dim = config.sparsek["gate"], config.head_dim
    self.groups = config.num_key_value_heads
    width, wide = config.hidden_size, config.num_attention_heads * config.head_dim
    bias, narrow = config.attention_bias, self.groups * config.head_dim
    self.q_proj, self.k_proj = nn.Linear(width, wide, bias), nn.Linear(width, narrow, bias)
    self.v_proj = nn.Linear(width, narrow, bias)
    self.o_proj = nn.Linear(wide, width, config.attention_out_bias)
    norm = lambda: Norm(config.head_dim, config.norm_eps) if config.qk_norm else None
    self.q_norm, self.k_norm = norm(), norm()
    self.scorer = Scorer(config, layer) if self.kind == "sparsek" else None

  def forward(self, x, rope, position, state, keep):
    """Returns attention's output, and the layer's next state if it is to be kept."""
    batch, length, _ = x.shape
    query, key, value = (
      project(x).view(batch, length, -1, self.head_dim)
      for project in (self.q_proj, self.k_proj, self.v_proj)
    )
    if self.q_norm is not None:
      query, key = self.q_norm(query), self.k_norm(key)
    query, key = rotate(query, rope).transpose(1, 2), rotate(key, rope).transpose(1, 2)
    value = value.transpose(1, 2)
    state = self.empty(value, keep) if state is None else state
    key, value = torch.cat([state["key"], key], 2), torch.cat([state["value"], value], 2)
    real = torch.cat([state["real"], position >= 0], 1)
    start = 0 if self.kind == "full" else length
    new = {"key": key[:, :, start:], "value": value[:, :, start:], "real": real[:, start:]}
    slots, entering, tau = (state["slot_key"], state["slot_value"], state["slot_score"]), None, None
    if self.scorer is not None:
      scores, state = self.scorer(x, position, state)
      scores = torch.cat([state["pending"], scores], 2)
      entering, known = scores[..., :length], torch.cat([slots[2], state["support"]], 2)
      known = torch.cat([known, entering], 2)
      if self.gate != "straight_through" or (torch.is_grad_enabled() and entering.requires_grad):
        index = torch.arange(known.shape[2], device=x.device)
        tau = thresholds(known, (index - known.shape[2] + length).clamp(min=0), self.k, length)
    mixed, slots = self.attend(query, key, value, real, slots, entering, tau, keep)
    output = self.o_proj(mixed.transpose(1, 2).flatten(2))
    if keep and self.scorer is not None:
      new["pending"] = scores[..., length:]
      missing = self.k - slots[2].shape[2]
      rows = (F.pad(x, (0, 0, 0, missing)) for x in slots[:2])
      new["slot_key"], new["slot_value"] = rows
      new["slot_score"] = F.pad(slots[2], (0, missing), value=-math.inf)
      if self.gate != "straight_through":
        beyond = known.sort(-1, descending=True).values[..., self.k : 9 * self.k + 64]
        beyond = torch.where(beyond > tau[..., -1:], beyond, -math.inf)
        new["support"] = F.pad(beyond, (0, 8 * self.k + 64 - beyond.shape[2]), value=-math.inf)
    return output, state | new if keep else None

  def empty(self, value: torch.Tensor, keep: bool) -> State:
    """Returns the state before the first token; without `keep`, no wider than it must be."""
    batch, groups, length, _ = value.shape
    delay = self.scorer.delay if self.scorer else 0
    front = self.window if keep else min(self.window, max(length, delay))
    front = 0 if self.kind == "full" else front
    rows = lambda size: value.new_zeros(batch, groups, size, self.head_dim)
    scores = lambda size: torch.full((batch, groups, size), -math.inf, device=value.device)
    state = {"key": rows(front), "value": rows(front)}
    state |= {"real": torch.zeros(batch, front, dtype=torch.bool, device=value.device)}
    state |= {"slot_key": rows(0), "slot_value": rows(0), "slot_score": scores(0)}
    if self.scorer is None:
      return state
    state |= {"support": scores(0), "pending": scores(front - delay)}
    return state | self.scorer.empty(batch, value.device)

  def attend(self, query, key, value, real, slots, entering, tau, keep):
    """Attends from blocks of queries; returns what they read, and the slots after the last one."""
    length, mixed = query.shape[2], []
    front = key.shape[2] - length
    for first in range(0, length, QUERIES):
      end = min(first + QUERIES, length)
      now = slice(first, end)
      near = slice(0 if self.kind == "full" else first, end + front)
      part = lambda x: None if x is None else x[:, :, now]
      block = query[:, :, now], key[:, :, near], value[:, :, near], real[:, near]
      block += slots, part(entering), part(tau)
      if torch.is_grad_enabled() and length > QUERIES:  # recomputed to save memory
        mixed.append(checkpoint(self.mix, *block, use_reentrant=False))
      else:
        mixed.append(self.mix(*block))
      if entering is not None and (keep or end < length):
        rows, score = (key[:, :, now], value[:, :, now]), torch.cat([slots[2], part(entering)], 2)
        index = best(score, self.k).sort(-1).values  # slots are in the order of tokens
        take = lambda old, new: torch.cat([old, new], 2).take_along_dim(index[..., None], 2)
        slots = *map(take, slots[:2], rows), score.gather(2, index)
    return torch.cat(mixed, 2), slots

  def mix(self, query, key, value, real, slots, entering, tau):
    """Returns what C consecutive queries [B, H, C, D] read.

    Args:
      key, value: [B, G, T, D], from the window of the first query up to the last query.
      real: [B, T].
      slots: keys, values and scores of the best candidates before these queries.
      entering: [B, G, C] scores of the first C keys; each becomes a candidate with the query of its
        index. None without selection.
      tau: [B, G, C] thresholds, or None where all gates are 1.
    """
    count, length = query.shape[2], key.shape[2]
    i = torch.arange(count, device=query.device)[:, None]
    j = torch.arange(length, device=query.device)
    near = (j <= i + length - count) & ((j > i) | (self.kind == "full"))
    visible, gates = (near & real[:, None])[:, None], None
    if entering is not None:
      old = slots[2].shape[2]
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
    query = query.view(len(query), self.groups, -1, count, self.head_dim)
    logits = (query @ key[:, :, None].transpose(-1, -2)).float() * self.head_dim**-0.5
    if gates is not None and self.gate == "key_value":
      logits = logits * gates
    weights = logits.masked_fill(~visible, torch.finfo(logits.dtype).min).softmax(-1)
    weights = weights * (visible if gates is None else visible * gates)
    return (weights.to(value.dtype) @ value[:, :, None]).flatten(1, 2)


def frequencies(config: SparsekConfig, device: torch.device) -> torch.Tensor:
  """Returns the angles per position of the rotated pairs of features, float64."""
  s = config.sparsek
  half = int(config.head_dim * s["rope_fraction"]) // 2
  f = s["rope_theta"] ** (-torch.arange(half, dtype=torch.double, device=device) / half)
  kind, *numbers = s["rope_scaling"] or ["none"]
  if kind == "linear":
    f = f / numbers[0]
  elif kind == "llama3":
    factor, low, high, original = numbers
    stay = ((original * f / (2 * math.pi) - low) / (high - low)).clamp(0, 1)
    f = stay * f + (1 - stay) * f / factor
  return f


def rotate(x: torch.Tensor, rope: tuple[torch.Tensor, torch.Tensor] | None) -> torch.Tensor:
  """Rotates the first pairs of features of x [B, N, heads, D]."""
  if rope is None:
    return x
  cos, sin = rope
  half = cos.shape[-1]
  a, b = x[..., :half].float(), x[..., half : 2 * half].float()
  rotated = torch.cat([a * cos - b * sin, b * cos + a * sin], -1).to(x.dtype)
  return torch.cat([rotated, x[..., 2 * half :]], -1)


class Norm(nn.Module):
  """RMS norm, or layer norm with a bias, in float32."""

  def __init__(self, width: int, epsilon: float, centred: bool = False):
    super().__init__()
    self.epsilon, self.weight = epsilon, nn.Parameter(torch.ones(width))
    self.bias = nn.Parameter(torch.zeros(width)) if centred else None

  def forward(self, x: torch.Tensor) -> torch.Tensor:
    y = x.float()
    y = y if self.bias is None else y - y.mean(-1, keepdim=True)
    y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + self.epsilon) * self.weight.float()
    return (y if self.bias is None else y + self.bias.float()).to(x.dtype)


class MLP(nn.Module):
  """down(silu(gate(x)) up(x)), or down(gelu(up(x)))."""

  def __init__(self, config: SparsekConfig):
    super().__init__()
    self.kind, bias = config.sparsek["mlp"], config.mlp_bias
    linear = lambda: nn.Linear(config.hidden_size, config.intermediate_size, bias)
    self.gate_proj = linear() if self.kind == "swiglu" else None
    self.up_proj = linear()
    self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias)

  def forward(self, x: torch.Tensor) -> torch.Tensor:
    if self.gate_proj is not None:
      return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
    approximate = "tanh" if self.kind == "gelu_tanh" else "none"
    return self.down_proj(F.gelu(self.up_proj(x), approximate=approximate))


class Layer(GradientCheckpointingLayer):
  """Attention and MLP, one after the other or side by side."""

  def __init__(self, config: SparsekConfig, index: int):
    super().__init__()
    norm = lambda: make_norm(config)
    self.parallel, self.input_layernorm = config.use_parallel_residual, norm()
    self.self_attn, self.post_attention_layernorm = Attention(config, index), norm()
    self.mlp = MLP(config)

  def forward(self, x, rope, position, state, keep):
    mixed, state = self.self_attn(self.input_layernorm(x), rope, position, state, keep)
    y = x + mixed
    return y + self.mlp(self.post_attention_layernorm(x if self.parallel else y)), state


def make_norm(config: SparsekConfig) -> Norm:
  centred = config.sparsek["norm"] == "layer_norm"
  return Norm(config.hidden_size, config.norm_eps, centred)


class SparsekPreTrainedModel(PreTrainedModel):
  """Settings for transformers."""

  config_class = SparsekConfig
  base_model_prefix = "model"
  supports_gradient_checkpointing = True
  _no_split_modules = ["Layer"]
  _keep_in_fp32_modules_strict = ["scorer"]
  _is_stateful = True


class SparsekModel(SparsekPreTrainedModel):
  """The decoder, up to its final norm."""

  def __init__(self, config: SparsekConfig):
    super().__init__(config)
    self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
    learned = config.sparsek["positions"] == "learned"
    table = nn.Embedding(config.max_position_embeddings, config.hidden_size) if learned else None
    self.embed_positions = table
    self.layers = nn.ModuleList(Layer(config, i) for i in range(config.num_hidden_layers))
    self.norm = make_norm(config)
    self.post_init()

  def forward(
    self,
    input_ids=None,
    attention_mask=None,
    position_ids=None,
    cache=None,
    inputs_embeds=None,
    use_cache=None,
    output_hidden_states=None,
    **kwargs,
  ):
    x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
    cache = kwargs.get("past_key_values") if cache is None else cache
    if cache is not None and not isinstance(cache, SparsekCache):
      raise TypeError(f"{CACHE} is a {type(cache).__name__}, and this model needs a SparsekCache")
    use_cache = self.config.use_cache and not self.training if use_cache is None else use_cache
    cache = SparsekCache() if use_cache and cache is None else cache
    position = self.positions(x, attention_mask, position_ids, cache)
    at, rope = position.clamp(min=0), None
    if self.embed_positions is not None:
      x = x + self.embed_positions(at)
    else:
      angle = at[:, :, None, None] * frequencies(self.config, x.device)
      rope = angle.cos().float(), angle.sin().float()
    states, hidden = {} if cache is None else cache.states, [x]
    for index, layer in enumerate(self.layers):
      x, state = layer(x, rope, position, states.get(index), cache is not None)
      hidden.append(x)
      if cache is not None:
        states[index] = state
    hidden[-1] = x = self.norm(x)
    hidden = tuple(hidden) if output_hidden_states else None
    return BaseModelOutputWithPast(last_hidden_state=x, hidden_states=hidden, **{CACHE: cache})

  def positions(self, x, attention_mask, position_ids, cache):
    """Returns the position [B, N] of each new token in its row, -1 for padding."""
    batch, length, _ = x.shape
    real = torch.ones(batch, length, dtype=torch.bool, device=x.device)
    if attention_mask is not None:
      if attention_mask.ndim != 2:
        raise ValueError(f"attention_mask has shape {tuple(attention_mask.shape)}, not [batch, n]")
      real = attention_mask[:, -length:].to(x.device).bool()
    before = real.new_zeros(batch, dtype=torch.long)
    before, ended = (before, before > 0) if cache is None else cache.rows(before)
    seen = before[:, None] + real.cumsum(1)
    ended = ended[:, None] | (((seen > 0) & ~real).cumsum(1) > 0)
    position = torch.where(real, seen - 1, -1)
    if not torch.compiler.is_compiling():
      if (ended & real).any():
        raise ValueError("attention_mask has padding between the tokens of a row")
      if position_ids is not None and ((position_ids != position) & real).any():
        raise ValueError("position_ids do not count a row's tokens: packed rows are not supported")
    if cache is not None:
      cache.length += length
      cache.position, cache.ended = seen[:, -1], ended[:, -1]
    return position


class SparsekForCausalLM(SparsekPreTrainedModel, GenerationMixin):
  """The decoder with the output matrix."""

  _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

  def __init__(self, config: SparsekConfig):
    super().__init__(config)
    self.model = SparsekModel(config)
    self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
    self.post_init()

  @can_return_tuple
  def forward(self, input_ids=None, labels=None, logits_to_keep=0, **kwargs):
    """Returns logits [B, N, vocabulary] float32, and the loss where labels are given.

    Args:
      input_ids: [B, N] the new tokens.
      labels: [B, N] the same tokens, -100 where there is no loss.
      logits_to_keep: number of last columns that get logits, 0 for all, or their indices.
      kwargs: inputs_embeds, attention_mask [B, columns so far or N], position_ids, a cache as
        `cache` or `past_key_values`, use_cache, output_hidden_states.
    """
    output = self.model(input_ids, **kwargs)
    keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
    logits = self.lm_head(output.last_hidden_state[:, keep]).float()
    loss = None
    if labels is not None:
      own = {name: kwargs[name] for name in ("num_items_in_batch",) if name in kwargs}
      loss = self.loss_function(logits, labels, vocab_size=self.config.vocab_size, **own)
    return CausalLMOutputWithPast(
      loss=loss, logits=logits, hidden_states=output.hidden_states, **{CACHE: output.get(CACHE)}
    )

  def prepare_inputs_for_generation(self, input_ids, attention_mask=None, **kwargs):
    cache = kwargs.get(CACHE)
    columns = input_ids.shape[1] if attention_mask is None else attention_mask.shape[1]
    new = columns - (0 if cache is None else cache.length)
    names = "inputs_embeds", "use_cache", "logits_to_keep", "output_hidden_states"
    inputs = {name: kwargs[name] for name in names if name in kwargs}
    inputs |= {"input_ids": input_ids[:, -new:], "attention_mask": attention_mask, CACHE: cache}
    if inputs.get("inputs_embeds") is not None:
      inputs.pop("inputs_embeds" if cache is not None else "input_ids")
    return inputs

  @classmethod
  def _supports_default_dynamic_cache(cls) -> bool:
    return False  # `forward` makes a SparsekCache
