"""Counts of collectives in the text of compiled programs."""

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.sharding import PartitionSpec

from sparsek.parallel.collectives import collectives
from sparsek.parallel.mesh import make_mesh

PROGRAM = """HloModule jit_step, is_scheduled=true, num_partitions=8

%sum (x: f32[], y: f32[]) -> f32[] {
  ROOT %add = f32[] add(%x, %y)
}

%scattered (p: bf16[8,4]) -> bf16[2,4] {
  ROOT %rs = bf16[2,4]{1,0} reduce-scatter(%p), replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%sum
}

%body (t: (s32[], f32[16])) -> (s32[], f32[16]) {
  %permute = f32[4,2]{1,0} collective-permute(%x), source_target_pairs={{0,1},{1,2}}
  %s = ((bf16[8,4]), bf16[2,4], u32[]) async-start(%y), calls=%scattered
  %d = bf16[2,4]{1,0} async-done(%s), calls=%scattered
}

ENTRY %main (a: f32[16]) -> f32[16] {
  %loop = (s32[], f32[16]{0}) while(%t), body=%body, backend_config={"known_trip_count":{"n":"5"}}
  %gather = (f32[2]{0:T(128)}, f32[16]{0:T(128)}) all-gather-start(%a), replica_groups=[1,8]<=[8]
  %done = f32[16]{0} all-gather-done(%gather)
  %two = ((f32[2], s8[3]), (f32[16], s8[24])) all-gather-start(%a, %b), replica_groups={}
  %r = (f32[4], pred[8]) all-reduce-start(%c, %d), replica_groups=[4,2]<=[2,4]T(1,0), to_apply=%sum
  %q = ((f32[4]), f32[4]{0}) all-reduce-start(%c), replica_groups={{0,1},{2,3}}, to_apply=%sum
  %e = (f32[1,4], f32[1,4]) all-to-all(%f, %g), replica_groups={{0,1},{2,3},{4,5},{6,7}}
  %n = f32[4] reduce-scatter(%i), replica_groups=mesh['a'=2,'b'=4] {'b'}, to_apply=%sum
  %m = f32[4] reduce-scatter(%j), replica_groups=mesh['a'=2,'b'=4] {'a','b':(2)2}, to_apply=%sum
  %o = f32[4] reduce-scatter(%k), replica_groups=mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'b'}
  ROOT %end = (f32[2], f32[2], u32[], u32[]) collective-permute-start(%h), source_target_pairs={}
}
"""


def test_reads_every_form():
  assert collectives(PROGRAM) == {
    "all-gather": (2, 56 + 56 + 21, 0),
    "all-reduce": (2, 16 + 8 + 16, 0),
    "reduce-scatter": (8, 5 * 3 * 16 + 3 * 3 * 16, 0),
    "all-to-all": (1, 16, 0),
    "collective-permute": (6, 5 * 32 + 8, 0),
  }


LOOP = """HloModule jit_step, is_scheduled=true, num_partitions=2

%body (t: (s32[], f32[16])) -> (s32[], f32[16]) {
  %p = f32[4]{0} collective-permute(%x), source_target_pairs={{0,1},{1,0}}
}

%below (t: (s32[], f32[16])) -> pred[] {
  %six = s32[]{:T(128)} constant(6), metadata={op_name="while"}
  %t = (s32[]{:T(128)}, f32[16]{0:T(128)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%t), index=0
  ROOT %lt = pred[]{:T(512)} compare(%i, %six), direction=LT, metadata={op_name="lt"}
}

ENTRY %main (a: f32[16]) -> f32[16] {
  %loop = (s32[], f32[16]{0}) while(%t), condition=%below, body=%body
}
"""


@pytest.mark.parametrize(
  "old, new, trips",
  [
    ("", "", 6),
    ("direction=LT", "direction=NE", 1),
    ("  ROOT", "  %further = s32[] add(%i, %i)\n  ROOT", 1),
    ("%i, %six", "%six, %i", 1),
    ("condition=%below", "condition=%other", 1),
  ],
)
def test_reads_how_often_a_scan_runs(old, new, trips):
  assert collectives(LOOP.replace(old, new)) == {"collective-permute": (trips, 16 * trips, 0)}


def test_knows_what_is_sent_between_nodes():
  """Groups of two nodes are {0, 4}, {0, 1, 4, 5} and {0, 2, 4, 6}; {0, 1, 2, 3} is of one."""
  counted = collectives(PROGRAM, nodes=[0] * 4 + [1] * 4)
  assert {kind: traffic.between_nodes for kind, traffic in counted.items()} == {
    "all-gather": 56 + 56 + 21,
    "all-reduce": 16 + 8,
    "reduce-scatter": 2 * 3 * 16,
    "all-to-all": 0,
    "collective-permute": 8,
  }


def test_an_unknown_list_of_devices_is_an_error():
  with pytest.raises(ValueError, match="cannot read the devices.*=V9"):
    collectives(PROGRAM.replace("replica_groups={},", "").replace("[1,8]<=[8]", "V9"))


def test_a_program_of_one_device_has_none():
  square = lambda _, x: x * x
  step = lambda x: lax.psum(x, "fsdp") + lax.fori_loop(0, 3, square, x)
  part = PartitionSpec()
  f = jax.shard_map(
    step, mesh=make_mesh(devices=jax.devices()[:1]), in_specs=part, out_specs=part, check_vma=False
  )
  counted = collectives(jax.jit(f).lower(jnp.ones(4)).compile().as_text())
  assert all(traffic.received == 0 for traffic in counted.values())
