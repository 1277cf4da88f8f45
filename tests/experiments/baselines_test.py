"""The recipe of the baselines: its commands parse, kinds of one budget see as many keys. The order
in which stages run.
"""

import json
import os
import re
import shlex
import types

import pytest
from absl import flags as absl_flags

from sparsek.command_line.configs import model_config, train_config
from sparsek.command_line.definer import into_string
from sparsek.command_line.main import parse
from sparsek.command_line.training_flags import define_pretrain_flags
from sparsek.config import fields_of_kind
from sparsek.errors import UsageError
from sparsek.experiments import evaluate, evaluate_tasks
from sparsek.experiments.recipes import baselines, baselines_pairs, stages
from sparsek.experiments.reports import baselines_report
from sparsek.runs import run_directory, settings

SPARSEK = "--gate=straight_through --scorer_loss=1"
OPTIONS = types.SimpleNamespace(
  short="short",
  long="long",
  text="text",
  workdir="runs",
  lengths="2048,8192",
  sparsek=SPARSEK,
  more="--loss_chunk=512",
  seq_len=8192,
  examples=50,
  min_distance=1024,
  seeds=2,
  first_seed=0,
  eval_batches=24,
)


def test_other_seeds_have_the_same_stages():
  first, later = (
    baselines.stages(types.SimpleNamespace(**{**vars(OPTIONS), "first_seed": seed}))
    for seed in (0, 2)
  )

  def shifted(text):
    text = re.sub(r"(_s|--seed=)1(?!\d)", r"\g<1>3", text)
    return re.sub(r"(_s|--seed=)0(?!\d)", r"\g<1>2", text)

  assert later == {shifted(name): tuple(map(shifted, words)) for name, words in first.items()}


def test_every_command_parses_and_kinds_of_a_budget_see_as_many_keys():
  values = absl_flags.FlagValues()
  define_pretrain_flags(values)
  known = {"evaluate": evaluate.FLAGS, "evaluate_tasks": evaluate_tasks.FLAGS, "pretrain": values}
  plan = baselines.stages(OPTIONS)
  starts, tokens, seen = {}, set(), {}
  for name, (module, *words) in plan.items():
    for flag in known[module]:
      known[module][flag].unparse()
    parse([module, *words], known[module])
    if module != "pretrain":
      continue
    train = train_config(values)
    assert train.loss_chunk == 512 and train.seed == int(name[-1])
    if name.startswith(("dense", "local")):
      starts[name[:-3]] = model_config(values)
      continue
    start = "local" if "_local_" in name else "dense"
    assert train.init_from == os.path.abspath(f"runs/{start}_s{train.seed}")
    config = model_config(values, pretrained=starts[start])
    tokens.add(train.optimizer.num_steps * train.data.batch_size * train.data.seq_len)
    of_layer = lambda kind, layer: sum(
      getattr(layer, field) for field in ("k", "window") if field in fields_of_kind(kind)
    )
    if "full" not in config.layer_kinds:
      keys = [
        of_layer(kind, layer) for kind, layer in zip(config.layer_kinds, config.layer_configs)
      ]
      seen.setdefault(baselines_report.budget_of(name[:-3]), set()).add(sum(keys) / len(keys))
    else:
      assert baselines_report.budget_of(name[:-3]) is None
  assert seen == {512: {512.0}, 1024: {1024.0}} and tokens == {500 * 4 * 8192}
  assert stages.needed(plan, "window_512_s1") == {"dense_s1"} and stages.needed(
    plan, "loss_window_512"
  ) == {"window_512_s0", "window_512_s1"}


def test_the_record_is_of_what_is_finished(tmp_path, capsys):
  pytest.importorskip("matplotlib")
  for name, loss in (("full_s0", 2.0), ("window_512_s0", 3.0), ("window_512_s1", 3.5)):
    folder = tmp_path / name
    folder.mkdir()
    buckets = [{"last": last, "loss": loss, "num_targets": 9} for last in (63, 127)]
    evaluation = {"step": 1, "data": {"seq_len": 128}, "loss": loss, "num_targets": 18}
    (folder / "evaluation.jsonl").write_text(json.dumps({**evaluation, "buckets": buckets}) + "\n")
    (folder / "metrics.jsonl").write_text(
      json.dumps({"step": 1, "loss": 4.0})
      + "\n"
      + json.dumps({"step": 1, "heldout_loss": loss - 1})
      + "\n"
    )
    (folder / "versions.json").write_text("{}")
  (tmp_path / "minutes.json").write_text(
    json.dumps({"full_s0": 1.0, "window_512_s0": 1.0, "window_512_s1": 1.0, "loss_full": 1.0})
  )
  options = types.SimpleNamespace(
    **{
      **vars(OPTIONS),
      "workdir": str(tmp_path),
      "record": str(tmp_path / "record.json"),
      "collect": True,
    }
  )
  baselines.main(options)
  assert "| window_512 | 2 | 3.2500 (0.0734 to 6.4266) |" in capsys.readouterr().out
  record = json.loads((tmp_path / "record.json").read_text())
  assert set(record["runs"]) == {"full", "window_512"} and record["runs"]["full"]["seeds"]["0"][
    "mixed_loss"
  ] == {"1": 1.0}
  assert set(record["stages"]) == {
    "dense_s0",
    "dense_s1",
    "local_s0",
    "local_s1",
    *(f"{name}_s{seed}" for name in record["runs"] for seed in (0, 1)),
    *(f"{what}_{name}" for name in record["runs"] for what in ("loss", "tasks", "far")),
  }
  assert (tmp_path / "record.png").stat().st_size > 10_000


def test_pairs_over_the_records(capsys):
  """Compares with the figures of docs/results.md."""
  results = os.path.join(os.path.dirname(baselines.__file__), "..", "results")
  baselines_pairs.main(
    [os.path.join(results, name) for name in ("baselines.json", "baselines_first.json")]
  )
  printed = capsys.readouterr().out
  assert (
    "| sparsek_512_last | 6 |" in printed
    and "| 60% |" in printed
    and "| sparsek_512_last | 87% | 83% | 10% | 87% | 84% | 69% |" in printed
  )
  assert (
    "| window_512_last | -0.0004 (-0.0017 to +0.0010), p 1.000 | 6 | "
    "-0.0101 (-0.0119 to -0.0084), p 0.00" in printed
  )
  baselines_pairs.main([os.path.join(results, "baselines_local.json")])
  printed = capsys.readouterr().out
  assert (
    "| window_512_local | +0.0020 (-0.0040 to +0.0080), p 1.000 | 3 | "
    "-0.0075 (-0.0201 to +0.0050), p 0.860 | 3 |" in printed
  )
  assert "| full_local | 3 | 2.6525 (2.6346 to 2.6705) | -0.0456 (-0.0731 to " in printed


PLAN = {
  "c": ("pretrain", "--workdir=w/c", "--init_from=w/b"),
  "a": ("pretrain", "--workdir=w/a"),
  "b": ("pretrain", "--workdir=w/b", "--init_from=w/a"),
  "d": ("evaluate", "--workdir=w/a,w/c"),
}


@pytest.fixture
def run(tmp_path, monkeypatch):
  """Runs the stages of a plan that do nothing; those in `broken` fail."""
  monkeypatch.chdir(tmp_path)

  def stage(workdir, name, words, device, share, to_file):
    run.begun.append(name)
    assert (device in ("0", "1"), share, to_file) == (True, 0.45, True)
    if words[0] == "pretrain":
      os.makedirs(os.path.join(workdir, name), exist_ok=True)
      text = into_string(settings.parse(words[1:], stages.DEFINE[words[0]]))
      run_directory.write_record(os.path.join(workdir, name), "flags.txt", text)
    return None if name in run.broken else 0.5

  def run(plan=PLAN, **options):
    run.begun.clear()
    return stages.run_stages(plan, "w", "0,1", 3, **options)

  run.begun, run.broken = [], set()
  monkeypatch.setattr(stages, "_run", stage)
  return run


def test_stages_wait_go_on_and_say_what_failed(run):
  run.broken.add("b")
  with pytest.raises(SystemExit, match="did not get to their end: b; the same command goes on"):
    run()
  assert run.begun == ["a", "b"]
  run.broken.clear()
  assert set(run(only="b|d")) == {"a", "b"} and run.begun == ["b"]
  assert run() == dict.fromkeys("abcd", 0.5) and run.begun == ["b", "c", "d"][1:]


def changed(name, *words):
  return {**PLAN, name: (*PLAN[name], *words)}


def test_stages_that_other_flags_made_are_refused_or_done_again(run):
  assert set(run()) == set(PLAN)
  run(changed("a", "--k=64", "--keep_checkpoints=1"))
  assert run.begun == []
  plan = changed("b", "--k=8")
  with pytest.raises(
    UsageError,
    match=r"b \(--k: the default -> 8\); c \(follows from b\); "
    r"d \(follows from c\)\. .*--retrain",
  ):
    run(plan)
  assert run.begun == []
  assert set(run(plan, retrain=True)) == set(PLAN) and run.begun == ["b", "c", "d"]
  assert sorted(os.listdir("w/replaced")) == ["b", "c"]
  run(plan)
  assert run.begun == []
  with pytest.raises(UsageError, match=r"d \(--eval_batches: 32 -> 9\)"):
    run({**plan, "d": (*PLAN["d"], "--eval_batches=9")})


def test_stages_of_earlier_versions_are_compared_by_their_flags(run, capsys):
  run()
  os.remove("w/stages.json")
  run()
  assert run.begun == [] and "d: done by an earlier version" in capsys.readouterr().err
  with pytest.raises(UsageError, match=r"a \(--seed: 0 -> 1\)"):
    run(changed("a", "--seed=1"))
  run.broken.add("b")
  with pytest.raises(SystemExit):
    run(changed("b", "--seed=2"), retrain=True)
  with pytest.raises(UsageError, match=r"b \(--seed: 2 -> 0\)"):  # not at its end
    run()


def test_the_flags_of_sparsek_are_no_other_kinds():
  named = baselines.kinds(shlex.split(SPARSEK))
  assert all(
    ("--scorer_loss=1" in words)
    == (name.startswith(("sparsek", "hybrid")) and name != "sparsek_512_defaults")
    for name, words in named.items()
  )
  assert "sparsek_512_value" in named and "sparsek_512_straight_through" not in named
