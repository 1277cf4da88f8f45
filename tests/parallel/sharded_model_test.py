"""Models whose rows are sharded over devices agree with the same models on one device."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractMesh, AxisType
from jax.sharding import PartitionSpec as P

from sparsek.model.baselines import ATTENTION_MODULES, context_refusal
from sparsek.model.transformer import Transformer, init_params
from sparsek.parallel.mesh import AXES, CONTEXT
from tests.commands import ROOT, run_forked
from tests.parallel.sharded_models import CONFIGS, IDS

CONFIG = CONFIGS["learned"]


@pytest.fixture(scope="module")
def differences(tmp_path_factory):
  """Returns what `tests.parallel.sharded_models` writes, from a process with 8 devices."""
  folder = tmp_path_factory.mktemp("sharded")
  words = ["tests.parallel.sharded_models", str(folder / "result.json")]
  done = run_forked(words, ROOT, folder)
  assert done.returncode == 0, done.stderr
  return json.loads((folder / "result.json").read_text())


@pytest.mark.slow
@pytest.mark.parametrize("case", IDS, ids=str)
def test_hidden_states_losses_and_gradients(differences, case):
  cases = {tuple(case): kinds for case, kinds in differences["cases"]}
  limits = {"array": 1e-5}
  assert {kind: x for kind, x in cases[case].items() if not x < limits.get(kind, 2e-6)} == {}


@pytest.mark.slow
def test_normalised_logits_are_equal_to_the_bit(differences):
  assert differences["exact"]


def trace_on_two_shards(function, *shapes):
  """Traces a function of parameters and of an array whose tokens are on two shards of each row."""
  sharded = jax.shard_map(
    function,
    mesh=AbstractMesh((1, 1, 2), AXES, axis_types=(AxisType.Auto,) * 3),
    in_specs=(P(), P(None, CONTEXT)),
    out_specs=P(None, CONTEXT),
    check_vma=False,
  )
  return jax.eval_shape(sharded, *shapes)


@pytest.mark.parametrize("kind", ATTENTION_MODULES)
def test_kinds_that_need_whole_rows_say_so(kind):
  config = dataclasses.replace(CONFIG, attention=kind)
  module = ATTENTION_MODULES[kind](config.layer_configs[0])
  x = jax.ShapeDtypeStruct((2, 16, config.embed_dim), jnp.float32)
  variables = jax.eval_shape(module.init, jax.random.key(0), x)
  trace = functools.partial(trace_on_two_shards, module.apply, variables, x)
  if kind in ("lsh", "block_topk", "tova", "h2o", "snapkv"):
    assert f"'{kind}' needs whole rows" in context_refusal(config)
    with pytest.raises(NotImplementedError, match=f"{type(module).__name__} needs whole rows"):
      trace()
  else:
    assert context_refusal(config) == ""
    assert trace().shape == (2, 16, config.embed_dim)


def test_learned_positions_must_reach_the_end_of_the_row():
  config = dataclasses.replace(CONFIGS["scanned"], max_positions=15)
  params = jax.eval_shape(functools.partial(init_params, config), jax.random.key(0))
  embed = functools.partial(Transformer(config).apply, method="embedded")
  tokens = jax.ShapeDtypeStruct((2, 16), jnp.int32)
  with pytest.raises(ValueError, match="tokens has 16 tokens a row, more than max_positions=15"):
    trace_on_two_shards(embed, {"params": params}, tokens)
