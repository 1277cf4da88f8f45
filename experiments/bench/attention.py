"""Timing of implementations of attention, and a comparison of ours with the float32 reference.

`experiments.benchmark` is the command.
"""

import concurrent.futures
import dataclasses
import functools
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sparsek.attention import api as attention_api
from sparsek.attention import documents, prefix_selection
from sparsek.attention.backends import GPU_KERNELS, choose_implementation
from sparsek.experiments.bench.cells import ERRORS, Cell, reason, run_rounds
from sparsek.kernels import compaction, devices, reference, specs
from sparsek.kernels.devices import on_nvidia_gpu

BASELINES = ("sparsek", "sliding_window", "dense", "xla", "thresholds")
# heads, kv_heads, head_dim of the headline; the first is the main one
SHAPES = ((16, 16, 128), (32, 8, 128), (16, 16, 64), (8, 8, 256))
HEADLINE_LENGTHS = tuple(2**i for i in range(11, 18))
FORWARD, BOTH = "forward", "forward+backward"
MAX_XLA_DENSE = 4096  # it holds several copies of all logits
GRADIENTS = ("out", "dquery", "dkey", "dvalue", "dscores")  # what `errors` compares


@dataclasses.dataclass(frozen=True)
class Problem:
  """One attention problem of batch 1, and what is timed on it.

  Attributes:
    baselines: names out of BASELINES.
    n, heads, ...: as in `sparsek.sparsek_attention` and kernels/specs.py.
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
  baselines: tuple[str, ...] = BASELINES

  def record(self) -> dict[str, Any]:
    """Returns the fields as a record holds them, which has always called baselines "rivals"."""
    fields = dataclasses.asdict(self)
    return {**fields, "rivals": fields.pop("baselines")}


def headline(lengths: Sequence[int] = HEADLINE_LENGTHS, **replaced: Any) -> list[Problem]:
  """Returns the problems behind the published figures; `replaced` are fields of all of them.

  The main shape at all lengths; at a quarter of the longest also xla, the thresholds alone, rising
  and falling scores, and the other shapes; the thresholds and these shapes at a sixteenth, too.
  """
  longest = max(lengths)
  at = longest // 4 if longest // 4 in lengths else longest
  short = [longest // 16] if longest // 16 in lengths else []
  ours, all_lengths = ("sparsek", "sliding_window"), ("sparsek", "sliding_window", "dense")
  extra = {at: BASELINES, **dict.fromkeys(short, (*all_lengths, "thresholds"))}

  def problem(n, sizes=SHAPES[0], **fields):
    return Problem(n, **dict(zip(("heads", "kv_heads", "head_dim"), sizes)), **fields)

  problems = [problem(n, baselines=extra.get(n, all_lengths)) for n in sorted(lengths)]
  problems += [problem(at, scores=scores, baselines=ours) for scores in ("rising", "falling")]
  problems += [problem(n, sizes, baselines=ours) for sizes in SHAPES[1:] for n in (*short, at)]
  distinct: dict[Problem, Problem] = {}
  for each in problems:
    each = dataclasses.replace(each, **replaced)
    distinct.setdefault(dataclasses.replace(each, baselines=()), each)
  return list(distinct.values())


def uses_cudnn(dtype: str) -> bool:
  """Returns whether the dense and sliding-window baselines are cuDNN's; else they are XLA's.

  cuDNN takes 16-bit inputs only.
  """
  return dtype in ("bfloat16", "float16") and on_nvidia_gpu()


def what_runs(problem: Problem, implementation: str | None) -> str:
  """Returns the implementation that "sparsek" is on this device."""
  query = jax.ShapeDtypeStruct((1, problem.n, problem.heads, problem.head_dim), problem.dtype)
  return implementation or choose_implementation(None, query, None, 0).implementation


@dataclasses.dataclass(frozen=True)
class Baseline:
  """Something to time.

  Attributes:
    name: out of BASELINES.
    label: name in tables; says whose implementation it is.
    function: (query, key, value, scores) -> (what gets a cotangent, what is only computed).
    argnums: the arguments that it reads, and by which it is differentiated.
    like: the argument whose shape and dtype the cotangent has.
    finish: applied to what is only computed, outside of the differentiation: kernels for integers
      have no derivative.
  """

  name: str
  label: str
  function: Callable
  argnums: tuple[int, ...] = (0, 1, 2)
  like: int = 0
  finish: Callable = lambda computed: computed


def make_baseline(name: str, problem: Problem, implementation: str | None = None) -> Baseline:
  """Returns the baseline of that name for a problem; `implementation` is that of "sparsek"."""
  runs, cudnn = what_runs(problem, implementation), uses_cudnn(problem.dtype)
  library = "cuDNN" if cudnn else "XLA"
  if name == "sparsek":
    function = functools.partial(_attend, problem, implementation)
    return Baseline(name, f"sparsek, {runs}", function, (0, 1, 2, 3))
  if name == "xla":
    return Baseline(name, "xla", functools.partial(_attend, problem, "xla"), (0, 1, 2, 3))
  if name == "dense":
    function = functools.partial(_dot_product, implementation="cudnn" if cudnn else "xla")
    return Baseline(name, f"{library} dense", function)
  if name == "sliding_window":
    function = functools.partial(_cudnn_window if cudnn else _window, problem.k + problem.window)
    return Baseline(name, f"{library} window", function)
  if name == "thresholds":
    k, window = min(problem.k, problem.n), min(problem.window, problem.n)
    finish = functools.partial(_lists, k, window, runs)
    return Baseline(name, name, functools.partial(_thresholds, k, window), (3,), 3, finish)
  raise ValueError(f"baseline {name!r} must be one of {', '.join(BASELINES)}")


def _attend(problem, implementation, query, key, value, scores):
  options = {"k": problem.k, "window": problem.window, "gate": problem.gate}
  out = attention_api.sparsek_attention(
    query, key, value, scores, **options, implementation=implementation
  )
  return out, ()


def _dot_product(query, key, value, scores, **options):
  return jax.nn.dot_product_attention(query, key, value, is_causal=True, **options), ()


def _cudnn_window(budget, query, key, value, scores):
  # cuDNN counts only the tokens before the query's own; a window as long as the row is dense
  latest = None if budget >= query.shape[1] else (budget - 1, 0)
  return _dot_product(query, key, value, scores, implementation="cudnn", local_window_size=latest)


def _window(budget, query, key, value, scores):
  return attention_api.sliding_window_attention(query, key, value, window=budget), ()


def _thresholds(k, window, query, key, value, scores):
  by_head = jnp.swapaxes(scores, 1, 2)
  bounds = documents.document_bounds(None, *scores.shape[:2])
  threshold, expiry, order = prefix_selection.select(
    by_head, *bounds, k, window, False, devices.can_run_portable()
  )
  return jnp.swapaxes(threshold, 1, 2), (expiry, order)


def _lists(k, window, implementation, computed):
  expiry, order = computed
  # All of it is returned: XLA removes what nobody reads.
  return jnp.swapaxes(expiry, 1, 2), compact(expiry, order, k, window, implementation)


def compact(expiry: jax.Array, order: jax.Array, k: int, window: int, implementation: str) -> Any:
  """Returns the lists of selected tokens that an implementation makes.

  Args:
    expiry, order: [batch, groups, n].
    k, window: at most n.
    implementation: "mosaic_gpu", "mosaic_mma" or another.
  """
  n = expiry.shape[2]
  if implementation in GPU_KERNELS:
    from sparsek.kernels.hopper import attention as hopper_attention  # needs private names of JAX

    return hopper_attention.make_lists(
      expiry,
      order,
      k=k,
      window=window,
      chunk=hopper_attention.chunk_size(n),
      kernels=devices.can_run_portable(),
    )
  chunk = compaction.chunk_size(n, k, window)
  make = functools.partial(compaction.chunk_lists, k=k, window=window, chunk=chunk)
  return jax.vmap(jax.vmap(make))(expiry)


def choose_baselines(
  problems: Sequence[Problem],
  wanted: Sequence[str] | None = None,
  implementation: str | None = None,
  max_dense: int | None = None,
  max_xla: int | None = None,
) -> list[Problem]:
  """Returns the problems with those baselines that are wanted and that their length allows.

  Args:
    problems: with all baselines that make sense.
    wanted: names; None: all, but xla only where "sparsek" is something else.
    implementation: of "sparsek".
    max_dense, max_xla: longest lengths; None: any, but MAX_XLA_DENSE for dense attention in XLA.
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
    baselines = tuple(
      name
      for name in problem.baselines
      if (wanted is None or name in wanted) and problem.n <= longest.get(name, problem.n)
    )
    chosen.append(dataclasses.replace(problem, baselines=baselines))
  return chosen


def make_pass(baseline: Baseline, direction: str) -> Callable:
  """Returns the function that is timed.

  It takes (query, key, value, scores, cotangent) and returns the output, and for both directions
  also the gradients.
  """
  if direction == FORWARD:

    def forward(query, key, value, scores, cotangent):
      out, computed = baseline.function(query, key, value, scores)
      return out, baseline.finish(computed)

    return forward

  def both(*arguments):
    *inputs, cotangent = arguments

    def function(*read):
      full = list(inputs)
      for i, x in zip(baseline.argnums, read):
        full[i] = x
      return baseline.function(*full)

    out, pull, computed = jax.vjp(function, *(inputs[i] for i in baseline.argnums), has_aux=True)
    # The output is returned too, as in training: XLA must not skip it where no gradient needs it.
    return (out, baseline.finish(computed), pull(cotangent))

  return both


@functools.partial(jax.jit, static_argnums=0)
def _inputs(spec):
  inputs = specs.make_inputs(spec)
  keys = jax.random.split(jax.random.key(1), len(inputs))
  return inputs, tuple(
    jax.random.normal(key, x.shape).astype(x.dtype) for key, x in zip(keys, inputs)
  )


def make_inputs(problem: Problem) -> tuple[tuple[jax.Array, ...], tuple[jax.Array, ...]]:
  """Returns random (query, key, value, scores), and cotangents of their shapes."""
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


class _Cells:
  """The cells of all problems, baselines and directions; equal ones exist once."""

  def __init__(self, problems: Sequence[Problem], implementation: str | None):
    self._implementation = implementation
    self.by_key: dict[tuple, Cell] = {}
    self.programs: dict[tuple, Cell] = {}  # the cell that compiles, for all families of scores
    in_order = jax.devices()[0].platform == "gpu"
    for problem in problems:
      inputs, cotangents = make_inputs(problem)
      for name in problem.baselines:
        baseline = make_baseline(name, problem, implementation)
        for direction in (FORWARD, BOTH):
          key = _cell_key(problem, baseline, direction)
          if key not in self.by_key:
            arguments = (*inputs, cotangents[baseline.like])
            cell = Cell(make_pass(baseline, direction), arguments, in_order)
            self.by_key[key] = cell
            self.programs.setdefault(_shared_key(key), cell)

  def prepare(self, sample_seconds: float, say: Callable[[str], None], begin: float) -> None:
    """Compiles each program once, and warms all cells up."""
    elapsed = lambda: f"{time.perf_counter() - begin:.0f} s"
    for program in self.programs.values():
      program.attempt(program.lower)
    say(f"{len(self.programs)} functions traced: {elapsed()}")
    # XLA compiles without Python's global lock
    with concurrent.futures.ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
      list(pool.map(lambda cell: cell.attempt(cell.compile), self.programs.values()))
    say(f"compiled: {elapsed()}")
    for key, cell in self.by_key.items():
      cell.adopt(self.programs[_shared_key(key)])
      cell.attempt(cell.calibrate, sample_seconds)
    say(f"warm: {elapsed()}")
    for (_, name, direction), cell in self.by_key.items():
      if (name, direction) == ("sparsek", BOTH):
        cell.attempt(cell.trace)

  def row(self, problem: Problem) -> dict[str, Any]:
    """Returns a problem's row of the record."""
    made = [make_baseline(name, problem, self._implementation) for name in problem.baselines]
    figures = {
      baseline.name: {
        direction: self.by_key[_cell_key(problem, baseline, direction)].record()
        for direction in (FORWARD, BOTH)
      }
      for baseline in made
    }
    labels = {baseline.name: baseline.label for baseline in made}
    return {**problem.record(), "rivals": figures, "labels": labels}


def time_problems(
  problems: Sequence[Problem],
  implementation: str | None = None,
  rounds: int = 10,
  seconds: float = math.inf,
  sample_seconds: float = 0.05,
  say: Callable[[str], None] = lambda text: None,
) -> Iterator[tuple[int, list[dict]]]:
  """Times all problems and baselines against one another.

  Args:
    problems: what to time.
    implementation: of the baseline "sparsek".
    rounds: most samples of each.
    seconds: no round is begun that would end later than this after the first began.
    sample_seconds: a sample makes calls for this long, so many that the first ones hardly count:
      during these the host is not yet ahead of the GPU.
    say: called with lines of progress.
  Yields:
    After each round how many are done, and the rows so far: the problem's fields, "labels" of the
    baselines by name, and "rivals": {name: {"forward" or "forward+backward": {"ms" or "failed",
    "mib", ...}}}.
  """
  begin = time.perf_counter()
  cells = _Cells(problems, implementation)
  cells.prepare(sample_seconds, say, begin)
  for done in run_rounds(list(cells.by_key.values()), rounds, seconds):
    say(f"round {done} of {rounds}: {time.perf_counter() - begin:.0f} s")
    yield done, [cells.row(problem) for problem in problems]


def _cell_key(problem: Problem, baseline: Baseline, direction: str) -> tuple:
  """Returns a cell's key: a baseline that reads no scores is timed once for all families."""
  scores = problem.scores if 3 in baseline.argnums else ""
  return (dataclasses.replace(problem, baselines=(), scores=scores), baseline.name, direction)


def _shared_key(key: tuple) -> tuple:
  """Returns the key of a cell's program, which does not depend on the scores."""
  return (dataclasses.replace(key[0], scores=""), *key[1:])


@functools.partial(jax.jit, static_argnums=0)
def _truth(options, query, key, value, scores, cotangent):
  function = functools.partial(reference.attention, **dict(options))
  out, pull = jax.vjp(function, *(x.astype(jnp.float32) for x in (query, key, value, scores)))
  return out, *pull(cotangent.astype(jnp.float32))


def _true_values(problem, inputs, cotangent):
  """Returns the arrays that GRADIENTS names, of the float32 reference, one key head at a time."""
  options = (
    ("k", problem.k),
    ("window", problem.window),
    ("gate", problem.gate),
    ("scale", problem.head_dim**-0.5),
  )

  def of_head(x, head):
    several = problem.heads // problem.kv_heads if x.shape[2] == problem.heads else 1
    return x[:, :, head * several : (head + 1) * several]

  heads = [
    jax.device_get(_truth(options, *(of_head(x, head) for x in (*inputs, cotangent))))
    for head in range(problem.kv_heads)
  ]
  return [np.concatenate(parts, axis=2).astype(np.float64) for parts in zip(*heads)]


def errors(problem: Problem, implementation: str | None = None) -> dict[str, dict]:
  """Returns |x - truth| / |truth| of the output and all gradients.

  There are figures for the problem's baselines, and for the truth rounded to the inputs' dtype. The
  truth is the O(n^2) reference in float32 on the same (rounded) inputs, one key head at a time, so
  that n = 4096 fits.

  Returns:
    {"problem": its fields, "relative": {name: {"out", "dquery", ...: float}}, "failed": {name:
    reason}}.
  """
  inputs, cotangents = make_inputs(problem)
  relative: dict[str, dict[str, float]] = {}
  failed: dict[str, str] = {}
  result = {"problem": problem.record(), "relative": relative, "failed": failed}
  try:
    true = _true_values(problem, inputs, cotangents[0])
  except ERRORS as error:
    failed["reference"] = reason(error)
    return result

  def distances(values):
    values = [np.asarray(jax.device_get(x), np.float64) for x in values]
    return {
      name: float(np.linalg.norm(x - y) / np.linalg.norm(y))
      for name, x, y in zip(GRADIENTS, values, true)
    }

  for name in problem.baselines:
    run = jax.jit(make_pass(make_baseline(name, problem, implementation), BOTH))
    try:
      out, _, gradients = run(*inputs, cotangents[0])
      relative[name] = distances([out, *gradients])
    except ERRORS as error:
      failed[name] = reason(error)
  kinds = [x.dtype for x in (inputs[0], *inputs)]
  relative["rounding alone"] = distances([x.astype(kind) for x, kind in zip(true, kinds)])
  return result
