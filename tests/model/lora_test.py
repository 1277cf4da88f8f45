"""Adapters: they begin as nothing, learn alone, cost no gradient of a matrix, and are merged into
what
  computes the same.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsek.config import DataConfig, OptimizerConfig, TrainConfig, TransformerConfig
from sparsek.errors import UsageError
from sparsek.generation import cache
from sparsek.huggingface import pretrained
from sparsek.model import flops, lora
from sparsek.model.transformer import Transformer, count_params, init_params
from sparsek.parallel.mesh import make_mesh, put_batch, replicated
from sparsek.runs.checkpoint import abstract_params
from sparsek.runs.parameter_table import parameter_shapes
from sparsek.training import plan
from sparsek.training.checks import check_adapters
from sparsek.training.loss import cut_targets
from sparsek.training.objective import summed_losses
from sparsek.training.optimizer import make_optimizer
from sparsek.training.step import TrainState, abstract_state, make_train_step
from tests.helpers import quick_jit

PLAIN = TransformerConfig(
  vocab_size=31,
  num_layers=2,
  embed_dim=12,
  num_heads=4,
  num_kv_heads=2,
  head_dim=4,
  mlp_dim=20,
  k=3,
  window=4,
  use_bias=True,
  out_bias=True,
  scorer_loss_queries=3,
)
LORA = dataclasses.replace(PLAIN, lora_rank=3, lora_alpha=4.5)
TEACHER = dataclasses.replace(PLAIN, attention="sliding_window", num_layers=1)
TRAIN = TrainConfig(
  workdir="",
  data=DataConfig(batch_size=2, seq_len=16),
  loss_chunk=8,
  scorer_loss=0.1,
  optimizer=OptimizerConfig(num_steps=10, warmup_steps=0, learning_rate=0.01),
)
TOKENS = np.random.default_rng(0).integers(0, 31, (2, 17)).astype(np.int32)
BATCH = {"tokens": TOKENS, "segment_ids": np.ones((2, 17), np.int32)}


def flat(tree):
  return {
    jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(leaf)
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
  }


def is_learned(path):
  return "lora_" in path or "scorer" in path


@functools.cache
def new_adapters(config):
  return lora.extend(
    config, init_params(lora.merged_config(config), jax.random.key(0)), jax.random.key(1)
  )


def trained_adapters(config):
  """Returns adapters as after training: B is not 0."""
  learned, frozen = lora.split(new_adapters(config))
  leaves, tree = jax.tree.flatten(learned)
  noise = [
    0.3 * jax.random.normal(key, leaf.shape)
    for key, leaf in zip(jax.random.split(jax.random.key(2), len(leaves)), leaves)
  ]
  return lora.join(
    jax.tree.unflatten(tree, [leaf + change for leaf, change in zip(leaves, noise)]), frozen
  )


@functools.cache
def apply(config):
  return quick_jit(Transformer(config).apply)


def logits(config, params):
  return apply(config)({"params": params}, TOKENS)


def test_new_adapters_change_nothing():
  adapters, base = (dataclasses.replace(config, num_layers=1) for config in (LORA, PLAIN))
  adapted, plain = (
    quick_jit(
      lambda params, config=config: (
        summed_losses(config, params, cut_targets(BATCH), 8).cross_entropy
      )
    )
    for config in (adapters, base)
  )
  params, new = init_params(base, jax.random.key(0)), new_adapters(adapters)
  assert adapted(new) == plain(params)
  assert adapted(trained_adapters(adapters)) != plain(params)
  jax.tree.map(np.testing.assert_array_equal, lora.merge(adapters, new), params)
  assert jax.tree.structure(new) == jax.tree.structure(abstract_params(adapters))


@pytest.mark.parametrize(
  "fields",
  [
    {"num_layers": 1},
    {"scan_layers": True},
    {"attention": "full", "mlp": "gelu", "num_kv_heads": 4},
  ],
)
def test_merged_weights_compute_the_same(fields):
  config = dataclasses.replace(LORA, **fields)
  params, plain = trained_adapters(config), lora.merged_config(config)
  merged = lora.merge(config, params)
  expected = logits(config, params)
  assert jax.tree.structure(merged) == jax.tree.structure(abstract_params(plain))
  np.testing.assert_allclose(logits(plain, merged), expected, atol=1e-5)
  assert np.abs(logits(plain, init_params(plain, jax.random.key(0))) - expected).max() > 0.1
  # Generation takes either.
  for some_config, some in ((config, params), (plain, merged)):
    generated, _ = cache.prefill(
      some_config, some, cache.init_cache(some_config, 2, max_length=17), TOKENS
    )
    np.testing.assert_allclose(generated, expected, atol=1e-5)


def test_export_writes_plain_matrices(tmp_path):
  config = dataclasses.replace(LORA, scan_layers=True)
  params = trained_adapters(config)
  pretrained.save(str(tmp_path / "model"), config, params)
  loaded_config, loaded = pretrained.load(str(tmp_path / "model"))
  assert (
    loaded_config.lora_rank == 0 and "lora" not in (tmp_path / "model" / "config.json").read_text()
  )
  np.testing.assert_allclose(logits(loaded_config, loaded), logits(config, params), atol=1e-5)


@pytest.mark.parametrize("scan_layers, trainable", [(False, "all"), (True, "attention")])
def test_only_adapters_and_scorers_learn(scan_layers, trainable):
  config = dataclasses.replace(LORA, scan_layers=scan_layers)
  train = dataclasses.replace(
    TRAIN,
    grad_accumulation=2,
    distill=0.5,
    distill_from="x",
    optimizer=dataclasses.replace(TRAIN.optimizer, trainable=trainable),
  )
  mesh, optimizer = make_mesh(), make_optimizer(train.optimizer)
  params = jax.tree.map(jnp.copy, new_adapters(config))  # the step donates them
  before = flat(params)
  state = TrainState(jnp.int32(0), params, optimizer.init(params), jnp.int32(0))
  state = jax.device_put(state, replicated(mesh))  # as the step returns it: one program for both
  assert (
    {path for path in before if is_learned(path)}
    == set(flat(state.opt_state[1].mu))
    == set(flat(state.opt_state[1].nu))
  )
  step = make_train_step(config, train, optimizer, mesh, TEACHER)
  teacher = jax.device_put(init_params(TEACHER, jax.random.key(5)), replicated(mesh))
  for _ in range(2):  # in the first, B = 0 keeps every A
    state, metrics = step(state, put_batch(mesh, BATCH), teacher)
  after = flat(state.params)
  changed = {path for path in before if not np.array_equal(before[path], after[path])}
  expected = {
    path for path in before if "lora_" in path and (trainable == "all" or "attention" in path)
  }
  assert expected | {path for path in before if path.endswith("scorer/linear/kernel")} <= changed
  assert (
    all(is_learned(path) for path in changed)
    and {path for path in changed if "lora_" in path} == expected
  )
  assert metrics["divergence"] > 0 and metrics["scorer_loss"] > 0
  assert step._cache_size() == 1


def test_what_an_attention_kind_adds_to_a_pretrained_model_learns():
  learned, frozen = map(
    parameter_shapes,
    lora.split(
      abstract_params(dataclasses.replace(LORA, attention=("linear", "sparsek"), scorer="conv"))
    ),
  )
  assert {path for path in learned if "lora_" not in path} == {
    path for path in learned | frozen if "decay" in path or "scorer" in path
  }
  assert (
    "layers_0/attention/decay/kernel" in learned
    and "layers_0/attention/query/bias" in frozen
    and "final_norm/scale" in frozen
  )


@pytest.mark.parametrize("scan_layers", [False, True])
def test_no_gradient_of_a_frozen_matrix_is_formed(scan_layers):
  """Nothing of the shape of a matrix leaves a product of the step."""
  matrices = {(12, 20), (20, 12), (12, 4, 4), (12, 2, 4), (4, 4, 12)}

  def produced(config):
    mesh, optimizer = make_mesh(), make_optimizer(TRAIN.optimizer)
    state = abstract_state(abstract_params(config), optimizer, mesh)
    jaxpr = jax.make_jaxpr(make_train_step(config, TRAIN, optimizer, mesh))(state, BATCH)
    products = (
      equation
      for inner in all_jaxprs(jaxpr.jaxpr)
      for equation in inner.eqns
      if equation.primitive.name in ("dot_general", "transpose")
    )
    return {product.outvars[0].aval.shape for product in products} & matrices

  assert produced(dataclasses.replace(PLAIN, scan_layers=scan_layers)) == matrices
  assert not produced(dataclasses.replace(LORA, scan_layers=scan_layers))


def all_jaxprs(jaxpr):
  yield jaxpr
  for equation in jaxpr.eqns:
    for value in jax.tree.leaves(
      equation.params, is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")
    ):
      if hasattr(value, "eqns") or hasattr(value, "jaxpr"):
        yield from all_jaxprs(getattr(value, "jaxpr", value))


def test_what_is_counted():
  params = abstract_params(LORA)
  matrices = sum(
    np.prod(leaf.shape)
    for path, leaf in jax.tree_util.tree_leaves_with_path(abstract_params(PLAIN))
    if path[-1].key in ("kernel", "embedding") and not any(key.key == "scorer" for key in path)
  )
  learned = flops.matrix_parameters(params) - matrices
  difference = flops.training_flops(LORA, params, np.array([16])) - flops.training_flops(
    PLAIN, abstract_params(PLAIN), np.array([16])
  )
  assert difference == 2 * 16 * (3 * (learned - 2 * 12 * 2) - matrices)  # scorers are in both
  found = plan.make_plan(LORA, TRAIN)
  assert (
    found.learned == count_params(lora.split(params)[0]) < found.parameters == count_params(params)
  )
  assert (
    f"{found.learned:,} of them learn" in found.lines()[0]
    and found.state_bytes < 4 * (found.parameters + 2 * found.learned) + 1000
  )
  # What does not fit for the moments of all parameters fits for those of adapters.
  large = TransformerConfig(embed_dim=1024, num_heads=32, mlp_dim=4096, attention="full")
  limit = 10 * count_params(abstract_params(large))
  assert (
    plan.remat_that_fits(large, TRAIN, limit) == "attention"
    and plan.remat_that_fits(dataclasses.replace(large, lora_rank=4), TRAIN, limit) == "none"
  )


@pytest.mark.parametrize(
  "fields, message",
  [
    ({"lora_rank": -1}, "lora_rank=-1 must be at least 0"),
    ({"lora_rank": 2, "lora_alpha": 0.0}, "lora_alpha=0.0 must be above 0"),
    ({"lora_alpha": 8.0}, "lora_alpha=8.0 must go with a lora_rank above 0"),
  ],
)
def test_bad_values(fields, message):
  with pytest.raises(ValueError, match=message):
    TransformerConfig(**fields)


def test_adapters_that_could_not_learn_are_refused():
  only_scorers = dataclasses.replace(TRAIN, optimizer=OptimizerConfig(trainable="scorer"))
  for train, words in (
    (only_scorers, "--trainable=scorer"),
    (
      dataclasses.replace(only_scorers, scorer_warmup=True),
      "--scorer_warmup and --trainable=scorer",
    ),
  ):
    with pytest.raises(UsageError, match=f"--lora_rank=3 and {words} exclude each other"):
      check_adapters(LORA, train, only_scorers)
    check_adapters(PLAIN, train)
    check_adapters(LORA, train, TRAIN)  # they learn in another stage
  with pytest.raises(UsageError, match="--lora_rank=13 must be at most 12"):
    plan.make_plan(dataclasses.replace(PLAIN, lora_rank=13), TRAIN)
