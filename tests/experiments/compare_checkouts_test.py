"""Two checkouts side by side: what counts as the same program, and what is refused."""

import json

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from sparsek.experiments.bench import compare_checkouts
from sparsek.experiments.bench.checkouts import access, programs, report
from sparsek.experiments.bench.checkouts.report import ProgramPair, canonical

PROGRAM = """\
#loc1 = loc("step.py":3:0)
module @jit_step attributes {mhlo.num_partitions = 1 : i32} {
  func.func public @main(%arg0: tensor<4xf32>) -> (tensor<4xf32> {jax.result_info = "[0].a"}) {
    %0 = call @_where(%arg0) : (tensor<4xf32>) -> tensor<4xf32> loc(#loc1)
    %1 = call @"<lambda>"(%0) : (tensor<4xf32>) -> tensor<4xf32> loc("f"(#loc1))
    %2 = stablehlo.custom_call @Sharding(%1) : (tensor<4xf32>) -> tensor<4xf32>
    return %2 : tensor<4xf32>
  }
  func.func private @_where(%arg0: tensor<4xf32>) -> tensor<4xf32> {
    %0 = stablehlo.exponential %arg0 : tensor<4xf32>
    return %0 : tensor<4xf32>
  }
  func.func private @"<lambda>"(%arg0: tensor<4xf32>) -> tensor<4xf32> {
    %0 = stablehlo.add %arg0, %arg0 : tensor<4xf32>
    return %0 : tensor<4xf32>
  }
}
"""


def test_names_and_locations_do_not_count():
  other = PROGRAM.replace("jit_step", "jit_train_step").replace("@_where", "@choose")
  other = other.replace('@"<lambda>"', "@double.1").replace("[0].a", "[0].b")
  other = other.replace("step.py", "training/step.py").replace(":3:0", ":7:2")
  assert other != PROGRAM and canonical(other) == canonical(PROGRAM)
  assert "loc" not in canonical(PROGRAM) and "@main" in canonical(PROGRAM)
  assert "call @f0" in canonical(PROGRAM) and "custom_call @Sharding" in canonical(PROGRAM)


@pytest.mark.parametrize(
  "old, new",
  [
    ("stablehlo.exponential", "stablehlo.tanh"),
    ('call @"<lambda>"', "call @_where"),  # another function, though each is called by some name
    ("@Sharding", "@Other"),
    ("num_partitions = 1", "num_partitions = 2"),
  ],
)
def test_what_is_computed_counts(old, new):
  changed = PROGRAM.replace(old, new)
  assert changed != PROGRAM and canonical(changed) != canonical(PROGRAM)


def test_program_table_shows_the_first_difference():
  reply = {"text": PROGRAM, "kernels": []}
  changed = {"text": PROGRAM.replace("exponential", "tanh"), "kernels": []}
  pairs = [
    report.pair_programs("same", reply, reply),
    report.pair_programs("changed", reply, changed),
    report.pair_programs("failed", {"error": "why not"}, {"error": "why not"}),
  ]
  assert [pair.equal for pair in pairs] == [True, False, False]
  table = "\n".join(report.program_table(pairs))
  assert "same     yes" in table and "changed  NO" in table and "failed   NO" in table
  assert "- %0 = stablehlo.exponential" in table and "+ %0 = stablehlo.tanh" in table
  assert "before: why not" in table and "after: why not" in table


def lower_kernel(body):
  """Returns what a worker answers for a kernel that is lowered for a GPU."""
  shape = jax.ShapeDtypeStruct((128, 128), jnp.float32)
  kernel = plgpu.kernel(body, out_type=shape, grid=(1,), grid_names=("block",))
  lowered = jax.jit(lambda x: kernel(x)).trace(shape).lower(lowering_platforms=("cuda",))
  text, kernels = programs.take_kernels(lowered.as_text())
  return {"text": text, "kernels": kernels}


def test_bodies_of_kernels_count_but_not_their_names_and_lines():
  def double(x_ref, out_ref):
    out_ref[...] = x_ref[...] * 2

  def moved(x_ref, out_ref):
    out_ref[...] = x_ref[...] * 2

  def triple(x_ref, out_ref):
    out_ref[...] = x_ref[...] * 3

  replies = [lower_kernel(body) for body in (double, moved, triple)]
  assert [len(reply["kernels"]) for reply in replies] == [1, 1, 1]
  assert "module = " not in replies[0]["text"]
  assert report.pair_programs("renamed", *replies[:2]).equal
  assert not report.pair_programs("another", *replies[1:]).equal


def test_differences_are_shown_around_their_column():
  before, after = "x" * 1000 + "A", "x" * 1000 + "B"
  lines = report.first_differences(before, after)
  assert lines[0].endswith("column 1001") and lines[1].endswith("xA") and lines[2].endswith("xB")
  assert len(lines[1]) < 200
  assert report.first_differences("a", "a\nb")[2].endswith("+ b")
  assert not ProgramPair("none", None, None).equal


def test_ratios_of_samples():
  before, after = [1.0, 2.0, 3.0, 4.0, 100.0], [1.1, 2.2, 3.3, 4.4, 110.0]
  result = report.compare_samples(before, after)
  assert (result.before, result.after) == pytest.approx((3000, 3300))
  assert tuple(result[2:]) == pytest.approx((1.1, 1.1, 1.1))  # rounds are drawn as pairs
  noisy = report.compare_samples([1.0] * 20, [0.98, 1.02] * 10)
  assert 0.98 <= noisy.low < noisy.ratio < noisy.high <= 1.02
  with pytest.raises(ValueError):
    report.compare_samples([1.0, 2.0], [1.0])


def test_time_table_and_record():
  row = {"operation": "attention", "calls": 3, "before": [0.001, 0.001], "after": [0.002, 0.002]}
  failed = {"operation": "step", "error": "before: out of memory"}
  header, timed, other = report.time_table([row, failed])
  assert timed.split() == ["attention", "1.0000", "2.0000", "2.0000", "2.0000..2.0000", "2"]
  assert header.startswith("operation") and other.split("  ")[-1].endswith("before: out of memory")
  record = json.loads(json.dumps(report.record_row(row)))
  assert (record["before_ms"], record["after_ms"], record["ratio"]) == (1, 2, 2)
  assert record["samples"] == {"before": row["before"], "after": row["after"]}
  assert record["interval"] == [2, 2] and report.record_row(failed) == failed


class FakeWorker:
  """A worker that writes down what it is asked."""

  def __init__(self, name, log, calls, fails=""):
    self.name, self._log, self._calls, self._fails = name, log, calls, fails

  def ask(self, action, **arguments):
    self._log.append((self.name, action, arguments.get("calls")))
    if action == self._fails:
      return {"error": "out of memory"}
    return {"calls": self._calls, "seconds": 0.5}


def test_rounds_alternate_with_as_many_calls():
  log = []
  workers = [FakeWorker("before", log, 5), FakeWorker("after", log, 7)]
  row = compare_checkouts.sample_rounds(workers, "step", 3)
  assert row == {"operation": "step", "calls": 7, "before": [0.5] * 3, "after": [0.5] * 3}
  assert [name for name, action, _ in log if action == "sample"] == [
    "before", "after", "after", "before", "before", "after"]  # fmt: skip
  assert {calls for _, action, calls in log if action == "sample"} == {7}
  assert [action for _, action, _ in log[:2]] == ["prepare"] * 2
  assert [action for _, action, _ in log[-2:]] == ["release"] * 2


@pytest.mark.parametrize("action", ["prepare", "sample"])
def test_what_cannot_be_timed_is_said_and_released(action):
  log = []
  workers = [FakeWorker("before", log, 1), FakeWorker("after", log, 1, fails=action)]
  row = compare_checkouts.sample_rounds(workers, "step", 2)
  assert row == {"operation": "step", "error": "after: out of memory"}
  assert [entry[:2] for entry in log[-2:]] == [("before", "release"), ("after", "release")]


def make_checkout(folder, kernels=None):
  """Returns a folder with the least that a worker imports; `kernels` is what a link leads to."""
  (folder / "sparsek").mkdir(parents=True)
  (folder / "sparsek" / "__init__.py").write_text("print('printed while importing')\n")
  (folder / "kernels").mkdir()
  for name in ("__init__.py", "reference.py"):
    (folder / "kernels" / name).touch()
  (folder / "sparsek" / "kernels").symlink_to(kernels or "../kernels", target_is_directory=True)
  return folder


def test_the_files_of_another_checkout_are_refused(tmp_path, capfd):
  before = make_checkout(tmp_path / "before")
  after = make_checkout(tmp_path / "after", kernels=before / "kernels")
  assert compare_checkouts.main([str(before), str(after), "--program"]) == 2
  error = capfd.readouterr().err
  assert f"error: {after}: its process imports sparsek.kernels from" in error
  assert f"{before}/kernels/__init__.py, not from its own checkout; make the link" in error


def test_origin_of_modules(tmp_path):
  checkout, other = make_checkout(tmp_path / "a"), make_checkout(tmp_path / "b")
  files = {"sparsek": str(checkout / "sparsek" / "__init__.py"),
           "sparsek.kernels": str(checkout / "sparsek" / "kernels" / "__init__.py")}  # fmt: skip
  compare_checkouts.check_origin(checkout, {"files": files})
  for module, file in (
    ("sparsek.training", other / "sparsek" / "training.py"),
    ("sparsek", checkout / ".venv" / "site-packages" / "sparsek" / "__init__.py"),
  ):
    with pytest.raises(compare_checkouts.RefusedError, match=f"imports {module} from"):
      compare_checkouts.check_origin(checkout, {"files": files | {module: str(file)}})
  with pytest.raises(compare_checkouts.RefusedError, match="cannot be imported: no jax"):
    compare_checkouts.check_origin(checkout, {"error": "no jax"})


def test_a_name_is_looked_for_in_the_checkout_only(tmp_path, monkeypatch):
  installed, checkout = tmp_path / "installed", tmp_path / "checkout"
  for folder, name in ((installed, "moved_new"), (checkout, "moved_old")):
    folder.mkdir()
    (folder / f"{name}.py").write_text(f"place = '{name}'\n")
    monkeypatch.syspath_prepend(folder)
  monkeypatch.chdir(checkout)
  assert access.find("place", "moved_new", "moved_old") == "moved_old"
  with pytest.raises(LookupError, match="moved_new, moved_old has missing"):
    access.find("missing", "moved_new", "moved_old")


@pytest.mark.parametrize(
  "arguments, message",
  [
    ([], "one of the arguments --program --time is required"),
    (["--program", "--time"], "not allowed with argument --program"),
    (["--time", "--suite=attention,dense"], "'dense' must be one of attention, train, decode"),
    (["--time", "--rounds=0"], "0 must be a positive integer"),
    (["--time", "--record=x.txt"], "x.txt: must be a .json file"),
    (["--time", "--commits=abc"], "abc: must be two commits"),
  ],
)
def test_bad_arguments(arguments, message, tmp_path, capsys):
  checkout = str(make_checkout(tmp_path / "checkout"))
  with pytest.raises(SystemExit) as exit_:
    compare_checkouts.main([checkout, checkout, *arguments])
  assert exit_.value.code == 2 and message in capsys.readouterr().err


def test_a_dump_replaces_only_texts_of_programs(tmp_path, capsys):
  checkout, folder = str(make_checkout(tmp_path / "checkout")), tmp_path / "dump"
  dump = lambda: compare_checkouts.make_parser().parse_args(
    [checkout, checkout, "--program", f"--dump={folder}"]
  )
  assert dump().dump == folder
  folder.mkdir()
  for name in ("step.before.mlir", "attention_xla.after.mlir"):
    assert dump().dump == folder
    (folder / name).touch()
  (folder / "notes.mlir").touch()
  folder_and_files = [(folder, "holds notes.mlir, and not only texts of programs")]
  for name, text in (("file", "a"), ("link", "")):
    path = tmp_path / name
    path.write_text(text) if text else path.symlink_to("nowhere")
    folder_and_files.append((path, "is a file, it must be a folder"))
  for folder, message in folder_and_files:
    with pytest.raises(SystemExit) as exit_:
      dump()
    assert exit_.value.code == 2
    assert f"argument --dump: {folder} {message}" in capsys.readouterr().err
  # below a file no folder can be made
  folder = tmp_path / "file" / "dump"
  assert compare_checkouts.main([checkout, checkout, "--program", f"--dump={folder}"]) == 2
  assert f"error: --dump={folder} cannot be made: Not a directory" in capsys.readouterr().err


def test_a_folder_that_is_no_checkout(tmp_path, capsys):
  with pytest.raises(SystemExit) as exit_:
    compare_checkouts.main([str(tmp_path), str(tmp_path), "--program"])
  assert exit_.value.code == 2 and "there is no checkout of this project" in capsys.readouterr().err
