"""Times training steps of transformers' Llama for `experiments.benchmark --suite=train`, in a process of its own: sdpa, torch.compile, checkpointing.

Reads from standard input a JSON object with "model" (fields of LlamaConfig), "n", "batch_size", "loss_chunk", "rounds", "seconds" (most to spend on samples)
and "sample_seconds"; writes one with "seconds" (per step, of each sample), "inner", "mib" and "compile_seconds", or "failed".
Weights and AdamW's state are bfloat16; the logits of `loss_chunk` tokens exist at once.
"""

import json
import math
import sys
import time


def make_step(job):
  """A function that makes one optimizer step."""
  import torch
  from torch.utils.checkpoint import checkpoint
  import transformers

  torch.manual_seed(0)
  torch.set_float32_matmul_precision("high")
  config = transformers.LlamaConfig(**job["model"], attn_implementation="sdpa", use_cache=False)
  model = transformers.LlamaForCausalLM(config).to(device="cuda", dtype=torch.bfloat16).train()
  model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
  for layer in model.model.layers:
    layer.compile()
  optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
  tokens = torch.randint(config.vocab_size, (job["batch_size"], job["n"] + 1), device="cuda")

  @torch.compile
  def loss_of(hidden, targets):
    return torch.nn.functional.cross_entropy(torch.nn.functional.linear(hidden, model.lm_head.weight).float(), targets, reduction="sum")

  def step():
    hidden = model.model(input_ids=tokens[:, :-1]).last_hidden_state.flatten(0, 1)
    chunks = zip(hidden.split(job["loss_chunk"]), tokens[:, 1:].flatten().split(job["loss_chunk"]))
    loss = sum(checkpoint(loss_of, *chunk, use_reentrant=False) for chunk in chunks) / tokens[:, 1:].numel()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss
  return step


def measure(job):
  """What `main` writes."""
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
  found, begin = [], time.perf_counter()
  while len(found) < job["rounds"] and (not found or time.perf_counter() - begin + found[-1] * inner < job["seconds"]):
    found.append(sample(inner) / inner)
  return {"seconds": found, "inner": inner, "mib": torch.cuda.max_memory_allocated() / 2 ** 20, "compile_seconds": compile_seconds}


def main():
  """One job from standard input to standard output."""
  job = json.load(sys.stdin)
  try:
    found = measure(job)
  except Exception as error:  # of torch, of many kinds; they are told to the process that asked
    text = str(error).splitlines() or [""]
    found = {"failed": "out of memory" if "out of memory" in text[0] else f"{type(error).__name__}: {text[0]}"}
  print(json.dumps(found))


if __name__ == "__main__":
  main()
