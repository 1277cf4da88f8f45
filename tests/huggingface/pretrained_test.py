"""Folders of Hugging Face without transformers: round trips, what is refused, memory. Logits
against
transformers: pretrained_parity_test.py.
"""

import dataclasses
import functools
import json
import os
import shutil
import struct

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from sparsek.config import TransformerConfig
from sparsek.errors import UsageError
from sparsek.huggingface import pretrained, safetensors
from sparsek.huggingface.families import FAMILIES, describe, layouts, read_config
from sparsek.model.transformer import init_params, unstack_layers
from sparsek.runs.checkpoint import abstract_params

LLAMA = TransformerConfig(
  vocab_size=19,
  num_layers=2,
  embed_dim=8,
  num_heads=4,
  num_kv_heads=2,
  head_dim=6,
  mlp_dim=10,
  attention="full",
  tie_embeddings=False,
  max_positions=32,
)
NEOX = dataclasses.replace(
  LLAMA,
  num_kv_heads=4,
  head_dim=4,
  embed_dim=16,
  norm="layer_norm",
  mlp="gelu",
  rope_fraction=0.5,
  use_bias=True,
  out_bias=True,
  mlp_bias=True,
  parallel_residual=True,
)
CASES = {
  "llama": ("llama", LLAMA),
  "llama, biases, llama3": (
    "llama",
    dataclasses.replace(
      LLAMA, use_bias=True, out_bias=True, mlp_bias=True, rope_scaling="llama3:8:1:4:16"
    ),
  ),
  "mistral": ("mistral", dataclasses.replace(LLAMA, attention="sliding_window", window=5)),
  "qwen2": (
    "qwen2",
    dataclasses.replace(
      LLAMA, use_bias=True, attention=("full", "sliding_window"), window=3, tie_embeddings=True
    ),
  ),
  "qwen3": ("qwen3", dataclasses.replace(LLAMA, qk_norm=True, rope_theta=5e5, norm_eps=1e-5)),
  "gpt_neox": ("gpt_neox", NEOX),
  "gpt2": (
    "gpt2",
    dataclasses.replace(
      NEOX,
      parallel_residual=False,
      rope_fraction=1.0,
      positions="learned",
      mlp="gelu_tanh",
      tie_embeddings=True,
    ),
  ),
  "sparsek": (
    "llama",
    dataclasses.replace(
      LLAMA,
      attention="sparsek,full",
      k=3,
      window=4,
      scorer="conv",
      gate="value",
      tie_embeddings=True,
    ),
  ),
  "sparsek, layers of their own k and window": (
    "mistral",
    dataclasses.replace(LLAMA, attention="sliding_window:w3,sparsek:k5:w2", k=3, window=4),
  ),
  "sparsek, fused, scanned": (
    "gpt_neox",
    dataclasses.replace(
      NEOX,
      num_layers=4,
      attention="sparsek,linear",
      k=3,
      window=4,
      scan_layers=True,
      dtype="bfloat16",
    ),
  ),
}


def random_params(config, dtype="float32"):
  generator = np.random.default_rng(0)
  return jax.tree.map(
    lambda leaf: jnp.asarray(generator.normal(size=leaf.shape), dtype), abstract_params(config)
  )


def assert_bit_equal(a, b):
  bits = lambda x: np.asarray(x).reshape(-1).view(np.uint8)
  jax.tree.map(
    lambda x, y: (
      np.testing.assert_array_equal(bits(x), bits(y)),
      np.testing.assert_equal(x.dtype, y.dtype),
    ),
    a,
    b,
  )


@pytest.mark.parametrize("name", CASES)
def test_round_trip(name, tmp_path):
  family, config = CASES[name]
  params, folder = random_params(config), str(tmp_path / "model")
  pretrained.save(folder, config, params)
  written = json.loads((tmp_path / "model" / "config.json").read_text())
  assert written["model_type"] == family
  assert ("sparsek" in written) == name.startswith("sparsek")
  back_config, back = pretrained.load(folder)
  assert back_config == config
  assert_bit_equal(back, params)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_shards_in_half_precision(dtype, tmp_path):
  config = dataclasses.replace(LLAMA, dtype="bfloat16" if dtype == "bfloat16" else "float32")
  params, folder = random_params(config, dtype), str(tmp_path / "model")
  pretrained.save(folder, config, params, max_shard_bytes=500)
  index = json.loads((tmp_path / "model" / safetensors.INDEX).read_text())
  assert len(set(index["weight_map"].values())) > 3 and index["metadata"]["total_size"] == sum(
    leaf.nbytes for leaf in jax.tree.leaves(params)
  )
  back_config, back = pretrained.load(folder, dtype=None)
  assert back_config == config and "sparsek" not in json.loads(
    (tmp_path / "model" / "config.json").read_text()
  )
  assert_bit_equal(back, params)
  assert_bit_equal(
    pretrained.load(folder)[1], jax.tree.map(lambda leaf: leaf.astype("float32"), params)
  )


def test_fused_projections_lie_as_the_families_have_them():
  """GPT-NeoX: head by head query, key, value; GPT-2: all queries, all keys, all values, and
  matrices as [in, out].
  """
  size = dict(E=16, H=4, D=4, **{"3": 3})
  for family, shape, order in (("gpt_neox", "H3DE", "EHD"), ("gpt2", "E3HD", "EHD")):
    found = layouts(FAMILIES[family], 2)["layers_1/attention/key/kernel"]
    assert ("".join(found.there), found.here, found.part) == (shape, order, 1)
  config, params = CASES["gpt_neox"][1], random_params(CASES["gpt_neox"][1])
  attention = params["layers_1"]["attention"]
  part = (found._replace(name="x", there=("H3D", "E")),)
  fused = pretrained._join(
    [
      (part[0]._replace(part=i), attention[kind]["kernel"], Ellipsis)
      for i, kind in enumerate(("query", "key", "value"))
    ],
    (48, 16),
  )
  for i, kind in enumerate(("query", "key", "value")):
    want = np.asarray(attention[kind]["kernel"]).reshape(config.embed_dim, -1).T.reshape(4, 4, 16)
    np.testing.assert_array_equal(fused.reshape(size["H"], 3, size["D"], 16)[:, i], want)


def test_a_bare_models_names_lack_the_prefix_and_buffers_are_left_out(tmp_path):
  config, params = CASES["gpt2"][1], random_params(CASES["gpt2"][1])
  pretrained.save(str(tmp_path / "whole"), config, params)
  files = safetensors.open_folder(str(tmp_path / "whole"))
  tensors = {name.removeprefix("transformer."): file.view(name) for name, file in files.items()}
  tensors |= {
    "h.0.attn.bias": np.ones((1, 1, 4, 4), np.uint8),
    "lm_head.weight": tensors["wte.weight"],
  }
  write(tmp_path / "bare", json.loads((tmp_path / "whole" / "config.json").read_text()), tensors)
  assert_bit_equal(pretrained.load(str(tmp_path / "bare"))[1], params)


def test_a_dense_model_is_read_as_a_sparsek_one_and_back(tmp_path):
  dense = dataclasses.replace(LLAMA, num_layers=4)
  params, folder, key = random_params(dense), str(tmp_path / "dense"), jax.random.key(3)
  pretrained.save(folder, dense, params)
  sparse = dataclasses.replace(
    dense, attention="sparsek,full", k=3, window=4, scan_layers=True, rope_theta=5e5
  )
  _, converted = pretrained.load(folder, config=sparse, key=key)
  fresh = init_params(sparse, key)
  scorer = converted["layers"]["blocks_0"]["attention"]["scorer"]
  assert_bit_equal(scorer, fresh["layers"]["blocks_0"]["attention"]["scorer"])
  plain = unstack_layers(sparse, converted)
  assert "scorer" not in plain["layers_1"]["attention"]
  for i in (0, 2):
    del plain[f"layers_{i}"]["attention"]["scorer"]
  assert_bit_equal(plain, params)
  pretrained.save(str(tmp_path / "sparse"), sparse, converted)
  # two scorers are there, two are new
  moved = dataclasses.replace(sparse, attention="sparsek", scan_layers=False)
  _, again = pretrained.load(str(tmp_path / "sparse"), config=moved, key=key)
  assert_bit_equal(
    again["layers_2"]["attention"]["scorer"], jax.tree.map(lambda leaf: leaf[1], scorer)
  )
  assert "scorer" in again["layers_1"]["attention"]
  assert_bit_equal(pretrained.load(str(tmp_path / "sparse"), config=dense)[1], params)
  with pytest.raises(ValueError, match="key=None: the folder lacks 12 parameters"):
    pretrained.load(folder, config=dataclasses.replace(moved))
  with pytest.raises(
    UsageError, match="another model than the one asked for: embed_dim=16 here, 8 there"
  ):
    pretrained.load(folder, config=dataclasses.replace(dense, embed_dim=16))


def test_parameters_of_another_model_are_not_saved(tmp_path):
  with pytest.raises(UsageError, match="layers_1"):
    pretrained.save(
      str(tmp_path / "model"), LLAMA, random_params(dataclasses.replace(LLAMA, num_layers=1))
    )
  (tmp_path / "file").write_text("")
  with pytest.raises(UsageError, match="is not empty"):
    pretrained.save(str(tmp_path), LLAMA, random_params(LLAMA))


def test_models_without_a_family_are_refused():
  with pytest.raises(UsageError, match="llama has no norm=layer_norm;.*gpt_neox: hidden_act"):
    describe(dataclasses.replace(LLAMA, norm="layer_norm"))
  with pytest.raises(UsageError, match="no qk_norm=True"):
    describe(dataclasses.replace(LLAMA, qk_norm=True), family="llama")
  with pytest.raises(UsageError, match="family='bert' is not one of"):
    describe(LLAMA, family="bert")


def write(folder, config, tensors):
  """A folder of one file; `tensors` are arrays."""
  os.makedirs(folder)
  pending = {
    name: safetensors.Pending(array.dtype, array.shape, lambda array=array: array)
    for name, array in tensors.items()
  }
  safetensors.write_folder(str(folder), pending, 10**9)
  (folder / "config.json").write_text(json.dumps(config))


@pytest.fixture(scope="module")
def good(tmp_path_factory):
  """A folder of two shards."""
  folder = tmp_path_factory.mktemp("good") / "model"
  config = dataclasses.replace(LLAMA, num_layers=1)
  params = random_params(config)
  pretrained.save(str(folder), config, params, max_shard_bytes=3000)
  assert len(list(folder.glob("*.safetensors"))) == 2
  pretrained.load(str(folder))
  return folder


def edit_json(folder, name, change):
  value = json.loads((folder / name).read_text())
  change(value)
  (folder / name).write_text(json.dumps(value))


def edit_header(folder, change, extra=b""):
  """Changes the header of the first shard; the data stay as they are."""
  path = folder / "model-00001-of-00002.safetensors"
  raw = path.read_bytes()
  (length,) = struct.unpack("<Q", raw[:8])
  header = json.loads(raw[8 : 8 + length])
  text = json.dumps(change(header) or header)
  path.write_bytes(struct.pack("<Q", len(text)) + text.encode() + raw[8 + length :] + extra)


EMBEDDING = "model.embed_tokens.weight"
weight_map = lambda shard: (
  lambda folder: edit_json(
    folder, safetensors.INDEX, lambda index: index["weight_map"].update({EMBEDDING: shard})
  )
)
config_with = lambda **fields: (
  lambda folder: edit_json(folder, "config.json", lambda config: config.update(fields))
)
header_with = lambda **entry: (
  lambda folder: edit_header(folder, lambda header: header[EMBEDDING].update(entry))
)


def poison(value):
  def change(folder):
    path = folder / "model-00001-of-00002.safetensors"
    raw = bytearray(path.read_bytes())
    raw[-4:] = np.float32(value).tobytes()
    path.write_bytes(raw)

  return change


def only_a_pickle(folder):
  for path in folder.glob("model*"):
    path.unlink()
  (folder / "pytorch_model.bin").write_bytes(b"\x80\x04.")


def more_tensors(folder):
  shutil.rmtree(folder)
  config = dataclasses.replace(LLAMA, num_layers=1)
  write(folder, describe(config), {"model.embed_tokens.weight": np.zeros((19, 8), np.float32)})


def with_tensors(change_tensors):
  def change(folder):
    tensors = {
      name: np.array(file.view(name)) for name, file in safetensors.open_folder(str(folder)).items()
    }
    config = json.loads((folder / "config.json").read_text())
    shutil.rmtree(folder)
    write(folder, config, tensors | change_tensors(tensors))

  return change


change_dtype = lambda dtype: with_tensors(
  lambda tensors: {EMBEDDING: tensors[EMBEDDING].astype(dtype)}
)


HOSTILE = {
  "no folder": (shutil.rmtree, "no such folder"),
  "no config": (lambda folder: (folder / "config.json").unlink(), "config.json cannot be read"),
  "config is no JSON": (lambda folder: (folder / "config.json").write_text("{"), "no JSON"),
  "config is nested without end": (
    lambda folder: (folder / "config.json").write_text("[" * 200_000),
    "nested too deeply",
  ),
  "config is a list": (
    lambda folder: (folder / "config.json").write_text("[]"),
    "expected an object",
  ),
  "a key twice": (
    lambda folder: (folder / "config.json").write_text('{"a": 1, "a": 2}'),
    "a key twice",
  ),
  "pickle": (only_a_pickle, "'pytorch_model.bin' .* a pickle file is not read"),
  "nothing": (
    lambda folder: [path.unlink() for path in folder.glob("model*")],
    "holds neither model.safetensors nor",
  ),
  "a path that leaves the folder": (
    weight_map("../model.safetensors"),
    "expected a .safetensors file of the folder itself",
  ),
  "an absolute path": (weight_map("/etc/passwd"), "of the folder itself"),
  "a path of another system": (weight_map("..\\model.safetensors"), "of the folder itself"),
  "a shard that is a number": (weight_map(3), "of the folder itself"),
  "a missing shard": (
    lambda folder: (folder / "model-00002-of-00002.safetensors").unlink(),
    "lacks 1 of the 2 shards .*model-00002-of-00002",
  ),
  "a tensor in another shard": (
    weight_map("model-00002-of-00002.safetensors"),
    "disagree on where 'model.embed_tokens.weight' is",
  ),
  "no weight map": (
    lambda folder: (folder / safetensors.INDEX).write_text("{}"),
    "weight_map is None",
  ),
  "an empty file": (
    lambda folder: (folder / "model-00001-of-00002.safetensors").write_bytes(b""),
    "it has 0 bytes",
  ),
  "a header longer than the file": (
    lambda folder: (folder / "model-00001-of-00002.safetensors").write_bytes(
      b"\xff" * 7 + b"\x00abc"
    ),
    "announces a header",
  ),
  "a header that is no JSON": (
    lambda folder: (folder / "model-00001-of-00002.safetensors").write_bytes(
      b"\x03" + bytes(7) + b"{x}"
    ),
    "header is no JSON",
  ),
  "a header that is a list": (
    lambda folder: edit_header(folder, lambda header: [1]),
    "no JSON object",
  ),
  "an entry that is a number": (
    lambda folder: edit_header(folder, lambda header: header | {"x": 3}),
    "'x' has dtype None",
  ),
  "offsets beyond the file": (
    header_with(data_offsets=[0, 10**12]),
    "lies at bytes 0 to 1000000000000",
  ),
  "negative offsets": (header_with(data_offsets=[-608, 0]), "has data_offsets"),
  "a shape that does not fit": (header_with(shape=[19, 9]), "needs 684 bytes, and has 608"),
  "a shape that overflows": (header_with(shape=[2**62, 2**62]), "needs .* bytes"),
  "a negative shape": (header_with(shape=[-19, -8]), "has shape"),
  "an unknown dtype": (header_with(dtype="F12"), "has dtype 'F12'"),
  "two tensors in one place": (
    lambda folder: edit_header(folder, lambda header: header | {"x": header[EMBEDDING]}),
    "where the one before it ends",
  ),
  "bytes of no tensor": (
    lambda folder: edit_header(folder, lambda header: None, extra=b"12"),
    "tensors end at byte",
  ),
  "NaN": (poison(np.nan), "holds NaN or infinite"),
  "infinity": (poison(np.inf), "holds NaN or infinite"),
  "missing tensors": (more_tensors, "lacks 11 of the 12 tensors"),
  "a head left over": (
    config_with(tie_word_embeddings=True),
    "tie_word_embeddings is true, and lm_head.weight differs",
  ),
  "tensors left over": (
    with_tensors(lambda tensors: {"model.layers.0.gate": np.ones(2)}),
    "holds 1 tensors that .* no place for: .model.layers.0.gate",
  ),
  "another shape": (
    config_with(intermediate_size=11),
    "has shape .8, 10., and config.json asks for .8, 11.",
  ),
  "integers": (change_dtype(np.int32), "has dtype int32, expected float32"),
  "quantised": (change_dtype(ml_dtypes.float8_e4m3fn), "has dtype float8_e4m3fn, expected float32"),
  "a vocabulary larger than the file": (
    config_with(vocab_size=10**9),
    "vocab_size=1000000000, but the tensors hold",
  ),
  "heads larger than the file": (
    config_with(head_dim=2000),
    "embed_dim=8, head_dim=2000, but the tensors hold",
  ),
  "a number beyond 32 bits": (
    config_with(vocab_size=10**15),
    "vocab_size=1000000000000000 must be from 1 to 2147483647",
  ),
  "many layers": (
    config_with(num_hidden_layers=10**9),
    "num_hidden_layers=1000000000 must be from 1 to 10",
  ),
  "more layers than tensors": (
    config_with(num_hidden_layers=500),
    "num_layers=500, but there are 12 tensors",
  ),
  "a pattern without end": (
    config_with(sparsek={"attention": ["full*9999999999"]}),
    "sparsek.attention=",
  ),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_folders_are_refused_with_a_reason(name, good, tmp_path):
  change, words = HOSTILE[name]
  folder = tmp_path / "model"
  shutil.copytree(good, folder)
  change(folder)
  with pytest.raises(UsageError, match=words) as error:
    pretrained.load(str(folder))
  assert "\n" not in str(error.value) and len(str(error.value)) < 1000


def test_any_damaged_header_is_opened_or_refused_in_one_sentence(good, tmp_path):
  """1000 mutations: bytes of the header, values of an entry, cuts, bytes at the end."""
  raw = (good / "model-00001-of-00002.safetensors").read_bytes()
  (length,) = struct.unpack("<Q", raw[:8])
  generator, path, opened = np.random.default_rng(0), tmp_path / "model.safetensors", 0
  draw = lambda values: values[generator.integers(len(values))]
  values = [*ODD_VALUES, [0, 0], [-1, 3], [2**63, 2**63], [1.5, 2], "F64", "I8", "BOOL"]
  for i in range(1000):
    if i % 2:
      header = json.loads(raw[8 : 8 + length])
      entry = header[draw(list(header))]
      entry[draw(["dtype", "shape", "data_offsets", "x", "a\nb"])] = draw(values)
      text = json.dumps(header).encode()
      content = struct.pack("<Q", len(text)) + text + raw[8 + length :]
    else:
      content = bytearray(raw + bytes(draw([0, 0, 0, 3])))
      for _ in range(draw([1, 2, 8])):
        content[generator.integers(8 + length)] = generator.integers(256)
      content = content[: draw([None, None, None, generator.integers(len(raw))])]
    path.write_bytes(content)
    try:
      file = safetensors.SafetensorsFile(str(path))
      opened += len([file.view(name) for name in file.tensors]) > 0
    except UsageError as error:
      assert len(str(error).splitlines()) == 1 and len(str(error)) < 1000
  assert 20 < opened < 500


LLAMA_JSON = describe(LLAMA)
QWEN_JSON = describe(CASES["qwen2"][1])


@pytest.mark.parametrize(
  "fields, words",
  [
    (LLAMA_JSON | {"model_type": "bert"}, "model_type='bert' is not one of llama"),
    (
      LLAMA_JSON | {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}},
      "rope_scaling.rope_type='yarn' is not one of default, linear, llama3",
    ),
    (LLAMA_JSON | {"rope_scaling": {"type": "dynamic", "factor": 4.0}}, "rope_type='dynamic'"),
    (LLAMA_JSON | {"rope_scaling": {"type": "linear"}}, "rope_scaling.factor=None is missing"),
    (
      LLAMA_JSON | {"rope_scaling": {"type": "linear", "factor": "4"}},
      "rope_scaling.factor='4' is no float",
    ),
    (
      LLAMA_JSON | {"rope_scaling": {"type": "linear", "factor": 4.0, "attention_factor": 2.0}},
      "rope_scaling.attention_factor=2.0 is not supported",
    ),
    (
      LLAMA_JSON | {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}},
      "partial_rotary_factor=0.5",
    ),
    (LLAMA_JSON | {"hidden_act": "gelu"}, "hidden_act='gelu' is not supported in llama"),
    (LLAMA_JSON | {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping=50.0 is not supported"),
    (
      LLAMA_JSON | {"quantization_config": {"bits": 4}},
      "quantization_config={'bits': 4} is not supported",
    ),
    (LLAMA_JSON | {"sliding_window": 8}, "sliding_window=8 is not supported in llama"),
    (LLAMA_JSON | {"hidden_size": None}, "hidden_size=None is no int"),
    (LLAMA_JSON | {"hidden_size": True}, "hidden_size=True is no int"),
    (LLAMA_JSON | {"rms_norm_eps": float("inf")}, "rms_norm_eps=inf must be from 0.0 to 1.0"),
    (LLAMA_JSON | {"num_key_value_heads": 3}, "num_heads=4 must be a multiple of num_kv_heads=3"),
    (LLAMA_JSON | {"num_attention_heads": 0}, "num_attention_heads=0 must be from 1"),
    (LLAMA_JSON | {"sparsek": {"embed_dim": 3}}, "sparsek.embed_dim=3 is not known"),
    (LLAMA_JSON | {"sparsek": {"k": "x"}}, "sparsek.k='x' is no int"),
    (QWEN_JSON | {"layer_types": ["full_attention", "chunked_attention"]}, "layer_types=.*chunked"),
    (QWEN_JSON | {"use_sliding_window": False}, "asks for sliding_attention without"),
    (QWEN_JSON | {"layer_types": None, "max_window_layers": None}, "max_window_layers=None"),
    (
      describe(CASES["gpt2"][1]) | {"scale_attn_by_inverse_layer_idx": True},
      "scale_attn_by_inverse_layer_idx=True",
    ),
    (describe(CASES["gpt2"][1]) | {"scale_attn_weights": False}, "scale_attn_weights=False"),
  ],
)
def test_fields_without_a_counterpart_are_refused(fields, words):
  with pytest.raises(UsageError, match=words):
    read_config(fields, "config.json")


def test_rope_is_read_as_transformers_4_and_5_write_it():
  scaling = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
  }
  old = LLAMA_JSON | {"rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3", **scaling}}
  new = {**LLAMA_JSON, "rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, **scaling}}
  del new["rope_theta"]
  want = dataclasses.replace(LLAMA, rope_theta=5e5, rope_scaling=("llama3", 8, 1, 4, 16))
  assert read_config(old, "old") == read_config(new, "new") == want
  neox = describe(NEOX)
  del neox["rotary_pct"], neox["rotary_emb_base"]
  assert (
    read_config(
      neox
      | {
        "rope_parameters": {"partial_rotary_factor": 0.5, "rope_theta": 1e4, "rope_type": "default"}
      },
      "new",
    )
    == NEOX
  )


PLAIN = {"model_type": "llama", "num_hidden_layers": 2}  # all else by default
LINEAR = {"rope_type": "linear", "factor": 4.0}
NEOX_451 = {
  "model_type": "gpt_neox",
  "rope_theta": 500,
  "rotary_emb_base": 500,
  "rotary_pct": 0.5,
  "partial_rotary_factor": 0.5,
  "rope_scaling": None,
  "attention_bias": True,
}


@pytest.mark.parametrize(
  "fields, expected",
  [
    (
      {"model_type": "mistral"},
      {"attention": ("sliding_window",), "window": 4096, "mlp_dim": 14336},
    ),
    ({"model_type": "mistral", "sliding_window": None}, {"attention": ("full",)}),
    (
      {"model_type": "qwen2", "use_sliding_window": True, "num_hidden_layers": 29},
      {"attention": ("full",) * 28 + ("sliding_window",), "window": 4096, "max_positions": 32768},
    ),
    ({"model_type": "qwen3"}, {"head_dim": 128, "qk_norm": True, "attention": ("full",)}),
    ({"model_type": "gpt2", "n_layer": 1}, {"mlp": "gelu_tanh", "mlp_dim": 3072}),
    ({"model_type": "gpt2", "num_hidden_layers": 3, "n_inner": None}, {"num_layers": 3}),
    ({"model_type": "gpt_neox"}, {"mlp": "gelu", "rope_fraction": 0.25, "parallel_residual": True}),
    (NEOX_451, {"rope_theta": 500.0, "rope_fraction": 0.5}),
    (PLAIN, {"mlp": "swiglu", "num_kv_heads": 32, "rope_theta": 1e4, "tie_embeddings": False}),
    (
      PLAIN | {"rope_scaling": LINEAR, "rope_parameters": {"rope_theta": 1e4}},
      {"rope_scaling": ("linear", 4.0)},
    ),
    (
      PLAIN
      | {"rope_scaling": LINEAR, "rope_parameters": {**LINEAR, "rope_theta": 7.0}, "rope_theta": 7},
      {"rope_scaling": ("linear", 4.0), "rope_theta": 7.0},
    ),
    (
      PLAIN
      | {"rope_scaling": {}, "rope_parameters": {**LINEAR, "type": "linear", "rope_theta": 7}},
      {"rope_scaling": ("linear", 4.0), "rope_theta": 7.0},
    ),
    (
      PLAIN
      | {
        "rope_parameters": {
          "rope_type": "llama3",
          "factor": 8.0,
          "low_freq_factor": 1.0,
          "high_freq_factor": 4.0,
        }
      },
      {"rope_scaling": ("llama3", 8.0, 1.0, 4.0, 2048.0)},
    ),
    (PLAIN | {"dtype": "bfloat16", "torch_dtype": "bfloat16"}, {"dtype": "bfloat16"}),
    (
      PLAIN
      | {
        "attention_dropout": 0.1,
        "hidden_dropout_prob": 0.1,
        "initializer_range": 0.5,
        "use_cache": True,
        "output_attentions": True,
        "is_decoder": True,
        "temperature": 0.6,
        "_attn_implementation": "sdpa",
        "unk_token_id": 3,
        "max_sequence_length": 2048,
        "chunk_size_feed_forward": 8,
        "rope_interleaved": False,
        "pruned_heads": {},
      },
      {},
    ),
  ],
)
def test_absent_fields_and_other_spellings_are_read_as_transformers_does(fields, expected):
  """hf_defaults_parity_test.py compares with transformers itself."""
  config = read_config(fields, "config.json")
  assert {field: getattr(config, field) for field in expected} == expected


@pytest.mark.parametrize(
  "fields, words",
  [
    (NEOX_451 | {"rope_theta": 7}, "rope_theta=7.0 and rotary_emb_base=500.0 disagree"),
    ({"model_type": "gpt_neox", "rope_theta": 7}, "rope_theta=7.0 and rotary_emb_base=10000.0 dis"),
    (NEOX_451 | {"partial_rotary_factor": 1.0}, "partial_rotary_factor=1.0 and rotary_pct=0.5 "),
    (
      {"model_type": "gpt2", "n_layer": 1, "num_hidden_layers": 2},
      "num_hidden_layers=2 and n_layer=1 disagree",
    ),
    (
      PLAIN | {"rope_scaling": LINEAR, "rope_parameters": {**LINEAR, "factor": 2.0}},
      "rope_scaling=.*4.0.* and rope_parameters=.*2.0.* disagree",
    ),
    (
      PLAIN | {"rope_scaling": LINEAR, "rope_parameters": {"rope_theta": 5e5}},
      "rope_parameters.rope_theta=500000.0 and rope_theta=10000.0 disagree",
    ),
    (
      PLAIN | {"rope_theta": 7, "rope_parameters": {"rope_theta": 8}},
      "rope_parameters.rope_theta=8.0 and rope_theta=7.0 disagree",
    ),
    (PLAIN | {"rope_scaling": LINEAR | {"type": "dynamic"}}, "'linear' and type='dynamic' dis"),
    (PLAIN | {"dtype": "float16", "torch_dtype": "bfloat16"}, "dtype='float16' and torch_dtype="),
    (
      {"model_type": "mistral", "num_hidden_layers": 1, "layer_types": ["full_attention"]},
      "layer_types=.* and sliding_window=4096 disagree",
    ),
    (PLAIN | {"auto_map": {"AutoModel": "modeling.Model"}}, "auto_map=.* is not supported in ll"),
    (
      PLAIN
      | {"hidden_size": -1, "rope_theta": 0, "dtype": 3, "hidden_act": [], "sparsek": {"k": 0}},
      "hidden_size=-1.*rope_theta=0 .*hidden_act=.*dtype=3.*sparsek.k=0",
    ),
    (PLAIN | {"soft": 1, "cap": 2}, r"soft=1 is not .*; cap=2 is not .*\(remove what changes no"),
    (PLAIN | {"num_hidden_layers": 0, "soft": 1}, "num_hidden_layers=0 must be .*; soft=1 is not"),
    (PLAIN | {"sparsek": 0}, "sparsek=0 is no object"),
    (PLAIN | {"hidden_size": 30}, "num_attention_heads=32 must divide the width 30"),
    (PLAIN | {f"x{i}": i + 1 for i in range(30)}, "; and 20 more$"),
  ],
)
def test_what_disagrees_is_refused_all_in_one_message(fields, words):
  with pytest.raises(UsageError, match=words) as error:
    read_config(fields, "config.json")
  assert "\n" not in str(error.value)


ODD_VALUES = [
  None,
  True,
  False,
  0,
  1,
  -1,
  3,
  2**31,
  10**18,
  10**400,
  -0.5,
  16.0,
  1e308,
  float("inf"),
  float("nan"),
  "",
  "4",
  "\ud800",
  "a\nb",
  [],
  [1],
  ["full"],
  [[[]]],
  {},
  {"a": 1},
  "bfloat16",
  "full*99",
  ["sparsek:k99999999999"],
  {"rope_type": "linear", "factor": 2.0},
  {"k": -1},
]


def test_any_value_of_any_field_ends_in_a_model_or_in_one_sentence():
  """Every field, at the top and in sections, with every odd value."""
  rope = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
  }
  more = {"rope_parameters": rope, "dtype": "float32", "eos_token_id": 2, "a\nb": 0}
  bases = [
    describe(config) | (more if family == "qwen2" else {}) for family, config in CASES.values()
  ]
  single = [(base, (key,), value) for base in bases for key in base for value in ODD_VALUES]
  sections = ("sparsek", "rope_parameters")
  single += [
    (base, (outer, key), value)
    for base in bases
    for outer in sections
    for key in base.get(outer, ())
    for value in ODD_VALUES
  ]
  models = 0
  for base, path, value in single:
    fields = json.loads(json.dumps(base))
    target = fields if len(path) == 1 else fields[path[0]]
    target[path[-1]] = value
    try:
      assert isinstance(read_config(fields, "config.json"), TransformerConfig)
      models += 1
    except UsageError as error:
      assert len(str(error).splitlines()) == 1 and len(str(error)) < 2000
  print(f"{models} models of {len(single)}")
  assert models > 100


def test_qwen2_upper_layers_slide():
  fields = QWEN_JSON | {
    "layer_types": None,
    "max_window_layers": 1,
    "use_sliding_window": True,
    "sliding_window": 3,
  }
  assert read_config(fields, "config.json").layer_kinds == ("full", "sliding_window")
  assert read_config(fields | {"use_sliding_window": False}, "config.json").layer_kinds == (
    "full",
    "full",
  )


def memory(key):
  with open("/proc/self/status") as file:
    return next(int(line.split()[1]) * 1024 for line in file if line.startswith(key))


def test_memory_is_at_most_a_third_more_than_the_checkpoint(tmp_path):
  """The peak of what is resident, mapped files included; the embedding is the larger part, as in
  small models.
  """
  if not os.access("/proc/self/clear_refs", os.W_OK):
    pytest.skip("measures the peak of resident memory with /proc, which is not here")
  config = dataclasses.replace(LLAMA, vocab_size=24_000, embed_dim=512, head_dim=64, mlp_dim=1024)
  params = jax.block_until_ready(
    jax.tree.map(lambda leaf: jnp.ones(leaf.shape), abstract_params(config))
  )
  size = sum(leaf.nbytes for leaf in jax.tree.leaves(params))

  def peak_of(function):
    before = memory("VmRSS")
    with open("/proc/self/clear_refs", "w") as file:
      file.write("5")
    result = function()
    return (memory("VmHWM") - before) / size, result

  peak, _ = peak_of(functools.partial(pretrained.save, str(tmp_path / "model"), config, params))
  print(f"saving {size / 1e6:.0f} MB: {peak:.2f} of it more than the parameters")
  assert peak < 0.3
  del params
  peak, (_, loaded) = peak_of(lambda: pretrained.load(str(tmp_path / "model")))
  print(f"loading {size / 1e6:.0f} MB: {peak:.2f} of it")
  assert peak < 1.3 and loaded["embed"]["embedding"].shape == (24_000, 512)
