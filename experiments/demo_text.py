"""Demonstration of a tiny SPARSEK model, from corpus to text, in minutes on two CPU cores.

  python -m experiments.demo

Pretrains it, stops it half-way and resumes it in a new process, trains a sliding window that sees
as many keys, evaluates both side by side, generates text and draws a picture. Everything goes to
demo/, except the corpus, which is tokenised once and kept in ~/.cache/sparsek. The same command
again goes on where it was stopped, and reuses what is there. Each command is printed before it
runs: copy them to go on by hand.
"""

import os
import shlex
import signal
import sys
import time

import jax
from absl import flags as absl_flags

from sparsek.command_line.main import run
from sparsek.data.batches import open_data
from sparsek.errors import RunError
from sparsek.experiments import child
from sparsek.experiments.reports.plots import kept_tokens, save_picture
from sparsek.runs import checkpoint, run_record
from sparsek.runs.metrics import read_metrics

FLAGS = absl_flags.FlagValues()  # the demo takes no flags
FOLDER = "demo"
SPARSEK, SLIDING_WINDOW, PICTURE, CACHE = (
  os.path.join(FOLDER, name) for name in ("sparsek", "sliding_window", "demo.png", ".jax_cache")
)
SEQ_LEN, NUM_STEPS = 256, 240
PRETRAIN = (
  "experiments.pretrain",
  "--data=stdlib",
  "--preset=tiny",
  "--num_layers=2",
  "--scan_layers",
  f"--seq_len={SEQ_LEN}",
  "--batch_size=8",
  f"--num_steps={NUM_STEPS}",
  "--learning_rate=3e-3",
  "--log_every=5",
  "--eval_every=40",
  "--eval_batches=4",
  f"--checkpoint_every={NUM_STEPS // 2}",
)
# Both see 64 keys a query: SPARSEK the latest 32, and 32 that it selects from all before them.
VARIANTS = {
  SPARSEK: ("--attention=sparsek", "--k=32", "--window=32"),
  SLIDING_WINDOW: ("--attention=sliding_window", "--window=64"),
}
TEXT_TOKENS = 2 * SEQ_LEN  # length of the text in the picture


def _python() -> str:
  """Returns the path of the interpreter, relative if it lies below the current folder."""
  relative = os.path.relpath(sys.executable)
  return sys.executable if relative.startswith("..") else relative


def _title(text: str) -> None:
  print(f"\n== {text} ==", flush=True)


def _run(module: str, *arguments: str, stop_when=None) -> None:
  """Prints a command and runs it; raises RunError unless it ends with code 0.

  Once `stop_when()` is true the command gets SIGTERM, after which it must still end with code 0.
  """
  print("$", shlex.join([_python(), "-m", module, *arguments]), flush=True)
  # The processes share compiled programs, because compiling takes most of the time here.
  environment = {
    "JAX_COMPILATION_CACHE_DIR": os.path.abspath(CACHE),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.3",
  }
  try:
    with child.running(module, arguments, env={**os.environ, **environment}) as process:
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
      f"{module} ended with exit code {code}; for a fresh start remove the folder {FOLDER}/"
    )


def _pretrain(workdir: str) -> None:
  command = (*PRETRAIN, f"--workdir={workdir}", *VARIANTS[workdir])
  if not checkpoint.saved_steps(workdir):
    _run(*command, stop_when=lambda: bool(checkpoint.saved_steps(workdir)))
    print(
      "\nStopped after the checkpoint half-way. The same command, in a new process, resumes:",
      flush=True,
    )
  _run(*command)


def _draw(dataset) -> None:
  config, _ = run_record.load_run_config(SPARSEK)
  params, _ = checkpoint.load_params(SPARSEK, config)
  split = dataset.split("heldout")
  document = next(
    split.document(i) for i in range(split.num_documents) if split.lengths[i] > TEXT_TOKENS
  )
  tokens = document[:TEXT_TOKENS].tolist()
  runs = {"SPARSEK (k=32, window=32)": SPARSEK, "sliding window of 64": SLIDING_WINDOW}
  metrics = {
    label: read_metrics(os.path.join(workdir, "metrics.jsonl")) for label, workdir in runs.items()
  }
  save_picture(
    PICTURE,
    metrics,
    kept_tokens(config, params, tokens),
    [dataset.tokenizer.decode([token]) for token in tokens],
  )


def main() -> None:
  """Runs all steps, one after the other."""
  started = time.monotonic()
  os.makedirs(FOLDER, exist_ok=True)
  jax.config.update("jax_compilation_cache_dir", os.path.abspath(CACHE))
  _title("1. The corpus: the source text of Python's own standard library, as bytes")
  dataset = open_data("stdlib")
  for name in ("train", "heldout"):
    print(
      f"{name}: {dataset.split(name).num_documents:,} documents, "
      f"{dataset.split(name).num_tokens:,} tokens"
    )

  _title("2. Pretrain SPARSEK: every token sees the latest 32 and 32 selected ones")
  _pretrain(SPARSEK)
  _title("3. Pretrain a sliding window of the same budget: every token sees the latest 64")
  _run(*PRETRAIN, f"--workdir={SLIDING_WINDOW}", *VARIANTS[SLIDING_WINDOW])
  _title(
    f"4. Evaluate both on held-out text, in rows of {4 * SEQ_LEN} tokens (trained on {SEQ_LEN})"
  )
  _run(
    "experiments.evaluate",
    f"--workdir={SPARSEK},{SLIDING_WINDOW}",
    f"--seq_len={4 * SEQ_LEN}",
    "--eval_batches=8",
  )
  _title("5. Generate text with SPARSEK, in constant memory")
  _run(
    "experiments.generate",
    f"--workdir={SPARSEK}",
    "--prompt=def __init__(self",
    "--max_new_tokens=300",
  )
  _title("6. Draw a picture: the loss, and which tokens each layer keeps")
  _draw(dataset)

  command = f"{_python()} -m experiments"
  print(f"""{PICTURE}

Done in {time.monotonic() - started:.0f} s. \
Checkpoints, metrics.jsonl, flags.txt and evaluation.jsonl: {SPARSEK}/, {SLIDING_WINDOW}/
To go on:
  other text          {command}.generate --workdir={SPARSEK} --prompt="import " --temperature=0.5
  another budget      {command}.evaluate --workdir={SPARSEK} --k=64 --window=64 --seq_len=2048
  train for longer    {command}.pretrain --flagfile={SPARSEK}/flags.txt --num_steps={4 * NUM_STEPS}
  your own text       {command}.prepare_data --sources=FOLDER --output=data/mine
                      {command}.pretrain --data=data/mine --workdir=runs/mine
  all flags           {command}.pretrain --help""")


if __name__ == "__main__":
  run(main, FLAGS)
