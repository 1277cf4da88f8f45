"""Decoding with transformers' Llama and its default cache, as a baseline.

It runs in PyTorch, in a process of its own. The cache is filled with random keys and values in
place of the context; then tokens are decoded greedily, one by one, and the cache is cut back before
each sample.
"""

import sys
import time

from sparsek.config import TransformerConfig
from sparsek.experiments.bench.transformers_llama import answer, ask, fields

COMMAND = (sys.executable, "-m", "sparsek.experiments.bench.transformers_decode")
TIMEOUT_SECONDS = 180.0
SECONDS = 5.0  # most to spend on samples
TOKENS = 16  # per sample


def run(
  config: TransformerConfig, n: int, batch_size: int, rounds: int, device: str = "cuda"
) -> dict:
  """Times a token after n others in each of batch_size rows.

  Call it before JAX takes the GPU's memory.

  Returns:
    {"ms", "fastest", "slowest", "rounds", "tokens_per_second", "mib"}, or {"failed"}.
  """
  job = dict(
    model=fields(config, n + TOKENS),
    n=n,
    batch_size=batch_size,
    rounds=rounds,
    seconds=SECONDS,
    device=device,
  )
  result = ask(COMMAND, job, TIMEOUT_SECONDS)
  if "failed" in result:
    return result
  return {**result, "inner": TOKENS, "tokens_per_second": 1e3 * batch_size / result["ms"]}


def time_job(job: dict) -> dict:
  """Returns {"seconds": per token, of each sample, "mib"}."""
  import torch
  import transformers

  torch.manual_seed(0)
  on_gpu = job["device"] == "cuda"
  config = transformers.LlamaConfig(**job["model"], attn_implementation="sdpa")
  with torch.device(job["device"]):
    torch.set_default_dtype(torch.bfloat16)
    model = transformers.LlamaForCausalLM(config).eval()
  cache = transformers.DynamicCache(config=config)
  shape = (job["batch_size"], config.num_key_value_heads, job["n"], config.head_dim)
  for layer in range(config.num_hidden_layers):
    cache.update(
      *(torch.randn(shape, device=job["device"], dtype=torch.bfloat16) for _ in range(2)), layer
    )
  token = torch.zeros((job["batch_size"], 1), dtype=torch.long, device=job["device"])

  @torch.inference_mode()
  def sample():
    nonlocal token
    if cache.get_seq_length() > job["n"]:
      cache.crop(-TOKENS)  # negative: to be removed, which all versions understand
    if on_gpu:
      torch.cuda.synchronize()
    begin = time.perf_counter()
    for _ in range(TOKENS):
      token = (
        model(input_ids=token, past_key_values=cache, use_cache=True).logits[:, -1:].argmax(-1)
      )
    if on_gpu:
      torch.cuda.synchronize()
    assert cache.get_seq_length() == job["n"] + TOKENS, "the cache did not grow"
    return (time.perf_counter() - begin) / TOKENS

  sample()
  sample()
  samples: list[float] = []
  begin = time.perf_counter()
  while len(samples) < job["rounds"] and (
    not samples or time.perf_counter() - begin + samples[-1] * TOKENS < job["seconds"]
  ):
    samples.append(sample())
  return {"seconds": samples, "mib": torch.cuda.max_memory_allocated() / 2**20 if on_gpu else None}


if __name__ == "__main__":
  answer(time_job)
