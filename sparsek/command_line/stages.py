"""Stages of a run: the flag --stage, and the flags under which each stage trains."""

import contextlib
import copy
import re
import shlex
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from absl import flags

from sparsek.command_line.definer import names_of
from sparsek.command_line.main import parse
from sparsek.errors import UsageError

Define = Callable[[flags.FlagValues], None]  # defines the flags of a command
# The flags that a stage may set; all others hold for the whole run.
OF_A_STAGE = (
  *("attention", "layer_pattern", "k", "window", "gate", "remat"),
  *("scorer_noise", "scorer_loss_queries", "scorer_loss", "scorer_warmup"),
  *("scorer_loss_kind", "gate_anneal"),
  *("data", "seq_len", "batch_size", "segment_documents", "grad_accumulation"),
  *("num_steps", "learning_rate", "warmup_steps", "final_lr_ratio", "weight_decay", "grad_clip"),
  *("trainable", "scorer_lr_multiplier", "distill", "distill_from"),
  *("eval_every", "eval_batches", "log_every", "checkpoint_every"),
)
_EXCLUSIVE = ("attention", "layer_pattern")  # a stage that gives one takes the other back
_NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,39}")
_HELP = (
  "A stage of the run: its name, and the flags that hold while it trains. May be given several "
  'times, as in --stage="warmup: --num_steps=120 --scorer_warmup --trainable=scorer" '
  '--stage="joint: --num_steps=800". The stages follow one another in one run of one state: '
  "parameters, moments, the step and the place in each data set go on; a schedule begins with each "
  "stage. Flags outside of stages hold for those that do not set them. The model of the run is "
  f"that of the last stage. A stage may set {', '.join(OF_A_STAGE)}."
)


class StageFlags(NamedTuple):
  """A stage as flags give it.

  Attributes:
    name: of the stage; "" for a run without stages.
    text: the flags that it sets itself, as one text.
    values: its flags, those outside of stages among them.
    begin: steps of the run before it.
  """

  name: str
  text: str
  values: flags.FlagValues
  begin: int


class _Stage(flags.ArgumentParser):
  """A parser of "NAME: FLAGS", which spells flags and paths out."""

  syntactic_help = "NAME: FLAGS"

  def __init__(self, define: Define):
    self.define = define

  def parse(self, argument: str) -> str:
    name, colon, text = argument.partition(":")
    if not (colon and _NAME.fullmatch(name)):
      raise ValueError(
        'must be "NAME: FLAGS", with a NAME of letters, digits, dots, dashes and underscores '
        "(in a flagfile without quotes around it)"
      )
    try:
      values = flags.FlagValues()
      self.define(values)
      given = _set(values, shlex.split(text))
    except (ValueError, UsageError) as error:  # ValueError: a quote that is not closed
      raise ValueError(str(error)) from None
    return f"{name}: {shlex.join(values[flag].serialize() for flag in given)}".strip()

  def flag_type(self) -> str:
    return "stage"


def stage_flag(define: Define) -> flags.Flag:
  """Returns the flag --stage of a command whose flags `define` defines."""
  flag: flags.Flag = flags.MultiFlag(_Stage(define), flags.ArgumentSerializer(), "stage", [], _HELP)
  flag.help = _HELP  # absl's own words break the line
  return flag


def _set(values: flags.FlagValues, words: Sequence[str]) -> list[str]:
  """Sets the flags of a stage, and returns their names in the order of their definition.

  Raises:
    UsageError: for an unknown flag, a value out of range, and a flag that no stage may set.
  """
  before = {name: values[name].present for name in names_of(values)}
  parse(["", *words], values, say=lambda line: None)
  given = [name for name in names_of(values) if values[name].present > before[name]]
  for name in given:
    if name not in OF_A_STAGE:
      raise UsageError(
        f"{values[name].serialize()} holds for the whole run: give it outside of stages"
      )
  return given


@contextlib.contextmanager
def named(stage: str) -> Iterator[None]:
  """Names the stage in the errors of the block; "" is that of a run without stages."""
  try:
    yield
  except UsageError as error:
    raise UsageError(f"--stage={stage}: {error}" if stage else str(error)) from error


def stages_of(flag_values: flags.FlagValues) -> list[StageFlags]:
  """Returns the stages of a run in their order; one of no name where --stage is not given.

  --profile_steps, which counts the steps of the run, becomes that of the stage in which it begins
  and counts the steps of that stage.

  Raises:
    UsageError: for two stages of one name, and a trace that begins after the last step.
  """
  if not flag_values["stage"].value:
    return [StageFlags("", "", flag_values, 0)]
  result: list[StageFlags] = []
  end = 0
  for stage in flag_values["stage"].value:
    name, _, text = stage.partition(":")
    if name in (other.name for other in result):
      raise UsageError(f"--stage={name}: two stages have this name")
    values = copy.deepcopy(flag_values)
    given = _set(values, shlex.split(text))
    for one, other in (_EXCLUSIVE, _EXCLUSIVE[::-1]):
      if one in given and other not in given:
        values[other].unparse()
    result.append(StageFlags(name, text.strip(), values, end))
    num_steps: int = values["num_steps"].value  # type: ignore[assignment]
    end += num_steps
  _share_profile(flag_values["profile_steps"].value, result, end)
  return result


def _share_profile(profile_steps: str | None, stages: Sequence[StageFlags], end: int) -> None:
  """Gives --profile_steps to the stage in which the trace begins, and takes it from the others."""
  first, colon, last = (profile_steps or "").partition(":")
  for stage in stages:
    stage.values["profile_steps"].value = None
  if not profile_steps:
    return
  if not (colon and first.isdecimal() and last.isdecimal()):
    stages[0].values["profile_steps"].value = profile_steps  # is refused there
    return
  if int(first) > end:
    raise UsageError(
      f"--profile_steps={profile_steps} must begin at step {end} or before, the last"
    )
  stage = [stage for stage in stages if stage.begin < max(int(first), 1)][-1]
  steps = f"{int(first) - stage.begin}:{int(last) - stage.begin}"
  stage.values["profile_steps"].value = steps
