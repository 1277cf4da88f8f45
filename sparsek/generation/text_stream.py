"""Text of tokens that come one at a time."""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Protocol

RECENT = 8  # tokens that the text of the next one can depend on; a character has four bytes
UNFINISHED = "\ufffd"  # the text of a character while some of its bytes are missing


class Decoder(Protocol):
  """A tokenizer that writes U+FFFD for invalid bytes."""

  def decode(self, ids: Sequence[int]) -> str:
    """Returns the text of token ids."""


class TextStream:
  """A decoder that turns the tokens of a text, one at a time, into pieces of text.

  Pieces end between characters, and the last one before the first stop string. Joined they equal
  the text that decoding all tokens at once gives, up to that stop string. The text of a token may
  depend on the tokens before it: a token may hold a part of a UTF-8 character, and some tokenizers
  leave out a space at the beginning of the text that they decode. So tokens are decoded together
  with the last few before them, which may be those of a prompt or of an earlier turn. A final
  U+FFFD is held back, since it may be an unfinished character, and so is text that may begin a stop
  string. The time that a token takes does not grow.

  Args:
    tokenizer: an object with decode(ids) -> str that writes U+FFFD for invalid bytes.
    stop: strings that end the text, wherever tokens begin and end; they are not part of it. They
      are searched for in the new text only. Of several, the one that is complete first counts; of
      those that end at the same position, the longest.
    before: the token ids that the text continues, or at least the last few; their text is not
      returned.
    unfinished: the last character of the text of `before` is unfinished; it is returned when it is
      complete.

  Attributes:
    stopped: a stop string has been reached.

  Example:
    >>> stream = TextStream(tokenizer, before=prompt)
    >>> text = "".join(map(stream.push, tokens)) + stream.finish()
  """

  def __init__(
    self,
    tokenizer: Decoder,
    stop: Sequence[str] = (),
    before: Sequence[int] = (),
    unfinished: bool = False,
  ):
    self._tokenizer, self._stop = tokenizer, tuple(filter(None, stop))
    self._recent = self._last(before)
    self._unfinished = unfinished and self._decode([]).endswith(UNFINISHED)
    self.stopped, self._held = False, ""  # held: final text that may begin a stop string

  @property
  def state(self) -> dict[str, Any]:
    """The `before` and `unfinished` of a stream that continues this text, as JSON values."""
    return {"before": self._recent, "unfinished": self._unfinished}

  def turn(self, prompt: Sequence[int]) -> str:
    """Begins a new turn, with the tokens of a whole text or none.

    Returns:
      The text that was held back, and the text of the tokens.
    """
    text, self.stopped = self.end_turn(), False
    last = self._last(prompt)
    if last:
      text += self._decode(prompt)[self._shown() :]
      self._recent, self._unfinished = (self._recent + last)[-RECENT:], False
    return text

  def push(self, token: int) -> str:
    """Returns the text that cannot change any more after a further token, often empty."""
    if self.stopped or not self._last([token]):
      return ""
    text, shown = self._decode([token]), self._shown()
    certain = max(shown, len(text) - text.endswith(UNFINISHED))
    self._recent, self._unfinished = [*self._recent, int(token)][-RECENT:], certain < len(text)
    return self._release(text[shown:certain])

  def end_turn(self) -> str:
    """Returns the text that was held back at the end of a turn.

    An unfinished character is still held back, since a later turn may complete it.
    """
    text, self._held = self._held, ""
    return text

  def finish(self) -> str:
    """Returns the text that was held back at the end of the text."""
    text = self._release(UNFINISHED) if self._unfinished else ""
    self._unfinished = False
    return text + self.end_turn()

  def _decode(self, ids: Sequence[int]) -> str:
    return self._tokenizer.decode([*self._recent, *ids])

  def _shown(self) -> int:
    """Returns how many characters of the text of the recent tokens were returned or are held."""
    return len(self._decode([])) - self._unfinished

  def _last(self, ids: Sequence[int]) -> list[int]:
    """Returns the last few ids that have text, unlike special tokens and unknown ids."""
    # Each is decoded four times in a row, since the text of one may be just the space that is left
    # out at the beginning.
    writing = (int(i) for i in reversed(ids) if self._tokenizer.decode([i] * 4))
    return list(itertools.islice(writing, RECENT))[::-1]

  def _release(self, text: str) -> str:
    """Returns the held text and `text` up to a stop string, or to what may begin one."""
    text = self._held + text
    ends = [(i + len(stop), i) for stop in self._stop if (i := text.find(stop)) >= 0]
    if ends:
      self.stopped, self._held, self._unfinished = True, "", False
      return text[: min(ends)[1]]
    sizes = (
      size
      for stop in self._stop
      for size in range(1, min(len(stop), len(text) + 1))
      if text.endswith(stop[:size])
    )
    begun = max(sizes, default=0)
    self._held = text[len(text) - begun :]
    return text[: len(text) - begun]


def stream_text(
  tokenizer: Decoder, tokens: Iterable[int], stop: Sequence[str] = (), before: Sequence[int] = ()
) -> Iterator[str]:
  """Yields the pieces of text of a stream of tokens, as they come; see `TextStream`.

  No further token is read after a stop string.
  """
  stream = TextStream(tokenizer, stop, before)
  for token in tokens:
    text = stream.push(token)
    if text:
      yield text
    if stream.stopped:
      return
  text = stream.finish()
  if text:
    yield text
