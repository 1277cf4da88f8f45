"""Settings that a run was made with, compared with those that a command asks for.

Settings are the values of a command's flags as they take effect, so that spelling out a default
makes no difference. They are compared before a finished run counts as done, or an unfinished one
resumes.
"""

import glob
import os
from collections.abc import Callable, Mapping, Sequence

from absl import flags as absl_flags

from sparsek.command_line import configs, flagfiles, model_fields, path_flags
from sparsek.command_line.definer import OF_PROCESSES, names_of
from sparsek.command_line.main import parse as parse_flags
from sparsek.command_line.training_flags import define_pretrain_flags
from sparsek.errors import UsageError
from sparsek.runs import run_directory

Settings = dict[str, object]
Define = Callable[[absl_flags.FlagValues], None]  # defines the flags of a command
NEUTRAL = {  # flags that change no parameter or loss of a finished run, and why
  "checkpoint_every": "saving changes nothing of what is saved",
  "keep_checkpoints": "only how many older checkpoints stay",
  "log_every": "only which steps are logged",
  "compilation_cache": "only how long compiling takes",
  "tensorboard": "a copy of the metrics",
  "wandb": "a copy of the metrics",
  "profile_steps": "a trace beside the run",
  "import": "what a module registers is chosen by flags of its own",
  "fsdp": "only where parameters lie",
  "context": "only where tokens lie",
  "loss_chunk": "only how many logits exist at the same time",
  "stop_at": "a pause: a run has ended at --num_steps only",
  "restore_step": "goes back in a run, whose course is the same",
  "dry_run": "trains nothing",
  "topology": "of --dry_run",
  "record": "where results are written, too",
  **dict.fromkeys(OF_PROCESSES, "where the processes of a run are"),
}
REPLACED = "replaced"  # folder for runs that were moved aside


def parse(words: Sequence[str], define: Define = define_pretrain_flags) -> absl_flags.FlagValues:
  """Returns the parsed flags of a command line without the program's name; raises UsageError.

  Args:
    words: the command line.
    define: defines the flags of the command, by default those of experiments.pretrain.
  """
  values = absl_flags.FlagValues()
  define(values)
  parse_flags(["", *words], values, say=lambda line: None)
  return values


def effective(values: absl_flags.FlagValues) -> Settings:
  """Returns the settings that a command's flags make, in types that JSON has.

  For a model from a preset they hold the fields of the model, since flags may leave these to the
  preset; for the model of another run or folder they hold the values of the flags. The folder
  that the command makes is no setting. Paths are given as `_locate` returns them.
  """
  names = [name for name in names_of(values) if name not in (*NEUTRAL, "model")]
  home = values["workdir"].value if isinstance(values["workdir"].value, str) else ""
  if home:
    names.remove("workdir")
  # Fields of --model are settings of their own, as they were when each had a flag.
  given = model_fields.given_fields(values)
  result = {name: values[name].value for name in names} | given
  if not result.get("stage"):
    result.pop("stage", None)  # unknown to earlier versions
  if "warmup_steps" in result:
    result["warmup_steps"] = configs.warmup_steps(values)
  if result.get("preset") and not any(result.get(name) for name in ("init_from", "from")):
    model = configs.model_config(values)
    del result["preset"], result["layer_pattern"]
    fields = [*result, *flagfiles.TO_MODEL]
    result |= {name: getattr(model, name) for name in fields if hasattr(model, name)}
  elif "preset" in result and result["preset"] == values["preset"].default:
    del result["preset"]  # earlier versions spelled it out
  return {
    name: _plain(value, home if name in values and path_flags.is_path(values[name]) else None)
    for name, value in result.items()
  }


def _plain(value, home: str | None):
  """Returns a value in types that JSON has; with a `home` it is a path."""
  if isinstance(value, (list, tuple)):
    return [_plain(item, home) for item in value]
  return value if home is None or value is None else _locate(value, home)


def _locate(path: str, home: str) -> str | dict[str, str]:
  """Returns a path both absolute and relative to a run's folder; a word stays as it is.

  Settings are the same if either form is: for a run that is moved alone, the absolute one, and for
  a run that is moved with its data, the relative one.
  """
  prefix = path_flags.HF_PREFIX if path.startswith(path_flags.HF_PREFIX) else ""
  path = path.removeprefix(prefix)
  if not os.path.isabs(path):  # a word such as "stdlib"
    return path
  return {"path": prefix + path, "from here": prefix + os.path.relpath(path, home or None)}


def of_folder(folder: str, define: Define = define_pretrain_flags) -> list[Settings]:
  """Returns the settings that each flags*.txt of a run's folder holds, none where nothing ran.

  Args:
    folder: of the run.
    define: defines the flags of the command that made it.
  Raises:
    UsageError: naming the file that this version cannot understand.
  """
  result = []
  for path in sorted(glob.glob(os.path.join(glob.escape(folder), "flags*.txt"))):
    try:
      result.append(effective(parse([f"--flagfile={path}"], define)))
    except UsageError as error:
      raise UsageError(f"{path} is not of this version: {error}") from None
  return result


def differences(old: Mapping, new: Mapping) -> list[str]:
  """Returns a line for each flag whose values differ, as "--k: 8 -> 16"."""
  names = [*new, *(name for name in old if name not in new)]
  return [
    f"{model_fields.as_flag(name)}: {_text(old.get(name))} -> {_text(new.get(name))}"
    for name in names
    if not _same(old.get(name), new.get(name))
  ]


def _same(old, new) -> bool:
  if isinstance(old, Mapping) and isinstance(new, Mapping):
    return any(old.get(key) == value for key, value in new.items())
  if isinstance(old, list) and isinstance(new, list):
    return len(old) == len(new) and all(map(_same, old, new))
  return old == new


def _text(value) -> str:
  if isinstance(value, Mapping):
    return value["path"]
  if isinstance(value, list):
    return ",".join(map(_text, value))
  return "the default" if value is None else str(value)


def refuse(stale: Mapping[str, Sequence[str]], workdir: str) -> None:
  """Raises UsageError where a run was made with other settings.

  Args:
    stale: name of a run -> lines of `differences`, none where the settings are the same.
    workdir: of all runs.
  """
  lines = [f"{name} ({', '.join(lines)})" for name, lines in stale.items() if lines]
  if lines:
    rest = f", and {len(lines) - 3} more" if len(lines) > 3 else ""
    raise UsageError(
      f"--workdir={workdir} holds what other flags made (old -> new): "
      f"{'; '.join(lines[:3])}{rest}. Take another --workdir, give the old flags, "
      f"or --retrain, which moves the old ones to {REPLACED}/ and makes new ones"
    )


def move_aside(folder: str) -> None:
  """Moves a run's folder to the folder REPLACED beside it, and deletes nothing.

  Raises:
    UsageError: where a run is in progress in it, or it cannot be moved.
  """
  if not os.path.isdir(folder):
    return
  with run_directory.lock(folder):
    replaced = os.path.join(os.path.dirname(folder), REPLACED)
    target, number = os.path.join(replaced, os.path.basename(folder)), 0
    while os.path.lexists(target if not number else f"{target}.{number}"):
      number += 1
    try:
      os.makedirs(replaced, exist_ok=True)
      os.rename(folder, target if not number else f"{target}.{number}")
    except OSError as error:
      raise UsageError(f"{folder} cannot be moved to {replaced}: {error.strerror}") from None
