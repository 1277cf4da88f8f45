"""Return of a run to an earlier checkpoint (`--restore_step`); later ones are kept aside."""

import os
import shutil

from sparsek.errors import UsageError
from sparsek.runs import checkpoint
from sparsek.runs.writers import WANDB_RUNS
from sparsek.storage import files

FOLDER = "set_aside"
DONE = "restored_step"  # in FOLDER: the step that the run last went back to


def step_to_restore(workdir: str, step: int | None, report: checkpoint.Report) -> int | None:
  """Returns the step to go back to, or None for the newest.

  A run goes back to a step only once: a command that is repeated, as by a queue of jobs, must not
  discard the steps it has trained since.

  Args:
    workdir: of the run.
    step: `TrainConfig.restore_step`.
    report: takes one line where the run went back to this step before.
  Raises:
    UsageError: where the run has no such checkpoint.
  """
  if step is None:
    return None
  saved = checkpoint.saved_steps(workdir)
  done = os.path.join(workdir, FOLDER, DONE)
  if _step_in(done) == step:
    report(
      f"--restore_step={step} was done before: going on from the newest checkpoint "
      f"(remove {done} to go back again)"
    )
    return None
  if step not in saved:
    raise UsageError(
      f"--restore_step={step}: {workdir} holds no checkpoint of that step; it has "
      f"{', '.join(map(str, saved)) or 'none'}"
    )
  return step


def _step_in(path: str) -> int | None:
  """Returns the step that a file names, None where there is no file."""
  try:
    with open(path, encoding="utf-8") as file:
      return int(file.read())
  except FileNotFoundError:
    return None
  except ValueError as error:
    raise UsageError(f"{path} should hold the step that the run went back to: {error}") from None


def set_aside(workdir: str, step: int, report: checkpoint.Report) -> None:
  """Moves the checkpoints after `step`, and copies the metrics, to WORKDIR/set_aside/NUMBER.

  The newest is moved first, and the file DONE is written last, so that a command that is killed in
  between can be repeated. The caller holds the run's lock.
  """
  later = [saved for saved in checkpoint.saved_steps(workdir) if saved > step]
  if later:
    folder = _new_folder(workdir)
    metrics = os.path.join(workdir, "metrics.jsonl")
    if os.path.exists(metrics):
      shutil.copyfile(metrics, os.path.join(folder, "metrics.jsonl"))
    runs = os.path.join(workdir, WANDB_RUNS)
    if os.path.exists(runs):  # a W&B run does not go back: the steps from here on get another
      os.rename(runs, os.path.join(folder, WANDB_RUNS))
    for saved in reversed(later):
      os.rename(
        os.path.join(checkpoint.checkpoint_folder(workdir), str(saved)),
        os.path.join(folder, str(saved)),
      )
    steps = f"step{'s' * (len(later) > 1)} {', '.join(map(str, later))}"
    report(f"the checkpoints of {steps} and the metrics until now are set aside in {folder}")
  os.makedirs(os.path.join(workdir, FOLDER), exist_ok=True)
  files.write_atomically(os.path.join(workdir, FOLDER, DONE), f"{step}\n")


def _new_folder(workdir: str) -> str:
  """Makes and returns WORKDIR/set_aside/NUMBER, the first number that is free."""
  number = 0
  while os.path.exists(folder := os.path.join(workdir, FOLDER, str(number))):
    number += 1
  os.makedirs(folder)
  return folder
