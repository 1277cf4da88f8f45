"""Evaluation and generation over many devices agree with one device."""

import json

import pytest

from tests.commands import ROOT, run_forked


@pytest.fixture(scope="module")
def output(tmp_path_factory):
  """Returns what `tests.parallel.sharded_use` writes, from a process with 8 devices."""
  folder = tmp_path_factory.mktemp("sharded")
  done = run_forked(["tests.parallel.sharded_use", str(folder / "output.json")], ROOT, folder)
  assert done.returncode == 0, done.stderr
  return json.loads((folder / "output.json").read_text())


@pytest.mark.slow
def test_held_out_losses(output):
  one, many = output["evaluations"]
  assert many["losses"] == pytest.approx(one["losses"], rel=2e-6)
  assert many["losses of documents"] == pytest.approx(one["losses of documents"], rel=2e-6)
  assert many["documents"] == one["documents"] and all(len(i) > 3 for i, _ in one["documents"])
  assert many["targets"] == one["targets"] and len(set(one["losses"])) == len(one["losses"])


@pytest.mark.slow
def test_answers_to_tasks(output):
  one, many = output["evaluations"]
  assert many["answers"] == one["answers"]


@pytest.mark.slow
def test_texts_and_the_cache_after_a_sharded_prompt(output):
  one, many = output["turns"]
  assert many == one
  assert output["cache"] < 2e-5


@pytest.mark.slow
def test_log_likelihoods_after_sharded_contexts(output):
  one, many = output["likelihoods"]
  assert many == pytest.approx(one, rel=1e-5) and len(set(one)) == len(one) == 6
