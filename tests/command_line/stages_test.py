"""The flag --stage: what a stage may set, how it is spelled out, and the flags of each stage."""

import pytest

from sparsek.command_line.configs import train_config
from sparsek.command_line.definer import into_string
from sparsek.command_line.stages import OF_A_STAGE, named, stages_of
from sparsek.errors import UsageError
from sparsek.runs.settings import effective, parse

WORKDIR = "--workdir=/w"


def test_a_stage_replaces_the_common_flags_and_the_folder_keeps_it_spelled_out(
  tmp_path, monkeypatch
):
  monkeypatch.chdir(tmp_path)
  (tmp_path / "warmup.flags").write_text("--scorer_warmup\n--trainable=scorer\n--num_steps=12\n")
  words = [
    WORKDIR,
    "--layer_pattern=sparsek*3,full",
    "--learning_rate=1e-2",
    "--stage=dense:--attention full --model=k=5  --data='two words'",
    "--stage=warm-up.2: --flagfile=warmup.flags --num_steps=7",
    "--stage=joint:",
    "--num_steps=40",
    "--profile_steps=45:46",
  ]
  values = parse(words)
  dense, warmup, joint = stages_of(values)
  assert [(stage.name, stage.begin) for stage in (dense, warmup, joint)] == [
    ("dense", 0),
    ("warm-up.2", 40),
    ("joint", 47),
  ]
  assert dense.text == f"--k=5 --attention=full '--data={tmp_path}/two words'"
  assert warmup.text == "--num_steps=7 --trainable=scorer --scorer_warmup"
  pattern = lambda stage: (stage.values.attention, stage.values.layer_pattern)
  assert pattern(dense) == ("full", None) and pattern(joint) == (None, "sparsek*3,full")
  trains = [train_config(stage.values) for stage in (dense, warmup, joint)]
  assert [train.optimizer.warmup_steps for train in trains] == [4, 0, 4]
  assert all(train.optimizer.learning_rate == 0.01 for train in trains)
  assert [train.profile_steps for train in trains] == [None, (5, 6), None]
  # the given flags stay, and the flags.txt of a run gives the same stages in any folder
  assert (values.attention, values.num_steps, values.profile_steps) == (None, 40, "45:46")
  kept = into_string(values)
  assert kept.count("--stage=") == 3
  (tmp_path / "flags.txt").write_text(kept)
  monkeypatch.chdir("/")
  assert effective(parse([f"--flagfile={tmp_path}/flags.txt"])) == effective(values)


def test_a_run_without_stages_is_one_without_a_name():
  values = parse([WORKDIR])
  (stage,) = stages_of(values)
  assert (stage.name, stage.text, stage.begin) == ("", "", 0) and stage.values is values
  assert "stage" not in effective(values)  # records of earlier versions have no such setting
  assert set(OF_A_STAGE) <= set(values)
  taught = {flag for flag in values if flag.startswith(("scorer_loss", "gate"))}
  assert taught <= set(OF_A_STAGE)


@pytest.mark.parametrize(
  ("stages", "message"),
  [
    (["warmup"], '--stage=warmup: must be "NAME: FLAGS", with a NAME of letters'),
    (['"a: --k=3"'], "in a flagfile without quotes around it"),
    ([""], '--stage=: must be "NAME: FLAGS"'),
    (["a: --fsdp=2"], "--fsdp=2 holds for the whole run: give it outside of stages"),
    (["a: --num_layers=2"], "--num_layers=2 holds for the whole run"),
    (["a: --model=qk_norm=true"], "--model=qk_norm=true holds for the whole run"),
    (["a: --stage=b:"], "holds for the whole run"),
    (["a: --num_stepp=2"], "unknown flag --num_stepp; did you mean --num_steps?"),
    (["a: --num_steps=0"], "--num_steps=0: must be an integer of at least 1"),
    (["a: --k='3"], "No closing quotation"),
    (["a: 3"], "unexpected argument '3'"),
    (["a: --flagfile=nowhere"], "--flagfile=nowhere: there is no file"),
    (["a:", "a: --k=3"], "--stage=a: two stages have this name"),
  ],
)
def test_a_bad_stage_is_refused(stages, message):
  with pytest.raises(UsageError) as error:
    stages_of(parse([WORKDIR, *(f"--stage={stage}" for stage in stages)]))
  assert message in str(error.value)


@pytest.mark.parametrize(
  ("steps", "message"),
  [
    ("5:6", "--profile_steps=5:6 must begin at step 4 or before"),
    ("0:1", "profile_steps="),
    ("3:2", "profile_steps="),
    ("x", "--profile_steps=x must be A:B"),
  ],
)
def test_a_trace_that_no_stage_has_is_refused(steps, message):
  values = parse([WORKDIR, "--num_steps=2", f"--profile_steps={steps}", "--stage=a:", "--stage=b:"])
  with pytest.raises(UsageError) as error:
    for stage in stages_of(values):
      with named(stage.name):
        train_config(stage.values)
  assert message in str(error.value)
