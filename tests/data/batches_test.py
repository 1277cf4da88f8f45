"""Packed rows, iterators and the built-in corpus. Token files, sources and tokenizers are tested in
token_files_test.py.
"""

import collections
import json
import multiprocessing
import os
import subprocess
import sys

import numpy as np
import pytest

from sparsek.config import DataConfig
from sparsek.data import batches, epoch_order
from sparsek.data.batches import packing
from sparsek.data.corpus import Document
from sparsek.data.epoch_order import EpochOrder, Stage
from sparsek.data.token_files import write_token_files
from sparsek.data.tokenizer import ByteTokenizer
from sparsek.errors import RunError, UsageError

HELD_OUT = ("tokens", "documents", "segment_ids")  # arrays of a held-out batch


def make_dataset(folder, lengths, heldout=2):
  """Returns data of documents with these numbers of tokens; the last `heldout` are held out."""
  rng = np.random.default_rng(0)
  texts = ["".join(map(chr, rng.integers(32, 127, length - 1))) for length in lengths]
  write_token_files(
    str(folder),
    [Document(str(i), text, i >= len(texts) - heldout) for i, text in enumerate(texts)],
    ByteTokenizer(),
  )
  return batches.open_data(str(folder))


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
  return make_dataset(
    tmp_path_factory.mktemp("data") / "tokens", [5, 40, 2, 17, 100, 3, 1 + 64, 9, 23, 50, 30]
  )


def make_iterator(dataset, batch_size=4, seq_len=16, **kwargs):
  return batches.make_train_iterator(
    dataset, DataConfig(batch_size=batch_size, seq_len=seq_len, seed=1), **kwargs
  )


def assert_same(first, second, keys=frozenset({"tokens", "segment_ids"})):
  assert first.keys() == second.keys() == keys
  for key in first:
    assert first[key].dtype == second[key].dtype == (bool if key == "counted" else np.int32)
    np.testing.assert_array_equal(first[key], second[key])


def epoch_of(dataset, seq_len, epoch=0, **kwargs):
  rows = batches.PackedRows(dataset.split("train"), seq_len, **kwargs)
  return [rows.example(i) for i in range(epoch * rows.num_rows, (epoch + 1) * rows.num_rows)]


@pytest.fixture(scope="module")
def marked_dataset(tmp_path_factory):
  """Returns data of capital and small letters; in some documents only the capitals count."""
  rng, folder = np.random.default_rng(0), str(tmp_path_factory.mktemp("marked") / "tokens")
  lengths = rng.integers(5, 60, 12)
  texts = [
    "".join(map(chr, np.sort(rng.integers(65, 91, length))))
    + "".join(map(chr, rng.integers(97, 123, length)))
    for length in lengths
  ]
  write_token_files(
    folder,
    [
      Document(str(i), text, i > 9, ((0, int(lengths[i])),) if i % 3 else None)
      for i, text in enumerate(texts)
    ],
    ByteTokenizer(),
  )
  return batches.open_data(folder)


def test_rows_say_what_the_loss_counts(marked_dataset, dataset):
  split, marks = marked_dataset.split("train"), collections.Counter()
  for row in epoch_of(marked_dataset, 16):
    assert row["counted"].dtype == bool and not np.any(row["counted"] & (row["segment_ids"] == 0))
    marks.update(zip(row["tokens"][1:].tolist(), row["counted"][1:].tolist()))
  expected = collections.Counter(
    pair
    for i in range(split.num_documents)
    for pair in zip(split.document(i).tolist(), (~split.uncounted(i)).tolist())
  )
  expected[0, False] = marks[0, False]  # padding
  missing = expected - marks  # the first token of the stream is no target
  assert marks - expected == collections.Counter() and sum(missing.values()) == 1
  assert marks[97, False] and marks[97, True] and "counted" not in epoch_of(dataset, 16)[0]
  iterator, resumed = (make_iterator(marked_dataset) for _ in range(2))
  next(iterator)
  resumed.set_state(iterator.get_state())
  assert_same(next(iterator), next(resumed), {"tokens", "segment_ids", "counted"})


def test_an_example_depends_on_its_number_only(dataset):
  split = dataset.split("train")
  rows = batches.PackedRows(split, 16, seed=3)
  numbers = range(3 * rows.num_rows)
  forwards = [rows.example(i) for i in numbers]
  again = batches.PackedRows(split, 16, seed=3)
  for i in reversed(numbers):
    assert_same(forwards[i], again.example(i))


def test_seed_and_epoch_change_the_order(dataset):
  def tokens(**kwargs):
    return [row["tokens"].tolist() for row in epoch_of(dataset, 16, **kwargs)]

  assert tokens(seed=0) != tokens(seed=1)
  assert tokens(seed=0) != tokens(seed=0, epoch=1)


@pytest.mark.parametrize("seq_len", [1, 7, 16, 200])
@pytest.mark.parametrize("epoch", [0, 2])
def test_every_token_of_an_epoch_is_a_target_once(dataset, seq_len, epoch):
  """Each pair of neighbours in a document is shown once, and each token except the first of the
  stream is a target once.
  """
  split = dataset.split("train")
  pairs = collections.Counter(
    pair
    for i in range(split.num_documents)
    for pair in zip(split.document(i)[:-1].tolist(), split.document(i)[1:].tolist())
  )
  seen = collections.Counter()
  num_targets = 0
  for row in epoch_of(dataset, seq_len, epoch):
    tokens, segments = row["tokens"], row["segment_ids"]
    counted = (segments[1:] == segments[:-1]) & (segments[1:] != 0)
    seen.update(zip(tokens[:-1][counted].tolist(), tokens[1:][counted].tolist()))
    num_targets += int((segments[1:] != 0).sum())
  assert seen == pairs
  assert num_targets == split.num_tokens - 1


@pytest.mark.parametrize(
  "seq_len", [1, 5, 64]
)  # With short rows, some start at the beginning of a document.
def test_segment_ids_count_the_documents_of_a_row(dataset, seq_len):
  for row in epoch_of(dataset, seq_len):
    segments, tokens = row["segment_ids"], row["tokens"]
    real = segments != 0
    assert segments[0] == 1
    assert np.all(np.diff(real.astype(int)) <= 0), "padding comes last"
    # A document ends with eos, and nothing else does.
    ends = tokens[real][:-1] == ByteTokenizer.eos_id
    np.testing.assert_array_equal(np.diff(segments[real]), ends.astype(int))


def test_without_segments_all_documents_are_one(dataset):
  for with_segments, without in zip(
    epoch_of(dataset, 64), epoch_of(dataset, 64, segment_documents=False)
  ):
    np.testing.assert_array_equal(without["tokens"], with_segments["tokens"])
    np.testing.assert_array_equal(without["segment_ids"], with_segments["segment_ids"] > 0)


def test_rows_reach_beyond_32_bits():
  """A split of 6e9 tokens that are not in memory: document d repeats the number d."""

  class Huge:
    name = "train"
    vocab_size = 3
    lengths = np.array([2**32 + 5, 2**31 - 7, 11], np.int64)
    num_documents = 3
    num_tokens = int(lengths.sum())
    marked = False

    def document(self, i):
      return np.broadcast_to(np.int32(i), self.lengths[i])

  seq_len = 2**20
  rows = batches.PackedRows(Huge(), seq_len)
  assert rows.num_rows == -(-(Huge.num_tokens - 1) // seq_len)
  order = EpochOrder(Huge.lengths, 0, [Stage.new(0, seq_len)])
  last = rows.example(int(np.flatnonzero(order.rows == rows.num_rows - 1)[0]))
  count = Huge.num_tokens - (rows.num_rows - 1) * seq_len
  assert np.count_nonzero(last["segment_ids"]) == count
  assert last["tokens"][count - 1] == order.documents[-1]


def test_batches_follow_the_examples_over_epochs(dataset):
  iterator = make_iterator(dataset)
  rows = batches.PackedRows(dataset.split("train"), 16, seed=1)
  for s in range(3 * rows.num_rows // 4):
    batch = next(iterator)
    for row in range(4):
      assert_same({key: value[row] for key, value in batch.items()}, rows.example(4 * s + row))
  iterator.close()


@pytest.mark.parametrize("steps", [0, 1, 9])
def test_state_resumes_with_the_following_batch(dataset, steps):
  """The state counts the batches that were returned, not those that were prefetched."""
  iterator = make_iterator(dataset)
  for _ in range(steps):
    next(iterator)
  state = json.loads(json.dumps(iterator.get_state()))
  assert state["tokens"] == steps * 4 * 16
  resumed = make_iterator(dataset)
  next(resumed)
  resumed.set_state(state)
  assert resumed.get_state() == state
  for _ in range(8):
    assert_same(next(iterator), next(resumed))


class Numbered:
  """A split whose ids are the positions of its tokens, to show which were read."""

  name, marked, vocab_size = "train", False, 2**31

  def __init__(self, lengths):
    self.lengths = np.array(lengths)
    self.num_documents, self.num_tokens = len(lengths), int(sum(lengths))
    self._starts = np.cumsum(self.lengths) - self.lengths

  def document(self, i):
    return np.arange(self._starts[i], self._starts[i] + self.lengths[i])


# Documents shorter and longer than rows: 6000 tokens; the first one of a document is no target.
LENGTHS = np.random.default_rng(0).multinomial(5700, np.r_[0.5, np.full(299, 0.5 / 299)]) + 1
NUMBERED = Numbered(LENGTHS)
FIRST = set((np.cumsum(NUMBERED.lengths) - NUMBERED.lengths).tolist())


def targets_read(batches):
  """Returns all targets that the loss counts."""
  tokens = []
  for batch in batches:
    before, segments = batch["segment_ids"][:, :-1], batch["segment_ids"][:, 1:]
    tokens += batch["tokens"][:, 1:][(segments == before) & (segments != 0)].tolist()
  return tokens


def iterators(processes=1, **flags):
  config = DataConfig(**{"seq_len": 64, "batch_size": 2, "seed": 0, **flags})
  rows = [
    packing.local_rows(config.batch_size, config.seq_len, [process], processes)
    for process in range(processes)
  ]
  return [batches.TrainIterator(NUMBERED, config, part, "") for part in rows]


def read_on(state, steps, processes=1, **flags):
  """Returns targets of `steps` batches under these flags, from a state on, and the next state."""
  readers = iterators(processes, **flags)
  for reader in readers:
    if state:
      reader.set_state(json.loads(json.dumps(state)))
  shown = [targets_read(next(reader) for _ in range(steps)) for reader in readers]
  states = [reader.get_state() for reader in readers]
  assert all(state == states[0] for state in states)
  return sum(shown, []), states[0]


def rest_of_epoch(state, seq_len, seed, **options):
  """Returns the rows of an epoch after a state, as batches of one, and the next epoch's first."""
  rows = batches.PackedRows(
    NUMBERED,
    seq_len,
    seed=seed,
    epoch=state["epoch"],
    stages=[Stage(*stage) for stage in state["stages"]],
    **options,
  )
  i, rest = rows.first, []
  while rows.stages_before(i)[0] == state["epoch"]:
    rest.append({key: value[None] for key, value in rows.example(i).items()})
    i += 1
  return rest, rows.example(i)


CHANGES = {
  "nothing": [{}],
  "seq_len, longer": [dict(seq_len=128)],
  "seq_len, longer than the rest": [dict(seq_len=5000, steps=0)],
  "seq_len, much shorter": [dict(seq_len=7)],
  "batch_size": [dict(batch_size=6)],
  "seed": [dict(seed=1)],
  "seed, back again": [dict(seed=1), {}],
  "all, several times": [
    dict(seq_len=48, seed=1, batch_size=3),
    dict(seq_len=7),
    dict(seq_len=200, seed=2),
    {},
  ],
  "processes": [dict(processes=2), dict(processes=2, batch_size=6, seq_len=128)],
}


@pytest.mark.parametrize("changes", CHANGES.values(), ids=CHANGES.keys())
@pytest.mark.parametrize("group_tokens", [None, 640])
def test_the_rest_of_an_epoch_is_what_was_not_read(changes, group_tokens, monkeypatch):
  """After a change of flags each target of the epoch is still shown once, as in the next epoch."""
  if group_tokens:
    monkeypatch.setattr(epoch_order, "_GROUP_TOKENS", group_tokens)
  shown, state = read_on(None, 20)
  for flags in changes:
    newly_shown, state = read_on(state, **{"steps": 3, **flags})
    shown += newly_shown
  rest, following = rest_of_epoch(state, flags.get("seq_len", 64), flags.get("seed", 0))
  shown += targets_read(rest)
  assert sorted(shown) == [i for i in range(NUMBERED.num_tokens) if i not in FIRST]
  new = batches.PackedRows(NUMBERED, flags.get("seq_len", 64), seed=flags.get("seed", 0))
  assert_same(following, new.example(new.num_rows))


def test_without_segments_a_change_repeats_one_target_a_cut():
  shown, state = read_on(None, 20, segment_documents=False)
  rest, _ = rest_of_epoch(state, 128, 0, segment_documents=False)
  counts = np.bincount(shown + targets_read(rest))
  assert np.count_nonzero(counts) == NUMBERED.num_tokens - 1
  assert np.sum(counts == 2) < 30 and max(counts) == 2


def test_constant_flags_keep_the_order_of_older_versions():
  """The first permutation of the generator of (seed, epoch) orders documents, the next one rows."""
  generator = np.random.Generator(np.random.PCG64([3, 2]))
  documents = generator.permutation(NUMBERED.num_documents)
  stream = np.concatenate([NUMBERED.document(i) for i in documents])
  rows = batches.PackedRows(NUMBERED, 64, seed=3)
  for visit, row in enumerate(generator.permutation(rows.num_rows)):
    tokens = stream[64 * row : 64 * row + 65]
    example = rows.example(2 * rows.num_rows + visit)
    np.testing.assert_array_equal(example["tokens"][: len(tokens)], tokens)


def test_states_of_older_versions_are_read(caplog):
  _, state = read_on(None, 60)
  assert state["epoch"] == 1
  old = {key: state[key] for key in ("tokens", "dataset")}
  assert read_on(old, 3)[0] == read_on(state, 3)[0]
  assert caplog.text.count("saved by an older version") == 1
  assert read_on(old, 3)[1]["tokens"] == state["tokens"] + 3 * 2 * 64


def test_an_old_state_goes_on_under_other_flags_where_its_own_are_known(caplog):
  _, state = read_on(None, 60, seed=5)
  old = {key: state[key] for key in ("tokens", "dataset")}
  shown = []
  for saved, options in ((state, {}), (old, dict(saved_under={"seq_len": 64, "seed": 5}))):
    (reader,) = iterators(seq_len=32, seed=6)
    reader.set_state(saved, **options)
    shown.append(targets_read(next(reader) for _ in range(3)))
  assert shown[0] == shown[1] and not caplog.text


def test_a_long_document_stays_whole_after_short_rows(monkeypatch):
  """The rows that were read are in few groups, so that nearly all others are in one span."""
  monkeypatch.setattr(epoch_order, "_GROUP_TOKENS", 512)
  order = EpochOrder(np.array([6000]), 0, [Stage(0, 64, 8, 40), Stage.new(0, 1024)])
  pieces = [list(order.pieces(visit, 1024)) for visit in range(len(order.rows))]
  assert sorted(end - begin for row in pieces for _, begin, end in row)[-3:] == [1025] * 3


@pytest.mark.parametrize(
  "state",
  [
    None,
    {},
    {"tokens": -1},
    {"tokens": "5"},
    {"tokens": True},
    {"tokens": 1, "dataset": "", "stages": []},
    {"tokens": 1, "dataset": "", "epoch": -1, "stages": []},
    *(
      {"tokens": 1, "dataset": "", "epoch": 0, "stages": stages}
      for stages in (
        5,
        [5],
        [[0, 64, 9]],
        [[0, 0, 9, 9]],
        [[0, 64, 0, 9]],
        [[0, 64, 9, -1]],
        [["0", 64, 9, 1]],
        [[0, 64, 9, 10**9]],
      )
    ),
  ],
)
def test_damaged_states_are_refused(state):
  with pytest.raises(ValueError, match="'tokens'|'stages'|cannot be read"):
    iterators()[0].set_state(state)


def test_state_of_other_data_warns(dataset, tmp_path, caplog):
  other = make_dataset(tmp_path / "other", [100, 20, 20])
  iterator = make_iterator(other)
  iterator.set_state(make_iterator(dataset).get_state())
  assert "not those that were read so far" in caplog.text


def test_close_stops_reading(dataset):
  iterator = make_iterator(dataset)
  next(iterator)
  iterator.close()
  with pytest.raises(ValueError, match="closed"):
    next(iterator)


def test_an_error_while_prefetching_reaches_the_reader(dataset, monkeypatch):
  monkeypatch.setattr(batches.PackedRows, "example", lambda self, i: 1 / 0)
  with pytest.raises(ZeroDivisionError):
    next(make_iterator(dataset))


@pytest.mark.parametrize("wrong", [257, 2**16 - 1])
def test_ids_above_the_vocabulary_name_the_file_and_the_place(tmp_path, wrong):
  folder, texts = str(tmp_path / "tokens"), ("abc", "defg", "hij")
  documents = [Document(str(i), text, i == 2) for i, text in enumerate(texts)]
  write_token_files(folder, documents, ByteTokenizer())
  with open(f"{folder}/tokens.bin", "r+b") as file:
    file.seek(2 * 6)
    file.write(wrong.to_bytes(2, "little"))
  opened = batches.open_data(folder)
  with pytest.raises(RunError) as error:
    next(batches.make_train_iterator(opened, DataConfig(batch_size=1, seq_len=8)))
  position = "token 6 (token 2 of document 1 of the train split, '1')"
  assert (
    f"tokens.bin is damaged: the id {wrong} at {position} is not below the vocabulary's 257"
    in str(error.value)
  )
  assert len(batches.eval_batches(opened, DataConfig(batch_size=1, seq_len=8), 9)[0]["tokens"]) == 1


def test_ids_of_32_bits_do_not_become_negative_ones():
  class Wrong(Numbered):
    vocab_size = 10

    def document(self, i):
      return np.full(self.lengths[i], 2**32 - 1, np.uint32)

    def check_ids(self, i):
      raise RunError(f"document {i}")

  with pytest.raises(RunError, match="document 0"):
    batches.PackedRows(Wrong([9]), 4).example(0)


def test_processes_share_the_rows_of_a_batch(dataset):
  whole = make_iterator(dataset, batch_size=6)
  shards = [make_iterator(dataset, batch_size=6, parts=[p], num_parts=3) for p in range(3)]
  for _ in range(4):
    parts = [next(shard) for shard in shards]
    assert all(part["tokens"].shape == (2, 17) for part in parts)
    assert_same(
      {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}, next(whole)
    )
  assert (
    len({json.dumps(shard.get_state()) for shard in shards} | {json.dumps(whole.get_state())}) == 1
  )


def test_bad_shapes_are_refused(dataset):
  with pytest.raises(ValueError, match="batch_size=4 must be a multiple of 3"):
    make_iterator(dataset, num_parts=3)
  with pytest.raises(ValueError, match=r"parts=\[2\]"):
    make_iterator(dataset, parts=[2], num_parts=2)
  num_tokens = dataset.split("train").num_tokens
  with pytest.raises(
    ValueError,
    match=f"seq_len={num_tokens} needs at least {num_tokens + 1} tokens.* has {num_tokens}",
  ):
    make_iterator(dataset, seq_len=num_tokens)
  next(make_iterator(dataset, seq_len=num_tokens - 1))
  with pytest.raises(ValueError, match="seed=-1"):
    batches.make_train_iterator(dataset, DataConfig(seq_len=4, seed=-1))


def test_without_grain_the_message_says_what_to_install(dataset, monkeypatch):
  monkeypatch.setitem(sys.modules, "grain", None)
  with pytest.raises(UsageError, match=r"needs grain, .*\(.*grain.*\): pip install grain"):
    make_iterator(dataset)


@pytest.mark.slow
def test_importing_needs_no_grain():
  subprocess.run(
    [sys.executable, "-c", "import sys; sys.modules['grain'] = None; import sparsek.data.batches"],
    check=True,
  )


@pytest.mark.parametrize("batch_size", [1, 4, 8])
def test_eval_batches_are_fixed_and_held_out(dataset, batch_size):
  config = DataConfig(batch_size=batch_size, seq_len=16)
  rows = batches.eval_batches(dataset, config, 1000)
  for first, second in zip(
    rows,
    batches.eval_batches(dataset, DataConfig(batch_size=batch_size, seq_len=16, seed=5), 1000),
    strict=True,
  ):
    assert_same(first, second, {*HELD_OUT})
  real = np.concatenate(
    [batch["tokens"][:, 1:][batch["segment_ids"][:, 1:] != 0] for batch in rows]
  )
  split = dataset.split("heldout")
  assert len(real) == split.num_tokens - 1 == 79
  assert all(batch["tokens"].shape == (batch_size, 17) for batch in rows)
  text = dataset.tokenizer.decode(np.concatenate([split.document(i) for i in range(2)]))
  assert collections.Counter(dataset.tokenizer.decode(real)) <= collections.Counter(text)
  each_row = [row for batch in rows for row in zip(*map(batch.get, HELD_OUT))]
  for tokens, documents, ids in each_row:
    np.testing.assert_array_equal(documents == -1, ids == 0)
    for document in range(2):
      here = tokens[documents == document].astype(np.uint16).tobytes()
      assert here in split.document(document).astype(np.uint16).tobytes()
  assert len(list(rows)) == len(list(rows)) == len(rows) == -(-5 // batch_size)
  assert len(batches.eval_batches(dataset, config, 1)) == 1


def test_eval_batches_are_shared_by_processes(dataset):
  config = DataConfig(batch_size=4, seq_len=16)
  parts = [batches.eval_batches(dataset, config, 9, parts=[p], num_parts=2) for p in range(2)]
  for whole, *halves in zip(batches.eval_batches(dataset, config, 9), *parts, strict=True):
    joined = {key: np.concatenate([half[key] for half in halves]) for key in whole}
    assert_same(whole, joined, {*HELD_OUT})


def test_eval_without_held_out_documents_is_refused(tmp_path):
  with pytest.raises(ValueError, match="no held-out documents"):
    batches.eval_batches(
      make_dataset(tmp_path / "tokens", [10, 10], heldout=0), DataConfig(seq_len=4), 1
    )


@pytest.fixture
def small_stdlib(tmp_path, monkeypatch):
  """A standard library of 60 files, one of them not UTF-8, and an empty cache."""
  root = tmp_path / "lib"
  for folder in ("pkg", "pkg/tests", "site-packages"):
    (root / folder).mkdir(parents=True)
  for i in range(60):
    (root / "pkg" / f"module{i}.py").write_text(f"x = {i}\n")
  (root / "latin1.py").write_bytes(b"# caf\xe9\n")
  (root / "empty.py").touch()
  (root / "pkg" / "tests" / "test_x.py").write_text("test")
  (root / "site-packages" / "other.py").write_text("other")
  monkeypatch.setattr("sysconfig.get_paths", lambda: {"stdlib": str(root)})
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
  return root


def texts_of(split):
  return [ByteTokenizer().decode(split.document(i)) for i in range(split.num_documents)]


def test_stdlib_is_split_by_document(small_stdlib):
  opened = batches.open_data("stdlib")
  train, heldout = texts_of(opened.split("train")), texts_of(opened.split("heldout"))
  assert len(train) > len(heldout) > 0
  assert sorted(train + heldout) == sorted([f"x = {i}\n" for i in range(60)] + ["# caf\ufffd\n"])


def test_stdlib_is_cached_and_made_anew_when_damaged(small_stdlib, caplog):
  opened = batches.open_data("stdlib")
  os.remove(small_stdlib / "latin1.py")
  assert batches.open_data("stdlib").fingerprint == opened.fingerprint
  os.truncate(os.path.join(opened.folder, "tokens.bin"), 10)
  again = batches.open_data("stdlib")
  assert again.folder == opened.folder and again.fingerprint != opened.fingerprint
  assert caplog.text.count("anew") == 1
  assert os.listdir(os.path.dirname(opened.folder)) == [os.path.basename(opened.folder)]


def test_stdlib_without_a_place_for_the_cache_says_so(small_stdlib, tmp_path, monkeypatch):
  (tmp_path / "file").touch()
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
  with pytest.raises(ValueError, match="XDG_CACHE_HOME"):
    batches.open_data("stdlib")


def _open_stdlib(barrier, queue):
  barrier.wait()
  queue.put(batches.open_data("stdlib").fingerprint)


@pytest.mark.slow
def test_stdlib_is_prepared_by_two_processes_at_once(tmp_path, monkeypatch):
  """Uses the real standard library, in new processes."""
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
  context = multiprocessing.get_context("spawn")
  barrier, queue = context.Barrier(2), context.Queue()
  processes = [context.Process(target=_open_stdlib, args=(barrier, queue)) for _ in range(2)]
  for process in processes:
    process.start()
  assert queue.get(timeout=120) == queue.get(timeout=120) == batches.open_data("stdlib").fingerprint
  for process in processes:
    process.join()
    assert process.exitcode == 0
  assert len(os.listdir(tmp_path / "sparsek")) == 1
  train = batches.open_data("stdlib").split("train")
  assert train.num_documents > 300 and train.num_tokens > 5_000_000


def test_a_batch_that_no_memory_holds_is_refused_at_once(dataset):
  config = DataConfig(batch_size=2**31 - 1, seq_len=16)
  for make in (batches.make_train_iterator, lambda *x: batches.eval_batches(*x, 1)):
    with pytest.raises(
      UsageError, match="--batch_size=2147483647 with --seq_len=16: a batch takes"
    ):
      make(dataset, config)
