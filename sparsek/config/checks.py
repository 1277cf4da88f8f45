"""Checks of single values, with the messages that users see."""

import re
from collections.abc import Iterable

UNREGISTERED = (  # the end of messages about names that users can add to
  "; a name of your own has to be registered first, for commands by a module that --import names"
)


def check_choice(name: str, value: object, choices: Iterable[object]) -> None:
  """Raises ValueError, with name, value and choices, unless `value` is one of `choices`."""
  if value not in choices:
    raise ValueError(f"{name}={value!r} is not one of {', '.join(map(str, choices))}")


def whole_number(text: str, minimum: int = 0) -> int | None:
  """Returns the number that at most 18 digits give; None for other text, or below `minimum`.

  Python's int takes signs, spaces and underscores too, and refuses thousands of digits.
  """
  number = int(text) if re.fullmatch("[0-9]{1,18}", text) else -1
  return number if number >= minimum else None


def check_at_least(name: str, value: float, minimum: float) -> None:
  """Raises ValueError unless `value >= minimum`."""
  if not value >= minimum:
    raise ValueError(f"{name}={value} must be at least {minimum}")
