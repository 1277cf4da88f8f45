"""Thresholds, expiry and rank order of every causal prefix: the inside of `causal_sparsek`.

Both questions are one. Sort positions (ranks for the expiry; the breakpoints u - 1 and u of all tokens for the thresholds); let tokens enter one a query;
for each query find its *cut*, the number of leading positions that "exceed": at least k tokens at or above that rank, or gates summing to more than k at that
breakpoint. Either is decided by sums over the positions at or above, and the cut never decreases. Documents follow each other in the positions as they do in
the queries, and tokens of other documents then only ever add what keeps cuts where they belong, so nothing restarts.

`_cuts` cuts the queries in blocks and the positions in buckets. The bucket of a block's last cut is that of the next block's first, so (block, bucket) pairs
number no more than blocks and buckets together: each level splits all blocks by 32 in O(n) dense compare-and-sums, and nothing depends on how far cuts move.
Every search here is 32-ary: a few wide kernels instead of many narrow ones.
"""

import functools
import math

import jax
from jax import lax
import jax.numpy as jnp

from sparsek.kernels.varying import varying_like

RADIX = 32                  # blocks a block is split into; elements a step of a search or scan looks at
BUCKET = 64                 # positions of a bucket on the last level
GROUP = 8                   # positions looked at together inside a bucket
NEVER = 2 ** 30             # the query at which a token enters that never does


def finite(scores):
  """NaN and -inf (both "not a candidate" here) and +inf become finite, so that arithmetic on them stays defined."""
  largest = float(jnp.finfo(scores.dtype).max)
  return jnp.nan_to_num(scores, nan=-largest, neginf=-largest, posinf=largest)


def minus_one(u):
  """u - 1, the breakpoint at which an entry leaves 1; u itself where the floats are too coarse to hold u - 1."""
  return jnp.where(jnp.abs(u) >= 2.0 ** (jnp.finfo(u.dtype).nmant + 1), u, u - 1)


def below(tau, kth_best):
  """tau, which lies strictly below the k-th best score, where rounding or floats wider than 1 put it no lower: all of the top k have a gate above 0."""
  return jnp.minimum(tau, jnp.nextafter(kth_best, jnp.full_like(kth_best, -jnp.inf)))


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
@functools.partial(jax.jit, static_argnums=(3, 4, 5))
def select(scores, start, end, k, delay, packed):
  """(threshold, expiry, order), [batch, heads, n] each: those of `causal_sparsek`, and the tokens by (document, score, later first).

  Along `order` expiry never decreases. scores: [batch, heads, n] float32; start, end: [batch, n], from `document_bounds`; packed: there may be more than
  one document. Only the thresholds have a gradient.
  """
  row = functools.partial(_select_row, k=k, delay=delay, packed=packed)
  start, end = varying_like(start, scores), varying_like(end, scores)
  return jax.vmap(jax.vmap(row, in_axes=(0, None, None)))(scores, start, end)


def _select_row(scores, start, end, *, k, delay, packed):
  n = scores.shape[0]
  index = jnp.arange(n, dtype=jnp.int32)
  key, order = _sorted(scores, start, packed)
  u, present = _score(key), key > 0                       # in rank order; a document's ranks are its queries, so `start` and `end` hold for ranks too
  entry = jnp.where(present & (order + delay < end), order + delay, NEVER)
  rank = jnp.zeros(n, jnp.int32).at[order].set(index, unique_indices=True)
  newest = index - delay                                   # the token that enters at each query
  enters = newest >= start
  newest = jnp.maximum(newest, 0)
  newest_rank = _take(rank, newest)
  enters &= _take(present, newest_rank)

  at_or_above = lambda sums, position: sums[0] >= k
  cut, _ = _cuts(entry, jnp.ones((1, n), jnp.int32), jnp.where(enters, newest_rank, -1)[None], at_or_above)
  kth_best = _take(u, jnp.maximum(cut - 1, 0))
  expiry = jnp.minimum(_leading(lambda i, x: x <= index + 1, n, cut), end)
  expiry = _take(jnp.where(present, expiry, 0), rank)

  tau = _thresholds(u, entry, newest_rank, enters, start, end, k)
  tau = below(tau, kth_best)                               # -inf stays
  tau = jnp.where((index - delay >= start) & _take(jnp.isnan(scores), newest), jnp.inf, tau)       # spreads to the document's end
  tau = _running(jnp.max, jnp.maximum, -jnp.inf, tau, start if packed else None)           # rounding may not break the order
  return jnp.where(tau == jnp.inf, jnp.nan, tau), expiry, order


def _sorted(scores, start, packed):
  """(keys, tokens) by document, then score, then later token first. A key is an integer ordered like the score, 0 for NaN and -inf."""
  bits = lax.bitcast_convert_type(jnp.where(scores == 0, 0, finite(scores)), jnp.int32)    # -0 and 0 are equal
  key = jnp.where(bits < 0, ~bits, bits | jnp.int32(-2 ** 31)).astype(jnp.uint32)
  key = jnp.where(scores > -jnp.inf, key, 0)
  token = jnp.arange(scores.shape[0], dtype=jnp.int32)
  ranked, order = lax.sort((key[::-1], token[::-1]), num_keys=1, is_stable=True)
  if packed:
    order = lax.sort((_take(start, order), order), num_keys=1, is_stable=True)[1]                 # two sorts by one key beat one by two
    ranked = _take(key, order)
  return ranked, order


def _score(key):
  bits = lax.bitcast_convert_type(key, jnp.int32)
  return finite(lax.bitcast_convert_type(jnp.where(bits < 0, bits & jnp.int32(2 ** 31 - 1), ~bits), jnp.float32))


def _take(x, position):
  """x[..., position], for positions known to be inside."""
  return x.at[..., position].get(mode="promise_in_bounds", wrap_negative_indices=False)


def _running(reduce, join, neutral, x, start=None):
  """Cumulative sum or maximum of x along its last axis, in steps of 32; where `start` (like x, never decreasing) is given, from position `start` on only."""
  x, n = lax.optimization_barrier(x), x.shape[-1]          # read 32 times: not to be derived each time
  blocks = -(-n // RADIX)
  tile = lambda y, fill: jnp.pad(y, [(0, 0)] * (y.ndim - 1) + [(0, blocks * RADIX - n)], constant_values=fill).reshape(*y.shape[:-1], blocks, RADIX)
  lane = jnp.arange(RADIX, dtype=jnp.int32)
  inside = lane[:, None] <= lane
  if start is not None:
    start = tile(start, n)
    first = RADIX * jnp.arange(blocks, dtype=jnp.int32)[:, None]
    inside = inside & (first[..., None] + lane[:, None] >= start[..., None, :])
  out = reduce(jnp.where(inside, tile(x, neutral)[..., :, None], neutral), axis=-2)
  if blocks > 1:
    carry = _running(reduce, join, neutral, out[..., -1], None if start is None else start[..., -1] // RADIX)
    carry = jnp.concatenate([jnp.full_like(carry[..., :1], neutral), carry[..., :-1]], axis=-1)[..., None]
    out = join(out, carry if start is None else jnp.where(start < first, carry, neutral))
  return out.reshape(*x.shape[:-1], blocks * RADIX)[..., :n]


def _leading(test, size, *arrays):
  """For each query, how many of the positions 0 .. size - 1 pass; those that do come first.

  test: (positions, values of each array there), [32, queries] -> bool.
  """
  steps = [1]
  while steps[-1] * RADIX < size:
    steps.append(steps[-1] * RADIX)
  lane = jnp.arange(RADIX, dtype=jnp.int32)[:, None]
  found = 0
  for step in reversed(steps):                             # samples are copied together, so that a search reads 32 neighbours
    samples, position = size // step, found * RADIX + lane
    values = (_take(x[step - 1::step], jnp.minimum(position, samples - 1)) for x in arrays)
    found = found * RADIX + jnp.sum((position < samples) & test((position + 1) * step - 1, *values), axis=0, dtype=jnp.int32)
  return found


def _levels(n, size):
  """[(queries between the cuts that a level finds, positions of its buckets)], coarse to fine: each level's work is O(n), each bucket whole finer ones."""
  step, bucket, levels = 1, BUCKET, [(1, BUCKET)]
  while step * RADIX < n:
    step *= RADIX
    bucket *= max(1, min(4 * step, size // 16) // bucket)
    levels.append((step, bucket))
  return levels[::-1]


def _cuts(entry, weight, entering, exceeds):
  """(cut, sums at or above it) of every query, [n] and [m, n].

  Args:
    entry: [size] query from which on each position counts.
    weight: [m, size] integers, what it then adds to the sums at or above every position up to its own; sums may wrap.
    entering: [e, n] positions that enter at each query, -1 for none: `entry` the other way round.
    exceeds: (sums [m, ...], position [...]) -> bool; at any query true up to some position and false from there on, and never false again later.
  """
  n = entering.shape[1]
  entry, weight, entering = lax.optimization_barrier((entry, weight, entering))          # else some compilers derive them anew at every read
  levels = _levels(n, entry.shape[0])
  block, wide = -(-n // levels[0][0]) * levels[0][0], -(-entry.shape[0] // levels[0][1]) * levels[0][1]
  size, queries = wide, block
  pad = lambda x, total, fill: jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, total - x.shape[-1])], constant_values=fill)
  entry, weight = pad(entry, size, NEVER), pad(weight, size, 0)
  entering = pad(entering, queries, -1)
  added = _take(weight, jnp.maximum(entering, 0))              # [m, e, queries]
  cumsum = functools.partial(_running, jnp.sum, jnp.add, 0)

  # bucket: where the cut of each block's first query is. top: that of the next block's. sums: over the positions above `top`, at the block's first query.
  bucket, top, sums = jnp.zeros(1, jnp.int32), jnp.zeros(1, jnp.int32), jnp.zeros((weight.shape[0], 1), jnp.int32)
  for step, width in levels:
    blocks, parts, split = queries // block, block // step, wide // width
    number = jnp.arange(blocks, dtype=jnp.int32)
    first, last = split * (bucket + number), split * (top + number) + split - 1            # pairs (block, bucket) of each block, in one list of them all
    pair = jnp.arange(size // width + (blocks - 1) * split, dtype=jnp.int32)
    mine = _leading(lambda i, x: x <= pair, blocks - 1, first[1:]) if blocks > 1 else jnp.zeros_like(pair)
    low = (pair - split * mine) * width                    # positions [low, high) of the pair
    high = low + width

    place = low + jnp.arange(width, dtype=jnp.int32)[:, None]
    old = cumsum(jnp.sum(jnp.where(_take(entry, place) <= mine * block, _take(weight, place), 0), axis=1, dtype=jnp.int32))
    old = _take(sums + _take(old, last), mine) - old             # above the pair, at the block's first query
    part = jnp.arange(parts, dtype=jnp.int32)[:, None, None]
    query = mine * block + part * step - jnp.arange(step, dtype=jnp.int32)[:, None]        # [parts, step, pairs]: those since the part before
    query = jnp.maximum(query, 0)
    new = jnp.where((part > 0) & (_take(entering, query) >= high), _take(added, query), 0)
    above = old[:, None] + jnp.cumsum(jnp.sum(new, axis=(1, 3), dtype=jnp.int32), axis=1)    # [m, parts, pairs]

    passed = _take(cumsum(exceeds(above, high).astype(jnp.int32)), last)                       # [parts, blocks]
    lowest = jnp.where(number > 0, split * bucket, 0)      # pairs below the first block's bucket are its own too
    bucket = (lowest + jnp.diff(passed, axis=1, prepend=0)).T.reshape(-1)
    top = jnp.concatenate([bucket[1:], jnp.full(1, size // width - 1, jnp.int32)])
    part, mine = jnp.tile(jnp.arange(parts, dtype=jnp.int32), blocks), jnp.repeat(number, parts)
    sums = above[:, part, top + split * mine]
    block, wide = step, width

  sums = above[:, part, bucket + split * mine][:, :n]      # above the bucket of the cut
  return _inside(entry, weight, exceeds, bucket[:n] * BUCKET, sums)


def _inside(entry, weight, exceeds, low, sums):
  """As `_cuts`, where each query's cut is known to lie in [low, low + BUCKET] and the sums above that."""
  query = jnp.arange(low.shape[0], dtype=jnp.int32)
  active = lambda w, place: jnp.where(_take(entry, place) <= query, _take(w, place), 0)

  def descend(above, parts, positions):
    """How many of the positions exceed, and the sums above those, given the sums from each to the next, and above all."""
    total, exceed = above, []
    for part, position in zip(reversed(parts), reversed(positions)):
      total = [a + b for a, b in zip(total, part)]
      exceed.append(exceeds(total, position))
    above = [a + sum(jnp.where(e, 0, b) for e, b in zip(reversed(exceed), column)) for a, column in zip(above, zip(*parts))]
    return sum(e.astype(jnp.int32) for e in exceed), above

  place = low + jnp.arange(BUCKET, dtype=jnp.int32).reshape(BUCKET // GROUP, GROUP, 1)
  groups = lax.optimization_barrier(jnp.sum(active(weight, place), axis=2, dtype=jnp.int32))         # [m, groups, n]
  count, sums = descend(list(sums), [list(x) for x in jnp.unstack(groups, axis=1)], [low + i for i in range(0, BUCKET, GROUP)])
  low, count, sums = lax.optimization_barrier((low + GROUP * jnp.maximum(count - 1, 0), count, sums))
  places = [low + i for i in range(GROUP)]
  rest, sums = descend(sums, [[active(w, place) for w in weight] for place in places], places)
  return low + jnp.where(count > 0, rest, 0), jnp.stack(sums)


def _fixed_point(u, bits):
  """Order-preserving integers (high, low) with u = high / 2^bits + low / 2^(2 bits), 0 <= low < 2^bits; high wraps.

  Beyond 2^24 neighbouring floats are 2 or more apart and only "more than 1 apart" matters, so they are numbered in steps of 2.
  """
  floor = jnp.floor(u)
  fraction = jnp.round((u - floor) * 2.0 ** (2 * bits)).astype(jnp.int32)
  large = jnp.abs(u) >= 2.0 ** 24
  step = lax.bitcast_convert_type(jnp.abs(u), jnp.int32) - lax.bitcast_convert_type(jnp.float32(2.0 ** 24), jnp.int32)
  whole = jnp.where(large, jnp.where(u < 0, -1, 1) * (2 ** 24 + 2 * step), jnp.where(large, 0, floor).astype(jnp.int32))
  fraction = jnp.where(large, 0, fraction)
  whole, fraction = whole + (fraction >> (2 * bits)), fraction & (2 ** (2 * bits) - 1)
  return (whole << bits) + (fraction >> bits), fraction & (2 ** bits - 1)


def _thresholds(u, entry, newest_rank, enters, start, end, k):
  """tau of every query, -inf for k or fewer candidates. u, entry: by rank."""
  n = u.shape[0]
  bits = min(12, 30 - math.ceil(math.log2(max(n, 2))))    # n * 2^bits must fit an int32
  rank = jnp.arange(n, dtype=jnp.int32)
  low_breakpoint = minus_one(u)
  # Positions of u - 1 and u among all: both are sorted, so it takes the number of the other kind before; equal ones have u - 1 before u.
  inside = lambda test: lambda i, x: (i < start) | ((i < end) & test(x))
  place_high = rank + _leading(inside(lambda x: x <= u), n, low_breakpoint)
  place_low = rank + _leading(inside(lambda x: x < low_breakpoint), n, u)
  source = jnp.zeros(2 * n, jnp.int32).at[jnp.concatenate([place_low, place_high])].set(jnp.arange(2 * n, dtype=jnp.int32), unique_indices=True)

  is_low = source < n
  source = jnp.where(is_low, source, source - n)
  value = _take(u, source)
  high, low = _fixed_point(value, bits)
  high, breakpoint = jnp.where(is_low, high - 2 ** bits, high), jnp.where(is_low, minus_one(value), value)
  sign = jnp.where(is_low, -1, 1)
  # Sums of gates at b are sums over the breakpoints v above of v - b for each u, b - v for each u - 1.
  weight = sign * jnp.stack([jnp.ones_like(high), high, low])
  high, low, breakpoint = lax.optimization_barrier((high, low, breakpoint))

  def missing(sums, position):
    """k less the sum of gates at a breakpoint: in 2^-bits, less a remainder in 2^(-2 bits)."""
    position = jnp.minimum(position, 2 * n - 1)
    count, total, fine = sums
    fine = fine - count * _take(low, position)
    return (k << bits) - (total - count * _take(high, position)) - (fine >> bits), fine & (2 ** bits - 1)

  def exceeds(sums, position):
    coarse, fine = missing(sums, position)
    return (coarse < 0) | ((coarse == 0) & (fine > 0))

  entering = jnp.where(enters, _take(jnp.stack([place_low, place_high]), newest_rank), -1)
  cut, sums = _cuts(_take(entry, source), weight, entering, exceeds)
  coarse, fine = missing(sums, cut)
  step = coarse.astype(jnp.float32) * 2.0 ** -bits - fine.astype(jnp.float32) * 2.0 ** (-2 * bits)
  tau = _take(breakpoint, jnp.minimum(cut, 2 * n - 1)) - step / jnp.maximum(sums[0], 1)
  return jnp.where(cut > 2 * start, tau, -jnp.inf)         # at the document's lowest breakpoint every candidate counts 1


def _select_forward(scores, start, end, k, delay, packed):
  threshold, expiry, order = select(scores, start, end, k, delay, packed)
  return (threshold, expiry, order), (scores, threshold, start, end)


def _select_backward(k, delay, packed, residuals, cotangents):
  scores, threshold, start, end = residuals
  return _threshold_vjp(cotangents[0], scores, threshold, start, end, delay), None, None


select.defvjp(_select_forward, _select_backward)


@functools.partial(jax.jit, static_argnums=5)
def _threshold_vjp(cotangent, scores, threshold, start, end, delay):
  row = functools.partial(_threshold_vjp_row, delay=delay)
  start, end = varying_like(start, scores), varying_like(end, scores)
  return jax.vmap(jax.vmap(row, in_axes=(0, 0, 0, None, None)))(cotangent, scores, threshold, start, end)


def _threshold_vjp_row(cotangent, scores, threshold, start, end, *, delay):
  """du_j = sum over the queries i in which j is fractional of dtau_i / |S_i|: an interval of queries."""
  n = scores.shape[0]
  u = finite(scores)
  entry = jnp.minimum(jnp.arange(n, dtype=jnp.int32) + delay, end)
  search = lambda reached: _bisect(entry - 1, end, lambda i: ((i >= end) | reached(threshold[jnp.minimum(i, n - 1)]), ()), n)[0]
  first, last = search(lambda tau: tau > minus_one(u)), search(lambda tau: tau >= u)
  fractional = (scores > -jnp.inf) & (first < last)
  weight = fractional.astype(jnp.int32)
  count = _prefix_sums(start, end, jnp.concatenate([first, last]), jnp.concatenate([weight, -weight]))
  share = jnp.where(count > 0, cotangent / jnp.maximum(count, 1), 0)
  return jnp.where(fractional, interval_sums(share, first, last), 0)


def interval_sums(x: jax.Array, first: jax.Array, last: jax.Array) -> jax.Array:
  """sum of x[first_j : last_j] for every j, [n] each; prefix sums carry their rounding errors along, so that short intervals late in x stay accurate."""
  def add(a, b):
    total = a[0] + b[0]
    part = total - a[0]
    return total, a[1] + b[1] + ((a[0] - (total - part)) + (b[0] - part))
  total, error = lax.associative_scan(add, (x, jnp.zeros_like(x)))
  total, error = (jnp.concatenate([jnp.zeros_like(y[:1]), y]) for y in (total, error))
  return (total[last] - total[first]) + (error[last] - error[first])


def _bisect(low, high, test, size):
  """(smallest integer in (low, high] that passes, what the test found there), elementwise; `high` is taken to pass; high - low <= size + 1.

  test: integers -> (passes, tuple of arrays like it). What it found is kept only where a tested integer passed, zero otherwise.
  """
  kinds = jax.eval_shape(test, high)[1]
  def halve(_, state):
    low, high, found = state
    middle = (low + high + 1) // 2                       # == high once high - low == 1: the ends then stay
    passes, new = test(middle)
    keep = passes & (middle < high)
    return jnp.where(passes | (middle == high), low, middle), jnp.where(keep, middle, high), tuple(jnp.where(keep, x, y) for x, y in zip(new, found))
  found = tuple(varying_like(jnp.zeros(kind.shape, kind.dtype), high) for kind in kinds)
  _, high, found = lax.fori_loop(0, math.ceil(math.log2(size + 1)), halve, (low, high, found))
  return high, found


def _prefix_sums(start, end, position, values):
  """[n, ...] for every query i: the sum of the `values` whose `position` is at most i, in its own document.

  position, values: [m, ...] with m a multiple of n, entry j belonging to the document [start, end) of token j mod n.
  """
  n = start.shape[0]
  inside = position < jnp.tile(end, position.shape[0] // n)
  position = jnp.where(inside, position, n)
  sums = jnp.cumsum(jnp.zeros((n, *values.shape[1:]), values.dtype).at[position].add(values, mode="drop"), axis=0)
  before = jnp.concatenate([jnp.zeros_like(sums[:1]), sums])[start]
  return sums - before
