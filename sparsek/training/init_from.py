"""Initial parameters of a run: new ones, or those of the model that --init_from names.

The layers of that model may have other kinds of attention. Modules that belong to one kind only,
such as scorers, are then drawn at random or left out.
"""

import functools
import os
from collections.abc import Callable

import jax
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh

from sparsek.command_line.invocation import command
from sparsek.config import TrainConfig, TransformerConfig
from sparsek.data.token_files import TokenDataset
from sparsek.data.tokenizer import load_tokenizer, read_bos
from sparsek.errors import UsageError
from sparsek.huggingface import pretrained
from sparsek.model import lora
from sparsek.model.transformer import Params, init_params, stack_layers, unstack_layers
from sparsek.parallel.sharding import computed_on
from sparsek.runs import checkpoint, run_record
from sparsek.runs.parameter_table import Comparison, explain_architecture, parameter_shapes

Say = Callable[[str], None]


def initial_params(
  config: TransformerConfig, train: TrainConfig, dataset: TokenDataset, mesh: Mesh, say: Say
) -> Params:
  """Returns the parameters that `train.init_from` names, or new ones; adapters are always new.

  Raises:
    UsageError: where the named parameters cannot be read or do not fit, or adapters have no
      pretrained model.
  """
  key = jax.random.key(train.seed)
  if train.init_from and train.init_from.startswith(pretrained.PREFIX):
    params = _load_pretrained(config, train, dataset, mesh, say)
    say(f"starting from {train.init_from}")
  elif train.init_from:
    folder, step = checkpoint.parse_run_reference(train.init_from)
    if not os.path.isdir(folder):
      raise UsageError(f"--init_from={train.init_from}: there is no folder {folder}")
    check_tokenizer(folder, dataset, train.data.data, say)
    params, step = load(folder, lora.merged_config(config), step, key, mesh, say)
    say(f"starting from the parameters of {folder} at step {step}")
  elif config.lora_rank:
    raise UsageError(
      f"--lora_rank={config.lora_rank} needs --init_from: adapters learn beside the "
      "matrices of a pretrained model"
    )
  else:
    params = computed_on(mesh, functools.partial(init_params, config), key)
  if config.lora_rank:
    params = lora.extend(config, params, key, mesh)
  return params


def check_tokenizer(workdir: str, dataset: TokenDataset, data: str, say: Say) -> TransformerConfig:
  """Checks that data fit the tokenizer of a run, and returns the run's model, adapters included.

  `say` gets a warning where the run's documents begin with other tokens than those of the data.

  Args:
    workdir: of the run.
    dataset: the data to train on now.
    data: `DataConfig.data`, for messages.
    say: takes one line of text.
  Raises:
    UsageError: where the run was trained with another tokenizer.
  """
  config, run = run_record.load_run_config(workdir, adapters=True)
  if run["tokenizer"]["fingerprint"] != dataset.tokenizer.fingerprint:
    here, there = (
      f"{name}, {fingerprint[:12]}"
      for name, fingerprint in (
        (dataset.tokenizer.name, dataset.tokenizer.fingerprint),
        (run["tokenizer"]["name"], run["tokenizer"]["fingerprint"]),
      )
    )
    raise UsageError(
      f"the tokenizer of --data={data} ({here}) does not match that of the run "
      f"in {workdir} ({there})"
    )
  bos_ids = read_bos(run["tokenizer"], dataset.tokenizer, os.path.join(workdir, run_record.FILE))
  _warn_of_other_bos(dataset, data, bos_ids, workdir, say)
  return config


def _warn_of_other_bos(
  dataset: TokenDataset, data: str, bos_ids: list[int], model: str, say: Say
) -> None:
  """Warns where the documents of the data do not begin with the tokens that a model knows."""
  tokenizer = dataset.tokenizer
  if tokenizer.bos_ids != bos_ids:
    here, there = (
      " ".join(map(tokenizer.token, ids)) or "their text" for ids in (tokenizer.bos_ids, bos_ids)
    )
    say(
      f"warning: the documents of --data={data} begin with {here}, those of {model} with "
      f"{there}: make the data anew with `{command('prepare_data')}`"
    )


def _load_pretrained(
  config: TransformerConfig, train: TrainConfig, dataset: TokenDataset, mesh: Mesh | None, say: Say
) -> Params:
  """Returns the parameters of a folder in Hugging Face's format; those that it lacks are drawn.

  Raises:
    UsageError: where the data were made with another tokenizer.
  """
  assert train.init_from is not None
  folder = train.init_from.removeprefix(pretrained.PREFIX)
  tokenizer = load_tokenizer(folder)
  if tokenizer.fingerprint != dataset.tokenizer.fingerprint:
    raise UsageError(
      f"the tokenizer of --data={train.data.data} is not that of "
      f"--init_from={train.init_from}: make the data with "
      f"`{command('prepare_data', f'--tokenizer={folder}')}`"
    )
  if dataset.tokenizer.vocab_size > config.vocab_size:
    raise UsageError(
      f"--init_from={train.init_from}: the tokenizer has "
      f"{dataset.tokenizer.vocab_size} ids, the model {config.vocab_size}"
    )
  _warn_of_other_bos(dataset, train.data.data, tokenizer.bos_ids, train.init_from, say)
  merged, key = lora.merged_config(config), jax.random.key(train.seed)
  return pretrained.load(folder, config=merged, key=key, mesh=mesh)[1]


def _replaceable_module(path: str) -> str | None:
  """Returns the module of a parameter, such as "layers_0/attention/scorer", or None.

  It is None unless one kind of attention has this module and another lacks it.
  """
  parts = path.split("/")
  return next(("/".join(parts[: i + 1]) for i, part in enumerate(parts) if part in lora.NEW), None)


def _unstacked_shapes(config: TransformerConfig) -> dict[str, tuple[int, ...]]:
  unstack = functools.partial(unstack_layers, config)
  return parameter_shapes(jax.eval_shape(unstack, checkpoint.abstract_params(config)))


def differing_modules(
  there: TransformerConfig, here: TransformerConfig
) -> tuple[set[str], set[str]] | None:
  """Compares two models that may differ in the kinds of attention of their layers.

  Args:
    there: the model whose parameters are given.
    here: the model that starts from them.
  Returns:
    (modules that must be drawn, modules of `there` that are left out), of unstacked layers; None
    where the models differ in anything else.
  """
  comparison = Comparison(_unstacked_shapes(there), _unstacked_shapes(here))
  modules = set()  # a module is drawn as a whole, or not at all
  for path, status in comparison.status.items():
    if status != "loaded":
      module = _replaceable_module(path)
      if module is None:
        return None
      modules.add(module)
  drawn, left_out = (
    modules & {_replaceable_module(path) for path in shapes}
    for shapes in (comparison.wanted, comparison.saved)
  )
  return drawn, left_out


def convert(
  there: TransformerConfig,
  params: Params,
  here: TransformerConfig,
  drawn: set[str],
  key: jax.Array,
  mesh: Mesh | None = None,
) -> Params:
  """Returns `params` of a model `there` in the layout of a model `here`.

  The modules in `drawn` come from `init_params(here, key)`.
  """

  def converted(params, key):
    old = flatten_dict(unstack_layers(there, params), sep="/")
    new = flatten_dict(unstack_layers(here, init_params(here, key)), sep="/")
    merged = {
      path: leaf if _replaceable_module(path) in drawn else old[path] for path, leaf in new.items()
    }
    return stack_layers(here, unflatten_dict(merged, sep="/"))

  return computed_on(mesh, converted, params, key)


def load(
  workdir: str,
  config: TransformerConfig,
  step: int | None,
  key: jax.Array,
  mesh: Mesh | None,
  say: Say,
) -> tuple[Params, int]:
  """Loads parameters of a run for a model whose attention and stacking of layers may differ.

  Scorers, and the decay of linear attention, are drawn with `key` where the run lacks them or has
  them in another shape, and left out where the model does not use them; `say` gets a line about
  either. All other parameters must fit.

  Returns:
    the parameters and their step.
  Raises:
    UsageError: as in `checkpoint.load_params`.
  """
  there, _ = run_record.load_run_config(workdir)
  differing = differing_modules(there, config) if explain_architecture(there, config) else None
  if differing is None:
    # load_params reports what does not fit, if anything.
    return checkpoint.load_params(workdir, config, step, mesh, say)
  params, step = checkpoint.load_params(workdir, there, step, mesh, say)
  for modules, action in zip(differing, ("drawn anew", "left out")):
    if modules:
      names = sorted({module.split("/", 1)[1] for module in modules})
      num_layers = len({module.split("/")[0] for module in modules})
      say(f"{action}: {', '.join(names)} of {num_layers} layers")
  return convert(there, params, config, differing[0], key, mesh), step
