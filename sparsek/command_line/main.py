"""The frame of every command: it parses the command line, runs the command, and exits."""

import signal
import sys
from collections.abc import Callable, Sequence

from absl import flags

from sparsek.command_line import flagfiles, terminal
from sparsek.command_line.definer import help_of
from sparsek.errors import RunError, UsageError
from sparsek.storage import files


def parse(
  argv: Sequence[str], flag_values: flags.FlagValues, say: Callable[[str], object] | None = None
) -> None:
  """Parses `argv` (program name first).

  Args:
    argv: the command line.
    flag_values: the flags that are defined.
    say: takes a line for each flag of a flagfile that gives way; prints on stderr by default.
  Raises:
    UsageError: for an unknown flag, a value out of range or an argument that is no flag; names the
      flag, the value and what is allowed.
  """
  arguments = flagfiles.expand(argv[1:], flag_values, say or _say)
  try:
    rest = flag_values([argv[0], *arguments])
  except RecursionError:
    # absl looks for a flag of a similar name, letter by letter.
    raise UsageError("a flag is unknown, and its name is of hundreds of letters") from None
  except (flags.Error, ValueError) as error:  # ValueError: --noNAME=VALUE
    raise UsageError(
      " ".join(str(error).replace("flag --", "--", 1).removeprefix("ERROR:: ").split())
    ) from None
  if rest[1:]:
    raise UsageError(f"unexpected argument {rest[1]!r}: every option is written --name=value")


def _say(line: str) -> None:
  print(line, file=sys.stderr)


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
  at_interrupt = signal.getsignal(signal.SIGINT)
  code = 1
  files.let_stdout_take_any_text()
  if argv is None:
    terminal.make_lenient()
    terminal.keep_interrupts()
  try:
    if at_interrupt != signal.SIG_IGN:
      signal.signal(signal.SIGINT, signal.default_int_handler)
    code = _run(main, flag_values, sys.argv if argv is None else argv)
  except KeyboardInterrupt:
    code = 130
    print("interrupted", file=sys.stderr)
  finally:
    signal.signal(signal.SIGINT, at_interrupt)
    if argv is None:
      terminal.end_within(terminal.END_SECONDS, code)
  sys.exit(code)


def _run(main: Callable[[], object], flag_values: flags.FlagValues, argv: Sequence[str]) -> int:
  """Prints the help, or parses the command line and runs `main`; returns the exit code."""
  if any(argument in ("--help", "-help", "-h", "--helpfull") for argument in argv[1:]):
    description = (sys.modules[main.__module__].__doc__ or "").strip()
    print(f"{description}\n\n{help_of(flag_values)}")
    return 0
  try:
    parse(argv, flag_values)
    main()
    sys.stdout.flush()
  except (UsageError, RunError) as error:
    print(f"error: {error}", file=sys.stderr)
    return 2 if isinstance(error, UsageError) else 1
  except NotImplementedError as error:  # raised by implementations of attention that cannot run
    print(f"error: {error}", file=sys.stderr)
    return 2
  return 0
