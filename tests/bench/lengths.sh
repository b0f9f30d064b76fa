#!/usr/bin/env bash
# Time and peak memory of a training step against the length of the sequence, one sequence per step, for the layer
# families whose cost must grow linearly. Prints a table in Markdown.
#   bash tests/bench/lengths.sh build/release/krait data/shakespeare_char.h5 [lengths] [families] [more overrides]
set -euo pipefail
krait=$1 data=$2
lengths=${3:-"1024 4096 16384 65536"}
families=${4:-"s4 s4d mamba mamba2 mlstm slstm"}
shift $(($# < 4 ? $# : 4))
configs=$(dirname "$0")/../../configs/lm
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT

echo "| family | length | ms per step | ns per token | peak memory, MiB |"
echo "|---|---|---|---|---|"
for family in $families; do
  for length in $lengths; do
    run=$tmp/$family-$length
    "$krait" train "$configs/$family.yaml" --run-dir "$run" data.path="$data" data.context="$length" model.d_model=64 \
      model.n_layers=2 train.micro_batch_size=1 train.steps=4 lr_scheduler.warmup_steps=1 eval.interval=0 eval.max_tokens=1 \
      checkpoint.interval=0 logging.interval=1 logging.tensorboard=false "$@" >"$tmp/log" 2>&1 || { cat "$tmp/log" >&2; exit 1; }
    # The median of the steps after the first.
    python3 - "$run/metrics.jsonl" "$family" "$length" <<'PYTHON'
import json, statistics, sys
steps = [m for m in map(json.loads, open(sys.argv[1])) if "loss" in m][1:]
length = int(sys.argv[3])
seconds = statistics.median(length / m["tokens_per_s"] for m in steps)
memory = max(m["mem_bytes"] for m in steps)
print(f"| {sys.argv[2]} | {length} | {1e3 * seconds:.1f} | {1e9 * seconds / length:.0f} | {memory / 2**20:.0f} |")
PYTHON
  done
done
