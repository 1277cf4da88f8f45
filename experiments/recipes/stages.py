"""Runs the stages of a recipe, side by side and over several GPUs; what is done is left out when the recipe runs again.

A plan is {name: (script, *flags)}: `python -m experiments.SCRIPT FLAGS`, a stage that writes to the folder WORKDIR/NAME, or evaluates others. A stage waits for
those whose folders its flags name. WORKDIR/minutes.json has the minutes of the stages that got to their end.
"""

import concurrent.futures
import contextlib
import json
import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping

from sparsek import checkpoint

Plan = Mapping[str, tuple[str, ...]]


def needed(plan: Plan, name: str) -> set[str]:
  """The stages whose folders a stage's command names."""
  places = {os.path.basename(place) for word in plan[name] for place in re.split("[=,]", word)}
  return places & set(plan) - {name}


def flags_of(folder: str) -> list[str]:
  with open(os.path.join(folder, "flags.txt"), encoding="utf-8") as file:
    return file.read().splitlines()


def stopped_early(folder: str) -> bool:
  """Whether a run of pretraining ended before its last step, as it does by a signal."""
  return f"--num_steps={checkpoint.saved_steps(folder)[-1]}" not in flags_of(folder)


def _run(workdir: str, name: str, words: tuple[str, ...], device: str | None, share: float, to_file: bool) -> float | None:
  """Minutes that it took; None where it did not get to its end."""
  command = [sys.executable, "-m", f"experiments.{words[0]}", *words[1:]]
  environment = {**os.environ, "JAX_COMPILATION_CACHE_DIR": os.path.abspath(os.path.join(workdir, "compiled"))}
  if device is not None:
    environment |= {"CUDA_VISIBLE_DEVICES": device, "XLA_PYTHON_CLIENT_MEM_FRACTION": f"{share:.3f}"}
  print(f"== {name} ==\n{shlex.join(command)}", flush=True)
  begin, folder = time.monotonic(), os.path.join(workdir, name)
  with open(f"{folder}.log", "a", encoding="utf-8") if to_file else contextlib.nullcontext() as log:
    code = subprocess.run(command, env=environment, stdout=log, stderr=log, check=False).returncode
  if code or words[0] == "pretrain" and stopped_early(folder):
    return None
  return (time.monotonic() - begin) / 60


def run_stages(plan: Plan, workdir: str, devices: str = "", at_once: int = 1, only: str = "") -> dict[str, float]:
  """Runs what is not done, in the order of the plan as far as stages need not wait, and returns everyone's minutes; ends the process where a stage failed.

  Args:
    plan: as above.
    workdir: for all stages; made if there is none.
    devices: GPUs to spread stages over, such as "0,1"; empty: JAX's choice.
    at_once: stages that run side by side; above 1 each writes WORKDIR/NAME.log.
    only: a regular expression: other stages are not begun.
  """
  os.makedirs(workdir, exist_ok=True)
  path = os.path.join(workdir, "minutes.json")
  minutes = {}
  if os.path.exists(path):
    with open(path, encoding="utf-8") as file:
      minutes = json.load(file)
  share = 0.9 / -(-at_once // len(devices.split(",")))
  left, running, failed = [name for name in plan if name not in minutes and re.search(only, name)], {}, []
  with concurrent.futures.ThreadPoolExecutor(at_once) as pool:
    while left or running:
      for name in [name for name in left if needed(plan, name) <= set(minutes)][:at_once - len(running)]:
        taken = [device for _, device in running.values()]
        device = min(devices.split(","), key=taken.count) if devices else None
        running[pool.submit(_run, workdir, name, plan[name], device, share, at_once > 1)] = name, device
        left.remove(name)
      if not running:
        break                                                                # what is left needs a stage that failed or is not to be begun
      for future in concurrent.futures.wait(running, return_when=concurrent.futures.FIRST_COMPLETED).done:
        name, _ = running.pop(future)
        if future.result() is None:
          failed.append(name)
          continue
        minutes[name] = future.result()
        with open(f"{path}.new", "w", encoding="utf-8") as file:
          json.dump(minutes, file)
        os.replace(f"{path}.new", path)
        print(f"{name}: {minutes[name]:.2f} minutes", flush=True)
  if failed:
    sys.exit(f"did not get to their end: {', '.join(failed)}; the same command goes on from here" + f" ({workdir}/NAME.log)" * (at_once > 1))
  return minutes
