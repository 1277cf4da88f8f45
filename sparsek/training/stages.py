"""Stages of a run, which train one state one after the other: dense, warm-up, joint, recall.

The tree of parameters is that of the last stage's model, and so are the moments. A stage whose
attention has fewer parameters, such as full attention, leaves the others as they are. What derives
from the step derives from the step of the run; the schedule of the learning rate and the means by
which spikes are told begin anew with each stage. Each data set is read on from where the stage
before that read it has stopped.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax

from sparsek.command_line.stages import named
from sparsek.config import TrainConfig, TransformerConfig
from sparsek.data.batches import TrainIterator
from sparsek.data.token_files import TokenDataset
from sparsek.errors import UsageError
from sparsek.model import lora
from sparsek.runs import checkpoint, run_record
from sparsek.runs.parameter_table import parameter_shapes
from sparsek.training.optimizer import trainable_mask

ELSEWHERE = "elsewhere"  # key in the data state of a checkpoint: the places in other data sets


class Stage(NamedTuple):
  """A stage of a run; a run without stages has one.

  Attributes:
    config: the model, as this stage trains it.
    train: everything else; its number of steps and its trace are those of the stage.
    dataset: what the stage reads.
    name: of the stage; "" for a run without stages.
    flags: those that only this stage has, for records.
    begin: steps of the run before the stage.
  """

  config: TransformerConfig
  train: TrainConfig
  dataset: TokenDataset
  name: str = ""
  flags: str = ""
  begin: int = 0

  @property
  def end(self) -> int:
    """The last step of the stage, counted from the beginning of the run."""
    return self.begin + self.train.optimizer.num_steps

  @property
  def label(self) -> dict[str, str]:
    """The name as a field of metrics; none for a run without stages."""
    return {"stage": self.name} if self.name else {}


def check_stages(stages: Sequence[Stage]) -> None:
  """Raises UsageError where stages cannot be one run: by their tokenizers or their parameters."""
  *earlier, last = stages
  shapes = parameter_shapes(checkpoint.abstract_params(last.config))
  for stage in earlier:
    with named(stage.name):
      here, there = (s.dataset.tokenizer.fingerprint for s in (stage, last))
      if here != there:
        raise UsageError(
          f"the tokenizer of --data={stage.train.data.data} ({here[:12]}) is not that of the last "
          f"stage's --data={last.train.data.data} ({there[:12]})"
        )
      own = parameter_shapes(checkpoint.abstract_params(stage.config))
      missing = [path for path, shape in own.items() if shapes.get(path) != shape]
      if missing:
        attention, of_last = (",".join(s.config.attention) for s in (stage, last))
        raise UsageError(
          f"attention={attention} has parameters that the last stage, with attention={of_last}, "
          f"lacks or has in another shape: {missing[0]} and {len(missing) - 1} others; the last "
          "stage must have the parameters of all"
        )


def alike_in_layout(configs: Sequence[TransformerConfig]) -> list[TransformerConfig]:
  """Returns the models of stages with patterns of attention as long as the last one's.

  Scanned layers are stacked by the pattern, so that full attention in all layers is "full,full"
  before "sparsek,full". Patterns that do not divide the last one's stay.
  """
  length = len(configs[-1].attention)

  def alike(config: TransformerConfig) -> TransformerConfig:
    times, rest = divmod(length, len(config.attention))
    if not config.scan_layers or rest or times == 1:
      return config
    return dataclasses.replace(config, attention=config.attention * times)

  return [alike(config) for config in configs]


def frozen_steps(stages: Sequence[Stage], index: int) -> Any:
  """Returns the argument `late` of `make_optimizer` for a stage; None where nothing is late.

  It holds the steps of earlier stages in which each learned parameter was frozen.
  """
  learned, _ = lora.split(checkpoint.abstract_params(stages[-1].config))
  late = jax.tree.map(lambda _: 0, learned)
  for stage in stages[:index]:
    steps = stage.train.optimizer.num_steps
    changes = trainable_mask(learned, stage.train.optimizer.trainable, stage.config)
    late = jax.tree.map(lambda late, changes: late + steps * (not changes), late, changes)
  return late if any(jax.tree.leaves(late)) else None


def index_of(stages: Sequence[Any], step: int) -> int:
  """Returns the index of the stage that made a step; the first for step 0, else the last for
  steps after the run.

  Args:
    stages: in their order, with `end`.
    step: of a checkpoint.
  """
  return next((i for i, stage in enumerate(stages) if step <= stage.end), len(stages) - 1)


def read_on(
  iterator: TrainIterator, dataset: TokenDataset, positions: Sequence[dict]
) -> list[dict]:
  """Sets an iterator to where its data set was read before; it stays where it is if it was not.

  Args:
    iterator: of a stage.
    dataset: what the stage reads.
    positions: states of iterators, one of each data set that was read.
  Returns:
    those of other data sets.
  """
  is_of = lambda position: position.get("dataset") == dataset.fingerprint
  for position in filter(is_of, positions):
    iterator.set_state(position)
  return [position for position in positions if not is_of(position)]


def record(stages: Sequence[Stage]) -> dict[str, Any]:
  """Returns the contents of the model.json of a run: of the last stage, and a list of all."""
  last = stages[-1]
  result = run_record.model_record(last.config, last.train, last.dataset)
  if not last.name:
    return result
  return result | {
    run_record.STAGES: [
      {
        "name": stage.name,
        "flags": stage.flags,
        "steps": [stage.begin + 1, stage.end],
        "data": dataclasses.asdict(stage.train.data),
      }
      for stage in stages
    ]
  }


def changed(recorded: Sequence[dict], stages: Sequence[Stage]) -> dict[str, tuple[str, str]]:
  """Returns the stages whose own flags have changed since a run was last started.

  Args:
    recorded: those of its model.json.
    stages: with which it is started now.
  Returns:
    "stage NAME" -> (old flags, new flags); "none" where there is no such stage.
  """
  old = {stage["name"]: stage["flags"] or "no flags" for stage in recorded}
  new = {stage.name: stage.flags or "no flags" for stage in stages if stage.name}
  return {
    f"stage {name}": (old.get(name, "none"), new.get(name, "none"))
    for name in {**old, **new}
    if old.get(name) != new.get(name)
  }
