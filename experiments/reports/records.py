"""Reading and writing of records of experiments/results: JSON with one line a run or row."""

import json
import os
from typing import Any

FOLDER = os.path.join(os.path.dirname(os.path.dirname(os.path.realpath(__file__))), "results")


def load(name: str) -> Any:
  """Reads a record of experiments/results; a .jsonl one is a list of its lines."""
  with open(os.path.join(FOLDER, name), encoding="utf-8") as file:
    return [json.loads(line) for line in file] if name.endswith(".jsonl") else json.load(file)


def dumps(value: Any, depth: int = 2, indent: int = 0) -> str:
  """Returns JSON text in which a container takes one line, unless it holds other containers.

  Those take a line for each item, down to `depth` levels: by default each row of {"rows": [...]}
  has its own line.
  """
  parts = list(value.values() if isinstance(value, dict) else value if _is_list(value) else ())
  if not depth or not any(isinstance(part, dict) or _is_list(part) for part in parts):
    return json.dumps(value)
  margin = " " * (indent + 1)
  if _is_list(value):
    items = [margin + dumps(item, depth - 1, indent + 1) for item in value]
  else:
    items = [
      f"{margin}{json.dumps(str(key))}: {dumps(item, depth - 1, indent + 1)}"
      for key, item in value.items()
    ]
  opening, closing = "[]" if _is_list(value) else "{}"
  return f"{opening}\n" + ",\n".join(items) + f"\n{' ' * indent}{closing}"


def _is_list(value: Any) -> bool:
  return isinstance(value, (list, tuple))
