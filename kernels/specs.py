"""Named attention problems, shared by tests and benchmarks."""

import dataclasses

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Spec:
  """One attention problem.

  Attributes:
    name: of the test.
    n, heads, groups, head_dim, k, window, batch: sizes, as in `sparsek.sparsek_attention`.
    documents: lengths of the packed documents, the last one repeated until the row is full; empty
      for no segment ids.
    scores: family of the scores; "rising" lets every token enter the selection, "falling" none
      after the first k.
    dtype: of query, key and value.
    scale: of the logits; None for the default.
    gates: those to test; "key_value" alone runs all of the code.
  """

  name: str
  n: int = 150
  heads: int = 2
  groups: int = 1
  head_dim: int = 16
  k: int = 16
  window: int = 16
  batch: int = 1
  documents: tuple[int, ...] = ()
  scores: str = "normal"
  dtype: str = "float32"
  scale: float | None = None
  gates: tuple[str, ...] = ("key_value",)


ALL_GATES = ("straight_through", "value", "key_value")
SPECS = (
  Spec("plain", gates=ALL_GATES),
  Spec("grouped_heads", heads=6, groups=2, batch=2, gates=ALL_GATES),
  Spec("odd_length", n=211, k=24, window=33),
  Spec("one_token", n=1, k=1, window=0),
  Spec("one_token_window", n=1, k=3, window=5),
  Spec("k_1_window_1", n=130, k=1, window=1),
  Spec("window_0", k=20, window=0),
  Spec("k_beyond_n", n=70, k=100, window=3),
  Spec("window_beyond_n", n=70, k=4, window=100),
  Spec("window_n", n=70, k=4, window=70),
  Spec("long_window", n=300, k=3, window=140),
  Spec("large_k", n=300, k=120, window=5),
  Spec(
    "documents",
    n=300,
    k=12,
    window=10,
    documents=(3, 120, 1, 1, 40),
    batch=2,
    groups=2,
    gates=ALL_GATES,
  ),
  Spec("short_documents", n=150, k=16, window=8, documents=(7,)),
  Spec("documents_window_0", n=150, k=5, window=0, documents=(60, 13)),
  Spec("rising", scores="rising"),
  Spec("falling", scores="falling"),
  Spec("equal", scores="equal"),
  Spec("ties", scores="ties"),
  Spec("huge", scores="huge"),
  Spec("tiny", scores="tiny"),
  Spec("head_dim_8", head_dim=8, scale=0.7),
  Spec("head_dim_256", n=100, head_dim=256),
  Spec("bfloat16", dtype="bfloat16", heads=4, groups=2, head_dim=32),
)


def segment_ids(spec: Spec) -> jax.Array | None:
  """Returns [batch, n] int32 ids, or None; row b is shifted by 5 b tokens, so that rows differ."""
  if not spec.documents:
    return None
  lengths = list(spec.documents)
  while sum(lengths) < 2 * spec.n:
    lengths.append(spec.documents[-1])
  ids = jnp.repeat(jnp.arange(1, len(lengths) + 1, dtype=jnp.int32), jnp.array(lengths))
  return jnp.stack([ids[5 * b : 5 * b + spec.n] for b in range(spec.batch)])


def make_scores(
  family: str, key: jax.Array, shape: tuple[int, int, int], spread: float = 2.0
) -> jax.Array:
  """Draws [batch, n, groups] float32 scores of a family."""
  noise = jax.random.normal(key, shape)
  time = jnp.arange(shape[1], dtype=jnp.float32)[None, :, None]
  return {
    "normal": spread * noise,
    "rising": 0.05 * time + 0.1 * noise,
    "falling": -0.05 * time + 0.1 * noise,
    "equal": jnp.ones(shape),
    "ties": jnp.round(noise),
    "huge": jnp.where(noise > 0.5, jnp.round(noise), noise) * 1e30,
    "tiny": noise * 1e-30,
  }[family]


def make_inputs(spec: Spec, seed: int = 0) -> tuple[jax.Array, ...]:
  """Draws query, key, value and scores."""
  keys = jax.random.split(jax.random.key(seed), 4)
  normal = lambda key, heads: jax.random.normal(
    key, (spec.batch, spec.n, heads, spec.head_dim)
  ).astype(spec.dtype)
  return (
    normal(keys[0], spec.heads),
    normal(keys[1], spec.groups),
    normal(keys[2], spec.groups),
    make_scores(spec.scores, keys[3], (spec.batch, spec.n, spec.groups)),
  )
