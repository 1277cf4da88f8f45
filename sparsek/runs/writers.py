"""Writers of a run's metrics besides metrics.jsonl: TensorBoard events, Weights & Biases.

metrics.jsonl is what a run resumes from and what reports read; a writer holds a copy of it. A
writer that fails, as without a network, is reported once, and training goes on without it.
"""

import importlib
import json
import os
import queue
import re
import secrets
import sys
import threading
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from sparsek.config import TrainConfig
from sparsek.errors import UsageError
from sparsek.storage import files

WANDB_RUNS = "wandb.json"  # in the folder of a run: the id of its W&B run in each project
INIT_SECONDS = 30  # the most that W&B may take to answer before the first step
CLOSE_SECONDS = 60  # the most that a writer may take after the last step
WAITING = 10_000  # records that may wait for a writer
PACKAGES = {"tensorboard": "tensorboardX", "wandb": "wandb"}  # flag -> package


class Writer(Protocol):
  """Receiver of the scalars of steps."""

  def write(self, step: int, scalars: Mapping[str, float]) -> None:
    """Takes the scalars of a step; steps do not descend."""

  def close(self) -> None:
    """Writes what is still in memory."""


def check(train: TrainConfig) -> None:
  """Checks the flags of writers before any long work.

  Raises:
    UsageError: for a writer whose package is not installed, or a name that W&B would refuse.
  """
  for flag, package in PACKAGES.items():
    if getattr(train, flag):
      try:
        importlib.import_module(package)
      except ImportError:
        raise UsageError(f"--{flag} needs {package}: pip install {package}") from None
  if train.wandb is not None and not re.fullmatch(r"([\w.-]+/)?[^/\\#?%:]{1,128}", train.wandb):
    raise UsageError(
      f"--wandb={train.wandb}: must be PROJECT or ENTITY/PROJECT, without any of / \\ # ? % : in "
      "PROJECT"
    )


def open_writers(train: TrainConfig, step: int, settings: Mapping[str, Any]) -> list[Writer]:
  """Returns the writers that a run asks for, each on a thread of its own.

  Args:
    train: configuration of the run, which `check` has accepted.
    step: the last one whose metrics are kept.
    settings: of the run, shown beside its metrics.
  Raises:
    UsageError: where WANDB_RUNS cannot be read.
  """
  writers: list[Writer] = []
  if train.tensorboard:
    writers.append(Background("--tensorboard", lambda: TensorBoard(train.workdir, step)))
  if project := train.wandb:
    run_id = _wandb_id(train.workdir, project)
    opened = lambda: WeightsAndBiases(train.workdir, project, run_id, settings)
    writers.append(Background(f"--wandb={project}", opened))
  return writers


class TensorBoard:
  """Writer of events to WORKDIR/tensorboard; events after `step` are hidden."""

  def __init__(self, workdir: str, step: int):
    import tensorboardX

    # The queue must hold all events between two flushes: adding to a full queue waits for a thread
    # that a full disk may have ended.
    folder = os.path.join(workdir, "tensorboard")
    self._events = tensorboardX.SummaryWriter(folder, purge_step=step + 1, max_queue=WAITING)

  def write(self, step: int, scalars: Mapping[str, float]) -> None:
    """Writes an event for each scalar."""
    for name, value in scalars.items():
      self._events.add_scalar(name, value, step)
    self._events.flush()  # otherwise only its thread notices a full disk, and ends

  def close(self) -> None:
    """Closes the file."""
    self._events.close()


class WeightsAndBiases:
  """Writer to a W&B run, which a resumed run continues.

  W&B keeps its own files in WORKDIR/wandb. Its environment variables hold: WANDB_MODE=offline only
  writes these files, for `wandb sync`.
  """

  def __init__(self, workdir: str, project: str, run_id: str, settings: Mapping[str, Any]):
    import wandb

    entity, _, project = project.rpartition("/")
    self._run = wandb.init(
      entity=entity or None,
      project=project,
      id=run_id,
      name=os.path.basename(os.path.abspath(workdir)),
      dir=workdir,
      resume="allow",
      config=dict(settings),
      # Our lines on the terminal stay as they are, and Ctrl-C ends a run as it always does.
      settings=wandb.Settings(console="off", silent=True, init_timeout=INIT_SECONDS),
    )

  def write(self, step: int, scalars: Mapping[str, float]) -> None:
    """Logs the scalars; those of one step, as of training and held-out data, become one point."""
    self._run.log(dict(scalars), step=step)

  def close(self) -> None:
    """Waits until everything is uploaded."""
    self._run.finish()


def _wandb_id(workdir: str, project: str) -> str:
  """Returns the id of the run's W&B run in a project, and keeps a new one in WANDB_RUNS."""
  path = os.path.join(workdir, WANDB_RUNS)
  ids = files.read_json_object(path) if files.exists(path) else {}
  if project not in ids:
    ids[project] = secrets.token_hex(4)
    files.save(path, json.dumps(ids) + "\n")
  if not isinstance(ids[project], str):
    raise UsageError(f"{path}: the id of {project!r} must be a text, it is {ids[project]!r}")
  return ids[project]


class Background:
  """Writer whose work is done on a thread: training neither waits for it nor ends with it.

  The first failure is reported on stderr, and ends the writer. One that keeps WAITING records
  waiting, or CLOSE_SECONDS at the end, has failed too.

  Args:
    name: of the writer, for the report.
    opened: returns the writer.
  """

  def __init__(self, name: str, opened: Callable[[], Writer]):
    self._name, self._failed = name, False
    self._records: queue.Queue = queue.Queue(WAITING)
    try:
      writer = opened()
    except Exception as error:
      self._give_up(_reason(error))
    else:
      self._thread = threading.Thread(target=self._work, args=(writer,), daemon=True)
      self._thread.start()

  def write(self, step: int, scalars: Mapping[str, float]) -> None:
    """Hands the scalars of a step to the thread."""
    self._put((step, scalars))

  def close(self) -> None:
    """Waits for the thread, though not for ever."""
    self._put(None)
    if not self._failed:
      self._thread.join(CLOSE_SECONDS)
      if self._thread.is_alive():
        self._give_up(f"it has not ended after {CLOSE_SECONDS} s")

  def _put(self, item: tuple[int, Mapping[str, float]] | None) -> None:
    """Hands an item to the thread unless the writer has failed."""
    if not self._failed:
      try:
        self._records.put_nowait(item)
      except queue.Full:
        self._give_up(f"{WAITING:,} records wait for it")

  def _work(self, writer: Writer) -> None:
    """Writes records until the end, or until a failure."""
    try:
      while (item := self._records.get()) is not None:
        writer.write(*item)
      writer.close()
    except Exception as error:
      self._give_up(_reason(error))

  def _give_up(self, why: str) -> None:
    """Reports a failure, once."""
    if not self._failed:
      self._failed = True
      print(
        f"warning: {self._name} gets no more metrics: {why}. Training goes on; metrics.jsonl "
        "has all of them",
        file=sys.stderr,
        flush=True,
      )


def _reason(error: Exception) -> str:
  """Returns an error in one line."""
  text = " ".join(str(error).split()).removesuffix(".")
  return f"{type(error).__name__}: {text}" if text else type(error).__name__
