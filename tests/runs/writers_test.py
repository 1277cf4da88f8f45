"""Writers of metrics besides metrics.jsonl: what they get, and that none ends or delays a run."""

import json
import os
import sys
import threading
import types

import pytest

from sparsek.config import TrainConfig
from sparsek.errors import UsageError
from sparsek.runs import set_aside, writers


def run(tmp_path, **fields):
  return TrainConfig(str(tmp_path), **fields)


def write_all(train, *records, step=0):
  """Writes records of (step, scalars) with a run's writers, and closes them."""
  opened = writers.open_writers(train, step, {"model": {"k": 4}})
  for writer in opened:
    for record in records:
      writer.write(*record)
    writer.close()


class StandIn:
  """A module in the place of wandb; `failing` is what raises, of "init", "log" and "finish"."""

  def __init__(self, failing=""):
    self.failing, self.calls = failing, []
    self.Settings = lambda **options: options

  def _call(self, called, *args, **options):
    self.calls.append((called, args, options))
    if called == self.failing:
      raise ConnectionError("no\nnetwork")

  def init(self, **options):
    self._call("init", **options)
    return types.SimpleNamespace(
      log=lambda *args, **options: self._call("log", *args, **options),
      finish=lambda: self._call("finish"),
    )


@pytest.fixture
def wandb(monkeypatch):
  def put(failing=""):
    stand_in = StandIn(failing)
    monkeypatch.setitem(sys.modules, "wandb", stand_in)
    return stand_in

  return put


@pytest.mark.parametrize("flag, package", [("tensorboard", "tensorboardX"), ("wandb", "wandb")])
def test_a_missing_package_is_named(flag, package, tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, package, None)
  writers.check(run(tmp_path))
  with pytest.raises(UsageError, match=f"--{flag} needs {package}: pip install {package}$"):
    writers.check(run(tmp_path, **{flag: "project" if flag == "wandb" else True}))


@pytest.mark.parametrize("name, good", [("a b", 1), ("me/it", 1), ("a/b/c", 0), ("", 0), ("a?", 0)])
def test_names_that_wandb_refuses_are_refused_first(name, good, tmp_path, wandb):
  wandb()
  if good:
    return writers.check(run(tmp_path, wandb=name))
  with pytest.raises(UsageError, match="--wandb=.*: must be PROJECT or ENTITY/PROJECT"):
    writers.check(run(tmp_path, wandb=name))


def test_tensorboard_gets_every_number(tmp_path, monkeypatch):
  written = []
  events = types.SimpleNamespace(
    add_scalar=lambda *args: written.append(args),
    flush=lambda: written.append("flush"),
    close=lambda: written.append("close"),
  )

  def opened(folder, **options):
    written.append((os.path.relpath(folder, tmp_path), options["purge_step"]))
    return events

  monkeypatch.setitem(sys.modules, "tensorboardX", types.SimpleNamespace(SummaryWriter=opened))
  write_all(run(tmp_path, tensorboard=True), (3, {"loss": 2.0}), step=2)
  assert written == [("tensorboard", 3), ("loss", 2.0, 3), "flush", "close"]


def test_a_resumed_run_continues_its_wandb_run(tmp_path, wandb):
  module, train = wandb(), run(tmp_path, wandb="me/it")
  write_all(train, (1, {"loss": 3.0}), (2, {"loss": 2.0}), (2, {"heldout_loss": 2.5}))
  write_all(train, (3, {"loss": 1.0}))
  names = [name for name, _, _ in module.calls]
  assert names == ["init", "log", "log", "log", "finish", "init", "log", "finish"]
  first, second = (options for name, _, options in module.calls if name == "init")
  assert first["id"] == second["id"] == json.load(open(tmp_path / "wandb.json"))["me/it"]
  assert (first["entity"], first["project"], first["resume"]) == ("me", "it", "allow")
  assert first["config"] == {"model": {"k": 4}} and first["name"] == tmp_path.name
  assert module.calls[3][1:] == (({"heldout_loss": 2.5},), {"step": 2})
  write_all(run(tmp_path, wandb="other"))
  other = module.calls[-2][2]
  assert other["entity"] is None and other["id"] != first["id"]


def test_a_run_that_went_back_is_a_new_wandb_run(tmp_path, wandb):
  module, train = wandb(), run(tmp_path, wandb="it")
  (tmp_path / "checkpoints" / "8").mkdir(parents=True)
  write_all(train)
  set_aside.set_aside(str(tmp_path), 4, lambda line: None)
  write_all(train)
  first, second = (options["id"] for name, _, options in module.calls if name == "init")
  kept = json.load(open(tmp_path / "set_aside" / "0" / "wandb.json"))
  assert first != second and kept == {"it": first}


@pytest.mark.parametrize("failing, logs", [("init", 0), ("log", 1), ("finish", 3)])
def test_a_failure_is_said_once_and_raises_nothing(failing, logs, tmp_path, wandb, capsys):
  module = wandb(failing)
  write_all(run(tmp_path, wandb="it"), *((step, {"loss": 1.0}) for step in (1, 2, 3)))
  told = capsys.readouterr().err
  assert told.count("warning: --wandb=it gets no more metrics: ConnectionError: no network.") == 1
  assert told.count("\n") == 1
  assert [name for name, _, _ in module.calls].count("log") == logs


def test_a_writer_that_hangs_delays_nothing(monkeypatch, capsys):
  free = threading.Event()
  slow = types.SimpleNamespace(write=lambda *_: free.wait(), close=lambda: None)
  monkeypatch.setattr(writers, "WAITING", 2)
  monkeypatch.setattr(writers, "CLOSE_SECONDS", 0.05)
  full, waiting = (writers.Background(name, lambda: slow) for name in ("full", "waiting"))
  for step in range(9):
    full.write(step, {})
  full.close()
  waiting.write(1, {})
  waiting.close()
  told = capsys.readouterr().err.splitlines()
  free.set()
  assert [line.split(". ")[0] for line in told] == [
    "warning: full gets no more metrics: 2 records wait for it",
    "warning: waiting gets no more metrics: it has not ended after 0.05 s",
  ]


def test_a_damaged_file_of_ids_is_named(tmp_path, wandb):
  wandb()
  (tmp_path / "wandb.json").write_text('{"it": 3}')
  with pytest.raises(UsageError, match="wandb.json: the id of 'it' must be a text, it is 3"):
    writers.open_writers(run(tmp_path, wandb="it"), 0, {})


def test_the_real_package_takes_our_calls_without_a_network(tmp_path, monkeypatch):
  pytest.importorskip("wandb")
  monkeypatch.setenv("WANDB_MODE", "offline")
  train = run(tmp_path, wandb="it")
  writers.check(train)
  write_all(train, (1, {"loss": 3.0, "skipped": 0}), (1, {"heldout_loss": 2.5}))
  write_all(train, (2, {"loss": 2.0}))
  run_id = json.load(open(tmp_path / "wandb.json"))["it"]
  names = [name for name in os.listdir(tmp_path / "wandb") if name.startswith("offline-run-")]
  assert names and all(name.endswith(f"-{run_id}") for name in names)
