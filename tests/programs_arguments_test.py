"""Arguments of training, loading, evaluation and generation from Python: paths, numbers, types."""

import dataclasses
import os
import threading

import jax
import pytest

from sparsek import programs
from sparsek.data.corpus import Document
from sparsek.data.token_files import write_token_files
from sparsek.data.tokenizer import ByteTokenizer
from sparsek.errors import RunError, UsageError
from sparsek.evaluation import heldout, loss_by_position
from sparsek.generation.cache import init_cache
from sparsek.generation.session import Session
from sparsek.model.transformer import count_params
from sparsek.parallel.mesh import make_mesh
from sparsek.runs import run_record
from tests.helpers import SMALLEST as CONFIG

SETTINGS = {"num_steps": 1, "seq_len": 16, "batch_size": 3, "eval_every": 0}
OWN_SIZES = dataclasses.replace(CONFIG, attention="sparsek:k3:w4")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """Makes A/data and B/data, and run/, trained on A/data in another thread from inside A."""
  folder = tmp_path_factory.mktemp("arguments")
  for name, word in (("A", "Document"), ("B", "Something else")):
    documents = [Document(str(i), f"{word} {i}: {i**7}.\n" * 4, i % 2 == 0) for i in range(40)]
    (folder / name).mkdir()
    write_token_files(str(folder / name / "data"), documents, ByteTokenizer())
  before, results = os.getcwd(), []
  os.chdir(folder / "A")
  try:
    thread = threading.Thread(
      target=lambda: results.append(programs.train(OWN_SIZES, "data", "../run", **SETTINGS))
    )
    thread.start()
    thread.join()
  finally:
    os.chdir(before)
  assert results[0].step == 1, "training in a thread that gets no signals"
  return folder


@pytest.fixture(scope="module")
def run(folder):
  return programs.load(folder / "run")


def test_a_run_is_evaluated_on_the_data_it_was_trained_on_from_any_folder(folder, monkeypatch):
  monkeypatch.chdir(folder)
  loaded = programs.load("run")
  monkeypatch.chdir(folder / "B")
  assert loaded.workdir == str(folder / "run")
  result = programs.evaluate(loaded, eval_batches=1)
  assert result["data"]["data"] == str(folder / "A" / "data")
  other = programs.evaluate(loaded, "data", eval_batches=1)
  assert other["data"]["data"] == str(folder / "B" / "data") and other["loss"] != result["loss"]


def test_paths_of_settings_are_absolute(folder, monkeypatch):
  monkeypatch.chdir(folder)
  monkeypatch.setattr(programs.loop, "train", lambda *arguments: arguments)
  more = {"init_from": "run@1", "distill_from": "hf:teacher", "distill": 0.5}
  _, train_config, _ = programs.train(CONFIG, "A/data", "~/new", **SETTINGS, **more)
  assert train_config.data.data == str(folder / "A" / "data")
  assert train_config.workdir == os.path.expanduser("~/new")
  assert train_config.init_from == f"{folder}/run@1"
  assert train_config.distill_from == f"hf:{folder}/teacher"


@pytest.mark.parametrize(
  "name, value, words",
  [
    ("num_steps", "3", "num_steps='3' must be an integer of at least 1"),
    ("num_steps", 2.5, "num_steps=2.5 must be an integer of at least 1"),
    ("warmup_steps", 0.5, "warmup_steps=0.5 must be an integer"),
    ("seed", 2**40, "seed=1099511627776 must be at most 2147483647"),
    ("seq_len", 16.0, "seq_len=16.0 must be an integer"),
    ("seq_len", 10**6, "seq_len=1000000 needs at least"),
    ("segment_documents", "no", "segment_documents='no' must be True or False"),
    ("fsdp", 64, "fsdp=64 x context=1 must divide"),
    ("init_from", "", "init_from='': must be a path"),
    ("init_from", "nowhere", "init_from=/.*nowhere: there is no folder"),
    ("config", "tiny", "config='tiny' must be a TransformerConfig"),
    ("data", None, "data=None must be a path"),
    ("data", "gs://a/b", "data='gs://a/b': gs: URLs are not supported"),
    ("workdir", "", "workdir='': must be a path, it is empty"),
  ],
)
def test_train_names_the_argument_that_is_wrong(folder, name, value, words):
  arguments = {"config": CONFIG, "data": folder / "A" / "data", "workdir": folder / "new"}
  with pytest.raises(ValueError, match=f"^{words}"):
    programs.train(**{**arguments, **SETTINGS, name: value})


@pytest.mark.parametrize(
  "call, name, value, words",
  [
    (programs.evaluate, "seq_len", 0, "seq_len=0 must be at least 1"),
    (programs.evaluate, "seq_len", 32.0, "seq_len=32.0 must be an integer"),
    (programs.evaluate, "seq_len", 10**7, "seq_len=10000000 must be at most"),
    (programs.evaluate, "batch_size", 0, "batch_size=0 must be at least 1"),
    (programs.evaluate, "eval_batches", 1.5, "eval_batches=1.5 must be an integer"),
    (programs.evaluate, "eval_batches", 0, "eval_batches=0 must be at least 1"),
    (programs.evaluate, "loss_chunk", 0, "loss_chunk=0 must be at least 1"),
    (programs.evaluate, "data", "", "data='': must be a path, it is empty"),
    (programs.evaluate, "k", 300, "k=300 has no effect: each layer of attention=sparsek:k3:w4 has"),
    (programs.generate, "window", 2, "window=2 has no effect: each layer"),
    (programs.generate, "top_k", 1.5, "top_k=1.5 must be an integer of at least 0"),
    (programs.generate, "top_p", 0, "top_p=0 must be above 0 and at most 1"),
    (programs.generate, "max_new_tokens", 2.5, "max_new_tokens=2.5 must be an integer"),
    (programs.generate, "seed", 2**70, "seed=.* must be at most 2147483647"),
    (programs.generate, "prompt", None, "prompt=None must be a string"),
    (programs.generate, "stop", None, "stop=None must be a sequence of texts"),
    (programs.generate, "special_tokens", "no", "special_tokens='no' must be True or False"),
  ],
)
def test_what_is_no_value_of_an_argument_is_refused_by_its_name(run, call, name, value, words):
  with pytest.raises(ValueError, match=f"^{words}"):
    call(run, **{name: value})


def test_a_run_is_shown_in_a_line(run):
  assert repr(run) == (
    f"LoadedRun(workdir={run.workdir!r}, step=1, {count_params(run.params):,} parameters, "
    "tokenizer='byte')"
  )


def test_load_names_what_it_cannot_take(folder):
  path = folder / "run"
  for words, workdir, more in (
    ("step=10.0 must be an integer", path, {"step": 10.0}),
    ("k='4' must be an integer", path, {"k": "4"}),
    ("window=1 has no effect: each layer", path, {"window": 1}),
    ("workdir='': must be a path, it is empty", "", {}),
    ("workdir=None must be a path", None, {}),
  ):
    with pytest.raises(ValueError, match=f"^{words}"):
      programs.load(workdir, **more)
  with pytest.raises(UsageError, match="^run='': must be a path"):
    programs.evaluate("")


def test_a_cache_and_a_session_have_whole_numbers_of_rows(run):
  for make in (lambda: init_cache(run.config, 1.5), lambda: Session(run.config, run.params, 1.5)):
    with pytest.raises(ValueError, match="batch_size=1.5 must be an integer"):
      make()


class _FourDevices:
  """A mesh of four devices, as far as the choice of rows looks at it."""

  size, shape = 4, make_mesh().shape


def test_the_batch_of_an_evaluation_is_a_multiple_of_the_devices(run):
  record = run_record.load_run_config(run.workdir)[1]
  runs = [heldout.Run(run.workdir, run.config, record)]
  assert record["data"]["batch_size"] == 3
  assert heldout.heldout_rows(runs, _FourDevices, 1)[1].batch_size == 4
  with pytest.raises(UsageError, match="batch_size=6 must be a multiple of 4"):
    heldout.heldout_rows(runs, _FourDevices, 1, batch_size=6)


def test_a_batch_has_no_more_rows_than_there_are(run):
  wanted = programs.evaluate(run, batch_size=1000)
  result = programs.evaluate(run, batch_size=10**6)
  assert result["data"]["batch_size"] == wanted["data"]["batch_size"] < 1000
  assert result["loss"] == wanted["loss"]
  split = programs.evaluate(run, batch_size=8, eval_batches=1000)
  assert result["num_targets"] == split["num_targets"]


def test_rows_that_memory_does_not_hold_are_said(run, monkeypatch):
  def too_large(*_):
    raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes")

  monkeypatch.setattr(loss_by_position, "put_batch", too_large)
  with pytest.raises(RunError, match="^memory does not hold batch_size=3 rows of seq_len=16"):
    programs.evaluate(run)
