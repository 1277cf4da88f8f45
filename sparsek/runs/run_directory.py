"""A run's folder: its lock, and the records of the commands that ran in it."""

import contextlib
import fcntl
import hashlib
import json
import os
import platform
import socket
import subprocess
import sys
from collections.abc import Iterable, Iterator
from importlib import metadata
from typing import IO, Any

import jax

from sparsek.command_line import outputs
from sparsek.errors import RunError, UsageError
from sparsek.storage import files
from sparsek.storage.files import cannot_write, check_regular, exists, reason_of, write_atomically

NO_CACHE = "none"
PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy", "sparsek")


def use_compilation_cache(folder: str | None = None) -> None:
  """Keeps compiled programs in a folder, so that the next run starts at once.

  Args:
    folder: "none" for no cache. None for the one with which JAX is configured, else
      one below $XDG_CACHE_HOME/sparsek or ~/.cache/sparsek, of this model of CPU or kind of
      accelerator.
  """
  if folder == NO_CACHE:
    jax.config.update("jax_enable_compilation_cache", False)
    return
  configured = jax.config.jax_compilation_cache_dir  # type: ignore[attr-defined]
  if folder is not None or configured is None:
    folder = folder or _default_cache()
    jax.config.update("jax_compilation_cache_dir", os.path.abspath(folder))


def keeps_compiled() -> bool:
  """Returns whether compiled programs are kept for the next process."""
  options: Any = jax.config
  return bool(options.jax_enable_compilation_cache and options.jax_compilation_cache_dir)


def _default_cache() -> str:
  name = jax.devices()[0].device_kind.replace(" ", "_")
  if jax.default_backend() == "cpu":  # programs for one model of CPU can crash on another
    features = f"{platform.machine()} {platform.processor()}"
    if os.path.exists("/proc/cpuinfo"):
      with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
        kinds = ("model name", "flags", "Features", "CPU part")
        features += "".join(sorted({line for line in file if line.startswith(kinds)}))
    name = f"cpu-{hashlib.sha256(features.encode()).hexdigest()[:12]}"
  return os.path.join(files.cache_folder(), "compiled", name)


def lock(workdir: str) -> IO[str]:
  """Makes `workdir` and locks it, until the returned file is closed or the process ends in any way.

  Raises:
    UsageError: where it cannot be made or written, or another run holds the lock.
  """
  try:
    os.makedirs(workdir, exist_ok=True)
    file = open(os.path.join(workdir, "lock"), "a+", encoding="utf-8", errors="replace")
  except OSError as error:
    raise UsageError(f"--workdir={workdir} cannot be written: {reason_of(error)}") from None
  try:
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
  except BlockingIOError:
    file.seek(0)
    owner = file.read().strip()
    by = f" ({owner})" if owner else ""
    raise UsageError(
      f"--workdir={workdir} is in use by another run{by}: stop it or take another folder"
    ) from None
  except OSError as error:
    raise UsageError(f"--workdir={workdir} cannot be locked: {reason_of(error)}") from None
  try:
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    file.flush()
  except OSError as error:
    raise UsageError(f"--workdir={workdir} cannot be written: {reason_of(error)}") from None
  return file


@contextlib.contextmanager
def locked(workdir: str) -> Iterator[None]:
  """Locks `workdir` during the block; a UsageError in it leaves no new folder behind.

  Raises:
    UsageError: where the folder is of another kind than a run's.
  """
  outputs.check_folder(f"--workdir={workdir}", workdir, outputs.A_RUN)
  is_new = not os.path.isdir(workdir)
  with contextlib.closing(lock(workdir)):
    try:
      yield
    except UsageError:
      if is_new:
        os.remove(os.path.join(workdir, "lock"))
        for folder in (os.path.join(workdir, "checkpoints"), workdir):
          with contextlib.suppress(OSError):  # one that is not empty stays
            os.rmdir(folder)
      raise


class Presence:
  """Identity of the files of a run's folder, to notice that it was moved or replaced.

  Args:
    paths: files and folders that stay as long as the run does.
  """

  def __init__(self, paths: Iterable[str]):
    self._stats = {path: os.stat(path) for path in paths}

  def check(self) -> None:
    """Raises RunError where one of the paths was deleted, moved, unmounted or replaced."""
    for path, expected in self._stats.items():
      try:
        same = os.path.samestat(os.stat(path), expected)
      except OSError:
        same = False
      if not same:
        raise RunError(
          f"{path} was deleted, moved or unmounted under the run, which ends here: "
          f"nothing more could be saved beside its checkpoints"
        )


def write_record(workdir: str, name: str, text: str) -> None:
  """Writes WORKDIR/name atomically.

  An existing file with other contents is kept as name.1, name.2, ... before the extension.

  Raises:
    UsageError: where there is a folder or a device of that name, or a file that cannot be read.
    RunError: where it cannot be written.
  """
  path = os.path.join(workdir, name)
  content = text.encode("utf-8")
  try:
    if exists(path):
      check_regular(path)
      with open(path, "rb") as file:
        old = file.read()
      if old == content:
        return
      # Copied and not renamed: a kill must not leave the run without its record.
      _keep(path, old)
    write_atomically(path, content)
  except OSError as error:
    raise cannot_write(path, error) from None


def _keep(path: str, content: bytes) -> None:
  """Writes a record's older contents to the next free name, unless an earlier attempt did so."""
  stem, extension = os.path.splitext(path)
  numbered = [f"{stem}.1{extension}"]
  while os.path.lexists(numbered[-1]):
    numbered.append(f"{stem}.{len(numbered) + 1}{extension}")
  if len(numbered) > 1 and os.path.isfile(numbered[-2]):
    with open(numbered[-2], "rb") as file:
      if file.read() == content:
        return
  write_atomically(numbered[-1], content)


def to_json(record: dict) -> str:
  """Returns a record as indented JSON with sorted keys."""
  return json.dumps(record, indent=2, sort_keys=True) + "\n"


def versions() -> dict[str, object]:
  """Returns a record of the program: package versions, Python, devices, commit, command line."""
  device = jax.devices()[0]
  # Records are published: they hold no absolute path of a machine.
  command = [sys.argv[0] and os.path.relpath(sys.argv[0]), *sys.argv[1:]]
  return {
    "python": platform.python_version(),
    "packages": {package: _version(package) for package in PACKAGES},
    "commit": _commit(),
    "devices": f"{jax.device_count()} x {device.device_kind}",
    "platform": device.platform,
    "command": command,
  }


def _version(package: str) -> str | None:
  try:
    return metadata.version(package)
  except metadata.PackageNotFoundError:
    return None


def _commit() -> str | None:
  """Returns the commit of the source tree, with "-dirty" for local changes; None outside git."""
  source = os.path.dirname(os.path.abspath(__file__))
  try:
    # A repository that only surrounds this file, as one with a virtual environment in it does, does
    # not track it; its commit would say nothing.
    subprocess.run(
      ["git", "-C", source, "ls-files", "--error-unmatch", __file__],
      check=True,
      capture_output=True,
      timeout=5,
    )
    return subprocess.run(
      ["git", "-C", source, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
      check=True,
      capture_output=True,
      text=True,
      timeout=5,
    ).stdout.strip()
  except (OSError, subprocess.SubprocessError):
    return None
