#!/usr/bin/env bash
# Usage: bash train/quickstart.sh [text file]
# From a fresh Debian or Ubuntu machine to a trained language model: installs what is missing, builds, prepares the
# text, trains configs/quickstart.yaml on the CPU for at most three minutes, measures the held-out perplexity and
# writes some text. Without an argument the text is the King James Bible, from the package bible-kjv.
set -euo pipefail
text=
if [ $# -gt 1 ] || [ "${1:-}" = -h ] || [ "${1:-}" = --help ]; then
  echo "usage: bash train/quickstart.sh [text file]" >&2
  exit 2
elif [ $# -eq 1 ]; then
  if [ ! -f "$1" ] || [ ! -s "$1" ]; then
    echo "error: $1 is not a file with text in it" >&2
    exit 2
  fi
  text=$(realpath "$1")
fi
cd "$(dirname "${BASH_SOURCE[0]}")/.."
say() { printf '\n== %s\n' "$*"; }

say "Libraries"
if [ -n "$text" ]; then bash train/setup.sh; else bash train/setup.sh bible-kjv; fi
echo "all there"

say "Build (the first time some minutes)"
cmake --preset release -Wno-dev --log-level=WARNING
cmake --build --preset release --target krait -j "$(nproc)"
krait=build/release/krait

out=runs/quickstart
mkdir -p "$out"
if [ -z "$text" ]; then
  text=$out/bible.txt
  bible -f gen1:1-rev22:21 >"$text.part" </dev/null
  mv "$text.part" "$text"
fi

say "Data: $text"
"$krait" data prepare "$text" -o "$out/tokens.h5" --overwrite --tokenizer byte

run=$out/$(date +%Y%m%d-%H%M%S)
say "Training: configs/quickstart.yaml"
# The steps of the config take less; on a slow machine the signal ends the run as Ctrl-C would: with a checkpoint.
status=0
timeout --foreground --signal=TERM 180 "$krait" train configs/quickstart.yaml --run-dir "$run" || status=$?
if [ "$status" -eq 124 ]; then
  echo "stopped after three minutes; $krait train $run/config.yaml --run-dir $run --resume goes on"
elif [ "$status" -ne 0 ]; then
  exit "$status"
fi

say "Held-out perplexity"
"$krait" eval "$run" eval.max_tokens=0 --split valid

say "A sample"
"$krait" generate "$run" --prompt "And " --max-tokens 120 --temperature 0.8 --top-p 0.95 --seed 1

say "Done"
echo "The run is in $run: config.yaml, metrics.jsonl, summary.json, checkpoints/, tensorboard/"
