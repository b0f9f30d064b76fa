#!/usr/bin/env python3
"""The peers of the CPU rows of `krait bench train`: the same models as one trains them with PyTorch, in turn with Krait.

Whole steps on random data: forward, backward, clip to 1.0, AdamW; fp32, the same number of threads for both.
llama-small is written with PyTorch's own attention, norm and fused AdamW; s4d-small with torch.fft; Mamba and Mamba-2 are
those of Hugging Face transformers without compiled extensions. Needs PyTorch and transformers; Krait does not.
  python3 tests/bench/peer_cpu.py --krait build/release/krait [--rows llama-small s4d-small mamba-small mamba2-small]
"""
import argparse
import json
import math
import os
import statistics
import subprocess
import tempfile
import time

import torch
from torch import nn
from torch.nn import functional as F


class LlamaBlock(nn.Module):
    def __init__(self, width, heads, hidden):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.RMSNorm(width), nn.RMSNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)
        self.up, self.down = nn.Linear(width, 2 * hidden, bias=False), nn.Linear(hidden, width, bias=False)

    def forward(self, x, cos, sin):
        b, length, width = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(b, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)

        def turn(t):
            one, two = t.chunk(2, -1)
            return torch.cat([one * cos - two * sin, two * cos + one * sin], -1)

        y = F.scaled_dot_product_attention(turn(q), turn(k), v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).reshape(b, length, width))
        gate, up = self.up(self.norm2(x)).chunk(2, -1)
        return x + self.down(F.silu(gate) * up)


class Llama(nn.Module):
    def __init__(self, width=256, layers=4, heads=4, hidden=768, vocab=4096, length=256):
        super().__init__()
        self.tokens = nn.Embedding(vocab, width)
        self.blocks = nn.ModuleList(LlamaBlock(width, heads, hidden) for _ in range(layers))
        self.norm = nn.RMSNorm(width)
        angle = torch.arange(length)[:, None] * 1e4 ** -(torch.arange(0, width // heads, 2) / (width // heads))
        self.register_buffer("cos", angle.cos())
        self.register_buffer("sin", angle.sin())
        nn.init.normal_(self.tokens.weight, std=0.02)

    def loss(self, x, y):
        h = self.tokens(x)
        for block in self.blocks:
            h = block(h, self.cos, self.sin)
        return F.cross_entropy(F.linear(self.norm(h), self.tokens.weight).flatten(0, 1), y.flatten())


class S4DLayer(nn.Module):
    """Diagonal S4 with zero-order hold (Gu et al. 2022), convolution through real FFTs."""

    def __init__(self, width, state=64):
        super().__init__()
        n = state // 2
        self.log_dt = nn.Parameter(torch.rand(width) * (math.log(0.1) - math.log(0.001)) + math.log(0.001))
        self.log_real = nn.Parameter(torch.log(0.5 * torch.ones(2, n)))  # two sets of poles, shared by the channels
        self.imag = nn.Parameter(math.pi * torch.arange(n).repeat(2, 1).float())
        self.c = nn.Parameter(torch.view_as_real(torch.randn(width, n, dtype=torch.cfloat)))
        self.d = nn.Parameter(torch.randn(width))
        self.out, self.norm = nn.Linear(width, 2 * width), nn.LayerNorm(width)

    def forward(self, x):
        length = x.shape[1]
        a = (-torch.exp(self.log_real) + 1j * self.imag).repeat(len(self.log_dt) // 2, 1)
        dt_a = a * torch.exp(self.log_dt)[:, None]
        c = torch.view_as_complex(self.c) * (torch.exp(dt_a) - 1) / a
        kernel = 2 * torch.einsum("hn,hnl->hl", c, torch.exp(dt_a[..., None] * torch.arange(length))).real
        u = x.transpose(1, 2)
        y = torch.fft.irfft(torch.fft.rfft(u, 2 * length) * torch.fft.rfft(kernel, 2 * length), 2 * length)[..., :length]
        y = F.dropout(F.gelu(y + u * self.d[:, None]), 0.1).transpose(1, 2)
        return self.norm(x + F.dropout(F.glu(self.out(y)), 0.1))


class S4DClassifier(nn.Module):
    def __init__(self, width=64, layers=4, features=3, classes=10):
        super().__init__()
        self.inputs, self.head = nn.Linear(features, width), nn.Linear(width, classes)
        self.layers = nn.Sequential(*(S4DLayer(width) for _ in range(layers)))

    def loss(self, x, y):
        return F.cross_entropy(self.head(self.layers(self.inputs(x)).mean(1)), y)


def hugging_face(kind):
    os.environ["HF_HUB_OFFLINE"] = "1"
    import transformers

    transformers.logging.set_verbosity_error()
    same = dict(hidden_size=128, num_hidden_layers=4, vocab_size=65, expand=2, conv_kernel=4, tie_word_embeddings=True,
                use_cache=False)
    if kind == "mamba-small":
        model = transformers.MambaForCausalLM(transformers.MambaConfig(state_size=16, **same))
    else:
        model = transformers.Mamba2ForCausalLM(transformers.Mamba2Config(state_size=64, head_dim=32, num_heads=8, n_groups=1,
                                                                         chunk_size=64, **same))
    model.loss = lambda x, y: F.cross_entropy(model(x).logits.flatten(0, 1), y.flatten())
    return model


def tokens(batch, length, vocab):
    return lambda: (torch.randint(0, vocab, (batch, length)), torch.randint(0, vocab, (batch, length)))


ROWS = {  # of krait bench train: what is counted in a step, the model, its batches, steps to time
    "llama-small": (4 * 256, Llama, tokens(4, 256, 4096), 8),
    "s4d-small": (8, S4DClassifier, lambda: (torch.rand(8, 784, 3), torch.randint(0, 10, (8,))), 8),
    "mamba-small": (8 * 128, lambda: hugging_face("mamba-small"), tokens(8, 128, 65), 3),
    "mamba2-small": (8 * 128, lambda: hugging_face("mamba2-small"), tokens(8, 128, 65), 3),
}


def peer_seconds(model, optimizer, batch, steps):
    times = []
    for _ in range(steps):
        start = time.perf_counter()
        model.loss(*batch()).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def krait_row(krait, name, threads):
    with tempfile.NamedTemporaryFile(suffix=".json") as f:
        subprocess.run([krait, "bench", "train", "--device", "cpu", "--filter", name, "--json", f.name], check=True,
                       stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                       env={**os.environ, "OMP_NUM_THREADS": str(threads)})
        return json.load(open(f.name))["rows"][0]


def main():
    p = argparse.ArgumentParser()
    p.add_argument("--krait", default="build/release/krait")
    p.add_argument("--rows", nargs="+", default=list(ROWS), choices=list(ROWS))
    p.add_argument("--rounds", type=int, default=3)
    p.add_argument("--threads", type=int, default=2)
    o = p.parse_args()
    torch.set_num_threads(o.threads)
    print(f"torch {torch.__version__}, {o.threads} threads, {o.rounds} rounds in turn, medians of steps")
    print("| row | parameters, Krait and peer | Krait, a second | peer, a second | ratio by round |")
    print("|---|---|---|---|---|")
    for name in o.rows:
        count, build, batch, steps = ROWS[name]
        torch.manual_seed(1)
        model = build().train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=6e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
        peer_seconds(model, optimizer, batch, 2)  # warm
        ours, theirs, parameters = [], [], 0
        for _ in range(o.rounds):
            row = krait_row(o.krait, name, o.threads)
            parameters = row["parameters"]
            ours.append(count / (1e-3 * row["median_ms"]))
            theirs.append(count / peer_seconds(model, optimizer, batch, steps))
        ratios = ", ".join(f"{a / b:.2f}" for a, b in zip(ours, theirs))
        print(f"| {name} | {parameters:.0f}, {sum(q.numel() for q in model.parameters())} | {statistics.median(ours):.0f} | "
              f"{statistics.median(theirs):.0f} | {ratios} |", flush=True)


if __name__ == "__main__":
    main()
