"""Thresholds and expiry on GPUs: the steps of staircase.py in Pallas Mosaic kernels, one rank, tile or column of tiles to a thread."""

import functools
import math

import jax
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
import jax.numpy as jnp
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, memref, scf, vector

from . import staircase
from .staircase import COUNT, HIGH, LOW, UPPER
from .varying import over_batch, varying_like

LANES = 128                      # threads of a program
LAYOUT = plgpu.Layout.WG_STRIDED((LANES,), vec_size=1)
AT_ONCE = 8                      # loads that a scan has under way
SEGMENT = 128                    # queries that a thread adds up


def _element(x):
  register = x.registers.flat[0]
  if not isinstance(register.type, ir.VectorType):
    return register
  return vector.extract(register, dynamic_position=[], static_position=ir.DenseI64ArrayAttr.get([0]))


def _index(x):
  return [arith.index_cast(ir.IndexType.get(), _element(x))]


def gather(ref, index):
  """ref[index] in every lane; `ref` has one axis."""
  @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), LAYOUT), return_type=plgpu.ShapeDtypeStruct((LANES,), ref.dtype, layout=LAYOUT))
  def load(_, ref, index):
    signed = None if jnp.issubdtype(dtype, jnp.floating) else True
    return index.foreach(lambda *_: memref.load(ref, _index(index)), create_array=True, is_signed=signed)
  dtype = ref.dtype
  return load(ref, index)


def scatter(ref, index, value, where, add=False):
  """ref[index] = value, or += value atomically, in the lanes where `where`."""
  @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), LAYOUT, LAYOUT, LAYOUT))
  def store(_, ref, index, value, where):
    with ir.InsertionPoint(scf.IfOp(_element(where)).then_block):
      if add:
        memref.atomic_rmw(arith.AtomicRMWKind.addi, _element(value), ref, _index(index))
      else:
        memref.store(_element(value), ref, _index(index))
      scf.yield_([])
  store(ref, index, jnp.where(where, value, 0), where)       # inlined code cannot take constants


def lanes(axis="block"):
  """The numbers of this program's lanes."""
  return lax.axis_index(axis) * LANES + plgpu.broadcasted_iota(jnp.int32, (LANES,), 0, layout=LAYOUT)


def _reader(ref, row):
  return lambda index: gather(ref.at[row], jnp.clip(index, 0, ref.shape[-1] - 1))


def _kernel(body, rows, size, *extra, name):
  """Runs body(row, extra, lanes, *refs) for every row, every number below `extra` and lanes up to `size` and beyond."""
  def kernel(*refs):
    body(lax.axis_index("row"), lax.axis_index("extra"), lanes(), *refs)
  grid = dict(block=-(-size // LANES), row=rows, extra=extra[0] if extra else 1)
  return lambda *args: plgpu.kernel(kernel, grid=tuple(grid.values()), grid_names=tuple(grid), kernel_name=f"sparsek_{name}")(*args)


def can_run() -> bool:
  """Whether these kernels can run here: on a Hopper GPU. JAX 0.10 cannot write in place from a differentiated function."""
  device = jax.devices()[0]
  return jax.default_backend() == "gpu" and str(getattr(device, "compute_capability", "")) == "9.0" and jax.__version_info__ >= (0, 11)


def _over_rows(f, *args):
  """f, which takes and returns [rows, ...], of [batch, heads, ...] arrays; [batch, ...] ones it gets as they are."""
  def flat(*args):
    shape = args[0].shape[:2]
    out = f(*(x if x.ndim < args[0].ndim else x.reshape(-1, *x.shape[2:]) for x in args))
    return jax.tree.map(lambda x: x.reshape(*shape, *x.shape[1:]), out)
  return jax.tree.map(lambda x: varying_like(x, args[0]), over_batch(flat, *args))        # kernels forget it


def solve(problem, score, entry, order, start):
  """As `staircase.solve`, of [batch, heads, n] arrays and start [batch, n]."""
  return _over_rows(functools.partial(_solve, problem), score, entry, order, start)


def scores_gradient(cotangent, score, threshold, end, delay):
  """As `staircase.scores_gradient`, of [batch, heads, n] arrays and end [batch, n]."""
  return _over_rows(functools.partial(_scores_gradient, delay), cotangent, score, threshold, end)


@functools.partial(jax.jit, static_argnums=0)
def _solve(problem, score, entry, order, start):
  rows, n = score.shape
  blocks, width = problem.blocks, 2 * problem.block
  heads = rows // start.shape[0]
  new = lambda shape, fill, dtype=jnp.int32: jax.new_ref(jnp.full((rows, *shape), fill, dtype))
  score, entry, order, start = (jax.new_ref(x) for x in (score, entry, order, start))
  lower, upper, rank = new((blocks + 1,), 0), new((blocks + 1,), 0), new((n,), 0)
  corners = new((staircase.SUMS, (blocks + 1) * (blocks + 1)), 0)
  cuts = new((2, blocks + 1), 0)
  threshold, expiry = new((n,), jnp.nan, jnp.float32), new((n,), n)

  def read(row, score, start, **refs):
    return staircase.Read(_reader(score, row), start=_reader(start, row // heads), **{name: _reader(ref, row) for name, ref in refs.items()})

  def find_corners(row, extra, column, score, start, lower, upper):
    position = jnp.minimum(column * width, 2 * n)
    count = staircase.boundary(problem, read(row, score, start), position)
    scatter(lower.at[row], column, count, column <= blocks)
    scatter(upper.at[row], column, position - count, column <= blocks)
  _kernel(find_corners, rows, blocks + 1, name="corners")(score, start, lower, upper)

  def enter(row, extra, lane, score, entry, order, start, lower, upper, rank, corners):
    own = read(row, score, start, entry=entry, corner_lower=lower, corner_upper=upper)
    inside = lane < n
    scatter(rank.at[row], _reader(order, row)(lane), lane, inside)
    for line, column, weights in staircase.enter(problem, own, lane):
      for c, weight in weights.items():
        scatter(corners.at[row, c], line * (blocks + 1) + column, weight, inside & (line <= blocks), add=True)
  _kernel(enter, rows, n, name="enter")(score, entry, order, start, lower, upper, rank, corners)

  def add_up(row, extra, lane, corners, *, along, across, backward):
    sums = corners.at[row, extra]
    inside = lane <= blocks
    def go(i, total):
      places = [lane - lane + (i * AT_ONCE + j) for j in range(AT_ONCE)]
      index = [(blocks - place if backward else place) * along + lane * across for place in places]
      values = [gather(sums, jnp.clip(x, 0, (blocks + 1) ** 2 - 1)) for x in index]
      for place, x, value in zip(places, index, values):
        total = total + value                              # what lies beyond the last place is not stored
        scatter(sums, x, total, inside & (place <= blocks))
      return total
    lax.fori_loop(0, -(-(blocks + 1) // AT_ONCE), go, lane - lane)
  for options in (dict(along=blocks + 1, across=1, backward=False), dict(along=1, across=blocks + 1, backward=True)):
    _kernel(lambda *args, options=options: add_up(*args, **options), rows, blocks + 1, staircase.SUMS, name="add_up")(corners)

  def find_cuts(row, extra, line, score, start, lower, upper, corners, cuts):
    own = read(row, score, start, corner_lower=lower, corner_upper=upper)
    at = lambda c, column: gather(corners.at[row, c], jnp.minimum(line, blocks) * (blocks + 1) + column)
    def search(over):
      def halve(_, ends):
        low, high = ends
        middle = (low + high) >> 1
        passes = over(middle) & (own.corner_upper(middle) < n)
        return jnp.where((low < high) & passes, middle + 1, low), jnp.where((low < high) & staircase.no(passes), middle, high)
      return lax.fori_loop(0, math.ceil(math.log2(blocks + 2)), halve, (line - line, line - line + blocks))[0]
    def over(column):
      event = staircase.next_event(problem, own, own.corner_lower(column), own.corner_upper(column))
      return staircase.exceeds(problem, [at(c, column) for c in (COUNT, HIGH, LOW)], event)
    for which, test in enumerate((over, lambda column: at(UPPER, column) > problem.k)):
      scatter(cuts.at[row, which], line, search(test), line <= blocks)
  _kernel(find_cuts, rows, blocks + 1, name="cuts")(score, start, lower, upper, corners, cuts)

  def walk(row, extra, cell, score, entry, rank, order, start, lower, upper, corners, cuts, threshold, expiry):
    own = read(row, score, start, entry=entry, rank=rank, corner_lower=lower, corner_upper=upper)

    def run(which, walker, channels, write):
      tile, line, column = staircase.tile_of(problem, own, lambda line: gather(cuts.at[row, which], jnp.clip(line, 0, blocks)), cell)
      sums = [gather(corners.at[row, c], jnp.clip(line, 0, blocks) * (blocks + 1) + jnp.clip(column, 0, blocks)) for c in channels]
      state, step = walker(problem, own, tile, sums)
      def go(_, state):
        state, index, value, where = step(state)
        write(index, value, where)
        return state
      lax.fori_loop(0, problem.steps, go, state)

    @pl.when(extra == 0)
    def _():
      run(0, staircase.walk_thresholds, (COUNT, HIGH, LOW), lambda query, tau, where: scatter(threshold.at[row], query, tau, where))

    @pl.when(extra == 1)
    def _():
      run(1, lambda problem, own, tile, sums: staircase.walk_expiry(problem, own, tile, *sums), (UPPER,),
          lambda rank, query, where: scatter(expiry.at[row], _reader(order, row)(rank), query, where))
  _kernel(walk, rows, problem.cells, 2, name="walk")(score, entry, rank, order, start, lower, upper, corners, cuts, threshold, expiry)
  return threshold[...], expiry[...]


@functools.partial(jax.jit, static_argnums=0)
def _scores_gradient(delay, cotangent, score, threshold, end):
  rows, n = score.shape
  heads, segments = rows // end.shape[0], -(-n // SEGMENT)
  new = lambda size, dtype: jax.new_ref(jnp.zeros((rows, size), dtype))
  cotangent, score, threshold, end = (jax.new_ref(x) for x in (cotangent, score, threshold, end))
  first, last, change, out = new(n, jnp.int32), new(n, jnp.int32), new(n + 1, jnp.int32), new(n, jnp.float32)
  changes, total, error, prefix, shares = new(segments + 1, jnp.int32), *(new(size, jnp.float32) for size in (segments + 1, segments + 1, n + 1, segments))

  def find_intervals(row, _, token, score, threshold, end, first, last, change, changes):
    own = staircase.Read(_reader(score, row), end=_reader(end, row // heads), threshold=_reader(threshold, row))
    ends = staircase.interval(own, token, delay, n)
    for ref, at, weight in zip((first, last), ends, (1, -1)):
      scatter(ref.at[row], token, at, token < n)
      there = (token < n) & (ends[0] < ends[1])
      scatter(change.at[row], at, weight, there, add=True)
      scatter(changes.at[row], at // SEGMENT, weight, there, add=True)
  _kernel(find_intervals, rows, n, name="intervals")(score, threshold, end, first, last, change, changes)

  def sums_before(ref, row, segment, join, zero):
    """What `join` makes of all earlier segments, AT_ONCE loads at a time."""
    def go(i, state):
      places = [i * AT_ONCE + j for j in range(AT_ONCE)]
      for place, value in zip(places, [ref[row, jnp.minimum(place, segments - 1)] for place in places]):
        state = join(state, jnp.where(place < segment, value, 0))
      return state
    return lax.fori_loop(0, -(-segments // AT_ONCE), go, zero)

  def share(row, _, segment, cotangent, change, changes, prefix, shares):
    """dtau_i / |S_i| and its sums from the start of each segment on."""
    def go(i, state):
      count, total = state
      queries = [segment * SEGMENT + (i * AT_ONCE + j) for j in range(AT_ONCE)]
      loads = [(query, _reader(change, row)(query), _reader(cotangent, row)(query)) for query in queries]
      for query, difference, gradient in loads:
        count += difference
        scatter(prefix.at[row], query, total, query <= n)
        total += jnp.where((count > 0) & (query < n), gradient / jnp.maximum(count, 1).astype(jnp.float32), 0.)
      return count, total
    count = sums_before(changes, row, segment, jnp.add, segment - segment)
    _, total = lax.fori_loop(0, SEGMENT // AT_ONCE, go, (count, (segment - segment).astype(jnp.float32)))
    scatter(shares.at[row], segment, total, segment < segments)
  _kernel(share, rows, segments, name="shares")(cotangent, change, changes, prefix, shares)

  def add_segments(row, _, segment, shares, total, error):
    sums = sums_before(shares, row, segment, lambda state, x: staircase.add_exactly(state, (x, 0.)), ((segment - segment).astype(jnp.float32),) * 2)
    for ref, value in zip((total, error), sums):
      scatter(ref.at[row], segment, value, segment <= segments)
  _kernel(add_segments, rows, segments + 1, name="segments")(shares, total, error)

  def gradients(row, _, token, first, last, prefix, total, error, out):
    ends = [_reader(ref, row)(token) for ref in (first, last)]
    inside, whole, rest = ([_reader(ref, row)(end // size) for end in ends] for ref, size in ((prefix, 1), (total, SEGMENT), (error, SEGMENT)))
    value = (inside[1] - inside[0]) + ((whole[1] - whole[0]) + (rest[1] - rest[0]))
    scatter(out.at[row], token, value, token < n)
  _kernel(gradients, rows, n, name="gradients")(first, last, prefix, total, error, out)
  return out[...]
