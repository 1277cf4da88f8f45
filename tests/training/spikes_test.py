"""Steps that are spikes, and the state after them."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from sparsek.training import spikes

judge = jax.jit(spikes.judge)


def judged(values, factor=2.0):
  """Returns whether each step (loss, gradient norm) is a spike, and the state after them."""
  state, judgements = spikes.start(factor), []
  for loss, grad_norm in values:
    is_spike, state = judge(state, factor, jnp.float32(loss), jnp.float32(grad_norm))
    judgements.append(bool(is_spike))
  return judgements, state


@pytest.mark.parametrize(
  "step, spike",
  [
    ((3.9, 1.9), False),
    ((4.1, 1.0), True),
    ((2.0, 2.1), True),
    ((0.1, 0.1), False),
    ((float("nan"), 1.0), True),
    ((2.0, float("inf")), True),
  ],
)
def test_a_step_beyond_the_factor_of_a_running_mean_is_a_spike(step, spike):
  judgements, state = judged([(2.0, 1.0)] * spikes.FIRST + [step])
  assert judgements == [False] * spikes.FIRST + [spike]
  assert int(state.skipped) == spike and np.isfinite(state.loss)
  if spike:
    assert (float(state.loss), float(state.grad_norm)) == (2.0, 1.0)


def test_the_first_steps_are_no_spikes_unless_not_finite():
  assert judged([(2.0, 1.0), (200.0, 100.0), (float("nan"), 1.0)])[0] == [False, False, True]


def test_the_mean_follows_the_run():
  judgements, state = judged([(2.0, 1.0)] * 30 + [(2.0 - 0.01 * i, 1.0) for i in range(150)])
  assert not any(judgements)
  assert 0.5 < float(state.loss) < 1.5


def test_what_is_saved_is_exact():
  _, state = judged([(2.1, 0.3), (1.7, 0.1), (1 / 3, 0.2)])
  again = spikes.start(2.0, json.loads(json.dumps(spikes.to_json(state))))
  assert [leaf.dtype for leaf in again] == [leaf.dtype for leaf in state]
  jax.tree.map(np.testing.assert_array_equal, again, state)
  assert spikes.start(0.0) == ()


def test_moments_are_kept_and_the_schedule_goes_on():
  optimizer = optax.chain(optax.scale_by_adam(), optax.scale_by_schedule(lambda count: 1.0))
  params = jnp.ones(2)
  old = optimizer.init(params)
  _, new = optimizer.update(params, old)
  kept = spikes.keep(jnp.bool_(True), old, new)
  np.testing.assert_array_equal(kept[0].mu, old[0].mu)
  assert int(kept[0].count) == 0 and int(kept[1].count) == 1
  np.testing.assert_array_equal(spikes.keep(jnp.bool_(False), old, new)[0].mu, new[0].mu)
