"""Checks of single values, with the messages that users see."""

from collections.abc import Iterable

UNREGISTERED = (  # the end of messages about names that users can add to
  "; a name of your own has to be registered first, for commands by a module that --import names"
)


def check_choice(name: str, value: object, choices: Iterable[object]) -> None:
  """Raises ValueError, with name, value and choices, unless `value` is one of `choices`."""
  if value not in choices:
    raise ValueError(f"{name}={value!r} is not one of {', '.join(map(str, choices))}")


def check_at_least(name: str, value: float, minimum: float) -> None:
  """Raises ValueError unless `value >= minimum`."""
  if not value >= minimum:
    raise ValueError(f"{name}={value} must be at least {minimum}")
