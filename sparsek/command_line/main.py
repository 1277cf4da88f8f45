"""The frame of every command: it parses the command line, runs the command, and exits.

The module of a command has its parts in this order, so that --help and bad flags are answered
before JAX and others are imported, which takes seconds:

  FLAGS = absl_flags.FlagValues()
  define_flags(FLAGS)
  if __name__ == "__main__":
    parse_first(FLAGS, __doc__, check_flags)

  from sparsek.training import loop  # and all other imports that are slow

  def main() -> None: ...

  if __name__ == "__main__":
    run(main, FLAGS)
"""

import contextlib
import difflib
import gc
import signal
import sys
from collections.abc import Callable, Sequence

from absl import flags

from sparsek.command_line import flagfiles, own_modules, terminal
from sparsek.command_line.help import help_of
from sparsek.command_line.invocation import as_typed, by_user
from sparsek.config.checks import UNREGISTERED
from sparsek.errors import RunError, UsageError
from sparsek.storage import files

_HELPFULL = "--helpfull"
_COLLECTOR = (100_000, 50, 100)  # thresholds of `gc.set_threshold`
_imports = contextlib.ExitStack()  # what lasts while the module of a command imports JAX
# Takes an unknown flag's name and word; returns what to do instead, or "".
Advise = Callable[[str, str], str]


def parse(
  argv: Sequence[str],
  flag_values: flags.FlagValues,
  say: Callable[[str], object] | None = None,
  advise: Advise | None = None,
) -> None:
  """Parses `argv` (program name first).

  Args:
    argv: the command line.
    flag_values: the flags that are defined.
    say: takes a line for each flag of a flagfile that gives way; by default prints it on stderr,
      except where another command wrote the command line.
    advise: about an unknown flag; by default, and where it has no advice, the nearest name.
  Raises:
    UsageError: for an unknown flag, a value out of range or an argument that is no flag; names the
      flag, the value and what is allowed.
  """
  arguments = flagfiles.expand(argv[1:], flag_values, say or _say)
  if own_modules.NAME in flag_values:
    own_modules.import_named(arguments)
  try:
    rest = flag_values([argv[0], *arguments])
  except RecursionError:
    # absl looks for a flag of a similar name, letter by letter.
    raise UsageError("a flag is unknown, and its name is of hundreds of letters") from None
  except flags.UnrecognizedFlagError as error:
    advice = advise(error.flagname, str(error.flagvalue)) if advise else ""
    if not advice:
      near = difflib.get_close_matches(error.flagname, list(flag_values), 1)
      advice = f"did you mean --{near[0]}?" if near else f"{_HELPFULL} describes all flags"
    raise UsageError(f"unknown flag --{error.flagname}; {advice}") from None
  except (flags.Error, ValueError) as error:  # ValueError: --noNAME=VALUE
    text = " ".join(str(error).replace("flag --", "--", 1).removeprefix("ERROR:: ").split())
    is_name = text.startswith(("--scorer=", "--attention="))  # names that users can add to
    raise UsageError(text + UNREGISTERED * is_name) from None
  if rest[1:]:
    raise UsageError(
      f"unexpected argument {rest[1]!r}: every option is written --name=value, and several values "
      "are separated by commas"
    )


def _say(line: str) -> None:
  if by_user():
    print(line, file=sys.stderr)


def parse_first(
  flag_values: flags.FlagValues,
  description: str | None,
  check: Callable[[], object] | None = None,
  advise: Advise | None = None,
) -> None:
  """Parses the command line of the process; exits after --help, and with code 2 for bad flags.

  It also prepares the process for closed standard streams; `run` then only runs the command.

  Args:
    flag_values: where the flags are defined.
    description: the docstring of the command's module, which begins --help.
    check: raises UsageError for values that do not go together.
    advise: as in `parse`.
  """
  files.let_stdout_take_any_text()
  terminal.make_lenient()
  terminal.shorten_warnings()
  if _wants_help(sys.argv):
    print(help_of(flag_values, description or "", _HELPFULL in sys.argv))
    sys.stdout.flush()
    sys.exit(0)
  try:
    parse(sys.argv, flag_values, advise=advise)
    if check is not None:
      check()
  except UsageError as error:
    print(f"error: {as_typed(str(error))}", file=sys.stderr)
    sys.exit(2)
  # Modules and traced functions are many objects that stay: look at all of them less often.
  gc.set_threshold(*_COLLECTOR)
  if sys.stderr.isatty():
    _imports.enter_context(terminal.said_if_slow("importing the libraries ..."))


def run(
  main: Callable[[], object], flag_values: flags.FlagValues, argv: Sequence[str] | None = None
) -> None:
  """Parses the command line, runs `main()` and exits.

  The exit code is 0 when it returns; 2, with one sentence on stderr, for a UsageError; 1, with one
  sentence, for a RunError; 130, with one word, for Ctrl-C. Anything else is a bug and keeps its
  traceback.

  Args:
    main: the command; its module's docstring describes it in --help.
    flag_values: where the flags are defined.
    argv: the command line, program name first. None for that of the process, which is then also
      prepared for closed standard streams, Ctrl-C at any moment and threads that do not end; see
      `sparsek.command_line.terminal`.
  """
  _imports.close()
  at_interrupt = signal.getsignal(signal.SIGINT)
  code = 1
  files.let_stdout_take_any_text()
  if argv is None:
    if not flag_values.is_parsed():
      terminal.make_lenient()
    terminal.keep_interrupts()
  try:
    if at_interrupt != signal.SIG_IGN:
      signal.signal(signal.SIGINT, signal.default_int_handler)
    code = _run(main, flag_values, argv)
  except KeyboardInterrupt:
    code = 130
    print("interrupted", file=sys.stderr)
  finally:
    signal.signal(signal.SIGINT, at_interrupt)
    if argv is None:
      terminal.end_within(terminal.END_SECONDS, code)
  sys.exit(code)


def _wants_help(argv: Sequence[str]) -> bool:
  return any(argument in ("--help", "-help", "-h", _HELPFULL) for argument in argv[1:])


def _run(
  main: Callable[[], object], flag_values: flags.FlagValues, argv: Sequence[str] | None
) -> int:
  """Prints the help, or parses the command line and runs `main`; returns the exit code."""
  is_parsed = argv is None and flag_values.is_parsed()  # by `parse_first`
  argv = sys.argv if argv is None else argv
  if not is_parsed and _wants_help(argv):
    description = sys.modules[main.__module__].__doc__ or ""
    print(help_of(flag_values, description, _HELPFULL in argv))
    return 0
  try:
    if not is_parsed:
      parse(argv, flag_values)
    main()
    sys.stdout.flush()
  except (UsageError, RunError) as error:
    print(f"error: {as_typed(str(error))}", file=sys.stderr)
    return 2 if isinstance(error, UsageError) else 1
  except NotImplementedError as error:  # raised by implementations of attention that cannot run
    print(f"error: {as_typed(str(error))}", file=sys.stderr)
    return 2
  return 0
