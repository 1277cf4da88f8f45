"""Runs the Mosaic GPU kernels by interpretation on a small problem and prints their errors as JSON:
python -m tests.kernels.hopper.interpreted CASE [ampere].
"""

import json
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from sparsek.attention.documents import document_bounds
from sparsek.attention.prefix_selection import select
from sparsek.kernels.ampere import attention as ampere_attention
from sparsek.kernels.hopper import attention as hopper_attention
from sparsek.kernels.hopper import attention_forward_program
from sparsek.kernels.specs import Spec
from tests.kernels.attention_base import ARGUMENTS, problem, relative_error, truth

CASES = {
  "documents": (
    Spec(
      "interpreted",
      n=250,
      heads=2,
      groups=1,
      head_dim=64,
      k=20,
      window=30,
      dtype="bfloat16",
      documents=(100, 60),
    ),
    "value",
  ),
  "rising": (
    Spec(
      "interpreted",
      n=130,
      heads=1,
      groups=1,
      head_dim=128,
      k=40,
      window=0,
      dtype="bfloat16",
      scores="rising",
    ),
    "straight_through",
  ),
  "window_only": (
    Spec(
      "interpreted",
      n=300,
      heads=2,
      groups=1,
      head_dim=64,
      k=0,
      window=90,
      dtype="bfloat16",
      documents=(200, 60),
    ),
    "value",
  ),
  "last_queries": (
    Spec(
      "interpreted",
      n=330,
      heads=2,
      groups=1,
      head_dim=64,
      k=30,
      window=20,
      dtype="bfloat16",
      documents=(40, 290),
    ),
    "value",
  ),
  "wide": (
    Spec(
      "interpreted",
      n=330,
      heads=2,
      groups=1,
      head_dim=200,
      k=30,
      window=70,
      dtype="bfloat16",
      documents=(40, 290),
    ),
    "key_value",
  ),
  "wide_rising": (  # programs of more tiles of queries than shared memory holds
    Spec(
      "interpreted",
      n=500,
      heads=1,
      groups=1,
      head_dim=256,
      k=150,
      window=0,
      dtype="bfloat16",
      scores="rising",
    ),
    "value",
  ),
  "ties": (
    Spec(
      "interpreted",
      n=100,
      heads=1,
      groups=1,
      head_dim=40,
      k=8,
      window=5,
      dtype="float16",
      scores="ties",
    ),
    "key_value",
  ),
}


# Cases with queries of the last tokens only, and the first of these. A list of "last_queries" has
# tokens that only earlier queries see.
FIRST_QUERY = {"last_queries": 270, "window_only": 128, "wide": 150}


ROOT = pathlib.Path(__file__).resolve().parents[3]


def slow(test):
  """Marks a test that runs kernels by interpretation."""
  test = pytest.mark.skipif(
    jax.default_backend() != "cpu", reason="the kernels themselves run on this GPU"
  )(test)
  too_slow = "the interpreter of GPU kernels in JAX 0.10 did not finish within 6 minutes"
  return pytest.mark.slow(pytest.mark.skipif(jax.__version_info__ < (0, 11), reason=too_slow)(test))


def errors_of(*arguments: str) -> dict[str, float]:
  """Returns what `main` prints in a new process: with fewer devices than threads the interpreter
  waits for itself.
  """
  environment = {
    **os.environ,
    "XLA_FLAGS": os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8",
    "JAX_PLATFORMS": "cpu",
  }
  command = [sys.executable, "-m", "tests.kernels.hopper.interpreted", *arguments]
  done = subprocess.run(
    command, env=environment, capture_output=True, text=True, timeout=400, cwd=ROOT, check=False
  )
  assert done.returncode == 0, done.stderr
  return json.loads(done.stdout)


def main(name: str, room: str = "hopper") -> None:
  """Prints the relative error of the output and of every gradient, by the kernels of a room."""
  # a private name of JAX, which other versions lack
  from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams

  kernels = {"hopper": hopper_attention.HOPPER, "ampere": ampere_attention.KERNELS}[room]
  at_once = 1 if name == "documents" else 3  # so that programs compute several blocks
  attention_forward_program.programs_at_once = lambda: at_once
  if name == "wide_rising":
    hopper_attention.LISTS = 1  # a long one
  else:
    hopper_attention.CHUNK = 128  # so that there are several chunks
  spec, gate = CASES[name]
  first = FIRST_QUERY.get(name, 0)
  inputs, cotangent, ids = problem(spec)
  start, end = document_bounds(ids, 1, spec.n)

  def attend(query, key, value, scores):
    scores = jnp.swapaxes(scores, 1, 2)
    nothing = jnp.zeros(scores.shape, jnp.int32)
    selection = (
      select(scores, start, end, spec.k, spec.window, bool(spec.documents))
      if spec.k
      else (nothing * 0.0, nothing, nothing)
    )
    return hopper_attention.attention(
      query,
      key,
      value,
      scores,
      *selection,
      start,
      end,
      k=spec.k,
      window=spec.window,
      gate=gate,
      scale=spec.head_dim**-0.5,
      kernels=kernels,
      interpret=InterpretGPUParams(),
    )

  inputs = (inputs[0][:, first:], *inputs[1:])
  out, vjp = jax.vjp(attend, *inputs)
  expected_out, expected_query, *expected = truth(spec, gate, first)
  expected = (expected_out[:, first:], expected_query[:, first:], *expected)
  error = lambda x, y: float(relative_error(x.astype(jnp.float32), y))
  print(
    json.dumps(
      {
        name: error(x, y)
        for name, x, y in zip(("out", *ARGUMENTS), (out, *vjp(cotangent[:, first:])), expected)
      }
    )
  )


if __name__ == "__main__":
  main(*sys.argv[1:])
