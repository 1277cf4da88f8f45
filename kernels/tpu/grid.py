"""Common parts of the Pallas TPU kernels of SPARSEK attention (attention_forward.py and
attention_backward.py): arrays, the blocks of them that a program sees, and which pairs of queries
and keys see each other. tpu/attention.py prepares the arrays.

Queries are cut into blocks. A block has a list of the tokens that are selected at its first query.
A token that is selected later in the block has only just left the window, so it lies in the tiles
of tokens that the window needs anyway, the *near* ones: nothing else has to be gathered.

  row of tokens   ........[ near tiles                  ]........
                             window       [   block i   ]           + list of block i, gathered

Products are transposed, [keys, queries]: what belongs to a query is then a row, as it lies in
memory, maxima and sums over keys need no shuffling of lanes, and only narrow matrices are
transposed.

A grid has the axes (batch row, KV head, block, step). The first three are parallel; the steps of a
block run one after the other on one core and add to scratch memory in VMEM, which the first step
sets to zero and the last one writes out. A program owns what it writes: results repeat to the bit.
Pallas copies the blocks of the next step to VMEM while a step computes, so inputs and outputs take
their size twice there; these copies are all that a step waits for. Bounds lie in SMEM.

  VMEM, twice            shape               type      bytes for 1 head, 2048 queries, D = 128
  query, cotangent       R, parts, rows, D   as query  512 KiB each, bfloat16
  logsumexp, delta       R, parts, 1, rows   float32     8 KiB each
  tau                    parts, 1, rows      float32     8 KiB
  window_start           parts, 1, rows      int32       8 KiB
  key, value of a tile   keys or listed, D   as query  128 KiB each, tiles of 512
  score, last of a tile  1, keys or listed   float32     2 KiB each; last int32
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

Leaf = Any  # an array, its ShapeDtypeStruct or BlockSpec, or inside a kernel the reference to it

LANES, SUBLANES = 128, 8
VMEM_BYTES = 48 * 2**20  # the most that a kernel may use
# dimension numbers of a b^T, a b and a^T b
A_BT, A_B, AT_B = ((((a,), (b,)), ((), ())) for a, b in ((1, 1), (1, 0), (0, 0)))


class Tiling(NamedTuple):
  """Sizes in tokens, multiples of 128.

  Attributes:
    queries: of a block, which has one list; a multiple of `rows` and `keys`.
    rows: queries that are multiplied at a time.
    keys: of a tile near the queries.
    listed: of a tile of a list.
  """

  queries: int
  rows: int
  keys: int
  listed: int


class Static(NamedTuple):
  """Constants of the kernels besides shapes; window, gate and scale as in
  `sparsek.sparsek_attention`.
  """

  window: int
  gate: str
  scale: float
  tiling: Tiling


class Queries(NamedTuple):
  """Arrays by query, `rows` at a time.

  Attributes:
    query: [B, G, R, n / rows, rows, D], R query heads for each KV head.
    tau: [B, G, n / rows, 1, rows] thresholds.
    window_start: [B, n / rows, 1, rows] int32, the first token of each query's window; never
      decreasing.
  """

  query: Leaf
  tau: Leaf
  window_start: Leaf


class Outputs(NamedTuple):
  """Arrays by query that the backward pass needs of the output.

  Attributes:
    cotangent: [B, G, R, n / rows, rows, D], gradient of the output.
    logsumexp, delta: [B, G, R, n / rows, 1, rows] float32; delta is <dO, O>.
  """

  cotangent: Leaf
  logsumexp: Leaf
  delta: Leaf


class Keys(NamedTuple):
  """Arrays by near token, or by token of all blocks' lists one after the other, a tile at a time.

  Attributes:
    key, value: [B, G, tiles, m, D].
    score: [B, G, tiles, 1, m] float32.
    last: [B, G, tiles, 1, m] int32, one past the last query that selects the token; 0 if none does.
  """

  key: Leaf
  value: Leaf
  score: Leaf
  last: Leaf


class Inputs(NamedTuple):
  """Inputs of a kernel; None for those that it does not read."""

  queries: Queries
  outputs: Outputs | None
  listed: Keys | None
  near: Keys


class Bounds(NamedTuple):
  """Scalars that say what a program may skip; flat int32 arrays.

  Attributes:
    listed: [B G blocks], number of tiles of each list that hold tokens.
    entering: [B G blocks], 1 if a token is first selected after the block's first query.
    window_start: [B n / rows], `Queries.window_start` of the first of `rows` queries.
    reach: [B blocks], the last block whose queries may see any of the tokens of this one, except
      through lists.
  """

  listed: Leaf
  entering: Leaf
  window_start: Leaf
  reach: Leaf


def dot(a: jax.Array, b: jax.Array, which: tuple) -> jax.Array:
  """Multiplies matrices, summing in float32; float32 matrices are multiplied in full precision."""
  precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else lax.Precision.DEFAULT
  return lax.dot_general(a, b, which, precision=precision, preferred_element_type=jnp.float32)


def div(x: jax.Array, n: int) -> jax.Array:
  """Divides natural numbers, rounding down; `//` would compile code for signs, too."""
  return lax.div(x, jnp.asarray(n, x.dtype))


def as_column(row: jax.Array) -> jax.Array:
  """Transposes [1, m] to [m, 1]."""
  return jnp.transpose(jnp.broadcast_to(row, (SUBLANES, row.shape[1])))[:, :1]


def as_row(column: jax.Array) -> jax.Array:
  """Transposes [m, 1] to [1, m]."""
  return jnp.transpose(jnp.broadcast_to(column, (column.shape[0], LANES)))[:1]


class Pairs(NamedTuple):
  """Pairs of keys and queries that are multiplied together.

  Attributes:
    visible: [keys, queries], which of them see each other.
    score: [keys, 1]; None where gates are 1.
    local: [keys, queries], which of them are in the window; None for none.
  """

  visible: jax.Array
  score: jax.Array | None = None
  local: jax.Array | None = None

  def distance(self, tau: jax.Array) -> Callable[[], jax.Array] | None:
    """Returns a function that computes u_j - tau_i, or 1 in the window; None if all gates are 1."""
    score = self.score
    if score is None:
      return None

    def compute():
      gated = score - tau if self.local is None else jnp.where(self.local, 1.0, score - tau)
      # Scores may be NaN where nothing is selected.
      return jnp.where(self.visible, gated, 0.0)

    return compute


class Grid:
  """Sizes, and the blocks of the arrays that a program sees; see the top of this file."""

  def __init__(self, queries: Queries, listed: Keys | None, near: Keys, static: Static) -> None:
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

  def flat(self, b: Any, g: Any, i: Any) -> Any:
    """Returns the number of a block of queries among those of all rows and heads."""
    return (b * self.groups + g) * self.blocks + i

  def list_tile(self, b: Any, g: Any, i: Any, t: Any, bounds: Bounds) -> Any:
    """Returns the tile of the list at step t. Steps beyond the last tile that holds tokens return
    this one again, so that nothing is loaded for them.
    """
    return jnp.minimum(t, jnp.maximum(bounds.listed[self.flat(b, g, i)] - 1, 0))

  def near_tile(self, b: Any, i: Any, t: Any, bounds: Bounds) -> Any:
    """Returns the tile of near tokens at step t; beyond `last_tile` the step has nothing to do."""
    return div(bounds.window_start[(b * self.blocks + i) * self.parts], self.keys) + jnp.maximum(
      t - self.list_tiles, 0
    )

  def last_tile(self, i: Any) -> Any:
    """Returns the tile that holds the last of a block's own tokens."""
    return (i + 1) * (self.queries // self.keys) - 1

  def specs(self, block: Callable) -> tuple[Queries, Outputs]:
    """Returns the BlockSpecs of Queries and Outputs; block(b, g, i, t, bounds) is the block of
    queries of a program.
    """

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

  def key_specs(self, size: int, tile: Callable, tiles: int | None = None) -> Keys:
    """Returns the BlockSpecs of Keys: the tile of `size` keys with the number tile(b, g, i, t,
    bounds); with `tiles` the group of that many tiles with this number.
    """
    index = lambda b, g, i, t, *bounds: (b, g, tile(b, g, i, t, Bounds(*bounds)), 0, 0)
    matrix, row = (
      pl.BlockSpec((None, None, tiles, *shape), index) for shape in ((size, self.dim), (1, size))
    )
    return Keys(matrix, matrix, row, row)

  def list_specs(self) -> Keys:
    """Returns the BlockSpecs of listed Keys."""
    return self.key_specs(
      self.static.tiling.listed,
      lambda b, g, i, t, bounds: i * self.list_tiles + self.list_tile(b, g, i, t, bounds),
    )

  def near_specs(self) -> Keys:
    """Returns the BlockSpecs of near Keys."""
    return self.key_specs(
      self.keys,
      lambda b, g, i, t, bounds: jnp.minimum(self.near_tile(b, i, t, bounds), self.last_tile(i)),
    )

  def for_each_part(self, run: Callable) -> None:
    """Calls run(head, part) for all query heads and parts of the block."""

    @pl.loop(0, self.heads * self.parts)
    def call(x):
      head = div(x, self.parts)
      run(head, x - head * self.parts)

  def for_listed_pairs(self, i: Any, keys: Keys, run: Callable) -> None:
    """Calls run(head, part, Pairs) for a tile of the block's list. All of its tokens are selected
    at the block's first query, so only their last queries matter.
    """
    last, score = as_column(keys.last[...]), as_column(keys.score[...])

    def part_of(head, part):
      query = (
        i * self.queries + part * self.rows + lax.broadcasted_iota(jnp.int32, (1, self.rows), 1)
      )
      run(head, part, Pairs(query < last, score))

    self.for_each_part(part_of)

  def for_near_pairs(
    self,
    b: Any,
    g: Any,
    i: Any,
    tile: Any,
    keys: Keys,
    window_start: Any,
    bounds: Bounds,
    run: Callable,
  ) -> None:
    """Calls run(head, part, Pairs) for the pairs of the block's queries and a tile of near tokens,
    without those of tokens that were selected at the block's first query.

    Args:
      window_start: reference, see Queries.
    """
    window, begin = self.static.window, i * self.queries
    first_key, last_key = tile * self.keys, tile * self.keys + self.keys - 1
    entering = bounds.entering[self.flat(b, g, i)] > 0

    def part_of(head, part):
      first = begin + part * self.rows
      at = (b * self.blocks + i) * self.parts + part
      gated = entering & (last_key + window > begin) & (first_key + window < first + self.rows)
      near = (first_key < first + self.rows) & (last_key >= bounds.window_start[at])
      query = lambda: first + lax.broadcasted_iota(jnp.int32, (1, self.rows), 1)
      key = lambda: first_key + lax.broadcasted_iota(jnp.int32, (self.keys, 1), 0)
      local = lambda: (key() <= query()) & (key() >= window_start[part])

      @pl.when(gated)
      def run_gated():
        entry, in_window = key() + window, local()
        entered = (entry > begin) & (entry <= query()) & (query() < as_column(keys.last[...]))
        run(head, part, Pairs(in_window | entered, as_column(keys.score[...]), in_window))

      pl.when(near & jnp.logical_not(gated))(lambda: run(head, part, Pairs(local())))

    self.for_each_part(part_of)

  def call(
    self,
    kernel: Callable,
    steps: int,
    bounds: Bounds,
    inputs: tuple[Inputs, Inputs],
    outputs: tuple[Any, Any],
    scratch: Any,
    flops: int,
    extra_bytes: float,
  ) -> Any:
    """Calls kernel(bounds, inputs, outputs, scratch), trees of references.

    Args:
      kernel: the body.
      steps: of a program's last axis.
      bounds: prefetched.
      inputs: trees of arrays and of BlockSpecs.
      outputs: trees of jax.ShapeDtypeStruct and of BlockSpecs.
      scratch: tree of memory.
      flops: of all programs.
      extra_bytes: moved in addition to reading each input and writing each output once.

    Returns:
      The tree of outputs.
    """
    arrays, in_tree = jax.tree.flatten(inputs[0])
    shapes, out_tree = jax.tree.flatten(outputs[0])
    buffers, scratch_tree = jax.tree.flatten(scratch)
    varying = jax.typeof(inputs[0].queries.query).manual_axis_type  # inside shard_map
    shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype, manual_axis_type=varying) for x in shapes]

    def run(*refs):
      remaining = iter(refs)
      take = lambda tree, leaves: jax.tree.unflatten(tree, [next(remaining) for _ in leaves])
      kernel(
        Bounds(*(next(remaining) for _ in bounds)),
        take(in_tree, arrays),
        take(out_tree, shapes),
        take(scratch_tree, buffers),
      )

    nbytes = sum(x.size * jnp.dtype(x.dtype).itemsize for x in (*arrays, *shapes))
    results = pl.pallas_call(
      run,
      out_shape=shapes,
      grid_spec=pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=len(bounds),
        grid=(self.batch, self.groups, self.blocks, steps),
        in_specs=jax.tree.leaves(inputs[1]),
        out_specs=jax.tree.leaves(outputs[1]),
        scratch_shapes=buffers,
      ),
      compiler_params=pltpu.CompilerParams(
        dimension_semantics=("parallel",) * 3 + ("arbitrary",), vmem_limit_bytes=VMEM_BYTES
      ),
      cost_estimate=pl.CostEstimate(
        flops=int(flops), bytes_accessed=int(nbytes + extra_bytes), transcendentals=0
      ),
    )(*bounds, *arrays)
    return jax.tree.unflatten(out_tree, results)

  def buffer(self, *shape: int) -> Any:
    """Returns float32 VMEM of a shape."""
    return pltpu.VMEM(shape, jnp.float32)

  def flops(self, listed_products: int, near_products: int) -> int:
    """Returns the floating-point operations of that many products for each pair."""
    programs = self.batch * self.groups * self.heads * self.blocks
    pairs = listed_products * self.listed_pairs + near_products * self.near_pairs
    return 2 * self.dim * programs * pairs

  def extra_key_bytes(self, near: Keys) -> float:
    """Returns the bytes of near keys and values that are read in addition to each of them once."""
    return (near.key.nbytes + near.value.nbytes) * (self.near_tiles * self.keys / self.queries - 1)
