"""The flag --model: fields of the model that have no flag of their own, and their old flags."""

import dataclasses

import pytest
from absl import flags as absl_flags

from sparsek.command_line import flagfiles, model_fields
from sparsek.command_line.configs import model_config, override_config
from sparsek.command_line.definer import into_string, names_of, not_default
from sparsek.command_line.main import parse
from sparsek.command_line.training_flags import define_pretrain_flags
from sparsek.config import TransformerConfig
from sparsek.errors import UsageError
from sparsek.experiments import import_hf
from sparsek.experiments.bench.flags import define_flags as define_benchmark_flags
from sparsek.runs import settings

VALUES = {  # a value of each field that is not its default
  "positions": "learned",
  "max_positions": 99,
  "rope_fraction": 0.5,
  "rope_scaling": "linear:2",
  "norm": "layer_norm",
  "norm_eps": 1e-5,
  "qk_norm": True,
  "mlp": "gelu",
  "use_bias": True,
  "out_bias": True,
  "mlp_bias": True,
  "parallel_residual": True,
  "tie_embeddings": False,
}
OLD = {  # flags of version 0.1 -> what they set
  "--positions=learned": {"positions": "learned"},
  "--max_positions=99": {"max_positions": 99},
  "--rope_fraction=0.5": {"rope_fraction": 0.5},
  "--rope_fraction=.5": {"rope_fraction": 0.5},
  "--rope_scaling=llama3:8:1:4:8192": {"rope_scaling": ("llama3", 8.0, 1.0, 4.0, 8192.0)},
  "--norm=layer_norm": {"norm": "layer_norm"},
  "--qk_norm": {"qk_norm": True},
  "--mlp=gelu_tanh": {"mlp": "gelu_tanh"},
  "--use_bias": {"use_bias": True},
  "-use_bias": {"use_bias": True},
  "--nouse_bias": {"use_bias": False},
  "--use_bias=true": {"use_bias": True},
  "--use_bias=0": {"use_bias": False},
  "--out_bias": {"out_bias": True},
  "--mlp_bias": {"mlp_bias": True},
  "--parallel_residual": {"parallel_residual": True},
  "--notie_embeddings": {"tie_embeddings": False},
}


def parsed(*arguments, say=lambda line: None):
  values = absl_flags.FlagValues()
  define_pretrain_flags(values)
  parse(["pretrain", *arguments], values, say)
  return values


def test_every_field_of_a_model_can_be_given():
  own_flags = set(names_of(parsed()))
  fields = {field.name for field in dataclasses.fields(TransformerConfig)} - {"vocab_size"}
  assert set(model_fields.FIELDS) == set(VALUES) == fields - own_flags
  assert set(flagfiles.TO_MODEL) == fields - own_flags - {"norm_eps"}  # that never was a flag


@pytest.mark.parametrize("name", VALUES)
def test_each_field_reaches_the_model(name):
  config = model_config(parsed(f"--model={name}={VALUES[name]}"))
  changed = dataclasses.replace(config, **{name: VALUES[name]})
  assert changed == config and getattr(config, name) != getattr(model_config(parsed()), name)


@pytest.mark.parametrize(
  "arguments, text",
  [
    (["--model=norm=layer_norm,rope_fraction=0.5"], "rope_fraction=0.5,norm=layer_norm"),
    (["--model", "norm=layer_norm", "--model=norm_eps=.5"], "norm=layer_norm,norm_eps=0.5"),
    (["--model=mlp=gelu", "--model=mlp=swiglu,use_bias=t"], "mlp=swiglu,use_bias=true"),
  ],
)
def test_fields_add_up_and_have_one_text(arguments, text):
  values = parsed("--workdir=w", *arguments)
  assert not_default(values) == f"--model={text}\n"
  assert f"--model={text}\n" in into_string(values)


def test_a_field_that_has_a_flag_is_that_flag():
  values = parsed("--model=k=7,attention=sparsek*3,full,scan_layers=false")
  assert not_default(values) == "--k=7\n--layer_pattern=sparsek*3,full\n--noscan_layers\n"
  with pytest.raises(UsageError, match="--attention=full and --layer_pattern=full exclude"):
    model_config(parsed("--attention=full", "--model=attention=full"))


@pytest.mark.parametrize(
  "argument, words",
  [
    ("--model=", ["--model=:", "FIELD=VALUE"]),
    ("--model", ["--model", "Missing value"]),
    ("--model=mlp", ["--model=mlp:", "FIELD=VALUE"]),
    ("--model=depth=3", ["--model=depth=3", "'depth'", "one of positions", "tie_embeddings"]),
    ("--model=vocab_size=9", ["--model=vocab_size=9", "'vocab_size'"]),
    ("--model=workdir=w", ["--model=workdir=w", "'workdir'"]),
    ("--model=norm_eps=1e-5,mlp=relu", ["--model=mlp=relu", "one of swiglu, gelu, gelu_tanh"]),
    ("--model=max_positions=1.5", ["--model=max_positions=1.5", "an integer above 0"]),
    ("--model=max_positions=2147483648", ["max_positions=2147483648", "at most 2147483647"]),
    ("--model=max_positions=1", ["--model=max_positions=1", "at least 2"]),
    ("--model=norm_eps=nan", ["--model=norm_eps=nan", "a number above 0"]),
    ("--model=norm_eps=-1", ["--model=norm_eps=-1", "a number above 0"]),
    ("--model=rope_fraction=2", ["--model=rope_fraction=2.0", "at most 1"]),
    ("--model=rope_scaling=cubic:2", ["--model=rope_scaling=cubic:2", "linear:FACTOR"]),
    ("--model=rope_scaling=", ["--model=rope_scaling=:", "empty"]),
    ("--model=use_bias=maybe", ["--model=use_bias=maybe", "true or false"]),
    ("--use_bias=maybe", ["--model=use_bias=maybe", "true or false"]),
    ("--rope_fraction=a", ["--model=rope_fraction=a", "a number above 0"]),
    ("--rope_fraction", ["--model=rope_fraction", "FIELD=VALUE"]),
    ("--model=k=0", ["--k=0", "at least 1"]),
    ("--nomodel=norm=layer_norm", ["unknown flag --nomodel"]),
    ("--nonorm", ["unknown flag --nonorm"]),
    ("--nonorm=layer_norm", ["unknown flag --nonorm"]),
    ("--nouse_bias=false", ["unknown flag --nouse_bias"]),
    ("--norm=layer_norm,use_bias=true", ["--model=norm=layer_norm,use_bias=true", "one of rms_"]),
  ],
)
def test_what_is_refused_names_flag_field_and_value(argument, words):
  with pytest.raises(UsageError) as error:
    model_config(parsed(argument))
  message = str(error.value)
  assert all(word in message for word in words) and "\n" not in message, message


@pytest.mark.parametrize("line", OLD)
def test_old_flags_set_the_same_fields(line, tmp_path):
  (tmp_path / "flags.txt").write_text(f"--workdir=w\n{line}\n")
  for arguments in ([f"--flagfile={tmp_path}/flags.txt"], ["--workdir=w", line]):
    config = model_config(parsed(*arguments))
    assert {name: getattr(config, name) for name in OLD[line]} == OLD[line]


def test_an_old_flag_may_have_its_value_in_the_next_word():
  config = model_config(parsed("--rope_fraction", "0.5", "--use_bias", "--norm", "layer_norm"))
  assert (config.rope_fraction, config.use_bias, config.norm) == (0.5, True, "layer_norm")


def test_the_command_line_wins_field_by_field_in_either_spelling(tmp_path):
  path = tmp_path / "old.flags"
  path.write_text("--rope_fraction=0.5\n--use_bias\n--norm=layer_norm\n")
  said = []
  words = ["--model=rope_fraction=0.25", "--nouse_bias"]
  values = parsed(f"--flagfile={path}", *words, say=said.append)
  config = model_config(values)
  assert (config.rope_fraction, config.use_bias, config.norm) == (0.25, False, "layer_norm")
  ends = "of the command line"
  assert said == [
    f"--model=rope_fraction=0.5 in {path} gives way to --model=rope_fraction=0.25 {ends}",
    f"--model=use_bias=true in {path} gives way to --model=use_bias=false {ends}",
  ]


def settings_of(*words):
  return settings.effective(settings.parse(["--workdir=/w", *words]))


@pytest.mark.parametrize("start", [(), ("--init_from=hf:/a/y",)])
def test_old_and_new_spelling_are_the_same_settings(start):
  old = ["--rope_fraction=0.5", "--use_bias", "--rope_scaling=linear:2", "--notie_embeddings"]
  new = "--model=tie_embeddings=false,use_bias=true,rope_scaling=linear:2,rope_fraction=0.5"
  there, here, other = settings_of(*start, *old), settings_of(*start, new), settings_of(*start)
  assert there == here and settings.differences(there, here) == []
  lines = settings.differences(other, here)
  assert len(lines) == 4 and all(line.startswith("--model=") for line in lines)
  before = "the default" if start else "1.0"
  assert f"--model=rope_fraction: {before} -> 0.5" in lines


def test_settings_that_an_earlier_version_recorded_are_no_difference():
  """It had a setting for each flag: of a preset the model's value, else None."""
  presets, imported = settings_of(), settings_of("--init_from=/a")
  assert {name: presets[name] for name in flagfiles.TO_MODEL} == {
    name: getattr(TransformerConfig, name) for name in flagfiles.TO_MODEL
  }
  assert "norm_eps" not in presets and "model" not in presets
  old = imported | dict.fromkeys(flagfiles.TO_MODEL)
  assert settings.differences(old, imported) == settings.differences(imported, old) == []


def test_runs_of_the_version_before_have_the_same_settings(tmp_path):
  (tmp_path / "flags.txt").write_text("--workdir=/a\n--rope_fraction=0.5\n--noqk_norm\n")
  (made,) = settings.of_folder(str(tmp_path))
  wanted = settings.parse(["--workdir=/a", "--model=rope_fraction=0.5"])
  assert settings.differences(made, settings.effective(wanted)) == []
  wanted = settings.parse(["--workdir=/a", "--model=rope_fraction=0.25"])
  line = "--model=rope_fraction: 0.5 -> 0.25"
  assert settings.differences(made, settings.effective(wanted)) == [line]


def test_old_flags_are_unknown_where_what_replaced_them_is():
  values = absl_flags.FlagValues()
  define_benchmark_flags(values)
  with pytest.raises(UsageError, match="rope_fraction"):
    parse(["benchmark", "--rope_fraction=0.5"], values)


@pytest.mark.parametrize("words", [["--rivals=sparsek,dense"], ["--rivals", "sparsek,dense"]])
def test_rivals_are_baselines_now(words, tmp_path):
  (tmp_path / "old.flags").write_text("--rivals=xla\n")
  values = absl_flags.FlagValues()
  define_benchmark_flags(values)
  parse(["benchmark", f"--flagfile={tmp_path}/old.flags"], values)
  assert values["baselines"].value == "xla"
  parse(["benchmark", *words], values)
  assert values["baselines"].value == "sparsek,dense"
  with pytest.raises(UsageError, match="unknown flag --norivals"):
    parse(["benchmark", "--norivals"], values)


def test_an_imported_model_takes_fields_too():
  values = absl_flags.FlagValues()
  import_hf.define_flags(values)
  parse(["import_hf", "--model=rope_fraction=0.5", "--use_bias"], values)
  config = override_config(TransformerConfig(norm="layer_norm"), values)
  assert (config.rope_fraction, config.use_bias, config.norm) == (0.5, True, "layer_norm")
  with pytest.raises(UsageError, match="--model=lora_rank=3: 'lora_rank' must be one of"):
    parse(["import_hf", "--model=lora_rank=3"], values)
