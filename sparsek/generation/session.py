"""Generation of texts, several at a time and in turns, in constant memory and time per token."""

import functools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from sparsek.config import TransformerConfig, check_config
from sparsek.generation import saved_session
from sparsek.generation.cache import Cache, decode_step, init_cache, lost_scores, prefill
from sparsek.generation.cache_sizes import (
  GROWTH,
  check_memory,
  clip_sizes,
  padded_length,
  resize,
  with_room,
)
from sparsek.generation.inference import InferenceParams, inference_params
from sparsek.generation.rows import PARAMS, ROW, SAME, STEPS, over_rows, place_rows, without_context
from sparsek.generation.sampling import draw, method_of
from sparsek.generation.saved_session import SavedSession
from sparsek.generation.sharded_prompt import prefill_sharded
from sparsek.generation.turn_checks import check_turn
from sparsek.model.random_keys import random_keys
from sparsek.model.transformer import Params
from sparsek.parallel.mesh import CONTEXT

AHEAD = 8  # tokens that are computed together by default

_first_draw = jax.jit(draw, static_argnums=0)


@functools.partial(
  jax.jit, static_argnames=("config", "method", "steps", "mesh"), donate_argnames="cache"
)
def run_steps(
  config: TransformerConfig,
  method: str,
  steps: int,
  params: InferenceParams,
  cache: Cache,
  token: jax.Array,
  active: jax.Array,
  number: jax.Array,
  limit: jax.Array,
  keys: jax.Array,
  temperature: jax.Array | float,
  top_p: jax.Array | float,
  top_k: jax.Array | int,
  end_ids: jax.Array,
  mesh: Mesh | None = None,
) -> tuple[tuple[Cache, jax.Array, jax.Array, jax.Array], tuple[jax.Array, jax.Array]]:
  """Feeds every active row its token and draws the next one, `steps` times.

  A row ends with a token of `end_ids` or its `limit`-th token.

  Args:
    config, params, cache: as in `decode_step`; the cache is donated.
    method, keys, temperature, top_p, top_k: as in `draw`.
    steps: number of tokens.
    token: [B], the last token of each row, which has not been fed.
    active: [B] bool, rows that have not ended.
    number: tokens drawn so far in this turn.
    limit: most tokens of this turn.
    end_ids: tokens that end a row.
    mesh: as in `prefill`.
  Returns:
    The next (cache, token, active, number), and for each step the tokens and which rows drew one,
    [steps, B] each.
  """

  def run(params, cache, token, active, keys, number, limit, options, end_ids):
    def step(state, _):
      cache, token, active, number = state
      logits, cache = decode_step(config, params, cache, token, active)
      drawn = jnp.where(active, draw(method, logits, keys, number, *options), token)
      drew, active = active, active & ~jnp.isin(drawn, end_ids) & (number + 1 < limit)
      return (cache, drawn, active, number + 1), (drawn, drew)

    return jax.lax.scan(step, (cache, token, active, number), None, length=steps)

  arguments = params, cache, token, active, keys, number, limit, (temperature, top_p, top_k)
  kinds = PARAMS, ROW, ROW, ROW, ROW, SAME, SAME, SAME, SAME
  result = (ROW, ROW, ROW, SAME), (STEPS, STEPS)
  return over_rows(run, config, mesh, kinds, result)(*arguments, end_ids)


class _Turn(NamedTuple):
  """The arguments of `Session.generate` for one turn."""

  max_new_tokens: int
  method: str
  keys: jax.Array
  options: tuple[float, float, int]  # temperature, top_p, top_k
  end_ids: np.ndarray
  ahead: int


class Session:
  """Texts of a batch that grow by turns: each turn feeds every row a prompt and continues it.

  Sessions can be saved and resumed.

  Args:
    config, params: the model.
    batch_size: number of texts.
    mesh: devices over which parameters and texts are spread, as `sparsek.generation.rows` says, and
      the tokens of new texts over `context`; None: one device.
    pad_to: tokens that new prompts are padded to, with room for GROWTH more. Sessions with prompts
      of similar lengths then run the same compiled programs.

  Attributes:
    config: of the model.
    cache: state of the model. It has not been fed the token that each row drew last; the next turn
      begins with it.
    texts: for each row what a `TextStream` needs to continue its text: {} or `TextStream.state`.
      It is saved and loaded with the cache.

  Example:
    >>> session = Session(config, params, batch_size=2)
    >>> for tokens in session.generate([[1, 2, 3], [4]], max_new_tokens=10, temperature=0.0):
    ...   print(tokens)  # one of each row; None once a row has ended
  """

  def __init__(
    self,
    config: TransformerConfig,
    params: Params | InferenceParams,
    batch_size: int,
    mesh: Mesh | None = None,
    pad_to: int = 0,
  ):
    check_config(config)
    self.config = config
    self._pad_to = pad_to
    self._set_mesh(mesh)
    self._set_length(0)
    check_memory(self._sized, batch_size, 1, f"window={config.window} and k={config.k}")
    empty = init_cache(self._sized, batch_size, max_length=1)  # every turn makes room
    self.cache = place_rows(self._mesh, empty, batch_size)
    self.texts: list[dict] = [{} for _ in range(batch_size)]
    self._params = inference_params(config, params, self._mesh)
    self._unfed: list[list[int]] = [[] for _ in range(batch_size)]
    self._stopped: set[int] = set()
    self._exact = True  # the cache has been fed the tokens that were yielded, and no others

  def _set_mesh(self, mesh: Mesh | None) -> None:
    """Sets the devices that compute new prompts, and those that compute everything else."""
    self._prompt_mesh = mesh if mesh is not None and mesh.shape[CONTEXT] > 1 else None
    self._mesh = without_context(mesh)

  def _set_length(self, length: int | None) -> None:
    """Sets the configuration whose cache holds texts of up to `length` tokens, None for any."""
    self._length = length
    self._sized = self.config if length is None else clip_sizes(self.config, length)

  @property
  def lost_scores(self) -> np.ndarray:
    """The counts of `sparsek.generation.cache.lost_scores`, [B] integers."""
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
      prompts: token ids; the prompt of a row that has text already may be empty.
      max_new_tokens: most tokens to draw for a row.
      temperature, top_p, top_k: see `sample`; temperature 0 is greedy and needs no keys.
      keys: [B] PRNG keys. The tokens of a row depend on its key and its text, not on other rows.
      eos_id: token, or tokens, that end a row; they are not yielded, but fed before the prompt of
        the next turn.
      ahead: tokens that are computed together while those before them are read. 0: one at a time,
        when it is asked for, so that `stop` acts at once.

    Returns:
      An iterator of lists: the next token of every row, None where it has ended.

    Raises:
      ValueError: at the call, for a row without any text, ids outside the vocabulary, a number out
        of range, more tokens in all than there are learned positions or than memory could hold,
        missing keys, or an earlier turn that was abandoned before its end.
    """
    if len(prompts) != len(self._unfed):
      raise ValueError(f"prompts has {len(prompts)} rows, the session {len(self._unfed)}")
    if not self._exact:
      raise ValueError(
        "ahead: an earlier turn was stopped after more had been computed; use ahead=0 "
        "where turns are stopped and go on"
      )
    keys = check_turn(
      self.config,
      prompts,
      np.asarray(self.cache.seen).tolist(),
      self._unfed,
      max_new_tokens=max_new_tokens,
      temperature=temperature,
      top_p=top_p,
      top_k=top_k,
      keys=keys,
      ahead=ahead,
    )
    rows = [np.asarray([*unfed, *prompt], np.int32) for unfed, prompt in zip(self._unfed, prompts)]
    top_k = min(top_k, self.config.vocab_size)
    turn = _Turn(
      max_new_tokens,
      method_of(temperature, top_p, top_k),
      keys,
      (temperature, top_p, top_k),
      np.ravel([] if eos_id is None else eos_id).astype(np.int32),
      ahead,
    )
    return self._generate(rows, turn)

  def _generate(self, rows: list[np.ndarray], turn: _Turn) -> Iterator[list[int | None]]:
    self._stopped = set()
    if not turn.max_new_tokens:
      return
    logits = self._prefill(rows, turn.max_new_tokens)
    self._unfed = [[] for _ in rows]
    token = _first_draw(turn.method, logits, turn.keys, jnp.int32(0), *turn.options)
    active = jnp.all(token[:, None] != turn.end_ids, axis=1) & (turn.max_new_tokens > 1)
    state = token, active, 1
    drawn = token[None], np.ones((1, len(rows)), bool)
    self._exact = not turn.ahead
    dispatches = -(-(turn.max_new_tokens - 1) // max(turn.ahead, 1))
    while True:
      if turn.ahead and dispatches:
        # dispatched before its input is read, so that the device does not wait for the host
        next_state, next_drawn = self._advance(turn, turn.ahead, state)
      has_ended = False
      for tokens, drew in zip(np.asarray(drawn[0]), np.asarray(drawn[1])):
        yielded = self._read(tokens, drew, turn.end_ids)
        if all(x is None for x in yielded):
          has_ended = True
          break
        yield yielded
      if has_ended or not dispatches:
        break
      if not turn.ahead:
        token, active, number = state
        active = active & ~np.isin(np.arange(len(rows)), list(self._stopped))
        next_state, next_drawn = self._advance(turn, 1, (token, active, number))
      state, drawn, dispatches = next_state, next_drawn, dispatches - 1
    # steps that were dispatched after all rows had ended change nothing
    self._exact = not (turn.ahead and self._stopped)

  def _prefill(self, rows: list[np.ndarray], max_new_tokens: int) -> jax.Array:
    """Makes room for the turn and feeds the rows; returns the logits [B, V] after them."""
    lengths = np.asarray([len(row) for row in rows])
    length = int(np.max(np.asarray(self.cache.seen) + lengths)) + max_new_tokens
    width = int(np.max(lengths))
    if self._pad_to and not np.any(self.cache.seen):
      length, width = max(length, self._pad_to + GROWTH), max(width, self._pad_to)
    before = self._sized
    if self._length is not None:
      self._set_length(max(self._length, length))
    tokens = np.zeros((len(rows), width), np.int32)
    for row, ids in enumerate(rows):
      tokens[row, : len(ids)] = ids
    if self._prompt_mesh is not None and not np.any(self.cache.seen):
      last, cache = prefill_sharded(
        self._sized, self._params, tokens, lengths, padded_length(length), self._prompt_mesh
      )
      self.cache = place_rows(self._mesh, cache, len(rows))
      return last
    self.cache = with_room(self.config, resize(before, self._sized, self.cache), length)
    logits, self.cache = prefill(
      self._sized,
      self._params,
      self.cache,
      tokens,
      lengths,
      last_only=True,
      donate=True,
      mesh=self._mesh,
    )
    return logits[:, 0]

  def _read(self, tokens: np.ndarray, drew: np.ndarray, end_ids: np.ndarray) -> list[int | None]:
    """Notes the tokens of a step as not fed yet; returns them, None in rows that have ended.

    Args:
      tokens: [B].
      drew: [B] bool, rows that drew theirs.
      end_ids: tokens that end a row.
    """
    for row, token in enumerate(tokens):
      if drew[row]:
        self._unfed[row] = [int(token)]
    return [
      int(token) if drew[row] and token not in end_ids and row not in self._stopped else None
      for row, token in enumerate(tokens)
    ]

  def _advance(self, turn: _Turn, steps: int, state: tuple) -> tuple[tuple, tuple]:
    """Runs steps; returns the next (token, active, number), and the tokens and which rows drew."""
    token, active, number = state
    # The number comes from the host each time: one that a device returned would compile again.
    (self.cache, token, active, _), drawn = run_steps(
      self._sized,
      turn.method,
      steps,
      self._params,
      self.cache,
      token,
      active,
      jnp.int32(number),
      jnp.int32(turn.max_new_tokens),
      turn.keys,
      *turn.options,
      turn.end_ids,
      mesh=self._mesh,
    )
    return (token, active, number + steps), drawn

  def stop(self, row: int) -> None:
    """Ends a row of the current turn, which yields None for it from now on.

    With ahead=0 nothing more is computed for the row.
    """
    self._stopped.add(row)

  def save(self, path: str) -> None:
    """Writes the session to a file for `load`.

    Raises:
      ValueError: where a turn was stopped or abandoned after more had been computed (ahead above
        0): the cache has been fed tokens that were never yielded.
    """
    if not self._exact:
      raise ValueError(
        "ahead: the turn was stopped after more had been computed, so that the cache holds "
        "what was not yielded; use ahead=0"
      )
    saved = SavedSession(self.cache, self._length, self._unfed, self.texts)
    saved_session.save(path, self.config, self._params, saved)

  @classmethod
  def load(
    cls,
    path: str,
    config: TransformerConfig,
    params: Params | InferenceParams,
    mesh: Mesh | None = None,
  ) -> "Session":
    """Returns the session that `save` wrote, on any mesh.

    Raises:
      UsageError: where it cannot be read, or was saved with another configuration or other
        parameters.
    """
    session = cls.__new__(cls)
    session.config = config
    session._pad_to = 0
    session._set_mesh(mesh)
    session._params = inference_params(config, params, session._mesh)
    saved = saved_session.load(path, config, session._params)
    session._set_length(saved.length)
    session.cache = place_rows(session._mesh, saved.cache, len(saved.texts))
    session._unfed, session.texts = saved.unfed, saved.texts
    session._stopped, session._exact = set(), True
    return session


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
  """Continues one prompt; `Session` continues several at a time, and in turns.

  Args:
    config, params: the model.
    prompt_tokens: at least one token id.
    max_new_tokens: most tokens to draw.
    temperature, top_p, top_k: see `sample`; temperature 0 is greedy and needs no key.
    key: PRNG key; the same key gives the same text.
    eos_id: token, or tokens, that end the text; they are not yielded.

  Returns:
    An iterator of token ids, which come in small groups while the device computes the next ones.

  Raises:
    ValueError: at the call, as `Session.generate`.

  Example:
    >>> prompt = tokenizer.encode("def ")
    >>> tokens = generate(config, params, prompt, max_new_tokens=100, key=jax.random.key(0))
    >>> for text in stream_text(tokenizer, tokens, before=prompt):
    ...   print(text, end="", flush=True)
  """
  keys = check_turn(
    config,
    [prompt_tokens],
    [0],
    [[]],
    max_new_tokens=max_new_tokens,
    temperature=temperature,
    top_p=top_p,
    top_k=top_k,
    keys=None if key is None else random_keys("key", key)[None],
    ahead=0,
  )

  def run() -> Iterator[int]:
    session = Session(config, params, 1)
    for (token,) in session.generate(
      [prompt_tokens],
      max_new_tokens=max_new_tokens,
      temperature=temperature,
      top_p=top_p,
      top_k=top_k,
      keys=keys,
      eos_id=eos_id,
    ):
      assert token is not None  # a single row: the turn ends with it
      yield token

  return run() if max_new_tokens else iter(())
