#!/usr/bin/env python3
"""The peer of the attention rows of `krait bench kernels`: causal attention in bf16 by cuDNN, through PyTorch.

Milliseconds of the forward pass and of forward and backward, medians (10th .. 90th percentile) of events around single
calls, the L2 cache overwritten before each. Needs a GPU and PyTorch; Krait does not.
  python3 tests/bench/peer_attention.py
"""
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

SIZES = [(16, 12, 1024, 64), (8, 16, 4096, 64), (8, 16, 4096, 128)]  # batch, heads, length, width of a head


def measure(call, laps, flush):
    for _ in range(5):
        call()
    events = []
    for _ in range(laps):
        flush.zero_()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        call()
        end.record()
        events.append((begin, end))
    torch.cuda.synchronize()
    times = sorted(begin.elapsed_time(end) for begin, end in events)
    return "{:.3f} ({:.3f} .. {:.3f})".format(*(times[laps * i // 10] for i in (5, 1, 9)))


def main():
    torch.manual_seed(0)
    flush = torch.empty(64 << 20, dtype=torch.int32, device="cuda")
    for b, h, l, d in SIZES:
        q, k, v = (torch.randn(b, l, h, d, device="cuda", dtype=torch.bfloat16).transpose(1, 2).requires_grad_() for _ in range(3))
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            forward = lambda: scaled_dot_product_attention(q, k, v, is_causal=True)
            gradient = torch.randn_like(forward())
            both = lambda: torch.autograd.grad(forward(), (q, k, v), gradient)
            with torch.no_grad():
                alone = measure(forward, 100, flush)
            print(f"B{b} H{h} L{l} D{d}: forward {alone}, forward and backward {measure(both, 60, flush)} ms", flush=True)


if __name__ == "__main__":
    main()
