"""The device that kernels run on or are compiled for, and why a backend cannot run on it.

Nothing here needs a private name of JAX: kernels for GPUs and TPUs are imported only on a device
that they can run on, and a module that cannot be imported is one more reason for a refusal.
"""

import contextlib
import functools
import importlib
import re
import warnings
from collections.abc import Iterator
from contextvars import ContextVar

import jax
import jax.numpy as jnp
from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh

# JAX 0.10 cannot write in place from a differentiated function
SUPPORTED = jax.__version_info__ >= (0, 11)
HOPPER = "9.0"  # compute capability of H100 and H200
HOPPER_MAX_HEAD_DIM = 256
AMPERE = (8, 0)  # the earliest compute capability with cp.async and mma of bfloat16
AMPERE_MAX_HEAD_DIM = 128
# of a program, by compute capability, where it is not the least of them
SHARED_KIB = {"8.0": 163, "8.7": 163, "9.0": 227, "10.0": 227, "10.3": 227}
LEAST_SHARED_KIB = 99  # 8.6, 8.9, 12.0
# for thresholds, expiry, norms and single tokens: they need nothing of Hopper
PORTABLE_KERNELS = (
  *("hopper.thread_ops", "hopper.prefix_thresholds", "hopper.prefix_gradients", "hopper.rms_norm"),
  *("hopper.small_batch_matmul", "hopper.decode_attention", "hopper.decode_eviction"),
)
THREAD_KERNELS = (*PORTABLE_KERNELS, "hopper.fused_decode_layer")
TPU_MAX_HEAD_DIM = 256
_target: ContextVar[jax.Device | None] = ContextVar("target", default=None)


@contextlib.contextmanager
def compiling_for(device: jax.Device | None) -> Iterator[None]:
  """Chooses kernels for a device that need not be attached, in functions traced inside.

  Args:
    device: as from `jax.experimental.topologies`; None changes nothing.
  """
  if device is None:
    yield
    return
  token = _target.set(device)
  described = AbstractDevice(device.device_kind, None, device.platform)
  try:
    with use_abstract_mesh(AbstractMesh((), (), abstract_device=described)):
      yield
  finally:
    _target.reset(token)


def target() -> jax.Device | None:
  """Returns the device of `compiling_for`; None where functions are compiled for attached ones."""
  return _target.get()


def first_device() -> jax.Device:
  """Returns the device of `compiling_for`, or JAX's first device."""
  return target() or jax.devices()[0]


def device_here() -> jax.Device:
  """Returns the device that kernels are made for."""
  if target():
    return first_device()
  # jax_default_device may hold a device or a platform's name
  device = jax.config.jax_default_device or jax.devices()[0]  # type: ignore[attr-defined]
  return jax.devices(device)[0] if isinstance(device, str) else device


def on_nvidia_gpu() -> bool:
  """Tells whether JAX's first device is an NVIDIA GPU, whatever functions are compiled for."""
  device = jax.devices()[0]
  return device.platform == "gpu" and "cuda" in device.client.platform_version.lower()


def compute_capability(device: jax.Device) -> str:
  """Returns the compute capability of a GPU, such as "9.0", or "unknown"."""
  return str(getattr(device, "compute_capability", "unknown"))


def shared_bytes() -> int:
  """Returns the bytes of shared memory that a program of a GPU since Ampere can have here."""
  return 1024 * SHARED_KIB.get(compute_capability(device_here()), LEAST_SHARED_KIB)


def can_run() -> bool:
  """Tells whether the Hopper kernels of single threads (THREAD_KERNELS) can run here.

  Warns if the device is right and only their import fails: XLA then does their work, more slowly.
  """
  device = device_here()
  on_hopper = device.platform == "gpu" and compute_capability(device) == HOPPER
  return SUPPORTED and on_hopper and _can_import(THREAD_KERNELS)


def can_run_portable() -> bool:
  """Tells whether the kernels of single threads that need nothing of Hopper (PORTABLE_KERNELS) can
  run here; warns as `can_run`.
  """
  device = device_here()
  capable = device.platform == "gpu" and since_ampere(device)
  return SUPPORTED and capable and _can_import(PORTABLE_KERNELS)


def since_ampere(device: jax.Device) -> bool:
  """Tells whether a GPU is one of NVIDIA's since Ampere."""
  capability = re.fullmatch(r"(\d+)\.(\d+)", compute_capability(device))
  return capability is not None and tuple(map(int, capability.groups())) >= AMPERE


def _can_import(modules: tuple[str, ...]) -> bool:
  refusals = [reason for reason in map(import_refusal, modules) if reason]
  for reason in refusals:
    warnings.warn(f"{reason}; XLA computes instead", stacklevel=3)
  return not refusals


@functools.cache
def import_refusal(module: str) -> str | None:
  """Imports a kernel module, such as "hopper.attention"; returns why that failed, or None.

  The kernels need private names of JAX, which another version of it may have moved.
  """
  try:
    importlib.import_module(f"sparsek.kernels.{module}")
  except (ImportError, AttributeError) as error:
    path = f"kernels/{module.replace('.', '/')}.py"
    return f"{path} cannot be imported with JAX {jax.__version__}: {error}"
  return None


def hopper_refusal(query: jax.Array | jax.ShapeDtypeStruct) -> str | None:
  """Returns why the attention kernels of Hopper GPUs cannot run on `query` here, or None."""
  if query.dtype not in (jnp.bfloat16, jnp.float16):
    return f"query has dtype {query.dtype}; the tensor cores' kernels take bfloat16 and float16"
  if query.shape[-1] > HOPPER_MAX_HEAD_DIM:
    return f"query has head_dim {query.shape[-1]}; at most {HOPPER_MAX_HEAD_DIM} is supported"
  return (
    _hopper_device_refusal()
    or import_refusal("hopper.attention")
    or import_refusal("hopper.scorer_loss")
  )


def _hopper_device_refusal() -> str | None:
  device = first_device()
  if device.platform != "gpu" or not device.device_kind.startswith("NVIDIA"):
    return (
      f"it needs an NVIDIA Hopper GPU (H100, H200); JAX's default device is {device.device_kind!r}"
    )
  if not SUPPORTED:
    return f"it needs JAX 0.11 or newer; this is {jax.__version__}"
  if compute_capability(device) != HOPPER:
    return (
      f"it needs a GPU of compute capability {HOPPER} (H100, H200); "
      f"{device.device_kind} has {compute_capability(device)}"
    )
  return None


def mma_refusal(query: jax.Array | jax.ShapeDtypeStruct) -> str | None:
  """Returns why the attention kernels of GPUs since Ampere cannot run on `query` here, or None."""
  if query.dtype not in (jnp.bfloat16, jnp.float16):
    return f"query has dtype {query.dtype}; the tensor cores' kernels take bfloat16 and float16"
  if query.shape[-1] > AMPERE_MAX_HEAD_DIM:
    return f"query has head_dim {query.shape[-1]}; at most {AMPERE_MAX_HEAD_DIM} is supported"
  device = first_device()
  if device.platform != "gpu" or not device.device_kind.startswith("NVIDIA"):
    return f"it needs an NVIDIA GPU; JAX's default device is {device.device_kind!r}"
  if not SUPPORTED:
    return f"it needs JAX 0.11 or newer; this is {jax.__version__}"
  if not since_ampere(device):
    return (
      f"it needs a GPU of compute capability {'.'.join(map(str, AMPERE))} or newer; "
      f"{device.device_kind} has {compute_capability(device)}"
    )
  return import_refusal("ampere.attention")


def tpu_refusal(query: jax.Array | jax.ShapeDtypeStruct) -> str | None:
  """Returns why the attention kernels of TPUs cannot run on `query` here, or None."""
  if query.dtype not in (jnp.bfloat16, jnp.float32):
    return f"query has dtype {query.dtype}; the TPU's kernels take bfloat16 and float32"
  if query.shape[-1] > TPU_MAX_HEAD_DIM:
    return f"query has head_dim {query.shape[-1]}; at most {TPU_MAX_HEAD_DIM} is supported"
  return _tpu_device_refusal() or import_refusal("tpu.attention")


def _tpu_device_refusal() -> str | None:
  device = first_device()
  if device.platform != "tpu":
    return f"it needs a TPU (v5e, v5p, v6e); JAX's default device is {device.device_kind!r}"
  if device.device_kind.startswith(("TPU v2", "TPU v3", "TPU v4")):
    return f"it needs a TPU v5e, v5p or v6e, for their memory; this is a {device.device_kind}"
  return None
