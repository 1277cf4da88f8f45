"""Log-likelihoods of continuations of texts, in batches and constant memory.

A context is read once, however many continuations it has: the caches of sparsek and sliding window
layers after it, which do not grow with it, are copied for each of them. Continuations that differ
in their last token only are read together.
"""

import dataclasses
import warnings
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from sparsek.config import TransformerConfig
from sparsek.generation.cache import MIN_CHUNK, Cache, init_cache, lost_scores, pad_length, prefill
from sparsek.generation.cache_sizes import check_memory, clip_sizes, padded_length
from sparsek.generation.inference import InferenceParams, inference_params
from sparsek.generation.rows import place_rows, without_context
from sparsek.generation.sharded_prompt import prefill_sharded
from sparsek.model.transformer import Params, check_ids
from sparsek.parallel.mesh import CONTEXT

# Logits that exist at the same time, as float32, on all devices: on CPUs, elsewhere.
MAX_LOGITS, MANY_LOGITS = 2**25, 2**29

Pair = tuple[Sequence[int], Sequence[int]]  # the tokens of a context and of its continuation
Likelihood = tuple[float, bool]  # log-likelihood; whether greedy decoding writes the continuation


@dataclasses.dataclass
class _Row:
  """A row of a batch: what is read after the context, and the pairs that it answers.

  Attributes:
    context: all tokens of the context but the last.
    tokens: that are read after it: the last one, and those of the continuation but its last.
    pairs: {last token of a continuation: indices of the pairs that end with it}.
  """

  context: tuple[int, ...]
  tokens: tuple[int, ...]
  pairs: dict[int, list[int]] = dataclasses.field(default_factory=dict)


def log_likelihoods(
  config: TransformerConfig,
  params: Params | InferenceParams,
  pairs: Sequence[Pair],
  batch_size: int = 1,
  mesh: Mesh | None = None,
) -> Iterator[tuple[int, Likelihood]]:
  """Yields (index of a pair, its log-likelihood), the longest contexts first.

  Args:
    config, params: the model.
    pairs: contexts, of at least one token each, and their continuations.
    batch_size: texts that are read at the same time, over all devices.
    mesh: devices over which parameters and texts are spread, as `sparsek.generation.rows` says, and
      the tokens of contexts over `context`; None: one device.
  Raises:
    ValueError: for an empty context, ids outside the vocabulary, and more than memory could hold.
  """
  contexts: dict[tuple[int, ...], dict[tuple[int, ...], _Row]] = {}
  for i, (context, continuation) in enumerate(pairs):
    if not len(context):
      raise ValueError(f"pairs[{i}] has an empty context: begin it with bos or eos")
    if not len(continuation):
      yield i, (0.0, True)
      continue
    for name, ids in (("context", context), ("continuation", continuation)):
      check_ids(f"{name} of pairs[{i}]", np.asarray(ids), config.vocab_size)
    before, tokens = tuple(context[:-1]), (context[-1], *continuation[:-1])
    row = contexts.setdefault(before, {}).setdefault(tokens, _Row(before, tokens))
    row.pairs.setdefault(continuation[-1], []).append(i)
  size = lambda rows: (len(rows[0].context), max(len(row.tokens) for row in rows))
  groups = sorted((list(rows.values()) for rows in contexts.values()), key=size, reverse=True)
  reader = _Reader(config, params, batch_size, mesh)
  for first in range(0, len(groups), batch_size):
    yield from reader.read(groups[first : first + batch_size])


class _Reader:
  """A model that reads batches of contexts and what follows them."""

  def __init__(self, config, params, batch_size, mesh):
    self._config, self._batch_size = config, batch_size
    self._prompt_mesh = mesh if mesh is not None and mesh.shape[CONTEXT] > 1 else None
    self._mesh = without_context(mesh)
    self._params = inference_params(config, params, self._mesh)
    most = MAX_LOGITS if jax.default_backend() == "cpu" else MANY_LOGITS
    fitting = most // (batch_size * config.vocab_size)
    self._chunk = max(MIN_CHUNK, 1 << max(fitting, 1).bit_length() - 1)  # few sizes are compiled

  def read(self, groups: Sequence[list[_Row]]) -> Iterator[tuple[int, Likelihood]]:
    """Yields what the rows of some contexts answer; each group has the rows of a context."""
    length = max(len(row.context) + len(row.tokens) for rows in groups for row in rows)
    config = clip_sizes(self._config, length)
    cache = self._after(config, [rows[0].context for rows in groups], pad_length(length))
    numbered = [(number, row) for number, rows in enumerate(groups) for row in rows]
    numbered.sort(key=lambda item: len(item[1].tokens), reverse=True)
    for first in range(0, len(numbered), self._batch_size):
      part = numbered[first : first + self._batch_size]
      index = np.zeros(self._batch_size, np.int32)
      index[: len(part)] = [number for number, _ in part]
      copied = place_rows(self._mesh, _rows_of(cache, index), self._batch_size)
      yield from self._answers(config, copied, [row for _, row in part])

  def _after(self, config, contexts, length) -> Cache:
    """Returns the cache of a whole batch after some contexts, with room for `length` tokens."""
    size = self._batch_size
    check_memory(config, 2 * size, length, f"batch_size={size}")
    counts = np.zeros(size, np.int32)
    counts[: len(contexts)] = list(map(len, contexts))
    if not counts.any():
      return place_rows(self._mesh, init_cache(config, size, max_length=length), size)
    # Rows without a context of their own read the first one: `prefill_sharded` takes no empty row.
    counts[len(contexts) :] = counts[0]
    tokens = np.zeros((size, counts.max()), np.int32)
    for row, count in enumerate(counts):
      tokens[row, :count] = contexts[row if row < len(contexts) else 0]
    if self._prompt_mesh is not None and counts.all():
      room = padded_length(length)
      _, cache = prefill_sharded(config, self._params, tokens, counts, room, self._prompt_mesh)
      return place_rows(self._mesh, cache, size)
    cache = place_rows(self._mesh, init_cache(config, size, max_length=length), size)
    return prefill(
      config, self._params, cache, tokens, counts, last_only=True, donate=True, mesh=self._mesh
    )[1]

  def _answers(self, config, cache, rows: Sequence[_Row]) -> Iterator[tuple[int, Likelihood]]:
    """Yields what rows answer, given the cache after the context of each."""
    longest = max(len(row.tokens) for row in rows)
    most = max(len(row.pairs) for row in rows)
    chunk = min(self._chunk, pad_length(longest))
    shape = self._batch_size, -(-longest // chunk) * chunk
    tokens, counts = np.zeros(shape, np.int32), np.zeros(self._batch_size, np.int32)
    targets = np.zeros((*shape, 1 << (most - 1).bit_length()), np.int32)
    for i, row in enumerate(rows):
      counts[i] = len(row.tokens)
      tokens[i, : counts[i]] = row.tokens
      targets[i, : counts[i] - 1, 0] = row.tokens[1:]
      targets[i, counts[i] - 1, : len(row.pairs)] = list(row.pairs)
    parts = []
    for start in range(0, shape[1], chunk):
      part = slice(start, start + chunk)
      fed = np.clip(counts - start, 0, chunk)
      logits, cache = prefill(
        config,
        self._params,
        cache,
        tokens[:, part],
        fed,
        chunk_size=chunk,
        donate=True,
        mesh=self._mesh,
      )
      parts.append(_of_targets(logits, targets[:, part]))
    logprobs, greedy = (np.concatenate(list(map(np.asarray, x)), axis=1) for x in zip(*parts))
    warn_of_lost(lost_scores(cache)[: len(rows)])
    for i, row in enumerate(rows):
      last = counts[i] - 1
      before = float(np.sum(logprobs[i, :last, 0], dtype=np.float64))
      is_greedy = bool(np.all(greedy[i, :last] == targets[i, :last, 0]))
      for which, (token, indices) in enumerate(row.pairs.items()):
        value = before + float(logprobs[i, last, which])
        yield from (
          (index, (value, is_greedy and bool(greedy[i, last] == token))) for index in indices
        )


def warn_of_lost(lost: np.ndarray) -> None:
  """Warns, once for all texts, where a cache lost scores above the threshold.

  Args:
    lost: of `sparsek.generation.cache.lost_scores`.
  """
  if np.any(lost):
    warnings.warn(
      "scores above the threshold had no room in the cache of some texts: their gates are slightly "
      "high",
      stacklevel=2,
    )


@jax.jit
def _rows_of(cache: Cache, index: jax.Array) -> Cache:
  """Returns a cache whose row i is row index[i] of another one."""
  return jax.tree.map(lambda x: x[index], cache)


@jax.jit
def _of_targets(logits_BxCxV: jax.Array, targets_BxCxK: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Returns log-probabilities of the targets of each position, and its most probable token."""
  total_BxC = jax.nn.logsumexp(logits_BxCxV, axis=-1)
  chosen_BxCxK = jnp.take_along_axis(logits_BxCxV, targets_BxCxK, axis=-1)
  return chosen_BxCxK - total_BxC[..., None], jnp.argmax(logits_BxCxV, axis=-1)
