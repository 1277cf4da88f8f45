"""Parameters of one run as the start of another whose layers attend otherwise: what
`--init_from=DIR` takes, draws and leaves out.
"""

import functools
from collections.abc import Callable

import jax
from flax.traverse_util import flatten_dict, unflatten_dict

from sparsek.config import TransformerConfig
from sparsek.model.lora import NEW
from sparsek.model.transformer import Params, init_params, stack_layers, unstack_layers
from sparsek.runs import checkpoint
from sparsek.runs.parameter_table import Comparison, explain_architecture, parameter_shapes

Report = Callable[[str], None]


def _own_module(path: str) -> str | None:
  """The module, of those that an attention kind has of its own, which a parameter belongs to:
  "layers_0/attention/scorer".
  """
  parts = path.split("/")
  return next(("/".join(parts[: i + 1]) for i, part in enumerate(parts) if part in NEW), None)


def differing_modules(
  there: TransformerConfig, here: TransformerConfig
) -> tuple[set[str], set[str]] | None:
  """(modules that a model `here` has to draw, modules of `there` that it has no use for), layers
  unstacked; None where more than these differ.
  """
  unstacked = lambda config: parameter_shapes(
    jax.eval_shape(functools.partial(unstack_layers, config), checkpoint.abstract_params(config))
  )
  comparison = Comparison(unstacked(there), unstacked(here))
  unlike = {path for path, status in comparison.status.items() if status != "loaded"}
  if not all(map(_own_module, unlike)):
    return None
  modules = set(map(_own_module, unlike))  # a module is taken as a whole or not at all
  within = lambda shapes: {
    module for module in modules if any(_own_module(path) == module for path in shapes)
  }
  return within(comparison.wanted), within(comparison.saved)


def convert(
  there: TransformerConfig,
  params: Params,
  here: TransformerConfig,
  drawn: set[str],
  key: jax.Array,
  sharding=None,
) -> Params:
  """`params` of a model `there` in the layout of a model `here`, with the modules `drawn` as
  `init_params(here, key)` has them.
  """

  @functools.partial(jax.jit, out_shardings=sharding)
  def converted(params, key):
    theirs = flatten_dict(unstack_layers(there, params), sep="/")
    fresh = flatten_dict(unstack_layers(here, init_params(here, key)), sep="/")
    return stack_layers(
      here,
      unflatten_dict(
        {
          path: leaf if _own_module(path) in drawn else theirs[path] for path, leaf in fresh.items()
        },
        sep="/",
      ),
    )

  return converted(params, key)


def load(
  workdir: str,
  config: TransformerConfig,
  step: int | None,
  key: jax.Array,
  sharding,
  report: Report,
) -> tuple[Params, int]:
  """Parameters of a run for a model that may attend otherwise and stack its layers otherwise, and
  their step.

  Scorers and linear attention's decay that the run has not, or has of another shape, are drawn with
  `key`, and those that the model has no place for are left out; `report` is told. Everything else
  must fit.

  Raises:
    UsageError: as `checkpoint.load_params`.
  """
  there, _ = checkpoint.load_run_config(workdir)
  differing = differing_modules(there, config) if explain_architecture(there, config) else None
  if differing is None:
    # which says what does not fit
    return checkpoint.load_params(workdir, config, step, sharding, report)
  params, step = checkpoint.load_params(workdir, there, step, sharding, report)
  for modules, what in zip(differing, ("drawn anew", "left out")):
    if modules:
      names = sorted({module.split("/", 1)[1] for module in modules})
      report(
        f"{what}: {', '.join(names)} of {len({module.split('/')[0] for module in modules})} layers"
      )
  return convert(there, params, config, differing[0], key, sharding), step
