"""Kills and stops a small experiments.pretrain again and again; it must log what an uninterrupted
run does, to the bit.

This is no test of the suite, but is run by hand:

  python -m tests.experiments.kill_stress --kills=12

Half of them are SIGKILL, the others signals that ask a run to save and stop. A third of the starts
go back to an earlier checkpoint first (--restore_step). Spikes are skipped, by what the checkpoints
say of the steps before.

Half fall anywhere in a start (imports, compiling, restoring), half up to --seconds after the first
step that the process logs: in steps, evaluations and the writing of checkpoints, which goes on
beside the steps. What a process was doing is read from the files that it left.
"""

import argparse
import collections
import os
import platform
import random
import signal
import sys
import tempfile
import time

import jax

from sparsek.runs.checkpoint import checkpoint_folder, saved_steps
from sparsek.runs.checkpoint_writer import HALF_WRITTEN
from sparsek.runs.metrics import read_metrics
from tests.experiments.pretrain_test import (
  finish,
  logged,
  sharing_compiled,
  start,
  wait_for_progress,
  write_documents,
)

EVAL_EVERY = 25
# Long evaluations, so that kills fall into them.
FLAGS = [
  "--num_steps=400",
  f"--eval_every={EVAL_EVERY}",
  "--eval_batches=200",
  "--checkpoint_every=5",
  "--spike_factor=1.1",
]
STOPS = (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGINT)


def activity(workdir: str, err: str, records: list[dict]) -> str:
  """Returns what a killed process was doing, from its stderr and the files it left."""
  if "  loss " not in err:
    return "between restore and first step" if "resuming" in err else "starting"
  checkpoints = checkpoint_folder(workdir)
  half_written = os.path.isdir(checkpoints) and any(
    HALF_WRITTEN in name for name in os.listdir(checkpoints)
  )
  evaluating = records[-1]["step"] % EVAL_EVERY == 0 and "heldout_loss" not in records[-1]
  return ("evaluating" if evaluating else "in a step") + (
    ", a checkpoint half-written" if half_written else ""
  )


def outcome(how: signal.Signals, code: int, out: str) -> str | None:
  """Returns how a process ended that was not killed outright, else None."""
  if "stopped by a signal" in out:
    return f"saved and stopped on {how.name}"
  return None if code == -signal.SIGKILL else f"ended with code {code}"


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--kills", type=int, default=12)
  parser.add_argument(
    "--seconds",
    type=float,
    default=4.0,
    help="of a process that are killed in, from its first logged step on",
  )
  parser.add_argument("--seed", type=int, default=random.randrange(10**6))
  args = parser.parse_args()
  print(f"seed {args.seed}, {args.kills} kills, experiments.pretrain {' '.join(FLAGS)}", flush=True)
  rng = random.Random(args.seed)
  with tempfile.TemporaryDirectory() as folder:
    data, environment = (
      write_documents(os.path.join(folder, "tokens")),
      sharing_compiled(os.path.join(folder, "cache")),
    )
    whole, killed = os.path.join(folder, "whole"), os.path.join(folder, "killed")
    code, _, err = finish(start(whole, data, environment, *FLAGS))
    assert code == 0, err
    wrong, seconds_to_start, counts = 0, 6.0, collections.Counter()
    in_start = [bool(i % 2) for i in range(args.kills)]
    rng.shuffle(in_start)
    for kill in range(1, args.kills + 1):
      saved, how = saved_steps(killed), rng.choice((signal.SIGKILL, rng.choice(STOPS)))
      back = [f"--restore_step={rng.choice(saved)}"] if saved and rng.random() < 1 / 3 else []
      began, process = time.monotonic(), start(killed, data, environment, *FLAGS, *back)
      if in_start[kill - 1]:
        time.sleep(rng.uniform(0.0, seconds_to_start))
      else:
        wait_for_progress(killed, process)
        seconds_to_start = time.monotonic() - began
        time.sleep(rng.uniform(0.0, args.seconds))
      process.send_signal(how)
      moment = time.monotonic() - began
      code, out, err = finish(process)
      records = read_metrics(os.path.join(killed, "metrics.jsonl"))
      doing = outcome(how, code, out) or activity(killed, err, records)
      counts[doing] += 1
      after = f"{moment:5.2f} s after its start{''.join(f' with {flag}' for flag in back)}"
      last = records[-1]["step"] if records else "none"
      print(f"kill {kill:2}: {how.name} {after}, {doing}; last step logged {last}", flush=True)
      if "Traceback" in err or code not in (0, 130, -how):
        wrong += 1
        print(f"WRONG: code {code}\n{err}", flush=True)
    code, _, err = finish(start(killed, data, environment, *FLAGS))
    assert code == 0, err
    want, got = logged(whole), logged(killed)
  differing = sum(x != y for x, y in zip(want, got)) + abs(len(want) - len(got))
  skipped = max(record.get("skipped", 0) for record in got)
  print(
    f"{len(want)} lines of metrics.jsonl ({sum(map(len, want))} values), {len(got)} after the "
    f"kills: {differing} differ; {skipped} updates were skipped; {wrong} processes ended "
    f"wrongly; {', '.join(f'{count} {doing}' for doing, count in counts.most_common())}"
  )
  print(f"python {platform.python_version()} jax {jax.__version__} cpu")
  sys.exit(differing + wrong > 0)


if __name__ == "__main__":
  main()
