import dataclasses
import json
import os

import jax
import pytest

from sparsek.config import TransformerConfig
from sparsek.experiments import generate
from sparsek.generation.session import Session
from sparsek.generation.text_stream import TextStream
from sparsek.model.transformer import init_params
from tests.experiments.evaluate_test import write_run
from tests.helpers import run_command, spm

CONFIG = TransformerConfig(
  num_layers=1,
  embed_dim=8,
  num_heads=2,
  num_kv_heads=1,
  head_dim=4,
  mlp_dim=8,
  k=3,
  window=4,
  gate="value",
  scorer_init_scale=0.01,
  scorer_init_slope=0.0,
  implementation="reference",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  folder = tmp_path_factory.mktemp("generate")
  params = init_params(CONFIG, jax.random.key(0))
  # writes ASCII
  params["embed"]["embedding"] = 30 * params["embed"]["embedding"].at[:32].set(0).at[127:].set(0)
  write_run(folder / "run", "data", CONFIG, 32, params)
  os.mkfifo(folder / "fifo")
  contents = {"latin": b"a\ncaf\xe9\n", "latin1": b"a\nb\n", "empty": b"", "huge": b""}
  for name, content in contents.items():
    (folder / name).write_bytes(content)
  os.truncate(folder / "huge", 10**12)
  Session(CONFIG, params, 1).save(str(folder / "one.npz"))
  return folder


@pytest.fixture
def write(folder, capsys):
  def write(*arguments, code=0):
    assert run_command(generate.main, generate.FLAGS, f"--workdir={folder}/run", *arguments) == code
    return capsys.readouterr()

  return write


def test_a_text_goes_on_from_disk(folder, write):
  common = ["--max_new_tokens=20", "--temperature=0"]
  first = write("--prompt=a bc", f"--save_cache={folder}/text.npz", *common).out
  assert first.startswith("a bc") and len(first) == 25
  then = write("--prompt=defg", f"--load_cache={folder}/text.npz", *common).out
  assert first[:-1] + then == write(f"--prompt={first[:-1]}defg", *common).out


def test_several_texts_and_stop_strings(folder, write):
  (folder / "prompts").write_text("a bc\nxyz\n")
  common = ["--max_new_tokens=20", "--top_k=5", "--sampling_seed=5"]
  whole = write(f"--prompt_file={folder}/prompts", *common).out.splitlines()
  assert whole == [
    "[0] " + write("--prompt=a bc", *common).out[:-1],
    "[1] " + write("--prompt=xyz", *common[:2], "--sampling_seed=6").out[:-1],
  ]
  end = whole[0][14:16]
  for extra in ([], [f"--save_cache={folder}/two.npz"]):
    stopped = write(
      f"--prompt_file={folder}/prompts", f"--stop={end}", *common, *extra
    ).out.splitlines()
    assert stopped == [line[:8] + line[8:].split(end)[0] for line in whole] != whole


@pytest.fixture(scope="module")
def spaced(folder):
  """Makes a run whose tokenizer decodes without the first space, and which writes any token."""
  config = dataclasses.replace(CONFIG, vocab_size=spm().vocab_size, attention="sliding_window")
  write_run(folder / "spaced", "data", config, 32, init_params(config, jax.random.key(0)))
  (folder / "spaced" / "tokenizer").mkdir()
  spm().save(str(folder / "spaced" / "tokenizer"))
  path = folder / "spaced" / "model.json"
  record = json.loads(path.read_text())
  made = {"name": spm().name, "fingerprint": spm().fingerprint, "bos_ids": [1]}
  path.write_text(json.dumps({**record, "tokenizer": {**record["tokenizer"], **made}}))
  return f"--workdir={folder}/spaced"


def test_two_turns_show_what_all_tokens_decode_to(folder, write, spaced, monkeypatch):
  """Shows spaces after the prompt, characters that a turn's end cuts, and no second beginning."""
  fed = [[], []]

  class Recorded(TextStream):
    def __init__(self, *arguments, **state):
      super().__init__(*arguments, **state)
      self.row = Recorded.made % 2
      Recorded.made += 1

    def turn(self, prompt):
      fed[self.row] += prompt
      return super().turn(prompt)

    def push(self, token):
      fed[self.row].append(token)
      return super().push(token)

  Recorded.made = 0
  monkeypatch.setattr(generate, "TextStream", Recorded)
  common = [spaced, "--temperature=9", "--special_tokens", "--max_new_tokens=13"]
  cut = False
  for seed in range(3):
    fed[:] = [[], []]
    shown = ["", ""]
    for prompts, cache in (
      ("Hello\n\n", ["--save_cache={}/two.npz"]),
      ("lo\n\n", ["--load_cache={}/two.npz", "--save_cache={}/two.npz"]),
      ("\n w\n", ["--load_cache={}/two.npz"]),
    ):
      (folder / "rows").write_text(prompts)
      out = write(
        f"--prompt_file={folder}/rows",
        f"--sampling_seed={100 * seed}",
        *common,
        *(flag.format(folder) for flag in cache),
      ).out
      texts = [spm().decode(ids) for ids in fed]
      if cache[-1].startswith("--save"):  # a later turn shows what this one cuts
        cut |= any(text.endswith("\ufffd") for text in texts)
        texts = [text.removesuffix("\ufffd") for text in texts]
      new = [text.removeprefix(before) for text, before in zip(texts, shown)]
      assert out == f"[0] {new[0]}\n[1] {new[1]}\n"
      if len(cache) == 2:
        assert new[0].removeprefix("\ufffd").startswith("lo"), "no space within a text"
      shown = texts
    assert [ids[0] for ids in fed] == [1, 1] and fed[0][1:6] == spm().encode("Hello")[:5]
  assert cut, "no turn ended within a character"


def test_a_huge_window_costs_nothing(folder, write, spaced):
  common = ["--prompt=Hello", "--max_new_tokens=3", "--temperature=0"]
  huge = write(spaced, *common, "--window=100000000").out
  assert huge == write(spaced, *common, "--window=1000").out
  huge = write(*common, "--window=100000000", "--k=2147483647").out
  assert huge == write(*common, "--window=1000").out


def test_lost_scores_are_told(write):
  assert "warning" not in write("--prompt=a", "--max_new_tokens=9").err
  with_many = write("--prompt=" + 99 * "ab", "--max_new_tokens=9").err
  assert (
    "scores above the threshold had no room in the cache (of 1 of 1 texts): gates are slightly high"
    in with_many
  )


@pytest.mark.parametrize(
  "arguments, words",
  [
    (["--context=77"], "--fsdp=1 x --context=77 must divide the number of devices"),
    (["--prompt=a", "--prompt_file=b"], "--prompt and --prompt_file exclude each other"),
    (["--prompt_file={folder}/nowhere"], "--prompt_file {folder}/nowhere cannot be read"),
    (["--prompt_file={folder}"], "--prompt_file {folder} is a folder, expected a regular file"),
    (["--prompt_file=/dev/zero"], "--prompt_file /dev/zero is a device"),
    (["--prompt_file={folder}/fifo"], "--prompt_file {folder}/fifo is a FIFO"),
    (["--prompt_file={folder}/huge"], "--prompt_file {folder}/huge has more than 67,108,864 bytes"),
    (
      ["--prompt_file={folder}/latin"],
      "--prompt_file={folder}/latin is not UTF-8: byte 0xe9 in line 2",
    ),
    (["--prompt_file={folder}/empty"], "--prompt_file={folder}/empty has no lines"),
    (["--prompt_file=gs://a/b"], "gs: URLs are not supported"),
    (["--save_cache=/dev/null"], "--save_cache /dev/null is a device"),
    (["--save_cache={folder}"], "--save_cache {folder} is a folder"),
    (
      ["--save_cache={folder}/run/model.json"],
      "--save_cache={folder}/run/model.json is a file of the run in {folder}/run: take another",
    ),
    (["--save_cache={folder}/latin1"], "--save_cache={folder}/latin1 exists and is no cache that"),
    (["--load_cache={folder}/fifo"], "cache {folder}/fifo is a FIFO"),
    (
      ["--load_cache={folder}/one.npz", "--prompt_file={folder}/latin1"],
      "--load_cache={folder}/one.npz holds 1 texts, --prompt_file={folder}/latin1 has 2",
    ),
    (
      ["--max_new_tokens=2147483647"],
      "--max_new_tokens=2147483647 after 1 prompt tokens: positions are counted up to 2147483647",
    ),
    (
      ["--max_new_tokens=2000000000", "--window=1999999999"],
      "--max_new_tokens=2000000000 after 1 prompt tokens: what the model would keep",
    ),
    (
      ["--save_cache={folder}/nowhere/x"],
      "--save_cache={folder}/nowhere/x: must be a file in a folder that exists",
    ),
    (["--load_cache={folder}/nowhere"], "{folder}/nowhere cannot be read as a cache"),
    (["--top_k=-1"], "--top_k=-1"),
  ],
)
def test_bad_flags(folder, write, arguments, words):
  assert (
    words.format(folder=folder)
    in write(*(argument.format(folder=folder) for argument in arguments), code=2).err
  )
