import jax
import jax.numpy as jnp
import pytest

from sparsek.model.fingerprint import fingerprint


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_any_change_of_parameters_is_seen(dtype):
  x = jax.random.normal(jax.random.key(0), (3, 50)).astype(dtype)
  params = {"a": x, "b": {"c": x[0]}}
  same = {"a": x + 0, "b": {"c": x[0]}}
  assert fingerprint(params) == fingerprint(same) and len(fingerprint(params)) == 16
  others = [
    params | {"a": x.at[1, 7].multiply(1.01)},
    params | {"a": x.at[0, :2].set(x[0, 1::-1])},
    params | {"a": x.reshape(50, 3)},
    {"a": x, "b": {"d": x[0]}},
  ]
  assert len({fingerprint(other) for other in [params, *others]}) == 5
