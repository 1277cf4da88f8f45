"""Compares attention of sharded rows with that of one device, on 8 simulated devices, and prints
the errors as JSON: python -m tests.parallel.sharded_attention.
"""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

import sparsek
from sparsek.kernels import specs, xla
from sparsek.kernels.saved import NAME
from sparsek.kernels.score_families import SCORE_FAMILIES
from sparsek.parallel import sequence_parallel
from sparsek.parallel.collectives import collectives
from sparsek.parallel.mesh import CONTEXT, ROWS, make_mesh
from tests.kernels.attention_base import ARGUMENTS, dense_attention, relative_error

N, HEAD_DIM = 64, 8
TOKENS, WHOLE = PartitionSpec(ROWS, CONTEXT), PartitionSpec(ROWS)
# Rows of one batch: a family of scores, and the lengths of documents, the last one repeated.
PACKED = (
  ("normal", (N,)),
  ("normal", (3, 17, 1, 1, 30)),
  ("equal", (50,)),
  ("ties", (7,)),
  ("huge", (20, 44)),
  ("tiny", (64,)),
  ("minus infinity", (30,)),
  ("not finite", (25, 12)),  # keys and values of the first document
)
PLAIN = (("normal", ()), ("rising", ()))


@dataclasses.dataclass(frozen=True)
class Case:
  """Attention under a mesh.

  Attributes:
    context: shards of a row; `data` takes the rest of the devices.
    groups, k, window, gate, rows: the problem; k = 0 for a sliding window.
    fast: whether the layout of the kernels for GPUs and TPUs is used, with XLA in their place.
  """

  context: int
  groups: int = 2
  k: int = 0
  window: int = 0
  gate: str = "straight_through"
  rows: tuple = PACKED
  fast: bool = False

  @property
  def is_dense(self) -> bool:
    return max(self.k, self.window) >= N


CASES = {
  "fewer heads than shards": Case(8, k=5, window=4, gate="value"),
  "window of several shards": Case(8, groups=3, k=6, window=20, gate="key_value", fast=True),
  "two rows of devices": Case(4, groups=4, k=1, window=1),
  "no window, two shards": Case(2, k=7, gate="value", rows=PLAIN * 2),
  "all keys selected": Case(4, k=2 * N, gate="key_value", rows=PLAIN),
  "window of the whole row": Case(8, groups=1, k=3, window=2 * N, rows=PLAIN[:1]),
}
WINDOWS = {
  "window": Case(8, window=13),
  "window, one document a row": Case(4, window=20, rows=PLAIN),
  "window, kernels": Case(4, window=20, fast=True),
  "full": Case(4, window=N),
  "full, kernels": Case(8, window=N, rows=PACKED[:2], fast=True),
}


def dense(query, key, value, scores, segment_ids):
  """Computes what SPARSEK attention is where it leaves no key out."""
  del segment_ids
  return dense_attention(query, key, value, is_causal=True) + 0 * jnp.sum(scores)


@functools.cache
def problem(case: Case) -> tuple:
  """Returns inputs, a cotangent of the output, and segment ids or None."""
  parts = []
  for i, (family, documents) in enumerate(case.rows):
    known = family if family in SCORE_FAMILIES else "normal"
    spec = specs.Spec(
      "row",
      n=N,
      heads=2 * case.groups,
      groups=case.groups,
      head_dim=HEAD_DIM,
      documents=documents,
      scores=known,
    )
    query, key, value, scores = specs.make_inputs(spec, seed=i)
    if family == "minus infinity":
      scores = jnp.where((scores > 1) | (jnp.arange(N) < 10)[:, None], -jnp.inf, scores)
    if family == "not finite":
      key, value = key.at[:, 5].set(jnp.inf), value.at[:, 6].set(jnp.nan)
    parts.append((query, key, value, scores, specs.segment_ids(spec)))
  *inputs, ids = zip(*parts)
  inputs = [jnp.concatenate(x) for x in inputs]
  cotangent = jax.random.normal(jax.random.key(7), inputs[0].shape)
  return inputs, cotangent, None if ids[0] is None else jnp.concatenate(ids)


def run(attend, ids, cotangent, *inputs):
  """Returns the output and the gradients of the inputs."""
  out, vjp = jax.vjp(functools.partial(attend, segment_ids=ids), *inputs)
  return out, *vjp(cotangent)


def sharded(f, context):
  """Returns f of segment ids and arrays by token, under a mesh."""
  mesh = make_mesh(context=context)

  def call(ids, *arrays):
    in_specs = (WHOLE, *(TOKENS,) * len(arrays))
    return jax.shard_map(f, mesh=mesh, in_specs=in_specs, out_specs=TOKENS, check_vma=False)(
      ids, *arrays
    )

  return jax.jit(call)


def kernels(query, key, value, scores, threshold, expiry, order, start, end, **options):
  """Computes attention by XLA from the arguments of the kernels for GPUs and TPUs.

  The output is NaN where the order or the ends of documents are not as those need them.
  """
  n, queries = key.shape[1], query.shape[1]
  query = jnp.pad(query, ((0, 0), (n - queries, 0), (0, 0), (0, 0)))
  token = jnp.arange(n, dtype=jnp.int32)
  ever = (token + options["window"] < expiry) & (options["k"] > 0)
  ranked = jnp.take_along_axis(jnp.where(ever, expiry, 0), order, axis=-1)
  good = jnp.all((ranked == 0) | (ranked == jax.lax.cummax(ranked, axis=2)))
  good &= jnp.all(jnp.sort(order, axis=-1) == token) | (options["k"] == 0)
  good &= jnp.all((start <= token) & (token < end) & (end <= n))
  good &= jnp.all(jnp.where(ever, expiry <= end[:, None], True))
  by_token = [jnp.swapaxes(x, 1, 2) for x in (scores, threshold, expiry)]
  out = xla.attention(query, key, value, *by_token, start, **options)
  return out[:, n - queries :] + jnp.where(good, 0, jnp.nan)


def row_errors(x, y):
  """Returns the largest error of a row; infinity where other numbers are not finite."""
  x, y = np.asarray(x), np.asarray(y)
  if not np.array_equal(np.isfinite(x), np.isfinite(y)):
    return float("inf")
  x, y = (np.where(np.isfinite(z), z, 0) for z in (x, y))
  return max(float(relative_error(*pair)) for pair in zip(x, y))


def compare(case: Case) -> dict:
  """Returns the errors of the output, of the gradients, and of threshold and expiry."""
  inputs, cotangent, ids = problem(case)
  options = dict(k=case.k, window=case.window, gate=case.gate, implementation="xla")
  attend = functools.partial(sparsek.sparsek_attention, **options)
  one = jax.jit(functools.partial(run, dense if case.is_dense else attend))
  many = sharded(
    functools.partial(run, functools.partial(sequence_parallel.sparsek_attention, **options)),
    case.context,
  )
  pairs = zip(("out", *ARGUMENTS), many(ids, cotangent, *inputs), one(ids, cotangent, *inputs))
  return {name: row_errors(x, y) for name, x, y in pairs}


def compare_selection(case: Case) -> dict:
  """Returns whether threshold and expiry equal those of one device."""
  inputs, _, ids = problem(case)
  k, window = min(case.k, N), min(case.window, N)

  def select(ids, scores):
    start, end = sequence_parallel.document_bounds(ids, scores.shape[0], N)
    return sequence_parallel.select_own(scores, start, end, k, window, True)

  many = sharded(select, case.context)(ids, inputs[3])
  one = jax.jit(lambda ids, u: sparsek.causal_sparsek(u, k, delay=window, segment_ids=ids))(
    ids, inputs[3]
  )
  return {
    name: bool(np.array_equal(x, y, equal_nan=True))
    for name, x, y in zip(("threshold", "expiry"), many, one)
  }


def compare_window(case: Case) -> dict:
  """Returns the errors of a sliding window, or, if it holds the row, of full attention."""
  (*inputs, _), cotangent, ids = problem(case)
  window = functools.partial(sparsek.sliding_window_attention, window=case.window)
  sharded_window = functools.partial(
    sequence_parallel.sliding_window_attention, window=case.window, implementation="xla"
  )
  if case.window == N:
    sharded_window = functools.partial(sequence_parallel.full_attention, implementation="xla")
    inputs = [jnp.nan_to_num(x, posinf=0) for x in inputs]
  pairs = zip(
    ("out", *ARGUMENTS[:3]),
    sharded(functools.partial(run, sharded_window), case.context)(ids, cotangent, *inputs),
    jax.jit(functools.partial(run, window))(ids, cotangent, *inputs),
  )
  return {name: row_errors(x, y) for name, x, y in pairs}


def traffic(length: int, gradients: bool = False) -> dict:
  """Returns the collectives of a compiled layer of four shards, with a budget and window of 16, or
  of its gradients where a block's activations are computed again.
  """
  spec = specs.Spec("traffic", n=length, heads=4, groups=4, head_dim=32, batch=2)
  attend = functools.partial(
    sequence_parallel.sparsek_attention, k=16, window=17, gate="value", implementation="xla"
  )
  policy = jax.checkpoint_policies.save_only_these_names(NAME)
  block = jax.checkpoint(lambda *x: attend(*map(jnp.tanh, x)), policy=policy)
  total = lambda *x: jnp.sum(jnp.sin(block(*x)))
  layer = jax.grad(total, argnums=(0, 1, 2, 3)) if gradients else attend
  inputs = specs.make_inputs(spec)
  program = sharded(lambda _, *x: layer(*x), 4).lower(None, *inputs).compile().as_text()
  return collectives(program)


def with_kernels(compare, case: Case) -> dict:
  """Returns what `compare` does, with XLA in the place of a kernel for GPUs."""
  if not case.fast:
    return compare(case)
  module = sequence_parallel
  chosen = module.choose_implementation, module.choose_window_implementation
  attention = module.api.pallas_attention
  choice = module.choose_implementation("xla", jnp.zeros((1, 1, 1, 1)), None, 0)
  module.choose_implementation = lambda *_: choice._replace(implementation="mosaic_gpu")
  module.choose_window_implementation = module.choose_implementation
  module.api.pallas_attention = lambda _: kernels
  try:
    return compare(case)
  finally:
    module.choose_implementation, module.choose_window_implementation = chosen
    module.api.pallas_attention = attention


def main() -> None:
  """Prints all results."""
  jax.config.update("jax_num_cpu_devices", 8)
  print(
    json.dumps(
      {
        "attention": {name: with_kernels(compare, case) for name, case in CASES.items()},
        "selection": {
          name: compare_selection(case) for name, case in CASES.items() if case.rows == PACKED
        },
        "window": {name: with_kernels(compare_window, case) for name, case in WINDOWS.items()},
        "traffic": {
          "row": traffic(128),
          "row of twice the length": traffic(256),
          "gradients": traffic(128, gradients=True),
        },
      }
    )
  )


if __name__ == "__main__":
  main()
