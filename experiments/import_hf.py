"""Imports a model from a folder in Hugging Face's format as a run, and exports a run as such a folder.

  python -m experiments.import_hf --from=FOLDER --workdir=RUN
  python -m experiments.generate --workdir=RUN --prompt="The capital of France is"
  python -m experiments.import_hf --workdir=RUN --export=NEW_FOLDER

FOLDER holds config.json, model.safetensors (or shards and their index) and tokenizer.json, of the families llama, mistral, qwen2, qwen3, gpt_neox and gpt2.
RUN gets a checkpoint of step 0 with float32 parameters, model.json and tokenizer/. With --attention=sparsek, or another kind, and flags of its k, window and
scorers it is the model with that attention before any training, and with new scorers where FOLDER has none. Any run of a model that a family can hold is
exported, a SPARSEK one with its fields in the section "sparsek" of config.json; what transformers reads of it is the dense model. See sparsek/pretrained.py.
"""

import dataclasses
import os
import shutil

import jax
from absl import flags as absl_flags
from tqdm import tqdm

from sparsek import checkpoint, flags, pretrained, run_directory, safetensors
from sparsek.config import DataConfig
from sparsek.errors import UsageError
from sparsek.model import count_params
from sparsek.tokenizer import load_tokenizer

FLAGS = absl_flags.FlagValues()       # apart from those of other scripts in the same process
flags.define_import_flags(FLAGS)


def progress(items):
  return tqdm(items, unit="tensor", disable=None)


def copy_tokenizer(source: str, target: str) -> None:
  os.makedirs(target, exist_ok=True)
  for name in pretrained.files_of_tokenizer(source):
    shutil.copyfile(os.path.join(source, name), os.path.join(target, name))


def import_folder(folder: str, workdir: str) -> None:
  """Reads the model, checks that its tokenizer fits, and writes what the other scripts read."""
  if not os.path.isdir(folder):
    raise UsageError(f"--from={folder}: there is no such folder")
  if os.path.exists(os.path.join(workdir, "model.json")):
    raise UsageError(f"--workdir={workdir} holds a run already: give a new folder")
  tokenizer = load_tokenizer(folder)
  config = flags.model_config(FLAGS, pretrained=pretrained.load_config(folder))
  config, params = pretrained.load(folder, config=config, key=jax.random.key(0), progress=progress)
  if tokenizer.vocab_size > config.vocab_size:
    raise UsageError(f"{folder}/tokenizer.json has ids up to {tokenizer.vocab_size - 1} (an end of document is added where it has none of the usual name), and "
                     f"the model a vocab_size={config.vocab_size}")
  with run_directory.lock(workdir):
    writer = checkpoint.CheckpointWriter(workdir, keep=1)
    writer.save(0, params, None, {})
    writer.close()
    copy_tokenizer(folder, os.path.join(workdir, "tokenizer"))
    record = {
        "model": dataclasses.asdict(config), "data": dataclasses.asdict(DataConfig(data="", seq_len=config.max_positions, batch_size=1)),
        "tokenizer": {"name": tokenizer.name, "fingerprint": tokenizer.fingerprint, "vocab_size": tokenizer.vocab_size,
                      "eos_ids": end_tokens(folder, tokenizer)}}
    run_directory.write_record(workdir, "flags.txt", flags.into_string(FLAGS))
    run_directory.write_record(workdir, "versions.json", run_directory.to_json(run_directory.versions()))
    run_directory.write_record(workdir, "model.json", run_directory.to_json(record))
  print(f"{workdir}: {count_params(params):,} parameters, attention {','.join(config.attention)}")


def end_tokens(folder: str, tokenizer) -> list[int]:
  """The tokens that end a text: the tokenizer's own end of document and those of generation_config.json, or else config.json."""
  for name in ("generation_config.json", "config.json"):
    path = os.path.join(folder, name)
    ids = safetensors.read_json(path).get("eos_token_id") if os.path.exists(path) else None
    ids = [ids] if isinstance(ids, int) else ids
    if isinstance(ids, list) and ids and all(isinstance(i, int) for i in ids):
      return sorted({*ids, tokenizer.eos_id})
  return [tokenizer.eos_id]


def export_run(workdir: str, folder: str, step: int | None) -> None:
  """Writes the parameters of a run, and its tokenizer where it is one that others read."""
  config, run = checkpoint.load_run_config(workdir)
  params, step = checkpoint.load_params(workdir, config, step, allow_older=FLAGS.allow_older_step)
  if config.positions != "learned":
    config = dataclasses.replace(config, max_positions=max(config.max_positions, run["data"]["seq_len"]))
  ends = run["tokenizer"].get("eos_ids", [checkpoint.load_run_tokenizer(workdir).eos_id])
  pretrained.save(folder, config, params, fields={"eos_token_id": ends if len(ends) > 1 else ends[0]}, progress=progress)
  copy_tokenizer(os.path.join(workdir, "tokenizer"), folder)
  print(f"{folder}: step {step} of {workdir}, {count_params(params):,} parameters")


def main() -> None:
  """Imports or exports."""
  workdir, source, target = (os.path.expanduser(FLAGS[name].value or "") for name in ("workdir", "from", "export"))
  if not workdir:
    raise UsageError("--workdir is required: the folder of the run to make or to export")
  if bool(source) == bool(target):
    raise UsageError("give one of --from=FOLDER, to import, and --export=FOLDER")
  if source:
    import_folder(source, workdir)
  else:
    export_run(workdir, target, FLAGS.step)


if __name__ == "__main__":
  flags.run(main, FLAGS)
