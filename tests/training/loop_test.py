"""The loop within one process: the files a run writes, resuming, refusals.

tests/experiments kills real processes.
"""

import dataclasses
import errno
import functools
import json
import os
import resource
import shutil
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsek.config import DataConfig, OptimizerConfig, TrainConfig, TransformerConfig
from sparsek.data.batches import eval_batches, open_data
from sparsek.data.corpus import Document
from sparsek.data.token_files import write_token_files
from sparsek.data.tokenizer import ByteTokenizer, train_bpe
from sparsek.errors import RunError, UsageError
from sparsek.model.transformer import init_params, unstack_layers
from sparsek.parallel.mesh import make_mesh
from sparsek.runs import checkpoint, checkpoint_writer, run_directory, run_record
from sparsek.runs.metrics import read_metrics
from sparsek.training import init_from, loop, report, start
from sparsek.training.document_losses import LossSums
from sparsek.training.step import make_eval_step

CONFIG = TransformerConfig(
  vocab_size=257,
  num_layers=1,
  embed_dim=8,
  num_heads=2,
  num_kv_heads=1,
  head_dim=4,
  mlp_dim=8,
  attention="full",
)


@pytest.fixture(scope="module", autouse=True)
def compilation_cache(tmp_path_factory):
  """Lets the tests share compiled programs, since every call of train() compiles again."""
  options = {
    "jax_compilation_cache_dir": str(tmp_path_factory.mktemp("cache")),
    "jax_persistent_cache_min_compile_time_secs": 0.0,
  }
  old = {name: getattr(jax.config, name) for name in options}
  for name, value in options.items():
    jax.config.update(name, value)
  yield
  for name, value in old.items():
    jax.config.update(name, value)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
  folder = str(tmp_path_factory.mktemp("data") / "tokens")
  rng = np.random.default_rng(0)
  texts = ["".join(rng.choice(list("abcd "), 60)) for _ in range(20)]
  write_token_files(
    folder, [Document(str(i), text, i >= 16) for i, text in enumerate(texts)], ByteTokenizer()
  )
  return open_data(folder)


def run_config(workdir, num_steps=8, **fields):
  optimizer = OptimizerConfig(
    learning_rate=0.01, warmup_steps=min(2, num_steps), num_steps=num_steps
  )
  fields = {
    "data": DataConfig(data="d", seq_len=16, batch_size=2),
    "log_every": 2,
    "eval_every": 4,
    "eval_batches": 2,
    "checkpoint_every": 4,
    "keep_checkpoints": 2,
    **fields,
  }
  return TrainConfig(workdir=str(workdir), optimizer=optimizer, **fields)


def logged(workdir):
  records = read_metrics(os.path.join(workdir, "metrics.jsonl"))
  return [
    {key: value for key, value in record.items() if key != "tokens_per_second"}
    for record in records
  ]


@pytest.fixture(scope="module")
def finished(dataset, tmp_path_factory):
  """Returns the workdir of an uninterrupted run, and its result."""
  workdir = str(tmp_path_factory.mktemp("run"))
  return workdir, loop.train(CONFIG, run_config(workdir), dataset, "--a_flag=1\n")


def test_a_run_writes_metrics_checkpoints_and_records(finished, capsys):
  workdir, result = finished
  records = read_metrics(os.path.join(workdir, "metrics.jsonl"))
  assert [record["step"] for record in records] == [1, 2, 4, 4, 6, 8, 8]
  steps = [record for record in records if "loss" in record]
  assert all(record["grad_norm"] > 0 and record["num_targets"] > 0 for record in steps)
  assert all(("tokens_per_second" in record) == (record["step"] > 1) for record in steps)
  assert steps[-1]["loss"] < steps[0]["loss"]
  evaluations = [record for record in records if "heldout_loss" in record]
  assert [record["step"] for record in evaluations] == [4, 8]
  np.testing.assert_allclose(
    evaluations[0]["heldout_bits_per_byte"], evaluations[0]["heldout_loss"] / np.log(2)
  )
  assert checkpoint.saved_steps(workdir) == [4, 8]
  assert (result.step, result.loss, result.heldout_loss) == (
    8,
    steps[-1]["loss"],
    evaluations[-1]["heldout_loss"],
  )
  assert run_record.load_run_config(workdir)[0] == CONFIG
  assert checkpoint.load_params(workdir, CONFIG)[1] == 8
  assert run_record.load_run_tokenizer(workdir).fingerprint == ByteTokenizer.fingerprint
  with open(os.path.join(workdir, "flags.txt")) as file:
    assert file.read() == "--a_flag=1\n"
  with open(os.path.join(workdir, "versions.json")) as file:
    versions = json.load(file)
  assert {"python", "packages", "commit", "devices", "command"} <= versions.keys()
  assert versions["attention"]["full"]["implementation"] == "xla"
  assert "it needs a TPU" in versions["attention"]["full"]["refusals"]["mosaic_tpu"]


def test_profile_and_model_flops_utilization(finished, dataset, tmp_path, monkeypatch, capsys):
  monkeypatch.setattr(report.flops, "peak", lambda _: 1e6)
  loop.train(CONFIG, run_config(tmp_path, profile_steps="3:5"), dataset)
  records = read_metrics(tmp_path / "metrics.jsonl")
  batch_flops = []
  for record in records:
    if "tokens_per_second" in record:
      batch_flops.append(record.pop("mfu") * 1e6 * 32 / record["tokens_per_second"])
  assert len(batch_flops) == 4  # of steps 2, 4, 6, 8
  smallest, largest = (
    loop.flops.training_flops(CONFIG, checkpoint.abstract_params(CONFIG), np.array(lengths))
    for lengths in ([1] * 32, [16, 16])
  )
  assert all(smallest < x <= 1.001 * largest for x in batch_flops)
  assert [
    {key: value for key, value in record.items() if key != "tokens_per_second"}
    for record in records
  ] == logged(finished[0])
  traces = list((tmp_path / "profile").rglob("*.xplane.pb"))
  assert len(traces) == 1 and os.path.getsize(traces[0]) > 0
  said = capsys.readouterr().err
  assert "a trace of steps 3 to 5" in said and "% MFU" in said


def test_the_loop_moves_nothing_unasked(finished, dataset, tmp_path, monkeypatch):
  """Only device_put of batches and device_get of metrics move data between host and devices."""
  original = loop._Run.loop

  def guarded(*args):
    with jax.transfer_guard("disallow"):
      with pytest.raises(Exception, match="Disallowed"):
        jax.jit(lambda x: x + 1)(np.ones(3))  # the guard guards
      return original(*args)

  monkeypatch.setattr(loop._Run, "loop", guarded)
  assert loop.train(CONFIG, run_config(tmp_path), dataset).loss == finished[1].loss


def test_a_trace_ends_with_the_run(dataset, tmp_path):
  loop.train(CONFIG, run_config(tmp_path, profile_steps="7:99"), dataset)
  assert len(list((tmp_path / "profile").rglob("*.xplane.pb"))) == 1


def test_a_complete_run_says_so(finished, dataset):
  before = logged(finished[0])
  result = loop.train(CONFIG, run_config(finished[0]), dataset)
  assert result.already_complete and result.step == 8
  assert logged(finished[0]) == before


def stop_at(monkeypatch, call, module, name):
  """Sends this process SIGTERM in the given call of module.name."""
  calls, original = [], getattr(module, name)

  def interrupted(*args, **kwargs):
    calls.append(1)
    if len(calls) == call:
      os.kill(os.getpid(), signal.SIGTERM)
    return original(*args, **kwargs)

  monkeypatch.setattr(module, name, interrupted)


@pytest.mark.parametrize(
  "module, name, call, step",
  [
    (loop, "put_batch", 3, 3),
    (loop, "heldout_losses", 1, 4),
    (loop, "heldout_losses", 2, 8),
    (init_from, "init_params", 1, 0),
  ],
)
def test_sigterm_saves_and_the_resumed_run_logs_the_same(
  finished, dataset, tmp_path, monkeypatch, module, name, call, step
):
  with monkeypatch.context() as patch:
    stop_at(patch, call, module, name)
    result = loop.train(CONFIG, run_config(tmp_path), dataset)
  assert result.step == step and checkpoint.saved_steps(str(tmp_path))[-1] == step
  assert result.stopped == (step < 8)
  assert loop.train(CONFIG, run_config(tmp_path), dataset).step == 8
  assert logged(tmp_path) == logged(finished[0])


def test_resume_under_other_settings_and_the_records_of_both(dataset, tmp_path, capsys):
  loop.train(CONFIG, run_config(tmp_path, num_steps=4), dataset, "--num_steps=4\n")
  other = dataclasses.replace(CONFIG, k=3, window=5, gate="value")
  config = run_config(
    tmp_path, data=DataConfig(data="d", seq_len=8, batch_size=4), grad_accumulation=2
  )
  assert loop.train(other, config, dataset, "--num_steps=8\n").step == 8
  said = capsys.readouterr().err
  assert f"resuming {tmp_path} at step 4, with other settings than before:\n  k: 64 -> 3\n" in said
  assert f"  (flags not given have their defaults; --flagfile={tmp_path}/flags.txt keeps" in said
  assert said.count("attention: xla on cpu, ") == 2  # of each run once
  assert said.count("compiling the training step (cached next time) ...\n") == 2
  assert said.count(f"the run goes to {tmp_path}\n") == 2
  assert {"flags.txt", "flags.1.txt", "model.json", "model.1.json"} <= set(os.listdir(tmp_path))
  assert (tmp_path / "flags.1.txt").read_text() == "--num_steps=4\n"
  assert run_record.load_run_config(str(tmp_path))[0] == other


def test_a_stage_stops_and_the_next_goes_on(finished, dataset, tmp_path):
  """Stages that are alike log what one run does."""
  workdir = str(tmp_path / "stages")
  first = loop.train(CONFIG, run_config(workdir, stop_at=3), dataset)
  again = loop.train(CONFIG, run_config(workdir, stop_at=3), dataset)
  assert (first.step, first.stopped, again.already_complete) == (3, True, True)
  assert loop.train(CONFIG, run_config(workdir), dataset).step == 8
  assert [record for record in logged(workdir)] == logged(finished[0])


def test_another_architecture_is_refused_and_changes_nothing(finished, dataset):
  before = {
    name: os.path.getmtime(os.path.join(finished[0], name))
    for name in ("model.json", "metrics.jsonl")
  }
  with pytest.raises(UsageError, match="--mlp_dim=16 here, 8 there"):
    loop.train(
      dataclasses.replace(CONFIG, mlp_dim=16), run_config(finished[0], num_steps=20), dataset
    )
  assert before == {name: os.path.getmtime(os.path.join(finished[0], name)) for name in before}


def test_init_from_takes_parameters_only(finished, dataset, tmp_path):
  loop.train(
    CONFIG, run_config(tmp_path / "a", num_steps=1, init_from=f"{finished[0]}@4", seed=5), dataset
  )
  first, at_4 = (
    logged(tmp_path / "a")[0],
    next(record for record in logged(finished[0]) if record["step"] == 4),
  )
  assert first["step"] == 1 and abs(first["loss"] - at_4["loss"]) < 0.3
  with pytest.raises(UsageError, match="no checkpoint of step 5; it has 4, 8"):
    loop.train(CONFIG, run_config(tmp_path / "b", init_from=f"{finished[0]}@5"), dataset)
  with pytest.raises(UsageError, match="there is no folder"):
    loop.train(CONFIG, run_config(tmp_path / "c", init_from="/nowhere"), dataset)
  with pytest.raises(UsageError, match="--embed_dim=16 here, 8 there"):
    loop.train(
      dataclasses.replace(CONFIG, embed_dim=16),
      run_config(tmp_path / "d", init_from=finished[0]),
      dataset,
    )


def test_init_from_takes_another_kind_of_attention_from_its_own_layers(
  finished, dataset, tmp_path, capsys
):
  """Makes a scanned hybrid of a dense run, with new scorers and all else from the run; and back."""
  hybrid = dataclasses.replace(
    CONFIG,
    num_layers=4,
    attention=("sparsek", "full"),
    k=3,
    window=4,
    scan_layers=True,
    implementation="reference",
  )
  dense = dataclasses.replace(hybrid, attention=("full",), scan_layers=False)
  # one schedule, so that runs of the same model share a program
  settings = functools.partial(run_config, num_steps=4, seed=3, eval_every=0)
  loop.train(dense, settings(tmp_path / "dense"), dataset)
  dense_params, _ = checkpoint.load_params(str(tmp_path / "dense"), dense)
  begin = lambda config, name, source: loop.train(
    config, settings(tmp_path / name, stop_at=1, init_from=str(tmp_path / source)), dataset
  )
  begin(hybrid, "hybrid", "dense")
  assert "drawn anew: attention/scorer of 2 layers" in capsys.readouterr().err
  params, step = init_from.load(
    str(tmp_path / "dense"), hybrid, None, jax.random.key(3), None, print
  )
  assert step == 4
  drawn = unstack_layers(hybrid, init_params(hybrid, jax.random.key(3)))
  converted = unstack_layers(hybrid, params)
  for i in range(4):
    scorer = converted[f"layers_{i}"]["attention"].pop("scorer", None)
    assert (scorer is None) == (i % 2 == 1)
    jax.tree.map(
      np.testing.assert_array_equal, scorer, drawn[f"layers_{i}"]["attention"].get("scorer")
    )
  jax.tree.map(np.testing.assert_array_equal, converted, dense_params)
  begin(dense, "back", "hybrid")
  assert "left out: attention/scorer of 2 layers" in capsys.readouterr().err
  conv, lines = dataclasses.replace(hybrid, scorer="conv"), []  # of another shape
  init_from.load(str(tmp_path / "hybrid"), conv, None, jax.random.key(3), None, lines.append)
  assert "drawn anew: attention/scorer of 2 layers" in "".join(lines)
  with pytest.raises(UsageError, match="--mlp_dim=16 here, 8 there"):
    begin(dataclasses.replace(hybrid, mlp_dim=16), "other", "dense")


def test_adapters_begin_at_a_run_and_go_on_and_are_merged_by_the_next(
  finished, dataset, tmp_path, capsys
):
  config = dataclasses.replace(CONFIG, lora_rank=2, lora_alpha=6.0)
  settings = functools.partial(run_config, init_from=finished[0])
  loop.train(config, settings(tmp_path / "whole"), dataset)
  assert "of them learn" in capsys.readouterr().err
  loop.train(config, settings(tmp_path / "parts", stop_at=3), dataset)
  loop.train(config, settings(tmp_path / "parts"), dataset)
  assert logged(tmp_path / "parts") == logged(tmp_path / "whole")
  plain, _ = run_record.load_run_config(str(tmp_path / "whole"))
  assert plain == CONFIG
  assert run_record.load_run_config(str(tmp_path / "whole"), adapters=True)[0] == config
  base, params = (
    checkpoint.load_params(str(folder), CONFIG)[0] for folder in (finished[0], tmp_path / "whole")
  )
  same = jax.tree.map(np.array_equal, base, params)
  assert {path[-1].key for path, same in jax.tree_util.tree_leaves_with_path(same) if not same} == {
    "kernel"
  }
  for other, name in ((CONFIG, "merged"), (config, "new")):
    begun = run_config(tmp_path / name, stop_at=1, init_from=str(tmp_path / "whole"))
    loop.train(other, begun, dataset)
  # both of the first step: of what they begin at
  losses = [logged(tmp_path / name)[0]["loss"] for name in ("merged", "new")]
  assert losses[0] == losses[1]
  mesh, (*before, last) = make_mesh(), logged(tmp_path / "whole")
  step, batches = make_eval_step(CONFIG, 64, mesh), eval_batches(dataset, run_config("").data, 2)
  found = loop.heldout_losses(params, step, mesh, batches)
  assert found.mean == pytest.approx(last["heldout_loss"], abs=1e-5)
  assert all("heldout_documents" not in line for line in before)  # of the end alone
  index, sums, counts = map(list, dataclasses.astuple(found.by_document()))
  documents = last["heldout_documents"]
  assert (documents["index"], documents["num_targets"]) == (index, counts) and len(index) > 1
  assert documents["loss_sum"] == pytest.approx(sums, abs=1e-3)
  for other, message in (
    (dataclasses.replace(config, lora_alpha=2.0), "--lora_alpha=2.0 must be 6.0, as in the run"),
    (dataclasses.replace(config, lora_rank=3), "--lora_rank=3 here, 2 there"),
    (CONFIG, "--lora_rank=0 here, 2 there"),
  ):
    with pytest.raises(UsageError, match=message):
      loop.train(other, settings(tmp_path / "whole", num_steps=9), dataset)
  with pytest.raises(UsageError, match="--lora_rank=2 needs --init_from"):
    loop.train(config, run_config(tmp_path / "none"), dataset)


def test_another_tokenizer_is_refused(finished, dataset):
  class OtherTokenizer(ByteTokenizer):
    fingerprint = "f" * 64

  other = dataclasses.replace(dataset, tokenizer=OtherTokenizer())
  with pytest.raises(UsageError, match="tokenizer of --data=d .* does not match"):
    loop.train(CONFIG, run_config(finished[0]), other)


def test_a_workdir_in_use_or_not_writable_is_refused(dataset, tmp_path):
  with run_directory.lock(str(tmp_path / "w")):
    with pytest.raises(UsageError, match=f"in use by another run .process {os.getpid()}"):
      loop.train(CONFIG, run_config(tmp_path / "w"), dataset)
  run_directory.lock(str(tmp_path / "w")).close()
  (tmp_path / "file").write_text("")
  with pytest.raises(UsageError, match="cannot be written"):
    run_directory.lock(str(tmp_path / "file"))


def test_a_loss_that_is_not_finite_ends_the_run_before_it_is_saved(dataset, tmp_path):
  config = run_config(tmp_path)
  config = dataclasses.replace(
    config, optimizer=dataclasses.replace(config.optimizer, learning_rate=1e30, grad_clip=0.0)
  )
  with pytest.raises(RunError, match="lower --learning_rate"):
    loop.train(CONFIG, config, dataset)
  assert checkpoint.saved_steps(str(tmp_path)) == []


def test_a_full_disk_is_an_error_at_the_end_and_keeps_what_was_saved(
  dataset, tmp_path, monkeypatch, capsys
):
  loop.train(CONFIG, run_config(tmp_path, num_steps=4), dataset)
  limits = resource.getrlimit(resource.RLIMIT_FSIZE)
  original = checkpoint_writer.CheckpointWriter.save

  def save_on_a_full_disk(self, *args):
    resource.setrlimit(resource.RLIMIT_FSIZE, (50, limits[1]))
    try:
      original(self, *args)
      self.wait()
    finally:
      resource.setrlimit(resource.RLIMIT_FSIZE, limits)

  monkeypatch.setattr(checkpoint_writer.CheckpointWriter, "save", save_on_a_full_disk)
  with pytest.raises(
    RunError, match="the checkpoint of step 8 could not be saved .* newest is of step 4"
  ):
    loop.train(CONFIG, run_config(tmp_path), dataset)
  # and why: the file is too large, unless Orbax trips over what it wrote of it
  assert "those before it are kept: " in capsys.readouterr().err
  assert checkpoint.load_params(str(tmp_path), CONFIG)[1] == 4


@pytest.fixture
def run_copy(finished, tmp_path):
  """Returns a copy of the finished run, with checkpoints of steps 4 and 8, to be spoilt."""
  shutil.copytree(finished[0], tmp_path / "run")
  return tmp_path / "run"


def with_learning_rate(config, learning_rate):
  optimizer = dataclasses.replace(config.optimizer, learning_rate=learning_rate, grad_clip=0.0)
  return dataclasses.replace(config, optimizer=optimizer)


def test_parameters_that_no_loss_has_seen_are_not_saved(dataset, run_copy):
  """The loss before the update that ruins them is finite."""
  config = run_config(run_copy, num_steps=12, checkpoint_every=1, keep_checkpoints=9, eval_every=0)
  with pytest.raises(RunError) as error:
    loop.train(CONFIG, with_learning_rate(config, 1e30), dataset)
  message = str(error.value)
  assert "under the parameters of step 9, whose update had loss 5." in message
  assert "\n" not in message
  assert "checkpoints of steps 4, 8" in message and "--restore_step=4" in message
  assert checkpoint.saved_steps(str(run_copy)) == [4, 8]


@pytest.mark.parametrize("leaf", ["params", "opt_state"])
def test_a_state_that_is_not_finite_is_not_saved(leaf, dataset, tmp_path, monkeypatch):
  original = start.make_train_step

  def ruining(*args):
    step = original(*args)

    def ruined(state, batch, apply):
      state, outputs = step(state, batch, apply=apply)
      tree = getattr(state, leaf)
      leaves, structure = jax.tree.flatten(tree)
      leaves = [jnp.full_like(x, jnp.inf) if x.dtype == jnp.float32 else x for x in leaves]
      return state._replace(**{leaf: jax.tree.unflatten(structure, leaves)}), outputs

    ruined.lower = step.lower
    return ruined

  monkeypatch.setattr(start, "make_train_step", ruining)
  with pytest.raises(
    RunError, match="parameters or moments of step 1 are not finite.*no checkpoint"
  ):
    loop.train(CONFIG, run_config(tmp_path, checkpoint_every=1, eval_every=0), dataset)
  assert checkpoint.saved_steps(str(tmp_path)) == []


def test_a_heldout_loss_that_is_not_finite_ends_the_run(dataset, run_copy, monkeypatch):
  (sums := LossSums()).add(np.array([0]), np.array([np.nan]))
  monkeypatch.setattr(loop, "heldout_losses", lambda *args: sums)
  with pytest.raises(RunError, match="the held-out loss is nan at step 12, .* steps 4, 8"):
    loop.train(CONFIG, run_config(run_copy, num_steps=12), dataset)
  assert checkpoint.saved_steps(str(run_copy)) == [4, 8]
  assert all(record.get("heldout_loss", 0) is not None for record in logged(run_copy))


def test_a_run_goes_back_to_a_step_and_logs_the_same(finished, dataset, run_copy, capsys):
  config = run_config(run_copy, restore_step=4)
  with pytest.raises(UsageError, match="--mlp_dim=16 here"):
    loop.train(dataclasses.replace(CONFIG, mlp_dim=16), config, dataset)
  assert checkpoint.saved_steps(str(run_copy)) == [4, 8]
  assert loop.train(CONFIG, config, dataset).step == 8
  assert logged(run_copy) == logged(finished[0])
  assert sorted(os.listdir(run_copy / "set_aside" / "0")) == ["8", "metrics.jsonl"]
  assert loop.train(CONFIG, config, dataset).already_complete
  said = capsys.readouterr().err
  assert "step 4" in said and "--restore_step=4 was done before" in said


def test_skipped_spikes_are_told_and_resume_to_the_bit(dataset, tmp_path, monkeypatch, capsys):
  """The losses hardly fall: those above their mean are spikes here."""
  monkeypatch.setattr(report.spikes, "FIRST", 2)

  def settings(workdir, **fields):
    config = run_config(workdir, spike_factor=1.001, log_every=1, **fields)
    return with_learning_rate(config, 1e-5)

  loop.train(CONFIG, settings(tmp_path / "whole"), dataset)
  said = capsys.readouterr().err
  whole = logged(tmp_path / "whole")
  skipped = [record["skipped"] for record in whole if "loss" in record]
  assert 0 < skipped[-1] < 6 and said.count("its update is skipped") == skipped[-1]
  loop.train(CONFIG, settings(tmp_path / "parts", stop_at=5), dataset)
  loop.train(CONFIG, settings(tmp_path / "parts"), dataset)
  assert logged(tmp_path / "parts") == whole
  with pytest.raises(RunError, match="a spike, by --spike_factor=1.001: .*--on_spike"):
    loop.train(CONFIG, settings(tmp_path / "stop", on_spike="stop"), dataset)
  monkeypatch.setattr(report.spikes, "MOST_IN_A_ROW", 1)
  with pytest.raises(RunError, match="it is the 1th in a row"):
    loop.train(CONFIG, settings(tmp_path / "row"), dataset)


def test_a_spike_before_a_checkpoint_says_nothing_about_its_parameters(
  dataset, tmp_path, monkeypatch
):
  """Its batch has no finite loss under any parameters; the checkpoint's are from before it."""
  original, batches = start.make_train_step, []

  def spiking(*args):
    step = original(*args)

    def spike_at_4(state, batch, apply):
      batches.append(batch)
      state, outputs = step(state, batch, apply=apply)
      loss = jnp.nan if len(batches) > 3 and batch is batches[3] else outputs["loss"]
      return state, {**outputs, "loss": jnp.float32(loss), "skipped": jnp.int32(len(batches) >= 4)}

    spike_at_4.lower = step.lower
    return spike_at_4

  monkeypatch.setattr(start, "make_train_step", spiking)
  config = run_config(tmp_path, num_steps=4, eval_every=0, spike_factor=2.0)
  assert loop.train(CONFIG, config, dataset).step == 4
  assert checkpoint.saved_steps(str(tmp_path)) == [4]


@pytest.mark.parametrize("name", ["", "metrics.jsonl"])
def test_a_folder_that_is_gone_ends_the_run_and_is_not_made_again(
  name, dataset, run_copy, monkeypatch
):
  path, original = run_copy / name, loop.put_batch

  def move(*args):
    if path.exists():
      path.rename(run_copy.parent / "elsewhere")
    return original(*args)

  monkeypatch.setattr(loop, "put_batch", move)
  with pytest.raises(RunError, match="was deleted, moved or unmounted under the run"):
    loop.train(CONFIG, run_config(run_copy, num_steps=12), dataset)
  assert not path.exists()


def test_a_complete_run_says_in_a_line_what_it_has_and_what_can_be_done(dataset, run_copy, capsys):
  def told(config, model=CONFIG):
    assert loop.train(model, config, dataset).already_complete
    (line,) = capsys.readouterr().err.splitlines()
    begin, end = f"{run_copy} is complete: it has all of ", " for a new run"
    assert line.startswith(begin) and line.endswith(end)
    return line.removeprefix(begin).removesuffix(end)

  advice = "; raise --num_steps to train it further, or give another --workdir"
  other_k = dataclasses.replace(CONFIG, k=5)
  assert told(run_config(run_copy)) == f"--num_steps=8 steps (8 were made){advice}"
  assert told(run_config(run_copy, num_steps=4), other_k) == (
    f"--num_steps=4 steps (8 were made), with k=64 (not 5){advice}"
  )
  config = run_config(run_copy, seed=3, checkpoint_every=5, stop_at=7)
  changed = (
    "seed=0 (not 3), checkpoint_every=4 (not 5), learning_rate=0.01 (not 0.5), grad_clip=1.0"
  )
  assert told(with_learning_rate(config, 0.5)) == (
    f"--stop_at=7 steps (8 were made), with {changed} (not 0.0){advice}"
  ).replace("raise --num_steps", "raise --stop_at")
  old = json.loads((run_copy / "model.json").read_text())
  del old["train"]  # as of a run of an older version
  (run_copy / "model.json").write_text(json.dumps(old))
  line = told(run_config(run_copy, data=DataConfig("d", 16, 4)))
  assert line == f"--num_steps=8 steps (8 were made), with batch_size=2 (not 4){advice}"


def full(*args, **kwargs):
  raise OSError(errno.ENOSPC, "No space left on device")


FULL = {
  "the lock": (run_directory, "lock"),
  "the records": (run_directory, "write_record"),
  "the tokenizer": (ByteTokenizer, "save"),
  "the metrics": (loop, "MetricsWriter"),
  "fsync of the metrics": (loop.MetricsWriter, "sync"),
  "the end": (loop.MetricsWriter, "close"),
}


def test_a_full_disk_is_one_sentence_and_the_command_can_be_repeated(
  finished, dataset, tmp_path, monkeypatch
):
  for what in FULL.values():
    with monkeypatch.context() as patch:
      patch.setattr(*what, full)
      with pytest.raises(RunError, match="the run in .* cannot go on: No space left on device"):
        loop.train(CONFIG, run_config(tmp_path), dataset)
  assert loop.train(CONFIG, run_config(tmp_path), dataset).step == 8
  assert logged(tmp_path) == logged(finished[0])


def test_a_full_disk_leaves_the_tokenizer_as_it_was(tmp_path):
  """Its library would cut the file short, and raise a bare Exception."""
  tokenizer = train_bpe(["some text"], 257)
  tokenizer.save(str(tmp_path))
  before = (tmp_path / "tokenizer.json").read_text()
  limits = resource.getrlimit(resource.RLIMIT_FSIZE)
  try:
    resource.setrlimit(resource.RLIMIT_FSIZE, (50, limits[1]))
    with pytest.raises(OSError, match="File too large"):
      tokenizer.save(str(tmp_path))
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
  assert (tmp_path / "tokenizer.json").read_text() == before
  assert os.listdir(tmp_path) == ["tokenizer.json"]


def test_metrics_on_a_full_disk_end_the_run(dataset, tmp_path, monkeypatch):
  """Closing the file fails too, since it writes what is still in the buffer."""

  class FullMetrics(loop.MetricsWriter):
    def __init__(self, *args):
      super().__init__(*args)
      self._file = open("/dev/full", "wb")

  monkeypatch.setattr(loop, "MetricsWriter", FullMetrics)
  with pytest.raises(RunError, match="No space left on device"):
    loop.train(CONFIG, run_config(tmp_path), dataset)


def test_that_checkpoints_can_be_written_is_found_out_before_the_first_step(
  dataset, tmp_path, monkeypatch
):
  (tmp_path / "checkpoints").write_text("")
  with pytest.raises(UsageError, match="--workdir=.*: checkpoints cannot be written: "):
    loop.train(CONFIG, run_config(tmp_path), dataset)
  (tmp_path / "checkpoints").unlink()
  monkeypatch.setattr(checkpoint.ocp, "save_checkpointables", full)
  with pytest.raises(RunError, match="checkpoints cannot be written: No space left on device"):
    loop.train(CONFIG, run_config(tmp_path), dataset)
  assert os.listdir(tmp_path / "checkpoints") == []


def test_an_implementation_that_cannot_run_is_refused(dataset, tmp_path):
  with pytest.raises(UsageError, match="--implementation=mosaic_tpu: "):
    loop.train(
      dataclasses.replace(CONFIG, attention="sparsek", implementation="mosaic_tpu"),
      run_config(tmp_path),
      dataset,
    )


def test_rows_longer_than_the_learned_positions_are_refused(dataset, tmp_path):
  learned = dataclasses.replace(CONFIG, positions="learned", max_positions=15)
  with pytest.raises(UsageError, match="--seq_len=16 must be at most 15"):
    loop.train(learned, run_config(tmp_path), dataset)


def test_no_run_goes_on_in_the_folder_of_an_imported_model(dataset, finished, tmp_path):
  shutil.copytree(finished[0], tmp_path, dirs_exist_ok=True)
  record = json.loads((tmp_path / "model.json").read_text())
  record["data"]["data"] = ""
  (tmp_path / "model.json").write_text(json.dumps(record))
  with pytest.raises(UsageError, match="holds an imported model .* --init_from=hf:FOLDER"):
    loop.train(CONFIG, run_config(tmp_path), dataset)


def test_a_run_says_where_its_documents_begin_otherwise(dataset, finished, tmp_path):
  shutil.copytree(finished[0], tmp_path, dirs_exist_ok=True)
  record, said = json.loads((tmp_path / "model.json").read_text()), []
  check = functools.partial(init_from.check_tokenizer, str(tmp_path), dataset, "d", said.append)
  check()
  assert not said
  record["tokenizer"]["bos_ids"] = [60, 62]
  (tmp_path / "model.json").write_text(json.dumps(record))
  check()
  assert len(said) == 1 and "documents of --data=d begin with their text" in said[0]
  assert f"those of {tmp_path} with byte 60 byte 62:" in said[0]


def test_a_model_of_hugging_face_says_where_its_documents_begin_otherwise(dataset, monkeypatch):
  tokenizer, said = ByteTokenizer(), []
  tokenizer.bos_ids = [60]
  monkeypatch.setattr(init_from, "load_tokenizer", lambda folder: tokenizer)
  monkeypatch.setattr(init_from.pretrained, "load", lambda *args, **options: (CONFIG, "parameters"))
  train = run_config("w", init_from="hf:folder")
  assert init_from.initial_params(CONFIG, train, dataset, None, said.append) == "parameters"
  assert said.pop() == "starting from hf:folder"
  assert len(said) == 1 and "those of hf:folder with byte 60: make the data anew" in said[0]
