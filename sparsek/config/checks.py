"""Checks of single values and of a dataclass's fields, with the messages that users see."""

import dataclasses
import functools
import math
import numbers
import re
import reprlib
import types
import typing
from collections.abc import Hashable, Iterable
from typing import Annotated, Any, NamedTuple

UNREGISTERED = (  # the end of messages about names that users can add to
  "; a name of your own has to be registered first, for commands by a module that --import names"
)
MAX_INT = 2**31 - 1


class Range(NamedTuple):
  """The finite numbers from `lower` to `upper`, both included by default."""

  lower: float | None = None
  upper: float | None = None
  lower_is_open: bool = False
  upper_is_open: bool = False

  def __contains__(self, value: object) -> bool:
    assert isinstance(value, (int, float))
    lower, upper = self.lower, self.upper
    if isinstance(value, float) and not math.isfinite(value):
      return False
    above = lower is None or value > lower or (value == lower and not self.lower_is_open)
    return above and (upper is None or value < upper or (value == upper and not self.upper_is_open))

  def words(self) -> str:
    """Returns the bounds as in "at least 0 and below 1", "" where there are none."""
    parts = []
    if self.lower is not None:
      parts.append(f"{'above' if self.lower_is_open else 'at least'} {self.lower}")
    if self.upper not in (None, MAX_INT):
      parts.append(f"{'below' if self.upper_is_open else 'at most'} {self.upper}")
    return " and ".join(parts)

  def described(self, kind: type) -> str:
    """Returns what a number of this kind must be, as in "an integer of at least 1"."""
    noun, words = "an integer" if kind is int else "a number", self.words()
    return f"{noun}{' of ' if words.startswith('at least') else ' ' if words else ''}{words}"


# The annotations of fields, and of flags that have their names.
Count = Annotated[int, Range(1, MAX_INT)]
Index = Annotated[int, Range(0, MAX_INT)]
# Sizes that may be larger than any row of tokens.
UnboundedCount = Annotated[int, Range(1)]
UnboundedIndex = Annotated[int, Range(0)]
Weight = Annotated[float, Range(0)]
Positive = Annotated[float, Range(0, lower_is_open=True)]
Share = Annotated[float, Range(0, 1)]
PositiveShare = Annotated[float, Range(0, 1, lower_is_open=True)]
Decay = Annotated[float, Range(0, 1, upper_is_open=True)]


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


def check_type(name: str, value: object, kind: type | tuple[type, ...], allowed: str) -> None:
  """Raises ValueError, with name, value and what is allowed, unless `value` is of a type.

  Args:
    name: of the argument.
    value: what was given.
    kind: the type, or several.
    allowed: the type in words, such as "a cache, as init_cache returns it".
  """
  if not isinstance(value, kind):
    text = " ".join(reprlib.repr(value).split())
    text = text if len(text) <= 80 else f"{text[:80]}..."
    raise ValueError(f"{name}={text} must be {allowed}")


def check_number(name: str, value: Any, kind: Any) -> Any:
  """Returns a number of Python, int or float, equal to `value`.

  Args:
    name: of the argument.
    value: of Python or NumPy.
    kind: int, float, or such an annotation as Count or Weight.
  Raises:
    ValueError: with name, value and what is allowed, for another type, which bool is too, and for a
      number that is not finite or out of range.
  """
  kind, allowed = _kind_and_range(kind)
  abstract = numbers.Integral if kind is int else numbers.Real
  if isinstance(value, bool) or not isinstance(value, abstract):
    raise ValueError(f"{name}={value!r} must be {allowed.described(kind)}")
  number: Any
  try:
    number = value if type(value).__module__ == "builtins" else kind(value)
    if kind is float:
      float(number)
  except OverflowError:
    raise ValueError(f"{name}={value} must be a finite number") from None
  if number not in allowed:
    if allowed.upper == MAX_INT and number > MAX_INT:
      raise ValueError(f"{name}={value} must be at most {MAX_INT}")
    raise ValueError(f"{name}={value} must be {allowed.words() or 'finite'}")
  return number


def _kind_and_range(annotation: Any) -> tuple[Any, Range]:
  """Returns the type and the range of an annotation; the widest range where it names none."""
  if typing.get_origin(annotation) is Annotated:
    kind, allowed = typing.get_args(annotation)
    return kind, allowed
  return annotation, Range()


def check_fields(config: Any) -> None:
  """Checks the fields of a frozen dataclass by their annotations; NumPy's numbers become Python's.

  The annotations are those of `check_number`, bool, str, tuple and dataclasses, and unions of these
  with None or each other. Where a tuple is allowed, a list is too. Other fields are not looked at.

  Raises:
    ValueError: with the name of the field, its value and what is allowed.
  """
  for name, kinds in field_kinds(config.__class__).items():
    value = getattr(config, name)
    checked = _checked(name, value, kinds)
    if checked is not value:
      object.__setattr__(config, name, checked)


@functools.cache
def field_kinds(cls: Hashable) -> dict[str, tuple[Any, ...]]:
  """Returns the alternatives of each field's annotation, without fields that cannot be checked."""
  hints: dict[str, Any] = typing.get_type_hints(cls, include_extras=True)
  fields: Any = dataclasses.fields(cls)  # type: ignore[arg-type]
  kinds = {field.name: _alternatives(hints[field.name]) for field in fields}
  return {name: of for name, of in kinds.items() if all(map(_can_check, of))}


def _alternatives(annotation: Any) -> tuple[Any, ...]:
  if typing.get_origin(annotation) in (typing.Union, types.UnionType):
    return tuple(kind for part in typing.get_args(annotation) for kind in _alternatives(part))
  is_tuple = typing.get_origin(annotation) is tuple
  return (tuple,) if is_tuple else (annotation,)


def _can_check(kind: Any) -> bool:
  kind = _kind_and_range(kind)[0]
  return kind in (bool, int, float, str, tuple, type(None)) or dataclasses.is_dataclass(kind)


def _checked(name: str, value: Any, kinds: tuple[Any, ...]) -> Any:
  """Returns a value that is one of `kinds`; raises ValueError for any other."""
  if value is None and type(None) in kinds:
    return value
  for kind in kinds:
    if _kind_and_range(kind)[0] in (int, float):
      try:
        return check_number(name, value, kind)
      except ValueError as error:
        raise ValueError(f"{error}{', or None' if type(None) in kinds else ''}") from None
    if isinstance(value, (tuple, list) if kind is tuple else kind):
      return value
  words = {bool: "True or False", str: "a string", tuple: "a tuple", type(None): "None"}
  names = [words.get(kind) or f"a {kind.__name__}" for kind in kinds]
  raise ValueError(f"{name}={value!r} must be {' or '.join(names)}")


@functools.cache
def number_ranges(*classes: type) -> dict[str, Range]:
  """Returns the range of each field of the dataclasses that holds a number, by its name."""
  return {
    name: _kind_and_range(kind)[1]
    for cls in classes
    for name, kinds in field_kinds(cls).items()
    for kind in kinds
    if _kind_and_range(kind)[0] in (int, float)
  }
