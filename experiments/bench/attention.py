"""Times implementations of attention side by side and holds ours against the float32 truth;
`experiments.benchmark` is the command.
"""

import concurrent.futures
import dataclasses
import functools
import importlib.metadata
import math
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from sparsek.attention import api as attention_api
from sparsek.attention import documents, prefix_selection
from sparsek.attention.backends import choose_implementation
from sparsek.kernels import compaction, devices, reference, specs
from sparsek.kernels.devices import on_nvidia_gpu
from sparsek.kernels.hopper import attention as hopper_attention
from sparsek.runs import run_directory

RIVALS = ("sparsek", "sliding_window", "dense", "xla", "thresholds")
# heads, kv_heads, head_dim of the headline; the first is the main one
SHAPES = ((16, 16, 128), (32, 8, 128), (16, 16, 64))
HEADLINE_LENGTHS = tuple(2**i for i in range(11, 18))
FORWARD, BOTH = "forward", "forward+backward"
MAX_INNER = 1000
MAX_XLA_DENSE = 4096  # it holds all logits, several times
# of XLA and cuDNN: too little memory, a shape that is not supported
ERRORS = (RuntimeError, MemoryError)


@dataclasses.dataclass(frozen=True)
class Problem:
  """One attention problem of batch 1, and who is to solve it: `rivals` out of RIVALS, the rest as
  in `sparsek.sparsek_attention` and kernels/specs.py.
  """

  n: int
  heads: int = 16
  kv_heads: int = 16
  head_dim: int = 128
  k: int = 512
  window: int = 512
  gate: str = "straight_through"
  dtype: str = "bfloat16"
  scores: str = "normal"
  rivals: tuple[str, ...] = RIVALS


def headline(lengths: Sequence[int] = HEADLINE_LENGTHS, **given) -> list[Problem]:
  """The problems behind every published figure; `given` replaces fields of all of them.

  The main shape at all lengths; at a quarter of the longest also xla, the thresholds alone, rising
  and falling scores, and the other shapes.
  """
  longest = max(lengths)
  at = longest // 4 if longest // 4 in lengths else longest
  ours, all_lengths = ("sparsek", "sliding_window"), ("sparsek", "sliding_window", "dense")
  shape = lambda sizes: dict(zip(("heads", "kv_heads", "head_dim"), sizes))
  problems = [
    Problem(n, **shape(SHAPES[0]), rivals=RIVALS if n == at else all_lengths)
    for n in sorted(lengths)
  ]
  problems += [
    Problem(at, **shape(SHAPES[0]), scores=scores, rivals=ours) for scores in ("rising", "falling")
  ]
  problems += [Problem(at, **shape(sizes), rivals=ours) for sizes in SHAPES[1:]]
  distinct = {}
  for problem in problems:
    problem = dataclasses.replace(problem, **given)
    distinct.setdefault(dataclasses.replace(problem, rivals=()), problem)
  return list(distinct.values())


def uses_cudnn(dtype: str) -> bool:
  """Whether the dense and sliding-window rivals are cuDNN's, which takes 16-bit inputs only; else
  they are XLA's.
  """
  return dtype in ("bfloat16", "float16") and on_nvidia_gpu()


def what_runs(problem: Problem, implementation: str | None) -> str:
  """The implementation that "sparsek" is on this device."""
  query = jax.ShapeDtypeStruct((1, problem.n, problem.heads, problem.head_dim), problem.dtype)
  return implementation or choose_implementation(None, query, None, 0).implementation


@dataclasses.dataclass(frozen=True)
class Rival:
  """Something to time.

  Attributes:
    name: out of RIVALS.
    label: for people; says whose implementation it is.
    function: (query, key, value, scores) -> (what gets a cotangent, what is only computed).
    argnums: the arguments that it reads and is differentiated in.
    like: the argument whose shape and dtype the cotangent has.
    finish: what is made of what is only computed, outside of the differentiation: kernels for
      integers have no derivative.
  """

  name: str
  label: str
  function: Callable
  argnums: tuple[int, ...] = (0, 1, 2)
  like: int = 0
  finish: Callable = lambda computed: computed


def make_rival(name: str, problem: Problem, implementation: str | None = None) -> Rival:
  """The rival of that name for a problem; `implementation` is that of "sparsek"."""
  n, k, window, budget = problem.n, problem.k, problem.window, problem.k + problem.window
  runs, cudnn = what_runs(problem, implementation), uses_cudnn(problem.dtype)
  of = "cuDNN" if cudnn else "XLA"

  def attend(query, key, value, scores, implementation):
    return attention_api.sparsek_attention(
      query,
      key,
      value,
      scores,
      k=k,
      window=window,
      gate=problem.gate,
      implementation=implementation,
    ), ()

  def dot_product(query, key, value, scores, **kwargs):
    return jax.nn.dot_product_attention(query, key, value, is_causal=True, **kwargs), ()

  def near(query, key, value, scores):
    return attention_api.sliding_window_attention(query, key, value, window=budget), ()

  def thresholds(query, key, value, scores):
    by_head = jnp.swapaxes(scores, 1, 2)
    bounds = documents.document_bounds(None, *scores.shape[:2])
    threshold, expiry, order = prefix_selection.select(
      by_head, *bounds, min(k, n), min(window, n), False, devices.can_run()
    )
    return jnp.swapaxes(threshold, 1, 2), (expiry, order)

  def lists(computed):
    expiry, order = computed
    # all of it returned, or XLA would leave it out
    return jnp.swapaxes(expiry, 1, 2), compact(expiry, order, min(k, n), min(window, n), runs)

  if name == "sparsek":
    return Rival(
      name,
      f"sparsek, {runs}",
      functools.partial(attend, implementation=implementation),
      (0, 1, 2, 3),
    )
  if name == "xla":
    return Rival(name, "xla", functools.partial(attend, implementation="xla"), (0, 1, 2, 3))
  if name == "dense":
    return Rival(
      name,
      f"{of} dense",
      functools.partial(dot_product, implementation="cudnn" if cudnn else "xla"),
    )
  # cuDNN is told the tokens before the query's own; a window as long as the row is dense
  if name == "sliding_window" and cudnn:
    latest = None if budget >= n else (budget - 1, 0)
    return Rival(
      name,
      f"{of} window",
      functools.partial(dot_product, implementation="cudnn", local_window_size=latest),
    )
  if name == "sliding_window":
    return Rival(name, f"{of} window", near)
  if name == "thresholds":
    return Rival(name, "thresholds", thresholds, (3,), 3, lists)
  raise ValueError(f"rival {name!r} must be one of {', '.join(RIVALS)}")


def compact(expiry: jax.Array, order: jax.Array, k: int, window: int, implementation: str):
  """The lists of selected tokens that an implementation makes of expiry and order [batch, groups,
  n].
  """
  n = expiry.shape[2]
  if implementation == "mosaic_gpu":
    return hopper_attention.make_lists(
      expiry,
      order,
      k=k,
      window=window,
      chunk=hopper_attention.chunk_size(n),
      kernels=devices.can_run(),
    )
  return jax.vmap(
    jax.vmap(lambda e: compaction.chunk_lists(e, k, window, compaction.chunk_size(n, k, window)))
  )(expiry)


def choose_rivals(
  problems: Sequence[Problem],
  wanted: Sequence[str] | None = None,
  implementation: str | None = None,
  max_dense: int | None = None,
  max_xla: int | None = None,
) -> list[Problem]:
  """The problems with those of their rivals that are wanted and that their length allows.

  Args:
    problems: with every rival that makes sense.
    wanted: names; None: all, but xla only where "sparsek" is something else.
    implementation: of "sparsek".
    max_dense, max_xla: longest lengths; None: any, but for dense only where it is cuDNN's.
  """
  chosen = []
  for problem in problems:
    same = what_runs(problem, implementation) == "xla"
    longest = {
      "dense": (problem.n if uses_cudnn(problem.dtype) else MAX_XLA_DENSE)
      if max_dense is None
      else max_dense,
      "xla": 0 if wanted is None and same else problem.n if max_xla is None else max_xla,
    }
    rivals = tuple(
      name
      for name in problem.rivals
      if (wanted is None or name in wanted) and problem.n <= longest.get(name, problem.n)
    )
    chosen.append(dataclasses.replace(problem, rivals=rivals))
  return chosen


def make_pass(rival: Rival, direction: str) -> Callable:
  """The function that is timed: (query, key, value, scores, cotangent) -> output, and for both
  directions the gradients besides.
  """
  if direction == FORWARD:

    def forward(query, key, value, scores, cotangent):
      out, computed = rival.function(query, key, value, scores)
      return out, rival.finish(computed)

    return forward

  def both(*inputs):
    *inputs, cotangent = inputs

    def function(*read):
      full = list(inputs)
      for i, x in zip(rival.argnums, read):
        full[i] = x
      return rival.function(*full)

    out, pull, computed = jax.vjp(function, *(inputs[i] for i in rival.argnums), has_aux=True)
    # the output too, as in training: a backward that does not need it may not save it
    return (out, rival.finish(computed), pull(cotangent))

  return both


@functools.partial(jax.jit, static_argnums=0)
def _inputs(spec):
  """((query, key, value, scores), cotangents of their shapes)."""
  inputs = specs.make_inputs(spec)
  keys = jax.random.split(jax.random.key(1), len(inputs))
  return inputs, tuple(
    jax.random.normal(key, x.shape).astype(x.dtype) for key, x in zip(keys, inputs)
  )


def make_inputs(problem: Problem):
  """((query, key, value, scores), cotangents of their shapes), random."""
  return _inputs(
    specs.Spec(
      "benchmark",
      n=problem.n,
      heads=problem.heads,
      groups=problem.kv_heads,
      head_dim=problem.head_dim,
      scores=problem.scores,
      dtype=problem.dtype,
    )
  )


def reason(error: Exception) -> str:
  """Why something could not be timed, in a line; too much shared memory is not out of memory, but a
  kernel that fits no device.
  """
  text = str(error).lower()
  if isinstance(error, MemoryError) or (
    ("out of memory" in text or "failed to allocate" in text) and "shared memory" not in text
  ):
    return "out of memory"
  return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


class Cell:
  """One function on one problem: what became of it.

  Attributes:
    failed: why it cannot be timed, or None.
    mib: arguments, outputs and temporaries of the compiled function together; None where it was not
      compiled or the backend does not say.
    inner: calls a sample.
    seconds: per call, one of each round.
  """

  def __init__(self, function: Callable, args: tuple, in_order: bool = False):
    self._function, self._args, self._in_order = function, args, in_order
    self.failed, self.mib, self.inner, self.seconds = None, None, 1, []

  def attempt(self, action: Callable, *args) -> None:
    """Runs it, unless something failed before; a failure is kept, for the others to go on."""
    if self.failed is None:
      try:
        action(*args)
      except ERRORS as error:
        self.failed, self.seconds = reason(error), []

  def lower(self) -> None:
    self._function = jax.jit(self._function).lower(*self._args)

  def compile(self) -> None:
    self._function = self._function.compile()
    memory = self._function.memory_analysis()
    if memory is not None:
      parts = (
        memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        + memory.temp_size_in_bytes
        - memory.alias_size_in_bytes
      )
      self.mib = parts / 2**20

  def adopt(self, other: "Cell") -> None:
    """Takes over what was compiled for inputs of the same shapes."""
    self._function, self.mib, self.failed = other._function, other.mib, other.failed

  def time(self) -> float:
    """Seconds of `inner` calls one after the other. A GPU takes them in order, so that it never
    waits for the host; elsewhere they could overlap.
    """
    begin = time.perf_counter()
    for _ in range(self.inner):
      out = self._function(*self._args)
      if not self._in_order:
        jax.block_until_ready(out)
    jax.block_until_ready(out)
    return time.perf_counter() - begin

  def calibrate(self, seconds: float) -> None:
    """Warms up, and has a sample take that long."""
    self.time()
    for _ in range(3):
      taken = self.time()
      if taken >= seconds or self.inner == MAX_INNER:
        break
      self.inner = min(MAX_INNER, math.ceil(1.1 * self.inner * seconds / max(taken, 1e-9)))

  def sample(self) -> None:
    self.seconds.append(self.time() / self.inner)

  def record(self) -> dict:
    if self.failed is not None:
      return {"failed": self.failed, "mib": self.mib}
    milliseconds = sorted(1e3 * x for x in self.seconds)
    return {
      "ms": statistics.median(milliseconds),
      "fastest": milliseconds[0],
      "slowest": milliseconds[-1],
      "rounds": len(milliseconds),
      "inner": self.inner,
      "mib": self.mib,
    }


def run_rounds(cells: Sequence[Cell], rounds: int, seconds: float) -> Iterator[int]:
  """Samples all cells in turn, there and back, so that none always follows the same one; stops
  before a round that would not end in time.

  Yields the number of rounds done, after each.
  """
  begin = time.perf_counter()
  for turn in range(rounds):
    for cell in cells if turn % 2 == 0 else reversed(cells):
      cell.attempt(cell.sample)
    yield turn + 1
    elapsed = time.perf_counter() - begin
    if elapsed * (turn + 2) / (turn + 1) > seconds:
      return


def measure(
  problems: Sequence[Problem],
  implementation: str | None = None,
  rounds: int = 10,
  seconds: float = math.inf,
  sample_seconds: float = 0.05,
  say: Callable[[str], None] = lambda text: None,
) -> Iterator[tuple[int, list[dict]]]:
  """Times all problems and rivals against one another.

  Args:
    problems: what to time.
    implementation: of the rival "sparsek".
    rounds: most samples of each.
    seconds: no round is begun that would end later than this after the first began.
    sample_seconds: a sample takes as many calls as last this long; the host is not ahead of a GPU
      during the first of them, which should not count.
    say: takes lines of progress.
  Yields:
    After each round how many are done, and the rows so far: the problem's fields, "labels" of the
    rivals by name, and "rivals": {name: {"forward" or "forward+backward": {"ms" or "failed", "mib",
    ...}}}.
  """
  in_order, begin = jax.devices()[0].platform == "gpu", time.perf_counter()
  cells: dict[tuple, Cell] = {}
  programs: dict[tuple, Cell] = {}  # the cell that compiles, for all families of scores
  adopted = []
  for problem in problems:
    inputs, cotangents = make_inputs(problem)
    for name in problem.rivals:
      rival = make_rival(name, problem, implementation)
      for direction in (FORWARD, BOTH):
        key = _cell_key(problem, rival, direction)
        if key not in cells:
          cells[key] = cell = Cell(
            make_pass(rival, direction), (*inputs, cotangents[rival.like]), in_order
          )
          shared = _cell_key(dataclasses.replace(problem, scores=""), rival, direction)
          if shared not in programs:
            programs[shared] = cell
            cell.attempt(cell.lower)
          adopted.append((cell, programs[shared]))
  say(f"{len(programs)} functions traced: {time.perf_counter() - begin:.0f} s")
  with concurrent.futures.ThreadPoolExecutor(
    min(16, os.cpu_count() or 1)
  ) as pool:  # XLA compiles outside Python's lock
    list(pool.map(lambda cell: cell.attempt(cell.compile), programs.values()))
  say(f"compiled: {time.perf_counter() - begin:.0f} s")
  for cell, program in adopted:
    cell.adopt(program)
    cell.attempt(cell.calibrate, sample_seconds)
  say(f"warm: {time.perf_counter() - begin:.0f} s")

  def row(problem):
    made = [make_rival(name, problem, implementation) for name in problem.rivals]
    figures = {
      rival.name: {d: cells[_cell_key(problem, rival, d)].record() for d in (FORWARD, BOTH)}
      for rival in made
    }
    labels = {rival.name: rival.label for rival in made}
    return {**dataclasses.asdict(problem), "rivals": figures, "labels": labels}

  for done in run_rounds(list(cells.values()), rounds, seconds):
    say(f"round {done} of {rounds}: {time.perf_counter() - begin:.0f} s")
    yield done, [row(problem) for problem in problems]


def _cell_key(problem: Problem, rival: Rival, direction: str) -> tuple:
  """A rival that reads no scores is timed once for all families of them."""
  reads = 3 in rival.argnums
  return (
    dataclasses.replace(problem, rivals=(), scores=problem.scores if reads else ""),
    rival.name,
    direction,
  )


def errors(problem: Problem, implementation: str | None = None) -> dict[str, dict]:
  """|x - truth| / |truth| of the output and every gradient, for the problem's rivals and for the
  truth rounded to the inputs' dtype.

  The truth is the O(n^2) reference in float32 on the same (rounded) inputs, one key head at a time,
  so that n = 4096 fits.

  Returns:
    {"relative": {who: {"out", "dquery", ...: float}}, "failed": {who: why}}.
  """
  names = ("out", "dquery", "dkey", "dvalue", "dscores")
  inputs, cotangents = make_inputs(problem)
  per_key_head = problem.heads // problem.kv_heads

  @jax.jit
  def truth(query, key, value, scores, cotangent):
    function = functools.partial(
      reference.attention,
      k=problem.k,
      window=problem.window,
      gate=problem.gate,
      scale=problem.head_dim**-0.5,
    )
    out, pull = jax.vjp(function, *(x.astype(jnp.float32) for x in (query, key, value, scores)))
    return out, *pull(cotangent.astype(jnp.float32))

  def distances(values):
    values = [np.asarray(jax.device_get(x), np.float64) for x in values]
    return {
      name: float(np.linalg.norm(x - y) / np.linalg.norm(y))
      for name, x, y in zip(names, values, true)
    }

  def of_head(x, head):
    several = per_key_head if x.shape[2] == problem.heads else 1
    return x[:, :, head * several : (head + 1) * several]

  found = {"relative": {}, "failed": {}}
  try:
    heads = [
      jax.device_get(truth(*(of_head(x, head) for x in (*inputs, cotangents[0]))))
      for head in range(problem.kv_heads)
    ]
  except ERRORS as error:
    return {**found, "failed": {"reference": reason(error)}}
  true = [np.concatenate(parts, axis=2).astype(np.float64) for parts in zip(*heads)]
  for name in problem.rivals:
    try:
      out, _, gradients = jax.jit(make_pass(make_rival(name, problem, implementation), BOTH))(
        *inputs, cotangents[0]
      )
      found["relative"][name] = distances([out, *gradients])
    except ERRORS as error:
      found["failed"][name] = reason(error)
  found["relative"]["rounding alone"] = distances(
    [x.astype(kind.dtype) for x, kind in zip(true, (inputs[0], *inputs))]
  )
  return found


def environment() -> dict:
  """What ran: versions, the GPU libraries' too, and the device."""
  device, libraries = jax.devices()[0], {}
  for package in ("nvidia-cudnn-cu12", "nvidia-cudnn-cu13"):
    try:
      libraries[package] = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
      pass
  return {
    "device": device.device_kind,
    "versions": {
      **run_directory.versions(),
      "libraries": libraries,
      "backend": device.client.platform_version,
    },
  }
