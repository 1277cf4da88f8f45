"""Times generation with one model: milliseconds a token after contexts of many lengths, and
prompts; `experiments.benchmark --suite=decode` is the command.

A context is entered by filling the cache with random keys, values and scores and saying how many
tokens have been seen: what a step does depends on the cache's size, and for a full layer on its
length, not on how it came about.
"""

import dataclasses
import functools
import math
import time
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from experiments.bench import transformers_decode, transformers_llama
from experiments.bench.attention import Cell, run_rounds
from sparsek.config import TransformerConfig
from sparsek.generation.cache import Cache, cache_bytes, init_cache, prefill
from sparsek.generation.cached_attention import NOWHERE, KeysAndValues, SelectionCache
from sparsek.generation.inference import InferenceParams, inference_params
from sparsek.generation.session import AHEAD, run_steps
from sparsek.model.transformer import count_params, init_params
from sparsek.runs.checkpoint import abstract_params

KINDS = ("sparsek", "full")
OTHERS = ("transformers",)
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
  """Tokens after n of them, or prompts of n tokens, in `batch_size` rows; what: "decode" or
  "prefill".
  """

  config: TransformerConfig
  n: int
  batch_size: int = 1
  what: str = "decode"


def kinds_here() -> tuple[str, ...]:
  """What can be compared here: our kinds of attention, and transformers' Llama where it is
  installed beside a GPU.
  """
  return KINDS + (OTHERS if transformers_llama.available() else ())


def under(kind: str, config: TransformerConfig) -> TransformerConfig:
  return dataclasses.replace(config, attention=kind)


def bandwidth(device: jax.Device) -> float | None:
  """Bytes that a device reads in a second; None where it is not known."""
  return next(
    (rate for name, rate in BANDWIDTH.items() if device.device_kind.startswith(name)), None
  )


def weight_bytes(config: TransformerConfig) -> int:
  """What a step reads of a model's parameters: all of them, but only a row of an embedding that is
  not the output matrix too.
  """
  params = jax.eval_shape(functools.partial(inference_params, config), abstract_params(config))
  unread = [] if params.output is None else [params.embedding]
  size = lambda tree: sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
  return size(params) - size(unread)


def filled(config: TransformerConfig, batch_size: int, n: int) -> Cache:
  """A cache that has seen n tokens, with random contents."""
  cache, period = init_cache(config, batch_size, max_length=n + ROOM), 1024
  # The same in every layer, and again and again along it: random numbers of every layer take
  # minutes to compile, those of a long cache twice its memory.
  keys = jax.random.split(jax.random.key(0))
  some = jax.random.normal(
    keys[0], (2, batch_size, config.num_kv_heads, period, config.head_dim), config.activation_dtype
  )
  noise = jax.random.normal(keys[1], (batch_size, config.num_kv_heads, period))

  @functools.partial(jax.jit, donate_argnums=0)
  def fill(cache, some, noise):
    again = lambda x, size, axis: jnp.take(x, jnp.arange(size) % period, axis=axis)
    rows = lambda old: KeysAndValues(*(again(x, old.key.shape[2], 2) for x in some))

    def layer(old):
      if not isinstance(old, SelectionCache):
        return rows(old)
      left = max(n - config.window, 0)  # tokens that have left the window
      there = jnp.arange(config.k) < left
      position = (
        (jnp.arange(config.k, dtype=jnp.float32) * (left / config.k)).astype(jnp.int32)
        if left > config.k
        else jnp.arange(config.k, dtype=jnp.int32)
      )
      slope = config.scorer_init_slope * n / 1024
      score = jnp.where(there, slope + again(noise, config.k, 2), -jnp.inf)
      return old._replace(
        rows=rows(old.rows),
        score=old.score.at[..., : config.k].set(score),
        position=jnp.broadcast_to(jnp.where(there, position, NOWHERE), old.position.shape),
        pending=slope + again(noise, config.window, 2),
        scorer=old.scorer._replace(deviation=jnp.full_like(old.scorer.deviation, n)),
      )

    return Cache(jnp.full(batch_size, n, jnp.int32), tuple(map(layer, cache.layers)))

  return fill(cache, some, noise)


class DecodeCell(Cell):
  """Greedy decoding of one model: a call is AHEAD tokens a row, computed in one go from the state
  that the call before left.
  """

  def __init__(self, job: Job, params: InferenceParams):
    super().__init__(None, (), in_order=True)
    self.job, self._params, self.bytes = job, params, None

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
    batch, config = self.job.batch_size, self.job.config
    cache = jax.eval_shape(lambda: init_cache(config, batch, max_length=self.job.n + ROOM))
    self.bytes = cache_bytes(cache)
    stats = jax.devices()[0].memory_stats() or {}
    if self.bytes + weight_bytes(config) > stats.get("bytes_limit", math.inf):
      raise MemoryError
    begin = time.perf_counter()
    self._function = run_steps.lower(config, "greedy", AHEAD, self._params, cache, *self._inputs())
    super().compile()
    self.compile_seconds = time.perf_counter() - begin

  def adopt(self, other: "DecodeCell") -> None:
    """What was compiled for a cache of the same size serves for another context."""
    super().adopt(other)
    self.bytes, self.compile_seconds = other.bytes, 0.0

  def start(self) -> None:
    self._args = filled(self.job.config, self.job.batch_size, self.job.n), self._inputs()

  def release(self) -> None:
    self._args = ()

  def calibrate(self, seconds: float) -> None:
    super().calibrate(seconds)
    self.inner = min(self.inner, ROOM // AHEAD)  # so that a full layer's rows have room

  def time(self) -> float:
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

  def record(self) -> dict:
    found = super().record()
    if "failed" in found:
      return found | {"cache_bytes": self.bytes}
    # of a token, not of a call
    found |= {name: found[name] / AHEAD for name in ("ms", "fastest", "slowest")}
    return found | {
      "tokens_per_second": 1e3 * self.job.batch_size / found["ms"],
      "cache_bytes": self.bytes,
      "compile_seconds": self.compile_seconds,
    }


class PrefillCell(Cell):
  """A prompt from an empty cache to the logits after it: sparsek in chunks of the default size,
  full attention in one, where it is fastest.
  """

  def __init__(self, job: Job, params: InferenceParams):
    super().__init__(None, (), in_order=True)
    self.job, self._params = job, params

  def start(self) -> None:
    tokens = np.random.default_rng(0).integers(
      0, self.job.config.vocab_size, (self.job.batch_size, self.job.n), dtype=np.int32
    )
    chunk = self.job.n if self.job.config.attention == ("full",) else None

    def run():
      cache = init_cache(self.job.config, self.job.batch_size, max_length=self.job.n)
      return prefill(
        self.job.config, self._params, cache, tokens, last_only=True, chunk_size=chunk, donate=True
      )

    begin = time.perf_counter()
    self._function = lambda: run()[0]
    jax.block_until_ready(self._function())
    self.compile_seconds = time.perf_counter() - begin

  def release(self) -> None:
    self._function = None

  def record(self) -> dict:
    found = super().record()
    if "failed" in found:
      return found
    return found | {
      "tokens_per_second": 1e3 * self.job.n * self.job.batch_size / found["ms"],
      "compile_seconds": self.compile_seconds,
    }


def measure_transformers(
  jobs: Sequence[Job],
  kinds: Sequence[str],
  max_bytes: float,
  rounds: int,
  say: Callable[[str], None],
) -> dict[int, dict]:
  """{place of the job: what `transformers_decode.run` found}, for decode jobs with a cache of at
  most max_bytes; to be called before JAX takes the memory.
  """
  found = {}
  for i, job in enumerate(jobs):
    size = (
      2
      * job.batch_size
      * job.n
      * job.config.num_layers
      * job.config.num_kv_heads
      * job.config.head_dim
      * 2
    )
    if "transformers" in kinds and job.what == "decode":
      found[i] = (
        {"failed": "out of memory"}
        if size > max_bytes
        else transformers_decode.run(job.config, job.n, job.batch_size, rounds)
      )
      found[i] |= {"cache_bytes": size}
      say(f"n={job.n}, batch {job.batch_size}, transformers: {found[i].get('failed') or 'done'}")
  return found


def measure(
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
  their caches are small and their times are to be compared; then every job of full attention alone,
  for its memory.

  Args:
    jobs: what to time, under each of `kinds` (those in KINDS).
    rounds: most samples of each.
    seconds: no round of a group is begun that would end later than this after its first began.
    sample_seconds: a sample takes as many calls as last this long.
    others: what `measure_transformers` found.
    say: takes lines of progress.
  Yields:
    After each round: how many of the last group are done, and the rows so far: what the job is, and
    "rivals": {kind: {"ms" or "failed", ...}}.
  """
  config = jobs[0].config
  rate, size = (
    bandwidth(jax.devices()[0]),
    count_params(abstract_params(under("full", config))) / 1e6,
  )
  fields = {
    "model": f"{size:.0f}M parameters, {config.dtype}",
    "k": config.k,
    "window": config.window,
    "gate": config.gate,
    "weights_ms": None if rate is None else 1e3 * weight_bytes(under("sparsek", config)) / rate,
  }
  rows = [
    {**fields, "what": job.what, "n": job.n, "batch_size": job.batch_size, "rivals": {}}
    for job in jobs
  ]
  for i, found in (others or {}).items():
    rows[i]["rivals"]["transformers"] = found
  groups = {}
  for kind in kinds:
    for i, job in enumerate(jobs):
      if kind in KINDS:
        together = job.what == "decode" and kind == "sparsek"
        groups.setdefault((kind, job.what, job.batch_size, None if together else job.n), []).append(
          (i, dataclasses.replace(job, config=under(kind, config)))
        )
  if not groups:
    yield 0, rows
    return
  # of full attention too
  params = inference_params(
    under("sparsek", config), init_params(under("sparsek", config), jax.random.key(0))
  )
  for (kind, what, *_), members in groups.items():
    cells = [(DecodeCell if what == "decode" else PrefillCell)(job, params) for _, job in members]
    for (i, job), cell in zip(members, cells):
      if what == "decode" and cell is not cells[0]:
        cell.adopt(cells[0])
      elif what == "decode":
        cell.attempt(cell.compile)
      cell.attempt(cell.start)
      cell.attempt(cell.calibrate, sample_seconds)
      say(
        f"{what}, n={job.n}, batch {job.batch_size}, {kind}: "
        + (cell.failed or f"ready in {cell.compile_seconds:.0f} s, {cell.inner} calls a sample")
      )
    for done in run_rounds(cells, rounds, seconds):
      for (i, _), cell in zip(members, cells):
        rows[i]["rivals"][kind] = cell.record()
      yield done, [row for row in rows if row["rivals"]]
    for cell in cells:
      cell.release()
