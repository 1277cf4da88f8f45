"""Commands whose operations on files `crash_points` fails, and what of their results must stay."""

import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Callable
from typing import Any

# Full attention in one layer: what is traced in each child costs more than anything else.
MODEL = [
  "--num_layers=1",
  "--embed_dim=16",
  "--num_heads=2",
  "--num_kv_heads=1",
  "--head_dim=8",
  "--mlp_dim=16",
  "--k=4",
  "--window=4",
  "--attention=full",
  "--noscan_layers",
]
TRAIN = [
  *MODEL,
  "--seq_len=32",
  "--batch_size=2",
  "--log_every=1",
  "--eval_every=2",
  "--eval_batches=1",
  "--checkpoint_every=1",
  "--keep_checkpoints=9",
  "--warmup_steps=1",
]


@dataclasses.dataclass(frozen=True)
class Scenario:
  """A command whose operations fail.

  Attributes:
    name: the scenario's name.
    command: the experiment and its flags; POINT is the folder that it works in, SHARED that of what
      it only reads.
    before: commands that make what is there before it, likewise.
    makes: the folder or file in POINT that it makes or goes on with.
    product: returns, for that path, what must be the same whatever happened.
    notes: the user has files in that folder too.
    stride: take every N-th of its points, since other scenarios take the rest.
  """

  name: str
  command: list[str]
  makes: str
  product: Callable[[str], Any]
  before: tuple[list[str], ...] = ()
  notes: bool = False
  stride: int = 1


def digest(content: bytes) -> str:
  return hashlib.sha256(content).hexdigest()


def run_product(workdir: str) -> dict:
  """Returns what a run holds: its metrics without speeds, and of each checkpoint a digest of all
  parameters. Raises where one does not load."""
  import jax
  import numpy as np

  from sparsek.runs import checkpoint, run_record

  path = pathlib.Path(workdir, "metrics.jsonl")
  # A kill may leave a last line without its end.
  lines = path.read_text(encoding="utf-8").split("\n")[:-1] if path.exists() else []
  records = [
    {key: value for key, value in json.loads(line).items() if key != "tokens_per_second"}
    for line in lines
  ]
  digests = {}
  for step in checkpoint.saved_steps(workdir):
    config, _ = run_record.load_run_config(workdir)
    params, _ = checkpoint.load_params(workdir, config, step)
    leaves = [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(params)]
    digests[str(step)] = digest(b"".join(leaves))
  return {"metrics": records, "checkpoints": digests}


def files_product(path: str) -> dict:
  """Returns digests of the bytes of a file, or of all files of a folder."""
  root = pathlib.Path(path)
  files = [root] if root.is_file() else sorted(file for file in root.rglob("*") if file.is_file())
  return {str(file.relative_to(root)): digest(file.read_bytes()) for file in files}


def cache_product(path: str) -> dict:
  """Returns digests of the arrays of a saved cache."""
  import numpy as np

  with np.load(path, allow_pickle=False) as file:
    return {name: digest(file[name].tobytes()) for name in file.files}


def losses_product(workdir: str) -> list:
  """Returns the losses that evaluations of a run wrote down."""
  path = pathlib.Path(workdir, "evaluation.jsonl")
  lines = path.read_text(encoding="utf-8").split("\n")[:-1] if path.exists() else []
  return sorted({json.loads(line)["loss"] for line in lines})


RUN = ["--workdir=POINT/run", "--data=SHARED/tokens", *TRAIN]
TRAINED = ["pretrain", *RUN, "--num_steps=4", "--stop_at=2"]
DENSE = ["pretrain", "--workdir=POINT/run", "--data=SHARED/bpe", *TRAIN, "--num_steps=1"]
SCENARIOS = (
  Scenario("train", ["pretrain", *RUN, "--num_steps=2"], "run", run_product),
  Scenario("resume", ["pretrain", *RUN, "--num_steps=4"], "run", run_product, (TRAINED,), True, 3),
  Scenario(
    "import",
    ["import_hf", "--from=SHARED/model", "--workdir=POINT/imported"],
    "imported",
    run_product,
  ),
  Scenario(
    "export",
    ["import_hf", "--workdir=SHARED/dense", "--export=POINT/model"],
    "model",
    files_product,
  ),
  Scenario(
    "prepare",
    [
      "prepare_data",
      "--sources=SHARED/texts,tasks:1024:12",
      "--answers_only",
      "--output=POINT/tokens",
    ],
    "tokens",
    files_product,
  ),
  Scenario(
    "prepare_bpe",
    ["prepare_data", "--sources=SHARED/texts", "--train_bpe=280", "--output=POINT/new/tokens"],
    "new/tokens",
    files_product,
  ),
  Scenario(
    "generate",
    [
      "generate",
      "--workdir=SHARED/run",
      "--prompt=a",
      "--max_new_tokens=2",
      "--save_cache=POINT/cache.npz",
    ],
    "cache.npz",
    cache_product,
    (
      [
        "generate",
        "--workdir=SHARED/run",
        "--prompt=ab",
        "--max_new_tokens=2",
        "--save_cache=POINT/cache.npz",
      ],
    ),
  ),
  Scenario(
    "evaluate",
    ["evaluate", "--workdir=POINT/run", "--eval_batches=1"],
    "run",
    losses_product,
    (TRAINED,),
    True,
  ),
)


# Name of what scenarios only read -> the command that makes it.
_PREPARE = ["prepare_data", "--sources=SHARED/texts", "--heldout_fraction=0.3"]
SHARED = {
  "tokens": [*_PREPARE, "--output=SHARED/tokens"],
  "bpe": [*_PREPARE, "--train_bpe=280", "--output=SHARED/bpe"],
  "run": [word.replace("POINT/run", "SHARED/run") for word in TRAINED],
  "dense": [word.replace("POINT/run", "SHARED/dense") for word in DENSE],
  "model": ["import_hf", "--workdir=SHARED/dense", "--export=SHARED/model"],
}
