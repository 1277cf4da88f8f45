"""Runs bad command lines of all commands as real processes, and shows their messages.

This is no test of the suite, but is run by hand:

  python -m tests.experiments.bad_inputs

Each must end with code 2, one line on stderr that names what is wrong, no traceback, and in 10
seconds, and leave nothing. Odd lines that are good follow; then a run is restored under another k,
window, gate, batch_size and seq_len, and refused, with a table of the parameters, under another
architecture. Exits with 1 where anything is otherwise.
"""

import gzip
import json
import os
import pathlib
import platform
import random
import shlex
import signal
import subprocess
import sys
import tempfile
import time

import jax
import numpy as np

from sparsek.data.tokenizer import train_bpe
from tests.experiments.fuzz_model_formats import make_model
from tests.experiments.pretrain_test import ROOT, finish, start, wait_for_progress, write_documents

TINY = (
  "--data=TMP/tokens --num_layers=1 --embed_dim=32 --num_heads=2 --num_kv_heads=1 "
  "--head_dim=16 --mlp_dim=32 --seq_len=64 --batch_size=2 --num_steps=4 "
  "--warmup_steps=1 --checkpoint_every=2 --eval_every=0 --k=8 --window=8"
)
CASES = [  # command, what its message must hold; TMP is the folder of this script's files
  ("pretrain --workdir=TMP/x --k=0", "--k=0"),
  ("pretrain --workdir=TMP/x --window=-1", "--window=-1"),
  ("pretrain --workdir=TMP/x --gate=soft", "--gate=soft"),
  ("pretrain --workdir=TMP/x --wrokdir=a", "wrokdir"),
  ("pretrain --k=4", "--workdir is required"),
  ("pretrain --workdir=TMP/x --preset=huge", "--preset=huge"),
  ("pretrain --workdir=TMP/x --num_heads=3 --num_kv_heads=2", "--num_heads=3"),
  ("pretrain --workdir=TMP/x --head_dim=7", "--head_dim=7"),
  ("pretrain --workdir=TMP/x --attention=full --layer_pattern=full", "exclude each other"),
  ("pretrain --workdir=TMP/x --layer_pattern=sparsek,dense", "'dense'"),
  ("pretrain --workdir=TMP/x --batch_size=6 --grad_accumulation=4", "--batch_size=6"),
  ("pretrain --workdir=TMP/x --warmup_steps=50 --num_steps=10", "--warmup_steps=50"),
  (
    "pretrain --workdir=TMP/x --scorer=conv --scorer_lookahead=9 --window=8",
    "--scorer_lookahead=9",
  ),
  ("pretrain --workdir=TMP/x --learning_rate=nan", "--learning_rate=nan"),
  ("pretrain --workdir=TMP/x --dtype=float64", "--dtype=float64"),
  ("pretrain --workdir=TMP/x --model=qk_norm=perhaps", "--model=qk_norm=perhaps"),
  ("pretrain --workdir=TMP/x --flagfile=TMP/nowhere.flags", "TMP/nowhere.flags"),
  ("pretrain --workdir=TMP/x --data=TMP/nowhere", "TMP/nowhere"),
  ("pretrain --workdir=TMP/x --data=TMP/tokens --tokenizer=TMP/none.json", "TMP/none.json"),
  ("pretrain --workdir=TMP/x --data=TMP/damaged", "tokens.bin"),
  (f"pretrain --workdir=TMP/x {TINY} --seq_len=100000000", "seq_len=100000000"),
  (f"pretrain --workdir=TMP/x {TINY} --init_from=TMP/nowhere", "TMP/nowhere"),
  (f"pretrain --workdir=TMP/x {TINY} --lora_rank=2", "--lora_rank=2 needs --init_from"),
  (f"pretrain --workdir=TMP/x {TINY} --init_from=TMP/run@99", "99"),
  (f"pretrain --workdir=/proc/x {TINY}", "--workdir=/proc/x"),
  (f"pretrain --workdir=TMP/run {TINY} --restore_step=3", "--restore_step=3"),
  (f"pretrain --workdir=TMP/no_checkpoints {TINY}", "checkpoints cannot be written"),
  (f"pretrain --workdir=TMP/x {TINY} --spike_factor=1", "--spike_factor=1.0 must be above 1"),
  (f"pretrain --workdir=TMP/in_use {TINY}", "in use by another run"),
  ("pretrain --workdir=TMP/x stray", "'stray'"),
  ("generate --prompt=a", "--workdir is required"),
  ("generate --workdir=TMP/nowhere", "TMP/nowhere"),
  ("generate --workdir=TMP/run --temperature=-1", "--temperature=-1"),
  ("generate --workdir=TMP/run --top_p=0", "--top_p=0"),
  ("generate --workdir=TMP/run --prompt_file=/dev/zero", "/dev/zero is a device"),
  ("generate --workdir=TMP/run --load_cache=/dev/zero", "/dev/zero is a device"),
  ("generate --workdir=TMP/run --max_new_tokens=2147483647", "--max_new_tokens=2147483647"),
  ("evaluate --workdir=TMP/nowhere", "TMP/nowhere"),
  ("plot --workdir=TMP/nowhere", "TMP/nowhere"),
  ("plot --workdir=TMP/run --output=TMP/x.pdf", "must end in .png or .svg"),
  ("evaluate --workdir=TMP/run --step=77", "77"),
  ("evaluate --workdir=TMP/run --seq_len=100000000", "--seq_len=100000000"),
  ("prepare_data --sources=TMP/nowhere --output=TMP/o", "TMP/nowhere"),
  ("prepare_data --sources=TMP/broken.jsonl --output=TMP/o", "broken.jsonl:2"),
  ("prepare_data --sources=TMP/broken.jsonl --output=TMP/tokens", "TMP/tokens"),
  ("prepare_data --verify=TMP/damaged", "tokens.bin"),
  ("benchmark --lengths=a", "--lengths=a"),
  ("benchmark --heads=3 --kv_heads=2", "--heads=3"),
  # Flagfiles: their encodings, what they name, what never ends.
  ("pretrain --workdir=TMP/x --flagfile=TMP/latin1.flags", "TMP/latin1.flags"),
  ("pretrain --workdir=TMP/x --flagfile=TMP/loop.flags", "TMP/loop.flags"),
  ("pretrain --workdir=TMP/x --flagfile=TMP/fifo", "TMP/fifo"),
  ("pretrain --workdir=TMP/x --flagfile=TMP/tokens", "TMP/tokens"),
  # Addresses of other file systems, in every flag that takes a path.
  ("pretrain --workdir=gs://bucket/run", "--workdir=gs://bucket/run"),
  ("pretrain --workdir=s3://bucket/run", "--workdir=s3://bucket/run"),
  ("pretrain --workdir=file:///tmp/run", "--workdir=file:///tmp/run"),
  ("pretrain --workdir=TMP/x --data=gs://bucket/tokens", "gs://bucket/tokens"),
  ("pretrain --workdir=TMP/x --init_from=gs://bucket/run", "gs://bucket/run"),
  ("generate --workdir=gs://bucket/run", "gs://bucket/run"),
  ("generate --workdir=TMP/run --save_cache=gs://bucket/x", "gs://bucket/x"),
  ("evaluate --workdir=TMP/run,gs://bucket/run", "gs://bucket/run"),
  ("ablate --workdir=gs://bucket/grid", "gs://bucket/grid"),
  ("import_hf --from=gs://bucket/model --workdir=TMP/x", "gs://bucket/model"),
  ("import_hf --workdir=TMP/run --export=gs://bucket/model", "gs://bucket/model"),
  ("prepare_data --sources=gs://bucket/x --output=TMP/o", "gs://bucket/x"),
  ("prepare_data --sources=TMP/a.txt --output=gs://bucket/x", "gs://bucket/x"),
  ("benchmark --lengths=64 --record=gs://bucket/x.json", "gs://bucket/x.json"),
  # What is no regular file, and what is another file than its name says.
  ("prepare_data --sources=TMP/fifo --output=TMP/o", "TMP/fifo"),
  ("prepare_data --sources=/dev/zero --output=TMP/o", "/dev/zero"),
  ("prepare_data --sources=TMP/a.txt --output=TMP/o --tokenizer=/dev/zero", "/dev/zero"),
  ("prepare_data --verify=TMP/tokens --expect=TMP/fifo", "TMP/fifo"),
  ("generate --workdir=TMP/run --prompt_file=TMP/fifo", "TMP/fifo"),
  ("generate --workdir=TMP/run --load_cache=/dev/zero", "/dev/zero"),
  ("prepare_data --sources=TMP/nul.txt --output=TMP/o", "TMP/nul.txt"),
  ("prepare_data --sources=TMP/cut.txt.gz --output=TMP/o", "TMP/cut.txt.gz"),
  ("prepare_data --sources=TMP/picture.txt --output=TMP/o", "TMP/picture.txt"),
  ("prepare_data --sources=TMP/deep.jsonl --output=TMP/o", "TMP/deep.jsonl"),
  ("prepare_data --sources=TMP/bigint.jsonl --output=TMP/o", "TMP/bigint.jsonl"),
  (
    "prepare_data --sources=TMP/a.txt --output=TMP/o --tokenizer=TMP/huge_id.json",
    "TMP/huge_id.json",
  ),
  ("generate --workdir=TMP/run --load_cache=TMP/head.npz", "TMP/head.npz"),
  # Numbers and texts without a bound of their own.
  (f"prepare_data --sources=tasks:4096:{'9' * 21} --output=TMP/o", f"tasks:4096:{'9' * 21}"),
  (
    "prepare_data --sources=TMP/a.txt --output=TMP/o --train_bpe=2147483647",
    "--train_bpe=2147483647",
  ),
  ('ablate --workdir=TMP/grid --more="--k=4\'"', "--more="),
  # An import that fails leaves nothing.
  ("import_hf --from=TMP/broken_model --workdir=TMP/imported", "generation_config.json"),
]
# Odd lines that are good, and what they must print.
GOOD = [
  (f"pretrain --workdir=TMP/copy {TINY} --flagfile=TMP/bom.flags", "TMP/copy"),
  (f"pretrain --flagfile=TMP/outer.flags --workdir=TMP/nested {TINY}", "TMP/nested"),
  # The command line wins over the flagfile, wherever it stands: the old run stays as it is.
  ("pretrain --workdir=TMP/other --flagfile=TMP/run/flags.txt", "TMP/other"),
  ("prepare_data --sources=TMP/whole.txt.gz --output=TMP/gz", "TMP/gz"),
  ("prepare_data --sources=TMP/lines.NDJSON --output=TMP/ndjson", "TMP/ndjson"),
]
RESTORED = (
  f"pretrain --workdir=TMP/run {TINY} --k=3 --window=20 --gate=value "
  "--batch_size=4 --seq_len=32 --num_steps=8"
)
REFUSED = f"pretrain --workdir=TMP/run {TINY} --embed_dim=64 --model=qk_norm=true"


def write_bad_files(folder: pathlib.Path) -> None:
  """Makes what the command lines name, beside runs and token files."""
  text = "Some text, some more text.\n" * 40
  line = json.dumps({"text": text}) + "\n"
  (folder / "a.txt").write_text(text)
  (folder / "latin1.flags").write_bytes("--k=4\n--workdir=é\n".encode("latin-1"))
  (folder / "bom.flags").write_bytes(b"\xef\xbb\xbf--k=4\n")
  (folder / "outer.flags").write_text("--flagfile=inner.flags\n")
  (folder / "inner.flags").write_text("--k=4\n")
  (folder / "loop.flags").write_text("--flagfile=loop.flags\n")
  os.mkfifo(folder / "fifo")
  (folder / "nul.txt").write_bytes(b"some text\0 and more\n" * 9)
  (folder / "whole.txt.gz").write_bytes(gzip.compress(text.encode()))
  (folder / "cut.txt.gz").write_bytes(gzip.compress(random.Random(0).randbytes(999))[:500])
  (folder / "picture.txt").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(64))
  (folder / "lines.NDJSON").write_text(line * 3)
  (folder / "deep.jsonl").write_text('{"text": "a", "x": ' + "[" * 10**5 + "]" * 10**5 + "}\n")
  (folder / "bigint.jsonl").write_text('{"text": "a", "x": ' + "7" * 5000 + "}\n")
  train_bpe([text], 280).save(str(folder))
  os.rename(folder / "tokenizer.json", folder / "huge_id.json")
  tokenizer = json.loads((folder / "huge_id.json").read_text())
  tokenizer["model"]["vocab"]["S"] = 2**31 - 1
  (folder / "huge_id.json").write_text(json.dumps(tokenizer))
  np.savez(folder / "head.npz", head=np.frombuffer(b"[]", np.uint8))
  make_model(folder)
  os.rename(folder / "model", folder / "broken_model")
  (folder / "broken_model" / "generation_config.json").write_text('{"eos_token_id": [')


def main() -> None:
  failures = 0
  with tempfile.TemporaryDirectory() as folder:
    hide = lambda text: (
      text.replace(folder, "TMP")
      .replace(ROOT, "REPOSITORY")
      .replace(f" on {platform.node()}", " on HOST")
    )
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XDG_CACHE_HOME": f"{folder}/cache"}

    def run(command: str) -> tuple[int, float, str, str]:
      """Returns (code, seconds, stdout, stderr) of a command."""
      began, (name, *words) = time.monotonic(), shlex.split(command.replace("TMP", folder))
      done = subprocess.run(
        [sys.executable, "-m", f"experiments.{name}", *words],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
      )
      return (
        done.returncode,
        time.monotonic() - began,
        *(hide(text).strip() for text in (done.stdout, done.stderr)),
      )

    def show(command: str, code: int, seconds: float, text: str, **checks: bool) -> None:
      nonlocal failures
      wrong = ", ".join(name.replace("_", " ") for name, good in checks.items() if not good)
      failures += bool(wrong)
      lines = [*text.splitlines(), *([f"WRONG: {wrong}"] if wrong else [])]
      print(
        f"code {code}, {seconds:.1f} s: {command.replace(TINY, 'TINY')}",
        *(f"  {line}" for line in lines),
        sep="\n",
        flush=True,
      )

    write_bad_files(pathlib.Path(folder))
    write_documents(f"{folder}/tokens")
    os.truncate(pathlib.Path(write_documents(f"{folder}/damaged"), "tokens.bin"), 5)
    pathlib.Path(folder, "no_checkpoints").mkdir()
    pathlib.Path(folder, "no_checkpoints", "checkpoints").write_text("a file")
    pathlib.Path(folder, "broken.jsonl").write_text('{"text": "fine"}\n{broken\n')
    assert run(f"pretrain --workdir=TMP/run {TINY}")[0] == 0
    owner = start(
      f"{folder}/in_use", f"{folder}/tokens", environment, "--num_steps=100000", "--eval_every=0"
    )
    wait_for_progress(f"{folder}/in_use", owner)
    owner.send_signal(signal.SIGSTOP)  # It keeps its lock while the others use the processor.
    try:
      for command, words in CASES:
        code, seconds, out, err = run(command)
        show(
          command,
          code,
          seconds,
          err,
          code_2=code == 2,
          below_10_s=seconds < 10,
          one_line=err.count("\n") == 0,
          message=err.startswith("error: ") and words in err,
          no_output=not out,
        )
    finally:
      owner.terminate()
      owner.send_signal(signal.SIGCONT)
      owner_code = finish(owner)[0]

    leftovers = [name for name in ("imported", "o", "grid") if os.path.exists(f"{folder}/{name}")]
    leftovers += [name for name in os.listdir(ROOT) if name.endswith(":")]
    print(f"\nleft behind by bad command lines: {', '.join(leftovers) or 'nothing'}")
    failures += bool(leftovers)
    print("\nodd and good:")
    before = pathlib.Path(folder, "run", "metrics.jsonl").read_bytes()
    for command, words in GOOD:
      code, seconds, out, err = run(command)
      show(
        command,
        code,
        seconds,
        "\n".join([out, err]),
        code_0=code == 0,
        message=words in out,
        no_traceback="Traceback" not in err,
      )
    failures += pathlib.Path(folder, "run", "metrics.jsonl").read_bytes() != before
    print("\nrestored with another k, window, gate, batch_size and seq_len:")
    code, seconds, out, err = run(RESTORED)
    lines = [line for line in err.splitlines() if line.startswith("resuming")]
    show(
      RESTORED,
      code,
      seconds,
      "\n".join([*lines, *out.splitlines()] if code == 0 else [err]),
      code_0=code == 0,
      resumed=len(lines) == 1,
    )
    print("\nrefused with another architecture:")
    code, seconds, out, err = run(REFUSED)
    show(
      REFUSED,
      code,
      seconds,
      err,
      code_2=code == 2,
      below_10_s=seconds < 10,
      message="--embed_dim=64 here, 32 there" in err,
      table="other shape" in err and "missing" in err,
      no_traceback="Traceback" not in err,
    )
  failures += owner_code != 0
  print(
    f"\n{len(CASES)} bad command lines and {len(GOOD)} good ones, {failures} wrong; the run in "
    f"use ended with {owner_code} on SIGTERM; TINY is\n  {TINY}"
  )
  print(f"python {platform.python_version()} jax {jax.__version__} cpu")
  sys.exit(failures > 0)


if __name__ == "__main__":
  main()
