"""Products of a warp's matrices by mma.m16n8k16, and which bytes of shared memory each lane takes.

A matrix in shared memory has rows of 64 or 128 numbers of 16 bits. Its 16-byte chunks are permuted
within 128 bytes, so that eight rows of one column lie in different banks:

  byte of (row, column) = row * pitch + 16 * (column / 8 XOR row % 8)      pitch: bytes of a row

A matrix [64, columns] in registers belongs to four warps: warp w holds rows 16 w to 16 w + 15 and,
of each block of 8 columns, lane 4 r + c holds

  (r, 2 c), (r, 2 c + 1); (r + 8, 2 c), (r + 8, 2 c + 1)

Of 16-bit numbers these pairs are words of the left operand of mma, of float32 they are its sums:
the sums of one product, rounded, are the next one's operand.

The functions here are for any machine that has the lane's number, or those of all lanes in an
array, and the instructions: the GPU (warp_matrices.py), or NumPy in tests.
"""

from collections.abc import Callable
from typing import Any, Protocol

LANES = 128  # of four warps
CHUNK = 8  # numbers of 16 bytes
BLOCK = 64  # rows of a matrix in registers

Left = Callable[[int], list]  # gives the left operand of the c-th 16 columns: four words


class Machine(Protocol):
  """The instructions that the functions below need."""

  lane: Any  # number, with the operators of integers

  def load_blocks(self, address: Any, offset: int, transposed: bool) -> list:
    """Loads four matrices of 8 rows of 16 bytes (ldmatrix); lane 8 m + r of a warp has the address,
    less the offset, of row r of the m-th one. Returns four words a lane.
    """

  def multiply_add(self, sums: list, a: list, b: list) -> list:
    """Returns sums [16, 8] + a [16, 16] b [16, 8] of a warp (mma): four, four and two words."""


def row_part(lane: Any, dim: int) -> tuple[Any, Any, Any]:
  """Returns the row, the chunk and the byte of the 16 bytes that a lane copies first of a matrix.

  It copies the same chunk of every (LANES * CHUNK / dim)-th row, a multiple of 8 rows.
  """
  per_row = dim // CHUNK
  row, chunk = lane >> (per_row.bit_length() - 1), lane & (per_row - 1)
  return row, chunk, row * (2 * dim) + (chunk ^ (row & 7)) * 16


def own_row(lane: Any) -> Any:
  """Returns the first of a lane's two rows of a matrix in registers."""
  return ((lane >> 5) & 3) * 16 + ((lane >> 2) & 7)


def pair_addresses(lane: Any, begin: Any, dim: int) -> list:
  """Returns where a lane stores its pair of its first row, of each block of 8 columns."""
  row = own_row(lane)
  at_row = begin + row * (2 * dim) + (lane & 3) * 4
  return [at_row + ((row & 7) ^ (i & 7)) * 16 + i // 8 * 128 for i in range(dim // CHUNK)]


def block_addresses(lane: Any, begin: Any, dim: int, *, rows_first: bool) -> list:
  """Returns the addresses that a lane gives to `load_blocks`, which loads 16 rows of 16 columns:
  for columns 16 c to 16 c + 15 the (c % 4)-th one, with c // 4 * 128 bytes of offset.

  The four matrices are in the order of rows, or of columns, first.
  """
  low, high = (lane >> 3) & 1, (lane >> 4) & 1
  second_columns, second_rows = (low, high) if rows_first else (high, low)
  row = second_rows * 8 + (lane & 7)
  chunk = second_columns ^ (lane & 7)
  return [begin + row * (2 * dim) + (chunk ^ (2 * c)) * 16 for c in range(4)]


def load_left(machine: Machine, begin: Any, dim: int) -> Left:
  """Returns the left operand of a matrix [64, dim] in shared memory."""
  rows = begin + ((machine.lane >> 5) & 3) * (16 * 2 * dim)
  addresses = block_addresses(machine.lane, rows, dim, rows_first=False)
  return lambda c: machine.load_blocks(addresses[c % 4], c // 4 * 128, False)


def product(machine: Machine, zero: list, left: Left, begin: Any, count: int, dim: int) -> list:
  """Returns the sums of a @ b.T, by blocks of 8 columns.

  Args:
    machine: see Machine.
    zero: four zeros.
    left: a [64, dim].
    begin: where b [count, dim] begins in shared memory.
    count, dim: sizes.
  """
  addresses = block_addresses(machine.lane, begin, dim, rows_first=True)
  sums = [zero for _ in range(count // 8)]
  for c in range(dim // 16):
    a = left(c)
    for j in range(count // 16):
      b = machine.load_blocks(addresses[c % 4], j * 16 * 2 * dim + c // 4 * 128, False)
      for half in range(2):
        n = 2 * j + half
        sums[n] = machine.multiply_add(sums[n], a, b[2 * half : 2 * half + 2])
  return sums


def add_product(machine: Machine, sums: list, left: Left, begin: Any, count: int, dim: int) -> list:
  """Returns sums + a @ b, by blocks of 8 columns.

  Args:
    machine: see Machine.
    sums: four words of each block.
    left: a [64, count].
    begin: where b [count, dim] begins in shared memory.
    count, dim: sizes.
  """
  addresses = block_addresses(machine.lane, begin, dim, rows_first=False)
  sums = list(sums)
  for j in range(count // 16):
    a = left(j)
    for c in range(dim // 16):
      b = machine.load_blocks(addresses[c % 4], j * 16 * 2 * dim + c // 4 * 128, True)
      for half in range(2):
        n = 2 * c + half
        sums[n] = machine.multiply_add(sums[n], a, b[2 * half : 2 * half + 2])
  return sums
