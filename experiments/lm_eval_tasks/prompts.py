"""Tasks of lm-eval that ask RULER's prompts from files, LENGTH/TASK/validation.jsonl in a folder.

Their names are ruler_prompts_vt, ruler_prompts_qa_1, ..., of all together ruler_prompts. The folder
is `prompts` of lm-eval's --metadata. RULER's own programs write such files, and so does
`evaluate-ruler --write_prompts`: lines with the input, the outputs that are right, and the length
as max_length, or else in the name of the folder. Scores are lm-eval's, by length. They are those of
RULER, in shares, except of qa_1 and qa_2: RULER takes any right output, lm-eval 0.4.13 the share of
all.
"""

import glob
import os
from typing import Any

import datasets
from lm_eval.tasks.ruler.common_utils import aggregate_metrics as mean  # noqa: F401
from lm_eval.tasks.ruler.common_utils import process_results as all_of  # noqa: F401
from lm_eval.tasks.ruler.common_utils import process_results_part as part_of  # noqa: F401

from sparsek.errors import UsageError
from sparsek.storage.files import parse_json

FILE = "validation.jsonl"


def load(task: str, prompts: str | None = None, **_: Any) -> dict[str, datasets.Dataset]:
  """Returns the prompts of a task, of all lengths that a folder has.

  Raises:
    UsageError: where there are none, or a file is none of prompts.
  """
  if not prompts:
    raise UsageError("--metadata prompts=FOLDER is required: the folder of RULER's prompts")
  paths = glob.glob(os.path.join(glob.escape(str(prompts)), "*", task, FILE))
  if not paths:
    raise UsageError(f"--metadata prompts={prompts}: there is no file LENGTH/{task}/{FILE} in it")
  rows = [row for path in sorted(paths, key=_length) for row in _read(path)]
  return {"test": datasets.Dataset.from_list(rows)}


def _length(path: str) -> int:
  """Returns the length that the name of a file's folder says."""
  name = path.split(os.sep)[-3]
  if not name.isdigit():
    raise UsageError(f"{path}: the folder {name} must be called as the length of its prompts")
  return int(name)


def _read(path: str) -> list[dict]:
  rows = []
  with open(path, encoding="utf-8") as file:
    for i, line in enumerate(file, 1):
      try:
        row = parse_json(line, path)
        wanted = {"input": str(row["input"]), "outputs": list(map(str, row["outputs"]))}
      except (ValueError, TypeError, KeyError):
        raise UsageError(f"{path}, line {i}: must hold an input and its outputs") from None
      rows.append({**wanted, "max_length": int(row.get("max_length", _length(path)))})
  return rows
