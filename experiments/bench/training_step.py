"""Timing of whole training steps of one model under several kinds of attention.

`experiments.benchmark --suite=train` is the command.
"""

import dataclasses
import functools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from sparsek.config import DataConfig, OptimizerConfig, TrainConfig, TransformerConfig
from sparsek.experiments.bench import pytorch_window, transformers_llama
from sparsek.experiments.bench.cells import Cell, run_rounds
from sparsek.model import flops
from sparsek.model.transformer import count_params, init_params
from sparsek.parallel.mesh import make_mesh, put_batch, replicated
from sparsek.parallel.sharding import computed_on
from sparsek.runs.checkpoint import abstract_params
from sparsek.training.compilation import lower, start_compiling_kernels
from sparsek.training.optimizer import make_optimizer
from sparsek.training.step import TrainState, abstract_state, make_train_step

KINDS = ("sparsek", "sliding_window", "full")
# kind of another's model -> our kind of attention that does as many operations
OTHERS = {pytorch_window.KIND: "sliding_window", **dict.fromkeys(transformers_llama.KINDS, "full")}
TRANSFORMERS_SECONDS = 5.0  # most for the samples of one of its kinds


@dataclasses.dataclass(frozen=True)
class Job:
  """Training on batches of `batch_size` rows of n tokens.

  Each row holds `documents` documents: the first is half of the row, the second a quarter, and so
  on.
  """

  config: TransformerConfig
  n: int
  batch_size: int = 1
  documents: int = 1
  loss_chunk: int = TrainConfig.loss_chunk
  scorer_loss: float = TrainConfig.scorer_loss

  def lengths(self) -> list[int]:
    """Returns the lengths of the documents of a row."""
    cuts = [self.n - (self.n >> i) for i in range(self.documents)] + [self.n]
    return [b - a for a, b in zip(cuts, cuts[1:]) if b > a]


def kinds_here() -> tuple[str, ...]:
  """Returns the kinds that can be timed on this machine.

  These are our kinds of attention, and models in PyTorch where it is installed beside a GPU.
  """
  return KINDS + (tuple(OTHERS) if transformers_llama.available() else ())


def time_transformers(
  jobs: Sequence[Job], kinds: Sequence[str], max_n: int, rounds: int, say: Callable[[str], None]
) -> dict[tuple[int, str], dict]:
  """Returns {(index of the job, kind): the figures of `transformers_llama.run`}.

  Jobs of more than max_n tokens are left out. Call it before JAX takes the GPU's memory.
  """
  results = {}
  for i, job in enumerate(jobs):
    for kind in (kind for kind in OTHERS if kind in kinds and job.n <= max_n):
      results[i, kind] = result = transformers_llama.run(
        kind,
        job.config,
        job.n,
        job.batch_size,
        job.loss_chunk,
        rounds,
        TRANSFORMERS_SECONDS,
        command=pytorch_window.COMMAND if kind == pytorch_window.KIND else None,
      )
      said = result.get("failed") or f"compiled in {result['compile_seconds']:.0f} s"
      say(f"n={job.n}, {kind}: {said}")
  return results


def under(kind: str, config: TransformerConfig) -> TransformerConfig:
  """Returns the same model under another kind of attention in every layer.

  A sliding window gets SPARSEK's whole budget.
  """
  window = config.k + config.window if kind == "sliding_window" else config.window
  return dataclasses.replace(config, attention=kind, window=window)


class StepCell(Cell):
  """A training step on one batch; its state is on the devices from `start` on."""

  def __init__(self, job: Job, mesh: Mesh | None = None):
    self.job, self._mesh = job, mesh or make_mesh()
    self.compile_seconds: float | None = None
    train = TrainConfig(
      workdir="",
      loss_chunk=job.loss_chunk,
      scorer_loss=job.scorer_loss,
      data=DataConfig(
        seq_len=job.n, batch_size=job.batch_size, segment_documents=job.documents > 1
      ),
      optimizer=OptimizerConfig(num_steps=1000, warmup_steps=100),
    )
    self._optimizer = make_optimizer(train.optimizer)
    self._step = make_train_step(job.config, train, self._optimizer, self._mesh)
    super().__init__(self._step)

  def compile(self) -> None:
    """Lowers and compiles the step."""
    state = abstract_state(abstract_params(self.job.config), self._optimizer, self._mesh)
    begin = time.perf_counter()
    assert isinstance(self._step, jax.stages.Wrapped)
    self._lowered = lower(self._step, state, self._batch())
    start_compiling_kernels(self._lowered, self._mesh.devices.flat[0])
    super().compile()
    self.compile_seconds = time.perf_counter() - begin

  def _batch(self):
    lengths = self.job.lengths()
    segments = np.repeat(np.arange(len(lengths), dtype=np.int32) + 1, lengths)
    segments = np.append(segments, segments[-1])  # a row stores its last target too
    tokens = np.random.default_rng(0).integers(
      0, self.job.config.vocab_size, (self.job.batch_size, self.job.n + 1), dtype=np.int32
    )
    return put_batch(
      self._mesh, {"tokens": tokens, "segment_ids": np.tile(segments, (self.job.batch_size, 1))}
    )

  def start(self) -> None:
    """Puts a new state and a batch on the devices."""
    init = functools.partial(init_params, self.job.config)
    params = computed_on(self._mesh, init, jax.random.key(0))
    opt_state = computed_on(self._mesh, self._optimizer.init, params)
    step = jax.device_put(jnp.int32(0), replicated(self._mesh))
    self._args = TrainState(step, params, opt_state), self._batch()

  def time(self) -> float:
    """Returns the seconds of `inner` steps, each from the state that the one before left."""
    state, batch = self._args
    begin = time.perf_counter()
    for _ in range(self.inner):
      state, metrics = self._function(state, batch)
    jax.block_until_ready((state, metrics))
    self._args = state, batch
    return time.perf_counter() - begin

  def record(self) -> dict[str, Any]:
    """Returns the figures of a step, with its speed."""
    return rated(
      self.job, super().record() | {"compile_seconds": self.compile_seconds}, self._mesh.size
    )


def rated(job: Job, result: dict, devices: int) -> dict:
  """Adds tokens per second, TFLOP a step and MFU to a result, from its milliseconds a step.

  The operations of recomputed parts do not count.
  """
  if "failed" in result:
    return result
  peak, seconds = flops.peak(jax.devices()[0]), result["ms"] / 1e3
  work = flops.training_flops(
    job.config, abstract_params(job.config), np.array(job.lengths() * job.batch_size)
  )
  return result | {
    "tokens_per_second": job.n * job.batch_size / seconds,
    "step_tflop": work / 1e12,
    "mfu": None if peak is None else work / seconds / (peak * devices),
  }


def time_jobs(
  jobs: Sequence[Job],
  kinds: Sequence[str] = KINDS,
  rounds: int = 10,
  seconds: float = math.inf,
  sample_seconds: float = 0.3,
  others: dict[tuple[int, str], dict] | None = None,
  say: Callable[[str], None] = lambda text: None,
) -> Iterator[tuple[int, list[dict]]]:
  """Times the jobs one after the other, the kinds of each in turn, round after round.

  Args:
    jobs: what to train; their attention is replaced by each of `kinds` (those in KINDS).
    rounds: most samples of each kind.
    seconds: no round of a job is begun that would end later than this after its first began.
    sample_seconds: a sample makes steps for this long.
    others: the results of `time_transformers`.
    say: called with lines of progress.
  Yields:
    After each round: how many of the last job are done, and the rows so far: the job's fields, and
    "rivals": {kind: {"ms" or "failed", "mib", ...}}.
  """
  rows: list[dict] = []
  for i, job in enumerate(jobs):
    other = {
      kind: rated(dataclasses.replace(job, config=under(OTHERS[kind], job.config)), result, 1)
      for (index, kind), result in (others or {}).items()
      if index == i
    }
    cells = {
      kind: StepCell(dataclasses.replace(job, config=under(kind, job.config)))
      for kind in kinds
      if kind in KINDS
    }
    for kind, cell in cells.items():
      for action in (cell.compile, cell.start):
        cell.attempt(action)
      cell.attempt(cell.calibrate, sample_seconds)
      cell.attempt(cell.trace)
      say(
        f"n={job.n}, {kind}: "
        + (
          cell.failed
          or f"compiled in {cell.compile_seconds or 0:.0f} s, {cell.inner} steps a sample"
        )
      )
    size = count_params(abstract_params(dataclasses.replace(job.config, attention="full"))) / 1e6
    fields = {
      "model": f"{size:.0f}M parameters, {job.config.dtype}",
      "k": job.config.k,
      "window": job.config.window,
      "remat": job.config.remat,
      "scorer_init_slope": job.config.scorer_init_slope,
      "scorer_loss_kind": job.config.scorer_loss_kind,
      **{
        name: getattr(job, name)
        for name in ("n", "batch_size", "documents", "loss_chunk", "scorer_loss")
      },
    }
    for done in run_rounds(list(cells.values()), rounds, seconds):
      row = {**fields, "rivals": {kind: cell.record() for kind, cell in cells.items()} | other}
      yield done, [*rows, row]
    rows.append(row)
