"""Exceptions that a command line turns into one sentence and an exit code, instead of a
traceback.
"""


class UsageError(ValueError):
  """What the user asked for cannot be done (a flag, a file, a checkpoint that does not fit): exit
  code 2.
  """


class RunError(RuntimeError):
  """A run that started well cannot go on (the disk is full, the loss is not finite): exit
  code 1.
  """
