"""The products of a warp's matrices, lane by lane in NumPy: every address and every operand."""

import numpy as np
import pytest

from sparsek.kernels.ampere.warp_products import (
  BLOCK,
  CHUNK,
  LANES,
  add_product,
  load_left,
  own_row,
  pair_addresses,
  product,
  row_part,
)

WARP = 32


class Machine:
  """All lanes of a program at once, with the instructions as the PTX manual defines them.

  A word is an array [LANES, 2] of two 16-bit numbers, here of float32; a sum one of [LANES].
  """

  def __init__(self, size):
    self.lane, self.shared = np.arange(LANES), np.full(size // 2, np.nan)

  def at(self, address):
    assert np.all(address % 2 == 0)
    return self.shared[address // 2]

  def load_blocks(self, address, offset, transposed):
    words = np.empty((4, LANES, 2))
    for first in range(0, LANES, WARP):
      for m in range(4):
        rows = (address + offset)[first + 8 * m : first + 8 * m + 8]
        assert np.all(rows % 16 == 0) and len(set(rows // 16 % 8)) == 8, "conflicts of banks"
        matrix = self.at(rows[:, None] + 2 * np.arange(8))
        matrix = matrix.T if transposed else matrix
        words[m, first : first + WARP] = matrix.reshape(WARP, 2)
    return list(words)

  def multiply_add(self, sums, a, b):
    out = np.stack(sums)
    for first in range(0, LANES, WARP):
      lanes = slice(first, first + WARP)
      blocks = [word[lanes].reshape(8, 8) for word in a]
      left = np.block([[blocks[0], blocks[2]], [blocks[1], blocks[3]]])
      right = np.concatenate([word[lanes].reshape(8, 8).T for word in b])
      total = (left @ right).reshape(2, WARP, 2)
      for half in range(2):
        out[2 * half : 2 * half + 2, lanes] += total[half].T
    return list(out)


def stored(machine, begin, matrix):
  """Copies a matrix to shared memory as the lanes do."""
  rows, dim = matrix.shape
  row, chunk, byte = row_part(machine.lane, dim)
  for step in range(0, rows, LANES * CHUNK // dim):
    for i in range(CHUNK):
      address = begin + byte + step * 2 * dim + 2 * i
      machine.shared[address // 2] = matrix[row + step, chunk * CHUNK + i]


def gathered(sums):
  """Returns the matrix of sums, by blocks of 8 columns."""
  out, row = np.full((BLOCK, 8 * len(sums)), np.nan), own_row(np.arange(LANES))
  column = 2 * (np.arange(LANES) % 4)
  for block, numbers in enumerate(sums):
    for i, number in enumerate(numbers):
      out[row + i // 2 * 8, 8 * block + column + i % 2] = number
  return out


def words_of(matrix):
  """Returns the left operand of a matrix [64, columns] in registers."""
  row, column = own_row(np.arange(LANES)), 2 * (np.arange(LANES) % 4)
  words = [
    np.stack([matrix[row + half * 8, 8 * block + column + i] for i in range(2)], axis=1)
    for block in range(matrix.shape[1] // 8)
    for half in range(2)
  ]
  return lambda c: words[4 * c : 4 * c + 4]


@pytest.mark.parametrize("dim", (64, 128))
@pytest.mark.parametrize("count", (16, 32, 64))
def test_products_are_those_of_matrices(dim, count):
  rng = np.random.default_rng(0)
  a, b = rng.normal(size=(BLOCK, dim)), rng.normal(size=(count, dim))
  machine, begin = Machine(2 * dim * (BLOCK + count)), 2 * dim * BLOCK
  stored(machine, 0, a)
  stored(machine, begin, b)
  left, zero = load_left(machine, 0, dim), [np.zeros(LANES)] * 4
  np.testing.assert_allclose(
    gathered(product(machine, zero, left, begin, count, dim)), a @ b.T, atol=1e-9
  )
  for c in range(dim // 16):
    np.testing.assert_array_equal(left(c), words_of(a)(c))

  weights, acc = rng.normal(size=(BLOCK, count)), rng.normal(size=(BLOCK, dim))
  row, column = own_row(machine.lane), 2 * (machine.lane % 4)
  sums = [
    [acc[row + i // 2 * 8, 8 * block + column + i % 2] for i in range(4)]
    for block in range(dim // 8)
  ]
  np.testing.assert_allclose(
    gathered(add_product(machine, sums, words_of(weights), begin, count, dim)),
    acc + weights @ b,
    atol=1e-9,
  )


@pytest.mark.parametrize("dim", (64, 128))
def test_pairs_are_stored_where_rows_are_read(dim):
  matrix = np.random.default_rng(1).normal(size=(BLOCK, dim))
  machine, words = Machine(2 * dim * BLOCK), words_of(matrix)
  for block, address in enumerate(pair_addresses(machine.lane, 0, dim)):
    for half in range(2):
      pair = words(block // 2)[block % 2 * 2 + half]
      for i in range(2):
        machine.shared[(address + half * 8 * 2 * dim) // 2 + i] = pair[:, i]
      for first in range(0, LANES, WARP):
        banks = (address[first : first + WARP] // 4) % 32
        assert len(set(banks)) == WARP, "conflicts of banks"
  row, chunk, byte = row_part(machine.lane, dim)
  for step in range(0, BLOCK, LANES * CHUNK // dim):
    for i in range(CHUNK):
      read = machine.at(byte + step * 2 * dim + 2 * i)
      np.testing.assert_array_equal(read, matrix[row + step, chunk * CHUNK + i])
