"""The Mosaic GPU kernels compiled for an H100 by the real compiler, without one; `make
test-compile` runs this where the compiler is installed.
"""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.interpreters import mlir
from jax.experimental.mosaic.gpu.fragmented_array import FragmentedArray
from jax.experimental.mosaic.gpu.layout_inference import ValueSite
from jax.sharding import Mesh, PartitionSpec, SingleDeviceSharding
from jaxlib import xla_client
from jaxlib.mlir import ir

import sparsek
from sparsek.attention.prefix_selection import select
from sparsek.attention.ranking_loss import ranking_loss
from sparsek.attention.scorer_loss import attention_mass_loss
from sparsek.config import DataConfig, TrainConfig, preset
from sparsek.generation import cache
from sparsek.generation.inference import inference_params
from sparsek.kernels import devices
from sparsek.kernels.hopper import attention as hopper_attention
from sparsek.kernels.rms_norm import branched_rms_norm
from sparsek.kernels.specs import Spec
from sparsek.model.head_groups import selecting_attention
from sparsek.parallel import sequence_parallel
from sparsek.parallel.collectives import collectives
from sparsek.parallel.mesh import CONTEXT, ROWS, make_mesh
from sparsek.parallel.topology import described_devices, parse
from sparsek.runs.checkpoint import abstract_params
from sparsek.training import plan
from sparsek.training.compilation import kernel_programs
from sparsek.training.optimizer import make_optimizer
from sparsek.training.step import abstract_state, make_train_step
from tests.kernels.decoding_steps import compiled_steps

try:
  import jax_plugins.xla_cuda13  # noqa: F401  registers the compiler
except ImportError:
  pytestmark = pytest.mark.skip(
    reason="needs the CUDA compiler of JAX: make test-compile installs it"
  )


@pytest.fixture(autouse=True)
def signs_kept(monkeypatch):
  """Fails where an integer `where` chooses one number for all lanes before an array: JAX 0.11 and
  0.12 then take its sign from the condition, which has none, and comparisons go wrong.
  """
  select = FragmentedArray.select

  def checked(self, on_true, on_false):
    out = select(self, on_true, on_false)
    assert out.is_signed == on_true.is_signed, (
      "an integer `where` chooses a number before an array: write it the other way round"
    )
    return out

  monkeypatch.setattr(FragmentedArray, "select", checked)


@functools.cache
def h100s(count=1):
  """Returns devices to compile for."""
  return described_devices(parse(f"h100:{count}"))


def h100():
  return h100s()[0]


@pytest.fixture(autouse=True)
def kernels_of_an_h100():
  with devices.compiling_for(h100()):
    yield


def shape_of(dtype, *dims):
  return jax.ShapeDtypeStruct(dims, dtype, sharding=SingleDeviceSharding(h100()))


def compile_for_h100(function, *shapes):
  """Returns the executable; overflow of shared memory and impossible layouts are errors."""
  shapes = [
    jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=SingleDeviceSharding(h100())) for x in shapes
  ]
  return jax.jit(function).lower(*shapes).compile()


def attention_and_gradients(
  query, key, value, scores, threshold, expiry, order, start, end, cotangent, *, spec, gate
):
  attend = functools.partial(
    hopper_attention.attention,
    expiry=expiry,
    order=order,
    start=start,
    end=end,
    k=spec.k,
    window=spec.window,
    gate=gate,
    scale=spec.head_dim**-0.5,
  )
  out, vjp = jax.vjp(
    lambda query, key, value, scores, threshold: attend(query, key, value, scores, threshold),
    query,
    key,
    value,
    scores,
    threshold,
  )
  return out, vjp(cotangent)


def arguments(spec):
  shape = lambda dtype, *dims: jax.ShapeDtypeStruct((spec.batch, *dims), dtype)
  queries = shape(spec.dtype, spec.n, spec.heads, spec.head_dim)
  keys = shape(spec.dtype, spec.n, spec.groups, spec.head_dim)
  floats, integers, bounds = (
    shape(dtype, *dims)
    for dtype, dims in (
      (jnp.float32, (spec.groups, spec.n)),
      (jnp.int32, (spec.groups, spec.n)),
      (jnp.int32, (spec.n,)),
    )
  )
  return queries, keys, keys, floats, floats, integers, integers, bounds, bounds, queries


@pytest.mark.parametrize(
  "spec, gate",
  [
    pytest.param(spec, gate, id=f"{spec.name}-{gate}")
    for spec, gate in (
      (
        Spec(
          "headline",
          n=32768,
          heads=16,
          groups=16,
          head_dim=128,
          k=512,
          window=512,
          dtype="bfloat16",
        ),
        "straight_through",
      ),
      (
        Spec(
          "grouped", n=32768, heads=32, groups=8, head_dim=128, k=512, window=512, dtype="float16"
        ),
        "value",
      ),
      (
        Spec(
          "narrow", n=8192, heads=16, groups=16, head_dim=64, k=512, window=512, dtype="bfloat16"
        ),
        "key_value",
      ),
      (
        Spec(
          "large_budget",
          n=8192,
          heads=4,
          groups=2,
          head_dim=128,
          k=4096,
          window=1000,
          dtype="bfloat16",
        ),
        "key_value",
      ),
      (
        Spec("wide", n=32768, heads=8, groups=8, head_dim=256, k=512, window=512, dtype="bfloat16"),
        "straight_through",
      ),
      (
        Spec(
          "wide_grouped", n=5000, heads=6, groups=2, head_dim=200, k=9, window=0, dtype="float16"
        ),
        "key_value",
      ),
      (
        Spec("one_token", n=1, heads=2, groups=1, head_dim=16, k=1, window=1, dtype="bfloat16"),
        "value",
      ),
      (
        Spec("window_0", n=5000, heads=4, groups=2, head_dim=40, k=1, window=0, dtype="bfloat16"),
        "value",
      ),
    )
  ],
)
def test_compiles(spec, gate):
  compiled = compile_for_h100(
    functools.partial(attention_and_gradients, spec=spec, gate=gate), *arguments(spec)
  )
  print(
    f"{spec.name} {gate}: "
    f"{compiled.memory_analysis().temp_size_in_bytes / 2**20:.0f} MiB of temporary memory"
  )


def test_more_than_2_to_the_31_elements_and_linear_memory():
  spec = lambda n: Spec(
    "long", n=n, heads=32, groups=8, head_dim=128, k=512, window=512, dtype="bfloat16"
  )

  def temporary(n):
    compiled = compile_for_h100(
      functools.partial(attention_and_gradients, spec=spec(n), gate="straight_through"),
      *arguments(spec(n)),
    )
    return compiled.memory_analysis().temp_size_in_bytes

  assert 2**20 * 32 * 128 > 2**31
  assert temporary(2**20) < 4.5 * temporary(2**18)


@pytest.mark.parametrize(
  "n, window, head_dim", [(5000, 1024, 64), (32768, 32768, 128), (5000, 1024, 256)]
)
def test_sliding_window_compiles(n, window, head_dim):
  """Full attention is a window as long as the row."""
  spec = Spec(
    "window", n=n, heads=12, groups=12, head_dim=head_dim, k=0, window=window, dtype="bfloat16"
  )
  compile_for_h100(
    functools.partial(attention_and_gradients, spec=spec, gate="straight_through"), *arguments(spec)
  )


@pytest.mark.parametrize("width", [256, 1536])
def test_norms_compile(width):
  def gradients(x, scale, cotangents):
    norm = functools.partial(branched_rms_norm, epsilon=1e-6)
    return jax.vmap(lambda x, cotangents: jax.vjp(norm, x, scale)[1](cotangents))(x, cotangents)

  x = jax.ShapeDtypeStruct((2, 3, 1000, width), jnp.bfloat16)
  scale = jax.ShapeDtypeStruct((width,), jnp.float32)
  arguments = [
    jax.tree.map(
      lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=SingleDeviceSharding(h100())), a
    )
    for a in (x, scale, (x, x))
  ]
  text = jax.jit(gradients).lower(*arguments).compile().as_text()
  assert "sparsek_rms_norm_gradients" in text


def test_axes_of_a_mesh_may_be_called_anything():
  """JAX takes an axis of the mesh for an axis of the grid of the same name: a kernel that asked for
  the index of its device would not compile.
  """
  spec = Spec("sharded", n=200, heads=2, groups=1, head_dim=64, k=3, window=9, dtype="bfloat16")
  names = ("batch", "head", "block", "program", "row", "extra", "warpgroup")
  mesh = Mesh(np.reshape(h100(), (1,) * len(names)), names)

  def run(query, key, value, scores, bounds, cotangent):
    def attend(query, key, value, scores):
      selection = select(scores, bounds, bounds, spec.k, spec.window, True, devices.SUPPORTED)
      return hopper_attention.attention(
        query,
        key,
        value,
        scores,
        *selection,
        bounds,
        bounds,
        k=spec.k,
        window=spec.window,
        gate="value",
        scale=1.0,
      )

    out, vjp = jax.vjp(attend, query, key, value, scores)
    return out, vjp(cotangent)

  query, key, value, scores, *_, bounds, cotangent = arguments(spec)
  part = PartitionSpec("batch")
  compile_for_h100(
    jax.shard_map(run, mesh=mesh, in_specs=part, out_specs=part, check_vma=False),
    query,
    key,
    value,
    scores,
    bounds,
    cotangent,
  )


@pytest.mark.parametrize("n, k", [(1, 1), (200, 3), (131072, 512)])
def test_selection_compiles(n, k):
  """Thresholds, expiry and their VJP, by the kernels of single threads. With a single token many
  values are constants, which the compiler must accept.
  """
  scores, bounds = (
    jax.ShapeDtypeStruct((2, 8, n), jnp.float32),
    jax.ShapeDtypeStruct((2, n), jnp.int32),
  )

  def run(scores, start, end, cotangent):
    def thresholds(scores):
      threshold, expiry, order = select(scores, start, end, k, k, True, devices.SUPPORTED)
      return threshold, (expiry, order)

    threshold, vjp, rest = jax.vjp(thresholds, scores, has_aux=True)
    return threshold, rest, vjp(cotangent)

  compile_for_h100(run, scores, bounds, bounds, scores)


def test_what_kernels_write_in_place_is_kept_in_a_scan():
  """XLA may fuse kernels with the slices of a scan's stacks, but must not fuse those that write in
  place: such a fusion does not know that.
  """
  queries, keys, _, scores, *_ = arguments(
    Spec("scanned", n=1024, heads=2, groups=2, head_dim=64, k=64, window=64, dtype="bfloat16")
  )

  def loss(query, key, scores, scales):
    attend = lambda x, scale: (
      sparsek.sparsek_attention(
        x, key, key * scale, scores * scale, k=64, window=64, implementation="mosaic_gpu"
      ),
      None,
    )
    return jnp.sum(jax.lax.scan(attend, query, scales)[0].astype(jnp.float32))

  by_token = jax.ShapeDtypeStruct((scores.shape[0], scores.shape[2], scores.shape[1]), jnp.float32)
  compiled = compile_for_h100(
    jax.grad(loss, argnums=(0, 1, 2, 3)),
    queries,
    keys,
    by_token,
    jax.ShapeDtypeStruct((3,), jnp.bfloat16),
  ).as_text()
  inside = re.findall(r"^%dynamic-slice-fusion.*?^}", compiled, re.MULTILINE | re.DOTALL)
  assert "sparsek_sum_rows" in compiled and not any(
    "output_to_operand_aliasing" in fusion for fusion in inside
  )


def test_heads_of_their_own_k_and_window_compile():
  """Compiles a head that is alone, and the heads on either side of it."""
  term = "sparsek:k16:w512:h1:k1040"
  layer = preset("1b", num_kv_heads=4, num_heads=16, attention=term).layer_configs[0]
  shape = lambda dtype, *dims: jax.ShapeDtypeStruct((1, 8192, *dims), dtype)
  query, keys = shape("bfloat16", 16, 64), shape("bfloat16", 4, 64)

  def run(ids, cotangent, *inputs):
    out, vjp = jax.vjp(lambda *inputs: selecting_attention(layer, *inputs, ids), *inputs)
    return out, *vjp(cotangent)

  compiled = compile_for_h100(run, shape("int32"), query, query, keys, keys, shape("float32", 4))
  assert compiled.as_text().count("sparsek_forward") >= 2


@pytest.mark.parametrize("kind", ("sparsek", "sliding_window", "full"))
def test_attention_of_sharded_rows_compiles(kind):
  """Eight shards of a row of 131072 tokens receive what the formula of the design says."""
  n, groups, dim, shards = 131072, 8, 128, 8
  mesh = make_mesh(context=shards, devices=h100s(8))
  attend = {
    "sparsek": functools.partial(sequence_parallel.sparsek_attention, k=512, window=512),
    "sliding_window": lambda query, key, value, scores, **options: (
      sequence_parallel.sliding_window_attention(query, key, value, window=1024, **options)
    ),
    "full": lambda query, key, value, scores, **options: sequence_parallel.full_attention(
      query, key, value, **options
    ),
  }[kind]
  part = PartitionSpec(ROWS, CONTEXT)

  def run(ids, cotangent, *inputs):
    out, vjp = jax.vjp(
      functools.partial(attend, segment_ids=ids, implementation="mosaic_gpu"), *inputs
    )
    return out, *vjp(cotangent)

  shape = lambda dtype, *dims: jax.ShapeDtypeStruct((1, n, *dims), dtype)
  query, keys = shape("bfloat16", 16, dim), shape("bfloat16", groups, dim)
  arrays = query, query, keys, keys, shape("float32", groups)
  in_specs = (PartitionSpec(ROWS), *(part,) * len(arrays))
  sharded = jax.shard_map(run, mesh=mesh, in_specs=in_specs, out_specs=part, check_vma=False)
  program = jax.jit(sharded).lower(shape("int32"), *arrays).compile().as_text()
  traffic = collectives(program)
  print(kind, traffic)
  rows = {"sparsek": (shards - 1) * 512 + 511, "sliding_window": 1023, "full": n * 7 // 8}[kind]
  formula = rows * 2 * groups * dim * 2
  if kind == "sparsek":
    formula += 7 / 8 * 12 * n // shards * groups + 4 * shards * 512 * groups
  assert sum(each.received for each in traffic.values()) < 2 * 1.05 * formula


def scorer_loss(scores, query, key, queries, **options):
  return jax.value_and_grad(functools.partial(attention_mass_loss, **options))(
    scores, query, key, queries
  )


@pytest.mark.parametrize(
  "n, queries, heads, groups, head_dim, dtype",
  [
    (32768, 128, 12, 12, 64, "bfloat16"),
    (5000, 100, 8, 2, 128, "float16"),
    (5000, 100, 4, 2, 256, "bfloat16"),
    (1, 1, 2, 1, 16, "bfloat16"),
  ],
)
def test_scorer_loss_compiles(n, queries, heads, groups, head_dim, dtype):
  shape = lambda dtype, *dims: jax.ShapeDtypeStruct((2, *dims), dtype)
  compiled = compile_for_h100(
    functools.partial(scorer_loss, window=512, implementation="mosaic_gpu"),
    shape("float32", n, groups),
    shape(dtype, n, heads, head_dim),
    shape(dtype, n, groups, head_dim),
    shape("int32", queries),
  )
  assert "sparsek_scorer_loss_gradients" in compiled.as_text()
  padded = 2 * 2 * n * groups * (128 if head_dim % 64 else head_dim)
  assert compiled.memory_analysis().temp_size_in_bytes < padded + 2**23


@pytest.mark.parametrize(
  "n, queries, heads, groups, head_dim, dtype",
  [(32768, 128, 12, 12, 64, "bfloat16"), (5000, 100, 4, 2, 256, "float16")],
)
def test_ranking_loss_compiles(n, queries, heads, groups, head_dim, dtype):
  """No array of all pairs of queries and tokens exists: at 32768 tokens it would take more."""
  shape = lambda dtype, *dims: jax.ShapeDtypeStruct((1, *dims), dtype)
  loss = functools.partial(ranking_loss, k=512, window=512, implementation="mosaic_gpu")
  compiled = compile_for_h100(
    jax.value_and_grad(loss),
    shape("float32", n, groups),
    shape(dtype, n, heads, head_dim),
    shape(dtype, n, groups, head_dim),
    shape("int32", queries),
  )
  assert "sparsek_scorer_loss_targets" in compiled.as_text()
  tokens = n * groups
  sorted_twice, keys = 2 * 2 * 8 * tokens, 2 * tokens * head_dim
  assert compiled.memory_analysis().temp_size_in_bytes < sorted_twice + keys + 2**23


def test_values_keep_their_names(monkeypatch):
  """Heads of operations are printed alone: with the names that JAX would give them."""
  check, names = ValueSite.__post_init__, set()

  def compared(value):
    check(value)
    if isinstance(value.operation, ir.OpView):  # not made for printing
      names.add(str(value))
      assert str(value).startswith(re.match(r"(%\d+ = )?\S+", str(value.operation))[0])

  monkeypatch.setattr(ValueSite, "__post_init__", compared)
  scores, query = shape_of(jnp.float32, 1, 512, 1), shape_of(jnp.bfloat16, 1, 512, 1, 64)
  jax.jit(functools.partial(scorer_loss, window=64, implementation="mosaic_gpu")).lower(
    scores, query, query, shape_of(jnp.int32, 1, 128)
  )
  assert len(names) > 20


def test_scorer_loss_of_sharded_rows_compiles():
  """Shards exchange a few numbers a query, and no keys."""
  n, shards, part = 131072, 8, PartitionSpec(ROWS, CONTEXT)
  mesh = make_mesh(context=shards, devices=h100s(8))

  def run(ids, queries, *arrays):
    total, gradient = scorer_loss(
      *arrays, queries, window=512, segment_ids=ids, axis=CONTEXT, implementation="mosaic_gpu"
    )
    return total[None], gradient

  whole = PartitionSpec(ROWS)
  sharded = jax.shard_map(
    run,
    mesh=mesh,
    in_specs=(whole, whole, part, part, part),
    out_specs=(whole, part),
    check_vma=False,
  )
  shape = lambda dtype, *dims: jax.ShapeDtypeStruct((1, *dims), dtype)
  arrays = shape("float32", n, 8), shape("bfloat16", n, 16, 128), shape("bfloat16", n, 8, 128)
  program = jax.jit(sharded).lower(shape("int32", n), shape("int32", 128), *arrays).compile()
  assert sum(each.received for each in collectives(program.as_text()).values()) < 2**21


@pytest.mark.parametrize(
  "name, n, remat",
  [("gpt2_small", 262144, "attention"), ("gpt2_small", 32768, "none"), ("mini", 65536, "none")],
)
def test_training_step_fits(name, n, remat):
  """Compiles a whole optimizer step with the kernels inside; by default JAX takes three quarters of
  the device's 80 GB.
  """
  config, mesh = (
    preset(name, remat=remat, implementation="mosaic_gpu"),
    make_mesh(devices=[h100()]),
  )
  train = TrainConfig(workdir="", data=DataConfig(seq_len=n, batch_size=1, segment_documents=False))
  optimizer = make_optimizer(train.optimizer)
  state = abstract_state(abstract_params(config), optimizer, mesh)
  batch = {
    name: jax.ShapeDtypeStruct((1, n + 1), jnp.int32, sharding=SingleDeviceSharding(h100()))
    for name in ("tokens", "segment_ids")
  }
  lowered = make_train_step(config, train, optimizer, mesh).lower(state, batch)
  if remat == "none":
    compile_one_by_one(kernel_programs(lowered.as_text()))
  memory = lowered.compile().memory_analysis()
  gigabytes = (memory.argument_size_in_bytes + memory.temp_size_in_bytes) / 1e9
  print(f"{name}, {n} tokens, remat {remat}: {gigabytes:.1f} GB")
  assert gigabytes < 0.75 * 80
  if remat == "none":
    assert (
      plan.remat_that_fits(config, train, 1.3e9 * gigabytes) == "none"
      and plan.remat_that_fits(config, train, 0.9e9 * gigabytes) == "attention"
    )


def compile_one_by_one(programs):
  """Compiles the kernels of a step as `start_compiling_kernels` does, but for an absent device."""
  assert 10 < len(programs) < 40  # layers with equal settings share kernels
  client = h100().client
  for program in programs:
    with mlir.make_ir_context():
      module = ir.Module.parse(program)
    client.compile(module, executable_devices=xla_client.DeviceList((h100(),)))


def test_a_chunk_of_a_prompt_compiles():
  """Compiles the step after a cache of earlier tokens, with the kernels inside."""
  config = preset("1b", num_layers=1, k=512, window=512, implementation="mosaic_gpu")
  params = jax.eval_shape(functools.partial(inference_params, config), abstract_params(config))
  shape = lambda dtype, *dims: jax.ShapeDtypeStruct(dims, dtype)
  empty = jax.eval_shape(lambda: cache.init_cache(config, 1))
  arguments = (
    params,
    empty,
    shape(jnp.int32, 1, 8192),
    shape(jnp.int32, 1),
    shape(jnp.float32, 1, config.vocab_size),
  )
  arguments = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=SingleDeviceSharding(h100())),
    arguments,
  )
  compiled = cache._feed.lower(config, False, True, None, *arguments).compile()
  assert compiled.memory_analysis().temp_size_in_bytes < 2**30


@pytest.mark.parametrize(
  "attention, batch, kernels",
  [
    ("sparsek", 1, 2),
    ("sparsek", 4, 2),
    ("sparsek", 8, 5),
    ("sparsek", 64, 10),
    ("full", 1, 2),
    ("sliding_window:w256,sparsek:k256:w128,sparsek:k1280:w512", 1, 2),
  ],
)
def test_decoding_steps_compile(attention, batch, kernels):
  """A layer takes few kernels, and the caches are written in place."""
  config = preset("1b", num_layers=3, k=512, window=512, vocab_size=32768, attention=attention)
  compiled = compiled_steps(config, batch, h100())
  step = max(
    re.findall(r"^%?[\w.\-]+ .*?\{\n(.*?)^\}", compiled.as_text(), re.MULTILINE | re.DOTALL),
    key=lambda body: body.count("sparsek_attend"),
  )
  launched = re.findall(
    r" = (?:\(.*?\)|\S+) (?:fusion|custom-call|copy|fusion-start|copy-start)\(", step
  )
  assert step.count("sparsek_attend") >= 3 and len(launched) <= 3 * kernels + 17
  assert not re.search(rf" = \w+\[{batch},8,\d+(,64)?\]\S* copy", step)
