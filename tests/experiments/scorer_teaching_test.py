"""The recipe that compares what scorers are taught: its documents, its record and its table."""

import json

import jax
import numpy as np
import pytest

from sparsek.errors import UsageError
from sparsek.experiments.recipes import scorer_teaching as recipe

SMALL = "--length=48 --keys=4 --k=3 --window=2 --width=32 --batch_size=2"


def options(*words):
  return recipe.make_parser().parse_args([*SMALL.split(), *words])


@pytest.mark.parametrize("alike", (False, True))
def test_every_question_is_answered_by_a_fact_before_it(alike):
  batch, kinds = recipe.documents(np.random.default_rng(0), 20, 48, 4, alike)
  first_question = recipe.FILLER + recipe.VALUES
  for row, kind in zip(batch["tokens"], kinds):
    facts = row - first_question - 4
    asked = [int(key) for key in row[np.flatnonzero(kind) - 1] - first_question]
    for position, key in zip(np.flatnonzero(kind), asked):
      found = np.flatnonzero(facts // recipe.VALUES == key)
      (at,) = found[facts[found] >= 0]
      assert at < 24 <= position - 1
      assert row[position] - recipe.FILLER == facts[at] % recipe.VALUES
      assert kind[position] == (1 if key == 0 else 2)
    assert len(asked) == 7 and (alike or sorted(asked) == [0, 0, 0, 0, 1, 2, 3])
    assert np.all(row < recipe.vocabulary(4))


def test_a_killed_recipe_goes_on_where_it_was(tmp_path, monkeypatch, capsys):
  record, trained = tmp_path / "record.json", []

  def untrained(options, config, train, *rest, **more):
    def learn(params, seed, teacher):
      trained.append((config.attention, config.scorer_target, seed))
      if len(trained) == 4:
        raise KeyboardInterrupt
      return params

    return learn

  monkeypatch.setattr(recipe, "trainer", untrained)
  monkeypatch.setattr(recipe, "VARIANTS", {"default": {}, "max": {"scorer_target": "max"}})
  given = options(f"--record={record}", "--seeds=2")
  with pytest.raises(KeyboardInterrupt):
    recipe.main(given)
  assert {name: list(x) for name, x in json.loads(record.read_text())["runs"].items()} == {
    "default": ["0"],
    "max": ["0"],
  }
  recipe.main(given)
  assert capsys.readouterr().out.count("| minus the default | ") == 1
  dense = ("full",)
  assert [kind for kind, *_ in trained].count(dense) == 3  # the first, the killed one, again
  assert trained[-2:] == [(("sparsek",), "mean", 1), (("sparsek",), "max", 1)]
  number = len(trained)
  recipe.main(given)
  assert len(trained) == number
  with pytest.raises(UsageError, match="was made with"):
    recipe.main(options(f"--record={record}", "--k=2"))


def test_a_variant_learns_from_the_dense_model():
  given = options("--steps=2")
  dense = recipe.model(given, attention="full")
  start = recipe.first_params(given, dense, 0)
  table = start["embed"]["embedding"]
  question = recipe.FILLER + recipe.VALUES
  fact = question + 4 + 2 * recipe.VALUES + 1  # of key 2 and value 1
  np.testing.assert_allclose(table[fact], table[question + 2] + table[recipe.FILLER + 1])
  config = recipe.model(given, implementation="reference")
  train = recipe.run_of(given, 2, **recipe.VARIANTS["distill"])
  learn = recipe.trainer(given, config, train, dense)
  before = recipe.with_scorers(config, start, 0)
  after = learn(before, 0, start)
  assert all(np.any(x != y) for x, y in zip(jax.tree.leaves(before), jax.tree.leaves(after)))


@pytest.mark.parametrize(
  "words, message",
  [
    (["--length=20"], "--length=20 must be at least 28"),
    (["--keys=3"], "--keys at least 4"),
    (["--width=40"], "--width=40 must be a multiple of 32"),
    (["--k=0"], "k=0 must be at least 1"),
    (["--steps=0"], "num_steps=0"),
  ],
)
def test_sizes_that_do_not_fit_are_refused(words, message):
  with pytest.raises(UsageError, match=message):
    recipe.main(options(*words))
