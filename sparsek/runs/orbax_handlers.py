"""Orbax's handlers under the names by which both of its interfaces find them.

A checkpoint names the handler of each of its parts. Orbax's newer interface, v1, knows the
names of the older one, with CheckpointManager, but not the other way round.
"""

from collections.abc import Awaitable
from typing import Any, ClassVar

import orbax.checkpoint
from orbax.checkpoint import v1 as ocp

JSON_FILE = "metadata"  # where the older interface looks


class _Handler(ocp.handlers.CheckpointableHandler):
  """A handler that leaves everything to another one; its class has the name that is recorded."""

  make: ClassVar[Any]  # returns the other handler

  def __init__(self) -> None:
    self._handler = type(self).make()

  async def save(self, directory: Any, checkpointable: Any) -> Awaitable[None]:
    return await self._handler.save(directory, checkpointable)

  async def load(self, directory: Any, abstract_checkpointable: Any = None) -> Awaitable[Any]:
    return await self._handler.load(directory, abstract_checkpointable)

  async def metadata(self, directory: Any) -> Any:
    return await self._handler.metadata(directory)

  def is_handleable(self, checkpointable: Any) -> bool:
    return self._handler.is_handleable(checkpointable)

  def is_abstract_handleable(self, abstract_checkpointable: Any) -> bool | None:
    return self._handler.is_abstract_handleable(abstract_checkpointable)


def _make_json_handler() -> ocp.handlers.JsonHandler:
  return ocp.handlers.JsonHandler(JSON_FILE)


def _named(name_of: type, make: Any) -> type[_Handler]:
  """Returns a class of handlers that are recorded under the name of another class."""
  names = {"__module__": name_of.__module__, "__qualname__": name_of.__qualname__}
  return type(name_of.__name__, (_Handler,), {**names, "make": staticmethod(make)})


Arrays = _named(orbax.checkpoint.StandardCheckpointHandler, ocp.handlers.PyTreeHandler)
Json = _named(orbax.checkpoint.JsonCheckpointHandler, _make_json_handler)
