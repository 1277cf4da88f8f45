"""Command lines of every experiment with drawn flags: most are bad, some are odd and good."""

import importlib
import os
import pathlib
import random
import resource
import shutil
import time

from tests.experiments import crash_points, forked
from tests.experiments.crash_scenarios import MODEL

LIMIT = 20.0
MEMORY = 6 * 2**30
MODULES = (
  "prepare_data",
  "pretrain",
  "evaluate",
  "evaluate_tasks",
  "evaluate_ruler",
  "ablate",
  "generate",
  "import_hf",
  "layer_reach",
  "plot",
  "benchmark",
)
ALSO = ("pretrain",) * 4  # it has the most flags
# Flags whose large values rightly take a long time.
DURATIONS = {
  "num_steps",
  "stop_at",
  "max_new_tokens",
  "eval_batches",
  "examples",
  "rounds",
  "seconds",
  "seeds",
  "rows",
  "batches",
  "lengths",
  "prompts",
  "contexts",
  "batch_sizes",
  "errors_at",
  "documents",
  "max_dense",
  "max_xla",
  "train_bpe",
  "grad_accumulation",
  "num_layers",
  "max_transformers",
}
TINY = [
  *MODEL,
  "--seq_len=32",
  "--batch_size=2",
  "--num_steps=1",
  "--log_every=1",
  "--eval_every=1",
  "--eval_batches=1",
  "--checkpoint_every=1",
  "--warmup_steps=0",
]
BY_GRID = ("--attention=", "--k=", "--window=")  # which a grid sets itself
SHARED = [word for word in TINY if not word.startswith(BY_GRID)]
BASES = {
  "prepare_data": ["--sources=IN/texts", "--output=out"],
  "pretrain": ["--workdir=new", "--data=IN/tokens", *TINY],
  "evaluate": ["--workdir=IN/run", "--eval_batches=1"],
  "evaluate_tasks": ["--workdir=IN/run", "--lengths=1024", "--examples=1", "--batch_size=1"],
  "evaluate_ruler": ["--workdir=IN/run", "--lengths=512", "--prompts=1", "--tasks=fwe"],
  "ablate": [
    "--workdir=grid",
    "--attention=full",
    f"--more={' '.join([*SHARED, '--data=IN/tokens'])}",
    "--seeds=1",
  ],
  "generate": ["--workdir=IN/run", "--prompt=a", "--max_new_tokens=2"],
  "import_hf": ["--from=IN/model", "--workdir=new"],
  "layer_reach": ["--workdir=IN/run"],
  "plot": ["--workdir=IN/run", "--output=plot.png", "--prompt=a"],
  "benchmark": [
    "--lengths=64",
    "--k=4",
    "--window=4",
    "--heads=1",
    "--kv_heads=1",
    "--head_dim=8",
    "--rounds=1",
    "--seconds=0.01",
    "--baselines=sparsek",
  ],
}
WHOLE = (
  "-1",
  "0",
  "1",
  "2",
  "3",
  "5",
  "8",
  "33",
  "",
  " 4",
  "1.5",
  "nan",
  "0x10",
  "1e3",
  "a",
  "\u0661",
  "1" * 21,
  "-0",
  "+2",
)
LARGE = ("2147483647", "2147483648", "100000000", "65536")
REAL = (
  "-1",
  "0",
  "1e-38",
  "1e-320",
  "0.5",
  "1",
  "2",
  "1e30",
  "1e308",
  "1e309",
  "nan",
  "inf",
  "-inf",
  "",
  "a",
  "1_0",
  "0,5",
)
TEXTS = (
  "",
  " ",
  "a",
  "byte",
  "stdlib ",
  ",",
  "a,b",
  "..",
  "é",
  "x" * 300,
  "'",
  '"',
  "@",
  "IN/run@1",
  "IN/run@99",
  "sparsek*2,full",
  "sparsek:k0",
  "full*0",
  "1:2",
  "2:1",
  "linear:2",
  "linear:nan",
  "llama3:8:1:4:32",
  "8,16",
  "8,",
  "-8",
  "9" * 21,
  "tasks:4096:" + "1" * 21,
  "tasks:1024:2",
  "tasks:1:1",
  "tasks:a:b",
  "hf:IN/model",
  "rope_fraction=0.5,norm=layer_norm",
  "use_bias=perhaps",
  "k=0",
  "hf:",
  "hf:nowhere",
  "0/1",
  "1/2",
  "2/1",
  "a/b",
  "text",
  "xla",
  "sparsek,full",
  "passkey",
)
PATHS = (
  "IN",
  "IN/run",
  "IN/tokens",
  "IN/texts",
  "IN/texts/0.txt",
  "IN/model",
  "IN/empty",
  "IN/fifo",
  "IN/latin.txt",
  "IN/bom.flags",
  "/dev/null",
  "/dev/zero",
  "/proc/x",
  "nowhere",
  "nowhere/deep",
  "~nobody/x",
  "gs://bucket/x",
  "s3://bucket/x",
  "file:///tmp/x",
  "IN/texts/0.txt/x",
  "new.json",
  "IN/run/model.json",
  "IN/tokens/meta.json",
  "IN/run/metrics.jsonl",
)


def describe_flags() -> dict[str, dict[str, list]]:
  """Returns command -> flag -> [its kind, the values of an enum]. Runs in a child."""
  from absl import flags as absl_flags

  from sparsek.command_line.definer import names_of

  result: dict[str, dict[str, list]] = {}
  for name in MODULES:
    module = importlib.import_module(f"experiments.{name}")
    values = module.FLAGS
    result[name] = {}
    for flag in names_of(values):
      parser = values[flag].parser
      kind = parser.flag_type()
      choices = list(getattr(parser, "enum_values", None) or [])
      result[name][flag] = ["enum" if isinstance(parser, absl_flags.EnumParser) else kind, choices]
  return result


def draw_value(flag: str, kind: str, choices: list[str], rng: random.Random) -> str:
  """Returns --FLAG=VALUE."""
  if kind == "bool":
    return rng.choice(
      (f"--{flag}", f"--no{flag}", f"--{flag}=true", f"--{flag}=0", f"--{flag}=maybe", f"--{flag}=")
    )
  if kind == "int":
    pool = WHOLE if flag in DURATIONS else WHOLE + LARGE
  elif kind == "float":
    pool = REAL
  elif flag == "suite":  # the others take minutes
    pool = ("attention", "x", "")
  elif kind == "enum":
    pool = (*choices, *choices, "x", "", choices[0].upper())
  else:
    pool = tuple(text for text in TEXTS + PATHS if not (flag in DURATIONS and text.isdecimal()))
  return f"--{flag}={rng.choice(pool)}"


def draw(known: dict, seed: int, case: int, commands: list[str]) -> tuple[str, list[str]]:
  """Returns (command, its flags), the same for the same (seed, case)."""
  rng = random.Random(f"{seed} flags {case}")
  name = rng.choice([*commands, *(command for command in ALSO if command in commands)])
  words, flags = list(BASES[name]), sorted(known[name])
  for flag in rng.sample(flags, min(len(flags), rng.choice((1, 1, 2, 3)))):
    word = draw_value(flag, *known[name][flag], rng)
    if word.startswith(f"--{flag}=") and rng.random() < 0.5:
      words = [other for other in words if not other.startswith(f"--{flag}=")]
    words.append(word)
  chance = rng.random()
  if chance < 0.05:
    words.append(
      rng.choice(
        (
          "--flagfile=IN/k.flags",
          "--flagfile=IN/fifo",
          "--flagfile=IN",
          "--flagfile=IN/latin.txt",
          "--flagfile=nowhere",
          "--flagfile=",
          "--flagfile=IN/bom.flags",
          "--flagfile=IN/loop.flags",
          "--undefok=x",
          "--",
          "stray",
          "-k",
          "--k",
          "--=",
          "--kk=1",
          "--\udcff=1",
        )
      )
    )
  elif chance < 0.1:
    words.remove(rng.choice(words))
  elif chance < 0.13 and words:
    words.append(rng.choice(words))
  return name, words


def make_inputs(bench: crash_points.Bench, commands: list[str]) -> None:
  """Makes what command lines may name: inputs of crash_points that they need, and bad ones."""
  words = [word for name in commands for word in BASES[name]]
  bench.make_shared(
    ["texts", *(name for name in crash_points.SHARED if f"IN/{name}" in " ".join(words))]
  )
  root = pathlib.Path(bench.shared)
  (root / "empty").mkdir()
  os.mkfifo(root / "fifo")
  (root / "latin.txt").write_bytes("--k=4 é\n".encode("latin-1"))
  (root / "bom.flags").write_bytes(b"\xef\xbb\xbf--k=4\n")
  (root / "k.flags").write_text("--k=4\n")
  (root / "loop.flags").write_text(f"--flagfile={root}/loop.flags\n")


def wrong_value(words: list[str], folder: str) -> list[str]:
  """Returns the flags of a successful pretraining that have another value in its flags.txt."""
  path = pathlib.Path(folder, "new", "flags.txt")
  if not path.exists():
    return []
  written = dict(
    line.removeprefix("--").partition("=")[::2]
    for line in path.read_text(encoding="utf-8").splitlines()
  )
  faults = []
  given = dict(word.removeprefix("--").partition("=")[::2] for word in words if "=" in word)
  for name, value in given.items():
    if name in ("workdir", "data"):  # records have absolute paths
      value = os.path.normpath(os.path.join(folder, value))
    try:
      same = float(written[name]) == float(value)
    except (ValueError, KeyError):
      same = (
        written.get(name, value) == value
        or value in ("true", "0", "1", "false")
        or value.strip() == written.get(name)
      )
    if not same:
      faults.append(f"--{name}={value} became {written[name]}")
  return faults


def try_line(case: int, name: str, words: list[str], bench: crash_points.Bench, folder: str):
  """Chains a single command line; returns (case, kind, why)."""
  here = os.path.join(folder, f"case_{case}")
  inputs = os.path.join(here, "in")
  shutil.rmtree(here, ignore_errors=True)
  os.makedirs(here)
  # Copying a FIFO would wait for its writer.
  shutil.copytree(bench.shared, inputs, ignore=shutil.ignore_patterns("fifo"))
  os.mkfifo(os.path.join(inputs, "fifo"))
  words = [
    word.replace("IN", inputs) if "IN/" in word or word.endswith("=IN") else word for word in words
  ]

  def job():
    os.chdir(here)
    os.environ["PYTHONPATH"] = str(pathlib.Path(__file__).parents[2])
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
    forked.command(name, *words)()

  ended = yield forked.Call(job, os.path.join(here, "output"), LIMIT)
  faults = forked.command_faults(ended)
  faults += [
    f"made the folder {entry}"
    for entry in os.listdir(here)
    if entry in ("gs:", "s3:", "file:", "hf:")
  ]
  if name == "pretrain" and ended.code == 0:
    faults += wrong_value(words, here)
  last = (ended.err.strip().splitlines() or [""])[-1]
  if not faults:
    shutil.rmtree(here)
    return case, {0: "done"}.get(ended.code, "refused"), last
  shown = " ".join(
    word.replace(inputs, "IN")
    for word in words
    if word not in BASES[name] and word.replace(inputs, "IN") not in BASES[name]
  )
  return case, "wrong", f"{'; '.join(faults)}: {name} ... {shown[:300]!a}: {last[:200]}"


def fuzz(
  folder: str, which: str, seed: int, count: int, only: int | None, at_once: int, report
) -> int:
  """Tries drawn command lines and returns how many ended badly."""
  bench = crash_points.Bench(os.path.join(folder, "lines"))
  os.makedirs(bench.folder)
  commands = list(MODULES) if which == "all" else which.split(",")
  make_inputs(bench, commands)
  described = forked.run(describe_flags, os.path.join(folder, "flags"))
  if described.code != 0:
    raise SystemExit(described.err)
  began = time.monotonic()
  cases = range(count) if only is None else [only]
  drawn = [(case, *draw(described.value, seed, case, commands)) for case in cases]
  names = {case: name for case, name, _ in drawn}
  chains = (
    try_line(case, name, words, bench, os.path.join(folder, "lines")) for case, name, words in drawn
  )
  results = []
  for result in forked.run_all(chains, at_once):
    results.append(result)
    if len(results) % 100 == 0:
      print(
        f"  {len(results)} of {len(drawn)} command lines, {time.monotonic() - began:.0f} s",
        flush=True,
      )
  failures = 0
  for name in commands:
    mine = [result for result in results if names[result[0]] == name]
    failures += report(f"flags of {name}", mine, time.monotonic() - began)
  return failures
