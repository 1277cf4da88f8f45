"""Folders of Hugging Face without transformers: round trips, refusals, memory.

config_reading_test.py tests config.json, and pretrained_parity_test.py compares logits with
transformers.
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

from sparsek.errors import UsageError
from sparsek.huggingface import pretrained, safetensors
from sparsek.huggingface.config_writing import describe
from sparsek.huggingface.families import FAMILIES, layouts
from sparsek.huggingface.tensor_layouts import StoredPiece, join_tensor
from sparsek.model.transformer import init_params, unstack_layers
from sparsek.runs.checkpoint import abstract_params
from tests.huggingface.example_models import CASES, LLAMA, ODD_VALUES


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


def test_fused_projections_have_the_layout_of_the_families():
  """GPT-NeoX: head by head query, key, value; GPT-2: all queries, all keys, all values, and
  matrices as [in, out].
  """
  for family, shape, order in (("gpt_neox", "H3DE", "EHD"), ("gpt2", "E3HD", "EHD")):
    layout = layouts(FAMILIES[family], 2)["layers_1/attention/key/kernel"]
    assert ("".join(layout.tensor_axes), layout.our_axes, layout.part) == (shape, order, 1)
  config, params = CASES["gpt_neox"][1], random_params(CASES["gpt_neox"][1])
  attention = params["layers_1"]["attention"]
  layout = layouts(FAMILIES["gpt_neox"], 2)["layers_1/attention/key/kernel"]
  parts = [
    StoredPiece(layout._replace(part=i), attention[kind]["kernel"], ...)
    for i, kind in enumerate(("query", "key", "value"))
  ]
  fused = join_tensor(parts, (48, 16))
  for i, kind in enumerate(("query", "key", "value")):
    want = np.asarray(attention[kind]["kernel"]).reshape(config.embed_dim, -1).T.reshape(4, 4, 16)
    np.testing.assert_array_equal(fused.reshape(4, 3, 4, 16)[:, i], want)


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
  # two scorers are in the folder, two are new
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


def write(folder, config, tensors):
  """Writes a folder of one file; `tensors` are arrays."""
  os.makedirs(folder)
  pending = {
    name: safetensors.Pending(array.dtype, array.shape, lambda array=array: array)
    for name, array in tensors.items()
  }
  safetensors.write_folder(str(folder), pending, 10**9)
  (folder / "config.json").write_text(json.dumps(config))


@pytest.fixture(scope="module")
def good(tmp_path_factory):
  """Returns a folder of two shards."""
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
  """Changes the header of the first shard, but not its data."""
  path = folder / "model-00001-of-00002.safetensors"
  raw = path.read_bytes()
  (length,) = struct.unpack("<Q", raw[:8])
  header = json.loads(raw[8 : 8 + length])
  text = json.dumps(change(header) or header)
  path.write_bytes(struct.pack("<Q", len(text)) + text.encode() + raw[8 + length :] + extra)


def header_edited(change, **options):
  """Returns the function of a folder that changes the header of its first shard."""
  return lambda folder: edit_header(folder, change, **options)


EMBEDDING = "model.embed_tokens.weight"


def weight_map(shard):
  def change(folder):
    edit_json(
      folder, safetensors.INDEX, lambda index: index["weight_map"].update({EMBEDDING: shard})
    )

  return change


def config_with(**fields):
  def change(folder):
    edit_json(folder, "config.json", lambda config: config.update(fields))

  return change


def header_with(**entry):
  def change(folder):
    edit_header(folder, lambda header: header[EMBEDDING].update(entry))

  return change


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


def change_dtype(dtype):
  return with_tensors(lambda tensors: {EMBEDDING: tensors[EMBEDDING].astype(dtype)})


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
  "a header that is a list": (header_edited(lambda header: [1]), "no JSON object"),
  "an entry that is a number": (
    header_edited(lambda header: header | {"x": 3}),
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
    header_edited(lambda header: header | {"x": header[EMBEDDING]}),
    "where the one before it ends",
  ),
  "bytes of no tensor": (header_edited(lambda header: None, extra=b"12"), "tensors end at byte"),
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
  """Tries 1000 mutations: bytes of the header, values of an entry, cuts, bytes at the end."""
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


def memory(key):
  with open("/proc/self/status") as file:
    return next(int(line.split()[1]) * 1024 for line in file if line.startswith(key))


def test_memory_is_at_most_a_third_more_than_the_checkpoint(tmp_path):
  """Measures the peak of resident memory, with mapped files.

  The embedding is the larger part of the model, as in small models.
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
