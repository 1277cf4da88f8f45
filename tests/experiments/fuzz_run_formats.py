"""Files of runs, grids, benchmarks and caches of the fuzz: made, damaged, read and checked."""

import dataclasses
import json
import os
import pathlib
import shutil

import numpy as np

from tests.experiments.fuzz_base import difference, equal, params_of, small_config, write_model_json
from tests.experiments.mutations import mutate_bytes, mutate_value

# metrics.jsonl


def make_metrics(folder):
  records = [
    {"step": step, "loss": 5 / step, "grad_norm": 0.5, "tokens_per_second": 10.0}
    for step in range(1, 7)
  ]
  records.insert(4, {"step": 4, "heldout_loss": 1.25})
  (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))


def _loads(line: bytes):
  try:
    return json.loads(line.decode("utf-8"))
  except (ValueError, RecursionError):
    return None


def _records(lines) -> list[dict]:
  values = map(_loads, lines)
  return [
    value
    for value in values
    if isinstance(value, dict)
    and isinstance(value.get("step"), int)
    and not isinstance(value["step"], bool)
  ]


def read_metrics(folder):
  from sparsek.runs import metrics

  before = (folder / "metrics.jsonl").read_bytes()
  records = metrics.read_metrics(str(folder / "metrics.jsonl"))
  metrics.MetricsWriter(str(folder), 10**30).close()
  return before, records, (folder / "metrics.jsonl").read_bytes()


def check_metrics(value, folder, good):
  before, records, after = value
  *lines, last = before.split(b"\n")
  wanted = _records([*lines, last])
  missing = [record for record in wanted if not any(equal(record, other) for other in records)]
  if missing:
    return f"{len(missing)} records are not read, such as {str(missing[0])[:150]}"
  kept = after.split(b"\n")
  values = [value for value in map(_loads, kept) if value is not None]
  lost = [
    line
    for line in lines
    if line.strip()
    and line not in kept
    and line.rstrip(b"\r") not in kept
    and not any(equal(_loads(line), x) for x in values)
  ]
  return f"resuming loses {len(lost)} lines, such as {lost[0][:100]}" if lost else None


# model.json


def make_model_json(folder):
  write_model_json(
    folder,
    small_config(
      attention=("sparsek", "full"), num_layers=2, vocab_size=257, rope_scaling=("linear", 2.0)
    ),
  )


def read_model_json(folder):
  from sparsek.runs import run_record

  config, run = run_record.load_run_config(str(folder))
  run_record.load_run_tokenizer(str(folder))
  return json.loads(json.dumps(dataclasses.asdict(config)))


def check_model_json(value, folder, good):
  now = json.loads((folder / "model.json").read_bytes())["model"]
  for name, said in now.items():
    if name in ("attention", "rope_scaling"):  # texts of these become tuples
      from sparsek.config import parse_layer_pattern, parse_rope_scaling

      said = json.loads(
        json.dumps(
          {"attention": parse_layer_pattern, "rope_scaling": parse_rope_scaling}[name](said)
        )
      )
    if not equal(value[name], said):
      return difference(value[name], said, name)
    if (
      said is not None
      and good[name] is not None
      and type(said) is not type(good[name])
      and not {type(said), type(good[name])} <= {int, float}
    ):
      return f"{name}={said!r} was taken"
    if isinstance(good[name], int) and isinstance(said, float):
      return f"{name}={said!r} was taken"
  return None


# flagfiles


def make_flagfile(folder):
  (folder / "run.flags").write_text(
    "# a comment\n--k=8\n--window=16\n--learning_rate=0.01\n--num_steps=40\n--gate=value\n"
    "--model=qk_norm=true\n--nosegment_documents\n"
    "--workdir=/tmp/some where\n--layer_pattern=sparsek*2,full\n\n--seed=3\n"
  )


def read_flagfile(folder):
  from absl import flags as absl_flags

  from sparsek.command_line.definer import names_of
  from sparsek.command_line.main import parse
  from sparsek.command_line.training_flags import define_pretrain_flags

  values = absl_flags.FlagValues()
  define_pretrain_flags(values)
  parse(["fuzz", f"--flagfile={folder}/run.flags"], values)
  texts = {"model": values["model"].serialize().partition("=")[2]}
  names = [name for name in names_of(values) if values[name].present]
  return {name: texts.get(name, values[name].value) for name in names}


def check_flagfile(value, folder, good):
  raw = (folder / "run.flags").read_bytes()
  try:
    text = raw.decode("utf-8-sig")
  except UnicodeDecodeError:
    return None if raw.startswith((b"\xff\xfe", b"\xfe\xff")) else "it is no UTF-8"
  said = {}
  for line in map(str.strip, text.split("\n")):
    name, equals, argument = line.removeprefix("--").partition("=")
    if line.startswith("--") and equals and name in value:
      said[name] = argument
  for name, argument in said.items():
    parsed = value[name]
    if name == "model":  # one of many spellings of true and false
      continue
    if name == "workdir":
      argument = os.path.normpath(argument)
    if type(parsed) in (int, float):
      argument = type(parsed)(argument)
    if not isinstance(parsed, bool) and parsed != argument:
      return difference(parsed, argument, f"--{name}")
  return None


# checkpoints


def _abstract_optimizer():
  import jax

  from sparsek.config import OptimizerConfig
  from sparsek.runs.checkpoint import abstract_params
  from sparsek.training.optimizer import make_optimizer

  return jax.eval_shape(make_optimizer(OptimizerConfig()).init, abstract_params(small_config()))


def make_checkpoint(folder):
  from sparsek.config import OptimizerConfig
  from sparsek.runs import checkpoint_writer
  from sparsek.training.optimizer import make_optimizer

  params = params_of(small_config())
  write_model_json(folder, small_config())
  writer = checkpoint_writer.CheckpointWriter(str(folder), keep=3)
  writer.save(
    7, params, make_optimizer(OptimizerConfig()).init(params), {"next_index": 12, "seed": 0}
  )
  writer.close()


def read_checkpoint(folder):
  import jax

  from sparsek.runs import checkpoint

  with checkpoint.quiet_orbax():
    restored = checkpoint.restore_newest(
      str(folder), small_config(), _abstract_optimizer(), None, lambda line: None
    )
  arrays = [
    np.asarray(leaf).tobytes() for leaf in jax.tree.leaves((restored.params, restored.opt_state))
  ]
  return restored.step, arrays, restored.data_state


def check_checkpoint(value, folder, good):
  differing = sum(a != b for a, b in zip(value[1], good[1], strict=True))
  return (
    difference(value[0], good[0], "step")
    or difference(value[2], good[2], "data")
    or (f"{differing} arrays are others" if differing else None)
  )


# saved caches


def make_cache(folder):
  from sparsek.generation.session import Session

  config = small_config(vocab_size=257)
  session = Session(config, params_of(config), 1)
  list(session.generate([[1, 2, 3, 4, 5, 6]], max_new_tokens=3, temperature=0.0))
  session.save(str(folder / "cache.npz"))


def read_cache(folder):
  import jax

  from sparsek.generation import cache_file
  from sparsek.generation.session import Session

  config = small_config(vocab_size=257)
  cache, note, *_ = cache_file.load(str(folder / "cache.npz"), config)
  Session.load(str(folder / "cache.npz"), config, _cached_params())
  return [np.asarray(leaf) for leaf in jax.tree.leaves(cache)], note


_PARAMS = []


def _cached_params():
  if not _PARAMS:
    _PARAMS.append(params_of(small_config(vocab_size=257)))
  return _PARAMS[0]


def check_cache(value, folder, good):
  with np.load(folder / "cache.npz", allow_pickle=False) as file:
    leaves = [file[f"leaf_{i}"] for i in range(len(file.files) - 1)]
    head = json.loads(file["head"].tobytes())
  if len(leaves) != len(value[0]) or not all(
    a.tobytes() == b.tobytes() for a, b in zip(leaves, value[0])
  ):
    return "its arrays are not the file's"
  return difference(value[1], head["note"], "note")


def damage_cache(content, rng):
  """Damages bytes anywhere, or the head as JSON, or arrays, then with right checksums."""
  if rng.random() < 0.4:
    return mutate_bytes(content, rng)
  import io

  with np.load(io.BytesIO(content), allow_pickle=False) as file:
    arrays = {name: file[name] for name in file.files}
  if rng.random() < 0.6:
    head = mutate_value(json.loads(arrays["head"].tobytes()), rng)
    arrays["head"] = np.frombuffer(json.dumps(head).encode(), np.uint8)
  else:
    name = rng.choice(sorted(arrays))
    array = arrays.pop(name)
    kind = rng.randrange(6)
    if kind == 0:
      arrays[name + "x"] = array
    elif kind == 1:
      arrays[name] = array.astype(rng.choice((np.float64, np.int64, np.uint8, np.complex64)))
    elif kind == 2:
      arrays[name] = array[..., :-1] if array.ndim else array.reshape(1)
    elif kind == 3:
      arrays[name] = array.reshape(-1)
    elif kind == 4:
      most = np.iinfo(array.dtype).max if array.dtype.kind in "iu" else 3
      arrays[name] = np.full_like(array, most)
  out = io.BytesIO()
  np.savez(out, **arrays)
  return out.getvalue()


# records of grids, of recipes and of the benchmark


def _cells():
  from sparsek.experiments.reports import grid

  return grid.grid(["sparsek", "full"], [8], [8], ["straight_through"], ["linear"], 1)


def make_grid(folder):
  for i, cell in enumerate(_cells()):
    (folder / cell.name).mkdir()
    (folder / cell.name / "result.json").write_text(
      json.dumps({"heldout_loss": 5.0 + i, "step": 4, "tokens_per_second": 10.0})
    )


def read_grid(folder):
  from sparsek.experiments.reports import grid

  rows = grid.collect(str(folder), _cells())
  grid.markdown(grid.summarize(rows))
  if rows:
    grid.as_csv(rows)
  return rows


def check_grid(value, folder, good):
  paths = [folder / cell.name / "result.json" for cell in _cells()]
  # A cell without a result is not finished.
  now = {path: json.loads(path.read_bytes()) for path in paths if path.exists()}
  if len(value) != len(now):
    return "a result was left out"
  for row, said in zip(value, now.values()):
    for key in ("heldout_loss", "step", "tokens_per_second"):
      if not equal(row.get(key), said.get(key)):
        return difference(row.get(key), said.get(key), key)
      if key == "tokens_per_second" and row[key] is None:  # not measured
        continue
      if isinstance(row.get(key), bool) or not isinstance(row.get(key), (int, float)):
        return f"{key}={row.get(key)!r} was taken"
  return None


def make_minutes(folder):
  (folder / "minutes.json").write_text(json.dumps({"full_s0": 1.5, "sparsek_s0": 2.25}))


def read_minutes(folder):
  from sparsek.experiments.recipes import stages

  return stages.run_stages({}, str(folder))


def check_minutes(value, folder, good):
  now = json.loads((folder / "minutes.json").read_bytes())
  if not all(isinstance(x, (int, float)) and not isinstance(x, bool) for x in value.values()):
    return f"minutes {str(value)[:100]} were taken"
  return difference(value, now, "minutes")


def copy_record(name: str):
  source = pathlib.Path(__file__).parents[2] / "experiments" / "results" / name
  return lambda folder: shutil.copy(source, folder / "record.json") and None


def read_record(folder):
  from sparsek.experiments import benchmark

  return benchmark.load(str(folder / "record.json"))


def check_record(value, folder, good):
  return difference(value, json.loads((folder / "record.json").read_bytes()), "record")
