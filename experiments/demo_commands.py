"""Commands that the demos print and run, each in a process of its own."""

import os
import signal
import time
from collections.abc import Callable

import jax

from sparsek.command_line import outputs
from sparsek.command_line.invocation import command
from sparsek.errors import RunError
from sparsek.experiments import child
from sparsek.runs import checkpoint
from sparsek.storage import files

FOLDER = "demo"
CACHE = os.path.join(FOLDER, ".jax_cache")


def title(text: str) -> None:
  """Prints the title of a part of a demo."""
  print(f"\n== {text} ==", flush=True)


def prepare(picture: str) -> None:
  """Makes the folder of the demos, and this process use the compiled programs of its commands.

  Raises:
    UsageError: where the folder is of another kind, or holds another file of the picture's name.
  """
  outputs.check_folder(f"{FOLDER}/", FOLDER, outputs.DEMOS)
  files.make_folder(FOLDER)
  outputs.check(picture, picture, outputs.PICTURE)
  jax.config.update("jax_compilation_cache_dir", os.path.abspath(CACHE))
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)


def run(name: str, *arguments: str, stop_when: Callable[[], bool] | None = None) -> None:
  """Prints a command and runs it; raises RunError unless it ends with code 0.

  Once `stop_when()` is true the command gets SIGTERM, after which it must still end with code 0.
  """
  print("$", command(name, *arguments), flush=True)
  # The processes share compiled programs, because compiling takes most of the time here.
  environment = {
    "JAX_COMPILATION_CACHE_DIR": os.path.abspath(CACHE),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.3",
  }
  try:
    with child.running(
      f"sparsek.experiments.{name}", arguments, env={**os.environ, **environment}
    ) as process:
      while stop_when is not None and process.poll() is None:
        if stop_when():
          process.send_signal(signal.SIGTERM)
          break
        time.sleep(0.05)
      code = process.wait()
  except KeyboardInterrupt:  # The child got Ctrl-C too: pretraining saves a checkpoint and ends.
    raise RunError("stopped; the same command goes on from here") from None
  if code:
    raise RunError(
      f"{name} ended with exit code {code}; for a fresh start remove the folder {FOLDER}/"
    )


def pretrain_in_two(workdir: str, *arguments: str) -> None:
  """Pretrains a run, stopping it after its first checkpoint and resuming it in a new process."""
  arguments = (f"--workdir={workdir}", *arguments)
  if not checkpoint.saved_steps(workdir):
    run("pretrain", *arguments, stop_when=lambda: bool(checkpoint.saved_steps(workdir)))
    steps = checkpoint.saved_steps(workdir)
    print(
      f"\nThe demo stopped the run after its checkpoint of step {steps[0]}; it ended with one of "
      f"step {steps[-1]}. The same command, in a new process, goes on from there:",
      flush=True,
    )
  run("pretrain", *arguments)
