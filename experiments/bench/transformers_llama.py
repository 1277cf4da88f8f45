"""Training steps of transformers' Llama, as a baseline.

They run in PyTorch, in a process of their own, with sdpa, torch.compile, gradient checkpointing and
a chunked loss. Weights and AdamW's state are bfloat16. Either the decoder is compiled as a whole,
or each layer by itself, without what comes before the layers (the mask).
"""

import importlib.util
import json
import math
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence

from sparsek.config import TransformerConfig
from sparsek.experiments.bench.cells import summarize

KINDS = {"transformers": "model", "transformers_layers": "layers"}  # what is compiled
COMMAND = (sys.executable, "-m", "sparsek.experiments.bench.transformers_llama")
TIMEOUT_SECONDS = 240.0


def available() -> bool:
  """Returns whether PyTorch, transformers and a GPU are here."""
  return bool(
    importlib.util.find_spec("torch")
    and importlib.util.find_spec("transformers")
    and shutil.which("nvidia-smi")
  )


def fields(config: TransformerConfig, max_positions: int) -> dict:
  """Returns the fields of a transformers.LlamaConfig of the same shape."""
  return dict(
    vocab_size=config.vocab_size,
    hidden_size=config.embed_dim,
    intermediate_size=config.mlp_dim,
    num_hidden_layers=config.num_layers,
    num_attention_heads=config.num_heads,
    num_key_value_heads=config.num_kv_heads,
    head_dim=config.head_dim,
    rms_norm_eps=config.norm_eps,
    tie_word_embeddings=config.tie_embeddings,
    max_position_embeddings=max_positions,
  )


def ask(command: Sequence[str], job: dict, timeout: float) -> dict:
  """Runs a process that times a job with `answer`.

  Returns:
    Its answer, with {"ms", "fastest", "slowest", "rounds"} instead of "seconds", or
    {"failed"}.
  """
  try:
    done = subprocess.run(
      command, input=json.dumps(job), capture_output=True, text=True, timeout=timeout, check=False
    )
  except subprocess.TimeoutExpired:
    return {"failed": f"it took more than {timeout:.0f} s"}
  if done.returncode:
    return {"failed": (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]}
  result = json.loads(done.stdout.splitlines()[-1])
  return result if "failed" in result else {**summarize(result.pop("seconds")), **result}


def answer(time_job: Callable[[dict], dict]) -> None:
  """Reads one job from standard input; prints its result, or why there is none."""
  job = json.load(sys.stdin)
  try:
    result = time_job(job)
  except Exception as error:  # torch raises many kinds; the process that asked gets the reason
    text = str(error).splitlines() or [""]
    memory = "out of memory" in text[0]
    result = {"failed": "out of memory" if memory else f"{type(error).__name__}: {text[0]}"}
  print(json.dumps(result))


def run(
  kind: str,
  config: TransformerConfig,
  n: int,
  batch_size: int,
  loss_chunk: int,
  rounds: int,
  seconds: float,
  sample_seconds: float = 0.3,
  command: Sequence[str] | None = None,
) -> dict:
  """Times a training step of a model of that shape, in the process that `command` starts.

  Call it before JAX takes the GPU's memory. Samples take at most `seconds`.

  Returns:
    {"ms", "fastest", "slowest", "rounds", "inner", "mib", "compile_seconds"}, or {"failed"}.
  """
  return ask(
    command or COMMAND,
    dict(
      model=fields(config, n),
      n=n,
      batch_size=batch_size,
      loss_chunk=loss_chunk,
      compile=KINDS.get(kind),
      window=config.k + config.window,
      rounds=rounds,
      seconds=seconds,
      sample_seconds=sample_seconds,
    ),
    TIMEOUT_SECONDS,
  )


def make_step(job: dict) -> Callable:
  """Returns a function that makes one optimizer step.

  The logits of `loss_chunk` tokens exist at the same time.
  """
  import torch
  import transformers
  from torch.utils.checkpoint import checkpoint

  torch.manual_seed(0)
  torch.set_float32_matmul_precision("high")
  config = transformers.LlamaConfig(**job["model"], attn_implementation="sdpa", use_cache=False)
  model = transformers.LlamaForCausalLM(config).to(device="cuda", dtype=torch.bfloat16).train()
  model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
  for module in [model.model] if job["compile"] == "model" else model.model.layers:
    module.compile()
  optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
  tokens = torch.randint(config.vocab_size, (job["batch_size"], job["n"] + 1), device="cuda")

  @torch.compile
  def loss_of(hidden, targets):
    return torch.nn.functional.cross_entropy(
      torch.nn.functional.linear(hidden, model.lm_head.weight).float(), targets, reduction="sum"
    )

  def step():
    hidden = model.model(input_ids=tokens[:, :-1]).last_hidden_state.flatten(0, 1)
    chunks = zip(hidden.split(job["loss_chunk"]), tokens[:, 1:].flatten().split(job["loss_chunk"]))
    loss = (
      sum(checkpoint(loss_of, *chunk, use_reentrant=False) for chunk in chunks)
      / tokens[:, 1:].numel()
    )
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss

  return step


def time_job(job: dict, make_step: Callable[[dict], Callable] = make_step) -> dict:
  """Returns {"seconds": per step, of each sample, "inner", "mib", "compile_seconds"}."""
  import torch

  step = make_step(job)

  def sample(inner):
    torch.cuda.synchronize()
    begin = time.perf_counter()
    for _ in range(inner):
      loss = step()
    torch.cuda.synchronize()
    assert math.isfinite(loss.item()), "the loss is not finite"
    return time.perf_counter() - begin

  compile_seconds = sample(1)
  sample(1)
  torch.cuda.reset_peak_memory_stats()
  inner = max(1, math.ceil(job["sample_seconds"] / sample(1)))
  samples: list[float] = []
  begin = time.perf_counter()
  while len(samples) < job["rounds"] and (
    not samples or time.perf_counter() - begin + samples[-1] * inner < job["seconds"]
  ):
    samples.append(sample(inner) / inner)
  return {
    "seconds": samples,
    "inner": inner,
    "mib": torch.cuda.max_memory_allocated() / 2**20,
    "compile_seconds": compile_seconds,
  }


if __name__ == "__main__":
  answer(time_job)
