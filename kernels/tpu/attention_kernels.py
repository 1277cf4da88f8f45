"""The Pallas TPU kernels of SPARSEK attention; tpu/attention.py prepares what they read.

Queries are cut into blocks. A block has a list of the tokens that are selected at its first query.
A token that is selected later in the block has only just left the window, so it lies in the tiles
of tokens that the window needs anyway, the *near* ones: nothing else has to be gathered.

Products are transposed, [keys, queries]: what belongs to a query is then a row, as it lies in
memory, maxima and sums over keys need no shuffling of lanes, and only narrow matrices are
transposed. The backward pass recomputes the softmax from the logsumexp. Programs own what they
write: results repeat to the bit.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from sparsek.kernels.gates import tile_gradients, tile_weights

LANES, SUBLANES = 128, 8
VMEM_BYTES = 48 * 2**20  # that a kernel may use
# products of a and b, either transposed or not
A_BT, A_B, AT_B = ((((a,), (b,)), ((), ())) for a, b in ((1, 1), (1, 0), (0, 0)))


class Tiling(NamedTuple):
  """Sizes in tokens, multiples of 128.

  Attributes:
    queries: of a block, which has one list; a multiple of `rows` and `keys`.
    rows: queries that are multiplied at a time.
    keys: of a tile near the queries. listed: of a tile of a list.
  """

  queries: int
  rows: int
  keys: int
  listed: int


class Static(NamedTuple):
  """What the kernels depend on besides shapes; window, gate and scale as in
  `sparsek.sparsek_attention`.
  """

  window: int
  gate: str
  scale: float
  tiling: Tiling


class Queries(NamedTuple):
  """By query, `rows` at a time.

  Attributes:
    query: [B, G, R, n / rows, rows, D], R query heads for each key head.
    tau: [B, G, n / rows, 1, rows] thresholds.
    left: [B, n / rows, 1, rows] int32, the first token of each query's window; never decreasing.
  """

  query: jax.Array
  tau: jax.Array
  left: jax.Array


class Outputs(NamedTuple):
  """By query, for the backward pass: [B, G, R, n / rows, rows, D] gradient of the output; float32
  [B, G, R, n / rows, 1, rows] logsumexp and <dO, O>.
  """

  cotangent: jax.Array
  logsumexp: jax.Array
  delta: jax.Array


class Keys(NamedTuple):
  """Near tokens, or listed ones, of one block's list after the other, a tile at a time.

  Attributes:
    key, value: [B, G, tiles, m, D]. score: [B, G, tiles, 1, m] float32.
    last: [B, G, tiles, 1, m] int32, one past the last query that selects the token; 0: none does.
  """

  key: jax.Array
  value: jax.Array
  score: jax.Array
  last: jax.Array


class Bounds(NamedTuple):
  """Scalars that say what a program may skip; flat int32 arrays.

  Attributes:
    listed: [B G blocks], tiles of each list that hold tokens. entering: [B G blocks], is a token
      selected that was not at the block's first query?
    left: [B n / rows], `Queries.left` of the first of so many queries.
    reach: [B blocks], the last block whose queries may see any of the tokens of this one, except
      through lists.
  """

  listed: jax.Array
  entering: jax.Array
  left: jax.Array
  reach: jax.Array


def dot(a, b, which):
  """A product, summed in float32; of float32 numbers as exact as these."""
  precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else lax.Precision.DEFAULT
  return lax.dot_general(a, b, which, precision=precision, preferred_element_type=jnp.float32)


def div(x, n):
  """x / n rounded down, of natural numbers; `//` would ask the compiler for signs."""
  return lax.div(x, jnp.asarray(n, x.dtype))


def as_column(row):
  """[1, m] -> [m, 1]."""
  return jnp.transpose(jnp.broadcast_to(row, (SUBLANES, row.shape[1])))[:, :1]


def as_row(column):
  """[m, 1] -> [1, m]."""
  return jnp.transpose(jnp.broadcast_to(column, (column.shape[0], LANES)))[:1]


class Pairs(NamedTuple):
  """Which [keys, queries] see each other; scores [keys, 1], None where gates are 1; which pairs are
  in the window, None for none.
  """

  visible: jax.Array
  score: jax.Array | None = None
  local: jax.Array | None = None

  def distance(self, tau):
    """Function that computes u_j - tau_i, in the window 1; None where gates are 1."""
    if self.score is None:
      return None
    gated = lambda: (
      self.score - tau if self.local is None else jnp.where(self.local, 1.0, self.score - tau)
    )
    # scores may be NaN where nothing is selected
    return lambda: jnp.where(self.visible, gated(), 0.0)


class Grid:
  """Sizes, and which blocks of the arrays a program sees. Programs have the axes (batch row, key
  head, block of queries, step).
  """

  def __init__(self, queries: Queries, listed: Keys | None, near: Keys, static: Static):
    self.static = static
    self.batch, self.groups, self.heads, _, self.rows, self.dim = queries.query.shape
    self.n, tiling = near.key.shape[2] * near.key.shape[3], static.tiling
    self.queries, self.keys = tiling.queries, tiling.keys
    self.blocks, self.parts = self.n // self.queries, self.queries // self.rows
    self.list_tiles = listed.key.shape[2] // self.blocks if listed else 0
    before = max(static.window - 1, 0)
    self.near_tiles = min(self.n // self.keys, self.queries // self.keys + -(-before // self.keys))
    self.reach = min(self.blocks, (self.queries - 1 + before) // self.queries + 1)
    # Pairs that are multiplied for a block far from the start, for each query head.
    self.listed_pairs = self.list_tiles * tiling.listed * self.queries
    tiles = [
      (first + self.rows - 1) // self.keys - (first - before) // self.keys + 1
      for first in range(0, self.queries, self.rows)
    ]
    self.near_pairs = (
      sum(min(tiles_of_part, self.n // self.keys) for tiles_of_part in tiles)
      * self.keys
      * self.rows
    )

  def flat(self, b, g, i):
    return (b * self.groups + g) * self.blocks + i

  def list_tile(self, b, g, i, t, bounds):
    """Stays at the last tile that holds tokens."""
    return jnp.minimum(t, jnp.maximum(bounds.listed[self.flat(b, g, i)] - 1, 0))

  def near_tile(self, b, i, t, bounds):
    """May be beyond the block's last tile, `own_tile`: then the step has nothing to do."""
    return div(bounds.left[(b * self.blocks + i) * self.parts], self.keys) + jnp.maximum(
      t - self.list_tiles, 0
    )

  def own_tile(self, i):
    return (i + 1) * (self.queries // self.keys) - 1

  def specs(self, block):
    """(of Queries, of Outputs); block(b, g, i, t, bounds) -> the block of queries."""

    def spec(shape, by_group=True):
      index = lambda b, g, i, t, *bounds: (
        b,
        *((g,) if by_group else ()),
        *((0,) if len(shape) == 4 else ()),
        block(b, g, i, t, Bounds(*bounds)),
        0,
        0,
      )
      return pl.BlockSpec((*(None,) * (1 + by_group), *shape), index)

    heads_matrix, heads_row, row = (
      (self.heads, self.parts, self.rows, self.dim),
      (self.heads, self.parts, 1, self.rows),
      (self.parts, 1, self.rows),
    )
    return Queries(spec(heads_matrix), spec(row), spec(row, by_group=False)), Outputs(
      spec(heads_matrix), spec(heads_row), spec(heads_row)
    )

  def key_specs(self, size, tile, tiles=None):
    """Of Keys: the tile of `size` keys with the number tile(b, g, i, t, bounds); with `tiles` the
    group of so many that has this number.
    """
    index = lambda b, g, i, t, *bounds: (b, g, tile(b, g, i, t, Bounds(*bounds)), 0, 0)
    matrix, row = (
      pl.BlockSpec((None, None, tiles, *shape), index) for shape in ((size, self.dim), (1, size))
    )
    return Keys(matrix, matrix, row, row)

  def list_specs(self):
    return self.key_specs(
      self.static.tiling.listed,
      lambda b, g, i, t, bounds: i * self.list_tiles + self.list_tile(b, g, i, t, bounds),
    )

  def near_specs(self):
    return self.key_specs(
      self.keys,
      lambda b, g, i, t, bounds: jnp.minimum(self.near_tile(b, i, t, bounds), self.own_tile(i)),
    )

  def for_each_part(self, run):
    """run(head, part of the block) for all of them."""

    @pl.loop(0, self.heads * self.parts)
    def _(x):
      head = div(x, self.parts)
      run(head, x - head * self.parts)

  def for_listed_pairs(self, i, keys, run):
    """run(head, part, Pairs) for a tile of the block's list: all of its tokens are selected at the
    block's first query, so only their ends matter.
    """
    last, score = as_column(keys.last[...]), as_column(keys.score[...])

    def part_of(head, part):
      query = (
        i * self.queries + part * self.rows + lax.broadcasted_iota(jnp.int32, (1, self.rows), 1)
      )
      run(head, part, Pairs(query < last, score))

    self.for_each_part(part_of)

  def for_near_pairs(self, b, g, i, tile, keys, left_ref, bounds, run):
    """run(head, part, Pairs) for what a tile of near tokens shares with the block's queries,
    without those selected at the block's first query.
    """
    window, begin = self.static.window, i * self.queries
    first_key, last_key = tile * self.keys, tile * self.keys + self.keys - 1
    entering = bounds.entering[self.flat(b, g, i)] > 0

    def part_of(head, part):
      first = begin + part * self.rows
      at = (b * self.blocks + i) * self.parts + part
      gated = entering & (last_key + window > begin) & (first_key + window < first + self.rows)
      some = (first_key < first + self.rows) & (last_key >= bounds.left[at])
      query = lambda: first + lax.broadcasted_iota(jnp.int32, (1, self.rows), 1)
      key = lambda: first_key + lax.broadcasted_iota(jnp.int32, (self.keys, 1), 0)
      local = lambda: (key() <= query()) & (key() >= left_ref[part])

      @pl.when(gated)
      def _():
        entry, in_window = key() + window, local()
        entered = (entry > begin) & (entry <= query()) & (query() < as_column(keys.last[...]))
        run(head, part, Pairs(in_window | entered, as_column(keys.score[...]), in_window))

      pl.when(some & jnp.logical_not(gated))(lambda: run(head, part, Pairs(local())))

    self.for_each_part(part_of)

  def call(self, kernel, steps, bounds, inputs, outputs, scratch, flops, more_bytes):
    """Calls kernel(bounds, inputs, outputs, scratch): trees of references.

    Args:
      steps: of a program's last axis. bounds: Bounds. inputs: (tree of arrays, of BlockSpecs),
        outputs: (tree of jax.ShapeDtypeStruct, of BlockSpecs).
      scratch: shapes of float32 arrays. flops: of all programs. more_bytes: read beside every input
        once, and written beside every output once.
    """
    arrays, tree = jax.tree.flatten(inputs[0])
    shapes, out_tree = jax.tree.flatten(outputs[0])
    varying = jax.typeof(inputs[0][0].query).manual_axis_type  # inside shard_map
    shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype, manual_axis_type=varying) for x in shapes]

    def run(*refs):
      refs = list(refs)
      take = lambda count: [refs.pop(0) for _ in range(count)]
      return kernel(
        Bounds(*take(len(bounds))),
        tree.unflatten(take(len(arrays))),
        out_tree.unflatten(take(len(shapes))),
        refs,
      )

    nbytes = sum(x.size * jnp.dtype(x.dtype).itemsize for x in (*arrays, *shapes))
    found = pl.pallas_call(
      run,
      out_shape=shapes,
      grid_spec=pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=len(bounds),
        grid=(self.batch, self.groups, self.blocks, steps),
        in_specs=jax.tree.leaves(inputs[1]),
        out_specs=jax.tree.leaves(outputs[1]),
        scratch_shapes=[pltpu.VMEM(shape, jnp.float32) for shape in scratch],
      ),
      compiler_params=pltpu.CompilerParams(
        dimension_semantics=("parallel",) * 3 + ("arbitrary",), vmem_limit_bytes=VMEM_BYTES
      ),
      cost_estimate=pl.CostEstimate(
        flops=int(flops), bytes_accessed=int(nbytes + more_bytes), transcendentals=0
      ),
    )(*bounds, *arrays)
    return out_tree.unflatten(found)


def _work(grid, listed_products, near_products):
  """Floating point operations of so many products for every pair."""
  programs = grid.batch * grid.groups * grid.heads * grid.blocks
  return (
    2
    * grid.dim
    * programs
    * (listed_products * grid.listed_pairs + near_products * grid.near_pairs)
  )


def _more_keys(grid, near):
  """Bytes of near keys and values that are read beside each once."""
  return (near.key.nbytes + near.value.nbytes) * (grid.near_tiles * grid.keys / grid.queries - 1)


def forward(queries, listed, near, bounds, static):
  """(output, logsumexp), shapes as in Outputs.

  Args:
    queries: Queries. listed: Keys or None. near: Keys. bounds: Bounds. static: Static.
  """
  grid = Grid(queries, listed, near, static)
  gate, scale = static.gate, static.scale
  specs, out_specs = grid.specs(lambda b, g, i, t, bounds: i)

  def kernel(bounds, inputs, outputs, scratch):
    (query, tau, left), listed, near = inputs
    out, logsumexp = outputs
    top, total, acc = scratch
    b, g, i, t = (pl.program_id(axis) for axis in range(4))

    @pl.when(t == 0)
    def _():
      top[...] = jnp.full_like(top, -jnp.inf)
      total[...] = jnp.zeros_like(total)
      acc[...] = jnp.zeros_like(acc)

    def visit(keys):
      def run(head, part, pairs):
        at = head, part
        s = dot(keys.key[...], query[at], A_BT) * scale
        weights = {}

        def probability(logits):
          logits = jnp.where(pairs.visible, logits, -jnp.inf)
          before = top[at]
          after = jnp.maximum(before, jnp.max(logits, axis=0, keepdims=True))
          finite = jnp.where(after == -jnp.inf, 0.0, after)  # nothing may have been seen yet
          p = jnp.exp(logits - finite)
          weights["shrink"] = shrink = jnp.exp(before - finite)
          top[at] = after
          total[at] = total[at] * shrink + jnp.sum(p, axis=0, keepdims=True)
          return p

        *_, w = tile_weights(s, probability, pairs.distance(tau[part]), gate=gate)
        acc[at] = acc[at] * weights["shrink"] + dot(
          keys.value[...], w.astype(keys.value.dtype), AT_B
        )

      return run

    if listed is not None:
      pl.when(t < bounds.listed[grid.flat(b, g, i)])(
        lambda: grid.for_listed_pairs(i, listed, visit(listed))
      )
    tile = grid.near_tile(b, i, t, bounds)
    pl.when((t >= grid.list_tiles) & (tile <= grid.own_tile(i)))(
      lambda: grid.for_near_pairs(b, g, i, tile, near, left, bounds, visit(near))
    )

    @pl.when(t == pl.num_programs(3) - 1)
    def _():
      def finish(*at):
        m, l = top[at], jnp.maximum(total[at], float(jnp.finfo(jnp.float32).tiny))
        out[at] = jnp.transpose(acc[at] / l).astype(out.dtype)
        logsumexp[at] = jnp.where(m == -jnp.inf, 0.0, m) + jnp.log(l)

      grid.for_each_part(finish)

  rows = (*queries.query.shape[:4], 1, grid.rows)
  return grid.call(
    kernel,
    grid.list_tiles + grid.near_tiles,
    bounds,
    ((queries, listed, near), (specs, listed and grid.list_specs(), grid.near_specs())),
    (
      (
        jax.ShapeDtypeStruct(queries.query.shape, queries.query.dtype),
        jax.ShapeDtypeStruct(rows, jnp.float32),
      ),
      out_specs[:2],
    ),
    [(grid.heads, grid.parts, 1, grid.rows)] * 2 + [(grid.heads, grid.parts, grid.dim, grid.rows)],
    _work(grid, 2, 2),
    _more_keys(grid, near),
  )


def _gradients(keys, queries, outputs, at, pairs, static):
  """(gradient of the scaled logits, of the gates or None, weights of the values), of one tile and
  some queries.
  """
  (query, tau, _), (cotangent, logsumexp, delta) = queries, outputs
  s = dot(keys.key[...], query[at], A_BT) * static.scale
  dp = dot(keys.value[...], cotangent[at], A_BT)

  probability = lambda logits: jnp.where(pairs.visible, jnp.exp(logits - logsumexp[at]), 0.0)
  distance = pairs.distance(tau[at[1]])
  p, gates, weights = tile_weights(s, probability, distance, gate=static.gate)
  ds, dgates = tile_gradients(s, p, gates, dp, delta[at], distance, gate=static.gate, scale=1.0)
  return ds, dgates, weights


def _add_to_keys(sums, keys, queries, outputs, at, ds, dgates, weights):
  """Adds what some queries give the keys of a tile."""
  dkey, dvalue, dscore = sums
  query, cotangent = queries.query, outputs.cotangent
  dkey[...] += dot(ds.astype(query.dtype), query[at], A_B)
  dvalue[...] += dot(weights.astype(cotangent.dtype), cotangent[at], A_B)
  if dgates is not None:
    dscore[...] += as_row(jnp.sum(dgates, axis=1, keepdims=True))


def query_gradients(queries, outputs, listed, near, bounds, static):
  """(dquery, dtau float32, Keys of float32 gradients of the listed or None; its `last` is None).

  Args:
    outputs: Outputs. The others: as of `forward`.
  """
  grid = Grid(queries, listed, near, static)
  query_specs, output_specs = grid.specs(lambda b, g, i, t, bounds: i)
  size = static.tiling.listed

  def kernel(bounds, inputs, found, scratch):
    queries, outputs, listed, near = inputs
    dquery, dtau, dlisted = found
    acc, tau_acc, *list_acc = scratch
    b, g, i, t = (pl.program_id(axis) for axis in range(4))

    @pl.when(t == 0)
    def _():
      acc[...] = jnp.zeros_like(acc)
      tau_acc[...] = jnp.zeros_like(tau_acc)

    def visit(keys, sums=None):
      def run(head, part, pairs):
        at = head, part
        ds, dgates, weights = _gradients(keys, queries, outputs, at, pairs, static)
        acc[at] += dot(keys.key[...], ds.astype(keys.key.dtype), AT_B)
        if dgates is not None:
          tau_acc[part] -= jnp.sum(dgates, axis=0, keepdims=True)
        if sums:
          _add_to_keys(sums, keys, queries, outputs, at, ds, dgates, weights)

      return run

    if listed is not None:

      @pl.when(t < bounds.listed[grid.flat(b, g, i)])
      def _():
        for x in list_acc:
          x[...] = jnp.zeros_like(x)
        grid.for_listed_pairs(i, listed, visit(listed, list_acc))
        dkey, dvalue, dscore = list_acc
        dlisted.key[...] = dkey[...] * static.scale
        dlisted.value[...] = dvalue[...]
        dlisted.score[...] = dscore[...]

    tile = grid.near_tile(b, i, t, bounds)
    pl.when((t >= grid.list_tiles) & (tile <= grid.own_tile(i)))(
      lambda: grid.for_near_pairs(b, g, i, tile, near, queries.left, bounds, visit(near))
    )

    @pl.when(t == pl.num_programs(3) - 1)
    def _():
      dtau[...] = tau_acc[...]

      def finish(*at):
        dquery[at] = jnp.transpose(acc[at] * static.scale).astype(dquery.dtype)

      grid.for_each_part(finish)

  like = lambda x, dtype=jnp.float32: jax.ShapeDtypeStruct(x.shape, dtype)
  without_last = lambda keys: keys and keys._replace(last=None)
  list_specs = listed and grid.list_specs()
  scratch = (
    [(grid.heads, grid.parts, grid.dim, grid.rows), (grid.parts, 1, grid.rows)]
    + [(size, grid.dim)] * 2 * bool(listed)
    + [(1, size)] * bool(listed)
  )
  return grid.call(
    kernel,
    grid.list_tiles + grid.near_tiles,
    bounds,
    ((queries, outputs, listed, near), (query_specs, output_specs, list_specs, grid.near_specs())),
    (
      (
        like(queries.query, queries.query.dtype),
        like(queries.tau),
        without_last(listed and Keys(*map(like, listed))),
      ),
      (query_specs.query, query_specs.tau, without_last(list_specs)),
    ),
    scratch,
    _work(grid, 5, 3),
    _more_keys(grid, near),
  )


def near_gradients(queries, outputs, near, bounds, static):
  """Keys of float32 gradients of near tokens, with `last` None; arguments as of `query_gradients`.
  Programs count blocks of keys instead of queries.
  """
  grid = Grid(queries, None, near, static)
  block = lambda b, g, j, t, bounds: jnp.minimum(j + t, bounds.reach[b * grid.blocks + j])
  query_specs, output_specs = grid.specs(block)
  tiles = grid.queries // grid.keys
  key_specs = grid.key_specs(grid.keys, lambda b, g, j, t, bounds: j, tiles)

  def kernel(bounds, inputs, found, sums):
    queries, outputs, near = inputs
    b, g, j, t = (pl.program_id(axis) for axis in range(4))

    @pl.when(t == 0)
    def _():
      for x in sums:
        x[...] = jnp.zeros_like(x)

    @pl.when(j + t <= bounds.reach[b * grid.blocks + j])
    def _():
      @pl.loop(0, tiles)
      def _(c):
        keys, of_keys = Keys(*(x.at[c] for x in near)), [x.at[c] for x in sums]

        def visit(head, part, pairs):
          at = head, part
          _add_to_keys(
            of_keys,
            keys,
            queries,
            outputs,
            at,
            *_gradients(keys, queries, outputs, at, pairs, static),
          )

        grid.for_near_pairs(b, g, j + t, j * tiles + c, keys, queries.left, bounds, visit)

    @pl.when(t == pl.num_programs(3) - 1)
    def _():
      dkey, dvalue, dscore = sums
      found.key[...] = dkey[...] * static.scale
      found.value[...] = dvalue[...]
      found.score[...] = dscore[...]

  like = lambda x: jax.ShapeDtypeStruct(x.shape, jnp.float32)
  again = (queries.query.nbytes + outputs.cotangent.nbytes) * (grid.reach - 1)
  return grid.call(
    kernel,
    grid.reach,
    bounds,
    ((queries, outputs, near), (query_specs, output_specs, key_specs)),
    (Keys(*map(like, near))._replace(last=None), key_specs._replace(last=None)),
    [(tiles, grid.keys, grid.dim)] * 2 + [(tiles, 1, grid.keys)],
    _work(grid, 0, 4),
    again,
  )
