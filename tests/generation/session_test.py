import dataclasses
import functools
import io
import json
import zipfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsek.config import TransformerConfig
from sparsek.errors import UsageError
from sparsek.generation.session import Session, generate
from sparsek.model.transformer import Transformer, init_params
from tests.helpers import quick_jit

CONFIG = TransformerConfig(
  vocab_size=40,
  num_layers=2,
  embed_dim=16,
  num_heads=2,
  num_kv_heads=1,
  head_dim=8,
  mlp_dim=16,
  k=3,
  window=4,
  attention="sparsek,full",
  scan_layers=True,
  implementation="reference",
)
PROMPT = [3, 1, 4, 1, 5]


@functools.cache
def params():
  tree = quick_jit(functools.partial(init_params, CONFIG))(jax.random.key(0))
  return {**tree, "embed": jax.tree.map(lambda x: 30 * x, tree["embed"])}


def run(**more):
  return list(
    generate(CONFIG, params(), PROMPT, **{"max_new_tokens": 12, "temperature": 0.0, **more})
  )


def test_greedy_takes_the_largest_logit_of_the_parallel_forward():
  tokens = run()
  assert len(tokens) == 12 and tokens == run(key=jax.random.key(7))
  logits = quick_jit(Transformer(CONFIG).apply)(
    {"params": params()}, jnp.asarray([PROMPT + tokens])
  )[0]
  assert tokens == np.argmax(logits[len(PROMPT) - 1 : -1], -1).tolist()


def test_stops_at_eos_and_at_nothing():
  tokens = run()
  assert run(eos_id=[tokens[5], CONFIG.vocab_size]) == tokens[: tokens.index(tokens[5])]
  assert run(max_new_tokens=0) == []
  assert run(max_new_tokens=1) == tokens[:1]


def test_keys_decide_the_text():
  draw = lambda seed: run(temperature=5.0, key=jax.random.key(seed))
  assert draw(0) == draw(0) != draw(1)
  assert run(temperature=5.0, top_p=1e-6, key=jax.random.key(0)) == run(), (
    "a tiny nucleus is greedy"
  )


def test_tokens_stream():
  config = dataclasses.replace(CONFIG, attention="sliding_window")
  tokens = generate(
    config, init_params(config, jax.random.key(0)), PROMPT, max_new_tokens=10**9, temperature=0.0
  )
  assert len([next(tokens) for _ in range(3)]) == 3, "a limit of 10^9 tokens must cost nothing"


ROWS = [PROMPT, [7], [9, 9, 2, 30, 1, 1, 8, 5, 12, 3, 3]]
# compiles fast; selections are for cache_test
LIGHT = dataclasses.replace(CONFIG, attention="sliding_window", num_layers=1)
SOFT = dataclasses.replace(
  CONFIG, gate="value", attention="sparsek,sliding_window", dtype="bfloat16"
)


@functools.cache
def light_params():
  tree = quick_jit(functools.partial(init_params, LIGHT))(jax.random.key(0))
  return {**tree, "embed": jax.tree.map(lambda x: 30 * x, tree["embed"])}


def turn(session, prompts, **more):
  """Tokens of each row."""
  steps = list(session.generate(prompts, **{"max_new_tokens": 11, "temperature": 0.0, **more}))
  assert all(len(tokens) == len(prompts) for tokens in steps)
  rows = [[token for token in row if token is not None] for row in zip(*steps)]
  assert [list(row[: len(ended)]) for row, ended in zip(zip(*steps), rows)] == rows, (
    "None only from the end on"
  )
  return rows


@pytest.mark.parametrize(
  "options",
  [
    dict(),
    dict(temperature=5.0),
    dict(temperature=3.0, top_k=5),
    dict(temperature=3.0, top_p=0.7, eos_id=range(0, 40, 4)),
  ],
)
def test_what_a_row_draws_does_not_depend_on_the_rows_beside_it(options):
  keys = jax.random.split(jax.random.key(3), 3)
  together = turn(Session(LIGHT, light_params(), 3), ROWS, keys=keys, **options)
  alone = [
    list(
      generate(
        LIGHT, light_params(), row, key=key, **{"max_new_tokens": 11, "temperature": 0.0, **options}
      )
    )
    for row, key in zip(ROWS, keys)
  ]
  assert together == alone and (len(set(map(len, together))) > 1) == ("eos_id" in options)


def test_turns_go_on_where_they_ended():
  """In one session, from a file between turns, and one token at a time: the same, and what a dense
  cache of all tokens gives.
  """
  more = [[11, 12], [], [13]]
  one = Session(CONFIG, params(), 3)
  # of the full layer: the same for both turns, so nothing is compiled for the second
  rows = lambda: one.cache.layers[1].key.shape[2]
  first, before, second = turn(one, ROWS), rows(), turn(one, more)
  assert before == rows() == 128
  slow = Session(CONFIG, params(), 3)
  assert turn(slow, ROWS, ahead=0) == first and turn(slow, more, ahead=0) == second
  for row, (prompt, begun, then) in enumerate(zip(ROWS, first, more)):
    assert (
      list(generate(CONFIG, params(), prompt + begun + then, max_new_tokens=11, temperature=0.0))
      == second[row]
    )


@pytest.mark.parametrize("ahead, eos_id", [(0, 7), (3, 7), (3, None)])
def test_the_steps_of_a_turn_are_compiled_once(ahead, eos_id):
  """Parameters on a device, as from a checkpoint, place on it whatever is computed with them."""
  compiled = []

  def listen(event, seconds, **about):
    if event.endswith("backend_compile_duration"):
      compiled.append(about.get("fun_name"))

  ends = 0 if eos_id is None else 1
  config = dataclasses.replace(LIGHT, window=5 + 2 * ahead + ends)  # of no other test
  placed = jax.device_put(light_params(), jax.devices()[0])
  jax.monitoring.register_event_duration_secs_listener(listen)
  try:
    turn(Session(config, placed, 3), ROWS, ahead=ahead, eos_id=eos_id)
  finally:
    jax.monitoring.unregister_event_duration_listener(listen)
  assert sum("run_steps" in name for name in compiled) == 1


def test_a_stopped_row_computes_nothing_more():
  whole = turn(Session(LIGHT, light_params(), 3), ROWS)
  session, seen = Session(LIGHT, light_params(), 3), []
  for tokens in session.generate(ROWS, max_new_tokens=11, temperature=0.0, ahead=0):
    seen.append(tokens)
    if len(seen) == 4:
      session.stop(1)
  assert [row[1] for row in seen] == whole[1][:4] + [None] * 7 and [
    row[0] for row in seen
  ] == whole[0]
  assert session.cache.seen.tolist() == [
    len(row) + (3 if i == 1 else 10) for i, row in enumerate(ROWS)
  ]
  assert turn(session, [[], [], []], max_new_tokens=2)[1] == whole[1][4:6]


def test_a_session_that_ran_ahead_says_so(tmp_path):
  session = Session(LIGHT, light_params(), 1)
  for _ in session.generate([PROMPT], max_new_tokens=11, temperature=0.0):
    break
  for action in (
    lambda: session.save(str(tmp_path / "x")),
    lambda: session.generate([PROMPT], max_new_tokens=1, temperature=0.0),
  ):
    with pytest.raises(ValueError, match="use ahead=0"):
      action()


def test_a_session_is_resumed_from_disk(tmp_path):
  path, model = str(tmp_path / "text.npz"), init_params(SOFT, jax.random.key(2))
  model["embed"]["embedding"] *= 30
  session = Session(SOFT, model, 3)
  turn(session, ROWS)
  session.save(path)
  again = Session.load(path, SOFT, model)
  assert all(
    np.array_equal(x, y) and x.dtype == y.dtype
    for x, y in zip(jax.tree.leaves(session.cache), jax.tree.leaves(again.cache))
  )
  assert turn(again, [[], [3], []]) == turn(session, [[], [3], []])
  with pytest.raises(UsageError, match=r"saved under k=3 \(now 4\), gate=value \(now key_value\)"):
    Session.load(path, dataclasses.replace(SOFT, k=4, gate="key_value"), model)
  of_scorer = lambda path: "scorer" in jax.tree_util.keystr(path)
  other = jax.tree_util.tree_map_with_path(
    lambda path, leaf: leaf * 1.5 if of_scorer(path) else leaf, model
  )
  for params in (other, init_params(SOFT, jax.random.key(4))):
    with pytest.raises(UsageError, match="saved with other parameters"):
      Session.load(path, SOFT, params)
  (tmp_path / "text.npz").write_bytes((tmp_path / "text.npz").read_bytes()[:-300])
  for broken in (path, str(tmp_path / "none.npz"), __file__):
    with pytest.raises(UsageError, match="cannot be read as a cache"):
      Session.load(broken, SOFT, model)


def saved(tmp_path, session):
  path = str(tmp_path / "text.npz")
  session.save(path)
  return path


def sizes_as_texts_grow(config, tmp_path, monkeypatch, sizes):
  """Lets the cache grow with its texts, over turns and files; it gives what one of full
  size does. Returns the sizes of its layers after each of two turns.
  """
  model = init_params(config, jax.random.key(2))
  model["embed"]["embedding"] *= 30
  full, more = Session(config, model, 3), [[11, 12], [], [13]]
  wanted = [turn(full, rows, max_new_tokens=14) for rows in (ROWS, more)]
  monkeypatch.setattr("sparsek.generation.cache_sizes.UNCLIPPED", 8)
  session = Session(config, model, 3)
  found, before = [turn(session, ROWS, max_new_tokens=14)], sizes(session.cache.layers)
  session = Session.load(saved(tmp_path, session), config, model)
  found.append(turn(session, more, max_new_tokens=14))
  assert found == wanted
  return before, sizes(session.cache.layers)


def test_larger_windows_than_texts_need_cost_nothing(tmp_path, monkeypatch):
  small = dataclasses.replace(
    SOFT,
    attention="sparsek:k20:w4,sliding_window",
    num_layers=2,
    window=100,
    dtype="float32",
    gate="value",
  )
  sizes = lambda layers: (layers[0].position.shape[2], layers[1].key.shape[2])
  assert sizes_as_texts_grow(small, tmp_path, monkeypatch, sizes) == ((20, 32), (20, 64))
  huge, large = (dataclasses.replace(LIGHT, window=window, k=2**50) for window in (2**40, 16))
  first, second = (
    turn(Session(config, light_params(), 3), ROWS, max_new_tokens=1) for config in (huge, large)
  )
  assert first == second


def test_heads_of_their_own_k_and_window_grow_and_are_resumed_from_disk(tmp_path, monkeypatch):
  heads = dataclasses.replace(
    SOFT,
    attention="sparsek:k20:w4:h1:k0:w100,sliding_window:h0:w9",
    num_layers=2,
    num_kv_heads=2,
    window=100,
  )
  sizes = lambda layers: [part.key.shape[2] for part in layers[1].groups]
  assert sizes_as_texts_grow(heads, tmp_path, monkeypatch, sizes) == ([32, 9], [64, 9])
  other = dataclasses.replace(heads, attention="sparsek:k20:w4:h0:k0:w100,sliding_window:h0:w9")
  with pytest.raises(UsageError, match="was saved under attention="):
    Session.load(str(tmp_path / "text.npz"), other, init_params(other, jax.random.key(2)))


@pytest.mark.parametrize("attention", ["full", "sliding_window", "sparsek"])
def test_what_no_memory_could_hold_is_refused_at_once(attention):
  config = dataclasses.replace(LIGHT, attention=attention, window=2**40)
  message = (
    r"max_new_tokens=1000000000 after 5 prompt tokens: .* takes about [0-9,]+ bytes, "
    r"more than the [0-9,]+ bytes of memory here"
  )
  with pytest.raises(ValueError, match=message):
    generate(config, None, PROMPT, max_new_tokens=10**9, temperature=0.0)
  with pytest.raises(ValueError, match="positions are counted up to 2147483647"):
    generate(config, None, PROMPT, max_new_tokens=2**31, temperature=0.0)
  if attention != "full":
    message = r"window=\d+ and k=3: what the model would keep of 1000000000 texts"
    with pytest.raises(ValueError, match=message):
      Session(config, light_params(), 10**9)


def broken_heads(head):
  """(what is wrong, a head) for every field of every level, of every wrong kind."""
  wrong = [
    None,
    True,
    -1,
    2**31,
    10**30,
    1.5,
    "1",
    [],
    {},
    [1],
    [[1]],
    [[-1]] * 3,
    [[40]] * 3,
    [[1, 2]] * 3,
    [[1.0]] * 3,
    {"a": 1},
    [{}],
    [{}] * 2,
    [None] * 3,
  ]
  for where in ("", "config", "note"):
    section = head[where] if where else head
    for name in section:
      for value in ("missing", *wrong):
        changed = {key: part for key, part in section.items() if key != name}
        if value != "missing":
          changed[name] = value
        yield f"{where} {name}={value}", {**head, where: changed} if where else changed
  state = {"before": [1], "unfinished": False}
  for state in (
    {**state, "before": [40]},
    {**state, "before": 1},
    {**state, "unfinished": 0},
    {"before": [1]},
    {**state, "more": 1},
  ):
    yield f"texts {state}", {**head, "note": {**head["note"], "texts": [state] * 3}}


def test_no_broken_head_of_a_cache_is_a_traceback(tmp_path):
  session = Session(LIGHT, light_params(), 3)
  path = saved(tmp_path, session)
  members = dict(np.load(path))
  head = json.loads(members["head"].tobytes())
  opened = set()

  def attempt(what, text, **more):
    np.savez(path, **(members | {"head": np.frombuffer(text, np.uint8)} | more))
    try:
      Session.load(path, LIGHT, light_params())
      opened.add(what)
    except UsageError as error:
      assert str(error).startswith(path) and len(str(error)) < 1500 and "\n" not in str(error), what

  for what, changed in broken_heads(head):
    if changed != head:  # True is 1
      attempt(what, json.dumps(changed).encode())
  for text in (
    b"",
    b"[]",
    b"{}",
    b"null",
    b"1",
    b"[" * 10**5,
    b"9" * 5000,
    b"\xff",
    json.dumps(head).encode() + b"x",
  ):
    attempt(text[:9], text)
  assert opened == {"note texts=None", "note texts=missing", " length=missing", " length=None"}, (
    "older files have none"
  )


def test_no_broken_member_of_a_cache_is_a_traceback(tmp_path):
  path = saved(tmp_path, Session(LIGHT, light_params(), 3))
  content, members = open(path, "rb").read(), dict(np.load(path))
  rng = np.random.default_rng(0)

  def refused(what, **arrays):
    if arrays:
      np.savez(path, **arrays)
    with pytest.raises(UsageError, match="cannot be read as a cache") as error:
      Session.load(path, LIGHT, light_params())
    assert str(error.value).startswith(path), what

  for name, x in members.items():
    others = {other: y for other, y in members.items() if other != name}
    for wrong in (
      np.array([{}], object),
      x[None],
      x[..., :-1],
      x.astype(np.complex64),
      np.asfortranarray(x[..., None].T),
      np.array("text"),
      np.zeros(0),
    ):
      refused(name, **others, **{name: wrong})
    refused(name, **others)
  refused("seen", **(members | {"leaf_0": np.full(3, -1, np.int32)}))
  refused("seen", **(members | {"leaf_0": np.full(3, 1, np.int32)}))
  with zipfile.ZipFile(path, "w") as archive, zipfile.ZipFile(io.BytesIO(content)) as whole:
    for name in whole.namelist():
      archive.writestr(name, whole.read(name) + b"x" * (name == "leaf_1.npy"))
  refused("more than the array")
  np.savez_compressed(path, **members)
  refused("compressed: a small file could hold any size")
  for i in range(300):  # of any byte, but for what nothing reads
    damaged = bytearray(content)
    for at in rng.integers(len(content), size=rng.integers(1, 4)):
      damaged[at] ^= 1 << rng.integers(8)
    open(path, "wb").write(bytes(damaged[: rng.integers(len(content))] if i % 3 == 0 else damaged))
    try:
      Session.load(path, LIGHT, light_params())
    except UsageError as error:
      assert str(error).startswith(path)


def test_a_session_takes_extreme_numbers():
  session = Session(LIGHT, light_params(), 1)
  keys = jax.random.split(jax.random.key(0), 1)
  assert len(turn(session, [PROMPT], top_k=10**30, temperature=1e-40, keys=keys)[0]) == 11


@pytest.mark.parametrize(
  "arguments, message",
  [
    (dict(prompt_tokens=[]), "prompt_tokens has shape"),
    (dict(prompt_tokens=[[1]]), "prompt_tokens has shape"),
    (dict(prompt_tokens=[1, 40]), "from 0 to 39"),
    (dict(prompt_tokens=[-1]), "from 0 to 39"),
    (dict(prompt_tokens=[1.5]), "expected integers"),
    (dict(max_new_tokens=-1), "max_new_tokens=-1"),
    (dict(temperature=-0.5), "temperature=-0.5"),
    (dict(temperature=float("nan")), "temperature=nan"),
    (dict(top_p=0.0), "top_p=0.0"),
    (dict(top_p=1.5), "top_p=1.5"),
    (
      dict(temperature=1.0),
      r"temperature=1.0 draws .* keys=.*key\(0\), 1\), or key=jax.random.key",
    ),
    (dict(prompt_tokens="ab"), "prompt_tokens='ab' must be token ids: tokenizer.encode"),
    (dict(top_k=-1), "top_k=-1"),
  ],
)
def test_bad_arguments_are_refused_at_the_call(arguments, message):
  arguments = dict(prompt_tokens=PROMPT, max_new_tokens=3, temperature=0.0) | arguments
  with pytest.raises(ValueError, match=message):
    generate(CONFIG, None, **arguments)


def test_more_tokens_than_learned_positions_are_refused_at_the_call():
  config = dataclasses.replace(CONFIG, positions="learned", max_positions=10)
  with pytest.raises(
    ValueError,
    match=f"max_new_tokens=9 after {len(PROMPT)} prompt tokens: the model has max_positions=10",
  ):
    generate(config, None, PROMPT, max_new_tokens=9, temperature=0.0)


def test_sessions_that_pad_prompts_alike_share_programs():
  """Prompts of other lengths get a cache of the same size, and the same tokens as without."""
  shapes = []
  for prompt in (PROMPT, PROMPT * 30):
    padded = Session(CONFIG, params(), 1, pad_to=200)
    tokens = [row[0] for row in padded.generate([prompt], max_new_tokens=6, temperature=0.0)]
    plain = generate(CONFIG, params(), prompt, max_new_tokens=6, temperature=0.0)
    assert tokens == list(plain)
    shapes.append(jax.tree.map(jnp.shape, padded.cache))
  assert shapes[0] == shapes[1] != jax.tree.map(jnp.shape, Session(CONFIG, params(), 1).cache)
  more = [row[0] for row in padded.generate([PROMPT], max_new_tokens=3, temperature=0.0)]
  text = [*PROMPT * 30, *tokens, *PROMPT]
  assert more == list(generate(CONFIG, params(), text, max_new_tokens=3, temperature=0.0))
