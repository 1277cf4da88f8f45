"""The held-out rows on which runs are evaluated side by side, and the record of an evaluation."""

import dataclasses
import os
from collections.abc import Sequence
from typing import Any

from jax.sharding import Mesh

from sparsek.command_line.invocation import command
from sparsek.config import DataConfig, TransformerConfig
from sparsek.data.batches import EvalBatches, eval_batches, open_data
from sparsek.data.token_files import TokenDataset
from sparsek.data.tokenizer import Tokenizer, read_bos
from sparsek.errors import UsageError
from sparsek.evaluation.loss_by_position import Evaluation, bits_per_byte
from sparsek.parallel.mesh import CONTEXT
from sparsek.runs import run_directory, run_record
from sparsek.training.checks import check_batch, check_context, check_length


@dataclasses.dataclass(frozen=True)
class Run:
  """A run to evaluate.

  Attributes:
    workdir: its folder.
    config: its model, with the flags of the evaluation applied.
    record: its model.json.
  """

  workdir: str
  config: TransformerConfig
  record: dict[str, Any]

  def open_data(self, data: str | None = None) -> TokenDataset:
    """Opens token files made with the run's tokenizer, by default those it was trained on.

    Raises:
      UsageError: where the run was imported, and so was trained on none.
    """
    source = self.record["data"]["data"] if data is None else data
    if not source:
      advice = command("prepare_data", f"--tokenizer={self.workdir}/tokenizer")
      raise UsageError(
        f"--data is required: {self.workdir} was imported; make data with `{advice}`"
      )
    name, fingerprint = (self.record["tokenizer"][key] for key in ("name", "fingerprint"))
    tokenizer = name if name == "byte" else os.path.join(self.workdir, "tokenizer")
    return open_data(source, tokenizer, fingerprint)


def heldout_rows(
  runs: Sequence[Run],
  mesh: Mesh,
  num_batches: int,
  data: str | None = None,
  seq_len: int | None = None,
  batch_size: int | None = None,
) -> tuple[TokenDataset, DataConfig, EvalBatches]:
  """Returns a dataset, how it is cut into rows, and batches, the same for all runs.

  Args:
    runs: what is evaluated.
    mesh: the devices over which batches are spread.
    num_batches: largest number of batches.
    data: token files; None for those that the runs were trained on.
    seq_len, batch_size: None for the largest that one of the runs was trained with, the latter
      rounded up to a multiple of the devices.
  Raises:
    UsageError: where the runs read different tokens or context, rows are too long for the data or a
      model, or the mesh cannot split them.
  """
  datasets = [run.open_data(data) for run in runs]
  for run, dataset in zip(runs, datasets):
    if dataset.fingerprint != datasets[0].fingerprint:
      raise UsageError(
        f"{runs[0].workdir} and {run.workdir} read different tokens "
        f"({datasets[0].folder} and {dataset.folder}): "
        f"evaluate them one by one, or give --data"
      )
  segmented = [run.record["data"]["segment_documents"] for run in runs]
  for run, is_segmented in zip(runs, segmented):
    if is_segmented != segmented[0]:
      raise UsageError(
        f"{runs[0].workdir} and {run.workdir} see different context, as only one was trained with "
        "--segment_documents: evaluate them one by one"
      )
  if seq_len is None:
    seq_len = max(run.record["data"]["seq_len"] for run in runs)
  groups = mesh.size // mesh.shape[CONTEXT]
  if batch_size is None:
    batch_size = -(-max(run.record["data"]["batch_size"] for run in runs) // groups) * groups
  available = datasets[0].split("heldout").num_tokens - 1
  if seq_len > max(available, 1):
    raise UsageError(
      f"--seq_len={seq_len} must be at most {available}: "
      f"the held-out split of {datasets[0].folder} has {available + 1:,} tokens"
    )
  rows = DataConfig(seq_len=seq_len, batch_size=batch_size, segment_documents=segmented[0])
  check_batch(mesh, rows.batch_size)
  # Rows of padding beyond the held-out split would only take memory.
  needed = -(-available // (seq_len * groups)) * groups
  rows = dataclasses.replace(rows, batch_size=min(rows.batch_size, max(needed, groups)))
  for run in runs:
    check_length(run.config, seq_len)
    check_context(run.config, mesh, seq_len)
  return datasets[0], rows, eval_batches(datasets[0], rows, num_batches)


def other_beginning(run: Run, tokenizer: Tokenizer) -> str:
  """Returns a warning where the documents that a run was trained on began with other tokens.

  It is "" where they began as those of `tokenizer` do.
  """
  path = os.path.join(run.workdir, run_record.FILE)
  bos_ids = read_bos(run.record["tokenizer"], tokenizer, path)
  if bos_ids == tokenizer.bos_ids:
    return ""
  trained = " ".join(map(tokenizer.token, bos_ids)) or "nothing"
  return (
    f"the documents of {run.workdir} began with {trained}: its loss on these means little; make "
    f"the data anew with `{command('prepare_data')}`"
  )


def evaluation_record(
  run: Run, step: int, result: Evaluation, rows: DataConfig, dataset: TokenDataset
) -> dict[str, Any]:
  """Returns the figures of an evaluation, with what they depend on.

  Args:
    run: what was evaluated, at `step`.
    step: of the checkpoint.
    result: as `sparsek.evaluation.loss_by_position.evaluate` returned it.
    rows, dataset: as `heldout_rows` returned them.
  """
  return {
    "step": step,
    **dataclasses.asdict(result),
    "bits_per_byte": bits_per_byte(result.loss, dataset.split("heldout")),
    "model": dataclasses.asdict(run.config),
    "data": {
      **dataclasses.asdict(rows),
      "data": dataset.folder,
      "fingerprint": dataset.fingerprint,
    },
    "trained_seq_len": run.record["data"]["seq_len"],
    "versions": run_directory.versions(),
  }
