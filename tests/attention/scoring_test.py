import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsek.attention.documents import position_in_document
from sparsek.attention.exact_product import exact_product
from sparsek.attention.operator import sparsek
from sparsek.attention.running_moments import Moments, running_moments
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


def test_position_in_document():
  want = [[*range(7), 0, *range(12)], [*range(10), *range(8), 0, 1]]
  np.testing.assert_array_equal(position_in_document(SEGMENTS, 2, LENGTH), want)
  np.testing.assert_array_equal(position_in_document(None, 2, 3), [[0, 1, 2]] * 2)
  with pytest.raises(ValueError, match="segment_ids"):
    position_in_document(SEGMENTS, 2, LENGTH + 1)


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


def document(n, starts):
  """(start, end) of each token's document."""
  which = np.searchsorted(starts, np.arange(n), side="right") - 1
  return np.array(starts)[which], np.array([*starts[1:], n])[which]


@pytest.mark.parametrize("offset", [0, 4096])
@pytest.mark.parametrize(
  "n, starts", [(1, [0]), (31, [0, 1]), (33, [0, 31, 32]), (2500, [0, 5, 64, 1100, 1101])]
)
def test_moments_of_every_prefix(n, starts, offset):
  """An offset costs no digits: numbers of 10 bits after the point stay exact beside 4096."""
  random = np.random.default_rng(n)
  logits, counted = (
    np.round(random.normal(size=(2, n, 3)) * 1024) / 1024,
    random.random((2, n)) < 0.9,
  )
  counted[0] = True
  start, end = (np.stack([x, x]).astype(np.int32) for x in document(n, starts))
  got = quick_jit(running_moments)((logits + offset).astype(np.float32), counted, start, end)
  for b in range(2):
    for j in random.permutation(n)[:50]:
      past = logits[b, start[b, j] : j + 1][counted[b, start[b, j] : j + 1]]
      np.testing.assert_array_equal(got.count[b, j], len(past))
      if len(past):
        np.testing.assert_allclose(
          got.mean[b, j] - np.float32(offset), past.mean(0), atol=1e-3 if offset else 1e-5
        )
        np.testing.assert_allclose(
          got.deviation[b, j], past.var(0) * len(past), rtol=1e-5, atol=1e-4
        )


@pytest.mark.parametrize("offset", [0, 4096])
def test_gradient_of_moments(offset):
  """Against autodiff of the definition in float64; the rows' offset costs the gradient no digits
  either.
  """
  n, starts = 130, [0, 5, 64, 65]
  random = np.random.default_rng(3)
  logits, d_mean, d_deviation = (np.round(random.normal(size=(3, 2, n, 2)) * 1024) / 1024).astype(
    np.float32
  )
  counted = random.random((2, n)) < 0.9
  start, end = (np.stack([x, x]).astype(np.int32) for x in document(n, starts))
  summed = lambda moments: jnp.sum(moments.mean * d_mean) + jnp.sum(moments.deviation * d_deviation)
  got = quick_jit(jax.grad(lambda x: summed(running_moments(x, counted, start, end))))(
    (logits + offset).astype(np.float32)
  )
  with jax.enable_x64(True):
    seen = jnp.asarray(
      (np.arange(n) <= np.arange(n)[:, None])
      & (np.arange(n) >= start[0][:, None])
      & counted[:, None]
    )[..., None]  # [B, N, N, 1]

    def definition(x):
      count = jnp.sum(seen, axis=2)
      mean = jnp.sum(jnp.where(seen, x[:, None], 0), axis=2) / jnp.maximum(count, 1)
      return Moments(
        count, mean, jnp.sum(jnp.where(seen, (x[:, None] - mean[:, :, None]) ** 2, 0), axis=2)
      )

    want = jax.grad(lambda x: summed(definition(x)))(jnp.asarray(logits, jnp.float64))
  got, want = np.asarray(got, np.float64), np.asarray(want)
  assert np.max(np.abs(got - want)) < (1e-3 if offset else 1e-5) * np.max(np.abs(want))


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


def test_exact_product_is_one_of_float32():
  keys = jax.random.split(jax.random.key(4), 3)
  x, kernel, cotangent = (
    jax.random.normal(key, shape) for key, shape in zip(keys, ((2, 300, 40), (40, 3), (2, 300, 3)))
  )
  x = x.astype(jnp.bfloat16)
  out, vjp = quick_jit(lambda x, kernel: jax.vjp(exact_product, x, kernel))(x, kernel)
  d_x, d_kernel = vjp(cotangent)
  wide = lambda *arrays: (np.asarray(a.astype(jnp.float32), np.float64) for a in arrays)
  error = lambda a, b: np.max(np.abs(np.asarray(a, np.float64) - b)) / np.max(np.abs(b))
  x64, kernel64, cotangent64 = wide(x, kernel, cotangent)
  assert out.dtype == d_kernel.dtype == jnp.float32 and d_x.dtype == jnp.bfloat16
  assert (
    error(out, x64 @ kernel64) < 1e-6
    and error(d_kernel, np.einsum("bne,bnc->ec", x64, cotangent64)) < 1e-6
  )
  assert error(d_x.astype(jnp.float32), cotangent64 @ kernel64.T) < 2**-8


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
