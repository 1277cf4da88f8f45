"""Stages of one run: what goes on over a border and what begins anew, and kills around borders."""

import dataclasses
import os
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from sparsek.config import DataConfig, OptimizerConfig, TrainConfig
from sparsek.data.batches import open_data
from sparsek.data.corpus import Document
from sparsek.data.token_files import write_token_files
from sparsek.data.tokenizer import ByteTokenizer, train_bpe
from sparsek.errors import UsageError
from sparsek.model.transformer import init_params
from sparsek.runs import checkpoint, run_record
from sparsek.runs.metrics import read_metrics
from sparsek.training import loop, stages, start
from sparsek.training.optimizer import learning_rate_schedule, make_optimizer
from sparsek.training.saver import SPIKES
from sparsek.training.stages import ELSEWHERE, Stage
from tests.helpers import SMALLEST

LENGTHS = (2, 2, 3)  # steps of the stages dense, warmup and joint
BORDERS = (2, 4)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
  """Returns two data sets of the same tokenizer."""
  datasets = []
  for seed in range(2):
    folder, rng = str(tmp_path_factory.mktemp("data") / "tokens"), np.random.default_rng(seed)
    texts = ["".join(rng.choice(list("abcd "), 60)) for _ in range(20)]
    documents = [Document(str(i), text, i >= 16) for i, text in enumerate(texts)]
    write_token_files(folder, documents, ByteTokenizer())
    datasets.append(open_data(folder))
  return datasets


def dense_warmup_joint(workdir, data, checkpoint_every=1):
  """Returns three stages; the second reads other data, the third other rows."""
  trains = [
    {"optimizer": {"learning_rate": 0.02}},
    {"optimizer": {"trainable": "scorer"}, "scorer_warmup": True},
    {"optimizer": {"warmup_steps": 1}, "data": {"seq_len": 24}},
  ]
  configs = [dataclasses.replace(SMALLEST, attention="full"), SMALLEST, SMALLEST]
  result = []
  for name, steps, config, fields, dataset in zip(
    ("dense", "warmup", "joint"), LENGTHS, configs, trains, (data[0], data[1], data[0])
  ):
    optimizer = {"warmup_steps": 0, "weight_decay": 0.5, **fields.pop("optimizer")}
    train = TrainConfig(
      workdir=str(workdir),
      data=DataConfig(data="d", batch_size=2, **{"seq_len": 16, **fields.pop("data", {})}),
      optimizer=OptimizerConfig(num_steps=steps, **optimizer),
      spike_factor=50.0,
      log_every=1,
      eval_every=0,
      checkpoint_every=checkpoint_every,
      keep_checkpoints=100,
      **fields,
    )
    begin = result[-1].end if result else 0
    result.append(Stage(config, train, dataset, name, f"--num_steps={steps}", begin))
  return result


@pytest.fixture(scope="module", autouse=True)
def shared_programs():
  """Lets runs of the same stages share compiled programs."""
  made, make_step, make_diagnose = {}, start.make_train_step, start.make_diagnose

  def shared_step(config, train, *args):
    key = config, dataclasses.replace(train, workdir="", checkpoint_every=1), args[-1]
    return made.setdefault(key, make_step(config, train, *args))

  def shared_diagnose(config, mesh):
    return made.setdefault(config, make_diagnose(config, mesh))

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(start, "make_train_step", shared_step)
    patch.setattr(start, "make_diagnose", shared_diagnose)
    yield


@pytest.fixture(scope="module")
def finished(data, tmp_path_factory):
  """Returns the folder of an uninterrupted run, with the checkpoint of every step."""
  workdir = str(tmp_path_factory.mktemp("run"))
  result = loop.train_stages(dense_warmup_joint(workdir, data), "--a_flag=1\n")
  assert (result.step, result.stopped) == (sum(LENGTHS), False)
  return workdir


def restored(workdir, step, config=SMALLEST):
  """Returns (parameters, moments, data state) of a checkpoint."""
  opt_state = jax.eval_shape(
    make_optimizer(OptimizerConfig()).init, checkpoint.abstract_params(config)
  )
  kept = checkpoint.restore_newest(workdir, config, opt_state, None, last=step)
  (adam,) = (part for part in kept.opt_state if isinstance(part, optax.ScaleByAdamState))
  return kept.params, adam, kept.data_state


def logged(workdir):
  return [
    {key: value for key, value in record.items() if key != "tokens_per_second"}
    for record in read_metrics(os.path.join(workdir, "metrics.jsonl"))
  ]


def parts_of(tree):
  """Returns the leaves of scorers, and all others."""
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  in_scorer = lambda path: "scorer" in jax.tree_util.keystr(path)
  return tuple(
    [np.asarray(leaf) for path, leaf in leaves if in_scorer(path) == wanted]
    for wanted in (True, False)
  )


def same(*trees):
  first, *others = map(jax.tree.leaves, trees)
  return all(np.array_equal(a, b) for other in others for a, b in zip(first, other, strict=True))


def test_heads_may_get_another_k_and_window_over_a_border_and_when_a_run_goes_on(data, tmp_path):
  """A head that selects nothing is taught nothing, and selects in the next stage."""
  two = dataclasses.replace(SMALLEST, num_heads=2, num_kv_heads=2, head_dim=4)
  patterns = ("full", "sparsek:h0:k0:w6", "sparsek:k3:h1:w2")
  workdir = str(tmp_path / "run")
  made = [
    stage._replace(config=dataclasses.replace(two, attention=pattern))
    for stage, pattern in zip(dense_warmup_joint(workdir, data), patterns)
  ]
  assert loop.train_stages(made[:2], "").step == BORDERS[1]
  _, adam, _ = restored(workdir, BORDERS[1], made[1].config)
  moment = np.asarray(adam.mu["layers_0"]["attention"]["scorer"]["linear"]["kernel"])
  assert [bool(np.any(moment[:, head])) for head in range(2)] == [False, True]
  assert loop.train_stages(made, "").step == sum(LENGTHS)
  _, adam, _ = restored(workdir, sum(LENGTHS), made[2].config)
  moment = np.asarray(adam.mu["layers_0"]["attention"]["scorer"]["linear"]["kernel"])
  assert np.all(np.any(moment, axis=0))


@pytest.mark.parametrize(
  "killed_after", sorted({border + offset for border in BORDERS for offset in (-1, 0, 1)})
)
def test_a_run_killed_around_a_border_goes_on_to_the_same_bits(
  killed_after, finished, data, tmp_path
):
  workdir = str(tmp_path / "run")
  shutil.copytree(finished, workdir)
  for step in range(killed_after + 1, sum(LENGTHS) + 1):
    shutil.rmtree(os.path.join(workdir, "checkpoints", str(step)))
  result = loop.train_stages(dense_warmup_joint(workdir, data, checkpoint_every=100))
  assert result.step == sum(LENGTHS)
  ends = [step for step in (*BORDERS, sum(LENGTHS)) if step > killed_after]
  assert checkpoint.saved_steps(workdir) == [*range(1, killed_after + 1), *ends]
  for step in ends:
    here, there = (restored(folder, step) for folder in (workdir, finished))
    assert same(here[:2], there[:2]) and here[2] == there[2], step
  assert logged(workdir) == logged(finished)


def test_what_a_stage_changes_and_what_survives_its_borders(finished, data):
  whole = dense_warmup_joint(finished, data)
  begin = init_params(SMALLEST, jax.random.key(0))
  states = {step: restored(finished, step) for step in (2, 4, 7)}
  scorers, others = zip(*(parts_of(params) for params in (begin, *(states[s][0] for s in states))))
  moments = {step: parts_of((adam.mu, adam.nu)) for step, (_, adam, _) in states.items()}
  # full attention has no scorers: neither weight decay nor moments touch them
  assert same(scorers[0], scorers[1]) and not any(map(np.any, moments[2][0]))
  assert not same(others[0], others[1])
  # what the warm-up freezes keeps its moments
  assert same(others[1], others[2]) and same(moments[2][1], moments[4][1])
  assert not same(scorers[1], scorers[2]) and any(map(np.any, moments[4][0]))
  assert not same(scorers[2], scorers[3]) and not same(others[2], others[3])
  assert states[7][1].count == 7
  # each schedule begins with its stage
  rates = [record["learning_rate"] for record in logged(finished)]
  expected = [
    float(learning_rate_schedule(stage.train.optimizer)(count))
    for stage in whole
    for count in range(stage.train.optimizer.num_steps)
  ]
  np.testing.assert_allclose(rates, expected, rtol=1e-6)
  # spikes are told by the steps of one stage; data are read on
  assert [states[step][2][SPIKES][2] for step in states] == list(LENGTHS)
  first, second, third = (states[step][2] for step in states)
  assert [state["dataset"] for state in (first, second, third)] == [
    data[i].fingerprint for i in (0, 1, 0)
  ]
  assert [state["tokens"] for state in (first, second, third)] == [64, 64, 64 + 3 * 2 * 24]
  assert third["stages"][0] == first["stages"][0] and third["stages"][1][1] == 24
  drop = lambda state: {k: v for k, v in state.items() if k not in (SPIKES, ELSEWHERE)}
  assert ELSEWHERE not in first and second[ELSEWHERE] == [drop(first)]
  assert third[ELSEWHERE] == [drop(second)]


def test_records_and_metrics_name_the_stages(finished, data, capsys):
  names = ["dense"] * 2 + ["warmup"] * 2 + ["joint"] * 3
  assert [record["stage"] for record in logged(finished)] == names
  config, record = run_record.load_run_config(finished)
  assert config == SMALLEST and record["data"]["seq_len"] == 24
  assert [(stage["name"], stage["steps"]) for stage in record["stages"]] == [
    ("dense", [1, 2]),
    ("warmup", [3, 4]),
    ("joint", [5, 7]),
  ]
  whole = dense_warmup_joint(finished, data)
  assert loop.train_stages(whole).already_complete
  said = capsys.readouterr().err
  assert (
    "all of the 7 steps of its stages dense, warmup, joint (7 were made); add a --stage" in said
  )
  changes = stages.changed(record["stages"], [*whole[:2], whole[2]._replace(flags="--k=3")])
  assert changes == {"stage joint": ("--num_steps=3", "--k=3")}
  assert stages.changed([], whole[:1]) == {"stage dense": ("none", "--num_steps=2")}


def test_a_run_grows_by_a_stage(finished, data, tmp_path, capsys):
  workdir = str(tmp_path / "run")
  shutil.copytree(finished, workdir)
  whole = dense_warmup_joint(workdir, data)
  again = whole[1]._replace(name="again", begin=whole[2].end)
  result = loop.train_stages([*whole, again])
  assert result.step == 9 and [record["stage"] for record in logged(workdir)[7:]] == ["again"] * 2
  assert "  stage again: none -> --num_steps=2\n" in capsys.readouterr().err
  rates = [record["learning_rate"] for record in logged(workdir)]
  assert rates[7:] == rates[2:4]
  places = restored(workdir, 9)[2]
  assert (places["dataset"], places["tokens"]) == (data[1].fingerprint, 128)


def test_a_step_that_now_belongs_to_a_stage_of_other_data_goes_on_in_these(finished, data):
  whole = dense_warmup_joint(finished, data)
  third = whole[2]._replace(dataset=data[1])
  (*others, setup) = start.set_up([*whole[:2], third])
  begun = start.restore_or_init([*others, setup], print)
  assert (begun.stage, begun.step) == (2, 7)
  place, (other,) = begun.data_state, begun.elsewhere
  assert (place["dataset"], place["tokens"]) == (data[1].fingerprint, 64)
  assert (other["dataset"], other["tokens"]) == (data[0].fingerprint, 64 + 3 * 2 * 24)
  for one in (*others, setup):
    one.iterator.close()


def test_a_late_parameter_has_the_updates_of_one_trained_from_the_start():
  config = OptimizerConfig(b2=0.999, grad_clip=0.0, weight_decay=0.0, warmup_steps=0, num_steps=9)
  params = {"early": jnp.ones(3), "late": jnp.ones(3)}
  grads = [{"early": jnp.full(3, x), "late": jnp.full(3, 2 * x)} for x in (1.0, -0.5, 3.0)]
  fresh, resumed = make_optimizer(config), make_optimizer(config, 50, {"early": 0, "late": 50})
  state = fresh.init(params)
  after = jax.tree.map(lambda leaf: leaf + 50 if jnp.ndim(leaf) == 0 else leaf, state)
  for grad in grads:
    expected, state = fresh.update(grad, state, params)
    found, after = resumed.update(grad, after, params)
    np.testing.assert_allclose(found["late"], expected["late"], rtol=1e-5)
  assert not np.allclose(found["early"], expected["early"], rtol=0.1)  # is not corrected


def bad_stages(data, tmp_path, **fields):
  """Returns the stages with other fields of the first."""
  first, *others = dense_warmup_joint(tmp_path / "new", data)
  return [first._replace(**fields), *others]


def test_stages_that_cannot_be_one_run_are_refused_before_anything_is_written(data, tmp_path):
  conv = dataclasses.replace(SMALLEST, scorer="conv", scorer_lookahead=0)
  texts = ["some other words " * 9] * 9
  folder = str(tmp_path / "bpe")
  documents = [Document(str(i), text, i > 6) for i, text in enumerate(texts)]
  write_token_files(folder, documents, train_bpe(texts, 260))
  teacher = dataclasses.replace(
    dense_warmup_joint(tmp_path, data)[0].train, distill=0.5, distill_from=str(tmp_path / "nowhere")
  )
  for fields, message in (
    ({"config": conv}, "attention=sparsek has parameters that the last stage, .*attention/scorer"),
    ({"dataset": open_data(folder)}, "the tokenizer of --data=d .* is not that of the last stage"),
    ({"train": teacher}, "nowhere holds no run"),
  ):
    with pytest.raises(UsageError, match=f"--stage=dense: .*{message}"):
      loop.train_stages(bad_stages(data, tmp_path, **fields))
    assert not (tmp_path / "new").exists()


def test_scanned_layers_have_patterns_of_one_length():
  last = dataclasses.replace(SMALLEST, num_layers=4, attention="sparsek,full", scan_layers=True)
  dense = dataclasses.replace(last, attention="full")
  alike, same_last = stages.alike_in_layout([dense, last])
  assert alike.attention == ("full", "full") and same_last is last
  shapes = [set(stages.parameter_shapes(checkpoint.abstract_params(c))) for c in (alike, last)]
  assert shapes[0] < shapes[1]
  unscanned = dataclasses.replace(dense, scan_layers=False)
  assert stages.alike_in_layout([unscanned, last])[0] is unscanned
