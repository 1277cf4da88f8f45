"""Runs docs/layer.md and docs/examples/, each as a reader would."""

import importlib.util
import pathlib
import re
import runpy

import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers import restored_registries

DOCS = pathlib.Path(__file__).resolve().parent.parent / "docs"
EXAMPLES = sorted((DOCS / "examples").glob("*.py"))


def run(name):
  with restored_registries():
    return runpy.run_path(str(DOCS / "examples" / f"{name}.py"))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_examples_are_short(path):
  assert len(path.read_text().splitlines()) <= 30


def test_nnx_layer():
  losses = run("nnx_layer")["losses"]
  assert losses[-1] < losses[0]


def test_own_scorer():
  names = run("own_scorer")
  assert names["params"]["scorer"]["Dense_1"]["kernel"].shape == (32, 16)
  assert names["cache"].seen.tolist() == [40] and jnp.all(jnp.isfinite(names["y"]))


def test_own_attention():
  assert jnp.all(jnp.isfinite(run("own_attention")["logits"]))


def test_equinox_layer():
  names = run("equinox_layer")
  assert names["layer"](names["x"]).shape == names["x"].shape
  assert jnp.mean(names["layer"](names["x"]) ** 2) < names["loss"]


def test_python_of_the_page():
  page = (DOCS / "layer.md").read_text()
  names, skipped = {}, []
  for block in re.findall(r"```python\n(.*?)```", page, re.S):
    if "equinox" in block and not importlib.util.find_spec("equinox"):
      skipped.append(block)
      continue
    exec(compile(block, "layer.md", "exec"), names)
  assert len(skipped) <= 1
  assert names["y_linen"].shape == names["y_nnx"].shape == names["x"].shape
  assert names["kernel"].shape == (64, 4, 16)
  np.testing.assert_allclose(names["first"], names["y"][:, :64], atol=3e-6)
  np.testing.assert_allclose(names["y_t"], names["y"][:, 95], atol=3e-6)
  if not skipped:
    np.testing.assert_allclose(names["y_equinox"], names["y"], atol=3e-6)


def test_links_of_the_page_exist():
  targets = re.findall(r"\]\(([^)#]+)\)", (DOCS / "layer.md").read_text())
  assert len(targets) >= 4 and all((DOCS / target).exists() for target in targets)
