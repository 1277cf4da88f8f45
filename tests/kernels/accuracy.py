"""Prints how far attention is from the float64 truth over all problems of kernels/specs.py.

  python -m tests.kernels.accuracy

It is no test, but prints the errors that the tests assert. For results stored in bfloat16 the first
column compares with the truth rounded to bfloat16, in norm. The second is how far that rounding
alone is from the truth: no implementation can be closer.
"""

import jax.numpy as jnp

from sparsek.kernels import specs
from tests.kernels.attention_base import (
  ARGUMENTS,
  AttentionTest,
  error_beyond_rounding,
  output_and_gradients,
  problem,
  relative_error,
  truth,
)


class Xla(AttentionTest):
  implementation = "xla"


def main() -> None:
  """Prints a line for each result: the worst error, and the problem that has it."""
  worst: dict[str, tuple[float, float, str]] = {}
  names = ("out", *(f"d{argument}" for argument in ARGUMENTS))
  for spec in specs.SPECS:
    for gate in spec.gates:
      inputs, cotangent, ids = problem(spec)
      results = output_and_gradients(Xla().attend(spec, gate, ids), inputs, cotangent)
      for name, x, y in zip(names, results, truth(spec, gate)):
        rounded = jnp.asarray(y, jnp.float32).astype(x.dtype).astype(jnp.float32)
        entry = error_beyond_rounding(x, y), relative_error(rounded, y), f"{spec.name}-{gate}"
        key = f"{spec.dtype} inputs, {name} in {x.dtype}"
        worst[key] = max(worst.get(key, entry), entry)
  for key, (error, floor, name) in worst.items():
    print(f"{key:42} {error:.1e}  rounding alone {floor:.1e}  ({name})")


if __name__ == "__main__":
  main()
