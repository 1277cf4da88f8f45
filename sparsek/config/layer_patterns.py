"""Patterns that give each layer its kind of attention, such as "sliding_window:w256*5,sparsek"."""

import re
from collections.abc import Sequence

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
]
NAME = re.compile("[a-z][a-z0-9_]*")
_TERM = re.compile(rf"({NAME.pattern})(?::k(\d+))?(?::w(\d+))?(?:\*(\d+))?")


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
  for term in pattern.split(",") if isinstance(pattern, str) else pattern:
    match = _TERM.fullmatch(term.strip())
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
