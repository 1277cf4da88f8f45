"""Fields of config.json in all families: those that stand for ours, and those without effect."""

import dataclasses
import re

from sparsek.config import TransformerConfig

MAX_LAYERS = 10_000
MAX_SIZE = 2**31 - 1

# Our MLP -> names of its function in config.json; the first one is written.
ACTIVATIONS = {
  "swiglu": ("silu", "swish"),
  "gelu": ("gelu",),
  "gelu_tanh": ("gelu_new", "gelu_pytorch_tanh", "gelu_fast"),
}
# Our fields that config.json can express. All others go into its section "sparsek", except those of
# adapters, which are merged.
ARCHITECTURE = (
  "vocab_size",
  "embed_dim",
  "num_layers",
  "num_heads",
  "num_kv_heads",
  "head_dim",
  "mlp_dim",
  "max_positions",
  "norm",
  "norm_eps",
  "positions",
  "rope_theta",
  "rope_fraction",
  "rope_scaling",
  "qk_norm",
  "mlp",
  "use_bias",
  "out_bias",
  "mlp_bias",
  "parallel_residual",
  "tie_embeddings",
)
# Fields that matter in training alone: exported models do not have them.
_OF_TRAINING = ("lora_rank", "lora_alpha", "scorer_loss_kind")
SPARSEK_FIELDS = tuple(
  field.name
  for field in dataclasses.fields(TransformerConfig)
  if field.name not in (*ARCHITECTURE, *_OF_TRAINING)
)
# Fields that change no logit, most of them from transformers' base class.
NO_EFFECT = set(
  """
    _name_or_path name_or_path _commit_hash _attn_implementation attn_implementation
    _attn_implementation_autoset _attn_implementation_internal _flash_attn_2_enabled
    architectures model_type transformers_version use_bfloat16 torchscript
    use_cache return_dict chunk_size_feed_forward is_decoder tie_encoder_decoder tf_legacy_loss
    pretraining_tp gradient_checkpointing reorder_and_upcast_attn xla_device use_flash_attn
    id2label label2id num_labels problem_type task_specific_params finetuning_task
    tokenizer_class prefix n_ctx max_sequence_length model_max_length is_llama_config
    custom_pipelines _num_labels output_past use_return_dict
    transformers.js_config unsloth_version unsloth_fixed predict_special_tokens layerdrop
    max_length min_length max_new_tokens do_sample early_stopping num_beams num_beam_groups
    diversity_penalty temperature top_k top_p typical_p repetition_penalty length_penalty
    no_repeat_ngram_size encoder_no_repeat_ngram_size bad_words_ids num_return_sequences
    return_dict_in_generate remove_invalid_values exponential_decay_length_penalty
    suppress_tokens begin_suppress_tokens""".split()
)
NO_EFFECT_NAMES = re.compile(
  r".*dropout.*|.*_pdrop|initializer_.*|output_(attentions|hidden_states|scores|logits)"
  r"|.*_token_ids?|summary_.*"
)
# Fields in which null means that the value follows from others; elsewhere null is no value.
NULLABLE = ("num_key_value_heads", "head_dim", "n_inner")
# Our field -> smallest and largest value. Values outside overflow or are meaningless.
BOUNDS: dict[str, tuple[float, float]] = {
  "num_layers": (1, MAX_LAYERS),
  "norm_eps": (0.0, 1.0),
  "rope_theta": (1.0, 1e30),
  "scorer_lookback": (0, 4096),
  "scorer_lookahead": (0, 4096),
  "window": (0, MAX_SIZE),
}
DTYPES = ("float32", "bfloat16", "float16", "float64", "auto", None)
# Our field -> its name in the sections rope_scaling and rope_parameters.
ROPE_KEYS = {"rope_theta": "rope_theta", "rope_fraction": "partial_rotary_factor"}
# rope_type -> its numbers.
SCALINGS: dict[str, tuple[str, ...]] = {
  "default": (),
  "linear": ("factor",),
  "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}
