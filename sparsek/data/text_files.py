"""Texts from files: plain text, JSON lines, JSON and Parquet, plain or compressed.

The ending of the name, in upper or lower case, gives the kind; the first bytes must not contradict
it:

  .jsonl .ndjson     an object per line, with the text in a field
  .json              an array of objects or of texts, one object, or an object per line
  .parquet           a column of texts; needs pyarrow
  .gz .zst           one of the above, compressed, but no Parquet; .zst needs Python 3.14 or
                     zstandard
  anything else      a text in UTF-8, with or without a byte order mark
"""

import contextlib
import gzip
import io
import os
import zlib
from collections.abc import Callable, Iterable, Iterator
from typing import IO, Any

from sparsek.data.tokenizer import as_valid_unicode
from sparsek.errors import UsageError
from sparsek.storage.files import check_regular, parse_json, reason_of

_LINES = (".jsonl", ".ndjson")
_COMPRESSED = (".gz", ".zst")
_BOM = b"\xef\xbb\xbf"
_CHUNK = 1 << 16
# First bytes of files that are no text in UTF-8.
_MAGIC = {
  b"\x1f\x8b": "gzip data (then its name should end in .gz)",
  b"\x28\xb5\x2f\xfd": "zstd data (then its name should end in .zst)",
  b"PAR1": "Parquet (then its name should end in .parquet)",
  b"BZh91AY&SY": "bzip2 data",
  b"\xfd7zXZ\x00": "xz data",
  b"7z\xbc\xaf\x27\x1c": "a 7z archive",
  b"\x04\x22\x4d\x18": "lz4 data",
  b"PK\x03\x04": "a zip archive (or a document made of one)",
  b"Rar!\x1a": "a rar archive",
  b"%PDF-": "a PDF",
  b"\x89PNG": "a PNG picture",
  b"\xff\xd8\xff": "a JPEG picture",
  b"GIF8": "a GIF picture",
  b"RIFF": "a RIFF file",
  b"OggS": "an Ogg file",
  b"\x7fELF": "an ELF program",
  b"\x89HDF": "HDF5",
  b"\x93NUMPY": "a NumPy array",
  b"ARROW1": "Arrow data",
  b"SQLite format 3": "an SQLite database",
  b"GGUF": "a GGUF model",
  b"Obj\x01": "Avro data",
  **{bytes([0x80, version]): "a pickle" for version in range(2, 6)},
  b"\xff\xfe\x00\x00": "text in UTF-32",
  b"\x00\x00\xfe\xff": "text in UTF-32",
  b"\xff\xfe": "text in UTF-16",
  b"\xfe\xff": "text in UTF-16",
}
# A text may begin with these too, but has no NUL bytes.
_TEXT_TOO = (b"GIF8", b"RIFF", b"OggS", b"GGUF", b"PAR1")


def plain_name(path: str) -> str:
  """Returns the name of a file in lower case, without .gz or .zst."""
  name = os.path.basename(path).lower()
  return name.removesuffix(".gz").removesuffix(".zst")


def texts(
  path: str,
  text_field: str = "text",
  errors: str = "strict",
  bad: Callable[[UsageError], None] | None = None,
) -> Iterator[tuple[str, str]]:
  """Yields (name, text) of a file's documents.

  Args:
    path: of the file.
    text_field: of a JSON object, or a Parquet column.
    errors: "strict", or "replace" for U+FFFD in place of what is not UTF-8.
    bad: is called with the error of a line, an element or a row that is then left out; by default
      the error is raised.
  Raises:
    UsageError: naming the file, and where in it, for anything that cannot be read.
  """
  name = plain_name(path)
  records: Iterable[tuple[str, object]]
  if name.endswith(".parquet"):
    records, are_lines = _parquet_rows(path, text_field), False
  elif name.endswith(_LINES):
    records, are_lines = _lines(path), True
  elif name.endswith(".json"):
    content = _read(path)
    values = _json_values(path, content, errors)
    are_lines = values is None
    records = _numbered(path, content.split(b"\n")) if values is None else values
  else:
    yield path, _decode(path, _read(path), errors)
    return
  read = _text_of_line if are_lines else _text_of
  for name, record in records:
    try:
      text = read(name, record, text_field, errors)
    except UsageError as error:
      if bad is None:
        raise
      bad(error)
      continue
    yield name, text


def _text_of_line(name: str, line: object, text_field: str, errors: str) -> str:
  """Returns the text of a line, bytes, of a file of JSON lines."""
  assert isinstance(line, bytes)
  if b"\0" in line:
    raise UsageError(f"{name}: NUL bytes, which no JSON has")
  value = parse_json(_decode(name, line, errors), name)
  if not isinstance(value, dict):
    raise UsageError(
      f"{name}: expected a JSON object with the field {text_field!r}, found a "
      f"{type(value).__name__}"
    )
  return _text_of(name, value, text_field, errors)


def _text_of(name: str, value: object, text_field: str, errors: str) -> str:
  """Returns the text of a JSON object, or a value that is a text itself."""
  text = value.get(text_field) if isinstance(value, dict) else value
  if not isinstance(text, str):
    if isinstance(value, dict) and text_field not in value:
      fields = ", ".join(map(repr, value))[:200]
      actual = f"the fields {fields or '(none)'}"
    else:
      actual = f"a {type(text).__name__}"
    raise UsageError(f"{name}: expected text in the field {text_field!r}, found {actual}")
  valid = as_valid_unicode(text)
  if valid != text and errors == "strict":
    raise UsageError(
      f"{name}: the text has a lone surrogate, which UTF-8 cannot express "
      f"(--errors=replace would replace it)"
    )
  return valid


def _lines(path: str) -> Iterator[tuple[str, bytes]]:
  with _opened(path) as stream:
    _check_kind(path, stream.peek(_CHUNK))
    yield from _numbered(path, stream)


def _numbered(path: str, lines: Iterable[bytes]) -> Iterator[tuple[str, bytes]]:
  """Yields (name, line) for lines that are not empty."""
  for number, line in enumerate(lines, 1):
    if number == 1:
      line = line.removeprefix(_BOM)
    if line.strip():
      yield f"{path}:{number}", line


def _json_values(path: str, content: bytes, errors: str) -> list[tuple[str, object]] | None:
  """Returns (name, value) of a .json file's documents, or None if it has an object per line."""
  try:
    value = parse_json(_decode(path, content, errors), path)
  except UsageError:
    first = next(_numbered(path, content.split(b"\n")), None)
    if first and isinstance(parse_json(_decode(*first, errors), path), dict):
      return None
    raise
  if isinstance(value, list):
    return [(f"{path}[{i}]", element) for i, element in enumerate(value)]
  if isinstance(value, dict):
    return [(path, value)]
  raise UsageError(f"{path}: expected an array or objects, found a {type(value).__name__}")


def _parquet_rows(path: str, column: str) -> Iterator[tuple[str, object]]:
  check_regular(path)
  try:
    import pyarrow
    import pyarrow.parquet
  except ImportError:
    raise UsageError(f"file {path}: reading Parquet needs pyarrow: pip install pyarrow") from None
  number = 0
  try:
    with pyarrow.parquet.ParquetFile(path) as file:
      if column not in file.schema_arrow.names:
        names = ", ".join(map(repr, file.schema_arrow.names))[:200]
        raise UsageError(
          f"file {path}: expected text in the column {column!r}, found the columns {names}"
        )
      for batch in file.iter_batches(batch_size=1024, columns=[column]):
        for value in batch.column(0).to_pylist():
          number += 1
          yield f"{path}:{number}", value
  except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
    reason = " ".join(str(error).split())[:200]
    raise UsageError(f"file {path} cannot be read as Parquet: {reason}") from None


def _read(path: str) -> bytes:
  """Returns all of a text file."""
  with _opened(path) as stream:
    content = stream.read()
  _check_kind(path, content)
  nul = content.find(b"\0")
  if nul >= 0:
    raise UsageError(
      f"file {path} holds NUL bytes (the first at offset {nul}), expected text in UTF-8"
    )
  return content


@contextlib.contextmanager
def _opened(path: str) -> Iterator[io.BufferedReader | gzip.GzipFile]:
  """Opens a file for reading, decompressed; errors while it is read become UsageErrors."""
  check_regular(path)
  name = path.lower()
  damage: tuple[type[Exception], ...] = (EOFError, zlib.error, gzip.BadGzipFile)
  try:
    with open(path, "rb") as file:
      if name.endswith(".gz"):
        yield gzip.GzipFile(fileobj=file)
      elif name.endswith(".zst"):
        new_decompressor, zstd_error = _zstd(path)
        damage += (zstd_error,)
        yield io.BufferedReader(_ZstdFrames(file, new_decompressor), _CHUNK)
      else:
        yield file
  except damage as error:
    raise UsageError(
      f"file {path} is damaged, or not compressed as its name says: {error}"
    ) from None
  except OSError as error:
    raise UsageError(f"file {path} cannot be read: {reason_of(error)}") from None


def _zstd(path: str) -> tuple[Callable, type[Exception]]:
  """Returns a function that makes a decompressor of one frame, and the error for damaged frames."""
  with contextlib.suppress(ImportError):
    from compression import zstd  # from Python 3.14 on

    return zstd.ZstdDecompressor, zstd.ZstdError
  with contextlib.suppress(ImportError):
    import zstandard

    return lambda: zstandard.ZstdDecompressor().decompressobj(), zstandard.ZstdError
  raise UsageError(f"file {path}: reading .zst needs zstandard: pip install zstandard")


class _ZstdFrames(io.RawIOBase):
  """A stream of zstd frames that are decompressed one after another.

  The libraries' own streams stop after the first frame, or accept a truncated file.
  """

  def __init__(self, file: IO[bytes], new_decompressor: Callable):
    self._file, self._new_decompressor = file, new_decompressor
    self._decompressor: Any = None  # of one of two libraries
    self._input, self._output = b"", memoryview(b"")

  def readable(self) -> bool:
    return True

  def readinto(self, buffer: Any) -> int:
    while not self._output:
      data = self._input or self._file.read(_CHUNK)
      self._input = b""
      if not data and self._decompressor:
        raise EOFError("its last frame is cut")
      if not data:
        return 0
      self._decompressor = self._decompressor or self._new_decompressor()
      self._output = memoryview(self._decompressor.decompress(data))
      if self._decompressor.eof:
        self._input, self._decompressor = self._decompressor.unused_data, None
    size = min(len(buffer), len(self._output))
    buffer[:size], self._output = self._output[:size], self._output[size:]
    return size


def _check_kind(path: str, content: bytes) -> None:
  """Raises UsageError if a file does not begin like a text, naming what it is."""
  head, has_nul = content[:512], b"\0" in content[: 1 << 13]
  kind = next(
    (
      kind
      for magic, kind in _MAGIC.items()
      if head.startswith(magic) and (has_nul or magic not in _TEXT_TOO)
    ),
    None,
  )
  if has_nul and head[257:262] == b"ustar":
    kind = "a tar archive"
  if has_nul and head[8:10] == b'{"':
    kind = "safetensors"
  if kind:
    raise UsageError(f"file {path} is {kind}, expected text in UTF-8")


def _decode(name: str, content: bytes, errors: str) -> str:
  """Returns the text of some bytes without its byte order mark."""
  try:
    return content.decode("utf-8", errors).removeprefix("\ufeff")
  except UnicodeDecodeError as error:
    raise UsageError(
      f"{name}: not UTF-8: byte 0x{content[error.start]:02x} at offset {error.start} "
      f"(--errors=replace would replace it)"
    ) from error
