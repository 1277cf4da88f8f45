"""Compilation in other threads: of what the first step needs, all at the same time.

XLA compiles the Mosaic GPU kernels of a program one after the other. It keeps them in the process
by the hash of their code, so a kernel that was compiled in a program of its own is found there.
"""

import gc
import re
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
from jax.extend.backend import get_compile_options
from jax.stages import Compiled, Lowered, Wrapped

_TARGET = "mosaic_gpu_v2"
_CALL = re.compile(
  rf"^ *%\S+ = (stablehlo\.custom_call @{_TARGET})\([^\"\n]*?\) (\{{.*\}})"
  r" : \(([^\"\n]*)\) -> ([^\"\n]*)$",
  re.MULTILINE,
)
_HASH = re.compile(r'kernel_hash = "((?:[^"\\]|\\.)*)"')
_TYPE = re.compile(r"tensor<[^>]*>")


_THREADS = ThreadPoolExecutor()


def kernel_programs(text: str) -> list[str]:
  """Returns a StableHLO program for each kernel of a program, of equal ones for the first only."""
  programs: dict[str, str] = {}
  for call, attributes, operands, results in _CALL.findall(text):
    found = _HASH.search(attributes)
    assert found is not None
    programs.setdefault(found[1], _program(call, attributes, operands, results))
  return list(programs.values())


def _program(call: str, attributes: str, operands: str, results: str) -> str:
  """Returns a program that makes one call, given the text of its parts."""
  given, returned = _TYPE.findall(operands), _TYPE.findall(results)
  parameters = ", ".join(f"%arg{i}: {kind}" for i, kind in enumerate(given))
  arguments = ", ".join(f"%arg{i}" for i in range(len(given)))
  values = ", ".join(f"%0#{i}" for i in range(len(returned)))
  return f"""module @kernel {{
  func.func public @main({parameters}) -> ({", ".join(returned)}) {{
    %0:{len(returned)} = {call}({arguments}) {attributes} : ({operands}) -> {results}
    return {values} : {", ".join(returned)}
  }}
}}
"""


def lower(function: Wrapped, *args: Any, **kwargs: Any) -> Lowered:
  """Traces and lowers a function without garbage collection, which would go through all that has
  been traced again and again.
  """
  collects = gc.isenabled()
  gc.disable()
  try:
    return function.lower(*args, **kwargs)
  finally:
    if collects:
      gc.enable()


def start_compiling_kernels(lowered: Lowered, device: jax.Device) -> list[Future[Any]]:
  """Starts to compile the kernels of a lowered program, which is to be compiled right after.

  XLA optimizes and tunes the program before it needs the first kernel. A kernel that cannot be
  compiled fails there again, with the same error.

  Args:
    lowered: the program.
    device: a device of this process that it runs on.
  Returns:
    the compilations; none where the program has no such kernels.
  """
  programs = kernel_programs(lowered.as_text()) if device.platform == "gpu" else []
  return [_THREADS.submit(_compile_program, text, device) for text in programs]


def _compile_program(text: str, device: jax.Device) -> Any:
  options = get_compile_options(1, 1, device_assignment=[[device.id]])
  return device.client.compile_and_load(text, (device,), options)


def start_compiling(function: Wrapped, *args: Any) -> Future[Compiled]:
  """Starts to compile a function for arguments like these, so that a call need not wait for it."""
  shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), args)
  return _THREADS.submit(lambda: function.lower(*shapes).compile())
