#!/usr/bin/env python3
"""The peer of the CPU rows in README: the same character GPT trained with PyTorch, tokens per second.

Same mathematics as configs/shakespeare_char_*.yaml: pre-norm GPT with learned positions, GELU, tied head,
AdamW, gradient clipping. Needs PyTorch; Krait does not.
  python3 tests/bench/peer_char_gpt.py --layers 4 --heads 4 --width 128 --context 64 --batch 12 --threads 2
"""
import argparse
import statistics
import time

import torch
from torch import nn
from torch.nn import functional as F


class Block(nn.Module):
    def __init__(self, width, heads, dropout):
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.fc, self.proj = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x):
        b, length, width = x.shape
        q, k, v = (t.view(b, length, self.heads, -1).transpose(1, 2) for t in self.qkv(self.norm1(x)).split(width, 2))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        y = self.out(y.transpose(1, 2).reshape(b, length, width))
        x = x + F.dropout(y, self.dropout)
        y = self.proj(F.gelu(self.fc(self.norm2(x)), approximate="tanh"))
        return x + F.dropout(y, self.dropout)


class Gpt(nn.Module):
    def __init__(self, o, vocab=65):
        super().__init__()
        self.dropout = o.dropout
        self.tokens, self.positions = nn.Embedding(vocab, o.width), nn.Embedding(o.context, o.width)
        self.blocks = nn.ModuleList(Block(o.width, o.heads, o.dropout) for _ in range(o.layers))
        self.norm = nn.LayerNorm(o.width)
        for p in self.parameters():
            if p.dim() > 1:
                nn.init.normal_(p, std=0.02)

    def forward(self, x, y):
        h = F.dropout(self.tokens(x) + self.positions.weight[: x.shape[1]], self.dropout)
        for block in self.blocks:
            h = block(h)
        return F.cross_entropy(F.linear(self.norm(h), self.tokens.weight).flatten(0, 1), y.flatten())


def main():
    p = argparse.ArgumentParser()
    for name, value in (("layers", 4), ("heads", 4), ("width", 128), ("context", 64), ("batch", 12), ("steps", 100),
                        ("threads", 2)):
        p.add_argument(f"--{name}", type=int, default=value)
    p.add_argument("--dropout", type=float, default=0.0)
    p.add_argument("--compile", action="store_true")
    o = p.parse_args()
    torch.set_num_threads(o.threads)
    torch.manual_seed(1)
    model = Gpt(o)
    run = torch.compile(model) if o.compile else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.99), weight_decay=0.1, fused=True)
    data = torch.randint(0, 65, (200000,))
    times = []
    for step in range(o.steps + 5):
        start = time.perf_counter()
        at = torch.randint(0, len(data) - o.context - 1, (o.batch,))
        x = torch.stack([data[i : i + o.context] for i in at])
        y = torch.stack([data[i + 1 : i + 1 + o.context] for i in at])
        run(x, y).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step >= 5:
            times.append(time.perf_counter() - start)
    median = statistics.median(times)
    print(f"torch {torch.__version__} threads {o.threads} compile {o.compile}: {1e3 * median:.2f} ms/step, "
          f"{o.batch * o.context / median:.0f} tokens/s")


if __name__ == "__main__":
    main()
