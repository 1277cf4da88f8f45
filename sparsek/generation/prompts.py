"""Texts of experiments.generate: reading and showing prompts, writing and saving texts."""

import os
import time
from collections.abc import Iterable, Iterator, Sequence

from sparsek.command_line import outputs
from sparsek.data.tokenizer import Tokenizer
from sparsek.errors import UsageError
from sparsek.generation import cache_file
from sparsek.generation.session import AHEAD, Session
from sparsek.generation.text_stream import TextStream
from sparsek.storage.files import cannot_write, check_regular, read_at_most

CACHE = outputs.Kind("cache that --save_cache wrote", cache_file.is_cache)
MAX_BYTES = 2**26  # of a file of prompts
LEAST_GROUPS = 10  # of AHEAD tokens, from which a speed is told


def read_prompts(path: str) -> list[str]:
  """Returns the lines of the file that --prompt_file names, each of them a text to continue.

  Raises:
    UsageError: for a file that cannot be read, is too large, is not UTF-8 or has no lines.
  """
  content = read_at_most(path, MAX_BYTES, "--prompt_file")
  try:
    text = content.decode("utf-8-sig").replace("\r\n", "\n")
  except UnicodeDecodeError as error:
    line = content.count(b"\n", 0, error.start) + 1
    raise UsageError(
      f"--prompt_file={path} is not UTF-8: byte 0x{content[error.start]:02x} in line {line}"
    ) from None
  if not text:
    raise UsageError(f"--prompt_file={path} has no lines")
  return text.removesuffix("\n").split("\n")


def new_texts(
  tokenizer: Tokenizer, texts: Iterable[str], special_tokens: bool = False
) -> list[list[int]]:
  """Returns the tokens of new texts, after the bos of documents where a text does not give it."""
  rows = []
  for text in texts:
    ids, bos = tokenizer.encode(text, special_tokens), tokenizer.bos_ids
    rows.append([*(bos if ids[: len(bos)] != bos else []), *ids] or [tokenizer.eos_id])
  return rows


def shown_prompt(stream: TextStream, text: str, ids: list[int]) -> str:
  """Returns the prompt as it was given, after any text that decoding its tokens puts before it.

  That may be the rest of an earlier turn's last character, or a space.
  """
  text_of_tokens = stream.turn(ids)
  if text_of_tokens.endswith(text):
    return text_of_tokens
  rest_of_character = text_of_tokens.startswith("\ufffd") and not text.startswith("\ufffd")
  return "\ufffd" * rest_of_character + text


def text_pieces(
  session: Session, turn: Iterable[Sequence[int | None]], streams: Sequence[TextStream]
) -> Iterator[list[tuple[int, str]]]:
  """Draws the texts; yields the pieces (row, text) that each step adds, a piece for each new token.

  A row whose text reaches a stop string ends. What a stream holds back at the end stays in it.

  Args:
    session: draws the tokens.
    turn: the iterator that `session.generate` returned.
    streams: turn tokens into text, one for each row.
  """
  for tokens in turn:
    pieces = []
    for row, token in enumerate(tokens):
      if token is None or streams[row].stopped:
        continue
      pieces.append((row, streams[row].push(token)))
      if streams[row].stopped:
        session.stop(row)
    yield pieces


def write_texts(
  session: Session,
  turn: Iterable[Sequence[int | None]],
  streams: Sequence[TextStream],
  written: list[str],
  goes_on: bool,
) -> str:
  """Draws the texts; prints a single one as it comes, several at the end.

  Args:
    session, turn, streams: as in `text_pieces`.
    written: the prompts as they are shown.
    goes_on: the texts will be saved, and may end within a character.

  Returns:
    How many tokens are new, and how fast they came, where that was measured.
  """

  def append(row: int, text: str) -> None:
    written[row] += text
    if len(streams) == 1:
      print(text, end="", flush=True)

  times, numbers = [], []
  if len(streams) == 1:
    print(written[0], end="", flush=True)
  for pieces in text_pieces(session, turn, streams):
    times.append(time.perf_counter())
    numbers.append(len(pieces))
    for row, text in pieces:
      append(row, text)
  for row, stream in enumerate(streams):
    append(row, stream.end_turn() if goes_on else stream.finish())
  several = "\n".join(f"[{row}] {text}" for row, text in enumerate(written))
  print(several if len(streams) > 1 else "")
  return f"{sum(numbers)} new ones{_describe_speed(times, numbers)}"


def _describe_speed(times: Sequence[float], numbers: Sequence[int]) -> str:
  """Returns ", SPEED tokens/s" of the steps of a turn, or "" where there are too few.

  The session draws the first token after the prompt, and others in groups of AHEAD or one at a
  time. A group is computed while the one before it is read: the second may be ready when the host,
  which has compiled, comes to the first. So time runs from the arrival of the second group to that
  of the last whole one, and a few groups are not enough.

  Args:
    times: when the tokens of each step came.
    numbers: how many came.
  """
  groups = (len(times) - 1) // AHEAD
  if groups < LEAST_GROUPS:
    return ""
  second, last = 1 + AHEAD, 1 + (groups - 1) * AHEAD
  speed = sum(numbers[second + AHEAD : last + AHEAD]) / (times[last] - times[second])
  return f", {speed:,.1f} tokens/s"


def check_can_save(path: str) -> None:
  """Raises UsageError where --save_cache names no file that can be written."""
  folder = os.path.dirname(path) or "."
  if not (os.path.isdir(folder) and os.access(folder, os.W_OK)):
    raise UsageError(
      f"--save_cache={path}: must be a file in a folder that exists and can be written"
    )
  if os.path.lexists(path):
    check_regular(path, "--save_cache")
  outputs.check(f"--save_cache={path}", path, CACHE)


def save(session: Session, streams: Sequence[TextStream], path: str) -> None:
  """Writes a session and the state of its streams to a file, from which it can go on later.

  Raises:
    RunError: where it cannot be written.
  """
  session.texts = [stream.state for stream in streams]
  try:
    session.save(path)
  except OSError as error:
    raise cannot_write(path, error) from None
