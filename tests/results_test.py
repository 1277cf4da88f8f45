"""The figures of README.md and docs/ are those of the records; the index of records is whole."""

import os
import re

import pytest

from sparsek.evaluation.statistics import t_interval
from sparsek.experiments.reports import records, results_page, results_sections
from sparsek.experiments.reports import results_tables as tables
from sparsek.experiments.reports.baselines_report import losses, minus
from tests import results_claims as claims
from tests.results_claims import MAP, README, RECIPES, Claim, Table, load

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
PAGES = (name for name in sorted(os.listdir(f"{ROOT}/docs")) if name.endswith(".md"))
DOCUMENTS = (README, *(f"docs/{name}" for name in PAGES))
RESULTS = "docs/results.md"
NUMBER = r"([-+]?(?:\d[\d,]*)?\.?\d+)"

TABLES = (
  Table(
    README,
    "baselines",
    lambda: tables.quality_short(load("baselines.json"), tables.BASELINES_README),
  ),
  Table(
    MAP,
    "attention",
    lambda: tables.attention_speed_by_length(load("attention_h100.json"), (4096, 32768, 131072)),
  ),
  Table(MAP, "conversion", lambda: tables.conversion_short(load("smollm2_convert.json"))),
  Table(
    MAP, "baselines", lambda: tables.quality_short(load("baselines.json"), tables.BASELINES_SHORT)
  ),
  Table(
    MAP,
    "layouts",
    lambda: tables.quality_short(load("baselines_local.json"), tables.LAYOUTS_SHORT, ahead=True),
  ),
)

CLAIMS = (
  Claim(
    README, "is {} % from its dense self in perplexity after", lambda: [claims.rise("sparsek")]
  ),
  Claim(README, "RULER at 8192: {} % instead of {} %", claims.ruler),
  Claim(
    "docs/pretrained.md",
    "it has {} % of the 13 tasks at 8192 tokens and the dense model {} %",
    claims.ruler,
  ),
  Claim(
    README,
    "training by default, 110M parameters, 32768 tokens: tokens a second | {} | {} | |",
    lambda: [claims.speed("train_h200.json", 0, kind) for kind in ("sparsek", "sliding_window")],
  ),
  Claim(
    README,
    "the same without the scorers' loss | {} | {} | |",
    lambda: [claims.speed("train_h200.json", 1, kind) for kind in ("sparsek", "sliding_window")],
  ),
  Claim(
    README,
    "PyTorch with FlexAttention's window makes {}:",
    lambda: [claims.speed("train_h200.json", 1, "pytorch_window")],
  ),
  Claim(
    README,
    "attention, forward and backward, 8192 tokens: ms | {} | {} | {} |",
    lambda: claims.attention_times(8192, "attention_h200.json"),
  ),
  Claim(
    README,
    "the same, 131072 tokens: ms | {} | {} | {} |",
    lambda: claims.attention_times(131072, "attention_h200.json"),
  ),
  Claim(
    README,
    "generation, 969M parameters, after 8192 tokens, H100: ms a token | {} | | {} |",
    lambda: [claims.decoding()[0], claims.decoding()[3]],
  ),
  Claim(
    "docs/clusters.md",
    "over one device, 110M, rows of 32768 | {} | {} | {} |",
    lambda: claims.many_devices("data"),
  ),
  Claim(
    "docs/clusters.md",
    "over one device, 110M, one row of 262144 | {} | {} | {} |",
    lambda: claims.many_devices("context"),
  ),
  Claim(
    "docs/clusters.md", "969M, rows of 32768 | {} | {} | {} |", lambda: claims.many_devices("fsdp")
  ),
  Claim(
    "docs/clusters.md",
    "moments and batch take {} times the memory",
    lambda: claims.many_devices("fsdp", "argument_mib")[:1],
  ),
  Claim(
    "docs/clusters.md",
    "110M model on has {} tokens, that of two {} (",
    lambda: [claims.longest_row(mesh) for mesh in ("one device", "context 2")],
  ),
  Claim(
    "docs/clusters.md",
    "takes {} seconds a step, forward, backward and update, and {} GiB a device",
    claims.million,
  ),
  Claim(MAP, "three seeds, standard errors at most {}.", claims.perplexity_error),
  Claim(
    MAP,
    "SPARSEK is {} behind the window on text and {} ahead of it with answers.",
    lambda: [
      -claims.ahead(claims.runs("baselines.json"), "sparsek_1024", "window_1024", None)[0],
      claims.ahead(claims.runs("baselines.json"), "sparsek_1024", "window_1024", "mixed")[0],
    ],
  ),
  Claim(
    MAP,
    "full attention is at {} and {} and finds every needle",
    lambda: [claims.mean(claims.local()["full"], length) for length in (None, "mixed")],
  ),
  Claim(
    MAP,
    "With 1024 keys SPARSEK is {} ahead on both and finds every needle, where the window finds {} "
    "%.",
    lambda: [
      -claims.above_full("baselines_local.json", "sparsek_1024_local", "mixed"),
      claims.right("baselines_local.json", "window_1024_local", "needle", 4096),
    ],
  ),
  Claim(MAP, "{} to {} nats over three seeds, standard errors {} (", claims.bytes_from_scratch),
  Claim(
    MAP,
    "closes {} % on text and {} % with answers; the window laid out alike, in the second row, "
    "closes {} and {} % by itself.",
    claims.gaps,
  ),
  Claim(
    MAP,
    "perplexity of {} held-out documents divided by that of full attention",
    lambda: claims.converted_documents_and_prompts()[:1],
  ),
  Claim(
    MAP,
    "in each of {} prompts of 8192 tokens",
    lambda: claims.converted_documents_and_prompts()[1:],
  ),
  Claim(
    MAP,
    "loss of {} held-out documents in nats above full attention's, of text and of text with "
    "answers from far back, and needles among 16 found in {} prompts",
    claims.documents_and_prompts,
  ),
  Claim(
    RESULTS,
    "loss of {} held-out documents above full attention's, of text and of text with answers, and "
    "right answers to {} distinct prompts",
    claims.documents_and_prompts,
  ),
  Claim(
    RESULTS,
    "Loss of {} held-out documents. Needles are among 16, at 8192 tokens, at least 1024 back, in "
    "{} distinct prompts",
    claims.converted_documents_and_prompts,
  ),
  Claim(
    "docs/pretrained.md",
    "Losses are of {} held-out documents, answers of {} distinct prompts",
    claims.converted_documents_and_prompts,
  ),
  Claim(
    "docs/pretrained.md",
    "its perplexity is {} % above the dense model's after the same training, that of a window with "
    "the first 4 tokens {} %, that of a sliding window {} %.",
    lambda: [claims.rise(kind) for kind in ("sparsek", "sinks", "window")],
  ),
  Claim(
    "docs/pretrained.md",
    "this checkpoint is {} % above the dense model trained alike, and finds {} % of the needles at "
    "8192 tokens; the dense model finds {} %",
    lambda: [
      claims.rise("sparsek", "recall"),
      claims.recalled_by("sparsek"),
      claims.recalled_by("dense"),
    ],
  ),
  Claim(
    "docs/pretrained.md",
    "whose logits reach {}. Both answer",
    lambda: [max(text["largest logit"] for text in load("smollm2.json")["logits"].values())],
  ),
  Claim(
    "docs/ablations.md",
    "in five of six starts SPARSEK closes {} to {} % of the gap between a sliding window and full "
    "attention, in one {} %.",
    claims.gap_sentence,
  ),
  Claim(
    "docs/ablations.md",
    "The window laid out alike closes {} to {} % in these five, and nothing in the other one.",
    lambda: [claims.closed_by_start("window_512_last")[start] for start in (1, -1)],
  ),
  Claim(
    "docs/data.md",
    "it makes {} MB of plays and manuals",
    lambda: [sum(load("long_documents.json")["num_bytes"].values()) / 1e6],
  ),
  Claim(
    "docs/evaluation.md",
    "six of 30 layers ({}, {}, {}, {}, {} and {}) have {} % of what all rise by together, when "
    "each sees {} of {} tokens",
    claims.reach,
  ),
  Claim(
    "docs/generation.md",
    "takes {} ms a token after 8192 tokens and {} ms after a million, from a cache of {} MiB. The "
    "same model with full attention takes {} ms after 8192 tokens",
    claims.decoding,
  ),
  Claim(
    "docs/generation.md",
    "to 1e-5 of their standard deviation for {} and {} % of the tokens",
    lambda: claims.long_decode("share within 1e-5"),
  ),
  Claim("docs/questions.md", "four times the tokens take {} times the time", claims.growth),
  Claim(
    "docs/questions.md",
    "move {} to {} times the bytes of splash attention with a window of the same budget, with {} "
    "to {} times its FLOPs",
    lambda: claims.extremes("bytes_over_splash", "flops_over_splash"),
  ),
  *(
    Claim(
      f"{RECIPES}gpt2_small_{name}_h100.flags",
      "{} tokens a second, which makes {} hours",
      lambda index=index: [
        claims.speed("train_h100.json", index),
        10_000 * 524_288 / claims.speed("train_h100.json", index) / 3600,
      ],
    )
    for index, name in enumerate(("32k", "128k", "256k"))
  ),
  Claim(
    f"{RECIPES}train_minute_h100.flags",
    "{} tokens a second, loss {} -> {} in {} steps",
    lambda: [
      claims.last_step()["tokens_per_second"],
      *(line["loss"] for line in (load("train_h100_run.jsonl")[0], claims.last_step())),
      claims.last_step()["step"],
    ],
  ),
)


def read(document):
  """Returns the text of a document, on one line and without the marks of comments."""
  with open(f"{ROOT}/{document}", encoding="utf-8") as file:
    text = file.read()
  return re.sub(r"\s+", " ", re.sub(r"^# ", "", text, flags=re.M))


def unit(shown):
  """Returns the value of the last digit that a figure shows, "402,800": 100, ".05": .01."""
  if "." in shown:
    return 10.0 ** -len(shown.partition(".")[2])
  return 10.0 ** (len(shown) - len(shown.rstrip("0"))) if "," in shown else 1.0


def wrong(text, sentence, figures):
  """Returns (shown, figure) for each figure of a sentence that is not a record's, rounded."""
  pattern = NUMBER.join(map(re.escape, sentence.split("{}")))
  matches = re.findall(pattern, text)
  assert len(matches) == 1, f"not once in the document: {sentence}"
  shown = matches[0] if isinstance(matches[0], tuple) else matches
  pairs = list(zip(shown, figures, strict=True))
  return [
    (x, value)
    for x, value in pairs
    if abs(float(x.replace(",", "")) - value) > unit(x) / 2 + 1e-9 * abs(value)
  ]


@pytest.mark.parametrize("claim", CLAIMS, ids=lambda claim: claim.sentence[:50])
def test_figures_of_sentences_are_those_of_the_records(claim):
  assert wrong(read(claim.document), claim.sentence, claim.figures()) == []


@pytest.mark.parametrize("table", TABLES, ids=lambda table: f"{table.document}-{table.name}")
def test_tables_are_those_of_the_records(table):
  with open(f"{ROOT}/{table.document}", encoding="utf-8") as file:
    lines = file.read().splitlines()
  made = list(table.lines())
  starts = [i for i in range(len(lines)) if lines[i : i + 2] == made[:2]]
  assert made in [lines[i : i + len(made)] for i in starts]


def test_what_is_said_of_the_starts_is_so():
  """Says docs/attention-map.md of six and of three starts, and docs/ablations.md of six."""
  pooled = claims.pooled()
  ours, window = (losses(pooled[f"{kind}_512_last"], "mixed") for kind in ("sparsek", "window"))
  assert len(ours) == 6 and all(ours[start] < window[start] for start in ours)
  names = ("sparsek_512_last", "window_512_last")
  interval = t_interval(minus(*(pooled[name] for name in names)))
  assert interval.low < 0 < interval.high and interval.number == 6
  assert claims.closed_by_start("window_512_last")[0] < 0
  assert min(results_sections.local_p(claims.local())) > 0.1


def test_a_changed_figure_is_seen():
  text = "it is .044 ± .027 ahead, at 402,800 tokens"
  sentence = "it is {} ± {} ahead, at {} tokens"
  right = [0.0441, 0.0266, 402766.0]
  assert wrong(text, sentence, right) == []
  assert wrong(text.replace(".044", ".045"), sentence, right) == [(".045", 0.0441)]
  assert wrong(text, sentence, [0.0446, *right[1:]]) == [(".044", 0.0446)]
  assert wrong(text, sentence, [*right[:2], 402851.0]) == [("402,800", 402851.0)]
  with pytest.raises(AssertionError, match="not once in the document"):
    wrong("something else", sentence, right)


def test_the_page_of_results_is_what_the_records_make():
  with open(results_page.PAGE, encoding="utf-8") as file:
    assert file.read() == results_page.page(), "run python -m experiments.reports.results_page"


def test_every_record_is_in_the_index_once():
  with open(f"{records.FOLDER}/README.md", encoding="utf-8") as file:
    lines = [line.split(" | ") for line in file if line.startswith("| `")]
  assert all(len(cells) == 5 and all(cells) for cells in lines)
  names = [cells[0].removeprefix("| ").strip("`") for cells in lines]
  assert sorted(names) == sorted(set(os.listdir(records.FOLDER)) - {"README.md"})


@pytest.mark.parametrize("document", [*DOCUMENTS, "experiments/results/README.md"])
def test_linked_records_exist(document):
  with open(f"{ROOT}/{document}", encoding="utf-8") as file:
    links = re.findall(r"\]\(([^)#:]+)\)", file.read())
  folder = os.path.join(ROOT, os.path.dirname(document))
  assert [link for link in links if not os.path.exists(os.path.join(folder, link))] == []
