"""Exceptions that a command reports as one sentence and an exit code, without a traceback."""


class UsageError(ValueError):
  """A request that cannot be carried out: a flag, file or checkpoint does not fit. Exit code 2."""


class RunError(RuntimeError):
  """A failure after a good start: the disk is full, the loss is not finite. Exit code 1."""
