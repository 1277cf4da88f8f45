"""Settings of the whole test suite."""

import gc
import importlib.metadata
import importlib.util
import os
import signal

# Compiling costs far more than running here: optimise little, and compile each function once over
# all test processes and the commands they start.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
os.environ.setdefault(
  "JAX_COMPILATION_CACHE_DIR",
  os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), ".pytest_cache", "jax"),
)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "0")

# Fusions made by other means compile twice as fast, and a program that is not split into parts for
# several threads a fifth faster. XLA aborts where it does not know a flag: these versions for CPUs
# know them, plugins may not.
plugins = any(map(importlib.util.find_spec, ("jax_plugins", "libtpu")))
if importlib.metadata.version("jaxlib").startswith(("0.10.", "0.11.")) and not plugins:
  quick = "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
  os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {quick}"

# Compiled functions are many objects that stay: look at all of them less often.
gc.set_threshold(200_000, 50, 100)

import jax  # noqa: E402
import pytest  # noqa: E402

# A suite in the background of a shell ignores Ctrl-C, under nohup the end of a terminal too, and so
# would the commands that it interrupts.
for number, handler in (
  (signal.SIGINT, signal.default_int_handler),
  (signal.SIGHUP, signal.SIG_DFL),
):
  if signal.getsignal(number) == signal.SIG_IGN:
    signal.signal(number, handler)


def pytest_collection_modifyitems(items):
  # Files with long tests go first: at the end no process waits for another's, and what processes
  # take from each other is short.
  slow = {item.path for item in items if item.get_closest_marker("slow")}
  items.sort(key=lambda item: item.path not in slow)
  if jax.default_backend() == "gpu":
    return
  for item in items:
    if item.get_closest_marker("gpu"):
      item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU; JAX sees none here"))


def pytest_runtest_teardown(item, nextitem):
  """Drops compiled functions between files before they fill the memory map of the process.

  Each is several mappings, of which Linux allows 65,530; LLVM aborts where there is no other.
  """
  if nextitem is not None and nextitem.path != item.path and os.path.exists("/proc/self/maps"):
    with open("/proc/self/maps", "rb") as maps:
      mappings = sum(1 for _ in maps)
    if mappings > 30_000:
      jax.clear_caches()
      gc.collect()
