"""Training steps of a plain PyTorch model with a sliding window, as its best users write it.

The shape is that of our model. FlexAttention computes the window; one torch.compile covers the
forward pass and the loss. Weights and AdamW's state are bfloat16, nothing is recomputed, and the
logits of the whole row exist. The process of its own is started by `transformers_llama.ask`.
"""

import sys
from collections.abc import Callable
from typing import Any

from sparsek.experiments.bench import transformers_llama

KIND = "pytorch_window"
COMMAND = (sys.executable, "-m", "sparsek.experiments.bench.pytorch_window")


def make_model(shape: dict, window: int) -> Any:
  """Returns a torch module, and its compiled loss: (tokens [B, n], targets [B, n]) -> mean
  cross-entropy.

  Args:
    shape: the fields of a transformers.LlamaConfig, as `transformers_llama.fields` returns them.
    window: latest tokens that a query sees, itself included.
  """
  import torch
  from torch import nn
  from torch.nn import functional
  from torch.nn.attention.flex_attention import create_block_mask, flex_attention

  width, heads, kv_heads = (
    shape[name] for name in ("hidden_size", "num_attention_heads", "num_key_value_heads")
  )
  dim, hidden = shape["head_dim"], shape["intermediate_size"]

  def rotated(x, cos, sin):
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)

  class Block(nn.Module):
    """Attention and SwiGLU, each after an RMSNorm."""

    def __init__(self):
      super().__init__()
      self.attention_norm, self.mlp_norm = nn.RMSNorm(width), nn.RMSNorm(width)
      self.qkv = nn.Linear(width, (heads + 2 * kv_heads) * dim, bias=False)
      self.out = nn.Linear(heads * dim, width, bias=False)
      self.up, self.down = (
        nn.Linear(width, 2 * hidden, bias=False),
        nn.Linear(hidden, width, bias=False),
      )

    def forward(self, x, cos, sin, mask):
      qkv = self.qkv(self.attention_norm(x)).unflatten(-1, (-1, dim)).transpose(1, 2)
      q, k, v = qkv.split([heads, kv_heads, kv_heads], dim=1)
      q, k = rotated(q, cos, sin), rotated(k, cos, sin)
      mixed = flex_attention(q, k, v, block_mask=mask, enable_gqa=heads != kv_heads)
      x = x + self.out(mixed.transpose(1, 2).flatten(2))
      gate, up = self.up(self.mlp_norm(x)).chunk(2, dim=-1)
      return x + self.down(functional.silu(gate) * up)

  class Model(nn.Module):
    """The blocks between an embedding and the loss."""

    def __init__(self):
      super().__init__()
      self.embedding = nn.Embedding(shape["vocab_size"], width)
      nn.init.normal_(self.embedding.weight, std=0.02)
      self.blocks = nn.ModuleList(Block() for _ in range(shape["num_hidden_layers"]))
      self.norm = nn.RMSNorm(width)
      self.head = nn.Linear(width, shape["vocab_size"], bias=False)
      if shape["tie_word_embeddings"]:
        self.head.weight = self.embedding.weight

    def forward(self, tokens, targets, cos, sin, mask):
      x = self.embedding(tokens)
      for block in self.blocks:
        x = block(x, cos, sin, mask)
      logits = self.head(self.norm(x)).float()
      return functional.cross_entropy(logits.flatten(0, 1), targets.flatten())

  def in_window(b, h, i, j):
    return (j <= i) & (i - j < window)

  n = shape["max_position_embeddings"]
  model = Model().to(device="cuda", dtype=torch.bfloat16)
  # Compiled, it does not hold the mask of all pairs of tokens.
  mask = torch.compile(create_block_mask)(in_window, None, None, n, n, device="cuda")
  angles = torch.outer(
    torch.arange(n, device="cuda").float(),
    10000.0 ** (-torch.arange(0, dim, 2, device="cuda").float() / dim),
  )
  rotation = angles.cos().bfloat16(), angles.sin().bfloat16()
  compiled = torch.compile(model)
  return model, lambda tokens, targets: compiled(tokens, targets, *rotation, mask)


def make_step(job: dict) -> Callable:
  """Returns a function that makes one optimizer step; `job` is that of `transformers_llama.run`."""
  import torch

  torch.manual_seed(0)
  model, loss_of = make_model(job["model"], job["window"])
  optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
  size = job["batch_size"], job["n"] + 1
  tokens = torch.randint(job["model"]["vocab_size"], size, device="cuda")

  def step():
    loss = loss_of(tokens[:, :-1], tokens[:, 1:])
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss

  return step


if __name__ == "__main__":
  transformers_llama.answer(lambda job: transformers_llama.time_job(job, make_step))
