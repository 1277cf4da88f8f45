"""Kills a small experiments.pretrain again and again, resumes it, and compares what it logged with an uninterrupted run, to the bit; no test, but a measure.

  python -m tests.experiments.kill_stress --kills=12

Half of the kills fall anywhere in a start (imports, compiling, restoring), half up to --seconds after the first step that the process logs: in steps,
evaluations and the writing of checkpoints, which goes on beside the steps. What a process was doing is found out after its death, from what it left.
"""

import argparse
import collections
import os
import platform
import random
import sys
import tempfile
import time

import jax

from sparsek.checkpoint import HALF_WRITTEN, checkpoint_folder
from sparsek.metrics import read_metrics
from tests.experiments.pretrain_test import finish, logged, sharing_compiled, start, wait_for_progress, write_documents

EVAL_EVERY = 25
# Long evaluations, so that kills fall into them.
FLAGS = ["--num_steps=400", f"--eval_every={EVAL_EVERY}", "--eval_batches=200", "--checkpoint_every=5"]


def activity(workdir: str, err: str, records: list[dict]) -> str:
  """What a killed process was doing, from its stderr and the files it left."""
  if "  loss " not in err:
    return "between restore and first step" if "resuming" in err else "starting"
  checkpoints = checkpoint_folder(workdir)
  half_written = os.path.isdir(checkpoints) and any(HALF_WRITTEN in name for name in os.listdir(checkpoints))
  evaluating = records[-1]["step"] % EVAL_EVERY == 0 and "heldout_loss" not in records[-1]
  return ("evaluating" if evaluating else "in a step") + (", a checkpoint half-written" if half_written else "")


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--kills", type=int, default=12)
  parser.add_argument("--seconds", type=float, default=4.0, help="of a process that are killed in, from its first logged step on")
  parser.add_argument("--seed", type=int, default=random.randrange(10**6))
  args = parser.parse_args()
  print(f"seed {args.seed}, {args.kills} kills, experiments.pretrain {' '.join(FLAGS)}", flush=True)
  rng = random.Random(args.seed)
  with tempfile.TemporaryDirectory() as folder:
    data, environment = write_documents(os.path.join(folder, "tokens")), sharing_compiled(os.path.join(folder, "cache"))
    whole, killed = os.path.join(folder, "whole"), os.path.join(folder, "killed")
    code, _, err = finish(start(whole, data, environment, *FLAGS))
    assert code == 0, err
    seconds_to_start, found, in_start = 6.0, collections.Counter(), [bool(i % 2) for i in range(args.kills)]
    rng.shuffle(in_start)
    for kill in range(1, args.kills + 1):
      began, process = time.monotonic(), start(killed, data, environment, *FLAGS)
      if in_start[kill - 1]:
        time.sleep(rng.uniform(0.0, seconds_to_start))
      else:
        wait_for_progress(killed, process)
        seconds_to_start = time.monotonic() - began
        time.sleep(rng.uniform(0.0, args.seconds))
      process.kill()
      moment = time.monotonic() - began
      code, _, err = finish(process)
      records = read_metrics(os.path.join(killed, "metrics.jsonl"))
      doing = activity(killed, err, records) if code == -9 else f"ended with {code} before the kill"
      found[doing] += 1
      print(f"kill {kill:2}: {moment:5.2f} s after its start, {doing}; last step logged {records[-1]['step'] if records else 'none'}", flush=True)
    code, _, err = finish(start(killed, data, environment, *FLAGS))
    assert code == 0, err
    want, got = logged(whole), logged(killed)
  differing = sum(x != y for x, y in zip(want, got)) + abs(len(want) - len(got))
  print(f"{len(want)} lines of metrics.jsonl ({sum(map(len, want))} values), {len(got)} after the kills: {differing} differ; "
        f"{', '.join(f'{count} {doing}' for doing, count in found.most_common())}")
  print(f"python {platform.python_version()} jax {jax.__version__} cpu")
  sys.exit(differing > 0)


if __name__ == "__main__":
  main()
