"""Patterns that give each layer its kind of attention, such as "sliding_window:w256*5,sparsek"."""

import re
from collections.abc import Sequence
from typing import Any

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
NAME = re.compile("[a-z][a-z0-9_]*")
_TERM = re.compile(
  rf"({NAME.pattern})(?::k([0-9]{{1,10}}))?(?::w([0-9]{{1,10}}))?(?:\*([0-9]{{1,5}}))?"
)


def parse_layer_pattern(pattern: str | Sequence[str]) -> tuple[str, ...]:
  """Returns the terms of a pattern, which repeats over the layers.

  Args:
    pattern: terms separated by commas, such as "sparsek*5,full" or
      "sliding_window:w256*5,sparsek:k1536:w256", or a sequence of terms. A term is a kind of
      attention, optionally with its own k and window, and optionally with *TIMES.
  Returns:
    one term per layer of the pattern, without *TIMES.
  Raises:
    ValueError: for a term of any other form.
  """
  terms: list[str] = []
  for term in pattern.split(",") if isinstance(pattern, str) else pattern or ("",):
    match = _TERM.fullmatch(term.strip()) if isinstance(term, str) else None
    if not match or match[1] not in ATTENTION_KINDS or match[4] and int(match[4]) == 0:
      raise ValueError(
        f"attention pattern {pattern!r}: the term {term!r} is not KIND, KIND:kK, KIND:wWINDOW "
        "or KIND:kK:wWINDOW, or one of them and *TIMES, "
        f"with KIND one of {', '.join(ATTENTION_KINDS)}{UNREGISTERED}"
      )
    terms += [term.strip().partition("*")[0]] * int(match[4] or 1)
  return tuple(terms)


def parse_term(term: str) -> tuple[str, int | None, int | None]:
  """Returns (kind, k, window) of a parsed term; None where the term names no k or no window."""
  match = _TERM.fullmatch(term)
  assert match, f"{term!r} is no term of parse_layer_pattern"
  kind, k, window, _ = match.groups()
  return kind, int(k) if k else None, int(window) if window else None


def fields_of_kind(kind: str) -> tuple[str, ...]:
  """Returns which of k, window, gate and scorer a kind of attention uses."""
  return _USES.get(kind, ("k", "window"))


def fields_of_term(term: str) -> tuple[str, ...]:
  """Returns which of k, window, gate and scorer a layer takes from the configuration.

  Those that its term sets are left out.
  """
  kind, k, window = parse_term(term)
  own = {"k": k, "window": window}
  return tuple(name for name in fields_of_kind(kind) if own.get(name) is None)
