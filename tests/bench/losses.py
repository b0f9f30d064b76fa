#!/usr/bin/env python3
"""Do losses agree before and after a change of kernels? 200 steps of each large model, compared with an earlier report.

  python3 tests/bench/losses.py --json after.json --baseline tests/bench/baseline_h100_losses.json

Text, seed, order and initial weights are the same in every run; what differs is rounding. Compared are the means of the
last 50 losses, relative to their value. A single step differs more: micro-batches of another size alone move it by 1.5e-3.
Needs only Python's standard library. Exit status 1: a model is off by more than --margin or did not run.
"""
import argparse
import itertools
import json
import os
import pathlib
import random
import statistics
import subprocess
import sys
import tempfile

MODELS = {"gpt2_124m": 1024, "llama_124m": 2048, "mamba_130m": 2048, "mamba2_130m": 2048, "xlstm_125m": 2048}
ROOT = pathlib.Path(__file__).resolve().parents[2]


def text(megabytes):
    """Words by frequency, each drawn given the one before: losses fall for a few hundred steps."""
    draw = random.Random(20261123)
    letters = "etaoinshrdlucmfwypvbgk"
    words = ["".join(draw.choices(letters, k=draw.randint(1, 9))) for _ in range(4000)]
    frequency = list(itertools.accumulate(1 / (rank + 2) for rank in range(4000)))
    follow = [draw.choices(range(4000), cum_weights=frequency, k=12) for _ in range(4000)]
    out, size, word = [], 0, 0
    while size < megabytes * 1_000_000:
        word = draw.choice(follow[word])
        out.append(words[word])
        size += len(words[word]) + 1
        if draw.random() < 0.07:
            out[-1] += ".\n"
    return " ".join(out)


def losses(o, name, data, directory):
    context = MODELS[name]
    run = directory / name
    command = [o.krait, "train", str(ROOT / "configs" / f"{name}.yaml"), "--run-dir", str(run), f"runtime.device={o.device}",
               f"runtime.precision={o.precision}", f"data.path={data}", f"data.context={context}", f"train.steps={o.steps}",
               "train.tokens_per_step=16384", f"train.micro_batch_size={16384 // context}", "lr_scheduler.warmup_steps=20",
               "logging.interval=1", "eval.interval=0", "checkpoint.interval=0"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        print(done.stderr[-2000:], file=sys.stderr)
        return None
    rows = (json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines())
    return [row["loss"] for row in rows if "loss" in row]


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--krait", default=str(ROOT / "build/release/krait"))
    p.add_argument("--models", nargs="*", default=list(MODELS), choices=MODELS)
    p.add_argument("--device", default="cuda")
    p.add_argument("--precision", default="bf16")
    p.add_argument("--steps", type=int, default=200)
    p.add_argument("--margin", type=float, default=2e-3)
    p.add_argument("--json", help="write the losses here")
    p.add_argument("--baseline", help="an earlier --json report")
    o = p.parse_args()
    before = json.loads(pathlib.Path(o.baseline).read_text()) if o.baseline else {}
    report, bad = {}, []
    with tempfile.TemporaryDirectory() as temporary:
        directory = pathlib.Path(temporary)
        (directory / "text.txt").write_text(text(8))
        data = directory / "text.h5"
        subprocess.run([o.krait, "data", "prepare", str(directory / "text.txt"), "-o", str(data), "--tokenizer", "byte",
                        "--valid", "0.01"], check=True, capture_output=True)
        for name in o.models:
            found = losses(o, name, data, directory)
            if not found:
                bad.append(name)
                continue
            mean = statistics.fmean(found[-50:])
            report[name] = {"mean_of_last_50": mean, "losses": [round(x, 5) for x in found]}
            line = f"{name:12s} first {found[0]:.4f}  mean of the last 50 {mean:.5f}"
            if name in before:
                old = before[name]
                line += f"  before {old['mean_of_last_50']:.5f}"
                off = abs(mean / old["mean_of_last_50"] - 1)
                steps = [abs(a / b - 1) for a, b in zip(found, old["losses"])]
                line += f"  differ by {off:.1e}; single steps {statistics.fmean(steps):.1e} on average"
                if off > o.margin:
                    bad.append(name)
                    line += "  TOO MUCH"
            print(line, flush=True)
    if o.json:
        pathlib.Path(o.json).write_text(json.dumps(report) + os.linesep)
    if bad:
        sys.exit("not in agreement: " + ", ".join(bad))


if __name__ == "__main__":
    main()
