"""The schedule, the decay mask, and one AdamW update against the formula."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsek.config import OptimizerConfig
from sparsek.training.optimizer import (
  decay_mask,
  learning_rate_schedule,
  make_optimizer,
  trainable_mask,
)

PARAMS = {
  "embedding": {"embedding": jnp.ones((3, 2))},
  "layer": {
    "query": {"kernel": jnp.ones((2, 2)), "bias": jnp.ones((2,))},
    "norm": {"scale": jnp.ones((4, 2))},
    "scorer": {"slope": jnp.ones(1)},
  },
}


def test_schedule_warms_up_and_decays():
  schedule = learning_rate_schedule(
    OptimizerConfig(learning_rate=2.0, warmup_steps=4, num_steps=12, final_lr_ratio=0.1)
  )
  rates = [float(schedule(s)) for s in range(12)]
  np.testing.assert_allclose(rates[:4], [0.5, 1.0, 1.5, 2.0], rtol=1e-6)
  np.testing.assert_allclose(rates[7], 2.0 * (0.1 + 0.9 * 0.5), rtol=1e-6)  # half way down
  np.testing.assert_allclose(rates[-1], 0.2, rtol=1e-6)
  assert all(a > b for a, b in zip(rates[3:], rates[4:]))


@pytest.mark.parametrize("warmup_steps", [0, 3])
def test_schedule_is_finite_at_the_ends_of_its_range(warmup_steps):
  schedule = learning_rate_schedule(
    OptimizerConfig(learning_rate=1.0, warmup_steps=warmup_steps, num_steps=3)
  )
  assert all(0 < float(schedule(s)) <= 1 for s in range(6))


def test_only_matrices_decay():
  decayed = jax.tree_util.tree_flatten_with_path(decay_mask(PARAMS))[0]
  assert [jax.tree_util.keystr(path) for path, yes in decayed if yes] == [
    "['layer']['query']['kernel']"
  ]


def test_adapters_decay_and_have_moments_and_what_they_stand_beside_has_none():
  params = {
    "layer": {
      "up": {"kernel": jnp.ones((2, 2)), "lora_a": jnp.ones((2, 1)), "lora_b": jnp.ones((1, 2))},
      "scorer": {"slope": jnp.ones(1)},
    }
  }
  state = make_optimizer(OptimizerConfig()).init(params)
  assert jax.tree.map(jnp.shape, state[1].mu) == {
    "layer": {"up": {"lora_a": (2, 1), "lora_b": (1, 2)}, "scorer": {"slope": (1,)}}
  }
  assert decay_mask(params) == {
    "layer": {"up": {"kernel": True, "lora_a": True, "lora_b": True}, "scorer": {"slope": False}}
  }


def test_one_update_is_adamw():
  config = OptimizerConfig(
    learning_rate=0.1, warmup_steps=0, num_steps=10, weight_decay=0.5, grad_clip=0.0
  )
  optimizer = make_optimizer(config)
  grads = jax.tree.map(lambda x: jnp.full_like(x, 2.0), PARAMS)
  updates, _ = optimizer.update(grads, optimizer.init(PARAMS), PARAMS)
  rate = float(learning_rate_schedule(config)(0))
  # After bias correction the first Adam step is the sign of the gradient.
  np.testing.assert_allclose(updates["layer"]["query"]["kernel"], -rate * (1.0 + 0.5), rtol=1e-5)
  np.testing.assert_allclose(updates["embedding"]["embedding"], -rate, rtol=1e-5)


def test_scorers_have_a_rate_of_their_own():
  grads = jax.tree.map(jnp.ones_like, PARAMS)
  plain, faster = (
    make_optimizer(OptimizerConfig(scorer_lr_multiplier=multiplier)) for multiplier in (1.0, 3.0)
  )
  (one, state), (other, _) = (
    optimizer.update(grads, optimizer.init(PARAMS), PARAMS) for optimizer in (plain, faster)
  )
  ratio = jax.tree.map(lambda x, y: float((y / x).max()), one, other)
  assert ratio["layer"].pop("scorer") == {"slope": pytest.approx(3)} and all(
    x == 1 for x in jax.tree.leaves(ratio)
  )
  assert not jax.tree.leaves(state[4])


def test_clipping_bounds_the_gradient_and_keeps_the_state_structure():
  config = OptimizerConfig(grad_clip=1.0, num_steps=200)
  clipped, unclipped = (
    make_optimizer(config),
    make_optimizer(OptimizerConfig(grad_clip=0.0, num_steps=200)),
  )
  assert jax.tree.structure(clipped.init(PARAMS)) == jax.tree.structure(unclipped.init(PARAMS))
  grads = jax.tree.map(lambda x: jnp.full_like(x, 100.0), PARAMS)
  _, state = clipped.update(grads, clipped.init(PARAMS), PARAMS)
  norm = jnp.sqrt(sum(jnp.sum(mu**2) for mu in jax.tree.leaves(state[1].mu))) / (1 - config.b1)
  np.testing.assert_allclose(norm, 1.0, rtol=1e-5)


def test_what_is_trainable():
  params = {
    "embed": {"embedding": 0},
    "layers_0": {
      "attention": {"query": {"kernel": 0}, "scorer": {"slope": 0}},
      "mlp": {"up": {"kernel": 0}},
    },
  }
  changing = lambda which: [
    jax.tree_util.keystr(path)
    for path, changes in jax.tree_util.tree_leaves_with_path(trainable_mask(params, which))
    if changes
  ]
  assert len(changing("all")) == 4
  assert changing("attention") == [
    "['layers_0']['attention']['query']['kernel']",
    "['layers_0']['attention']['scorer']['slope']",
  ]
  assert changing("scorer") == ["['layers_0']['attention']['scorer']['slope']"]
  with pytest.raises(ValueError, match="trainable='none' is not one of all, attention, scorer"):
    OptimizerConfig(trainable="none")
