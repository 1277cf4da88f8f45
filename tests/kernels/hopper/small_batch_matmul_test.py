"""Tests of products of a few rows: the kernel run lane by lane in NumPy, and on a GPU compared with
XLA; compile_test.py compiles it.
"""

import collections
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl

from sparsek.kernels import devices
from sparsek.kernels.hopper import (
  decode_attention,
  decode_attention_kernel,
  decode_attention_program,
  decode_eviction,
  decode_new_token,
  fused_decode_kernel,
  fused_decode_layer,
  row_preparation,
  small_batch_matmul,
  thread_ops,
)
from sparsek.kernels.sentinels import LOWEST
from tests.kernels.hopper import thread_ops_test

CASES = {
  "plain": (1, 32, 256, {}),
  "residual": (3, 32, 640, {"residual"}),
  "norm": (8, 16, 2048, {"scale"}),
  "swiglu": (2, 64, 768, {"scale", "swiglu"}),
  "float32": (1, 48, 1024, {"scale", "float32"}),
  "parts": (2, 32, 512, {"parts", "residual"}),
}

KERNELS = (
  decode_attention_kernel,
  decode_attention_program,
  decode_eviction,
  decode_new_token,
  fused_decode_kernel,
  row_preparation,
  small_batch_matmul,
  thread_ops,
)
DELAY = 0.01  # seconds that every other thread waits after a barrier


def problem(case):
  """Returns x, matrix and options of `product`, and its result by jnp."""
  batch, columns, width, kinds = CASES[case]
  rng = np.random.default_rng(0)
  make = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.bfloat16)
  x, matrix, scale, residual = (
    make(batch, width),
    make(columns, width),
    make(width).astype(jnp.float32),
    make(batch, columns),
  )
  options = dict(scale=scale, epsilon=1e-6) if "scale" in kinds else {}
  options |= dict(residual=residual) if "residual" in kinds else {}
  options |= dict(swiglu="swiglu" in kinds, dtype=jnp.float32 if "float32" in kinds else None)
  if "parts" in kinds:
    number, heads = 3, width // 64
    top = jnp.asarray(rng.normal(size=(number, batch, heads)), jnp.float32).at[1].set(LOWEST)
    x = small_batch_matmul.Parts(
      jnp.asarray(rng.normal(size=(number, batch, width)), jnp.float32),
      top,
      jnp.ones(top.shape).at[1].set(0),
    )
  h = (x.joined(jnp.bfloat16) if "parts" in kinds else x).astype(jnp.float32)
  if "scale" in kinds:
    h = (
      (h * jax.lax.rsqrt(jnp.mean(h * h, axis=-1, keepdims=True) + 1e-6) * scale)
      .astype(jnp.bfloat16)
      .astype(jnp.float32)
    )
  y = jnp.matmul(h, matrix.astype(jnp.float32).T, precision="highest")
  if "swiglu" in kinds:
    gate, up = jnp.split(y.astype(jnp.bfloat16).astype(jnp.float32), 2, axis=-1)
    y = jax.nn.silu(gate) * up
  if "residual" in kinds:
    y = y.astype(jnp.bfloat16).astype(jnp.float32) + residual.astype(jnp.float32)
  return x, matrix, options, y


def multiply_add(sums, a, b, dtype):
  """Computes what `thread_registers.multiply_add` does, by the layouts of PTX's mma.m16n8k16."""
  row, column = np.arange(thread_ops_test.thread_ops.LANES).reshape(-1, 8, 4) // 4 % 8, np.arange(4)
  # [word, warp, r, c, 2]
  pairs = lambda words: np.stack(
    [np.asarray(w).view(dtype).astype(np.float32).reshape(-1, 8, 4, 2) for w in words]
  )
  (a, b), warps = map(pairs, (a, b)), row.shape[0]
  whole_a, whole_b, out = (
    np.zeros((warps, 16, 16)),
    np.zeros((warps, 16, 8)),
    np.zeros((warps, 16, 8)),
  )
  for word in range(4):
    for c in column:
      k = 2 * c + word // 2 * 8
      whole_a[:, word % 2 * 8 : word % 2 * 8 + 8, k : k + 2] = a[word, :, :, c]
      if word < 2:
        whole_b[:, 2 * c + 8 * word : 2 * c + 8 * word + 2] = np.swapaxes(b[word, :, :, c], 1, 2)
  for i, x in enumerate(sums):
    out[:, i // 2 * 8 : i // 2 * 8 + 8, i % 2 :: 2] = np.asarray(x).reshape(-1, 8, 4)
  out += whole_a @ whole_b
  return tuple(
    jnp.asarray(out[:, i // 2 * 8 : i // 2 * 8 + 8, i % 2 :: 2].reshape(-1), jnp.float32)
    for i in range(4)
  )


class Barriers:
  """The mbarriers of a program; what is copied arrives at the last moment, when somebody waits for
  it.
  """

  def __init__(self):
    self.changed, self.failed = threading.Condition(), False
    self.arrivals, self.arrived, self.opened, self.announced, self.coming = (
      {},
      *(collections.Counter() for _ in range(3)),
      collections.defaultdict(list),
    )

  def init_barriers(self, ref, where, arrivals):
    for number in np.flatnonzero(where):
      assert 2 * number + 1 < ref.shape[0]
      self.arrivals[id(ref), int(number)] = arrivals

  def arrive(self, ref, number, times=4):  # once a warp
    with self.changed:
      key = id(ref), int(number)
      self.arrived[key] += times
      assert self.arrived[key] <= self.arrivals[key]
      self._open(key, lazily=True)

  def arrive_expecting(self, ref, number, size, where):
    assert np.sum(np.broadcast_to(where, (128,))) == 1
    self.announced[id(ref), int(number)] += size
    self.arrive(ref, number, 1)

  def copy_bytes(self, ref, row, offset, size, into, place, barriers, number, where):
    row, offset, place, where = (np.broadcast_to(x, (128,)) for x in (row, offset, place, where))
    count = size // ref.dtype.itemsize
    with self.changed:
      for lane in np.flatnonzero(where):
        assert (
          0 <= row[lane] < ref.shape[0]
          and offset[lane] + count <= ref.shape[1]
          and place[lane] + count <= into.array.size
        )
        source, target = (
          ref.array[row[lane], offset[lane] : offset[lane] + count],
          into.array[place[lane] : place[lane] + count],
        )
        target[:] = np.nan  # on its way
        self.coming[id(barriers), int(number)].append((size, target, source))
      self.changed.notify_all()

  def _open(self, key, lazily=False):
    coming = self.coming[key]
    if (
      self.arrived[key] == self.arrivals[key]
      and self.announced[key] == sum(size for size, *_ in coming)
      and not (lazily and coming)
    ):
      for _, into, source in coming:
        into[:] = source
      self.opened[key] += 1
      self.arrived[key] = self.announced[key] = 0
      coming.clear()
      self.changed.notify_all()

  def wait_for(self, ref, number, parity):
    key = id(ref), int(number)

    def opened():
      if self.opened[key] % 2 == int(parity):
        self._open(key)
      return self.failed or self.opened[key] % 2 != int(parity)

    with self.changed:
      assert self.changed.wait_for(opened, 120) and not self.failed, "a program would wait forever"

  def abort(self):
    with self.changed:
      self.failed = True
      self.changed.notify_all()


class Meeting:
  """The grid barrier of all programs."""

  def __init__(self):
    self.changed, self.failed = threading.Condition(), False

  def meet(self, ref, adds, before, where):
    where = np.flatnonzero(np.broadcast_to(where, (128,)))
    if len(where):
      assert len(where) == 1 and ref.array.shape == (1,) and ref.dtype == np.int32
      with self.changed:
        old = int(np.asarray(before)[where[0]])
        ref.array[0] = (int(ref.array[0]) + int(np.asarray(adds)[where[0]]) + 2**31) % 2**32 - 2**31
        self.changed.notify_all()
        assert (
          self.changed.wait_for(lambda: self.failed or (int(ref.array[0]) ^ old) < 0, 120)
          and not self.failed
        ), "a program would wait forever"

  def abort(self):
    with self.changed:
      self.failed = True
      self.changed.notify_all()


def as_ref(x):
  return x if isinstance(x, thread_ops_test.Ref) else thread_ops_test.Ref(np.array(x))


class Emulation:
  """Kernels run lane by lane, each warpgroup in a thread; all programs of a grid at the same time
  where they wait for each other.
  """

  def __init__(self):
    self.here = threading.local()  # of a thread: its place in the grid and its program's barriers

  def kernel(
    self,
    body,
    *,
    out_type=(),
    scratch_types=(),
    grid,
    grid_names,
    num_threads=1,
    thread_name=None,
    compiler_params,
    kernel_name,
  ):
    """Stands for `plgpu.kernel`."""

    def run(*args):
      out = jax.tree.map(thread_ops_test.poisoned, out_type)
      args = jax.tree.map(
        lambda x: x if isinstance(x, thread_ops_test.Ref) else thread_ops_test.Ref(np.array(x)),
        args,
      )
      errors, meeting = [], Meeting()

      def threads(program):
        scratch = jax.tree.map(thread_ops_test.poisoned, scratch_types)
        # the hardware barriers by number and warpgroups; 0 is that of all
        waits = {(0, 0): threading.Barrier(num_threads)} | {
          (number, n): threading.Barrier(n)
          for n in range(1, num_threads + 1)
          for number in range(1, num_threads // n + 1)
        }
        copies = Barriers()

        def work(warpgroup):
          here = self.here
          here.place = dict(zip(grid_names, program))
          here.place |= {"sparsek_warpgroup": 0, thread_name: warpgroup}
          here.barriers, here.copies, here.meeting, here.waits = waits, copies, meeting, 0
          try:
            body(*args, *out, *scratch)
          except Exception as error:
            errors.append(error)
            for barrier in (*waits.values(), copies, meeting):
              barrier.abort()

        return [threading.Thread(target=work, args=(i,)) for i in range(num_threads)]

      programs = list(np.ndindex(*grid))
      meets = kernel_name == "sparsek_fused_decode_layer"
      for together in [programs] if meets else [[program] for program in programs]:
        running = [thread for program in together for thread in threads(program)]
        for thread in running:
          thread.start()
        for thread in running:
          thread.join()
        if errors:
          raise errors[0]
      return jax.tree.map(lambda x: jnp.asarray(x.array), out)

    return run

  def dawdle(self):
    """Lets every other thread sleep, so that one that does not wait as it should reads what is not
    there yet.
    """
    self.here.waits += 1
    if (self.here.waits + self.here.place["sparsek_warpgroup"]) % 2:
      time.sleep(DELAY)

  def sync_threads(self, warpgroups=0, barrier=1):
    self.here.barriers[int(barrier) if warpgroups else 0, warpgroups].wait()
    self.dawdle()

  def wait_barrier(self, *args):
    self.here.copies.wait_for(*args)
    self.dawdle()

  def functions(self):
    """Returns what stands for the functions of thread_ops."""
    here = self.here
    functions = {
      f.__name__: f
      for f in (
        thread_ops_test.gather,
        thread_ops_test.gather_bytes,
        thread_ops_test.scatter,
        thread_ops_test.scatter_bytes,
        thread_ops_test.widen,
        thread_ops_test.narrow,
        multiply_add,
        self.sync_threads,
        self.wait_barrier,
      )
    }
    functions |= {
      "load_in_order": lambda *args, once=False, fresh=False: thread_ops_test.gather_bytes(*args),
      "load_number_in_order": thread_ops_test.gather,
      "lane_index": lambda: jnp.arange(thread_ops.LANES, dtype=jnp.int32),
      "shuffle_from": lambda x, lane: x[(jnp.arange(thread_ops.LANES) & -32) + lane],
      "shuffle_xor": lambda x, distance: x[jnp.arange(thread_ops.LANES) ^ distance],
      "grid_barrier": lambda *args: here.meeting.meet(*args),
    }
    return functions | {
      name: lambda *args, name=name: getattr(here.copies, name)(*args)
      for name in ("init_barriers", "arrive", "arrive_expecting", "copy_bytes")
    }


def run_loop(low, high, f, state):
  """Stands for `jax.lax.fori_loop`."""
  for i in range(low, high):
    state = f(jnp.int32(i), state)
  return state


def run_when(condition):
  """Stands for `pl.when`."""
  return lambda f: f() if condition else None


def emulate(monkeypatch):
  """Makes the kernels of a decoding step run lane by lane."""
  emulation = Emulation()
  for name, f in emulation.functions().items():
    for where in KERNELS:
      monkeypatch.setattr(where, name, f, raising=False)
  for where, name in (
    (small_batch_matmul, "_product"),
    (fused_decode_layer, "_fused_layer"),
    (decode_attention, "_attend"),
    (decode_eviction, "evict"),
  ):
    monkeypatch.setattr(where, name, getattr(where, name).__wrapped__)
  monkeypatch.setattr(small_batch_matmul.plgpu, "kernel", emulation.kernel)
  monkeypatch.setattr(jax.lax, "axis_index", lambda name: emulation.here.place[name])
  monkeypatch.setattr(jax.lax, "fori_loop", run_loop)
  monkeypatch.setattr(pl, "when", run_when)


@pytest.mark.parametrize("case", CASES)
def test_product_lane_by_lane(case, monkeypatch):
  x, matrix, options, expected = problem(case)
  emulate(monkeypatch)
  result = small_batch_matmul.product(x, matrix, **options)
  error = jnp.abs(result.astype(jnp.float32) - expected)
  assert jnp.max(error) <= (2e-5 if result.dtype == jnp.float32 else 2**-7) * jnp.max(
    jnp.abs(expected)
  )


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES)
def test_product(case):
  if not devices.can_run_portable():
    pytest.skip("needs an NVIDIA GPU since Ampere")
  x, matrix, options, expected = problem(case)
  result = small_batch_matmul.product(x, matrix, **options)
  assert jnp.max(jnp.abs(result.astype(jnp.float32) - expected)) <= 2**-7 * jnp.max(
    jnp.abs(expected)
  )
