"""The figures of README.md and docs/ are those of the records; the index of records is whole."""

import os
import re

import pytest

from experiments.reports import records, results_page
from experiments.reports import results_tables as tables
from tests import results_claims as claims
from tests.results_claims import MAP, README, RECIPES, Claim, Table, load

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
DOCUMENTS = (README, *(f"docs/{name}" for name in sorted(os.listdir(f"{ROOT}/docs"))))
NUMBER = r"([-+]?(?:\d[\d,]*)?\.?\d+)"

TABLES = (
  Table(README, "attention", lambda: tables.attention_speed(load("attention_h100.json"))),
  Table(README, "training", lambda: tables.training_speed(load("train_h100.json"))),
  Table(README, "decoding", lambda: tables.decoding_speed(load("decode_h100.json"))),
  Table(README, "baselines", lambda: tables.baselines(load("baselines.json"))),
  Table(README, "layouts", lambda: tables.layouts(load("baselines_local.json"))),
  Table(README, "conversion", lambda: tables.conversion(load("smollm2_convert.json"))),
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
  Claim(README, "is {} % from its dense self in perplexity", lambda: [claims.rise("sparsek")]),
  Claim(
    README,
    "{} MB of plays and manuals",
    lambda: [sum(load("long_documents.json")["num_bytes"].values()) / 1e6],
  ),
  Claim(
    README,
    "or more, {} ± {} with 256 chosen ones, {} ± {} with 128, {} ± {} with 384; a window of 512 is "
    "at {} ± {}, the best of random keys at {} ± {}, full attention at {} (one seed,",
    lambda: [
      *claims.grid("sparsek", k=256, window=256),
      *claims.grid("sparsek", k=128, window=384),
      *claims.grid("sparsek", k=384, window=128),
      *claims.grid("sliding_window", window=512),
      *claims.best_random(),
      claims.losses(claims.local()["full"], "mixed")["0"],
    ],
  ),
  Claim(
    README,
    "A window of 256 and 128 chosen keys, {} ± {}, are enough",
    lambda: claims.grid("sparsek", k=128, window=256),
  ),
  Claim(
    README,
    "come within {} nats a letter of all keys ({}); with 2 random keys instead it is at {}, with a "
    "window of 8 alone at {}:",
    lambda: [
      claims.letters("sparsek", k=2, window=4)[0] - claims.letters("full")[0],
      claims.letters("full")[0],
      claims.letters("random", k=2, window=4)[0],
      claims.letters("sliding_window", window=8)[0],
    ],
  ),
  Claim(
    README,
    "of text ({}) and of text with answers ({}),",
    lambda: [
      claims.mean(claims.runs("baselines.json")["full"], length) for length in (None, "mixed")
    ],
  ),
  Claim(
    README,
    "closes {} % of the gap between a sliding window and full attention on text, {} % with answers",
    lambda: [
      claims.closed(claims.runs("baselines.json"), "sparsek_512_last", length)
      for length in (None, "mixed")
    ],
  ),
  Claim(
    README,
    "of fewer kinds) it was {} and {} %, over all six starts it is {} and {} %: in five of them {} "
    "to {} % with answers, in one {} %, where even full attention in the last layer alone closes "
    "{} %.",
    claims.gap_sentence,
  ),
  Claim(
    README,
    "With 1024 keys it is {} and {} % over all six, {} to {} % with answers in five,",
    claims.gap_sentence_1024,
  ),
  Claim(
    README,
    "SPARSEK is ahead of a window that is laid out alike by {} ± {} with 512 keys and {} ± {} with "
    "1024, of random keys by {} ± {} and {} ± {}; of a window of 512 in every layer by {} ± {}, of "
    "linear attention by {} ± {}.",
    lambda: claims.both_ahead(
      claims.pooled,
      claims.pairs(
        "sparsek_512_last-window_512_last",
        "sparsek_1024_last-window_1024_last",
        "sparsek_512_last-random_512_last",
        "sparsek_1024_last-random_1024_last",
        "sparsek_512_last-window_512",
        "sparsek_512_last-linear_512",
      ),
      "mixed",
    ),
  ),
  Claim(
    README,
    "On text alone it is level with the window laid out alike ({} ± {} ahead, {} ± {} behind).",
    lambda: claims.both_ahead(
      claims.pooled,
      claims.pairs("sparsek_512_last-window_512_last", "window_1024_last-sparsek_1024_last"),
      None,
    ),
  ),
  Claim(
    README,
    "With every layer alike it is ahead of the window by {} ± {} with 512 keys and {} ± {} with "
    "1024, of linear attention by {} ± {} and {} ± {} (five starts), of chosen blocks by {} ± {} "
    "and {} ± {} (three);",
    lambda: claims.both_ahead(
      claims.pooled,
      [
        (f"sparsek_{budget}", f"{kind}_{budget}")
        for kind in ("window", "linear", "block_topk")
        for budget in (512, 1024)
      ],
      "mixed",
    ),
  ),
  Claim(
    README,
    "and chosen blocks are {} ± {} and {} ± {} ahead.",
    lambda: claims.both_ahead(
      claims.pooled,
      claims.pairs("block_topk_512-sparsek_512", "block_topk_1024-sparsek_1024"),
      None,
    ),
  ),
  Claim(README, "finds {} and {} % of the passkeys.", claims.far_passkeys),
  Claim(
    README,
    "it found {} % of the passkeys in the first round",
    lambda: [claims.right("baselines_first.json", "sparsek_512", "passkey", 4096)],
  ),
  Claim(
    README,
    "(text {}, with answers {}, from dense starts of their own), SPARSEK with 512 keys by {} (",
    lambda: [
      *(claims.mean(claims.local()["full"], length) for length in (None, "mixed")),
      -claims.above_full("baselines_local.json", "sparsek_512_local", "mixed"),
    ],
  ),
  Claim(
    README,
    "SPARSEK is, with answers, ahead of the window by {} ± {} and {} ± {}, of random keys by {} ± "
    "{} and {} ± {}, and {} ± {} and {} ± {} behind full attention in the last layer;",
    lambda: [
      *claims.both_ahead(
        claims.local,
        [
          (f"sparsek_{budget}_local", f"{kind}_{budget}_local")
          for kind in ("window", "random")
          for budget in (512, 1024)
        ],
        "mixed",
      ),
      *claims.both_ahead(
        claims.local,
        claims.pairs("full_local-sparsek_512_local", "full_local-sparsek_1024_local"),
        "mixed",
      ),
    ],
  ),
  Claim(
    README,
    "beyond 16384 tokens its loss is {}, that of the window {}, of SPARSEK in every layer {}, with "
    "full attention in the last {}.",
    lambda: claims.far("baselines.json", "full", "window_512", "sparsek_512", "hybrid_512"),
  ),
  Claim(
    README,
    "full attention is at {}, SPARSEK at {}, full attention in the last layer at {}.",
    lambda: claims.far("baselines_local.json", "full", "sparsek_512_local", "full_local"),
  ),
  Claim(
    README,
    "the loss with answers is {} ± {} higher (five pairs over both rounds), without the scorers' "
    "loss alone, and a spread of 4, {} ± {}. The gate `value` is level with `straight_through` ({} "
    "± {} ahead, five pairs), as is `--scorer=conv` ({} ± {} ahead, five pairs); `key_value` is {} "
    "± {} behind (three), and masks inside the softmax, {} and {} behind in",
    claims.defaults,
  ),
  Claim(
    README,
    "six of 30 layers ({}, {}, {}, {}, {} and {}) have {} % of what all rise by together, when "
    "each sees {} of {} tokens",
    claims.reach,
  ),
  Claim(README, "standard errors of the loss at most {} (", claims.conversion_error),
  Claim(
    README,
    "SPARSEK closes {} % of the gap between the sliding window and full attention, and {} % of "
    "that which a window with sinks leaves. Trained for recall it finds every passkey at 4096 "
    "tokens and {} % at 8192, windows and random keys none; at 16384 tokens, with rotary angles "
    "left alone, {} %, full attention none. With full attention in every sixth layer it is at {} "
    "%. Before the warm-up SPARSEK is at {}; distilled from the dense model as it was, it is at {} "
    "when trained. Gated linear attention does not get over the change in so few tokens ({}). The "
    "stages took {} minutes in all",
    claims.conversion,
  ),
  Claim(
    README,
    "whose logits reach {} and which answers",
    lambda: [max(text["largest logit"] for text in load("smollm2.json")["logits"].values())],
  ),
  Claim(
    README,
    "Reading the weights once would take {} ms",
    lambda: [load("decode_h100.json")["rows"][0]["weights_ms"]],
  ),
  Claim(README, "{} to {} % of a row's step", claims.weight_shares),
  Claim(
    README,
    "A prompt of 131072 tokens is read in {} s, {} times as fast as by full attention, one of 8192 "
    "in {} ms ({}).",
    claims.prompts,
  ),
  Claim(README, "Rounds of transformers differ by up to a factor of {}.", claims.spread),
  Claim(
    README,
    "for {} and {} % of the tokens: now and then",
    lambda: claims.long_decode("share within 1e-5"),
  ),
  Claim(
    README,
    "which moved a logit by {} % of it at most",
    lambda: [max(claims.long_decode("largest"))],
  ),
  Claim(
    README,
    "At 32768 tokens that is {} times the sliding window and {} times faster than dense attention, "
    "at 131072 {} times and {} times, in {} times the window's memory. It is ahead of dense "
    "attention from {} tokens on. With 32 heads on 8 key heads it takes {} times the window's time "
    "at 32768, with heads of 64 {} times; with scores that rise, so that every token enters the "
    "selection, {} times.",
    claims.attention_ratios,
  ),
  Claim(
    README,
    "a step takes {} times as long as with one",
    lambda: [claims.speed("train_h100_packed.json") / claims.speed("train_h100_packed.json", 1)],
  ),
  Claim(
    README,
    "{} tokens per second at 32768 beside {} without",
    lambda: [claims.speed("train_h100_scorer_loss.json", i) for i in (1, 0)],
  ),
  Claim(
    README,
    "That is {} and {} of the sliding window's speed, {} and {} times that of full attention, {} "
    "times that of transformers' Llama compiled as a whole and {} times that of the same compiled "
    "layer by layer, at a model FLOPs utilization of {}, {} and {} %",
    lambda: [
      *(
        ratio
        for kind in ("sliding_window", "full", "transformers", "transformers_layers")
        for ratio in claims.speeds("train_h100.json", "sparsek", kind)
      ),
      *claims.mfu(),
    ],
  ),
  Claim(
    README,
    "A minute of real training on source text ran at {} (",
    lambda: [claims.last_step()["tokens_per_second"]],
  ),
  Claim(
    README,
    "There a step of {} ms spends {} % on matrix products",
    lambda: [32768e3 / claims.last_step()["tokens_per_second"], *claims.trace("matrix products")],
  ),
  Claim(
    README,
    "{} % on attention and {} % on thresholds and lists. Most of the other {} %",
    lambda: claims.trace("attention", "thresholds, lists", "all else"),
  ),
  Claim(
    README,
    "four times the tokens (4096 to 16384) take {} times the time and {} times the memory",
    claims.growth,
  ),
  Claim(
    README,
    "move {} to {} times the bytes of splash attention with a window of the same budget, with {} "
    "to {} times its FLOPs",
    lambda: claims.extremes("bytes_over_splash", "flops_over_splash"),
  ),
  Claim(
    README,
    "is ahead, at {} nats a byte to {} in rows of 1024",
    lambda: [line["loss"] for line in reversed(load("demo.jsonl"))],
  ),
  Claim(MAP, "three seeds, standard errors at most {};", claims.perplexity_error),
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


def test_a_changed_figure_is_seen():
  text, sentence = "it is .044 ± .027 ahead, at 402,800 tokens", "it is {} ± {} ahead, at {} tokens"
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
