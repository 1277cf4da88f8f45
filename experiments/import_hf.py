# ruff: noqa: E402 (see sparsek.command_line.main)
"""Import of a folder in Hugging Face's format as a run, and export of a run as such a folder.

  python -m experiments.import_hf --from=FOLDER --workdir=RUN
  python -m experiments.generate --workdir=RUN --prompt="The capital of France is"
  python -m experiments.import_hf --workdir=RUN --export=NEW_FOLDER

FOLDER holds config.json, model.safetensors (or shards and their index) and tokenizer.json, of the
families llama, mistral, qwen2, qwen3, gpt_neox and gpt2, or what --export wrote. RUN gets a
checkpoint of step 0 with float32 parameters, model.json and tokenizer/. With --attention=sparsek or
another kind, and flags for k, window and scorers, the model gets that kind of attention, without
any training; its scorers are new where FOLDER has none. Any run whose model fits a family can be
exported.

A SPARSEK model is exported with modeling_sparsek.py, with which transformers runs it:
AutoModelForCausalLM.from_pretrained(NEW_FOLDER, trust_remote_code=True). With --export_dense, and
where that file lacks a kind of attention or a scorer, other programs read the dense model with its
matrices, and only this library its SPARSEK attention, from the section "sparsek" of config.json.
README.md is a card with what the run's records hold; that of the run's folder is taken if there is
one. See sparsek/huggingface/pretrained.py.

RUN and NEW_FOLDER appear only when they are complete: repeat a command that failed or was killed.
"""

import dataclasses
import os
import sys
from collections.abc import Iterable
from typing import TypeVar

from absl import flags as absl_flags

from sparsek.command_line import outputs
from sparsek.command_line.configs import model_config, unused_flags, warn_of_unused
from sparsek.command_line.definer import Definer, into_string
from sparsek.command_line.flags import define_model_flags, define_step_flags
from sparsek.command_line.main import parse_first, run
from sparsek.command_line.terminal import said_if_slow
from sparsek.config import DataConfig
from sparsek.errors import RunError, UsageError
from sparsek.storage import files
from sparsek.storage.new_folder import new_folder


def define_flags(flag_values: absl_flags.FlagValues) -> None:
  """Defines the flags of this command."""
  define_model_flags(flag_values)
  define = Definer(flag_values)
  define.path("workdir", None, "Folder of a run: made by --from, read by --export. Required.")
  define.path("from", None, "Folder with config.json, safetensors and tokenizer.json to import.")
  define.path("export", None, "Folder to write config.json, safetensors and tokenizer.json to.")
  define.boolean(
    "export_dense",
    False,
    "Write a SPARSEK model as the dense model of its matrices. Other programs read that without "
    "trust_remote_code; by default transformers runs the model with its SPARSEK attention.",
  )
  define_step_flags(flag_values)


FLAGS = absl_flags.FlagValues()
define_flags(FLAGS)


def folders() -> tuple[str, str, str]:
  """Returns the folders of --workdir, --from and --export, "" for one that is not given."""
  workdir, source, target = (
    files.local_path(FLAGS[name].value or "", name) for name in ("workdir", "from", "export")
  )
  return workdir, source, target


def check_flags() -> None:
  """Raises UsageError without --workdir and one of --from and --export, or for an old folder."""
  workdir, source, target = folders()
  if not workdir:
    raise UsageError("--workdir is required: the folder of the run to make or to export")
  if bool(source) == bool(target):
    raise UsageError("give one of --from=FOLDER, to import, and --export=FOLDER")
  if FLAGS.export_dense and not target:
    raise UsageError("--export_dense goes with --export=FOLDER")
  outputs.check_new_folder(*(("workdir", workdir) if source else ("export", target)))


if __name__ == "__main__":
  parse_first(FLAGS, __doc__, check_flags)

import jax
from tqdm import tqdm

from sparsek.data import document_end
from sparsek.data.tokenizer import TOKENIZER_FILE, ByteTokenizer, Tokenizer, load_tokenizer
from sparsek.huggingface import pretrained, tokenizer_files
from sparsek.huggingface.config_writing import describe, why_not_sparse
from sparsek.huggingface.model_card import model_card
from sparsek.model.transformer import Params, count_params
from sparsek.runs import checkpoint, checkpoint_writer, orbax_errors, run_directory, run_record

T = TypeVar("T")


def progress(items: Iterable[T]) -> Iterable[T]:
  """Shows a bar while tensors are read or written."""
  return tqdm(items, unit="tensor", disable=None)


def import_folder(folder: str, workdir: str) -> None:
  """Reads the whole model, then writes the run, which appears only when it is complete."""
  if not os.path.isdir(folder):
    raise UsageError(f"--from={folder}: there is no such folder")
  tokenizer = load_tokenizer(folder)
  base = pretrained.load_config(folder)
  if tokenizer.vocab_size > base.vocab_size:
    raise UsageError(
      f"{folder}/tokenizer.json has ids up to {tokenizer.vocab_size - 1}, and the "
      f"model a vocab_size={base.vocab_size}"
    )
  ends = end_tokens(folder, tokenizer)
  config = model_config(FLAGS, pretrained=base)
  warn_of_unused(unused_flags(config, FLAGS))
  with said_if_slow(f"reading {folder} ..."):
    config, params = pretrained.load(
      folder, config=config, key=jax.random.key(0), progress=progress
    )
  data = DataConfig(data="", seq_len=config.max_positions, batch_size=1)
  record = {
    "model": dataclasses.asdict(config),
    "data": dataclasses.asdict(data),
    "tokenizer": {
      "name": tokenizer.name,
      "fingerprint": tokenizer.fingerprint,
      "vocab_size": tokenizer.vocab_size,
      "bos_ids": tokenizer.bos_ids,
      "eos_ids": ends,
    },
  }
  with checkpoint.quiet_orbax(), new_folder(workdir) as unfinished:
    with said_if_slow(f"writing {workdir} ..."):
      save_checkpoint(unfinished, workdir, params)
    tokenizer_files.copy(folder, os.path.join(unfinished, "tokenizer"))
    tokenizer.save_end(os.path.join(unfinished, "tokenizer"))
    to_json = run_directory.to_json
    records = {
      "flags.txt": into_string(FLAGS),
      "model.json": to_json(record),
      "versions.json": to_json(run_directory.versions()),
    }
    for name, text in records.items():
      files.write_atomically(os.path.join(unfinished, name), text)
  print(f"{workdir}: {count_params(params):,} parameters, attention {','.join(config.attention)}")


def save_checkpoint(unfinished: str, workdir: str, params: Params) -> None:
  """Writes the checkpoint of step 0. Raises RunError where that fails."""
  try:
    writer = checkpoint_writer.CheckpointWriter(unfinished, keep=1)
    writer.save(0, params, None, {})
    writer.close()
  except Exception as error:  # Orbax and tensorstore raise many kinds
    reason = (
      files.reason_of(error) if isinstance(error, OSError) else orbax_errors.first_line(error)
    )
    raise RunError(f"{workdir} cannot be written: {reason}") from error


def end_tokens(folder: str, tokenizer: Tokenizer) -> list[int]:
  """Returns the tokens that end a text, the end of a document first.

  The others are those of generation_config.json, or else config.json, as in transformers.
  """
  ids = document_end.ids_in(folder, document_end.GENERATION_CONFIG) or document_end.ids_in(
    folder, document_end.CONFIG
  )
  return [tokenizer.eos_id, *sorted({*ids} - {tokenizer.eos_id})]


def export_run(workdir: str, folder: str, step: int | None) -> None:
  """Writes the parameters of a run, and its tokenizer as other programs read it."""
  config, run = run_record.load_run_config(workdir)
  end = run_record.load_run_tokenizer(workdir).eos_id
  family = describe(config, dense=FLAGS.export_dense)["model_type"]
  reason, has_sparsek = why_not_sparse(config), "sparsek" in config.layer_kinds
  if reason and not FLAGS.export_dense:
    print(f"warning: {folder} is written as the dense model: {reason}", file=sys.stderr)
  if FLAGS.export_dense and not has_sparsek:
    print("warning: --export_dense has no effect: no layer is sparsek", file=sys.stderr)
  params, step = checkpoint.load_params(workdir, config, step, allow_older=FLAGS.allow_older_step)
  if config.positions != "learned":
    longest = max(config.max_positions, run["data"]["seq_len"])
    config = dataclasses.replace(config, max_positions=longest)
  others = [i for i in run["tokenizer"].get("eos_ids", ()) if i != end]
  ends = [end, *others] if others else end
  name = os.path.basename(os.path.abspath(folder))
  source = os.path.join(workdir, "tokenizer")
  if not os.path.isfile(os.path.join(source, TOKENIZER_FILE)):
    source = ByteTokenizer.name
  pretrained.save(
    folder,
    config,
    params,
    family=family,
    fields={"eos_token_id": ends},
    tokenizer=source,
    card=model_card(name, workdir, config, run, step, family),
    progress=progress,
  )
  print(f"{folder}: step {step} of {workdir}, {count_params(params):,} parameters")


def main() -> None:
  """Imports a folder with --from, exports a run with --export."""
  check_flags()
  workdir, source, target = folders()
  if source:
    import_folder(source, workdir)
  else:
    export_run(workdir, target, FLAGS.step)


if __name__ == "__main__":
  run(main, FLAGS)
