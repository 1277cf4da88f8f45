"""Flags of pretraining that no other test covers: what they change."""

import functools

import jax
import jax.numpy as jnp
import pytest
from absl import flags as absl_flags

from sparsek.attention.scoring import CHANNELS
from sparsek.command_line.configs import model_config, train_config
from sparsek.command_line.main import parse
from sparsek.command_line.training_flags import define_pretrain_flags
from sparsek.model.transformer import init_params
from sparsek.training.optimizer import learning_rate_schedule, make_optimizer


def parsed(*arguments):
  values = absl_flags.FlagValues()
  define_pretrain_flags(values)
  parse(["pretrain", "--workdir=w", *arguments], values)
  return values


@pytest.mark.parametrize(
  "arguments, moment",
  [
    (["--b1=0.5", "--grad_clip=0"], [15.0, 20.0]),
    (["--b1=0.75", "--grad_clip=0"], [7.5, 10.0]),
    (["--b1=0.5", "--grad_clip=10"], [3.0, 4.0]),
    (["--b1=0.5", "--grad_clip=100"], [15.0, 20.0]),
  ],
)
def test_gradients_are_clipped_and_averaged(arguments, moment):
  """Adam's first moment after one step is 1 - b1 times the clipped gradient."""
  optimizer = make_optimizer(train_config(parsed(*arguments)).optimizer)
  params = {"norm": {"scale": jnp.zeros(2)}}
  gradients = {"norm": {"scale": jnp.array([30.0, 40.0])}}
  _, state = optimizer.update(gradients, optimizer.init(params), params)
  moments = [leaf.tolist() for leaf in jax.tree.leaves(state) if jnp.shape(leaf) == (2,)]
  assert moments[0] == pytest.approx(moment)


@pytest.mark.parametrize("ratio", [0.0, 0.25, 1.0])
def test_the_learning_rate_ends_at_a_share_of_its_peak(ratio):
  words = ["--learning_rate=2", "--num_steps=10", "--warmup_steps=2", f"--final_lr_ratio={ratio}"]
  schedule = learning_rate_schedule(train_config(parsed(*words)).optimizer)
  rates = [float(schedule(step)) for step in range(10)]
  assert max(rates) == pytest.approx(2) and rates[-1] == pytest.approx(2 * ratio)


@pytest.mark.parametrize("lookback, lookahead", [(3, 4), (0, 2)])
def test_a_conv_scorer_sees_lookback_and_lookahead(lookback, lookahead):
  words = [f"--scorer_lookback={lookback}", f"--scorer_lookahead={lookahead}"]
  config = model_config(parsed("--scorer=conv", "--num_layers=1", "--noscan_layers", *words))
  params = jax.eval_shape(functools.partial(init_params, config), jax.random.key(0))
  scorer = params["layers_0"]["attention"]["scorer"]
  inputs = {leaf.shape[0] for leaf in jax.tree.leaves(scorer) if leaf.ndim == 2}
  assert (lookback + 1 + lookahead) * CHANNELS in inputs
