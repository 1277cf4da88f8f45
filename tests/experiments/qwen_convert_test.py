"""The recipe of Qwen's conversion: a rehearsal of all of it, and what its record says."""

import concurrent.futures
import copy
import dataclasses
import gzip
import importlib
import json
import os
import re
import types

import jax
import pytest
from absl import flags as absl_flags

from sparsek.command_line.configs import model_config, train_config
from sparsek.command_line.main import parse
from sparsek.config import TransformerConfig
from sparsek.data.corpus import Document
from sparsek.data.token_files import write_token_files
from sparsek.errors import UsageError
from sparsek.evaluation import statistics
from sparsek.experiments.bench import suites
from sparsek.experiments.recipes import qwen_convert as recipe
from sparsek.experiments.recipes import stages
from sparsek.experiments.reports import evictors_report, results_page
from sparsek.huggingface import pretrained
from sparsek.model.transformer import init_params
from tests.data.ruler_data import tokenizer, write_data
from tests.experiments.evaluate_humaneval_test import problem
from tests.helpers import run_command

QWEN = TransformerConfig(
  vocab_size=151936,
  num_layers=24,
  embed_dim=896,
  num_heads=14,
  num_kv_heads=2,
  head_dim=64,
  mlp_dim=4864,
  use_bias=True,
  attention="full",
)
SMALL = (
  "--k=8 --window=24 --seq_len=64 --eval_batches=1 --length=512 --prompts=2 --context=64 --seeds=2 "
  "--dtype=float32 --tasks=niah_single_1,fwe"
).split()


def options(*words):
  return recipe.make_parser().parse_args(words)


def test_every_command_parses_and_every_kind_learns_from_the_same_tokens():
  plan = recipe.stages(options())
  tokens, settings, budgets, sizes = {}, {}, {}, {}
  for name, (module, *words) in plan.items():
    values = absl_flags.FlagValues()
    stages.DEFINE[module](values)
    parse([module, *words], values)
    if module == "import_hf":
      config = model_config(values, pretrained=QWEN)
      sizes[name] = recipe.bytes_of_cache(config, 32768)
      budgets[name] = config.k + config.window if config.attention != ("full",) else None
    elif module == "pretrain":
      train = train_config(values)
      data, optimizer = train.data, train.optimizer
      kind, stage = evictors_report.kind_and_stage(name)
      tokens[kind, stage] = data.batch_size * data.seq_len * optimizer.num_steps
      settings.setdefault(stage, set()).add(dataclasses.replace(train, workdir="", init_from=""))
  assert {kind for kind, stage in tokens if stage == "warm"} == {"sparsek", "kvzap"}
  assert {count for (_, stage), count in tokens.items() if stage == "tuned"} == {20_054_016}
  assert {count for (_, stage), count in tokens.items() if stage == "warm"} == {3_997_696}
  assert [len(different) for different in settings.values()] == [2, 2]  # the seeds
  assert {budget for kind, budget in budgets.items() if kind != "dense"} == {2048}
  assert {size["keys_and_values"] for size in sizes.values()} == {2**25 * 12, 2**21 * 12}
  assert all(size["all"] < 1.04 * size["keys_and_values"] for size in sizes.values())
  assert list(budgets)[:2] == ["sparsek", "dense"] and len(budgets) == 8


def test_what_is_asked_of_which_run():
  plan = recipe.stages(options())
  asked = lambda what: {name.removeprefix(f"{what}_") for name in plan if name.startswith(what)}
  tuned = {f"{kind}_tuned{seed}" for kind in recipe.kinds(1, 1) for seed in ("", "_s1")}
  untrained = {evictors_report.untrained(kind) for kind in recipe.kinds(1, 1)}
  assert {"sparsek_warm", "kvzap_warm", "h2o"} < untrained
  assert asked("ruler") == asked("loss") == tuned | untrained
  assert asked("humaneval") == tuned | {"dense"}
  assert stages.needed(plan, "ruler_kvzap_tuned_s1") == {"kvzap_tuned_s1"}
  assert stages.needed(plan, "kvzap_tuned_s1") == {"kvzap_warm_s1"}
  assert stages.needed(plan, "kvzap_warm_s1") == {"kvzap"}
  assert stages.needed(plan, "speed") == {"sparsek"}


def test_tokens_are_timed_alone():
  begun = lambda *words: [
    name for name in recipe.stages(options()) if re.search(recipe.to_begin(options(*words)), name)
  ]
  assert begun("--only=^speed$") == ["speed"] and begun("--only=^speed$", "--at_once=2") == []
  many = begun("--at_once=4", "--only=dense|sinks")
  assert many == [
    name for name in recipe.stages(options()) if "dense" in name or re.search("(^|_)sinks", name)
  ]
  with pytest.raises(UsageError, match="must be a regular expression"):
    recipe.to_begin(options("--only=("))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """Makes model/, text/, ruler/ and problems.jsonl.gz, small ones of what the recipe reads."""
  folder = tmp_path_factory.mktemp("qwen")
  words = tokenizer()
  config = dataclasses.replace(
    QWEN,
    vocab_size=words.vocab_size,
    num_layers=1,
    embed_dim=16,
    num_heads=2,
    num_kv_heads=1,
    head_dim=8,
    mlp_dim=16,
    max_positions=4096,
  )
  pretrained.save(str(folder / "model"), config, init_params(config, jax.random.key(0)))
  words.save(str(folder / "model"))
  (folder / "model" / recipe.SOURCE).write_text(json.dumps({"model": "Toy, Q4_K_M"}))
  line = "the river carries old stones and a man walks over the walls {} times. "
  text = lambda i: "".join(line.format((i + 1) * j) for j in range(12))
  documents = [Document(str(i), text(i), i % 3 == 0) for i in range(12)]
  write_token_files(str(folder / "text"), documents, words)
  (folder / "ruler").mkdir()
  write_data(folder / "ruler")
  with gzip.open(folder / "problems.jsonl.gz", "wt") as file:
    file.writelines(json.dumps(problem(name, 1)) + "\n" for name in ("one", "two"))
  return folder


def words(folder, *more):
  training = (
    "--seq_len=64 --batch_size=2 --grad_accumulation=1 --num_steps=2 --warmup_steps=1 "
    "--checkpoint_every=1 --implementation=reference"
  )
  return [
    *SMALL,
    f"--model={folder}/model",
    f"--text={folder}/text",
    f"--ruler={folder}/ruler",
    f"--humaneval={folder}/problems.jsonl.gz",
    f"--workdir={folder}/runs",
    f"--record={folder}/record.json",
    f"--more={training}",
    "--ruler_flags=--batch_size=2",
    "--humaneval_flags=--batch_size=2 --max_new_tokens=4 --allow_network",
    *more,
  ]


class Here:
  """An executor that runs what it is given at once, in this thread, as signals need it."""

  def __init__(self, workers):
    assert workers == 1

  def __enter__(self):
    return self

  def __exit__(self, *_):
    pass

  def submit(self, function, *arguments):
    future = concurrent.futures.Future()
    future.set_result(function(*arguments))
    return future


@pytest.fixture
def ran(monkeypatch):
  """Lets stages run in this process, and returns the list of those that it ran.

  `ran.stop` is the name of a stage in the middle of which the recipe is killed.
  """

  class Ran(list):
    stop = ""

  names = Ran()

  def run_here(workdir, name, words, *_):
    if name == names.stop:
      raise KeyboardInterrupt
    names.append(name)
    module = importlib.import_module(f"sparsek.experiments.{words[0]}")
    values = suites.FLAGS if words[0] == "benchmark" else module.FLAGS
    assert run_command(module.main, values, *words[1:]) == 0, name
    return 1.0

  futures = types.SimpleNamespace(**vars(concurrent.futures) | {"ThreadPoolExecutor": Here})
  monkeypatch.setattr(stages, "concurrent", types.SimpleNamespace(futures=futures))
  monkeypatch.setattr(stages, "_run", run_here)
  return names


@pytest.mark.slow
def test_a_rehearsal_is_killed_and_goes_on_to_a_record_of_every_answer(folder, ran, capsys):
  some = "--only=dense|sparsek|^(.*_)?sinks|speed"
  given = options(*words(folder, some, "--seeds=1"))
  wanted = [name for name in recipe.stages(given) if re.search(given.only, name)]
  assert len(wanted) == 24
  ran.stop = "humaneval_sparsek_tuned"
  with pytest.raises(KeyboardInterrupt):
    recipe.main(given)
  assert not os.path.exists(given.record)
  ran.stop = ""
  recipe.main(given)
  assert sorted(ran) == sorted(wanted)
  recipe.main(given)
  assert len(ran) == len(wanted)
  told = capsys.readouterr().out
  record = json.loads(open(given.record).read())
  assert told.endswith("\n".join(evictors_report.lines(record)) + "\n")
  assert record["model"] == "Toy, Q4_K_M" and set(record["commands"]) == set(wanted)
  assert set(record["runs"]) == {
    *("dense", "dense_tuned", "sparsek_warm", "sparsek_tuned", "sinks", "sinks_tuned")
  }
  assert len(record["prompts"]) == 4 and set(record["prompts"][0]) == set(recipe.PROMPT)
  for name, run in record["runs"].items():
    assert run["trained_tokens"] == (0 if name in ("dense", "sinks") else 256), name
    assert [row["sha256"] for row in run["answers"]] == [
      row["sha256"] for row in record["prompts"]
    ] and {"answer", "score"} < set(run["answers"][0])
    asked = run.get("humaneval", {"answers": []})["answers"]
    assert len(asked) == (2 if name.endswith("tuned") or name == "dense" else 0), name
    assert run["documents"]["loss_sum"] and run["loss"] > 0
  sizes = {name: run["cache_bytes"]["keys_and_values"] for name, run in record["runs"].items()}
  assert {sizes[name] / sizes["dense"] for name in ("sparsek_tuned", "sinks")} == {0.5}
  assert record["runs"]["sparsek_tuned"]["cache_bytes"]["all"] > sizes["sparsek_tuned"]
  assert evictors_report.speed(record).keys() == {"sparsek", "dense"}
  assert [goal.verdict for goal in evictors_report.goals(record)].count("missing") == 1  # needles

  check_merging(folder, record, given, capsys)


def check_merging(folder, record, given, capsys):
  """Cuts a record into two, of which both hold a run, and joins them."""

  def part(path, *kinds, **changes):
    runs = {
      name: run
      for name, run in record["runs"].items()
      if evictors_report.kind_and_stage(name)[0] in kinds
    }
    made = copy.deepcopy({**record, "runs": runs, **changes})
    (folder / path).write_text(json.dumps(made))
    return made

  part("a.json", "dense", "sparsek")
  part("b.json", "sinks", "dense", speed=[])
  capsys.readouterr()
  together = f"--merge={folder}/a.json,{folder}/b.json"
  recipe.main(options(f"--record={folder}/joined.json", together))
  told = capsys.readouterr().out
  assert "dense_tuned: several records hold it; that of" in told and "sinks: several" not in told
  joined = json.loads((folder / "joined.json").read_text())
  assert joined["prompts"] == record["prompts"] and joined["speed"] == record["speed"]
  assert {name: run["session"] for name, run in joined["runs"].items()} == {
    name: int(not name.startswith("sparsek")) for name in record["runs"]
  }
  assert len(joined["sessions"]) == 2
  assert evictors_report.lines(joined) == evictors_report.lines(record)
  text = copy.deepcopy(record["runs"])
  text["sinks"]["text"] = "another"
  for message, changes in (
    ("has the protocol", {"protocol": record["protocol"] | {"k": 9}}),
    ("asked another prompt", {"prompts": [record["prompts"][0] | {"sha256": "0"}]}),
    ("the held-out texts differ", {"runs": text}),
  ):
    (folder / "b.json").write_text(json.dumps(record | changes))
    with pytest.raises(UsageError, match=message):
      recipe.main(options(f"--record={folder}/joined.json", together))


def made_record():
  """Returns a record of two seeds, three kinds and two tasks of twenty prompts."""

  def run(loss, needles, words, code, size):
    rows = {"niah_single_1": needles, "vt": words}
    return {
      "loss": loss,
      "cache_bytes": {"all": size + 1, "keys_and_values": size},
      "answers": [
        {"task": task, "sha256": f"{task}{i}", "score": 100.0 * (i < right)}
        for task, right in rows.items()
        for i in range(20)
      ],
      "humaneval": {"answers": [{"problem": str(i), "passed": i < code} for i in range(20)]},
    }

  runs = {
    "dense_tuned": run(2.0, 20, 16, 10, 160),
    "dense_tuned_s1": run(2.2, 20, 14, 10, 160),
    "sparsek_tuned": run(2.01, 20, 10, 10, 10),
    "sparsek_tuned_s1": run(2.21, 18, 8, 9, 10),
    "tova_tuned": run(2.1, 10, 4, 10, 10),
    "h2o_tuned": run(2.1, 4, 1, 10, 10),
  }
  speed = [{"rivals": {"sparsek": {"ms": 3.0}, "full": {"ms": 5.0}}}]
  return {"runs": runs, "speed": speed, "protocol": {"context": 32768}}


def test_goals_are_means_over_seeds_and_the_best_evictor_is_the_rival():
  record = made_record()
  goals = evictors_report.goals(record)
  perplexity, needles, below, above, code, size, milliseconds = goals
  assert perplexity.value == pytest.approx(1.0100502) and perplexity.verdict == "reached"
  assert needles.value == 0.95 and needles.verdict == "reached"
  assert below.value == 87.5 - 70 and below.verdict == "reached"
  assert above.value == 70 - 35 and above.note.startswith("tova: +")
  assert above.verdict == "reached, and the aim too"
  assert code.value == 2.5 and code.verdict == "failed"
  assert size.value == 1 / 16 and size.note == "with scores and positions 0.0683"
  assert milliseconds.value == 0.6 and milliseconds.verdict == "reached"
  first, second = (
    evictors_report.scores(evictors_report.seeds_of(record["runs"], kind, True))
    for kind in ("sparsek", "tova")
  )
  assert first["vt", "vt9"] == 50.0 and first["vt", "vt7"] == 100.0
  difference = statistics.paired_bootstrap([*first.values()], [*second.values()], [1] * 40)
  assert evictors_report.compare(first, second) == difference
  assert above.note == f"tova: {difference.low:+.1f} to {difference.high:+.1f}"
  assert not above._replace(also=False).verdict.startswith("reached")


def test_tables():
  page = "\n".join(evictors_report.lines(made_record()))
  assert "| sparsek | tuned, 2 seeds | 2.1100 | 1.0101 | 95.0 | 70.0 | 47.5 (28 to 68) |" in page
  assert "| niah_single_1 | 100.0 | 95.0 | 50.0 | 20.0 |" in page
  assert "| tova | 0.0 | 0.0688 | - |" not in page and "| sparsek | 0.0 | 0.0683 | 3.00 |" in page
  assert "| HumanEval, points below dense | 2.5000 | at most 2 | 0 | failed |" in page
  assert "| tova | +35.0 (" in page
  other = made_record()
  other["runs"]["tova_tuned"]["answers"].pop()
  with pytest.raises(UsageError, match="different prompts"):
    evictors_report.lines(other)


def test_the_page_of_results_has_the_section_as_soon_as_there_is_a_record(tmp_path, monkeypatch):
  monkeypatch.setattr(results_page.records, "FOLDER", str(tmp_path))
  (section,) = (one for one in results_page.SECTIONS if one.is_awaited)
  assert not section.is_shown
  (tmp_path / "qwen_convert.json").write_text(json.dumps(made_record()))
  assert section.is_shown and "| ... points above the best evictor |" in "\n".join(section.page())
  assert all(one.is_shown for one in results_page.SECTIONS if not one.is_awaited)
