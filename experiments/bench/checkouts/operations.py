"""Operations of a checkout that are timed."""

import functools
import itertools
import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import sparsek

from .access import Training, attention_inputs, attention_pass

SAMPLE_SECONDS = 0.25
MAX_CALLS = 2000


class Operation:
  """Something to time.

  Args:
    call: state -> the next state.
    state: the first one.
  """

  def __init__(self, call: Callable[[Any], Any], state: Any):
    self._call, self._state = call, state
    # A GPU takes calls in order; on a CPU calls that do not need one another could overlap.
    self._in_order = jax.default_backend() == "gpu"

  def run(self, calls: int) -> float:
    """Returns the seconds of some calls, one after the other."""
    begin = time.perf_counter()
    for _ in range(calls):
      self._state = self._call(self._state)
      if not self._in_order:
        jax.block_until_ready(self._state)
    jax.block_until_ready(self._state)
    return time.perf_counter() - begin

  def calibrate(self) -> int:
    """Warms up; returns how many calls take SAMPLE_SECONDS."""
    self.run(2)
    calls = 1
    for _ in range(2):
      calls = math.ceil(calls * SAMPLE_SECONDS / max(self.run(calls), 1e-9))
      calls = min(max(calls, 1), MAX_CALLS)
    return calls


def time_attention(
  backward: bool, n: int, heads: int, head_dim: int, k: int, dtype: str
) -> Operation:
  """Returns the operation of attention."""
  attend = jax.jit(attention_pass(backward, k=k, window=k))
  inputs, cotangent = attention_inputs(n, heads, heads, head_dim, dtype)
  return Operation(lambda _: attend(inputs, cotangent), None)


def time_training(name: str, n: int, **changes: Any) -> Operation:
  """Returns the operation of a training step."""
  training = Training(sparsek.preset(name, **changes), n=n)
  return Operation(
    lambda state: training.step(state[0], training.batch), (training.initial_state(), None)
  )


class Generation:
  """A model that generates.

  Args:
    name: of the preset.
    n: tokens of the context.
    steps: tokens of a call.
  """

  def __init__(self, name: str, n: int, steps: int):
    self.config, self.steps = sparsek.preset(name), steps
    params = sparsek.init_params(self.config, jax.random.key(0))
    self.params = sparsek.inference_params(self.config, params)
    tokens = np.random.default_rng(0).integers(0, self.config.vocab_size, (1, n))
    self.tokens = tokens.astype(np.int32)

  def fill(self) -> Any:
    """Returns the last logits and the cache after the context."""
    cache = sparsek.init_cache(self.config, 1)
    return sparsek.prefill(
      self.config, self.params, cache, self.tokens, last_only=True, donate=True
    )

  def prefill(self) -> Operation:
    """Returns the operation of a prompt."""
    return Operation(lambda _: self.fill(), None)

  def decode(self) -> Operation:
    """Returns the operation of `steps` tokens after the context, the best one each time."""

    def advance(state, _, params):
      cache, token = state
      logits, cache = sparsek.decode_step(self.config, params, cache, token)
      return (cache, jnp.argmax(logits, axis=-1).astype(jnp.int32)), None

    @functools.partial(jax.jit, donate_argnums=0)
    def run(state, params):
      step = functools.partial(advance, params=params)
      return jax.lax.scan(step, state, None, length=self.steps)[0]

    return Operation(
      lambda state: run(state, self.params), (self.fill()[1], jnp.zeros(1, jnp.int32))
    )

  def session(self) -> Operation:
    """Returns the operation of a new `sparsek.Session` that draws `steps` tokens."""

    def call(_):
      session = sparsek.Session(self.config, self.params, batch_size=1)
      return list(session.generate([[1, 2, 3]], max_new_tokens=self.steps, temperature=0.0))

    return Operation(call, None)


def operations(suites: Sequence[str]) -> dict[str, Callable[[], Operation]]:
  """Returns what is timed on this device, by name; the sizes on a CPU only try the program."""
  accelerated = jax.default_backend() != "cpu"
  chosen: dict[str, Callable[[], Operation]] = {}
  if "attention" in suites:
    shapes = [(16384, 12, 64), (65536, 12, 64), (32768, 16, 128)] if accelerated else [(256, 2, 16)]
    k, dtype = (512, "bfloat16") if accelerated else (32, "float32")
    for (n, heads, head_dim), backward in itertools.product(shapes, (False, True)):
      direction = "forward + backward" if backward else "forward"
      chosen[f"attention {direction}, n={n}, {heads} heads of {head_dim}"] = functools.partial(
        time_attention, backward, n, heads, head_dim, k, dtype
      )
  preset, n, steps = ("gpt2_small", 16384, 256) if accelerated else ("tiny", 128, 8)
  if "train" in suites:
    for remat in ("none", "attention") if accelerated else ("none",):
      chosen[f"training step, {preset}, n={n}, remat={remat}"] = functools.partial(
        time_training, preset, n, remat=remat
      )
  if "decode" in suites:
    generation = functools.cache(functools.partial(Generation, preset, n, steps))
    chosen |= {
      f"prefill, {preset}, n={n}": lambda: generation().prefill(),
      f"{steps} decode steps, {preset}, after {n}": lambda: generation().decode(),
      f"session of {steps} tokens, {preset}": lambda: generation().session(),
    }
  return chosen
