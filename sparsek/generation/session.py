"""Sampling text from a model, several texts at a time, with memory and time per token that do not
grow.
"""

import functools
import itertools
import os
import zlib
from collections.abc import Iterable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from sparsek.config import TransformerConfig, check_at_least
from sparsek.errors import UsageError
from sparsek.generation import cache_file
from sparsek.generation.cache import (
  cache_bytes,
  clip_sizes,
  decode_step,
  init_cache,
  lost_scores,
  prefill,
  resize,
  with_room,
)
from sparsek.generation.cached_attention import NOWHERE
from sparsek.generation.inference import InferenceParams, inference_params
from sparsek.model.transformer import Params

AHEAD = 8  # tokens a dispatch, unless told
RECENT = 8  # tokens that decide how the next one reads; a character has four bytes
UNFINISHED = "\ufffd"  # how a character reads while bytes of it are missing


def sample(
  logits: jax.Array,
  key: jax.Array,
  temperature: jax.Array | float = 1.0,
  top_p: jax.Array | float = 1.0,
  top_k: jax.Array | int = 0,
) -> jax.Array:
  """Draws token ids [...] from logits [..., vocab_size].

  Args:
    key: PRNG key.
    temperature: divides the logits; 0 takes the largest (the lowest id of equals). Any number,
      however small or large.
    top_p: draws from the nucleus only: the fewest most probable tokens whose probabilities sum to
      top_p or more (always at least one).
    top_k: draws from so many most probable tokens only, of which top_p then takes its share; 0:
      from all.

  Reference: Holtzman et al., The Curious Case of Neural Text Degeneration, arXiv 1904.09751.
  """
  scaled = _divide(logits, temperature)
  order = jnp.argsort(-scaled, axis=-1)
  rank = jnp.arange(logits.shape[-1])
  kept = jnp.where(
    (top_k == 0) | (rank < top_k), jnp.take_along_axis(scaled, order, axis=-1), -jnp.inf
  )
  probability = jax.nn.softmax(kept, axis=-1)
  before = jnp.cumsum(probability, axis=-1) - probability  # of all more probable tokens
  nucleus = (before < top_p) | (rank == 0)
  drawn = jax.random.categorical(key, jnp.where(nucleus, jnp.log(probability), -jnp.inf), axis=-1)
  drawn = jnp.take_along_axis(order, drawn[..., None], axis=-1)[..., 0]
  return jnp.where(temperature > 0, drawn, jnp.argmax(logits, axis=-1))


def _divide(logits, temperature):
  """Returns (logits - their maximum) / temperature: finite or -inf for every temperature, where the
  logits alone overflow."""
  limits = jnp.finfo(jnp.float32)
  temperature = jnp.clip(temperature, limits.tiny, limits.max)
  return (logits - jnp.max(logits, axis=-1, keepdims=True)) / temperature


def _draw(way, logits, keys, number, temperature, top_p, top_k):
  """The token that a row draws as its `number`-th, for every row: it depends on the row's key and
  logits only.
  """
  if way == "greedy":  # no keys, no sorting
    return jnp.argmax(logits, axis=-1).astype(jnp.int32)
  keys = jax.vmap(jax.random.fold_in, (0, None))(keys, number)
  if way == "all":
    drawn = jax.vmap(jax.random.categorical)(keys, _divide(logits, temperature))
  else:
    drawn = jax.vmap(sample, (0, 0, None, None, None))(logits, keys, temperature, top_p, top_k)
  return drawn.astype(jnp.int32)


_first = jax.jit(_draw, static_argnums=0)


@functools.partial(jax.jit, static_argnums=(0, 1, 2), donate_argnums=4)
def run_steps(
  config,
  way,
  steps,
  params,
  cache,
  token,
  active,
  number,
  limit,
  keys,
  temperature,
  top_p,
  top_k,
  end_ids,
):
  """`steps` times: feeds each active row its token, and draws the next; a row ends with a token of
  `end_ids` or its `limit`-th.

  Returns ((cache, token, active, number), (tokens, which rows drew one), [steps, B] each). What a
  row drew last has not been fed.
  """

  def step(state, _):
    cache, token, active, number = state
    logits, cache = decode_step(config, params, cache, token, active)
    drawn = jnp.where(active, _draw(way, logits, keys, number, temperature, top_p, top_k), token)
    drew, active = active, active & ~jnp.isin(drawn, end_ids) & (number + 1 < limit)
    return (cache, drawn, active, number + 1), (drawn, drew)

  return jax.lax.scan(step, (cache, token, active, number), None, length=steps)


class Session:
  """Texts that grow by turns: prompts are fed, continuations drawn, and what the model keeps of
  both can be saved and resumed.

  Attributes:
    config: of the model.
    cache: what the model keeps. It has not been fed the token that each row drew last, which the
      next turn begins with.
    texts: of each row, what a `TextStream` needs to go on with its text: {} or `TextStream.state`.
      It is saved and loaded with the cache.

  Example:
    >>> session = Session(config, params, batch_size=2)
    >>> for tokens in session.generate([[1, 2, 3], [4]], max_new_tokens=10, temperature=0.0):
    ...   print(tokens)  # one of each row; None from where a row has ended
  """

  def __init__(self, config: TransformerConfig, params: Params | InferenceParams, batch_size: int):
    self.config = config
    self._set_length(0)
    check_memory(self._sized, batch_size, 1, f"window={config.window} and k={config.k}")
    self.cache = init_cache(self._sized, batch_size, max_length=1)  # it gets room with every turn
    self.texts: list[dict] = [{} for _ in range(batch_size)]
    self._params = inference_params(config, params)
    self._unfed: list[list[int]] = [[] for _ in range(batch_size)]
    self._stopped: set[int] = set()
    self._exact = True  # whether the cache has been fed what was yielded, and nothing else

  def _set_length(self, length: int | None) -> None:
    """Sets the tokens that texts have at most, None for any number, and the configuration whose
    sizes suffice for them."""
    self._length = length
    self._sized = self.config if length is None else clip_sizes(self.config, length)

  @property
  def lost_scores(self) -> np.ndarray:
    """[B]; see `sparsek.generation.cache.lost_scores`."""
    return lost_scores(self.cache)

  def generate(
    self,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_p: float = 1.0,
    top_k: int = 0,
    keys: jax.Array | None = None,
    eos_id: int | Sequence[int] | None = None,
    ahead: int = AHEAD,
  ) -> Iterator[list[int | None]]:
    """Feeds a prompt a row, and continues each.

    Args:
      prompts: token ids; a row that has text already may have an empty one, and goes on.
      max_new_tokens: most tokens to draw, a row.
      temperature, top_p, top_k: see `sample`; temperature 0 is greedy and needs no keys.
      keys: [B] PRNG keys. What a row draws depends on its key and its text, not on the rows beside
        it.
      eos_id: token, or tokens, that end a row; they are not yielded, but fed before what the next
        turn brings.
      ahead: tokens that are computed in one go while those before are read. 0: one at a time, when
        it is asked for, so that `stop` acts at once.

    Returns:
      An iterator of lists: the next token of every row, None where it has ended.

    Raises:
      ValueError: at once, for a row without any text, ids outside the vocabulary, a number out of
        range, more tokens in all than there are learned positions, or more than memory could hold,
        where keys are missing, or where an earlier turn was left before its end.
    """
    if len(prompts) != len(self._unfed):
      raise ValueError(f"prompts has {len(prompts)} rows, the session {len(self._unfed)}")
    if not self._exact:
      raise ValueError(
        "ahead: an earlier turn was stopped after more had been computed; use ahead=0 "
        "where turns are stopped and go on"
      )
    keys = _check_turn(
      self.config,
      prompts,
      np.asarray(self.cache.seen),
      self._unfed,
      max_new_tokens,
      temperature,
      top_p,
      top_k,
      keys,
      ahead,
    )
    rows = [np.asarray([*unfed, *prompt], np.int32) for unfed, prompt in zip(self._unfed, prompts)]
    top_k = min(top_k, self.config.vocab_size)
    way = "greedy" if temperature == 0 else "all" if top_p == 1 and top_k == 0 else "some"
    return self._generate(
      rows,
      max_new_tokens,
      way,
      keys,
      (temperature, top_p, top_k),
      np.ravel([] if eos_id is None else eos_id).astype(np.int32),
      ahead,
    )

  def _generate(self, rows, max_new_tokens, way, keys, options, end_ids, ahead):
    self._stopped = set()
    if not max_new_tokens:
      return
    lengths = np.asarray([len(row) for row in rows])
    length = int(np.max(np.asarray(self.cache.seen) + lengths)) + max_new_tokens
    before = self._sized
    if self._length is not None:
      self._set_length(max(self._length, length))
    self.cache = with_room(self.config, resize(before, self._sized, self.cache), length)
    tokens = np.zeros((len(rows), lengths.max()), np.int32)
    for row, ids in enumerate(rows):
      tokens[row, : len(ids)] = ids
    logits, self.cache = prefill(
      self._sized, self._params, self.cache, tokens, lengths, last_only=True, donate=True
    )
    self._unfed = [[] for _ in rows]
    token = _first(way, logits[:, 0], keys, jnp.int32(0), *options)
    active = ~jnp.isin(token, end_ids) & (max_new_tokens > 1)
    number, drawn = jnp.int32(1), (token[None], np.ones((1, len(rows)), bool))
    self._exact = not ahead
    most = -(-(max_new_tokens - 1) // max(ahead, 1))  # dispatches
    while True:
      on = None
      # dispatched before its input is read: the device does not wait for the host
      if ahead and most:
        on, drawn_next = self._advance(
          way, ahead, token, active, number, max_new_tokens, keys, options, end_ids
        )
      going = True
      for last, drew in zip(np.asarray(drawn[0]), np.asarray(drawn[1])):
        for row in np.flatnonzero(drew):
          self._unfed[row] = [int(last[row])]
        yielded = [
          int(x) if there and x not in end_ids and row not in self._stopped else None
          for row, (x, there) in enumerate(zip(last, drew))
        ]
        if all(x is None for x in yielded):
          going = False
          break
        yield yielded
      if not going or not most:
        break
      if not ahead:
        active = active & ~np.isin(np.arange(len(rows)), list(self._stopped))
        on, drawn_next = self._advance(
          way, 1, token, active, number, max_new_tokens, keys, options, end_ids
        )
      (token, active, number), drawn, most = on, drawn_next, most - 1
    # what is dispatched after all rows have ended changes nothing
    self._exact = not (ahead and self._stopped)

  def _advance(self, way, steps, token, active, number, limit, keys, options, end_ids):
    (self.cache, *state), drawn = run_steps(
      self._sized,
      way,
      steps,
      self._params,
      self.cache,
      token,
      active,
      number,
      jnp.int32(limit),
      keys,
      *options,
      end_ids,
    )
    return state, drawn

  def stop(self, row: int) -> None:
    """Ends a row of the turn that is going on: it yields None from now on. With ahead=0 nothing
    more is computed for it.
    """
    self._stopped.add(row)

  def save(self, path: str) -> None:
    """Writes the cache, and what it has not been fed yet, to a file for `load`.

    Raises:
      ValueError: where a turn was stopped or left while more had been computed (ahead above 0): the
        cache holds what was never yielded.
    """
    if not self._exact:
      raise ValueError(
        "ahead: the turn was stopped after more had been computed, so that the cache holds "
        "what was not yielded; use ahead=0"
      )
    note = {"unfed": self._unfed, "model": _fingerprint(self._params), "texts": self.texts}
    cache_file.save(path, self.config, self.cache, note, self._length)

  @classmethod
  def load(
    cls, path: str, config: TransformerConfig, params: Params | InferenceParams
  ) -> "Session":
    """Returns the session that `save` wrote. Raises UsageError where it cannot be read or is of
    another configuration or other parameters."""
    session = cls.__new__(cls)
    session.config, session._params = config, inference_params(config, params)
    session.cache, note, length = cache_file.load(path, config)
    session._set_length(length)
    if not isinstance(note, dict) or type(note.get("model")) is not int:
      raise UsageError(f"{path} cannot be read as a cache: it does not say of which model it is")
    if note["model"] != _fingerprint(session._params):
      raise UsageError(
        f"{path} was saved with other parameters: what it holds means nothing to these"
      )
    session._unfed = _read_unfed(path, note.get("unfed"), config, len(session.cache.seen))
    session.texts = _read_texts(path, note.get("texts"), config, len(session.cache.seen))
    session._stopped, session._exact = set(), True
    return session


def _are_ids(value, vocab_size: int) -> bool:
  return isinstance(value, list) and all(type(i) is int and 0 <= i < vocab_size for i in value)


def _read_unfed(path: str, unfed, config: TransformerConfig, rows: int) -> list[list[int]]:
  """Returns what each row of a saved session has not fed yet: a token, or none.

  Raises:
    UsageError: where these are none.
  """
  valid = isinstance(unfed, list) and len(unfed) == rows
  if not valid or not all(_are_ids(ids, config.vocab_size) and len(ids) <= 1 for ids in unfed):
    raise UsageError(
      f"{path} cannot be read as a cache: unfed must hold at most one id below "
      f"{config.vocab_size} of each of its {rows} texts"
    )
  return unfed


def _read_texts(path: str, texts, config: TransformerConfig, rows: int) -> list[dict]:
  """Returns the states of streams that `Session.save` wrote, {} each where the file is older.

  Raises:
    UsageError: where these are none.
  """

  def is_state(state):
    if not isinstance(state, dict) or set(state) not in (set(), {"before", "unfinished"}):
      return False
    return not state or (
      _are_ids(state["before"], config.vocab_size) and type(state["unfinished"]) is bool
    )

  if texts is None:
    return [{} for _ in range(rows)]
  if not isinstance(texts, list) or len(texts) != rows or not all(map(is_state, texts)):
    raise UsageError(
      f"{path} cannot be read as a cache: texts must hold the last tokens of each "
      f"of its {rows} texts"
    )
  return texts


def check_memory(config: TransformerConfig, batch_size: int, max_length: int, name: str) -> None:
  """Raises ValueError where a cache could never be held.

  Args:
    config, batch_size, max_length: as in `init_cache`.
    name: what asks for it, with its value.
  """
  shapes = jax.eval_shape(functools.partial(init_cache, config, batch_size, max_length=max_length))
  # What `prefill` does to a ring makes copies of it, a layer at a time.
  rings = (
    cache_bytes(layer) for kind, layer in zip(config.layer_kinds, shapes.layers) if kind != "full"
  )
  need = cache_bytes(shapes) + 4 * max(rings, default=0)
  device = jax.devices()[0].memory_stats() or {}  # a CPU has none
  memory = device.get("bytes_limit") or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
  if need > memory:
    raise ValueError(
      f"{name}: what the model would keep of {batch_size} texts at the same time "
      f"takes about {need:,} bytes, more than the {memory:,} bytes of memory here"
    )


def _fingerprint(params: InferenceParams) -> int:
  """A checksum that other parameters hardly share: of the last norm and of some of the last matrix,
  which all training changes.
  """
  parts = jax.tree.leaves(params.final_norm) + [
    params.layers[-1]["down"]["kernel"][:4],
    params.layers[0]["qkv"]["kernel"][:4],
  ]
  return functools.reduce(lambda sum_, x: zlib.crc32(np.asarray(x).tobytes(), sum_), parts, 0)


def _check_turn(
  config, prompts, seen, unfed, max_new_tokens, temperature, top_p, top_k, keys, ahead
):
  """Raises ValueError for arguments of `Session.generate` that cannot be; returns the keys."""
  longest = 0
  for prompt, begun, before in zip(prompts, unfed, seen):
    prompt = np.asarray(prompt) if len(prompt) else np.zeros(0, np.int32)
    if prompt.ndim != 1 or not (prompt.size or begun):
      raise ValueError(
        f"prompt_tokens has shape {prompt.shape}, expected [m] with m >= 1; an "
        "empty text starts with eos"
      )
    if not np.issubdtype(prompt.dtype, np.integer) or (
      prompt.size and not 0 <= prompt.min() <= prompt.max() < config.vocab_size
    ):
      raise ValueError(
        f"prompt_tokens holds {prompt.dtype} values from {prompt.min()} to {prompt.max()}, "
        f"expected integers from 0 to {config.vocab_size - 1}"
      )
    longest = max(longest, int(before) + len(begun) + len(prompt))
  for name, value in (
    ("max_new_tokens", max_new_tokens),
    ("temperature", temperature),
    ("top_k", top_k),
    ("ahead", ahead),
  ):
    check_at_least(name, value, 0)
  if not 0 < top_p <= 1:
    raise ValueError(f"top_p={top_p} must be above 0 and at most 1")
  if longest + max_new_tokens > NOWHERE:
    raise ValueError(
      f"max_new_tokens={max_new_tokens} after {longest} prompt tokens: positions "
      f"are counted up to {NOWHERE}"
    )
  check_memory(
    clip_sizes(config, longest + max_new_tokens),
    len(prompts),
    longest + max_new_tokens,
    f"max_new_tokens={max_new_tokens} after {longest} prompt tokens",
  )
  if config.positions == "learned" and longest + max_new_tokens > config.max_positions:
    raise ValueError(
      f"max_new_tokens={max_new_tokens} after {longest} prompt tokens: the model has "
      f"max_positions={config.max_positions}"
    )
  if keys is None and temperature > 0:
    raise ValueError(f"key=None: temperature={temperature} draws at random and needs a PRNG key")
  keys = jax.random.split(jax.random.key(0), len(prompts)) if keys is None else keys
  if keys.shape != (len(prompts),):
    raise ValueError(
      f"keys has shape {keys.shape}, expected {(len(prompts),)}, a PRNG key for each row"
    )
  return keys


def generate(
  config: TransformerConfig,
  params: Params | InferenceParams,
  prompt_tokens: Sequence[int],
  *,
  max_new_tokens: int,
  temperature: float = 1.0,
  top_p: float = 1.0,
  top_k: int = 0,
  key: jax.Array | None = None,
  eos_id: int | Sequence[int] | None = None,
) -> Iterator[int]:
  """Continues one prompt; several at a time, and more turns, are for `Session`.

  Args:
    config, params: the model.
    prompt_tokens: at least one token id.
    max_new_tokens: most tokens to draw.
    temperature, top_p, top_k: see `sample`; temperature 0 is greedy and needs no key.
    key: PRNG key; the same key gives the same text.
    eos_id: token, or tokens, that end the text; they are not yielded.

  Returns:
    An iterator of token ids, which come in small groups while the device already works on the next.

  Raises:
    ValueError: at once, as `Session.generate`.

  Example:
    >>> prompt = tokenizer.encode("def ")
    >>> tokens = generate(config, params, prompt, max_new_tokens=100, key=jax.random.key(0))
    >>> for text in stream_text(tokenizer, tokens, before=prompt):
    ...   print(text, end="", flush=True)
  """
  options = dict(
    max_new_tokens=max_new_tokens,
    temperature=temperature,
    top_p=top_p,
    top_k=top_k,
    keys=None if key is None else key[None],
  )
  _check_turn(config, [prompt_tokens], [0], [[]], ahead=0, **options)

  def run():
    session = Session(config, params, 1)
    for (token,) in session.generate([prompt_tokens], eos_id=eos_id, **options):
      yield token

  return run() if max_new_tokens else iter(())


class TextStream:
  """Turns the tokens of a text into pieces of text that end between characters, up to the first
  stop string.

  All pieces together are what decoding all tokens in one go gives. How a token reads may depend on
  those before it: it may hold a part of a UTF-8 character, and some tokenizers leave out a space at
  the beginning of what they decode. So tokens are decoded together with the last few before them,
  which may be those of a prompt or of an earlier turn. A last U+FFFD is kept back, since it may be
  an unfinished character; and so is what may be the beginning of a stop string, until it is clear
  that it is none. The time that a token takes does not grow.

  Args:
    tokenizer: an object with decode(ids) -> str that writes U+FFFD for invalid bytes.
    stop: strings that end the text, wherever tokens begin and end; they are not part of it. They
      are looked for in the new text only. Of several, that counts which is complete first; of those
      that end at the same place, the longest.
    before: the token ids that the text continues, or at least the last few; their text is not
      returned.
    unfinished: but for its last character, which is returned when it is complete.

  Attributes:
    stopped: whether a stop string has come.

  Example:
    >>> stream = TextStream(tokenizer, before=prompt)
    >>> text = "".join(map(stream.push, tokens)) + stream.finish()
  """

  def __init__(
    self, tokenizer, stop: Sequence[str] = (), before: Sequence[int] = (), unfinished: bool = False
  ):
    self._tokenizer, self._stop = tokenizer, tuple(filter(None, stop))
    self._recent = self._last(before)
    self._unfinished = unfinished and self._decode([]).endswith(UNFINISHED)
    self.stopped, self._held = False, ""  # held: certain text that may begin a stop string

  @property
  def state(self) -> dict:
    """`before` and `unfinished` of a stream that goes on with this text, as JSON holds them."""
    return {"before": self._recent, "unfinished": self._unfinished}

  def turn(self, prompt: Sequence[int]) -> str:
    """Begins a new turn, with the tokens of a whole text or none.

    Returns:
      the text that they bring, after what was kept back.
    """
    text, self.stopped = self.end_turn(), False
    last = self._last(prompt)
    if last:
      text += self._decode(prompt)[self._shown() :]
      self._recent, self._unfinished = (self._recent + last)[-RECENT:], False
    return text

  def push(self, token: int) -> str:
    """Returns the text that is certain after one more token, often empty."""
    if self.stopped or not self._last([token]):
      return ""
    text, shown = self._decode([token]), self._shown()
    certain = max(shown, len(text) - text.endswith(UNFINISHED))
    self._recent, self._unfinished = [*self._recent, int(token)][-RECENT:], certain < len(text)
    return self._release(text[shown:certain])

  def end_turn(self) -> str:
    """Returns what was kept back at the end of a turn, but for an unfinished character, which a
    later turn may complete."""
    text, self._held = self._held, ""
    return text

  def finish(self) -> str:
    """Returns what was kept back at the end of the text."""
    text = self._release(UNFINISHED) if self._unfinished else ""
    self._unfinished = False
    return text + self.end_turn()

  def _decode(self, ids) -> str:
    return self._tokenizer.decode([*self._recent, *ids])

  def _shown(self) -> int:
    """Returns how much of the text of the recent tokens was returned, or is held."""
    return len(self._decode([])) - self._unfinished

  def _last(self, ids) -> list[int]:
    """Returns the last few ids that write something, unlike special tokens and unknown ids."""
    # Four of them, since one may be no more than the space that is left out at the beginning.
    writing = (int(i) for i in reversed(ids) if self._tokenizer.decode([i] * 4))
    return list(itertools.islice(writing, RECENT))[::-1]

  def _release(self, text):
    text = self._held + text
    ends = [(at + len(stop), at) for stop in self._stop if (at := text.find(stop)) >= 0]
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
  tokenizer, tokens: Iterable[int], stop: Sequence[str] = (), before: Sequence[int] = ()
) -> Iterator[str]:
  """Yields the pieces of text that a stream of tokens brings, as they come; see `TextStream`.

  No further token is taken after a stop string.
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
