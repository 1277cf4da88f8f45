"""The speed that training reports: that of whole steps, on a simulated clock and devices."""

import contextlib
import io
import itertools
import math
import os
import re
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsek.config import DataConfig, OptimizerConfig, TrainConfig, TransformerConfig
from sparsek.data.batches import open_data
from sparsek.data.corpus import Document
from sparsek.data.token_files import write_token_files
from sparsek.data.tokenizer import ByteTokenizer
from sparsek.runs import metrics
from sparsek.runs.metrics import Progress, read_metrics
from sparsek.training import loop, report, start
from sparsek.training.document_losses import LossSums
from sparsek.training.start import Start

CONFIG = TransformerConfig(
  vocab_size=257,
  num_layers=1,
  embed_dim=8,
  num_heads=2,
  num_kv_heads=1,
  head_dim=4,
  mlp_dim=8,
  attention="sparsek",
  k=4,
  window=4,
)
TOKENS = 2 * 16  # of a step
STEP, DIAGNOSIS = 4.0, 2.0  # seconds on the devices
COMPILING, EVALUATING, SAVING, PROFILING = 1e3, 1e4, 1e5, 1e6  # seconds of the host


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
  folder = str(tmp_path_factory.mktemp("data") / "tokens")
  texts = ["some text, " * 6] * 20
  documents = [Document(str(i), text, i >= 16) for i, text in enumerate(texts)]
  write_token_files(folder, documents, ByteTokenizer())
  return open_data(folder)


def run_config(workdir, num_steps, **fields):
  optimizer = OptimizerConfig(learning_rate=0.01, warmup_steps=0, num_steps=num_steps)
  data = DataConfig(data="d", seq_len=16, batch_size=2)
  return TrainConfig(workdir=str(workdir), optimizer=optimizer, data=data, **fields)


def not_compiled(*_, **__):
  """Lowers a program to one whose compilation takes no time."""
  return SimpleNamespace(compile=lambda: None)


def losses(mean):
  """Returns the held-out losses of a document of one target."""
  sums = LossSums()
  sums.add(np.array([0]), np.array([mean]))
  return sums


class Simulation:
  """Devices that work through what they are given, and a clock for them and the host.

  Args:
    step: that the run resumes.
    fetching: seconds of the host for a batch.
    waits: the host waits for each program, as for small ones on a CPU; else it goes on.
  """

  def __init__(self, step, fetching, waits):
    self.now, self._idle_from = 0.0, 0.0
    self._ends, self._compiled = [], set()
    self._step, self._fetching, self._waits = step, fetching, waits

  def host(self, seconds, result=None):
    """Returns a function of the host that takes some seconds."""

    def function(*_, **__):
      self.now += seconds
      return result

    return function

  def device(self, seconds, result):
    """Returns a program of the devices, as `jax.jit` would: it compiles at its first call."""

    def program(*_, **__):
      if program not in self._compiled:
        self._compiled.add(program)
        self.now += COMPILING
      self._idle_from = max(self.now, self._idle_from) + seconds
      figures = {name: jnp.float32(value) for name, value in result.items()}
      self._ends.append((figures, self._idle_from))
      if self._waits:
        self.now = self._idle_from
      return figures

    program.lower = not_compiled
    return program

  def device_get(self, tree):
    """Waits for the program whose result this is."""
    for figures, end in self._ends:
      if figures is tree:
        self.now = max(self.now, end)
    return jax.device_get(tree)

  def train_step(self, *_):
    program = self.device(STEP, {"loss": 5.0, "grad_norm": 1.0})

    def step(state, *args, **kwargs):
      return state, program()

    step.lower = not_compiled
    return step

  def restore(self, setups, say):
    state = SimpleNamespace(params={}, opt_state=(), spikes=())
    return Start(self._step, None, state, setups[0].iterator.get_state(), 0, (), {})

  def install(self, patch):
    """Replaces the clock and everything that takes time."""
    clock = SimpleNamespace(perf_counter=lambda: self.now)
    patch.setattr(metrics, "time", clock)
    patch.setattr(report, "jax", SimpleNamespace(devices=jax.devices, device_get=self.device_get))
    patch.setattr(report.flops, "peak", lambda _: 1e6)
    patch.setattr(start, "make_train_step", self.train_step)
    patch.setattr(
      start, "make_diagnose", lambda *_: self.device(DIAGNOSIS, {"layer_0/gate_mass": 0.5})
    )
    patch.setattr(loop, "restore_or_init", self.restore)
    patch.setattr(loop, "write_records", self.host(SAVING))
    patch.setattr(loop, "put_batch", self.host(self._fetching))
    patch.setattr(loop, "first_row", self.host(0.0))
    patch.setattr(loop, "heldout_losses", self.host(EVALUATING, losses(5.0)))
    patch.setattr(loop._Run, "save", self.host(SAVING))
    patch.setattr(loop.Saver, "close", self.host(SAVING))
    patch.setattr(jax.profiler, "start_trace", self.host(PROFILING))
    patch.setattr(jax.profiler, "stop_trace", self.host(PROFILING))


EVENTS = {"eval_every": 3, "checkpoint_every": 2, "profile_steps": "3:5"}
RUNS = itertools.product((0, 4), (1, 2, 3, 9), (1, 2, 5), ({}, EVENTS), (False, True))
DEVICES = itertools.cycle([(0.0, False), (0.0, True), (1.0, False), (9.0, False), (9.0, True)])


def test_the_speed_is_that_of_whole_steps_that_were_waited_for(
  dataset, tmp_path, monkeypatch, capsys
):
  """Neither compiling nor anything else the host does between steps counts, wherever it falls."""
  for number, (run, devices) in enumerate(zip(RUNS, DEVICES)):
    step, made, log_every, events, stop_at = run
    last = step + made
    num_steps = last + 2 * stop_at
    fields = {"log_every": log_every, "eval_every": 0, **events}
    if num_steps < 5:
      fields.pop("profile_steps", None)
    config = run_config(
      tmp_path / str(number), num_steps, stop_at=last if stop_at else None, **fields
    )
    with monkeypatch.context() as patch:
      Simulation(step, *devices).install(patch)
      assert loop.train(CONFIG, config, dataset).step == last
    lines = capsys.readouterr().err.splitlines()
    shown = {
      int(found[1]): line for line in lines if (found := re.match(r"step (\d+)/\d+  loss", line))
    }
    records = read_metrics(os.path.join(config.workdir, "metrics.jsonl"))
    logged = {record["step"]: record for record in records if "loss" in record}
    expected = [s for s in range(step + 1, last + 1) if s in (1, num_steps) or not s % log_every]
    assert list(logged) == list(shown) == expected
    lap_begins, (fetching, waits) = step + 1, devices
    for s in expected:
      line = shown[s]
      if s == step + 1:
        assert not {"tokens_per_second", "mfu"} & logged[s].keys()
        assert line == f"step {s}/{num_steps}  loss 5.0000"
        continue
      seconds = TOKENS / logged[s]["tokens_per_second"]
      longest = fetching + STEP + DIAGNOSIS / (s - lap_begins)
      shortest = longest if waits else max(fetching, longest - fetching)
      assert shortest - 1e-6 <= seconds <= longest + 1e-6, (run, devices, s)
      assert 0 < logged[s]["mfu"] < math.inf
      left = int(seconds * (num_steps - s) + 1e-6)
      assert f"  {TOKENS / seconds:,.0f} tokens/s, " in line
      assert line.endswith(f" MFU  {left // 60:02d}:{left % 60:02d} left")
      lap_begins = s


def test_nothing_is_compiled_while_the_time_runs(dataset, tmp_path, monkeypatch):
  """A real run, from its first step, and resumed before a step that is not logged."""
  running, inside, outside = [False], [], []

  class Watched(report.Stopwatch):
    @contextlib.contextmanager
    def paused(self):
      running[0] = False
      with super().paused():
        yield
      running[0] = True

  class Run(loop._Run):
    def loop(self):
      super().loop()
      running[0] = False

    def _dispatch(self, batch):
      result = super()._dispatch(batch)
      running[0] = True  # once the first step is compiled
      return result

  def listen(event, seconds, **about):
    if event.endswith("backend_compile_duration"):
      (inside if running[0] else outside).append(about.get("fun_name"))

  settings = {"log_every": 2, "eval_every": 2, "checkpoint_every": 3}
  monkeypatch.setattr(report, "Stopwatch", Watched)
  monkeypatch.setattr(loop, "_Run", Run)
  jax.monitoring.register_event_duration_secs_listener(listen)
  try:
    for stop_at in (4, None):
      loop.train(CONFIG, run_config(tmp_path, 8, stop_at=stop_at, **settings), dataset)
  finally:
    jax.monitoring.unregister_event_duration_listener(listen)
  for program in ("train_step", "diagnose", "eval_step"):
    assert sum(program in name for name in outside) == 2
  assert inside == []


class Terminal(io.StringIO):
  """A stream that says it is a terminal."""

  def isatty(self):
    return True


def test_the_bar_of_a_terminal_claims_no_speed_but_the_measured_one():
  terminal = Terminal()
  progress = Progress(3, 9, terminal)
  progress.step(4)
  progress.log(4, 5.0)
  claims = r"/s|s/|it|left|<|\?"
  assert "4/9 [00:00, loss 5.0000]" in terminal.getvalue()
  assert not re.search(claims, terminal.getvalue())
  progress.step(5)
  progress.log(5, 4.0, 1234.5, 2.0, 0.25)
  progress.close()
  last = terminal.getvalue().split("\r")[-1]
  assert ", loss 4.0000, 1,234 tokens/s, 25.0% MFU, 00:08 left]" in last
