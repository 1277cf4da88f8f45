"""Bad flags are refused in one sentence; good ones become the dataclasses, also through a
flagfile.
"""

import io
import sys

import pytest
from absl import flags as absl_flags

from sparsek.command_line import flags
from sparsek.command_line.configs import (
  model_config,
  override_config,
  train_config,
  unused_flags,
  warn_of_unused,
)
from sparsek.command_line.definer import into_string, not_default
from sparsek.command_line.main import parse, run
from sparsek.command_line.training_flags import define_pretrain_flags
from sparsek.errors import RunError, UsageError


def parsed(*arguments):
  values = absl_flags.FlagValues()
  define_pretrain_flags(values)
  flags.define_model_flags(values)  # a group may be asked for twice
  parse(["pretrain", *arguments], values)
  return values


def configs(*arguments):
  values = parsed(*arguments)
  return model_config(values, vocab_size=300), train_config(values)


@pytest.mark.parametrize(
  "arguments, words",
  [
    (["--kk=2"], ["kk", "nknown"]),
    (["--wrokdir=2"], ["wrokdir", "workdir"]),
    (["--k=0"], ["--k=0", "at least 1"]),
    (["--k=many"], ["--k=many", "integer"]),
    (["--k"], ["--k", "Missing"]),
    (["--seed=99999999999"], ["--seed=99999999999", "at most 2147483647"]),
    (["--learning_rate=nan"], ["--learning_rate=nan", "at least 0"]),
    (["--learning_rate=-1"], ["--learning_rate=-1", "at least 0"]),
    (["--b2=1"], ["--b2=1", "below 1"]),
    (["--gate=soft"], ["--gate=soft", "straight_through", "key_value"]),
    (["--preset=huge"], ["--preset=huge", "gpt2_small"]),
    (["--scan_layers=5"], ["--scan_layers=5", "true or false"]),
    (["--noscan_layers=5"], ["--noscan_layers=5", "does not take"]),
    (["stray"], ["stray", "--name=value"]),
    (["--flagfile=/nowhere/x.flags"], ["/nowhere/x.flags"]),
    (["--num_heads=5"], ["num_heads=5", "num_kv_heads=2"]),
    (
      ["--attention=full", "--layer_pattern=full"],
      ["--attention=full", "--layer_pattern=full", "exclude"],
    ),
    (["--layer_pattern=sparse*2"], ["sparse*2", "sliding_window"]),
    (
      ["--batch_size=9", "--grad_accumulation=2"],
      ["--batch_size=9", "grad_accumulation=2", "multiple"],
    ),
    (["--warmup_steps=50", "--num_steps=20"], ["--warmup_steps=50", "num_steps=20"]),
    (["--scorer=conv", "--window=2"], ["--scorer_lookahead=4", "window=2"]),
    (["--workdir="], ["--workdir=: must be a path, it is empty"]),
    (["--profile_steps=5:3"], ["--profile_steps=5:3", "A:B"]),
    (["--profile_steps=7"], ["--profile_steps=7", "A:B"]),
    (["--profile_steps=1:2:3"], ["--profile_steps=1:2:3", "A:B"]),
    ([f"--profile_steps=1:{'9' * 5000}"], ["--profile_steps=1:9", "A:B"]),
    (["--profile_steps=50:60", "--num_steps=4"], ["--profile_steps=50:60", "step 4 or before"]),
    (["--profile_steps=3:60", "--stop_at=2"], ["--profile_steps=3:60", "step 2 or before"]),
    ([f"--layer_pattern=full*{'9' * 5000}"], ["attention pattern", "KIND"]),
    ([f"--layer_pattern=sparsek:k{'9' * 5000}"], ["attention pattern", "KIND"]),
    (["--distill=.5"], ["--distill=0.5", "distill_from=None", "both or neither"]),
    (["--distill_from=hf:model"], ["--distill=0.0", "distill_from=hf:/", "/model"]),
    (["--distill=1.5"], ["--distill=1.5", "at most 1"]),
    (
      ["--scorer_warmup", "--scorer_loss=1"],
      ["--scorer_warmup=True", "trainable=all", "trainable=scorer"],
    ),
    (
      ["--scorer_warmup", "--trainable=scorer", "--scorer_loss=0"],
      ["--scorer_warmup=True", "scorer_loss above 0", "scorer_loss=0.0"],
    ),
    (["--spike_factor=0.5"], ["--spike_factor=0.5", "above 1"]),
    (["--on_spike=wait"], ["--on_spike=wait", "skip"]),
    (["--restore_step=-1"], ["--restore_step=-1", "at least 0"]),
    (["--scorer_loss_queries=0"], ["--scorer_loss_queries=0", "at least 1"]),
    (["--scorer_loss_kind=hinge"], ["--scorer_loss_kind=hinge", "ranking", "divergence"]),
    (["--gate_anneal=0.5"], ["--gate_anneal=0.5", "at least 1, or 0"]),
  ],
)
def test_bad_flags_are_refused_in_one_sentence(arguments, words):
  with pytest.raises(UsageError) as error:
    configs("--workdir=w", *arguments)
  message = str(error.value)
  assert all(word in message for word in words), message
  assert "\n" not in message


def test_defaults_are_the_presets():
  model, run = configs("--workdir=w", "--preset=mini")
  assert (model.embed_dim, model.k, model.vocab_size, model.dtype) == (384, 256, 300, "bfloat16")
  assert (run.optimizer.num_steps, run.optimizer.warmup_steps, run.data.seed) == (1000, 100, 0)


def test_flags_replace_fields():
  model, run = configs(
    "--workdir=w",
    "--layer_pattern=sparsek*3,full",
    "--k=7",
    "--model=qk_norm=true,tie_embeddings=false",
    "--num_steps=40",
    "--seed=3",
    "--nosegment_documents",
  )
  assert model.attention == ("sparsek", "sparsek", "sparsek", "full")
  assert (model.k, model.qk_norm, model.tie_embeddings) == (7, True, False)
  assert (
    run.optimizer.num_steps,
    run.optimizer.warmup_steps,
    run.seed,
    run.data.seed,
    run.data.segment_documents,
  ) == (40, 4, 3, 3, False)


def test_small_presets_scan_over_layers_where_the_pattern_fits():
  scans = lambda *arguments: configs("--workdir=w", *arguments)[0].scan_layers
  assert (
    scans("--preset=mini")
    and not scans("--preset=mini", "--noscan_layers")
    and not scans("--preset=gpt2_small")
  )
  assert scans("--preset=mini", "--layer_pattern=sparsek*3,full") and not scans(
    "--preset=mini", "--layer_pattern=sparsek*2,full"
  )


def test_flagfile_reproduces_the_run(tmp_path):
  arguments = [
    "--workdir=a b",
    "--gate=value",
    "--num_layers=2",
    "--learning_rate=3e-4",
    "--nosegment_documents",
    "--rope_theta=5e5",
  ]
  flagfile = tmp_path / "flags.txt"
  flagfile.write_text(into_string(parsed(*arguments)))
  assert configs(f"--flagfile={flagfile}") == configs(*arguments)


def test_attention_flags_alone_override_a_loaded_configuration():
  values = absl_flags.FlagValues()
  flags.define_attention_flags(values)
  parse(["generate", "--k=9", "--window=3"], values)
  loaded, _ = configs("--workdir=w", "--gate=value")
  config = override_config(loaded, values)
  assert (config.k, config.window, config.gate, config.vocab_size) == (9, 3, "value", 300)


@pytest.mark.parametrize(
  "error, code",
  [
    (UsageError("no such thing"), 2),
    (RunError("disk full"), 1),
    (NotImplementedError("implementation='mosaic_gpu' cannot run here"), 2),
  ],
)
def test_run_prints_one_line_and_exits(error, code, capsys):
  def main():
    raise error

  with pytest.raises(SystemExit) as exit_info:
    run(main, absl_flags.FlagValues(), ["script"])
  assert exit_info.value.code == code
  assert capsys.readouterr().err == f"error: {error}\n"


def test_run_keeps_the_traceback_of_a_bug():
  def main():
    raise ValueError("a bug")

  with pytest.raises(ValueError, match="a bug"):
    run(main, absl_flags.FlagValues(), ["script"])


def test_help_lists_flags_and_exits_0(capsys):
  values = absl_flags.FlagValues()
  flags.define_model_flags(values)
  with pytest.raises(SystemExit) as exit_info:
    run(test_defaults_are_the_presets, values, ["script", "--help"])
  assert exit_info.value.code == 0
  assert "--window" in capsys.readouterr().out


def test_help_lists_path_flags(capsys):
  values = absl_flags.FlagValues()
  flags.define_evaluation_flags(values)
  with pytest.raises(SystemExit):
    run(test_defaults_are_the_presets, values, ["script", "--help"])
  assert {"--workdir=PATHS", "--step=N"} <= set(capsys.readouterr().out.split())


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_a_terminal_without_utf8_ends_no_command(encoding, monkeypatch):
  stdout = io.TextIOWrapper(io.BytesIO(), encoding)
  monkeypatch.setattr(sys, "stdout", stdout)
  with pytest.raises(SystemExit) as exit_info:
    run(lambda: print("1 \u00b1 2 \u2192 \udcff"), absl_flags.FlagValues(), ["script"])
  stdout.flush()
  expected = "1 \u00b1 2 \u2192 \udcff\n".encode(encoding, "backslashreplace")
  assert exit_info.value.code == 0 and stdout.buffer.getvalue() == expected


@pytest.mark.parametrize(
  "arguments, written",
  [([], True), (["--init_from=a"], False), (["--init_from=a", "--preset=mini"], True)],
)
def test_a_flagfile_has_no_preset_that_would_exclude_another_model(arguments, written):
  text = into_string(parsed("--workdir=w", *arguments))
  assert ("--preset=" in text) == written


def test_what_is_not_default():
  values = parsed("--workdir=w", "--k=8", "--preset=tiny", "--noscan_layers", "--data=/d")
  assert sorted(not_default(values).splitlines()) == ["--data=/d", "--k=8", "--noscan_layers"]


def test_an_unknown_flag_of_a_very_long_name_is_refused():
  with pytest.raises(UsageError, match="unknown"):
    parsed("--" + "k" * 2000)


@pytest.mark.parametrize(
  "arguments, unused",
  [
    ([], []),
    (["--k=5", "--window=3", "--gate=value", "--scorer=random", "--scorer_loss=0"], []),
    (["--layer_pattern=sparsek:k3:w4", "--k=5", "--window=3"], ["--k=5", "--window=3"]),
    (["--layer_pattern=sparsek:k3,full", "--k=5", "--window=3"], ["--k=5"]),
    (["--attention=sliding_window", "--k=5", "--window=3"], ["--k=5"]),
    (
      ["--attention=full", "--k=5", "--window=3", "--gate=value", "--scorer=conv"],
      ["--k=5", "--window=3", "--gate=value", "--scorer=conv"],
    ),
    (
      ["--attention=full", "--scorer_loss=3", "--scorer_lr_multiplier=2"],
      ["--scorer_loss=3.0", "--scorer_lr_multiplier=2.0"],
    ),
    (["--attention=full", "--scorer_loss=1", "--scorer_lr_multiplier=5"], []),
    (["--scorer=random", "--scorer_loss=3"], ["--scorer_loss=3.0"]),
    (["--scorer=random", "--scorer_loss_kind=divergence"], ["--scorer_loss_kind=divergence"]),
    (["--scorer_lookahead=2"], ["--scorer_lookahead=2"]),
    (["--scorer=conv", "--scorer_lookahead=2", "--scorer_loss=3"], []),
  ],
)
def test_flags_that_no_layer_takes_are_said(arguments, unused, capsys):
  values = parsed("--workdir=w", *arguments)
  config = model_config(values)
  assert sorted(unused_flags(config, values)) == sorted(unused)
  warn_of_unused(unused_flags(config, values))
  lines = capsys.readouterr().err.splitlines()
  assert len(lines) == len(unused)
  assert all(any(f"warning: {flag} has no effect: " in line for line in lines) for flag in unused)


@pytest.mark.parametrize(
  "argument, message",
  [
    ("--steps=3", "unknown flag --steps; did you mean --num_steps?"),
    ("--noscan_layer", "unknown flag --noscan_layer; did you mean --scan_layers?"),
    ("--lr=1", "unknown flag --lr; --helpfull describes all flags"),
  ],
)
def test_unknown_flags_are_named_with_the_nearest(argument, message):
  with pytest.raises(UsageError) as caught:
    parsed(argument)
  assert str(caught.value) == message
