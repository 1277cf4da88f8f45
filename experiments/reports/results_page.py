"""Page docs/results.md: `python -m experiments.reports.results_page` makes it from the records."""

import argparse
import dataclasses
import os
from collections.abc import Callable

from sparsek.experiments import script
from sparsek.experiments.reports import evictors_report, records, ruler_report
from sparsek.experiments.reports import results_sections as sections
from sparsek.storage import files

PAGE = os.path.join(
  os.path.dirname(os.path.dirname(os.path.realpath(records.FOLDER))), "docs", "results.md"
)
HEAD = """# Results

The tables behind the figures of the README and of the other documents, each with its record and the
command that made it. This page is generated: `python -m experiments.reports.results_page` writes it
from the records in [experiments/results](../experiments/results/README.md), whose index says on
what device and at which commit each was made. "(a to b)" after a loss is a 95 % t interval over
starts; [Statistics](statistics.md) says how intervals and p values are computed. Losses are in nats
a token, unless the text says otherwise."""


@dataclasses.dataclass(frozen=True)
class Section:
  """A part of the page.

  Attributes:
    title: its heading.
    text: what was done, a paragraph.
    records: names of the files in experiments/results.
    command: that made them.
    lines: (content of each record) -> lines of the tables below the text.
    is_awaited: whether the section is left out until its records exist.
  """

  title: str
  text: str
  records: tuple[str, ...]
  command: str
  lines: Callable[..., list[str]]
  is_awaited: bool = False

  @property
  def is_shown(self) -> bool:
    """Returns whether the section has its records, as each must that is not awaited."""
    paths = (os.path.join(records.FOLDER, name) for name in self.records)
    return not self.is_awaited or all(map(os.path.exists, paths))

  def page(self) -> list[str]:
    """Returns the lines of the section."""
    links = ", ".join(f"[{name}](../experiments/results/{name})" for name in self.records)
    content = self.lines(*map(records.load, self.records))
    made = f"{'Record' if len(self.records) == 1 else 'Records'}: {links}, by `{self.command}`."
    return [
      "",
      f"## {self.title}",
      "",
      *sections.wrapped(self.text),
      "",
      *content,
      "",
      *sections.wrapped(made),
    ]


SECTIONS = (
  Section(
    "Speed of attention",
    "One H100, forward and backward together, k = window = 512, bfloat16, batch 1; thresholds, "
    "lists and gradients of the scores included. Medians of rounds in which all are timed in turn. "
    'First 16 heads of 128, then all shapes: "rising" scores let each token enter the selection, '
    '"falling" ones none after the first.',
    ("attention_h100.json",),
    "python -m experiments.benchmark --suite=headline --lengths=4096,8192,32768,131072",
    sections.attention,
  ),
  Section(
    "Speed of training",
    "One H100, whole optimizer steps of a model of 110 million parameters, 12 heads of 64, "
    "bfloat16, one row a step, k = window = 512, in tokens per second. The row of 262144 tokens is "
    "trained with `--remat=attention`.",
    ("train_h100.json", "train_h100_packed.json", "train_h100_scorer_loss.json"),
    "python -m experiments.benchmark --suite=train --preset=gpt2_small --scorer_loss=0 "
    "--lengths=32768,131072",
    sections.training,
  ),
  Section(
    "Speed of generation",
    "One H100, a model of 969 million parameters in bfloat16, k = window = 512: milliseconds a "
    "token after contexts of many lengths, all rows together. Transformers' Llama of the same "
    "size uses its default cache.",
    ("decode_h100.json",),
    "python -m experiments.benchmark --suite=decode --k=512 --window=512",
    sections.decoding,
  ),
  Section(
    "One H200, newer kernels",
    "k = window = 512, bfloat16, beside a window of 1024; for training 969 million parameters "
    "twice as many, and generation is by that model. Each line was measured side by side in one "
    "run; lines of different runs may be of different machines.",
    ("train_h200.json", "train_1b_h200.json", "attention_h200.json", "decode_h200.json"),
    "python -m experiments.benchmark --suite=train --preset=gpt2_small --lengths=32768",
    sections.one_card,
  ),
  Section(
    "Where the time of a training step goes",
    "110 million parameters, 32768 tokens, bfloat16, k = window = 512, beside a window of 1024: "
    "milliseconds of the kernels of each kind, from a trace of five steps on one H200.",
    ("train_kernels_h200.json",),
    "python -m experiments.benchmark --suite=train --preset=gpt2_small --lengths=32768",
    sections.kernel_times,
  ),
  Section(
    "Time and memory on a CPU",
    "Plain XLA, float32, 2 heads of 64 on one of keys, k = window = 128, forward and backward "
    "together.",
    ("linear_cpu.json",),
    "python -m experiments.benchmark --lengths=4096,16384 --k=128 --window=128",
    sections.linear,
  ),
  Section(
    "Kernels for TPUs",
    "Read from compiled executables, forward and backward: bytes moved and FLOPs over those of "
    "splash attention with a window of the same budget. Nothing here was timed.",
    ("attention_tpu_compiled.json",),
    "python -m tests.kernels.tpu.compiler",
    sections.tpu,
  ),
  Section(
    "Kinds of attention at the same budget",
    "A dense model of 32.5 million parameters learns from 98 million tokens in rows of 2048, then "
    "each kind goes on from it for 16.4 million tokens in rows of 8192. Three seeds a round; "
    "loss of 55 held-out documents above full attention's, of text and of text with answers, and "
    "right answers to 50 distinct prompts a task (the same for each seed; recall asks four "
    "questions of each), in documents of 4096 tokens, at least 1024 back. The first round, with "
    "three other starts, is summarised: six starts in all.",
    ("baselines.json", "baselines_first.json"),
    "python -m experiments.recipes.baselines",
    sections.baselines,
  ),
  Section(
    "The layout from the start",
    "The same model with windows of 256 in five layers and full attention in the last from its "
    "first step on, then in rows of 8192 one of these in the last layer. Three seeds, the held-out "
    "documents and prompts of above; losses above full attention's.",
    ("baselines_local.json",),
    'python -m experiments.recipes.baselines --only="^dense_s|(^|_)full(_s|$)|(^|_)local"',
    sections.layouts,
  ),
  Section(
    "k and window",
    "The same model, every layer alike, from one dense start; loss of text with answers.",
    ("baselines_grid.json",),
    "python -m experiments.ablate --base=experiments/recipes/baselines_tune.flags",
    sections.grid,
  ),
  Section(
    "The budget in one of six layers",
    'One seed, with the defaults of the time. "fourth": the fourth layer has most of the budget, '
    '"third_and_sixth": these two share it. "mix": text and answers.',
    ("baselines_allocation.json",),
    "python -m experiments.recipes.baselines",
    sections.runs,
  ),
  Section(
    "Masks inside the softmax",
    "An earlier round of the same recipe, summarised: two gates that have been removed since. "
    '"mix": text and answers.',
    ("baselines_gates.json",),
    "python -m experiments.recipes.baselines",
    sections.gates,
  ),
  Section(
    "How scorers are taught",
    "The recipe again, with data of newer packages, on one machine of two cards; its docstring "
    "has the rule, fixed before the runs, by which the default was to be chosen. sparsek_512 is "
    "the default of the time: the divergence from mean attention. Names add what differs: the "
    "largest attention as target (max), times the norm of the value, 512 queries in place of 128 "
    "(queries), a ranking at the cut against that target (ranking) or against the mean "
    "(ranking_mean), soft gates that become hard (anneal), the gate value, no such loss. The two "
    "youngest kinds are judged on starts 2 and 3 alone. ranking has more right answers than "
    "sparsek_512 in each start, at less loss on text, and teaches conversions. It is not the "
    "default: from the start of training it had more loss on text in two of two starts "
    "(ranking_from_scratch.txt). What lost is gone from the code. "
    "anneal, with the least loss on text, stays as an option. Few answers are right, of full "
    "attention too: the tasks ask in words that the models have not seen, and starts differ more "
    "than kinds.",
    ("baselines_teaching.json", "baselines_teaching_more.json"),
    "python -m experiments.recipes.baselines --seeds=2",
    sections.taught,
  ),
  Section(
    "One letter worth keeping",
    "A model of two layers, whose text has one capital letter that comes again and again; nats a "
    "letter.",
    ("scorer_letters.json",),
    "python -m experiments.ablate --base=experiments/recipes/scorer_letters.flags",
    sections.grid,
  ),
  Section(
    "Bytes from scratch",
    'Models at the demo\'s size, 256 bytes of source text a row; nats a byte. "loss": with the '
    "scorers' loss.",
    ("scorer_bytes.json",),
    "python -m experiments.ablate --base=experiments/recipes/scorer_bytes.flags",
    sections.grid,
  ),
  Section(
    "33 million tokens from scratch",
    "Models of 16 million parameters in rows of 4096 tokens, half of them of tasks: no kind uses "
    "distance yet.",
    ("scorer_4k_33m.json",),
    "python -m experiments.pretrain",
    sections.from_scratch,
  ),
  Section(
    "SmolLM2-135M converted",
    "Weights in Q4_1, made floats. Rows of 8192 tokens, 1024 keys a query, of which SPARSEK "
    "chooses 256: before any training (of SPARSEK: after its scorers' warm-up), after 5.2 million "
    "tokens of documents, and after 2.0 million more that need recall. Loss of 14 held-out "
    "documents. Needles are among 16, at 8192 tokens, at least 1024 back, in 60 distinct prompts; "
    "the checkpoints after the training for recall answer. Three seeds.",
    ("smollm2_convert.json",),
    "python -m experiments.recipes.smollm2_convert --examples=60",
    sections.conversion,
  ),
  Section(
    "Qwen2.5-Coder-0.5B beside evictors",
    "Weights in Q4_K_M, made floats. 2048 keys a query of all kinds but dense, in rows and prompts "
    "of 16384 tokens; after 4.0 million tokens for scorers (sparsek, kvzap), which is called no "
    "training, and 20.1 million for all parameters of every kind alike. RULER has 50 prompts of "
    "each of 13 tasks, HumanEval 164 problems; both greedy, in percent. The recipe's docstring has "
    "the protocol and the goals, fixed before the runs.",
    ("qwen_convert.json",),
    "python -m experiments.recipes.qwen_convert",
    evictors_report.lines,
    is_awaited=True,
  ),
  Section(
    "RULER by three programs",
    "SmolLM2-135M as converted, with 1024 keys a query, and with full attention, both tuned on the "
    "same 5.2 million tokens of documents; bfloat16, 20 prompts of each task and length. The same "
    "prompts by `evaluate-ruler`, by lm-eval through its model `sparsek`, and by lm-eval through "
    "its model `hf`, which is the exported PyTorch file in transformers. Scores in percent, as "
    "RULER counts them.",
    (
      "ruler_smollm2_h200.json",
      "ruler_smollm2_h200_lm_eval.json",
      "ruler_smollm2_h200_transformers.json",
    ),
    "python -m experiments.recipes.ruler_tools --lengths=4096,8192 --prompts=20",
    ruler_report.lines,
  ),
  Section(
    "RULER at 16384 tokens",
    "The same converted model, twice as many tokens as SmolLM2 was trained on: 13 tasks, 50 "
    "prompts each, on one H200. Scores in percent with 95 % intervals over prompts, and what took "
    "how long.",
    ("ruler_16k_h200.json",),
    "python -m experiments.evaluate_ruler --lengths=16384 --prompts=50 --dtype=bfloat16",
    ruler_report.at_length,
  ),
  Section(
    "Which layers need distance",
    "SmolLM2-135M (Q4_1 weights): the rise of the loss when a layer alone sees 128 of 2048 tokens; "
    "the eight layers that need more most, counted from 0.",
    ("smollm2_reach.json",),
    "python -m experiments.layer_reach --seq_len=2048 --eval_batches=4 --window=128 --budget=256 "
    "--long_layers=6",
    sections.reach,
  ),
  Section(
    "Logits beside transformers",
    "Models whose weights were dequantised, in float32: the largest differences of logits.",
    ("smollm2.json", "qwen05.json"),
    "python -m experiments.recipes.gguf_model --folder=data/smollm2",
    sections.parity,
  ),
  Section(
    "Decoding beside the parallel forward",
    "A small model on a CPU: logits of tokens that are fed in chunks or one by one, in standard "
    "deviations of the logits.",
    ("long_decode.json", "long_decode_1m.json"),
    "python -m tests.generation.long_decode",
    sections.long_decode,
  ),
  Section(
    "The demo",
    "Tiny models on a CPU: % of right answers by the number of words from a pass "
    "key to the question for it, for each of two random starts. Each of two layers lets a word see "
    "8 words, itself included, with full attention all; guessing gives 3 %.",
    ("demo.json",),
    "make demo",
    sections.demo,
  ),
  Section(
    "The demo on text",
    "240 steps on source text on a CPU, held-out loss in nats a byte in rows of 1024.",
    ("demo.jsonl",),
    "make demo-text",
    sections.demo_text,
  ),
)


def page() -> str:
  """Returns the whole page."""
  return (
    "\n".join(
      [HEAD, *(line for section in SECTIONS if section.is_shown for line in section.page())]
    )
    + "\n"
  )


def main(options: argparse.Namespace) -> None:
  """Writes the page."""
  files.save(options.path, page())


def make_parser() -> argparse.ArgumentParser:
  """Returns the parser of the script's argument."""
  return script.page_parser(__doc__, PAGE, "experiments.reports.results_page")


if __name__ == "__main__":
  script.run(main, make_parser())
