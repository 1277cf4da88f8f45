"""The flags of pretraining: data, optimizer and run; those of the model are in `flags`."""

from absl import flags

from sparsek import config as config_lib
from sparsek.command_line.definer import Definer
from sparsek.command_line.flags import define_model_flags, define_workdir_flag
from sparsek.command_line.stages import stage_flag

OPTIMIZER = config_lib.OptimizerConfig()
RUN = config_lib.TrainConfig(workdir="")


def define_pretrain_flags(flag_values: flags.FlagValues) -> None:
  """Defines all flags of experiments.pretrain."""
  define_model_flags(flag_values)
  define_data_flags(flag_values)
  define_train_flags(flag_values)
  define_process_flags(flag_values)
  Definer(flag_values, "training").flag(stage_flag(define_pretrain_flags))
  define = Definer(flag_values, "run")
  define.path(
    "compilation_cache",
    None,
    "Folder that keeps compiled programs for the next run, or none. By default that of "
    "$JAX_COMPILATION_CACHE_DIR, else one below ~/.cache/sparsek.",
    words=("none",),
  )
  define.boolean(
    "dry_run",
    False,
    "Train nothing: compile, and print what a step needs. Printed are parameters, operations, "
    "memory and collectives. Needs no --workdir and writes nothing.",
  )
  Definer(flag_values, "devices").string(
    "topology",
    None,
    "With --dry_run: the devices to compile for. They need not be attached: h100:N or h200:N, "
    "N GPUs in nodes of 8, or the shape of a TPU slice, as v5e:4x4, v5p:4x8x8 or v6e:16x16. Needs "
    "JAX's compiler for them. By default the attached devices.",
  )


def define_process_flags(flag_values: flags.FlagValues) -> None:
  """Defines which processes, each started with the same command, are one run."""
  define = Definer(flag_values, "devices")
  define.string(
    "coordinator_address",
    None,
    "HOST:PORT of process 0, a free port. By default found on SLURM, Open MPI, Kubernetes and TPU "
    "pods; elsewhere the run is one process.",
  )
  define.integer("num_processes", None, "Processes of the run. By default found as above.", lower=1)
  define.integer(
    "process_id", None, "Number of this process, from 0. By default found as above.", lower=0
  )
  define.boolean(
    "distributed", True, "With --nodistributed the run is one process, wherever it is started."
  )
  define.real(
    "process_timeout",
    300.0,
    "Seconds after which all processes end where one of them died or hangs; more than a step "
    "takes. Compiling, evaluating and saving may take longer.",
    lower=2,
  )


def define_data_flags(flag_values: flags.FlagValues) -> None:
  """Defines where tokens come from and how they are cut into rows."""
  define, default = Definer(flag_values, "data"), config_lib.DataConfig()
  define.path(
    "data",
    default.data,
    'Folder that experiments.prepare_data wrote, or "stdlib". The word is the source of Python\'s '
    "standard library.",
    words=("stdlib",),
  )
  define.path(
    "tokenizer",
    None,
    '"byte", a tokenizer.json or its folder; it must match the data. By default the one with which '
    "the data was made.",
    words=("byte",),
  )
  define.integer("seq_len", default.seq_len, "Tokens per row.")
  define.integer(
    "batch_size",
    default.batch_size,
    "Rows per optimizer step, over all devices and accumulation steps.",
  )
  define.boolean(
    "segment_documents",
    default.segment_documents,
    "Attention and loss restart at each document of a packed row.",
  )


def define_train_flags(flag_values: flags.FlagValues) -> None:
  """Defines the optimizer and the run."""
  define_workdir_flag(flag_values)
  define = Definer(flag_values, "training")
  _define_schedule(define)
  _define_optimizer(define)
  _define_trained_parameters(define)
  _define_scorer_loss(Definer(flag_values, "scorer"))
  _define_teacher(define)
  _define_batches(define)
  _define_records(Definer(flag_values, "run"))
  _define_start(Definer(flag_values, "run"))


def _define_schedule(define: Definer) -> None:
  define.integer(
    "num_steps",
    OPTIMIZER.num_steps,
    "Optimizer steps of the whole run. Also the length of the learning-rate schedule.",
  )
  define.integer(
    "stop_at",
    None,
    "Stop at this step, before --num_steps. The same command with another --k, --window, --gate or "
    "--scorer_noise goes on under it, for example to anneal one of them. By default --num_steps.",
  )
  define.real("learning_rate", OPTIMIZER.learning_rate, "Peak learning rate.")
  define.integer(
    "warmup_steps",
    None,
    "Steps of linear warm-up, at most --num_steps. By default a tenth of them, at most 100.",
  )
  define.real(
    "final_lr_ratio", OPTIMIZER.final_lr_ratio, "Learning rate at the end divided by the peak."
  )


def _define_optimizer(define: Definer) -> None:
  define.real("weight_decay", OPTIMIZER.weight_decay, "Decoupled weight decay, on matrices only.")
  define.real(
    "grad_clip", OPTIMIZER.grad_clip, "Largest global norm of the gradients; 0 turns clipping off."
  )
  define.real(
    "spike_factor",
    RUN.spike_factor,
    "A step whose loss or gradient norm is more than this many times its running mean, or not "
    "finite, is a spike, and its update is not applied. Above 1; 0 means that no step is a spike.",
  )
  define.choice(
    "on_spike",
    RUN.on_spike,
    config_lib.ON_SPIKE,
    "What follows a spike. skip: go on without the update, and end after 10 spikes in a row; "
    "metrics.jsonl counts them. stop: end the run.",
  )
  for name, default, moment in (("b1", OPTIMIZER.b1, "first"), ("b2", OPTIMIZER.b2, "second")):
    define.real(name, default, f"Decay of Adam's {moment} moment.")


def _define_trained_parameters(define: Definer) -> None:
  define.choice(
    "trainable",
    OPTIMIZER.trainable,
    config_lib.TRAINABLE,
    "Which parameters change. attention: those of attention and its scorers. scorer: those of the "
    "scorers.",
  )
  define.integer(
    "lora_rank",
    config_lib.TransformerConfig.lora_rank,
    "Rank R of adapters (LoRA) in attention and MLPs; 0 means none. Adapters lie beside the "
    "matrices; they and the scorers learn, as far as --trainable says; everything else is frozen: "
    "matrices, biases, norms, embeddings. Needs --init_from, and adapters of the run it names are "
    "merged first. Commands that read the run merge its adapters too.",
  )
  define.real(
    "lora_alpha", None, "The adapters' products count alpha / R times. By default --lora_rank."
  )
  define.real(
    "scorer_lr_multiplier",
    OPTIMIZER.scorer_lr_multiplier,
    "Learning rate of the scoring networks divided by that of everything else.",
  )


def _define_scorer_loss(define: Definer) -> None:
  define.real(
    "scorer_loss",
    RUN.scorer_loss,
    "Weight of the loss that teaches scorers which tokens to keep. It shows them which tokens full "
    "attention reads. With 0 they learn by the gradient of the gates alone, as in the paper.",
  )
  define.real(
    "gate_anneal",
    RUN.gate_anneal,
    "Train with soft gates that become hard: those of --gate=value, of scores times a factor that "
    "grows from 1 to this one. 30 is nearly hard. Evaluation has hard gates, as "
    "--gate=straight_through. 0 means that training has those of --gate.",
  )
  define.boolean(
    "scorer_warmup",
    RUN.scorer_warmup,
    "Train the scorers alone, the first stage of a conversion. They learn from --scorer_loss, "
    "sparsek layers attend to everything, and no other gradient is computed. Needs "
    "--trainable=scorer.",
  )


def _define_teacher(define: Definer) -> None:
  define.real(
    "distill",
    RUN.distill,
    "Weight w of the teacher --distill_from: the objective is (1 - w) cross-entropy + w "
    "KL(teacher || model).",
  )
  define.path(
    "distill_from",
    None,
    "The teacher of --distill, with its own attention: DIR, DIR@STEP or hf:DIR, as in --init_from.",
    reference=True,
  )


def _define_batches(define: Definer) -> None:
  define.integer(
    "seed",
    RUN.seed,
    "Seed of everything random. It sets the initial parameters, the order of the data, the noise "
    "on the scores and the queries of --scorer_loss.",
  )
  define_mesh_flags(define.flag_values)
  define.integer(
    "grad_accumulation",
    RUN.grad_accumulation,
    "Micro-batches per optimizer step; divides --batch_size.",
  )
  define_loss_chunk_flag(define.flag_values)


def define_mesh_flags(flag_values: flags.FlagValues) -> None:
  """Defines over how many devices parameters and rows are split."""
  define = Definer(flag_values, "devices")
  define.integer(
    "fsdp",
    RUN.fsdp,
    "Devices over which the parameters are split. In training gradients and moments are split too; "
    "--fsdp x --context divides the number of devices. Rows are split over all but --context.",
  )
  define.integer(
    "context",
    RUN.context,
    "Devices over which the tokens of a row are split. It divides the number of devices. "
    "experiments.generate splits new prompts, of any length.",
  )


def define_loss_chunk_flag(flag_values: flags.FlagValues) -> None:
  """Defines the size of the chunks in which the loss is computed."""
  Definer(flag_values, "training").integer(
    "loss_chunk",
    RUN.loss_chunk,
    "Tokens whose logits exist at the same time in the cross-entropy, per device.",
  )


def _define_records(define: Definer) -> None:
  define.integer("log_every", RUN.log_every, "Steps between lines of metrics.jsonl.")
  define.integer(
    "eval_every", RUN.eval_every, "Steps between held-out evaluations; 0 turns them off."
  )
  define.integer("eval_batches", RUN.eval_batches, "Batches per held-out evaluation.")
  define.integer("checkpoint_every", RUN.checkpoint_every, "Steps between checkpoints.")
  define.integer(
    "keep_checkpoints", RUN.keep_checkpoints, "How many of the newest checkpoints stay."
  )


def _define_start(define: Definer) -> None:
  define.integer(
    "restore_step",
    None,
    "Go back to the checkpoint of this step, and on from there. Later ones, and the metrics so "
    "far, are set aside in WORKDIR/set_aside. The same command again does not go back again, but "
    "goes on from the newest checkpoint. By default the newest.",
  )
  define.path(
    "init_from",
    None,
    "Model whose parameters the run begins with: DIR, DIR@STEP or hf:DIR. DIR or DIR@STEP: a new "
    "run takes its parameters, and nothing else, from the run in this folder; without --preset it "
    "takes its model flags too. Under another kind of attention, scorers that the run lacks are "
    "drawn anew. hf:DIR: take them from a folder in Hugging Face's format, which replaces "
    "--preset; give the --attention that the model shall have.",
    reference=True,
  )
  define.boolean(
    "tensorboard", RUN.tensorboard, "Also write TensorBoard events (needs tensorboardX)."
  )
  define.string(
    "wandb",
    None,
    "PROJECT or ENTITY/PROJECT: also write metrics to Weights & Biases (needs wandb). A resumed "
    "run continues its W&B run; $WANDB_MODE=offline keeps everything in WORKDIR/wandb.",
  )
  define.string(
    "profile_steps",
    None,
    "A:B: write a trace of steps A to B to WORKDIR/profile, for TensorBoard or ui.perfetto.dev.",
  )
