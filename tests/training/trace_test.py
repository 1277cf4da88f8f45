"""Kinds of kernels, and the table of a trace."""

import jax
import jax.numpy as jnp
import pytest

from sparsek.training import trace


@pytest.mark.parametrize(
  "name, kind",
  [
    ("sparsek_forward_mosaic_gpu_kernel", "attention"),
    ("sparsek_mma_key_gradients_mosaic_gpu_kernel", "attention"),
    ("cudnn_generated_fort_native_sdpa_sm90_flash_bprop_wgmma", "attention"),
    ("void cudnn::fusion::compute_dot_do_o_specialized<true>", "attention"),
    ("sparsek_walk_mosaic_gpu_kernel", "thresholds and lists"),
    ("sparsek_gather_rows_mosaic_gpu_kernel", "gathers and sums of rows"),
    ("sparsek_sum_rows", "gathers and sums of rows"),
    ("sparsek_sum_columns", "thresholds and lists"),
    ("sparsek_scorer_loss_sums_2", "scorers' loss"),
    ("sparsek_rms_norm_gradients_mosaic_gpu_kernel", "norms"),
    ("sort_126_0", "thresholds and lists"),
    ("nvjet_sm90_tst_128x160_64x5_2x1_v_bz_NNT", "matrix products"),
    ("gemm_fusion_dot_610", "matrix products"),
    ("Memset 0", "copies and fills"),
    ("loop_add_fusion_11", "all else, by XLA"),
  ],
)
def test_kinds(name, kind):
  assert trace.kind_of(name) == kind


def test_table_adds_up():
  calls = [
    ("nvjet_sm90_a", 6.0),
    ("sparsek_forward_mosaic_gpu_kernel", 3.0),
    ("sparsek_forward_mosaic_gpu_kernel_1", 1.0),
    ("loop_add_fusion_3", 1.0),
    ("loop_add_fusion_41", 1.0),
  ]
  lines = [line.split() for line in trace.table(calls, steps=2)]
  assert lines[0] == ["busy", "6.00", "ms", "a", "step"]
  assert [line[0] for line in lines[1:4]] == ["3.00", "2.00", "1.00"] and [
    line[3] for line in lines[1:4]
  ] == ["matrix", "attention", "all"]
  assert lines[5:] == [
    ["3.00", "ms", "50.0%", "0.5", "x", "nvjet_sm90_a"],
    ["2.00", "ms", "33.3%", "1", "x", "sparsek_forward"],
    ["1.00", "ms", "16.7%", "1", "x", "loop_add_fusion"],
  ]


def test_a_trace_without_accelerators_says_nothing(tmp_path):
  assert trace.kernels(str(tmp_path)) == []
  with jax.profiler.trace(str(tmp_path)):
    jnp.ones(8).block_until_ready()
  if jax.default_backend() == "cpu":
    assert trace.kernels(str(tmp_path)) == [] and trace.table([], steps=3) == []
