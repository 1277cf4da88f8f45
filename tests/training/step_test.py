"""The compiled step: the loss is the mean over all counted targets however the batch is split."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsek.attention.documents import position_in_document
from sparsek.attention.ranking_loss import ranking_loss
from sparsek.config import DataConfig, OptimizerConfig, TrainConfig, TransformerConfig
from sparsek.evaluation.loss_by_position import evaluate
from sparsek.model.layers import rotary_embedding
from sparsek.model.scorers import scoring_network
from sparsek.model.transformer import Transformer, init_params, unstack_layers
from sparsek.parallel.mesh import make_mesh, put_batch, replicated
from sparsek.runs import checkpoint
from sparsek.training import spikes
from sparsek.training.loss import cut_targets, next_token_targets
from sparsek.training.objective import Teacher, summed_losses, token_losses
from sparsek.training.optimizer import make_optimizer
from sparsek.training.step import (
  TrainState,
  abstract_state,
  make_diagnose,
  make_eval_step,
  make_objective,
  make_train_step,
)
from tests.helpers import quick_jit

CONFIG = TransformerConfig(
  vocab_size=19,
  num_layers=1,
  embed_dim=8,
  num_heads=2,
  num_kv_heads=1,
  head_dim=4,
  mlp_dim=8,
  attention="full",
)
TRAIN = TrainConfig(
  workdir="",
  data=DataConfig(batch_size=4, seq_len=12),
  loss_chunk=7,
  optimizer=OptimizerConfig(num_steps=10, warmup_steps=2, weight_decay=0.1, grad_clip=0.1),
)


def example_batch():
  """Rows with very different numbers of counted targets, so that a mean of means would show."""
  rng = np.random.default_rng(0)
  segment_ids = np.ones((4, 13), np.int32)
  segment_ids[0, 3:] = 0
  segment_ids[1, 5:] = 2
  segment_ids[2] = np.arange(13) + 1
  return {"tokens": rng.integers(0, 19, (4, 13)).astype(np.int32), "segment_ids": segment_ids}


def one_step(train=TRAIN, config=CONFIG, **extra):
  mesh, optimizer = make_mesh(), make_optimizer(train.optimizer)
  params = jax.device_put(init_params(config, jax.random.key(0)), replicated(mesh))
  state = TrainState(jnp.int32(0), params, optimizer.init(params))
  state, metrics = make_train_step(config, train, optimizer, mesh)(
    state, put_batch(mesh, {**example_batch(), **extra})
  )
  return state, {key: float(value) for key, value in metrics.items()}


def test_loss_is_the_mean_over_counted_targets():
  batch = example_batch()
  params = init_params(CONFIG, jax.random.key(0))
  logits = quick_jit(Transformer(CONFIG).apply)(
    {"params": params}, batch["tokens"][:, :-1], batch["segment_ids"][:, :-1]
  )
  losses = -np.take_along_axis(
    np.asarray(jax.nn.log_softmax(logits)), batch["tokens"][:, 1:, None], axis=-1
  )[..., 0]
  counted = (batch["segment_ids"][:, 1:] == batch["segment_ids"][:, :-1]) & (
    batch["segment_ids"][:, 1:] > 0
  )
  state, metrics = one_step()
  np.testing.assert_allclose(metrics["loss"], losses[counted].mean(), rtol=1e-5)
  assert metrics["num_targets"] == counted.sum() and int(state.step) == 1
  np.testing.assert_allclose(metrics["learning_rate"], TRAIN.optimizer.learning_rate / 2, rtol=1e-6)
  eval_step = make_eval_step(CONFIG, 5, make_mesh())
  documents = np.tile(np.arange(13, dtype=np.int32), (4, 1))  # in one segment, where not told apart
  arrays = put_batch(make_mesh(), {**batch, "documents": documents})
  found, of_targets = eval_step(params, arrays)
  np.testing.assert_allclose(found, np.where(counted, losses, 0), rtol=1e-4, atol=1e-6)
  np.testing.assert_array_equal(of_targets, np.where(counted, documents[:, 1:], -1))


def test_the_loss_counts_what_a_batch_marks():
  """In training and in evaluation."""
  batch, params = example_batch(), init_params(CONFIG, jax.random.key(0))
  counted = np.zeros((4, 13), bool)
  counted[3, 9:] = True
  losses_of = quick_jit(lambda batch: token_losses(CONFIG, params, cut_targets(batch), 7))
  losses = losses_of(batch)[3, 8:]
  metrics = one_step(dataclasses.replace(TRAIN, grad_accumulation=2), counted=counted)[1]
  assert metrics["num_targets"] == 4 and metrics["loss"] == pytest.approx(
    float(losses.mean()), rel=1e-5
  )
  marked = {**batch, "counted": counted, "documents": batch["segment_ids"]}
  result = evaluate(CONFIG, params, [marked], (0, 12))
  assert result.num_targets == 4 and result.loss == pytest.approx(float(losses.mean()), rel=1e-5)


@pytest.mark.parametrize("spike_factor", [0.0, 2.0])
def test_a_step_that_is_not_applied_says_the_loss_and_leaves_the_state(spike_factor):
  """The same program serves both kinds of steps."""
  train = dataclasses.replace(TRAIN, spike_factor=spike_factor)
  mesh, optimizer = make_mesh(), make_optimizer(TRAIN.optimizer)
  params, batch = init_params(CONFIG, jax.random.key(0)), put_batch(mesh, example_batch())
  state = TrainState(
    jnp.int32(3), params, optimizer.init(params), jnp.int32(0), spikes.start(spike_factor)
  )
  state = jax.device_put(state, replicated(mesh))
  yes, no = jax.device_put((jnp.bool_(True), jnp.bool_(False)), replicated(mesh))
  before, step = jax.device_get(state), make_train_step(CONFIG, train, optimizer, mesh)
  state, tried = step(state, batch, apply=no)
  jax.tree.map(np.testing.assert_array_equal, state, before)
  state, made = step(state, batch, apply=yes)
  assert tried == made and int(state.step) == 4 and step._cache_size() == 1
  assert not np.array_equal(state.params["embed"]["embedding"], before.params["embed"]["embedding"])


def test_only_the_trainable_parameters_change():
  train = dataclasses.replace(
    TRAIN, optimizer=dataclasses.replace(TRAIN.optimizer, trainable="attention")
  )
  mesh, optimizer, params = (
    make_mesh(),
    make_optimizer(train.optimizer),
    init_params(CONFIG, jax.random.key(0)),
  )
  # as if a run that trained everything went on
  opt_state = jax.tree.map(lambda leaf: leaf + 1, optimizer.init(params))
  before = jax.device_get(params)
  state, metrics = make_train_step(CONFIG, train, optimizer, mesh)(
    TrainState(jnp.int32(0), params, opt_state), put_batch(mesh, example_batch())
  )
  assert metrics["grad_norm"] > 0
  for (path, new), old in zip(
    jax.tree_util.tree_leaves_with_path(state.params), jax.tree.leaves(before)
  ):
    path = jax.tree_util.keystr(path)
    assert np.array_equal(new, old) == ("['attention']" not in path), path


def test_rows_of_one_document_need_no_segment_ids():
  """Padding comes last and is not counted; segment ids matter where documents share a row."""
  mesh, batch, params = make_mesh(), example_batch(), init_params(CONFIG, jax.random.key(0))
  batch["documents"] = batch["segment_ids"]
  steps = {packed: make_eval_step(CONFIG, 5, mesh, packed) for packed in (True, False)}
  one, several = (
    {name: np.repeat(x[row : row + 1], 4, axis=0) for name, x in batch.items()} for row in (0, 1)
  )

  def sums(rows):
    rows = put_batch(mesh, rows)
    return {packed: float(np.sum(step(params, rows)[0])) for packed, step in steps.items()}

  apart = sums(one)
  assert apart[True] == pytest.approx(apart[False], rel=1e-6)
  together = sums(several)
  assert together[True] != pytest.approx(together[False], rel=1e-4)


def test_accumulation_equals_one_big_batch():
  state, metrics = one_step()
  accumulated_state, accumulated = one_step(dataclasses.replace(TRAIN, grad_accumulation=4))
  for key, value in metrics.items():
    np.testing.assert_allclose(accumulated[key], value, rtol=1e-5, err_msg=key)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6),
    accumulated_state.params,
    state.params,
  )


SELECTING = dataclasses.replace(
  CONFIG, attention="sparsek", k=2, window=2, implementation="reference"
)


def test_noise_on_the_scores_derives_from_the_step_and_ends_with_training():
  config = dataclasses.replace(SELECTING, scorer_noise=2.0)
  mesh, optimizer, batch = make_mesh(), make_optimizer(TRAIN.optimizer), example_batch()
  step, params = (
    make_train_step(config, TRAIN, optimizer, mesh),
    init_params(config, jax.random.key(0)),
  )

  def loss_at(number):
    copy = jax.device_put(jax.tree.map(jnp.copy, params), replicated(mesh))
    return float(
      step(TrainState(jnp.int32(number), copy, optimizer.init(copy)), put_batch(mesh, batch))[1][
        "loss"
      ]
    )

  losses = [loss_at(number) for number in (0, 1, 0, 1)]
  assert losses[:2] == losses[2:] and losses[0] != losses[1]
  heldout, same = (
    make_eval_step(c, 5, mesh)
    .lower(params, put_batch(mesh, {**batch, "documents": batch["segment_ids"]}))
    .as_text()
    for c in (config, SELECTING)
  )
  assert heldout == same


def test_gates_that_become_hard_begin_as_those_of_value_and_end_as_hard_ones():
  config = dataclasses.replace(SELECTING, k=2, window=2)
  params, rows = init_params(config, jax.random.key(0)), cut_targets(example_batch())

  def losses(gate="straight_through", begin=0, **change):
    """Returns the losses before the first step of a stage and after its last."""
    train = dataclasses.replace(TRAIN, scorer_loss=0.0, **change)
    objective = make_objective(dataclasses.replace(config, gate=gate), train, None, begin)
    at = quick_jit(lambda step: objective(params, {}, None, rows, (0, step), 20)[1]["loss"])
    return float(at(begin)), float(at(begin + 10))

  (soft, _), (hard, _), (begin, end) = losses("value"), losses(), losses(begin=5, gate_anneal=1e6)
  assert abs(soft - hard) > 1e-4
  assert begin == pytest.approx(soft, rel=1e-6) and end == pytest.approx(hard, rel=1e-5)


def test_seeds_share_a_program_and_draw_other_numbers():
  config, batch = dataclasses.replace(SELECTING, scorer_noise=2.0), example_batch()
  mesh, optimizer = make_mesh(), make_optimizer(TRAIN.optimizer)
  steps = [
    make_train_step(config, dataclasses.replace(TRAIN, seed=seed), optimizer, mesh)
    for seed in (0, 1)
  ]
  state = abstract_state(init_params(config, jax.random.key(0)), optimizer, mesh)
  first, second = (step.lower(state, put_batch(mesh, batch)).as_text() for step in steps)
  assert first == second

  def loss_of(seed):
    params = init_params(config, jax.random.key(0))
    return float(
      steps[0](
        TrainState(jnp.int32(0), params, optimizer.init(params), jnp.int32(seed)),
        put_batch(mesh, batch),
      )[1]["loss"]
    )

  assert loss_of(0) == loss_of(0) != loss_of(1)


def test_auxiliary_loss_of_scorers_is_a_mean_over_rows_beside_the_loss():
  (_, plain), (_, with_it), (_, accumulated) = (
    one_step(dataclasses.replace(TRAIN, **change), SELECTING)
    for change in (
      dict(scorer_loss=0.0),
      dict(scorer_loss=3.0),
      dict(scorer_loss=3.0, grad_accumulation=4),
    )
  )
  assert (
    plain["loss"] == pytest.approx(with_it["loss"], rel=1e-6)
    and plain["grad_norm"] < 0.99 * with_it["grad_norm"]
    and 0 < with_it["scorer_loss"] < 1
  )
  assert accumulated == pytest.approx(with_it, rel=1e-5)


@pytest.mark.parametrize("change", [dict(attention="sliding_window"), dict(scorer="random")])
def test_no_auxiliary_loss_where_no_scorer_learns(change):
  metrics = one_step(TRAIN, dataclasses.replace(SELECTING, **change))[1]
  assert TRAIN.scorer_loss > 0 and "scorer_loss" not in metrics


def test_queries_of_the_scorers_loss_derive_from_the_step():
  train = dataclasses.replace(TRAIN, scorer_loss=1.0)
  mesh, optimizer, config = (
    make_mesh(),
    make_optimizer(train.optimizer),
    dataclasses.replace(SELECTING, scorer_loss_queries=3),
  )
  step, params = (
    make_train_step(config, train, optimizer, mesh),
    init_params(config, jax.random.key(0)),
  )

  def loss_at(number):
    copy = jax.device_put(jax.tree.map(jnp.copy, params), replicated(mesh))
    return float(
      step(
        TrainState(jnp.int32(number), copy, optimizer.init(copy)), put_batch(mesh, example_batch())
      )[1]["scorer_loss"]
    )

  losses = [loss_at(number) for number in (0, 1, 0, 1)]
  assert losses[:2] == losses[2:] and losses[0] != losses[1]


def test_warm_up_of_scorers_is_that_of_the_dense_model_and_costs_a_forward_pass():
  train = dataclasses.replace(
    TRAIN,
    scorer_loss=2.0,
    scorer_warmup=True,
    optimizer=dataclasses.replace(TRAIN.optimizer, trainable="scorer"),
  )
  config = dataclasses.replace(SELECTING, num_layers=2, scorer_loss_kind="ranking")
  batch = example_batch()
  params = init_params(config, jax.random.key(0))

  def expected_losses(params):
    _, seen = Transformer(dataclasses.replace(config, attention="full")).apply(
      {"params": params},
      batch["tokens"][:, :-1],
      batch["segment_ids"][:, :-1],
      method="hidden",
      mutable=["intermediates", "diagnostics"],
      capture_intermediates=lambda module, method: (
        module.name in ("attention_norm", "query", "key")
      ),
    )
    for i in range(2):
      layer = seen["intermediates"][f"layers_{i}"]
      ((_, x),), (query,), (key,) = (
        layer["attention_norm"]["branch"],
        *(layer["attention"][name]["__call__"] for name in ("query", "key")),
      )
      ids = batch["segment_ids"][:, :-1]
      positions = position_in_document(ids, *x.shape[:2])
      query, key = (rotary_embedding(x, positions, config.rope_theta) for x in (query, key))
      scorer = params[f"layers_{i}"]["attention"]["scorer"]
      scores = scoring_network(config).apply({"params": scorer}, x, ids)
      queries = jnp.broadcast_to(jnp.arange(12), (4, 12))
      sizes = {"k": config.k, "window": config.window}
      yield ranking_loss(scores, query, key, queries, **sizes, segment_ids=ids) / 4

  losses = quick_jit(lambda params: list(expected_losses(params)))(params)
  state, metrics = one_step(train, config)
  assert (
    metrics["loss"] == metrics["scorer_loss"] == pytest.approx(float(np.mean(losses)), rel=1e-4)
  )
  for (path, new), old in zip(
    jax.tree_util.tree_leaves_with_path(state.params), jax.tree.leaves(params)
  ):
    assert np.array_equal(new, old) == ("scorer" not in jax.tree_util.keystr(path)), path
  again = one_step(dataclasses.replace(train, grad_accumulation=4), config)[1]
  assert again == pytest.approx(metrics, rel=1e-4)

  wide = dataclasses.replace(config, embed_dim=256, mlp_dim=1024, remat="full")
  mesh, optimizer = make_mesh(), make_optimizer(train.optimizer)
  state = abstract_state(checkpoint.abstract_params(wide), optimizer, mesh)
  flops = lambda step: step.lower(state, batch).compile().cost_analysis()["flops"]
  forward = jax.jit(
    lambda state, batch: Transformer(wide).apply(
      {"params": state.params}, batch["tokens"][:, :-1], method="hidden"
    )
  )
  updates = flops(
    jax.jit(lambda state, batch: optimizer.update(state.params, state.opt_state, state.params))
  )
  assert flops(make_train_step(wide, train, optimizer, mesh)) - updates < 1.5 * flops(forward)


def test_a_teacher_counts_by_its_weight():
  teacher, config = (dataclasses.replace(CONFIG, embed_dim=16), SELECTING)
  their_params, params, batch = (
    init_params(teacher, jax.random.key(1)),
    init_params(config, jax.random.key(0)),
    example_batch(),
  )
  weighted = quick_jit(
    lambda: [
      summed_losses(
        config, params, cut_targets(batch), 7, teacher=Teacher(teacher, their_params, weight)
      )
      for weight in (0.0, 0.25, 1.0)
    ]
  )
  losses = jax.device_get(weighted())
  logits = [
    quick_jit(Transformer(c).apply)(
      {"params": p}, batch["tokens"][:, :-1], batch["segment_ids"][:, :-1]
    )
    for c, p in ((teacher, their_params), (config, params))
  ]
  (p, q), counted = map(jax.nn.softmax, logits), next_token_targets(batch)[1]
  divergence = float(jnp.sum(jnp.where(counted, jnp.sum(p * jnp.log(p / q), -1), 0)))
  plain = float(
    quick_jit(lambda: summed_losses(config, params, cut_targets(batch), 7).cross_entropy)()
  )
  for result, weight in zip(losses, (0.0, 0.25, 1.0)):
    np.testing.assert_allclose(
      result, ((1 - weight) * plain + weight * divergence, plain, divergence, 0), rtol=1e-4
    )

  def step(**change):
    train = dataclasses.replace(TRAIN, distill=0.25, distill_from="somewhere", **change)
    mesh, optimizer = make_mesh(), make_optimizer(train.optimizer)
    state = TrainState(jnp.int32(0), jax.tree.map(jnp.copy, params), optimizer.init(params))
    state, metrics = make_train_step(config, train, optimizer, mesh, teacher)(
      state, put_batch(mesh, batch), their_params
    )
    return state.params, {name: float(value) for name, value in metrics.items()}

  (once, metrics), (accumulated, same) = step(), step(grad_accumulation=4)
  np.testing.assert_allclose(
    (metrics["loss"], metrics["divergence"]),
    np.array((plain, divergence)) / counted.sum(),
    rtol=1e-4,
  )
  assert same == pytest.approx(metrics, rel=1e-4)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), once, accumulated
  )


def test_selection_diagnostics_name_each_sparsek_layer_scanned_or_not():
  config = dataclasses.replace(
    CONFIG, num_layers=4, attention="sparsek,full", k=2, window=2, scan_layers=True
  )
  params, row = (
    init_params(config, jax.random.key(0)),
    {key: value[:1] for key, value in example_batch().items()},
  )
  scanned = make_diagnose(config, make_mesh())(params, row)
  unrolled = make_diagnose(dataclasses.replace(config, scan_layers=False), make_mesh())(
    unstack_layers(config, params), row
  )
  names = ("gate_mass", "support_size", "share_older_than_1k", "mean_age", "score_std")
  assert set(scanned) == {f"layer_{i}/{name}" for i in (0, 2) for name in names}
  for key, value in unrolled.items():
    np.testing.assert_allclose(scanned[key], value, rtol=1e-4, err_msg=key)
  per_layer = make_diagnose(
    dataclasses.replace(config, attention="sparsek:k2:w2,full", k=5, window=1), make_mesh()
  )(params, row)
  np.testing.assert_allclose([per_layer[key] for key in scanned], list(scanned.values()), rtol=1e-4)


def test_selection_diagnostics_are_means_over_the_heads_that_select():
  config = dataclasses.replace(
    CONFIG, num_layers=1, num_heads=4, num_kv_heads=4, k=2, window=2, attention="sparsek"
  )
  params = init_params(config, jax.random.key(0))
  row = {key: value[:1] for key, value in example_batch().items()}

  def diagnose(attention):
    statistics = make_diagnose(dataclasses.replace(config, attention=attention), make_mesh())
    return statistics(params, row)

  # Heads with k=0 do not count, though they have scores.
  mixed = diagnose("sparsek:h1:k1:w3")
  rest, one = diagnose("sparsek:h1:k0:w3"), diagnose("sparsek:k1:w3:h0.2-3:k0")
  for name in rest:
    np.testing.assert_allclose(mixed[name], 0.75 * rest[name] + 0.25 * one[name], rtol=1e-5)
  alike, whole = diagnose("sparsek:h0.1:k2"), diagnose("sparsek")
  np.testing.assert_allclose([alike[name] for name in whole], [*whole.values()], rtol=1e-5)
