"""The table that describes a family, and the layout of its tensors.

A tensor's row is (its name, our parameter, layout). The layout names axes by letters: "HD E -> EHD"
means that the tensor is a matrix [H * D, E] and our parameter an array [E, H, D]. V vocabulary,
P positions, E width, H heads, G key/value heads, D head dimension, F width of the MLP, S scores of
a token, C channels of a scorer's convolution, T channels that it reads; "3" is the axis of query,
key and value in a fused projection. `*` is the number of the layer. Rows whose
parameter the configuration does not have (a bias, the output matrix of tied embeddings) are not
used.
"""

from collections.abc import Mapping
from typing import NamedTuple

# Endings of the names of buffers that old checkpoints hold and no model needs.
IGNORED_TENSORS = (
  ".rotary_emb.inv_freq",
  ".attention.bias",
  ".attention.masked_bias",
  ".attn.bias",
  ".attn.masked_bias",
)

# Our field -> (name in config.json, value of transformers' class if the field is absent).
Fields = Mapping[str, tuple[str, object]]


class Family(NamedTuple):
  """One model_type.

  Attributes:
    architecture: the class in transformers.
    prefix: of all names except that of the output matrix; checkpoints of the bare model lack it.
    tensors: (name, our parameter, layout).
    fields: those of config.json that the family has.
    fixed: the values of our fields that are the same in all models of the family.
    activation: the name of the field for the MLP's function, and its value if it is absent; None
      where the section "sparsek" says it.
    section: our fields of the architecture that the section "sparsek" holds.
    others: our field -> further names in config.json, each with whether transformers reads it; the
      value of a name that it does not read must agree with what it reads.
    attention: fields of the sliding window, and their values if they are absent; empty for a family
      without a sliding window. With "use_sliding_window", layers may differ.
  """

  architecture: str
  prefix: str
  tensors: tuple[tuple[str, str, str], ...]
  fields: Fields
  fixed: Mapping[str, object]
  activation: tuple[str, str] | None = ("hidden_act", "silu")
  section: tuple[str, ...] = ()
  others: Mapping[str, tuple[tuple[str, bool], ...]] = {}
  attention: Mapping[str, object] = {}


def common_fields(
  vocab: int, width: int, layers: int, heads: int, mlp: int, positions: int
) -> Fields:
  """Returns the fields that most families name alike, with the defaults of a family."""
  return {
    "vocab_size": ("vocab_size", vocab),
    "embed_dim": ("hidden_size", width),
    "num_layers": ("num_hidden_layers", layers),
    "num_heads": ("num_attention_heads", heads),
    "mlp_dim": ("intermediate_size", mlp),
    "max_positions": ("max_position_embeddings", positions),
    "tie_embeddings": ("tie_word_embeddings", False),
  }


def bias_fields(default: bool) -> Fields:
  """Returns the fields of a family in which one name stands for all biases of attention."""
  return {"use_bias": ("attention_bias", default), "out_bias": ("attention_bias", default)}


class Layout(NamedTuple):
  """The location of one of our parameters in a tensor.

  Attributes:
    name: of the tensor.
    tensor_axes: letters of the tensor's axes; a group of letters is one axis. Empty for a parameter
      that no family knows, which is stored as it is.
    our_axes: letters of our axes.
    part: index on the axis "3", or None without this axis.
  """

  name: str
  tensor_axes: tuple[str, ...]
  our_axes: str
  part: int | None


def layouts(family: Family, num_layers: int) -> dict[str, Layout]:
  """Returns {our parameter: its layout} of all parameters that a model of this family may have.

  The layers of the parameters are not stacked.
  """
  result = {}
  for name, path, layout in family.tensors:
    tensor_axes, our_axes = layout.split(" -> ")
    # A path "a/query|key|value/b" stands for three parameters.
    kinds = ("query", "key", "value") if "|" in path else ("query|key|value",)
    for i in range(num_layers if "*" in name else 1):
      for part, kind in enumerate(kinds):
        parameter = path.replace("query|key|value", kind).replace("*", str(i))
        result[parameter] = Layout(
          name.replace("*", str(i)),
          tuple(tensor_axes.split()),
          our_axes,
          part if len(kinds) > 1 else None,
        )
  return result
