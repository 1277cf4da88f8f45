"""Training over any mesh gives what one device gives, and a run may move between meshes."""

import json

import numpy as np
import pytest

from sparsek.config import TransformerConfig
from sparsek.errors import UsageError
from sparsek.parallel.mesh import make_mesh
from sparsek.parallel.sharding import split_axis
from sparsek.training.checks import check_context
from tests.commands import ROOT, run_forked
from tests.parallel.sharded_steps import CASES


@pytest.fixture(scope="module")
def results(tmp_path_factory):
  """Returns what `tests.parallel.sharded_steps` writes, from a process with 8 devices."""
  folder = tmp_path_factory.mktemp("steps")
  done = run_forked(["tests.parallel.sharded_steps", str(folder)], ROOT, folder)
  assert done.returncode == 0, done.stderr
  return json.loads((folder / "result.json").read_text())


@pytest.mark.slow
@pytest.mark.parametrize("index", range(len(CASES)), ids=[str(case) for case in CASES])
def test_a_step_gives_what_one_device_gives(results, index):
  result = results["steps"][index]
  limits = {"gradients": 1e-5}
  assert {
    kind: x for kind, x in result["differences"].items() if not x < limits.get(kind, 2e-6)
  } == {}


@pytest.mark.slow
@pytest.mark.parametrize("index", range(len(CASES)), ids=[str(case) for case in CASES])
def test_a_device_holds_its_part_of_the_moments(results, index):
  result = results["steps"][index]
  fsdp = result["case"][1][1]
  assert 1 / fsdp <= result["bytes"] < 1.1 / fsdp


@pytest.mark.slow
def test_a_folder_is_read_onto_a_mesh(results):
  assert results["imported"]


@pytest.mark.slow
def test_a_run_moves_between_meshes(results):
  """Every checkpoint is verified by its checksums when another mesh restores it."""
  assert len(results["moved"]) == 3
  np.testing.assert_allclose(results["moved"], results["stayed"], rtol=1e-6)


def test_the_largest_axis_that_fits_is_split():
  assert split_axis((6, 4, 8), 2) == 2
  assert split_axis((6, 4, 9), 3) == 2
  assert split_axis((8, 8), 2) == 0
  assert split_axis((5, 7), 2) is None and split_axis((), 2) is None and split_axis((8,), 1) is None


def test_meshes_that_do_not_fit_are_refused():
  devices = make_mesh().devices.reshape(-1)
  with pytest.raises(UsageError, match="--fsdp=3 x --context=1 must divide the number of devices"):
    make_mesh(3, 1, devices[:1])
  mesh = make_mesh(devices=list(devices[:1]))
  check_context(TransformerConfig(attention="lsh"), mesh, 7)
