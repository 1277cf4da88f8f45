"""Safetensors files: checks of their headers, reading by memory maps, writing tensor by tensor.

A file is the header's length (8 bytes, little endian), the header (JSON: name -> dtype, shape,
data_offsets) and the tensors' bytes. A checkpoint is one model.safetensors, or shards beside a
model.safetensors.index.json, which says in which shard each tensor is. Format:
https://github.com/huggingface/safetensors
"""

import json
import math
import mmap
import os
import struct
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from sparsek.errors import UsageError
from sparsek.storage import files

_TYPES: dict[str, type] = {
  "F64": np.float64,
  "F32": np.float32,
  "F16": np.float16,
  "BF16": ml_dtypes.bfloat16,
  "F8_E4M3": ml_dtypes.float8_e4m3fn,
  "F8_E5M2": ml_dtypes.float8_e5m2,
  "I64": np.int64,
  "I32": np.int32,
  "I16": np.int16,
  "I8": np.int8,
  "U64": np.uint64,
  "U32": np.uint32,
  "U16": np.uint16,
  "U8": np.uint8,
  "BOOL": np.bool_,
}
DTYPES = {name: np.dtype(dtype) for name, dtype in _TYPES.items()}
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
MAX_HEADER = 100 * 2**20  # as in the reference implementation
BLOCK = 16 * 2**20  # bytes that are copied at a time


class Tensor(NamedTuple):
  """The location of a tensor: it begins at byte `offset` of the file."""

  dtype: np.dtype
  shape: tuple[int, ...]
  offset: int


def _is_size(value: object) -> bool:
  return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63


def _parse_header(path: str, raw: bytes, data_start: int, file_size: int) -> dict[str, Tensor]:
  """Returns the tensors that a header describes.

  Raises:
    UsageError: unless the tensors fill the rest of the file exactly, each with as many bytes as its
      dtype and shape need.
  """
  data_size = file_size - data_start
  tensors: dict[str, Tensor] = {}
  ranges = []
  for name, entry in _header_entries(path, raw):
    if name == "__metadata__":
      continue
    if name in tensors:
      raise _damaged(path, f"its header names tensor {name!r:.100} twice")
    dtype, shape, begin, end = _parse_entry(path, name, entry)
    if not begin <= end <= data_size:
      raise _damaged(path, f"tensor {name!r:.100} lies at bytes {begin} to {end} of {data_size}")
    needed = math.prod(shape) * DTYPES[dtype].itemsize
    if needed != end - begin:
      raise _damaged(
        path,
        f"tensor {name!r:.100} of dtype {dtype} and shape {shape} needs {needed} bytes, "
        f"and has {end - begin}",
      )
    tensors[name] = Tensor(DTYPES[dtype], tuple(shape), data_start + begin)
    ranges.append((begin, end, name))
  offset = 0
  for begin, end, name in sorted(ranges):
    if begin != offset:
      raise _damaged(
        path,
        f"tensor {name!r:.100} begins at byte {begin}, where the one before it ends at {offset}",
      )
    offset = end
  if offset != data_size:
    raise _damaged(path, f"its tensors end at byte {offset} of {data_size}")
  return tensors


def _damaged(path: str, reason: str) -> UsageError:
  return UsageError(f"{path} is damaged: {reason}")


def _header_entries(path: str, raw: bytes) -> list[tuple[str, Any]]:
  """Returns the (name, value) pairs of a header; objects in them are lists of pairs too."""
  try:
    pairs = json.loads(raw.decode("utf-8"), object_pairs_hook=list)
  except (ValueError, RecursionError) as error:
    raise _damaged(path, f"its header is no JSON ({str(error)[:100]})") from None
  if raw[:1] != b"{":
    raise _damaged(path, "its header is no JSON object")
  return pairs


def _parse_entry(path: str, name: str, entry: Any) -> tuple[str, list[int], int, int]:
  """Returns the dtype, the shape and the range of bytes of a tensor."""
  is_object = isinstance(entry, list) and all(isinstance(pair, tuple) for pair in entry)
  fields: dict[str, Any] = dict(entry) if is_object else {}
  dtype, shape, offsets = (fields.get(key) for key in ("dtype", "shape", "data_offsets"))
  tensor = f"tensor {name!r:.100}"
  if not isinstance(dtype, str) or dtype not in DTYPES:
    raise _damaged(
      path, f"{tensor} has dtype {files.shown(dtype)}, expected one of {', '.join(DTYPES)}"
    )
  if not isinstance(shape, list) or not all(map(_is_size, shape)) or len(shape) > 8:
    raise _damaged(
      path, f"{tensor} has shape {files.shown(shape)}, expected a list of at most 8 sizes"
    )
  if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_is_size, offsets)):
    raise _damaged(path, f"{tensor} has data_offsets {files.shown(offsets)}, expected [begin, end]")
  return dtype, shape, offsets[0], offsets[1]


class SafetensorsFile:
  """One file, mapped read-only.

  Attributes:
    path: of the file.
    tensors: by name.
  """

  def __init__(self, path: str):
    """Opens a file; raises UsageError if it cannot be read or its header does not fit it."""
    self.path = path
    try:
      size = os.path.getsize(path)
      if not os.path.isfile(path) or size < 8:
        raise UsageError(f"{path} is no safetensors file: it has {size} bytes")
      with open(path, "rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        if length > min(size - 8, MAX_HEADER):
          raise UsageError(
            f"{path} is damaged: it announces a header of {length:,} bytes; the file has "
            f"{size:,}, and a header at most {MAX_HEADER:,}"
          )
        self.tensors = _parse_header(path, file.read(length), 8 + length, size)
        self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError as error:
      raise UsageError(f"{path} cannot be read: {error.strerror or error}") from None

  def view(self, name: str) -> np.ndarray:
    """Returns a tensor, read-only, as a view of the file."""
    dtype, shape, offset = self.tensors[name]
    return np.frombuffer(self._map, dtype, math.prod(shape), offset).reshape(shape)

  def release(self) -> None:
    """Releases the memory of pages that were read; they are read again when needed."""
    if hasattr(mmap, "MADV_DONTNEED"):
      self._map.madvise(mmap.MADV_DONTNEED)


def open_folder(folder: str) -> dict[str, SafetensorsFile]:
  """Returns {name of a tensor: its file} of a checkpoint of one file or of shards.

  Raises:
    UsageError: if there is no checkpoint, a shard is missing or outside the folder, or a file is
      damaged. Pickle files are refused, since reading one runs the code in it.
  """
  if not os.path.isdir(folder):
    raise UsageError(f"{folder}: there is no such folder")
  if os.path.isfile(os.path.join(folder, SINGLE)):
    file = SafetensorsFile(os.path.join(folder, SINGLE))
    return dict.fromkeys(file.tensors, file)
  path = os.path.join(folder, INDEX)
  if not os.path.isfile(path):
    pickles = sorted(name for name in os.listdir(folder) if name.endswith(PICKLES))
    if pickles:
      raise UsageError(
        f"{folder} holds {pickles[0]!r} and no {SINGLE}: a pickle file is not read, since "
        "reading it runs whatever code is in it; "
        f"have its publisher, or a machine you can lose, save it as safetensors"
      )
    raise UsageError(f"{folder} holds neither {SINGLE} nor {INDEX}")
  weight_map = files.read_json_object(path).get("weight_map")
  if not isinstance(weight_map, dict) or not weight_map:
    raise UsageError(
      f"{path}: weight_map is {files.shown(weight_map)}, expected an object of "
      f"tensor names and file names"
    )
  for name, shard in weight_map.items():
    if (
      not isinstance(shard, str)
      or os.path.basename(shard) != shard
      or "\\" in shard
      or "\0" in shard
      or not shard.endswith(".safetensors")
    ):
      raise UsageError(
        f"{path}: weight_map puts {name!r:.100} in {files.shown(shard)}, expected a "
        f".safetensors file of the folder itself"
      )
  shards = sorted(set(weight_map.values()))
  missing = [shard for shard in shards if not os.path.isfile(os.path.join(folder, shard))]
  if missing:
    raise UsageError(
      f"{folder} lacks {len(missing)} of the {len(shards)} shards that {INDEX} "
      f"names: {', '.join(missing[:5])!r:.300}"
    )
  opened = {shard: SafetensorsFile(os.path.join(folder, shard)) for shard in shards}
  for shard, file in opened.items():
    named = {name for name, other in weight_map.items() if other == shard}
    differ = named ^ set(file.tensors)
    if differ:
      raise UsageError(f"{path} and {shard} disagree on where {min(differ)!r:.100} is")
  return {name: opened[shard] for name, shard in weight_map.items()}


class Pending(NamedTuple):
  """A tensor to write; `read` is called when it is written."""

  dtype: np.dtype
  shape: tuple[int, ...]
  read: Callable[[], np.ndarray]

  @property
  def size(self) -> int:
    return math.prod(self.shape) * self.dtype.itemsize


def blocks(array: np.ndarray, size: int = BLOCK) -> Iterator[slice]:
  """Yields slices of the first axis that hold about `size` bytes each."""
  rows = max(1, size // max(1, array.nbytes // max(1, len(array))))
  return (slice(start, start + rows) for start in range(0, len(array), rows))


def _write_file(path: str, tensors: Mapping[str, Pending], progress: Callable) -> None:
  names = {dtype: name for name, dtype in DTYPES.items()}
  # transformers refuses files without this entry
  header: dict[str, dict] = {"__metadata__": {"format": "pt"}}
  offset = 0
  for name, tensor in tensors.items():
    header[name] = {
      "dtype": names[tensor.dtype],
      "shape": tensor.shape,
      "data_offsets": [offset, offset + tensor.size],
    }
    offset += tensor.size
  raw = json.dumps(header).encode()
  raw += b" " * (-len(raw) % 8)  # tensors begin at a multiple of 8 bytes
  with open(path, "wb") as file:
    file.write(struct.pack("<Q", len(raw)) + raw)
    for tensor in progress(list(tensors.values())):
      array = tensor.read()
      for rows in blocks(array):
        file.write(np.ascontiguousarray(array[rows]).view(np.uint8).data)


def write_folder(
  folder: str, tensors: Mapping[str, Pending], max_shard_bytes: int, progress: Callable = iter
) -> None:
  """Writes one file, or shards and their index.

  Args:
    folder: must exist.
    tensors: in the order of the file.
    max_shard_bytes: largest size of a shard, except for a single larger tensor.
    progress: wraps the list of tensors of each file.
  """
  shards: list[dict[str, Pending]] = [{}]
  for name, tensor in tensors.items():
    if shards[-1] and sum(t.size for t in shards[-1].values()) + tensor.size > max_shard_bytes:
      shards.append({})
    shards[-1][name] = tensor
  names = (
    [SINGLE]
    if len(shards) == 1
    else [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
  )
  for name, shard in zip(names, shards):
    _write_file(os.path.join(folder, name), shard, progress)
  if len(shards) > 1:
    index = {
      "metadata": {"total_size": sum(tensor.size for tensor in tensors.values())},
      "weight_map": {tensor: name for name, shard in zip(names, shards) for tensor in shard},
    }
    with open(os.path.join(folder, INDEX), "w", encoding="utf-8") as file:
      json.dump(index, file, indent=2)
