#!/usr/bin/env bash
# Usage: bash tests/run.sh [ctest arguments, e.g. -L golden or -R attention]
# Installs what is missing, builds and runs all tests; the last line is CTest's summary. Exit status 0: all passed.
# KRAIT_PRESET=cpu, asan, tsan, debug: another preset than release. A CUDA toolkit is used where there is one.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
preset=${KRAIT_PRESET:-release}

bash train/setup.sh
cmake --preset "$preset"
cmake --build --preset "$preset" -j "$(nproc)"

log=$(mktemp)
trap 'rm -f "$log"' EXIT
status=0
ctest --preset "$preset" --no-label-summary "$@" 2>&1 | tee "$log" || status=$?
grep 'tests passed' "$log" | tail -n 1 || true
exit "$status"
