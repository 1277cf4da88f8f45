"""The text of --help, and the same as data: flags in groups, the commonest first."""

import re
import textwrap
from typing import NamedTuple

from absl import flags

from sparsek.command_line.definer import GROUPS, group_of, names_of
from sparsek.command_line.invocation import as_typed

# The flags of --help, in this order within their groups; --helpfull lists all. A command's own
# flags, of the first group, are always listed, in the order of their definition.
COMMON = (
  "preset",
  "attention",
  "k",
  "window",
  "layer_pattern",
  "gate",
  "num_layers",
  "embed_dim",
  "num_heads",
  "num_kv_heads",
  "head_dim",
  "mlp_dim",
  "dtype",
  "implementation",
  "scorer",
  "scorer_loss",
  "scorer_warmup",
  "data",
  "tokenizer",
  "seq_len",
  "batch_size",
  "num_steps",
  "stage",
  "learning_rate",
  "warmup_steps",
  "weight_decay",
  "grad_accumulation",
  "seed",
  "trainable",
  "lora_rank",
  "workdir",
  "step",
  "init_from",
  "restore_step",
  "stop_at",
  "log_every",
  "eval_every",
  "checkpoint_every",
  "dry_run",
  "fsdp",
  "context",
  "num_processes",
  "topology",
)
OF_SIZE = ("preset", "num_layers", "embed_dim", "num_heads", "num_kv_heads", "head_dim", "mlp_dim")
TITLES = {"command": "Flags of this command"}
FLAGFILE = "--flagfile=FILE reads flags from a file, one a line."
WIDTH, COLUMN = 100, 30
_VALUES = {
  "int": "N",
  "float": "X",
  "path": "PATH",
  "fields": "FIELD=VALUE",
  "multi path": "PATHS",
  "multi stage": '"NAME: FLAGS"',
}


class FlagHelp(NamedTuple):
  """The description of a flag.

  Attributes:
    name: without dashes.
    usage: such as "--k=N" or "--[no]scan_layers".
    default: as on a command line; "" for none.
    text: what it means.
    common: whether --help lists it; --helpfull does anyway.
  """

  name: str
  usage: str
  default: str
  text: str
  common: bool


def groups(flag_values: flags.FlagValues) -> dict[str, list[FlagHelp]]:
  """Returns the flags of a command by group, groups and flags in the order of --helpfull."""
  order = {name: i for i, name in enumerate(COMMON)}
  given = OF_SIZE if "from" in flag_values else ()  # an imported model has its size
  result: dict[str, list[FlagHelp]] = {group: [] for group in GROUPS}
  for name in names_of(flag_values):
    group = group_of(flag_values[name])
    common = group == GROUPS[0] or name in order and name not in given
    result[group].append(_describe(flag_values[name], common))
  for group in GROUPS[1:]:
    result[group].sort(key=lambda flag: order.get(flag.name, len(order)))
  return {group: members for group, members in result.items() if members}


def _describe(flag: flags.Flag, common: bool) -> FlagHelp:
  value = flag.default
  if isinstance(value, (list, tuple)):
    default = ",".join(value)
  else:
    default = "" if value is None else str(value)
  choices = getattr(flag.parser, "enum_values", None)
  kind = "NAME" if choices else _VALUES.get(flag.flag_type(), "TEXT")
  text = flag.help or ""
  if choices:  # absl writes them in front
    text = f"{text.partition('>: ')[2]} One of {', '.join(choices)}."
  if flag.boolean:
    return FlagHelp(flag.name, f"--[no]{flag.name}", default.lower(), text, common)
  return FlagHelp(flag.name, f"--{flag.name}={kind}", default, text, common)


def _line(flag: FlagHelp) -> str:
  """Returns how a flag is given, its first sentence and its default, on one line if they fit."""
  sentence = re.split(r"(?<=\.)\s", as_typed(flag.text), maxsplit=1)[0].removesuffix(".")
  default = f" [{flag.default}]" if flag.default else ""
  head = f"  {flag.usage:{COLUMN - 2}}"
  return _filled(sentence + default, head, " " * COLUMN)


def _filled(text: str, first: str = "", others: str = "") -> str:
  """Returns a text in lines, which break at spaces alone; `first` and `others` begin them."""
  return textwrap.fill(
    text,
    WIDTH,
    initial_indent=first,
    subsequent_indent=others,
    break_long_words=False,
    break_on_hyphens=False,
  )


def _described(docstring: str) -> str:
  """Returns a docstring with its paragraphs filled, and its indented commands as they are."""
  paragraphs = as_typed(docstring.strip()).split("\n\n")
  return "\n\n".join(text if "\n " in f"\n{text}" else _filled(text) for text in paragraphs)


def _paragraph(flag: FlagHelp) -> str:
  default = f"\nDefault: {flag.default}" if flag.default else ""
  lines = as_typed(flag.text + default).splitlines()
  text = "\n".join(_filled(line, " " * 6, " " * 6) for line in lines)
  return f"  {flag.usage}\n{text}"


def help_of(flag_values: flags.FlagValues, description: str, full: bool = False) -> str:
  """Returns the text of --help, or with `full` that of --helpfull.

  Args:
    flag_values: where the flags of the command are defined.
    description: the docstring of the command's module.
    full: list all flags with their whole texts, instead of one line for each common flag.
  """
  lines, left_out = [_described(description)], 0
  for group, members in groups(flag_values).items():
    shown = [flag for flag in members if full or flag.common]
    left_out += len(members) - len(shown)
    if shown:
      lines += ["", f"{TITLES.get(group, group.capitalize())}:"]
      lines += map(_paragraph if full else _line, shown)
  end = f" --helpfull describes these and {left_out} more." if left_out else ""
  if not full and not end and len(lines) > 1:
    end = " --helpfull describes them in full."
  return "\n".join((*lines, "", FLAGFILE + end))
