"""The commands as functions: a run is trained, loaded, evaluated, and continues a text.

They compute what `sparsek pretrain`, `evaluate` and `generate` do, to the same figures, in the
folders of the same runs.
"""

import contextlib
import dataclasses
import difflib
import os
import re
import warnings
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from sparsek.command_line.path_flags import parse_path
from sparsek.config import (
  Count,
  DataConfig,
  FarRepeatRule,
  Index,
  OptimizerConfig,
  TrainConfig,
  TransformerConfig,
  check_number,
)
from sparsek.data.batches import open_data
from sparsek.data.corpus import STDLIB
from sparsek.data.tokenizer import Tokenizer, as_valid_unicode
from sparsek.errors import RunError, UsageError
from sparsek.evaluation.heldout import Run, evaluation_record, heldout_rows, other_beginning
from sparsek.evaluation.loss_by_position import bucket_edges
from sparsek.evaluation.loss_by_position import evaluate as evaluate_batches
from sparsek.generation.prompts import new_texts, text_pieces
from sparsek.generation.session import Session
from sparsek.generation.text_stream import TextStream
from sparsek.model.transformer import Params, count_params
from sparsek.parallel.mesh import make_mesh
from sparsek.runs import checkpoint, run_directory, run_record
from sparsek.training import loop
from sparsek.training.loop import Result

KINDS = (TrainConfig, DataConfig, OptimizerConfig)
OWN_PARAMETERS = ("workdir", "data", "optimizer")  # of TrainConfig, which are no settings


def _fields(kind: type) -> set[str]:
  return {field.name for field in dataclasses.fields(kind)} - {*OWN_PARAMETERS}


KNOWN = sorted(set().union(*map(_fields, KINDS)))  # settings of `train`
_FLAG = re.compile(
  rf"--({'|'.join([*KNOWN, *_fields(TransformerConfig), 'data', 'workdir', 'step'])})\b"
)


class LoadedRun(NamedTuple):
  """A run with the parameters of one of its checkpoints.

  Attributes:
    config: the model; `run._replace(config=dataclasses.replace(run.config, k=8))` changes it.
    params: nested dictionaries of jax.Array, with adapters merged.
    tokenizer: has encode(text) and decode(ids).
    step: of the checkpoint.
    workdir: folder of the run, an absolute path.
  """

  config: TransformerConfig
  params: Params
  tokenizer: Tokenizer
  step: int
  workdir: str

  def __repr__(self) -> str:  # a notebook shows it, and parameters are long
    return (
      f"LoadedRun(workdir={self.workdir!r}, step={self.step}, "
      f"{count_params(self.params):,} parameters, tokenizer={self.tokenizer.name!r})"
    )


def load(
  workdir: str | os.PathLike,
  step: int | None = None,
  *,
  k: int | None = None,
  window: int | None = None,
) -> LoadedRun:
  """Loads a run that was trained or imported; the parameters lie on the first device.

  Args:
    workdir: folder of the run.
    step: of the checkpoint; None for the newest.
    k, window: other values than in training; no parameter depends on them.
  Raises:
    UsageError: where there is no such run or checkpoint, it is damaged, or no layer takes the k or
      the window.

  Example:
    >>> run = sparsek.load("runs/mini")
    >>> model = sparsek.Transformer(run.config)
    >>> logits = model.apply({"params": run.params}, jnp.array([run.tokenizer.encode("def main")]))
  """
  if step is not None:
    step = check_number("step", step, Index)
  with _without_dashes():
    workdir = _path("workdir", workdir)
    config = _with(run_record.load_run_config(workdir)[0], k=k, window=window)
    tokenizer = run_record.load_run_tokenizer(workdir)
    params, actual = checkpoint.load_params(workdir, config, step)
  return LoadedRun(config, params, tokenizer, actual, workdir)


def _with(config: TransformerConfig, **fields: Any) -> TransformerConfig:
  """Returns a configuration with those fields replaced that are not None.

  Raises:
    UsageError: for a value that no layer takes.
  """
  fields = {name: value for name, value in fields.items() if value is not None}
  config = dataclasses.replace(config, **fields)
  for name, value in fields.items():
    reason = config.why_unused(name)
    if reason:
      raise UsageError(f"{name}={value} has no effect: {reason}")
  return config


def _path(
  name: str, path: str | os.PathLike, words: Sequence[str] = (), reference: bool = False
) -> str:
  """Returns the absolute path that an argument means, as a flag of this name would.

  Args:
    name: of the argument.
    path: its value.
    words, reference: as in `parse_path`.
  Raises:
    UsageError: for what is no path.
  """
  if not isinstance(path, (str, os.PathLike)):
    raise UsageError(f"{name}={path!r} must be a path")
  try:
    return parse_path(os.fspath(path), words, reference)
  except ValueError as error:
    raise UsageError(f"{name}={str(path)!r}: {error}") from None


@contextlib.contextmanager
def _without_dashes() -> Iterator[None]:
  """Names arguments, not flags, in the errors of the block, which come from what commands share."""
  try:
    yield
  except (UsageError, RunError) as error:
    error.args = (_FLAG.sub(r"\1", str(error)),)
    raise


def train(
  config: TransformerConfig,
  data: str | os.PathLike,
  workdir: str | os.PathLike,
  *,
  num_steps: int = OptimizerConfig.num_steps,
  warmup_steps: int | None = None,
  **settings: Any,
) -> Result:
  """Trains a model, and resumes where an earlier call or command stopped in the same folder.

  In the main thread, where signals arrive, Ctrl-C saves a checkpoint and returns.

  Args:
    config: the model. Its vocabulary becomes that of the data, except with init_from.
    data: folder of token files, or "stdlib"; see `DataConfig`.
    workdir: folder of the run.
    num_steps: length of the schedule; in all, not in this call.
    warmup_steps: steps from 0 to the peak learning rate; a tenth, at most 100, by default.
    **settings: further fields of `TrainConfig`, `DataConfig` and `OptimizerConfig`, such as
      seq_len, batch_size, learning_rate, seed, eval_every, checkpoint_every and init_from.
  Returns:
    the step, the losses, and if a signal stopped it.
  Raises:
    UsageError: for an unknown setting, and where configuration, data and checkpoints do not go
      together; before anything is changed.
    RunError: where the run cannot go on.

  Example:
    >>> config = sparsek.preset("tiny", k=32, window=32)
    >>> sparsek.train(config, "stdlib", "runs/tiny", num_steps=200, seq_len=256, batch_size=4)
  """
  if not isinstance(config, TransformerConfig):
    raise UsageError(f"config={config!r} must be a TransformerConfig, such as sparsek.preset makes")
  num_steps = check_number("num_steps", num_steps, Count)
  if warmup_steps is None:
    warmup_steps = min(100, num_steps // 10)
  given = {**settings, "num_steps": num_steps, "warmup_steps": warmup_steps}
  with _without_dashes():
    train_config = _train_config(_path("data", data, (STDLIB,)), _path("workdir", workdir), given)
    dataset = open_data(train_config.data.data)
    if not train_config.init_from:
      config = dataclasses.replace(config, vocab_size=dataset.vocab_size)
    run_directory.use_compilation_cache()
    return loop.train(config, train_config, dataset)


def _train_config(data: str, workdir: str, settings: dict[str, Any]) -> TrainConfig:
  """Returns the configuration that settings by name make; `seed` is that of the data too."""
  for name in settings:
    if name not in KNOWN:
      near = difflib.get_close_matches(name, KNOWN, 1)
      advice = f"did you mean {near[0]}?" if near else f"known are {', '.join(KNOWN)}"
      raise UsageError(f"{name}={settings[name]} is no setting of a run: {advice}")
  for name in ("init_from", "distill_from"):
    if settings.get(name) is not None:
      settings = {**settings, name: _path(name, settings[name], reference=True)}
  of_run, of_data, of_optimizer = (
    {name: settings[name] for name in _fields(kind) & set(settings)} for kind in KINDS
  )
  return TrainConfig(
    workdir=workdir,
    data=DataConfig(data=data, **of_data),
    optimizer=OptimizerConfig(**of_optimizer),
    **of_run,
  )


def evaluate(
  run: LoadedRun | str | os.PathLike,
  data: str | os.PathLike | None = None,
  *,
  seq_len: int | None = None,
  batch_size: int | None = None,
  eval_batches: int = 32,
  far_repeats: int | None = None,
  far_repeats_ngram: int = FarRepeatRule.far_repeats_ngram,
  far_repeats_most: int = FarRepeatRule.far_repeats_most,
  k: int | None = None,
  window: int | None = None,
  loss_chunk: int = TrainConfig.loss_chunk,
) -> dict[str, Any]:
  """Returns the held-out loss of a run, with its parts, as evaluation.jsonl records it.

  Nothing is written. Rows are spread over all devices.

  Args:
    run: as `load` returns it, perhaps with other parameters, or the folder of a run.
    data: token files made with the run's tokenizer; None for those it was trained on.
    seq_len, batch_size: of the rows; None for those of training, with a batch_size that is rounded
      up to a multiple of the devices.
    eval_batches: largest number of batches.
    far_repeats, far_repeats_ngram, far_repeats_most: as in `sparsek.config.FarRepeatRule`; None is
      a quarter of seq_len.
    k, window: other values than in `run`.
    loss_chunk: number of tokens whose logits exist at the same time, per device.
  Returns:
    "loss" in nats per token, "num_targets", "bits_per_byte", "buckets" (a dictionary with first,
    last, loss and num_targets for each range of positions), "documents" (the index, loss_sum and
    num_targets of each), "far_repeats" (the loss and num_targets of rare n-grams that are repeated
    from far back), "step", and what these depend on.
  Raises:
    UsageError: where the rows, the data and the run do not go together, or no layer takes the k or
      the window.
    RunError: where memory does not hold the rows.
  """
  sizes = {"seq_len": seq_len, "batch_size": batch_size, "eval_batches": eval_batches}
  for name, value in {**sizes, "loss_chunk": loss_chunk}.items():
    if value is not None or name in ("eval_batches", "loss_chunk"):
      check_number(name, value, Count)
  rule = FarRepeatRule(far_repeats, far_repeats_ngram, far_repeats_most)
  loaded = _loaded(run)
  config = _with(loaded.config, k=k, window=window)
  evaluated = Run(loaded.workdir, config, run_record.load_run_config(loaded.workdir)[1])
  mesh = make_mesh()
  with _without_dashes():
    source = None if data is None else _path("data", data, (STDLIB,))
    dataset, rows, batches = heldout_rows(
      [evaluated], mesh, eval_batches, source, seq_len, batch_size
    )
    warning = other_beginning(evaluated, dataset.tokenizer)
    if warning:
      warnings.warn(warning, stacklevel=2)
    edges = bucket_edges(rows.seq_len, [evaluated.record["data"]["seq_len"]])
    result = evaluate_batches(
      config, loaded.params, batches, edges, rule, loss_chunk=loss_chunk, mesh=mesh
    )
  return evaluation_record(evaluated, loaded.step, result, rows, dataset)


def _loaded(run: LoadedRun | str | os.PathLike) -> LoadedRun:
  """Returns the run that the argument `run` is, or names."""
  return run if isinstance(run, LoadedRun) else load(_path("run", run))


def generate(
  run: LoadedRun | str | os.PathLike,
  prompt: str = "",
  *,
  max_new_tokens: int = 200,
  temperature: float = 0.8,
  top_p: float = 0.95,
  top_k: int = 0,
  stop: Sequence[str] = (),
  seed: int = 0,
  special_tokens: bool = False,
  k: int | None = None,
  window: int | None = None,
) -> str:
  """Returns the continuation of a prompt, without the prompt, in constant memory per token.

  Args:
    run: as `load` returns it, or the folder of a run.
    prompt: text to continue; "" for a new document.
    max_new_tokens: most tokens to write; the end of the document stops earlier.
    temperature: divides the logits; 0 always takes the most probable token.
    top_p: draws from the fewest tokens that have this probability together.
    top_k: draws from this many most probable tokens; 0 means from all.
    stop: texts that end the output and are left out of it.
    seed: the same seed gives the same text.
    special_tokens: names of special tokens in the prompt become these tokens.
    k, window: other values than in `run`.
  Raises:
    ValueError: for a value of another type, a number out of range, or a k or window that no layer
      takes.

  `sparsek.Session` continues several texts at the same time, and in turns.
  """
  if isinstance(stop, str):
    raise UsageError(f"stop={stop!r} must be a sequence of texts: stop=[{stop!r}]")
  if not (isinstance(stop, Sequence) and all(isinstance(text, str) for text in stop)):
    raise UsageError(f"stop={stop!r} must be a sequence of texts")
  if not isinstance(prompt, str):
    raise UsageError(f"prompt={prompt!r} must be a string")
  if not isinstance(special_tokens, bool):
    raise UsageError(f"special_tokens={special_tokens!r} must be True or False")
  seed = check_number("seed", seed, Index)
  loaded = _loaded(run)
  config, tokenizer = _with(loaded.config, k=k, window=window), loaded.tokenizer
  record = run_record.load_run_config(loaded.workdir)[1]
  ids = new_texts(tokenizer, [as_valid_unicode(prompt)], special_tokens)
  session = Session(config, loaded.params, batch_size=1)
  turn = session.generate(
    ids,
    max_new_tokens=max_new_tokens,
    temperature=temperature,
    top_p=top_p,
    top_k=top_k,
    keys=jnp.stack([jax.random.key(seed)]),
    eos_id=record["tokenizer"].get("eos_ids", tokenizer.eos_id),
  )
  stream = TextStream(tokenizer, stop)
  stream.turn(ids[0])
  steps = text_pieces(session, turn, [stream])
  return "".join(text for pieces in steps for _, text in pieces) + stream.finish()
