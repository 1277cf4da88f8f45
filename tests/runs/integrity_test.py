"""Checksums of arrays and the digest of the data state."""

import json

import jax.numpy as jnp
import numpy as np

from sparsek.runs import integrity


def test_checksum_sees_any_bit():
  tree = {"a": jnp.ones((3, 4)), "b": jnp.zeros((), jnp.int32)}
  changed = {**tree, "a": tree["a"].at[1, 2].set(np.nextafter(np.float32(1), np.float32(2)))}
  assert integrity.checksums(tree)["['a']"] != integrity.checksums(changed)["['a']"]


def test_the_digest_is_that_of_the_json_which_is_read_back():
  state = {10: (1, 2), 9: {"a": 0.1}, "b": None}
  assert integrity.digest(state) == integrity.digest(json.loads(json.dumps(state)))
  assert integrity.digest(state) != integrity.digest({**state, "b": 0})
