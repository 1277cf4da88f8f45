"""Decoding with transformers' Llama and its default cache, in PyTorch and a process of its own, to compare with.

The cache is filled with random keys and values of the context; then tokens are fed one by one, greedily, and the cache is cut back before every sample.
"""

import json
import statistics
import subprocess
import sys
import time

from sparsek.config import TransformerConfig
from sparsek.transformers_llama import available  # noqa: F401  the same packages and a GPU

COMMAND = (sys.executable, "-m", "sparsek.transformers_decode")
TIMEOUT_SECONDS = 180.0
SECONDS = 5.0                    # most to spend on samples
TOKENS = 16                      # a sample


def run(config: TransformerConfig, n: int, batch_size: int, rounds: int, device: str = "cuda") -> dict:
  """{"ms", "fastest", "slowest", "rounds", "tokens_per_second", "mib"} of a token after n others in each of batch_size rows, or {"failed"}.

  Call it before JAX takes the GPU's memory.
  """
  model = dict(vocab_size=config.vocab_size, hidden_size=config.embed_dim, intermediate_size=config.mlp_dim, num_hidden_layers=config.num_layers,
               num_attention_heads=config.num_heads, num_key_value_heads=config.num_kv_heads, head_dim=config.head_dim, rms_norm_eps=config.norm_eps,
               tie_word_embeddings=config.tie_embeddings, max_position_embeddings=n + TOKENS)
  job = dict(model=model, n=n, batch_size=batch_size, rounds=rounds, seconds=SECONDS, device=device)
  try:
    done = subprocess.run(COMMAND, input=json.dumps(job), capture_output=True, text=True, timeout=TIMEOUT_SECONDS, check=False)
  except subprocess.TimeoutExpired:
    return {"failed": f"it took more than {TIMEOUT_SECONDS:.0f} s"}
  if done.returncode:
    return {"failed": (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]}
  found = json.loads(done.stdout.splitlines()[-1])
  if "failed" in found:
    return found
  milliseconds = sorted(1e3 * x for x in found["seconds"])
  middle = statistics.median(milliseconds)
  return {"ms": middle, "fastest": milliseconds[0], "slowest": milliseconds[-1], "rounds": len(milliseconds), "inner": TOKENS, "mib": found["mib"],
          "tokens_per_second": 1e3 * batch_size / middle}


def measure(job):
  """{"seconds": per token, of each sample, "mib"}."""
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
    cache.update(*(torch.randn(shape, device=job["device"], dtype=torch.bfloat16) for _ in range(2)), layer)
  token = torch.zeros((job["batch_size"], 1), dtype=torch.long, device=job["device"])

  @torch.inference_mode()
  def sample():
    nonlocal token
    if cache.get_seq_length() > job["n"]:
      cache.crop(-TOKENS)                                 # negative: to be removed, which all versions understand
    if on_gpu:
      torch.cuda.synchronize()
    begin = time.perf_counter()
    for _ in range(TOKENS):
      token = model(input_ids=token, past_key_values=cache, use_cache=True).logits[:, -1:].argmax(-1)
    if on_gpu:
      torch.cuda.synchronize()
    assert cache.get_seq_length() == job["n"] + TOKENS, "the cache did not grow"
    return (time.perf_counter() - begin) / TOKENS

  sample()
  sample()
  found, begin = [], time.perf_counter()
  while len(found) < job["rounds"] and (not found or time.perf_counter() - begin + found[-1] * TOKENS < job["seconds"]):
    found.append(sample())
  return {"seconds": found, "mib": torch.cuda.max_memory_allocated() / 2 ** 20 if on_gpu else None}


def main():
  """One job from standard input; what was found, or why not, to standard output."""
  job = json.load(sys.stdin)
  try:
    found = measure(job)
  except Exception as error:  # of torch, of many kinds; they are told to the process that asked
    text = str(error).splitlines() or [""]
    found = {"failed": "out of memory" if "out of memory" in text[0] else f"{type(error).__name__}: {text[0]}"}
  print(json.dumps(found))


if __name__ == "__main__":
  main()
