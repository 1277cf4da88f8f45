"""The process of one checkout: answers lines of JSON about the sparsek that it imports.

It is run by its path, with the checkout as working directory and first on PYTHONPATH.
"""

import importlib
import json
import os
import platform
import signal
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

# After the checkout's own folder; and as `checkouts`, because `experiments` is the checkout's own.
sys.path.append(str(Path(__file__).resolve().parents[1]))
from checkouts.report import SUITES  # noqa: E402

KERNELS = "sparsek.kernels.reference"


def load(name: str) -> ModuleType:
  """Returns a module beside this one; it imports sparsek."""
  return importlib.import_module(f"checkouts.{name}")


class Server:
  """The answers of a worker, a method for each action."""

  def __init__(self):
    self._operations: dict[str, Any] | None = None
    self._operation: Any = None

  def hello(self) -> dict:
    """Imports sparsek; returns its files and the device."""
    import jax  # not before stdout is redirected

    importlib.import_module("sparsek")
    importlib.import_module(KERNELS)
    device = jax.devices()[0]
    return {
      **self.files(),
      "device": {
        "kind": device.device_kind,
        "platform": device.platform,
        "count": jax.device_count(),
        "jax": jax.__version__,
        "python": platform.python_version(),
      },
    }

  def files(self) -> dict:
    """Returns the file of each module of sparsek that is loaded."""
    modules = {name: getattr(module, "__file__", None) for name, module in sys.modules.items()}
    return {
      "files": {
        name: file for name, file in modules.items() if name.split(".")[0] == "sparsek" and file
      }
    }

  def program_names(self) -> dict:
    """Returns the names of all programs."""
    return {"names": list(load("programs").programs())}

  def program(self, name: str) -> dict:
    """Returns the StableHLO text of a program, and the texts of its kernels."""
    programs = load("programs")
    text, kernels = programs.take_kernels(programs.programs()[name]().as_text())
    return {"text": text, "kernels": kernels}

  def operation_names(self, suites: Sequence[str]) -> dict:
    """Returns the names of the operations of some suites."""
    return {"names": list(load("operations").operations(suites))}

  def prepare(self, name: str) -> dict:
    """Compiles an operation and warms up; returns the calls of a sample."""
    if self._operations is None:
      self._operations = load("operations").operations(SUITES)
    self._operation = self._operations[name]()
    return {"calls": self._operation.calibrate()}

  def sample(self, calls: int) -> dict:
    """Returns the mean seconds of some calls after one that does not count."""
    self._operation.run(1)
    return {"seconds": self._operation.run(calls) / calls}

  def release(self) -> dict:
    """Frees the memory of the operation."""
    self._operation = None
    return {}


def serve() -> None:
  """Answers requests until the other process ends; what is printed meanwhile goes to stderr."""
  signal.signal(signal.SIGINT, signal.SIG_DFL)
  replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
  os.dup2(2, 1)
  server = Server()
  for line in sys.stdin:
    request = json.loads(line)
    try:
      reply = getattr(server, request.pop("action"))(**request)
    except Exception as error:  # reported by the other process, which goes on
      traceback.print_exc()
      reason = (str(error).splitlines() or [""])[0]
      reply = {"error": f"{type(error).__name__}: {reason}"}
    print(json.dumps(reply), file=replies, flush=True)


if __name__ == "__main__":
  serve()
