"""Timing of generation: milliseconds a token after contexts of many lengths, and of prompts.

`experiments.benchmark --suite=decode` is the command. A context is made by filling the cache with
random keys, values and scores and setting the number of tokens that it has seen: the time of a step
depends on the cache's size, and for a full layer on its length, not on its contents.
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

from sparsek.config import TransformerConfig
from sparsek.experiments.bench import transformers_decode, transformers_llama
from sparsek.experiments.bench.cells import Cell, run_rounds
from sparsek.generation.cache import Cache, cache_bytes, init_cache, prefill
from sparsek.generation.cached_attention import NOWHERE, KeysAndValues, SelectionCache
from sparsek.generation.inference import InferenceParams, inference_params
from sparsek.generation.session import AHEAD, run_steps
from sparsek.model.transformer import count_params, init_params
from sparsek.runs.checkpoint import abstract_params

KINDS = ("sparsek", "full")
OTHERS = ("transformers",)
CONTEXT_PERIOD = 1024  # tokens after which the random contents of a filled cache repeat
ROOM = 128  # tokens that a sample may write after its context
# bytes per second, from data sheets
BANDWIDTH = {
  "NVIDIA H100 PCIe": 2.0e12,
  "NVIDIA H100": 3.35e12,
  "NVIDIA H200": 4.8e12,
  "NVIDIA A100": 2.04e12,
}


@dataclasses.dataclass(frozen=True)
class Job:
  """Something to time.

  Attributes:
    config: of the model.
    n: tokens of the context, or of the prompt.
    batch_size: texts that are written at the same time.
    what: "decode" (tokens after a context) or "prefill" (a prompt).
  """

  config: TransformerConfig
  n: int
  batch_size: int = 1
  what: str = "decode"


def kinds_here() -> tuple[str, ...]:
  """Returns the kinds that can be timed on this machine.

  These are our kinds of attention, and transformers' Llama where it is installed beside a GPU.
  """
  return KINDS + (OTHERS if transformers_llama.available() else ())


def under(kind: str, config: TransformerConfig) -> TransformerConfig:
  """Returns the same model under another kind of attention in every layer."""
  return dataclasses.replace(config, attention=kind)


def bandwidth(device: jax.Device) -> float | None:
  """Returns the bytes that a device reads in a second; None where it is not known."""
  return next(
    (rate for name, rate in BANDWIDTH.items() if device.device_kind.startswith(name)), None
  )


def weight_bytes(config: TransformerConfig) -> int:
  """Returns the bytes of parameters that a step reads.

  It reads all of them, except for an embedding that is not also the output matrix.
  """
  params = jax.eval_shape(functools.partial(inference_params, config), abstract_params(config))
  unread = [] if params.output is None else [params.embedding]
  size = lambda tree: sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
  return size(params) - size(unread)


def filled(config: TransformerConfig, batch_size: int, n: int) -> Cache:
  """Returns a cache that has seen n tokens, with random contents."""
  cache, period = init_cache(config, batch_size, max_length=n + ROOM), CONTEXT_PERIOD
  # The contents are the same in all layers, and repeat along the cache: random numbers for each
  # layer take minutes to compile, those of a long cache twice its memory.
  keys = jax.random.split(jax.random.key(0))
  some = jax.random.normal(
    keys[0], (2, batch_size, config.num_kv_heads, period, config.head_dim), config.activation_dtype
  )
  noise = jax.random.normal(keys[1], (batch_size, config.num_kv_heads, period))

  def repeat(x, size, axis):
    return jnp.take(x, jnp.arange(size) % period, axis=axis)

  @functools.partial(jax.jit, donate_argnums=0)
  def fill(cache, some, noise):
    def rows(old):
      return KeysAndValues(*(repeat(x, old.key.shape[2], 2) for x in some))

    def layer(old):
      if not isinstance(old, SelectionCache):
        return rows(old)
      candidates = max(n - config.window, 0)
      occupied = jnp.arange(config.k) < candidates
      position = (
        (jnp.arange(config.k, dtype=jnp.float32) * (candidates / config.k)).astype(jnp.int32)
        if candidates > config.k
        else jnp.arange(config.k, dtype=jnp.int32)
      )
      slope = config.scorer_init_slope * n / 1024
      score = jnp.where(occupied, slope + repeat(noise, config.k, 2), -jnp.inf)
      return old._replace(
        rows=rows(old.rows),
        score=old.score.at[..., : config.k].set(score),
        position=jnp.broadcast_to(jnp.where(occupied, position, NOWHERE), old.position.shape),
        pending=slope + repeat(noise, config.window, 2),
        scorer=old.scorer._replace(deviation=jnp.full_like(old.scorer.deviation, n)),
      )

    return Cache(jnp.full(batch_size, n, jnp.int32), tuple(map(layer, cache.layers)))

  return fill(cache, some, noise)


class ModelCell(Cell):
  """A cell of one job: `start` puts its arguments on the device, `release` frees them."""

  def __init__(self, function: Callable[..., Any], job: Job, params: InferenceParams):
    super().__init__(function, in_order=True)
    self.job, self._params, self.compile_seconds = job, params, 0.0

  def start(self) -> None:
    """Makes the arguments."""
    raise NotImplementedError


class DecodeCell(ModelCell):
  """Greedy decoding of one model.

  A call computes AHEAD tokens a row in one program, from the state that the call before left.
  """

  def __init__(self, job: Job, params: InferenceParams):
    super().__init__(run_steps, job, params)
    self.bytes: int | None = None

  def _inputs(self):
    batch = self.job.batch_size
    keys = jax.random.split(jax.random.key(0), batch)
    return (
      jnp.zeros(batch, jnp.int32),
      jnp.ones(batch, bool),
      jnp.int32(1),
      jnp.int32(2**30),
      keys,
      0.0,
      1.0,
      0,
      np.zeros(0, np.int32),
    )

  def compile(self) -> None:
    """Lowers and compiles; raises MemoryError where the cache would not fit."""
    batch, config = self.job.batch_size, self.job.config
    cache = jax.eval_shape(lambda: init_cache(config, batch, max_length=self.job.n + ROOM))
    self.bytes = cache_bytes(cache)
    stats = jax.devices()[0].memory_stats() or {}
    if self.bytes + weight_bytes(config) > stats.get("bytes_limit", math.inf):
      raise MemoryError
    begin = time.perf_counter()
    self._lowered = run_steps.lower(config, "greedy", AHEAD, self._params, cache, *self._inputs())
    super().compile()
    self.compile_seconds = time.perf_counter() - begin

  def adopt(self, other: Cell) -> None:
    """Takes over what was compiled for a cache of the same size and another context."""
    assert isinstance(other, DecodeCell)
    super().adopt(other)
    self.bytes = other.bytes

  def start(self) -> None:
    """Fills a cache."""
    self._args = filled(self.job.config, self.job.batch_size, self.job.n), self._inputs()

  def calibrate(self, seconds: float) -> None:
    """Warms up, and chooses `inner` so that a sample takes that long and has room."""
    super().calibrate(seconds)
    self.inner = min(self.inner, ROOM // AHEAD)  # so that a full layer's rows have room

  def time(self) -> float:
    """Returns the seconds of `inner` calls, the first of which follows the context."""
    cache, inputs = self._args
    cache = cache._replace(seen=jnp.full(self.job.batch_size, self.job.n, jnp.int32))
    state = inputs[:3]
    jax.block_until_ready(cache)
    begin = time.perf_counter()
    for _ in range(self.inner):
      (cache, *state), _ = self._function(self._params, cache, *state, *inputs[3:])
    jax.block_until_ready(cache)
    seconds = time.perf_counter() - begin
    self._args = cache, inputs
    return seconds

  def record(self) -> dict[str, Any]:
    """Returns the figures of a token, not of a call."""
    result = super().record()
    if "failed" in result:
      return result | {"cache_bytes": self.bytes}
    result |= {name: result[name] / AHEAD for name in ("ms", "fastest", "slowest")}
    return result | {
      "tokens_per_second": 1e3 * self.job.batch_size / result["ms"],
      "cache_bytes": self.bytes,
      "compile_seconds": self.compile_seconds,
    }


class PrefillCell(ModelCell):
  """A prompt from an empty cache to the logits after it.

  SPARSEK reads it in chunks of the default size, full attention in one, where it is fastest.
  """

  def __init__(self, job: Job, params: InferenceParams):
    super().__init__(self._logits, job, params)

  def _logits(self, tokens):
    config, chunk = self.job.config, None
    if config.attention == ("full",):
      chunk = self.job.n
    cache = init_cache(config, self.job.batch_size, max_length=self.job.n)
    logits, _ = prefill(
      config, self._params, cache, tokens, last_only=True, chunk_size=chunk, donate=True
    )
    return logits

  def start(self) -> None:
    """Makes a prompt, and compiles by reading it once."""
    tokens = np.random.default_rng(0).integers(
      0, self.job.config.vocab_size, (self.job.batch_size, self.job.n), dtype=np.int32
    )
    self._args = (tokens,)
    begin = time.perf_counter()
    jax.block_until_ready(self._function(*self._args))
    self.compile_seconds = time.perf_counter() - begin

  def record(self) -> dict[str, Any]:
    """Returns the figures of a prompt."""
    result = super().record()
    if "failed" in result:
      return result
    return result | {
      "tokens_per_second": 1e3 * self.job.n * self.job.batch_size / result["ms"],
      "compile_seconds": self.compile_seconds,
    }


def time_transformers(
  jobs: Sequence[Job],
  kinds: Sequence[str],
  max_bytes: float,
  rounds: int,
  say: Callable[[str], None],
) -> dict[int, dict]:
  """Returns {index of the job: the figures of `transformers_decode.run`}, of decode jobs.

  Jobs with a cache of more than max_bytes count as "out of memory". Call it before JAX takes the
  memory.
  """
  results: dict[int, dict] = {}
  for i, job in enumerate(jobs):
    config = job.config
    features = config.num_layers * config.num_kv_heads * config.head_dim
    size = 2 * 2 * job.batch_size * job.n * features  # keys and values, 2 bytes each
    if "transformers" in kinds and job.what == "decode":
      result = (
        {"failed": "out of memory"}
        if size > max_bytes
        else transformers_decode.run(config, job.n, job.batch_size, rounds)
      )
      results[i] = result | {"cache_bytes": size}
      say(f"n={job.n}, batch {job.batch_size}, transformers: {result.get('failed') or 'done'}")
  return results


def time_jobs(
  jobs: Sequence[Job],
  kinds: Sequence[str] = KINDS,
  rounds: int = 10,
  seconds: float = math.inf,
  sample_seconds: float = 0.3,
  others: dict[int, dict] | None = None,
  say: Callable[[str], None] = lambda text: None,
) -> Iterator[tuple[int, list[dict]]]:
  """Times the jobs.

  All contexts of sparsek with the same number of rows are timed in turn, round after round, because
  their caches are small and their times are to be compared; then each job of full attention alone,
  for its memory.

  Args:
    jobs: what to time, under each of `kinds` (those in KINDS).
    rounds: most samples of each.
    seconds: no round of a group is begun that would end later than this after its first began.
    sample_seconds: a sample makes calls for this long.
    others: the results of `time_transformers`.
    say: called with lines of progress.
  Yields:
    After each round: how many of the last group are done, and the rows so far: the job's fields,
    and "rivals": {kind: {"ms" or "failed", ...}}.
  """
  config = jobs[0].config
  rows = _empty_rows(jobs)
  for i, result in (others or {}).items():
    rows[i]["rivals"]["transformers"] = result
  groups = _groups(jobs, kinds)
  if not groups:
    yield 0, rows
    return
  # full attention uses the same parameters
  params = inference_params(
    under("sparsek", config), init_params(under("sparsek", config), jax.random.key(0))
  )
  for (kind, what, *_), members in groups.items():
    cell_class = DecodeCell if what == "decode" else PrefillCell
    cells = {i: cell_class(job, params) for i, job in members.items()}
    _prepare(list(cells.values()), kind, sample_seconds, say)
    for done in run_rounds(list(cells.values()), rounds, seconds):
      for i, cell in cells.items():
        rows[i]["rivals"][kind] = cell.record()
      yield done, [row for row in rows if row["rivals"]]
    for cell in cells.values():
      cell.release()


def _empty_rows(jobs: Sequence[Job]) -> list[dict[str, Any]]:
  """Returns the jobs' fields as rows of a record, with nothing timed yet."""
  config = jobs[0].config
  rate = bandwidth(jax.devices()[0])
  size = count_params(abstract_params(under("full", config))) / 1e6
  fields = {
    "model": f"{size:.0f}M parameters, {config.dtype}",
    "k": config.k,
    "window": config.window,
    "gate": config.gate,
    "weights_ms": None if rate is None else 1e3 * weight_bytes(under("sparsek", config)) / rate,
  }
  return [
    {**fields, "what": job.what, "n": job.n, "batch_size": job.batch_size, "rivals": {}}
    for job in jobs
  ]


def _groups(jobs: Sequence[Job], kinds: Sequence[str]) -> dict[tuple, dict[int, Job]]:
  """Returns {(kind, what, rows, length): {index: job}} of what is timed in turn."""
  groups: dict[tuple, dict[int, Job]] = {}
  for kind in (kind for kind in kinds if kind in KINDS):
    for i, job in enumerate(jobs):
      in_turn = job.what == "decode" and kind == "sparsek"
      group = groups.setdefault((kind, job.what, job.batch_size, None if in_turn else job.n), {})
      group[i] = dataclasses.replace(job, config=under(kind, jobs[0].config))
  return groups


def _prepare(
  cells: Sequence[ModelCell], kind: str, sample_seconds: float, say: Callable[[str], None]
) -> None:
  """Compiles one decoding program for all cells of a group, and warms them up."""
  for cell in cells:
    job = cell.job
    if job.what == "decode" and cell is not cells[0]:
      cell.adopt(cells[0])
    elif job.what == "decode":
      cell.attempt(cell.compile)
    cell.attempt(cell.start)
    cell.attempt(cell.calibrate, sample_seconds)
    say(
      f"{job.what}, n={job.n}, batch {job.batch_size}, {kind}: "
      + (cell.failed or f"ready in {cell.compile_seconds:.0f} s, {cell.inner} calls a sample")
    )
