import jax.numpy as jnp
import numpy as np
import pytest

from sparsek.attention.documents import document_bounds, position_in_document

LENGTH = 20
SEGMENTS = jnp.asarray([[1] * 7 + [2] * 1 + [1] * 12, [5] * 10 + [6] * 8 + [0] * 2], jnp.int32)


def test_document_bounds():
  start, end = document_bounds(SEGMENTS, 2, LENGTH)
  np.testing.assert_array_equal(start[0], [0] * 7 + [7] + [8] * 12)
  np.testing.assert_array_equal(end[0], [7] * 7 + [8] + [20] * 12)
  np.testing.assert_array_equal(end[1], [10] * 10 + [18] * 8 + [20] * 2)
  start, end = document_bounds(None, 2, 3)
  assert np.all(start == 0) and np.all(end == 3) and start.shape == end.shape == (2, 3)


def test_position_in_document():
  want = [[*range(7), 0, *range(12)], [*range(10), *range(8), 0, 1]]
  np.testing.assert_array_equal(position_in_document(SEGMENTS, 2, LENGTH), want)
  np.testing.assert_array_equal(position_in_document(None, 2, 3), [[0, 1, 2]] * 2)
  with pytest.raises(ValueError, match="segment_ids"):
    position_in_document(SEGMENTS, 2, LENGTH + 1)
