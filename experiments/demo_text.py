# ruff: noqa: E402 (see sparsek.command_line.main)
"""Demonstration on plain text: a tiny SPARSEK model, from corpus to text, beside a sliding window.

  python -m experiments.demo_text

Pretrains it, stops it half-way and resumes it in a new process, trains a sliding window that sees
as many keys, evaluates both side by side, generates text and draws a picture. The window is ahead:
on text, most of what matters is near. Takes minutes on two CPU cores. Everything goes to demo/,
except the corpus, which is tokenised once and kept in ~/.cache/sparsek. The same command again goes
on where it was stopped, and reuses what is there. Each command is printed before it runs.
"""

import os
import time

from absl import flags as absl_flags

from sparsek.command_line.main import parse_first, run

FLAGS = absl_flags.FlagValues()  # the demo takes no flags

if __name__ == "__main__":
  parse_first(FLAGS, __doc__)

from sparsek.command_line.invocation import command
from sparsek.data.batches import open_data
from sparsek.data.token_files import TokenDataset
from sparsek.experiments import demo_commands
from sparsek.experiments.demo_commands import FOLDER, title
from sparsek.experiments.reports.plots import can_draw, kept_tokens, save_picture
from sparsek.runs import checkpoint, run_record
from sparsek.runs.metrics import read_metrics

SPARSEK, SLIDING_WINDOW, PICTURE = (
  os.path.join(FOLDER, name) for name in ("text_sparsek", "text_sliding_window", "text.png")
)
SEQ_LEN, NUM_STEPS = 256, 240
PRETRAIN = (
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


def ahead() -> str:
  """Returns a sentence about which run's held-out loss is lower, and by how much."""
  sparsek, window = (
    read_metrics(os.path.join(workdir, "evaluation.jsonl"))[-1]["loss"]
    for workdir in (SPARSEK, SLIDING_WINDOW)
  )
  first = "the sliding window" if window < sparsek else "SPARSEK"
  return (
    f"On this text {first} is ahead by {abs(sparsek - window):.3f} nats a byte: {sparsek:.3f} with "
    f"SPARSEK, {window:.3f} with the window. Most of what matters here is near; what "
    f"selection is for: {command('demo')}"
  )


def draw(dataset: TokenDataset) -> None:
  """Draws the losses, and which tokens each layer keeps of a text."""
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
  demo_commands.prepare(PICTURE)
  draws = can_draw("the demo goes on, and prints its tables")
  title("1. The corpus: the source text of Python's own standard library, as bytes")
  dataset = open_data("stdlib")
  for name in ("train", "heldout"):
    print(
      f"{name}: {dataset.split(name).num_documents:,} documents, "
      f"{dataset.split(name).num_tokens:,} tokens"
    )

  title("2. Pretrain SPARSEK: every token sees the latest 32 and 32 selected ones")
  demo_commands.pretrain_in_two(SPARSEK, *PRETRAIN, *VARIANTS[SPARSEK])
  title("3. Pretrain a sliding window of the same budget: every token sees the latest 64")
  demo_commands.run("pretrain", f"--workdir={SLIDING_WINDOW}", *PRETRAIN, *VARIANTS[SLIDING_WINDOW])
  title(
    f"4. Evaluate both on held-out text, in rows of {4 * SEQ_LEN} tokens (trained on {SEQ_LEN})"
  )
  demo_commands.run(
    "evaluate",
    f"--workdir={SPARSEK},{SLIDING_WINDOW}",
    f"--seq_len={4 * SEQ_LEN}",
    "--eval_batches=8",
  )
  title("5. Generate text with SPARSEK, in constant memory")
  demo_commands.run(
    "generate", f"--workdir={SPARSEK}", "--prompt=def __init__(self", "--max_new_tokens=300"
  )
  if draws:
    title("6. Draw a picture: the loss, and which tokens each layer keeps")
    draw(dataset)

  shown = f"{PICTURE}: done" if draws else "Done"
  print(f"\n{shown} in {time.monotonic() - started:.0f} s. {ahead()}")
  to_go_on = (
    (
      "other text",
      command("generate", f"--workdir={SPARSEK}", "--prompt=import ", "--temperature=0.5"),
    ),
    (
      "another budget",
      command("evaluate", f"--workdir={SPARSEK}", "--k=64", "--window=64", "--seq_len=2048"),
    ),
    (
      "train for longer",
      command("pretrain", f"--flagfile={SPARSEK}/flags.txt", f"--num_steps={4 * NUM_STEPS}"),
    ),
  )
  print("To go on:", *(f"  {what:18}{how}" for what, how in to_go_on), sep="\n")


if __name__ == "__main__":
  run(main, FLAGS)
