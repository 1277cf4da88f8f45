import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsek.attention.documents import position_in_document
from sparsek.attention.operator import sparsek
from sparsek.attention.scoring import ScoringNetwork, fixed_noise
from tests.helpers import quick_jit

LENGTH, WIDTH, HEADS = 20, 8, 2
SCORES = dict(init_scale=4.0, init_slope=1.0)
NETWORKS = {
  "linear": ScoringNetwork(HEADS, **SCORES),
  "conv": ScoringNetwork(HEADS, "conv", lookback=2, lookahead=3, **SCORES),
  "conv without lookback or normalisation": ScoringNetwork(
    HEADS, "conv", lookback=0, lookahead=2, normalize=False, **SCORES
  ),
  "shared, with noise and a sink": ScoringNetwork(
    HEADS, shared=True, init_noise=2.0, init_sink=5.0, **SCORES
  ),
  "random": ScoringNetwork(HEADS, "random", **SCORES),
}
SEGMENTS = jnp.asarray([[1] * 7 + [2] * 1 + [1] * 12, [5] * 10 + [6] * 8 + [0] * 2], jnp.int32)


def hidden(shape=(2, LENGTH, WIDTH), seed=0):
  x = jax.random.normal(jax.random.key(seed), shape)
  return x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True))


@functools.cache
def variables(name):
  network = NETWORKS[name]
  return quick_jit(lambda key: network.init(key, hidden()))(jax.random.key(1))


@functools.cache
def scores_of(name):
  return quick_jit(NETWORKS[name].apply)


@functools.cache
def jacobian(name):
  """[N, G, N]: size of the derivative of each score with respect to each hidden state of a packed
  row.
  """
  network_variables = variables(name)
  run = lambda x: NETWORKS[name].apply(network_variables, x[None], SEGMENTS[:1])[0]
  return np.abs(quick_jit(jax.jacrev(run))(hidden()[0])).max(-1)


@pytest.mark.parametrize("name", ["linear", "conv"])
def test_normalised_over_the_past_of_the_document(name):
  network = NETWORKS[name]
  x, params = hidden() + 3.0, variables(name)["params"]  # an offset common to all tokens
  raw = quick_jit(
    ScoringNetwork(
      HEADS, network.kind, network.lookback, network.lookahead, normalize=False, **SCORES
    ).apply
  )({"params": {**params, "scale": jnp.ones(HEADS), "slope": jnp.zeros(HEADS)}}, x, SEGMENTS)
  raw, got = np.asarray(raw, np.float64), scores_of(name)(variables(name), x, SEGMENTS)
  position = np.asarray(position_in_document(SEGMENTS, 2, LENGTH))
  for b in range(2):
    for j in range(LENGTH):
      past = raw[b, j - position[b, j] : j + 1]
      std = np.sqrt((np.sum((past - past.mean(0)) ** 2, 0) + 8) / (len(past) + 8))
      np.testing.assert_allclose(
        got[b, j], 4 * (raw[b, j] - past.mean(0)) / std + position[b, j] / 1024, atol=2e-5
      )


@pytest.mark.parametrize("name", NETWORKS)
def test_scores_see_nothing_beyond_lookahead_and_document(name):
  if name == "random":
    assert not np.any(jacobian(name))
    return
  size, network = jacobian(name), NETWORKS[name]
  j, i = np.arange(LENGTH)[None, :], np.arange(LENGTH)[:, None]
  start = np.arange(LENGTH) - np.asarray(position_in_document(SEGMENTS, 2, LENGTH))[0]
  ahead = network.lookahead if network.kind == "conv" else 0
  allowed = (start[:, None] == start[None, :]) & (j <= i + ahead)
  assert not np.any(size.max(1)[~allowed]), "a score depends on a token it must not see"
  if ahead:
    # the first token of a document is its own mean: its normalised logit is always 0
    later = start[:, None] < i
    assert np.all(size.max(1)[allowed & later & (j == i + ahead)] > 0), (
      "the conv scorer does not look ahead"
    )


@pytest.mark.parametrize("name", NETWORKS)
def test_stream_equals_parallel(name):
  network, x = NETWORKS[name], hidden()
  want = scores_of(name)(variables(name), x, None, 3)
  stream = quick_jit(functools.partial(network.apply, method="stream"))
  state, seen, got = network.initial_state(2), 0, []
  for size in [1, 1, 1, 7, 1, 7, 1, 1]:
    scores, state = stream(variables(name), x[:, seen : seen + size], state, jnp.int32(seen), 3)
    got.append(scores)
    seen += size
  got = jnp.concatenate(got, axis=1)[:, network.delay :]
  np.testing.assert_allclose(got, want[:, : LENGTH - network.delay], atol=1e-5)


def test_documents_are_scored_as_if_alone():
  x = hidden()
  packed = scores_of("conv")(variables("conv"), x, SEGMENTS)
  alone = scores_of("conv")(
    variables("conv"), jnp.roll(x, -10, axis=1), jnp.roll(SEGMENTS, -10, axis=1)
  )
  np.testing.assert_allclose(packed[1, 10:18], alone[1, :8], atol=1e-5)


def test_scale_and_slope_start_as_asked_and_learn():
  network = ScoringNetwork(HEADS, init_scale=2.0, init_slope=0.5)
  params = quick_jit(network.init)(jax.random.key(0), hidden())["params"]
  np.testing.assert_array_equal(params["scale"], [2.0] * HEADS)
  np.testing.assert_array_equal(params["slope"], [0.5] * HEADS)
  weight = jax.random.normal(jax.random.key(2), (2, LENGTH, HEADS))
  gradient = quick_jit(
    jax.grad(lambda p: jnp.sum(weight * network.apply({"params": p}, hidden())))
  )(params)
  assert all(np.all(np.isfinite(g)) and np.all(g != 0) for g in jax.tree.leaves(gradient))


def test_scores_are_float32_in_bfloat16():
  scores = scores_of("conv")(variables("conv"), hidden().astype(jnp.bfloat16), None)
  assert scores.dtype == jnp.float32
  exact = scores_of("conv")(
    variables("conv"), hidden().astype(jnp.bfloat16).astype(jnp.float32), None
  )
  # two roundings of float32; bfloat16's would be 1e-2
  np.testing.assert_allclose(scores, exact, atol=1e-5)


def test_random_scores_are_fixed_noise():
  positions = jnp.arange(4000)[None]
  # [4000, 12]
  noise = jnp.concatenate([fixed_noise(layer, positions, 4)[0] for layer in range(3)], axis=1)
  assert abs(float(noise.mean())) < 0.02 and abs(float(noise.std()) - 1) < 0.02
  correlation = np.corrcoef(np.concatenate([noise[1:].T, noise[:-1].T]))
  assert np.max(np.abs(correlation - np.eye(24))) < 0.08, (
    "heads, layers or neighbouring positions share noise"
  )
  assert not variables("random"), "the random scorer has parameters"


@pytest.mark.parametrize("scale, least, most", [(1.0, 0.77, 0.83), (4.0, 0.92, 0.98)])
def test_gate_mass_on_the_selected_tokens_by_scale(scale, least, most):
  x, masses = hidden((1, 512, 64), seed=4), {}
  for kind in ("linear", "conv", "random"):
    network = ScoringNetwork(2, kind, init_scale=scale)
    # pylint: disable=cell-var-from-loop
    scores, _ = quick_jit(lambda key: network.init_with_output(key, x))(jax.random.key(5))
    gates = -np.sort(-sparsek(jnp.swapaxes(scores, 1, 2), 64))  # of the last query, best first
    masses[kind] = float(gates[..., :64].mean())
  print("gate mass on the top 64 of 512:", masses)
  assert all(least < mass < most for mass in masses.values()), masses


def test_shared_scores_are_alike_in_all_heads():
  scores = scores_of("shared, with noise and a sink")(
    variables("shared, with noise and a sink"), hidden()
  )
  assert scores.shape == (2, LENGTH, HEADS) and np.ptp(scores[0, :, 0]) > 1
  np.testing.assert_array_equal(scores[..., 0], scores[..., 1])


def test_fixed_noise_tells_tokens_apart_that_look_alike():
  network, x = NETWORKS["shared, with noise and a sink"], jnp.ones((2, LENGTH, WIDTH))
  scores = network.apply(variables("shared, with noise and a sink"), x, None, 3)
  want = 2 * fixed_noise(3, jnp.arange(LENGTH)[None], 1) + jnp.arange(LENGTH)[None, :, None] / 1024
  want += 5 * (jnp.arange(LENGTH) == 0)[:, None]
  np.testing.assert_allclose(scores, jnp.broadcast_to(want, scores.shape), atol=1e-5)


def test_unknown_kind_and_negative_reach():
  with pytest.raises(ValueError, match="scorer='cubic'.*linear, conv, random"):
    ScoringNetwork(2, "cubic").init(jax.random.key(0), hidden())
  with pytest.raises(ValueError, match="scorer_lookahead=-1"):
    ScoringNetwork(2, "conv", lookahead=-1).init(jax.random.key(0), hidden())


def test_moments_of_a_long_stream_lose_no_digits():
  """After 2^22 tokens a float32 sum of squares has a spacing of 1/2, which alone would lose much of
  what every further token adds.
  """
  network, params, x = (
    NETWORKS["linear"],
    variables("linear"),
    jnp.concatenate([hidden()] * 20, axis=1),
  )
  count = 2.0**22
  state = network.initial_state(2)._replace(
    mean=jnp.full((2, network.num_scores), 0.1), deviation=jnp.full((2, network.num_scores), count)
  )

  @quick_jit
  def run(x):
    def step(carry, token):
      state, seen = carry
      return (
        network.apply(params, token[:, None], state, seen, method="stream")[1],
        seen + 1,
      ), None

    return jax.lax.scan(step, (state, jnp.int32(count)), jnp.swapaxes(x, 0, 1))[0][0]

  end = run(x)
  logits = np.asarray(x, np.float64) @ np.asarray(params["params"]["linear"]["kernel"], np.float64)
  every, mean = (
    logits.shape[1] + count,
    (logits.sum(1) + count * np.float32(0.1)) / (logits.shape[1] + count),
  )
  deviation = (
    count + count * (np.float32(0.1) - mean) ** 2 + np.sum((logits - mean[:, None]) ** 2, axis=1)
  )
  assert (
    every > count
    and np.abs(end.deviation + np.asarray(end.deviation_rest, np.float64) - deviation).max() < 1e-2
  )
  assert np.abs(end.mean + np.asarray(end.mean_rest, np.float64) - mean).max() < 1e-9
