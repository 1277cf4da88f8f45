import jax
import pytest

from experiments import generate
from sparsek import flags
from sparsek.config import TransformerConfig
from sparsek.model import init_params
from tests.experiments.evaluate_test import write_run
from tests.sparsek.helpers import run_command

CONFIG = TransformerConfig(num_layers=1, embed_dim=8, num_heads=2, num_kv_heads=1, head_dim=4, mlp_dim=8, k=3, window=4, gate="value",
                           scorer_init_scale=0.01, scorer_init_slope=0., implementation="reference")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  folder = tmp_path_factory.mktemp("generate")
  params = init_params(CONFIG, jax.random.key(0))
  params["embed"]["embedding"] = 30 * params["embed"]["embedding"].at[:32].set(0).at[127:].set(0)       # writes ASCII
  write_run(folder / "run", "data", CONFIG, 32, params)
  return folder


@pytest.fixture
def write(folder, capsys):
  def write(*arguments, code=0):
    assert run_command(generate.main, flags.FLAGS, f"--workdir={folder}/run", *arguments) == code
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
  assert whole == ["[0] " + write("--prompt=a bc", *common).out[:-1], "[1] " + write("--prompt=xyz", *common[:2], "--sampling_seed=6").out[:-1]]
  end = whole[0][14:16]
  for more in ([], [f"--save_cache={folder}/two.npz"]):
    stopped = write(f"--prompt_file={folder}/prompts", f"--stop={end}", *common, *more).out.splitlines()
    assert stopped == [line[:8] + line[8:].split(end)[0] for line in whole] != whole


def test_lost_scores_are_told(write):
  assert "warning" not in write("--prompt=a", "--max_new_tokens=9").err
  with_many = write("--prompt=" + 99 * "ab", "--max_new_tokens=9").err
  assert "scores above the threshold had no room in the cache (of 1 of 1 texts): gates are slightly high" in with_many


@pytest.mark.parametrize("arguments, words", [
    (["--prompt=a", "--prompt_file=b"], "--prompt and --prompt_file exclude each other"),
    (["--prompt_file={folder}/nowhere"], "--prompt_file={folder}/nowhere cannot be read"),
    (["--save_cache={folder}/nowhere/x"], "--save_cache={folder}/nowhere/x: must be a file in a folder that exists"),
    (["--load_cache={folder}/nowhere"], "{folder}/nowhere cannot be read as a cache"),
    (["--top_k=-1"], "--top_k=-1"),
])
def test_bad_flags(folder, write, arguments, words):
  assert words.format(folder=folder) in write(*(argument.format(folder=folder) for argument in arguments), code=2).err
