"""Detection of the cluster that started this process: SLURM, Open MPI, Kubernetes or a TPU pod.

JAX itself finds the coordinator and the number of this process there. This module decides whether
it is asked at all: many environments set some of the variables for a process that is alone.
"""

import importlib.util
from collections.abc import Mapping
from typing import Any, NamedTuple

from sparsek.errors import UsageError

SLURM_TASK = ("SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID")
TPU_HOSTS = ("TPU_PROCESS_ADDRESSES", "TPU_WORKER_HOSTNAMES")
ADVICE = (
  "give --coordinator_address, --num_processes and --process_id, or --nodistributed for a run of "
  "one process"
)


class Cluster(NamedTuple):
  """A cluster that JAX can ask.

  Attributes:
    name: for messages.
    arguments: for `jax.distributed.initialize`, beyond what JAX finds out.
    certain: False where only JAX can tell whether there are several processes.
  """

  name: str
  arguments: dict[str, Any]
  certain: bool = True


def detect(environ: Mapping[str, str]) -> Cluster | None:
  """Returns the cluster in which this process is one of several, or None for a process alone.

  Args:
    environ: the environment variables.
  Raises:
    UsageError: where this process is one of several and cannot find the others.
  """
  return _slurm(environ) or _open_mpi(environ) or _tpu(environ) or _kubernetes(environ)


def check_alone(command: str, distributed: bool, environ: Mapping[str, str]) -> None:
  """Raises UsageError where a cluster has started several processes of a command that is one.

  Args:
    command: its name, for the message.
    distributed: False for --nodistributed: this process stands for itself.
    environ: the environment variables.
  """
  cluster = detect(environ) if distributed else None
  if cluster is not None and cluster.certain:
    raise UsageError(
      f"{command} is one process, and {cluster.name} has started several: start it once, as with "
      "srun --ntasks=1, or give --nodistributed where each of them does work of its own"
    )


def _number(environ: Mapping[str, str], name: str) -> int:
  try:
    return int(environ[name])
  except ValueError:
    raise UsageError(f"{name}={environ[name]!r} must be a number; {ADVICE}") from None


def _slurm(environ: Mapping[str, str]) -> Cluster | None:
  """Returns SLURM for a task of a step of several tasks.

  A batch script and a shell of `salloc` have SLURM_NTASKS of the whole job, and are one process.
  """
  if "SLURM_JOB_ID" not in environ:
    return None
  missing = [name for name in SLURM_TASK if name not in environ]
  if missing:
    of_step = "SLURM_STEP_NUM_TASKS" in environ and _number(environ, "SLURM_STEP_NUM_TASKS") > 1
    if of_step or ("SLURM_PROCID" in environ and _number(environ, "SLURM_PROCID") > 0):
      number = environ.get("SLURM_PROCID", "?")
      task = f"task {number} of SLURM job {environ['SLURM_JOB_ID']}"
      raise UsageError(f"this is {task}, and {', '.join(missing)} is not set; {ADVICE}")
    return None
  tasks_of = "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in environ else "SLURM_NTASKS"
  tasks = _number(environ, tasks_of)
  if tasks == 1:
    return None
  return Cluster("SLURM", {"num_processes": tasks, "local_device_ids": _slurm_devices(environ)})


def _slurm_devices(environ: Mapping[str, str]) -> list[int] | None:
  """Returns the GPUs that a task takes of those it sees; [] for all, None for one per task."""
  tasks_here = _tasks_on_node(environ)
  if tasks_here == 1:
    return []
  visible = environ.get("CUDA_VISIBLE_DEVICES")
  if tasks_here is None or visible is None:
    return None
  each, local = len(visible.split(",")) // tasks_here, _number(environ, "SLURM_LOCALID")
  # Fewer GPUs than tasks: SLURM has bound each task to GPUs of its own.
  return list(range(local * each, (local + 1) * each))


def _tasks_on_node(environ: Mapping[str, str]) -> int | None:
  """Returns the tasks of this step on this node, None where they differ between nodes.

  SLURM writes "8(x2)" for two nodes with 8 tasks each, and "8(x2),4" where the third has 4.
  """
  text = environ.get("SLURM_STEP_TASKS_PER_NODE", environ.get("SLURM_TASKS_PER_NODE", ""))
  count = text.split("(")[0]
  return int(count) if count.isdigit() and "," not in text else None


def _open_mpi(environ: Mapping[str, str]) -> Cluster | None:
  size = "OMPI_COMM_WORLD_SIZE"
  if size not in environ or _number(environ, size) == 1:
    return None
  if "OMPI_MCA_orte_hnp_uri" not in environ:
    raise UsageError(
      f"this is one of {environ[size]} processes of Open MPI, and OMPI_MCA_orte_hnp_uri, which "
      f"names the first, is not set; {ADVICE}"
    )
  return Cluster("Open MPI", {})


def _tpu(environ: Mapping[str, str]) -> Cluster | None:
  """Returns a TPU pod where its library is installed; JAX knows whether this is one."""
  if importlib.util.find_spec("libtpu") is None or environ.get("JAX_PLATFORMS", "tpu") == "cpu":
    return None
  hosts = next((environ[name] for name in TPU_HOSTS if name in environ), None)
  alone = hosts is not None and "," not in hosts and "MEGASCALE_NUM_SLICES" not in environ
  return None if alone else Cluster("a TPU pod", {}, certain=hosts is not None)


def _kubernetes(environ: Mapping[str, str]) -> Cluster | None:
  """Returns Kubernetes for a pod of an indexed job; other pods are alone."""
  if "KUBERNETES_SERVICE_HOST" not in environ or "JOB_COMPLETION_INDEX" not in environ:
    return None
  if importlib.util.find_spec("kubernetes") is None:
    raise UsageError(
      f"this is pod {environ['JOB_COMPLETION_INDEX']} of an indexed job of Kubernetes, whose other "
      f"pods are found with the package kubernetes: pip install 'jax[k8s]'; or {ADVICE}"
    )
  return Cluster("Kubernetes", {})
