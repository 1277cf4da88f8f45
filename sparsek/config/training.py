"""The configurations of data, optimizer and training runs."""

import dataclasses
from collections.abc import Sequence

from sparsek.config.checks import (
  Count,
  Decay,
  Index,
  Share,
  Weight,
  check_choice,
  check_fields,
  whole_number,
)

TRAINABLE = ("all", "attention", "scorer")
ON_SPIKE = ("skip", "stop")
DEFAULT_EXTENSIONS = (".txt", ".md", ".rst", ".py", ".jsonl", ".ndjson", ".parquet")


def parse_profile_steps(steps: str | Sequence[int] | None) -> tuple[int, int] | None:
  """Returns (A, B) for "A:B" or a sequence of the two numbers, and None for None.

  Raises:
    ValueError: unless 1 <= A <= B.
  """
  if steps is None:
    return None
  texts = steps.split(":") if isinstance(steps, str) else list(map(str, steps))
  first, last = (whole_number(text, 1) for text in texts) if len(texts) == 2 else (None, None)
  if first is None or last is None or first > last:
    raise ValueError(
      f"profile_steps={steps} must be A:B, the first and the last step to trace, 1 <= A <= B"
    )
  return first, last


@dataclasses.dataclass(frozen=True)
class DataConfig:
  """The source of tokens and how they are cut into rows.

  Attributes:
    data: "stdlib" (the source of Python's standard library, byte tokens) or the folder that
      `sparsek prepare-data` wrote.
    seq_len: tokens per row that the model sees (a row stores one more, the last target).
    batch_size: rows per optimizer step, over all processes and accumulation steps.
    seed: of the shuffle.
    segment_documents: give each packed document its own segment id, so that attention and loss
      restart at each document.
  """

  data: str = "stdlib"
  seq_len: Count = 512
  batch_size: Count = 8
  seed: Index = 0
  segment_documents: bool = True

  def __post_init__(self):
    check_fields(self)


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
  """AdamW with linear warm-up and cosine decay.

  Attributes:
    learning_rate: peak learning rate.
    warmup_steps: steps from 0 to the peak.
    num_steps: length of the schedule, warm-up included.
    final_lr_ratio: learning rate at the end divided by the peak.
    weight_decay: decoupled, on matrices only (not on norms, biases, scales, slopes or embeddings).
    grad_clip: largest global gradient norm; 0 turns clipping off.
    b1, b2: decay of the first and second moments.
    trainable: which parameters change: "all"; "attention": those of the attention modules, scorers
      included; "scorer": scorers only.
    scorer_lr_multiplier: learning rate of the scoring networks divided by that of everything else.
  """

  learning_rate: Weight = 1e-3
  warmup_steps: Index = 100
  num_steps: Count = 1000
  final_lr_ratio: Share = 0.1
  weight_decay: Weight = 0.1
  grad_clip: Weight = 1.0
  b1: Decay = 0.9
  b2: Decay = 0.95
  trainable: str = "all"
  scorer_lr_multiplier: Weight = 5.0

  def __post_init__(self):
    check_fields(self)
    check_choice("trainable", self.trainable, TRAINABLE)
    if self.warmup_steps > self.num_steps:
      raise ValueError(
        f"warmup_steps={self.warmup_steps} must be at most num_steps={self.num_steps}"
      )


@dataclasses.dataclass(frozen=True)
class TrainConfig:
  """A training run: everything but the model, which is a TransformerConfig.

  Attributes:
    workdir: folder of the checkpoints, metrics.jsonl, flags.txt and versions.json.
    data, optimizer: see their classes.
    seed: of the parameters, the noise on the scores and the queries of the scorers' loss.
    scorer_loss: weight of the scorers' auxiliary loss, which
      `TransformerConfig.scorer_loss_kind` names, a mean over rows and sparsek layers; has no
      effect where no scorer has parameters.
    gate_anneal: at least 1: training has the gates of "value", of scores times
      `gate_anneal ** (step / num_steps)` in a run or stage, so that soft gates become hard;
      evaluation has the model's own, "straight_through". 0: training has them, too.
    scorer_warmup: train the scorers by that loss alone while sparsek layers attend to everything:
      the first stage of converting a dense model. There is no cross-entropy and no backward pass
      except the scorers'; the "loss" of a step is the scorers' loss.
    distill: weight w of a teacher in the training objective
      (1 - w) cross-entropy + w KL(teacher || model), at temperature 1. The teacher's operations do
      not count in "mfu".
    distill_from: the teacher, which keeps its own attention: "hf:DIR", "DIR" or "DIR@STEP" as in
      init_from. Checkpoints do not hold it.
    spike_factor: a step whose loss or gradient norm is not finite, or more than this many times its
      running mean, changes no parameter; 0 turns the check off.
    on_spike: "skip": go on with the next step; "stop": raise RunError.
    restore_step: go on from the checkpoint of this step, and set later ones aside; a run does this
      only once, see `sparsek.runs.set_aside`. None: go on from the newest checkpoint.
    stop_at: step at which to stop before the end of the schedule; the run may then go on with
      another k, window, gate or noise. None: stop at the end.
    fsdp, context: parts into which the parameters, and the tokens of each row, are split over the
      devices; the rows of a batch are split over what remains. No result depends on either, except
      for rounding.
    grad_accumulation: micro-batches per optimizer step; divides the batch size.
    loss_chunk: number of tokens whose logits exist at the same time in the cross-entropy.
    log_every, eval_every, checkpoint_every: steps between metrics, held-out evaluations and
      checkpoints; 0 turns evaluation off.
    eval_batches: batches per evaluation.
    keep_checkpoints: number of newest checkpoints that are kept.
    init_from: where the parameters (only) come from: "DIR" or "DIR@STEP", a run; "hf:DIR", a folder
      in Hugging Face's format. Scorers that it lacks are initialised at random.
    tensorboard: also write TensorBoard events.
    wandb: also write to this project of Weights & Biases, "PROJECT" or "ENTITY/PROJECT".
    profile_steps: (first, last) step of a trace that is written to WORKDIR/profile, or "A:B".
  """

  workdir: str
  data: DataConfig = DataConfig()
  optimizer: OptimizerConfig = OptimizerConfig()
  seed: Index = 0
  scorer_loss: Weight = 1.0
  gate_anneal: Weight = 0.0
  scorer_warmup: bool = False
  distill: Share = 0.0
  distill_from: str | None = None
  spike_factor: Weight = 0.0
  on_spike: str = "skip"
  restore_step: Index | None = None
  stop_at: Count | None = None
  fsdp: Count = 1
  context: Count = 1
  grad_accumulation: Count = 1
  loss_chunk: Count = 8192
  log_every: Count = 10
  eval_every: Index = 200
  eval_batches: Count = 8
  checkpoint_every: Count = 200
  keep_checkpoints: Count = 3
  init_from: str | None = None
  tensorboard: bool = False
  wandb: str | None = None
  profile_steps: str | tuple[int, int] | None = None

  @property
  def loss_name(self) -> str:
    """The name of the training loss for readers."""
    return "scorers' loss" if self.scorer_warmup else "loss"

  def __post_init__(self):
    check_fields(self)
    steps = parse_profile_steps(self.profile_steps)
    object.__setattr__(self, "profile_steps", steps)
    last = min(self.optimizer.num_steps, self.stop_at or self.optimizer.num_steps)
    if steps and steps[0] > last:
      raise ValueError(
        f"profile_steps={steps[0]}:{steps[1]} must begin at step {last} or before, the last step"
      )
    if self.spike_factor and not self.spike_factor > 1:
      raise ValueError(
        f"spike_factor={self.spike_factor} must be above 1, or 0 to look for no spikes"
      )
    check_choice("on_spike", self.on_spike, ON_SPIKE)
    if self.gate_anneal and not self.gate_anneal >= 1:
      raise ValueError(
        f"gate_anneal={self.gate_anneal} must be at least 1, or 0 for the gates of --gate"
      )
    if (self.distill > 0) != bool(self.distill_from):
      raise ValueError(
        f"distill={self.distill} must go with distill_from, its teacher: both or neither; "
        f"distill_from={self.distill_from}"
      )
    if self.scorer_warmup and not (
      self.scorer_loss and self.optimizer.trainable == "scorer" and not self.distill
    ):
      raise ValueError(
        f"scorer_warmup={self.scorer_warmup} needs trainable=scorer, scorer_loss "
        "above 0 and no distill; "
        f"trainable={self.optimizer.trainable}, scorer_loss={self.scorer_loss}, "
        f"distill={self.distill}"
      )
    if self.data.batch_size % self.grad_accumulation:
      raise ValueError(
        f"batch_size={self.data.batch_size} must be a multiple of "
        f"grad_accumulation={self.grad_accumulation}"
      )
