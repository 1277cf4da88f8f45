"""Processes of one run: how they find each other, agree, and end together.

One command that is started N times is one run. Process 0 alone locks the run's folder, writes its
records, and moves or deletes anything. In a process that is alone, every function here does the
plain thing.
"""

import contextlib
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from sparsek.config import whole_number
from sparsek.errors import RunError, UsageError
from sparsek.parallel import clusters
from sparsek.parallel.process_watch import Reason, Watch, end_at_abort, reason_of

T = TypeVar("T")
ADDRESS = "JAX_COORDINATOR_ADDRESS"  # environment variable, read by JAX too
LEAVE_SECONDS = 10  # for all processes to end once one has begun to
COLLECTIVES_THAT_FAIL = ("gloo", "nccl", "connection", "socket")  # in errors, in lower case


class Options(NamedTuple):
  """Flags that say which processes are one run; None where they are to be detected.

  Attributes:
    coordinator_address: HOST:PORT of process 0.
    num_processes, process_id: of the run, and of this process.
    distributed: False for a process that is alone, wherever it runs.
    timeout: seconds that processes wait for each other, and for a step.
  """

  coordinator_address: str | None = None
  num_processes: int | None = None
  process_id: int | None = None
  distributed: bool = True
  timeout: float = 300.0

  def given(self) -> dict[str, Any]:
    """Returns the arguments of `jax.distributed.initialize` that flags give."""
    names = ("coordinator_address", "num_processes", "process_id")
    return {name: getattr(self, name) for name in names if getattr(self, name) is not None}


class OutOfStep(RunError):
  """A failure after which the processes wait for each other in vain: the run must end."""


class _Group:
  """The processes of this run: this one's number, and what it needs to talk to the others."""

  def __init__(self, client: Any, process_id: int, num_processes: int, timeout: float):
    self.client, self.process_id, self.num_processes = client, process_id, num_processes
    self.timeout = timeout
    self.watch = Watch(client, process_id, num_processes, timeout)
    self._calls = 0

  def next_key(self) -> str:
    """Returns a key that is new, and the same in all processes."""
    self._calls += 1
    return f"sparsek/call/{self._calls}"

  def get(self, key: str) -> Any:
    """Returns the JSON that another process sets."""
    try:
      return json.loads(self.client.blocking_key_value_get(key, int(1000 * self.timeout)))
    except jax.errors.JaxRuntimeError as error:
      raise self._late("process 0 does not answer", error) from None

  def set(self, key: str, value: Any) -> None:
    """Sets a key that other processes read."""
    self.client.key_value_set(key, json.dumps(value))

  def wait_for_all(self, key: str) -> None:
    """Waits until all processes are here.

    Raises:
      OutOfStep: naming those that are not here in time.
    """
    try:
      self.client.wait_at_barrier(key, int(1000 * self.timeout))
    except jax.errors.JaxRuntimeError as error:
      lines = str(error).partition("timed out task names:")[2].split("\n\n")[0].split()
      missing = ", ".join(f"process {name}" for name in lines if name.isdigit())
      raise self._late(f"{missing or 'another process'} does not arrive", error) from None

  def _late(self, what: str, error: Exception) -> OutOfStep:
    if "DEADLINE_EXCEEDED" not in str(error):
      return OutOfStep(f"the coordination service of process 0 fails: {error}")
    return OutOfStep(f"{what} within {self.timeout:g} seconds (--process_timeout)")


_group: _Group | None = None


def count() -> int:
  """Returns the number of processes of this run."""
  return 1 if _group is None else _group.num_processes


def is_first() -> bool:
  """Returns whether this process locks, writes, moves and deletes."""
  return _group is None or _group.process_id == 0


def progress() -> None:
  """Notes that a step has ended; the next one must not take longer than the timeout."""
  if _group is not None:
    _group.watch.progress()


def pause() -> None:
  """Notes that this process compiles, saves or reads, until the next `progress`."""
  if _group is not None:
    _group.watch.pause()


@contextlib.contextmanager
def running(options: Options) -> Iterator[None]:
  """Joins the processes of this run; call it before JAX touches a device.

  An error ends all processes with the same sentence and exit code.

  Args:
    options: of this process.
  Raises:
    UsageError: where the flags are incomplete or the other processes cannot be found.
  """
  global _group
  arguments = _arguments(options, os.environ)
  _group = None if arguments is None else _initialize(arguments, options)
  if _group is None:
    yield
    return
  group = _group
  group.watch.start()
  try:
    yield
    pause()
    group.wait_for_all("sparsek/end")
  except BaseException as error:
    if not getattr(error, "is_of_all", False):
      _wait_for_verdict(error, group.timeout)
      group.watch.post(reason_of(error, group.process_id))
    raise
  finally:
    _group = None
    group.watch.leave()
    with contextlib.suppress(RuntimeError):
      jax.distributed.shutdown()


def _wait_for_verdict(error: BaseException, timeout: float) -> None:
  """Gives the watch time to say who died, where a collective failed since another process did."""
  text = str(error).lower()
  of_jax = isinstance(error, (jax.errors.JaxRuntimeError, ValueError))
  if of_jax and any(word in text for word in COLLECTIVES_THAT_FAIL):
    pause()
    time.sleep(timeout)


def _arguments(options: Options, environ: Any) -> dict[str, Any] | None:
  """Returns the arguments of `jax.distributed.initialize`, or None for a process that is alone."""
  given = options.given()
  if not options.distributed:
    if given:
      raise UsageError(f"--nodistributed and --{next(iter(given))} exclude each other")
    return None
  _check(given)
  if options.num_processes == 1:
    return None
  if ADDRESS in environ:
    given.setdefault("coordinator_address", environ[ADDRESS])
    _check(given)
  missing = [name for name in Options._fields[:3] if name not in given]
  detected = clusters.detect(environ) if missing else None
  if not given and detected is None:
    return None
  if detected is None and missing:
    are = "is" if len(missing) == 1 else "are"
    raise UsageError(
      f"--{' and --'.join(missing)} {are} missing: without a cluster that tells them, "
      f"--coordinator_address, --num_processes and --process_id go together"
    )
  alone = {"cluster_detection_method": "deactivate"} if detected is None else {}
  return {**alone, **({} if detected is None else detected.arguments), **given}


def _check(given: dict[str, Any]) -> None:
  """Raises UsageError for values of flags that do not go together."""
  address, number = given.get("coordinator_address"), given.get("process_id")
  port = whole_number((address or ":1").rpartition(":")[2], 1)
  if port is None or port >= 2**16:
    raise UsageError(f"--coordinator_address={address} must be HOST:PORT, of process 0")
  if number is not None and number >= given.get("num_processes", number + 1):
    raise UsageError(
      f"--process_id={number} must be below --num_processes={given['num_processes']}"
    )


def _initialize(arguments: dict[str, Any], options: Options) -> _Group | None:
  """Connects the processes; returns None for one on a machine that is no cluster after all."""
  from jax._src import distributed

  seconds = max(int(options.timeout), 1)
  # Its handler of SIGTERM would replace ours, which ends a run at a step that all processes agree.
  jax.config.update("jax_enable_preemption_service", False)
  where = arguments.get("coordinator_address", "the first process")
  apart = (
    f"the processes of this run did not meet at {where} within {seconds} seconds "
    "(--process_timeout)"
  )
  end_at_abort(Reason(f"{apart}; is each started once, with a --process_id of its own?", 2))
  try:
    jax.distributed.initialize(
      **arguments,
      initialization_timeout=seconds,
      heartbeat_timeout_seconds=seconds,
      shutdown_timeout_seconds=LEAVE_SECONDS,
    )
  except ValueError as error:
    if "coordinator_address should be defined" in str(error):
      return None
    raise UsageError(f"the processes of this run cannot be found: {error}") from None
  except RuntimeError as error:
    lines = str(error).strip().splitlines()
    raise UsageError(f"{apart}: {' '.join(lines[:1])}") from None
  state = distributed.global_state
  if state.num_processes == 1:
    return None
  return _Group(state.client, state.process_id, state.num_processes, options.timeout)


def on_first(function: Callable[[], T]) -> T:
  """Calls a function in process 0, and returns its result, or raises its error, in all processes.

  Args:
    function: returns JSON; in the other processes tuples become lists.
  """
  if _group is None:
    return function()
  key = _group.next_key()
  if _group.process_id:
    answer = _group.get(key)
    if "error" in answer:
      raise _raisable(answer["error"], ())
    return answer["result"]
  try:
    result = function()
  except Exception as error:
    _group.set(key, {"error": _described(error, 0)})
    raise _marked(error) from error.__cause__
  _group.set(key, {"result": result})
  return result


def together(function: Callable[[], T], kinds: tuple[type[Exception], ...] = ()) -> T:
  """Calls a function in every process; where it fails in one, it raises in all.

  Args:
    function: called in all processes at the same time.
    kinds: errors that keep their kind in the other processes, beside UsageError and RunError.
  Raises:
    Exception: that of this process, or of the first process that has one.
    OutOfStep: where others do not end, since they wait in `function` for a process that failed.
  """
  if _group is None:
    return function()
  key, result, error = _group.next_key(), None, None
  try:
    result = function()
  except Exception as caught:
    error = caught
    _group.set(f"{key}/{_group.process_id:06}", _described(error, _group.process_id))
  try:
    _group.wait_for_all(f"{key}/all")
  except OutOfStep as late:
    if error is None:
      raise
    raise OutOfStep(f"{_described(error, _group.process_id)[1]}; {late}") from error
  errors = sorted(_group.client.key_value_dir_get(f"{key}/"))
  if error is not None:
    raise _marked(error) from error.__cause__
  if errors:
    raise _raisable(json.loads(errors[0][1]), kinds)
  return result  # type: ignore[return-value]


def check_same(settings: Mapping[str, Any]) -> None:
  """Compares the settings of all processes, which one run needs to be equal.

  Args:
    settings: by the name of the flag, JSON.
  Raises:
    UsageError: in all processes, where those of one differ from those of process 0; names the
      first that does, and both values.
  """
  first = on_first(lambda: dict(settings))

  def compare() -> None:
    own = json.loads(json.dumps(dict(settings)))
    for name in sorted(own.keys() | first.keys()):
      if own.get(name) != first.get(name):
        raise UsageError(
          f"--{name}={own.get(name)} in process {jax.process_index()}, --{name}={first.get(name)} "
          "in process 0: all processes of a run need the same flags"
        )

  together(compare)


def _described(error: Exception, process_id: int) -> list[str]:
  """Returns the kind and the text of an error, for other processes."""
  kind = type(error).__name__
  known = isinstance(error, (UsageError, RunError)) or type(error).__module__.startswith("sparsek")
  return [kind, str(error) if known else reason_of(error, process_id).text]


def _raisable(description: list[str], kinds: tuple[type[Exception], ...]) -> Exception:
  """Returns the error that another process described."""
  kind, text = description
  known: dict[str, type[Exception]] = {"UsageError": UsageError}
  known |= {each.__name__: each for each in kinds}
  return _marked(known.get(kind, RunError)(text))


def _marked(error: Exception) -> Exception:
  """Returns an error that all processes raise, so that none needs to tell the others."""
  error.is_of_all = True  # type: ignore[attr-defined]
  return error


class Vote:
  """A question that the processes answer at every step: yes where one of them says yes.

  The answers meet on the devices, after the work that is dispatched already.
  """

  def __init__(self, mesh: Mesh):
    self._sharding, self._size = NamedSharding(mesh, P(mesh.axis_names)), mesh.size
    self._any = jax.jit(jnp.any, out_shardings=NamedSharding(mesh, P()))

  def cast(self, answer: bool) -> jax.Array | bool:
    """Gives this process's answer, and returns that of all; reading it waits for the others."""
    if _group is None:
      return answer
    votes = jax.make_array_from_callback(
      (self._size,), self._sharding, lambda _: np.full(1, answer)
    )
    return self._any(votes)
