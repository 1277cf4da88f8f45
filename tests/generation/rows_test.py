"""Texts on a mesh: which arrays get there, and a mesh that splits no text."""

import jax
import jax.numpy as jnp
import numpy as np

from sparsek.config import TransformerConfig
from sparsek.generation.rows import ROW, SAME, over_rows, without_context
from sparsek.parallel.mesh import make_mesh

CONFIG = TransformerConfig(
  vocab_size=9, num_layers=1, embed_dim=8, num_heads=1, num_kv_heads=1, head_dim=8, mlp_dim=8
)


def test_arrays_without_elements_stay_off_the_devices():
  """XLA's compiler for GPUs ends the process where they are inputs or outputs of a shard_map."""

  def function(number, texts, end_ids):
    assert end_ids.shape == (0,) and texts["empty"].shape == (2, 0, 3)
    return {"empty": texts["empty"] * 2, "sum": texts["full"] + number, "none": None}

  kinds = SAME, ROW, SAME
  mesh = make_mesh(devices=jax.devices()[:1])
  computed = over_rows(function, CONFIG, mesh, kinds, ROW)
  texts = {"empty": jnp.zeros((2, 0, 3), jnp.int32), "full": jnp.arange(2)}
  args = jnp.int32(1), texts, jnp.zeros(0, jnp.int32)
  (call,) = [eqn for eqn in jax.make_jaxpr(computed)(*args).eqns if "shard_map" in str(eqn)]
  assert len(call.invars) == 2 and len(call.outvars) == 1
  result = computed(*args)
  np.testing.assert_array_equal(result["sum"], [1, 2])
  assert result["empty"].shape == (2, 0, 3) and result["empty"].dtype == jnp.int32
  assert result["none"] is None


def test_a_mesh_without_context_keeps_its_devices():
  devices = jax.devices()[:1]
  mesh = jax.sharding.AbstractMesh((2, 3, 1), ("data", "fsdp", "context"))
  assert without_context(mesh) is mesh and without_context(None) is None
  mesh = jax.sharding.Mesh(np.array(devices * 8).reshape(2, 2, 2), ("data", "fsdp", "context"))
  folded = without_context(mesh)
  assert "context" not in folded.shape and folded.shape["fsdp"] == 2
  assert folded.devices.shape == (2, 2, 2)
