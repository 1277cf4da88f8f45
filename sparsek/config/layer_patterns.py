"""Patterns that give each layer its kind of attention, such as "sliding_window:w256*5,sparsek"."""

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from sparsek.config.checks import UNREGISTERED

# `sparsek.model.registration` appends to it.
ATTENTION_KINDS = [
  "sparsek",
  "sliding_window",
  "full",
  "random",
  "attention_sinks",
  "strided",
  "lsh",
  "block_topk",
  "linear",
  "tova",
  "h2o",
  "snapkv",
  "random_sink",
  "kvzap",
]
# Fields of TransformerConfig that a kind uses; kinds that are not listed use k and window. "scorer"
# stands for all fields of scorers.
_USES: dict[str, tuple[str, ...]] = {
  "full": (),
  "sliding_window": ("window",),
  "linear": ("window",),
  "sparsek": ("k", "window", "gate", "scorer"),
  "kvzap": ("k", "window", "scorer"),
}
# Settings of kinds that choose as SPARSEK does, but by scores of their own, or without gradients.
_FIXED_SCORES: dict[str, Any] = {
  "gate": "straight_through",
  "scorer": "random",
  "scorer_init_scale": 1.0,
  "scorer_init_slope": 0.0,
  "scorer_init_sink": 0.0,
  "scorer_shared": False,
}
SETTINGS: dict[str, dict[str, Any]] = {
  "random": _FIXED_SCORES,
  "random_sink": _FIXED_SCORES | {"scorer_init_sink": 100.0},  # above every other score
  # minus the position
  "attention_sinks": _FIXED_SCORES | {"scorer_init_scale": 0.0, "scorer_init_slope": -1024.0},
  "kvzap": {"gate": "straight_through"},
}
# Kinds whose KV heads can have a k and a window of their own: each head attends by itself.
BY_HEADS = ("sparsek", "sliding_window", "kvzap", "random", "random_sink", "attention_sinks")
NAME = re.compile("[a-z][a-z0-9_]*")
_SIZES = "(?::k([0-9]{1,10}))?(?::w([0-9]{1,10}))?"
_HEADS = r"[0-9]{1,5}(?:-[0-9]{1,5})?"
_TERM = re.compile(
  rf"({NAME.pattern}){_SIZES}(?::h({_HEADS}(?:\.{_HEADS})*){_SIZES})?(?:\*([0-9]{{1,5}}))?"
)


class OwnSizes(NamedTuple):
  """KV heads of a layer that have a k or a window of their own.

  Attributes:
    heads: their indices, ascending.
    k, window: None where they have that of the layer; k=0: they see the window alone.
  """

  heads: tuple[int, ...]
  k: int | None
  window: int | None


class Term(NamedTuple):
  """A term of a layer pattern.

  Attributes:
    kind: of attention.
    k, window: None where the term names none.
    own: KV heads with other values, or None.
  """

  kind: str
  k: int | None
  window: int | None
  own: OwnSizes | None

  def with_sizes(self, k: int | None, window: int | None, own: OwnSizes | None) -> str:
    """Returns the text of this term with other numbers for the same heads."""
    text = self.kind + _sizes(k, window)
    return text if own is None else text + f":h{heads_text(own.heads)}" + _sizes(own.k, own.window)


def _sizes(k, window):
  return "".join(f":{name}{size}" for name, size in (("k", k), ("w", window)) if size is not None)


def head_runs(heads: Sequence[int]) -> list[tuple[int, int]]:
  """Returns the first and the last index of each run of neighbours in ascending indices."""
  runs: list[tuple[int, int]] = []
  for head in heads:
    first, last = runs.pop() if runs and runs[-1][1] + 1 == head else (head, head)
    runs.append((first, max(last, head)))
  return runs


def heads_text(heads: Sequence[int]) -> str:
  """Returns ascending indices of heads as a term names them: (0, 2, 3, 4) as "0.2-4"."""
  return ".".join(str(a) if a == b else f"{a}-{b}" for a, b in head_runs(heads))


def parse_layer_pattern(pattern: str | Sequence[str]) -> tuple[str, ...]:
  """Returns the terms of a pattern, which repeats over the layers.

  Args:
    pattern: terms separated by commas, such as "sparsek*5,full" or
      "sliding_window:w256*5,sparsek:k1536:w256", or a sequence of terms. A term is a kind of
      attention, optionally with its own k and window, and optionally with *TIMES. Before that it
      may give some KV heads another k or window, as in "sparsek:k16:w512:h1.3-5:k1040": heads 1,
      3, 4 and 5, counted from 0, select 1040 keys and the others 16. With k0 heads see their window
      alone.
  Returns:
    one term per layer of the pattern, without *TIMES.
  Raises:
    ValueError: for a term of any other form.
  """
  terms: list[str] = []
  for term in pattern.split(",") if isinstance(pattern, str) else pattern or ("",):
    match = _TERM.fullmatch(term.strip()) if isinstance(term, str) else None
    if not match or match[1] not in ATTENTION_KINDS or match[7] and int(match[7]) == 0:
      raise ValueError(
        f"attention pattern {pattern!r}: the term {term!r} is not KIND, KIND:kK, KIND:wWINDOW "
        "or KIND:kK:wWINDOW, one of them and :hHEADS:kK:wWINDOW for some KV heads, such as h0.2-3, "
        f"or one of these and *TIMES, with KIND one of {', '.join(ATTENTION_KINDS)}{UNREGISTERED}"
      )
    text = term.strip().partition("*")[0]
    parsed = parse_term(text)
    if parsed.own is not None:
      if reason := _why_no_heads(parsed.kind, parsed.own):
        raise ValueError(f"attention pattern {pattern!r}: the term {term!r} {reason}")
      text = parsed.with_sizes(*parsed[1:])  # one text for the same heads
    terms += [text] * int(match[7] or 1)
  return tuple(terms)


def _why_no_heads(kind: str, own: OwnSizes) -> str:
  """Returns what is wrong with the part of a term that names heads, "" where nothing is."""
  heads, k, window = own
  if kind not in BY_HEADS:
    return f"names heads, which only {', '.join(BY_HEADS)} layers can"
  if any(head >= after for head, after in zip(heads, heads[1:])):
    return "must name heads in ascending order, each once, such as h0.2-3"
  if k is not None and "k" not in fields_of_kind(kind):
    return f"gives heads a k, and {kind} has none"
  if k is None and window is None:
    return "names heads, but neither their k nor their window, such as h0:k64:w32"
  return ""


def parse_term(term: str) -> Term:
  """Returns the parts of a term of `parse_layer_pattern`."""
  match = _TERM.fullmatch(term)
  assert match, f"{term!r} is no term of parse_layer_pattern"
  kind, heads, *_ = match[1], match[4]
  k, window, own_k, own_window = (int(match[i]) if match[i] else None for i in (2, 3, 5, 6))
  own = None
  if heads is not None:
    ends = ([int(end) for end in run.split("-")] for run in heads.split("."))
    # The ends of a range that runs backwards stay as they are, to be refused.
    listed = tuple(head for run in ends for head in range(run[0], run[-1] + 1) or run)
    own = OwnSizes(listed, own_k, own_window)
  return Term(kind, k, window, own)


def fields_of_kind(kind: str) -> tuple[str, ...]:
  """Returns which of k, window, gate and scorer a kind of attention uses."""
  return _USES.get(kind, ("k", "window"))


def fields_of_term(term: str) -> tuple[str, ...]:
  """Returns which of k, window, gate and scorer a layer takes from the configuration.

  Those that its term sets are left out.
  """
  parsed = parse_term(term)
  own = {"k": parsed.k, "window": parsed.window}
  return tuple(name for name in fields_of_kind(parsed.kind) if own.get(name) is None)
