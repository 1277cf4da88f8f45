"""Loading of a teacher, such as the dense model that a SPARSEK one was converted from."""

import dataclasses
import functools
import os

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from sparsek.config import TransformerConfig
from sparsek.data.tokenizer import load_tokenizer
from sparsek.errors import UsageError
from sparsek.huggingface import pretrained
from sparsek.model.transformer import Params
from sparsek.parallel.sharding import computed_on, placements
from sparsek.runs import checkpoint, run_record

DTYPE = "bfloat16"  # of the teacher's parameters and activations; its logits are float32


def teacher_config(reference: str) -> TransformerConfig:
  """Returns the model that `TrainConfig.distill_from` names, with its own kind of attention.

  Raises:
    UsageError: where there is none.
  """
  if reference.startswith(pretrained.PREFIX):
    config = pretrained.load_config(reference.removeprefix(pretrained.PREFIX))
  else:
    config, _ = run_record.load_run_config(checkpoint.parse_run_reference(reference)[0])
  return dataclasses.replace(config, dtype=DTYPE, remat="none", implementation=None)


def check_teacher(reference: str, fingerprint: str, vocab_size: int) -> TransformerConfig:
  """Returns the model of the teacher, as `teacher_config` does.

  Args:
    reference: `TrainConfig.distill_from`.
    fingerprint: of the tokenizer of the data.
    vocab_size: of the model that learns.
  Raises:
    UsageError: where the model cannot be read, or has another tokenizer or vocabulary.
  """
  folder, _ = checkpoint.parse_run_reference(reference.removeprefix(pretrained.PREFIX))
  config, hf = teacher_config(reference), reference.startswith(pretrained.PREFIX)
  tokenizer = (
    load_tokenizer(folder) if hf else run_record.load_run_tokenizer(os.path.expanduser(folder))
  )
  if tokenizer.fingerprint != fingerprint or config.vocab_size != vocab_size:
    raise UsageError(
      f"--distill_from={reference}: its tokenizer ({tokenizer.name}, "
      f"{tokenizer.fingerprint[:12]}) and vocab_size={config.vocab_size} must be "
      f"those of the data ({fingerprint[:12]}) and the model ({vocab_size})"
    )
  return config


def load_teacher(reference: str, mesh: Mesh | None = None) -> Params:
  """Returns the bfloat16 parameters of the teacher, which `check_teacher` has accepted.

  Args:
    reference: `TrainConfig.distill_from`.
    mesh: devices over which they are spread; None puts them on the first device.
  Raises:
    UsageError: where they cannot be read.
  """
  folder, step = checkpoint.parse_run_reference(reference.removeprefix(pretrained.PREFIX))
  if reference.startswith(pretrained.PREFIX):
    return pretrained.load(folder, dtype=DTYPE, mesh=mesh)[1]
  params, _ = checkpoint.load_params(folder, teacher_config(reference), step, mesh)
  cast = functools.partial(jax.tree.map, lambda leaf: leaf.astype(DTYPE))
  return computed_on(mesh, cast, params)


def abstract_teacher(reference: str, mesh: Mesh) -> Params:
  """Returns the shapes, dtypes and placement of the parameters that `load_teacher` returns."""
  params = checkpoint.abstract_params(teacher_config(reference))
  return jax.tree.map(
    lambda x, sharding: jax.ShapeDtypeStruct(x.shape, jnp.dtype(DTYPE), sharding=sharding),
    params,
    placements(mesh, params),
  )
