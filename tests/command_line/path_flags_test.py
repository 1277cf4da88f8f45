"""All commands read paths alike; a new flag that names a file fails here until it does."""

import argparse
import ast
import importlib
import os
import pathlib

import pytest
from absl import flags as absl_flags

from sparsek.command_line import outputs, path_flags
from sparsek.command_line.definer import into_string
from sparsek.command_line.main import parse
from sparsek.command_line.training_flags import define_pretrain_flags
from sparsek.errors import UsageError
from sparsek.huggingface import pretrained

ROOT = pathlib.Path(__file__).resolve().parents[2]
NO_COMMANDS = {
  *("demo_commands", "demo_documents", "__init__", "child", "script", "suites", "stages"),
  "gguf_folder",
}
NO_PATHS = {  # strings that name no file
  "wandb",
  "import",
  "labels",
  "layer_pattern",
  "profile_steps",
  "coordinator_address",
  "topology",
  "prompt",
  "stop",
  "tasks",
  "ruler_flags",
  "humaneval_flags",
  "lengths",
  "more",
  "attention",
  "k",
  "window",
  "gate",
  "scorer",
  "job",
  "batch_sizes",
  "prompts",
  "scores",
  "baselines",
  "extensions",
  "text_field",
}
NO_PATHS_OF_SCRIPTS = {
  "lengths",
  "sparsek",
  "more",
  "scorer",
  "devices",
  "only",
  "dtype",
  "note",
  "model",
  "tasks",
  "ruler_flags",
  "humaneval_flags",
}
PLAIN = (absl_flags.ArgumentParser, absl_flags.ListParser, absl_flags.WhitespaceSeparatedListParser)


def commands():
  """Returns name -> module of everything in experiments/ and its recipes that can be run."""
  paths = [*ROOT.glob("experiments/*.py"), *ROOT.glob("experiments/recipes/*.py")]
  names = {path.stem: ".".join(path.relative_to(ROOT).with_suffix("").parts) for path in paths}
  return {
    name: importlib.import_module(module)
    for name, module in sorted(names.items())
    if name not in NO_COMMANDS
  }


def flags_of_commands():
  """Returns [(command, flag of absl)] and [(command, option of argparse)]."""
  ours, options = [], []
  for name, module in commands().items():
    values = getattr(module, "FLAGS", None)
    if isinstance(values, absl_flags.FlagValues):
      ours += [(name, values[flag]) for flag in values]
    elif hasattr(module, "make_parser"):
      options += [(name, action) for action in module.make_parser()._actions]
    else:
      pytest.fail(f"{name}: make_parser or FLAGS, so that its paths are found here")
  return ours, options


def test_every_path_of_every_command():
  home, (ours, options) = os.path.expanduser("~"), flags_of_commands()
  paths = [(command, flag) for command, flag in ours if path_flags.is_path(flag)]
  assert {"workdir", "data", "init_from", "record", "sources", "base", "from", "load_cache"} <= {
    flag.name for _, flag in paths
  }
  for command, flag in paths:
    for url in ("gs://bucket/x", "s3://bucket/x", "file:///tmp/x", "https://host/x"):
      with pytest.raises(ValueError, match="URLs are not supported"):
        flag.parser.parse(url)
    for bad, words in (("", "empty"), ("a\nb", "control"), (" a", "space"), ("a\udcff", "UTF-8")):
      with pytest.raises(ValueError, match=words):
        flag.parser.parse(bad)
    assert flag.parser.parse("~/x") in (f"{home}/x", [f"{home}/x"]), (command, flag.name)
    where = "x" if flag.name == "sources" else f"{os.getcwd()}/x"
    assert flag.parser.parse("x") in (where, [where]), (command, flag.name)
  for command, flag in ours:
    if type(flag.parser) in PLAIN and flag.name not in NO_PATHS:
      pytest.fail(f"{command} --{flag.name}: define.path, or NO_PATHS")
  from sparsek.experiments import script

  for command, action in options:
    if action.type in (script.path, script.paths) or isinstance(action.type, script.Output):
      assert action.type("~/x") == f"{home}/x"
    elif action.type not in (int, float) and not isinstance(action, argparse._HelpAction):
      known = action.nargs == 0 or action.dest in NO_PATHS_OF_SCRIPTS
      assert known, f"{command} {action.dest}: type=script.path, or NO_PATHS_OF_SCRIPTS"
  output = script.Output(outputs.PICTURE)
  for read in (script.path, output):
    with pytest.raises(argparse.ArgumentTypeError, match="gs://x: gs: URLs are not supported"):
      read("gs://x")
  with pytest.raises(argparse.ArgumentTypeError, match="there is no folder /nowhere"):
    output("/nowhere/x.json")
  assert script.paths("~/x,y/") == f"{home}/x,y/"
  with pytest.raises(argparse.ArgumentTypeError, match="'x: No closing quotation"):
    script.words("'x")


@pytest.mark.parametrize(
  "text, expected",
  [
    ("hf:~/x", "hf:{home}/x"),
    ("hf:x", "hf:{here}/x"),
    ("x@4", "{here}/x@4"),
    ("~/x@4", "{home}/x@4"),
    ("x@4/", "{here}/x@4/"),
    ("hf:x@4//", "hf:{here}/x@4/"),
    ("x/@4", "{here}/x/@4"),
    ("/a/./b/", "/a/b"),
    ("./~x", "{here}/~x"),
    ("a:b", "{here}/a:b"),
  ],
)
def test_references(text, expected):
  places = {"home": os.path.expanduser("~"), "here": os.getcwd()}
  assert path_flags.parse_path(text, reference=True) == expected.format(**places)


@pytest.mark.parametrize(
  "text, words",
  [
    ("hf:gs://x", "gs: URLs"),
    ("hf:", "empty"),
    ("~nobody-here/x", "there is no user ~nobody-here"),
  ],
)
def test_references_that_are_none(text, words):
  with pytest.raises(ValueError, match=words):
    path_flags.parse_path(text, reference=True)


def test_the_prefix_is_that_of_pretrained_models():
  assert path_flags.HF_PREFIX == pretrained.PREFIX


def test_behind_a_link_two_dots_are_the_targets_parent(tmp_path):
  (tmp_path / "a" / "b").mkdir(parents=True)
  (tmp_path / "link").symlink_to(tmp_path / "a" / "b")
  assert path_flags.parse_path(f"{tmp_path}/link/../x") == f"{os.path.realpath(tmp_path)}/a/x"
  assert path_flags.parse_path(f"{tmp_path}/link/x") == f"{tmp_path}/link/x"


def test_paths_with_commas(tmp_path):
  values = absl_flags.FlagValues()
  absl_flags.DEFINE_flag(path_flags.paths_flag("sources", "?", words=("stdlib", "tasks:")), values)
  (tmp_path / "with,comma").mkdir()
  values(["x", f"--sources={tmp_path}/a,tasks:9:2,stdlib", f"--sources={tmp_path}/with,comma"])
  expected = [f"{tmp_path}/a", "tasks:9:2", "stdlib", f"{tmp_path}/with,comma"]
  assert values["sources"].value == expected
  again = absl_flags.FlagValues()
  absl_flags.DEFINE_flag(path_flags.paths_flag("sources", "?", words=("stdlib", "tasks:")), again)
  again(["x", *values["sources"].serialize().splitlines()])
  assert again["sources"].value == expected
  with pytest.raises(absl_flags.Error, match="--sources=a,,b: must be a path, it is empty"):
    again(["x", "--sources=a,,b"])


def test_messages_and_records_have_the_whole_path(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  values = absl_flags.FlagValues()
  define_pretrain_flags(values)
  arguments = ["--workdir=run", "--data=~/d", "--init_from=other@3", "--tokenizer=byte"]
  parse(["x", *arguments], values)
  text = into_string(values)
  assert f"--workdir={tmp_path}/run\n" in text and f"--init_from={tmp_path}/other@3\n" in text
  assert f"--data={os.path.expanduser('~')}/d\n" in text and "--tokenizer=byte\n" in text
  with pytest.raises(UsageError, match="^--data=gs://b: gs: URLs are not supported; give a path"):
    parse(["x", "--data=gs://b"], values)


def is_text_of_no_encoding(call):
  """Returns whether a call of the source opens text in the encoding of the locale."""
  name = getattr(call.func, "id", getattr(call.func, "attr", None))
  owner = getattr(getattr(call.func, "value", None), "id", None)
  if name not in ("open", "fdopen", "read_text", "write_text") or owner in ("os", "archive"):
    return False  # descriptors; a zip file's bytes
  if any(keyword.arg in (None, "encoding") for keyword in call.keywords):
    return False
  mode = call.args[1] if name in ("open", "fdopen") and call.args[1:] else ast.Constant("r")
  return isinstance(mode, ast.Constant) and "b" not in str(mode.value)


def test_text_is_read_and_written_as_utf8():
  """Else a locale without UTF-8 ends a command, or makes files that others cannot read."""
  bare = []
  for path in (*ROOT.glob("sparsek/*.py"), *ROOT.glob("experiments/**/*.py")):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    bare += [
      f"{path.name}:{node.lineno}"
      for node in ast.walk(tree)
      if isinstance(node, ast.Call) and is_text_of_no_encoding(node)
    ]
  assert not bare, bare
