"""--import brings scorers and kinds of attention of the user's to every command."""

import sys

import pytest
from absl import flags as absl_flags

from sparsek.command_line.configs import model_config
from sparsek.command_line.main import parse
from sparsek.command_line.training_flags import define_pretrain_flags
from sparsek.errors import UsageError
from sparsek.experiments import ablate, evaluate, pretrain
from tests.experiments.pretrain_test import write_documents
from tests.helpers import restored_registries, run_command

MODULE = """
import jax.numpy as jnp
from flax import linen as nn

from sparsek.model.baselines import ATTENTION_MODULES
from sparsek.model.registration import register_attention, register_scorer


class Feature(nn.Module):
  config: object

  def __call__(self, x, segment_ids=None, layer=0):
    return jnp.repeat(x[..., :1].astype(jnp.float32), self.config.num_kv_heads, axis=-1)


class Kind(ATTENTION_MODULES["full"]):
  pass


register_scorer("of_module", Feature)
register_attention("kind_of_module", Kind)
"""
TINY = (
  "--num_layers=1 --embed_dim=16 --num_heads=2 --num_kv_heads=1 --head_dim=8 --mlp_dim=16 --k=4 "
  "--window=4 --seq_len=32 --batch_size=1 --num_steps=1 --eval_every=1 --eval_batches=1 "
  "--implementation=reference --noscan_layers"
).split()


@pytest.fixture
def folder(tmp_path, monkeypatch):
  """A working directory with modules of a user's."""
  (tmp_path / "own_scorer_module.py").write_text(MODULE)
  (tmp_path / "own_failing_module.py").write_text("1 / 0")
  monkeypatch.chdir(tmp_path)
  monkeypatch.setattr(sys, "path", list(sys.path))
  with restored_registries():
    yield tmp_path
  forget()


def forget():
  sys.modules.pop("own_scorer_module", None)


def parsed(*arguments):
  values = absl_flags.FlagValues()
  define_pretrain_flags(values)
  parse(["pretrain", *arguments], values)
  return values


@pytest.mark.parametrize(
  "arguments",
  [
    ["--scorer=of_module", "--import=own_scorer_module"],
    ["--scorer=of_module", "--import", "own_scorer_module"],
    ["--scorer=of_module", "--flagfile=run.flags"],
  ],
)
def test_flags_accept_what_a_module_registers(folder, arguments):
  (folder / "run.flags").write_text("--import=own_scorer_module\n")
  config = model_config(parsed(*arguments, "--layer_pattern=kind_of_module,sparsek"))
  assert config.scorer == "of_module" and config.attention == ("kind_of_module", "sparsek")


@pytest.mark.parametrize(
  "arguments, words",
  [
    (["--import=no_such_module"], ["--import=no_such_module", "there is no module"]),
    (["--import="], ["--import=:", "there is no module"]),
    (["--import=own_failing_module"], ["own_failing_module", "ZeroDivisionError"]),
    (["--scorer=of_module"], ["--scorer=of_module", "linear", "--import"]),
    (["--import=own_scorer_module", "--scorer=of"], ["--scorer=of:", "of_module"]),
  ],
)
def test_bad_modules_are_named(folder, arguments, words):
  with pytest.raises(UsageError) as error:
    parsed(*arguments)
  for word in words:
    assert word in str(error.value)


def test_a_run_with_a_scorer_of_a_module(folder, capsys):
  write_documents(folder / "data")
  workdir, module = f"--workdir={folder / 'run'}", "--import=own_scorer_module"
  given = [module, "--scorer=of_module", f"--data={folder / 'data'}", *TINY]
  with restored_registries():
    assert run_command(pretrain.main, pretrain.FLAGS, workdir, *given) == 0
  forget()
  evaluation = evaluate.main, evaluate.FLAGS, workdir, "--eval_batches=1"
  assert run_command(*evaluation) == 2
  assert "--import" in capsys.readouterr().err
  assert run_command(*evaluation, module) == 0


def test_a_grid_gives_the_modules_to_its_runs(folder):
  for name in ablate.FLAGS:
    ablate.FLAGS[name].unparse()
  parse(["ablate", "--import=own_scorer_module", "--workdir=grid"], ablate.FLAGS)
  assert "--import=own_scorer_module" in ablate.shared()
