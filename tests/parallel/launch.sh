#!/usr/bin/env bash
# Usage: launch.sh PARALLEL_TESTS KRAIT CONFIGS: jobs that RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT alone describe.
# A rank that fails or dies ends all of them soon, with one message; values that do not fit are errors; losses are those
# of one rank.
set -uo pipefail
program=$1 krait=$2 configs=$3
start=$(dirname "$0")/by_environment.sh
failed=0
export KRAIT_COMM_TIMEOUT=3

# expect NAME PATTERN LINES command: a status that is not 0, soon, and so many lines that match, none of another error.
expect() {
  local begin=$SECONDS out status matches errors
  out=$(timeout 60 "${@:4}" 2>&1)
  status=$?
  local seconds=$((SECONDS - begin))
  matches=$(grep -cE "$2" <<<"$out")
  errors=$(grep -c "^error:" <<<"$out")
  if [ "$status" -eq 0 ] || [ "$status" -eq 124 ] || [ "$seconds" -ge 30 ] || [ "$matches" -ne "$3" ] ||
    [ "$errors" -gt "$3" ]; then
    echo "FAILED: $1: status $status after $seconds s, $matches lines match '$2':"
    echo "$out"
    failed=1
  else
    echo "passed: $1: status $status after $seconds s"
  fi
}
fault() { expect "$1" "$2" 1 "$start" -n 3 "$program" "fault: $1"; }


# beside command: runs along with what follows.
beside() {
  (
    "$@"
    exit $failed
  ) &
}
beside fault "stalls" "^error: rank 0 of 3 .*: all_reduce of float32 \(3,\) cpu in group 'world' \(.*\) has not ended after 3"
beside fault "stopped" "^ +rank 2 does not answer"
fault "killed" "^error: rank 0 of 3 .*: rank 2 \(.*, process [0-9]+\) has ended before the job's end; was it killed\?"
fault "rank 0 killed" "^error: rank 1 of 3 .*: rank 0 \(.*\) has ended before the job's end; was it killed\?"
fault "leaves without a word" "^error: rank 0 of 3 .*: rank 2 .* has ended before the job's end"
fault "exits" "^error: rank 2 of 3 .*: the process exits before the job's end"
fault "error" "^error: rank 2 of 3 .*: the disk is full"
fault "exception" "^error: rank 2 of 3 .*: ends with status 1"
fault "error on all ranks" "^error: rank 0 of 3 .*: no such file"

# ranks PATTERN LINES "variables of one rank" ...: all at once, on a port of their own; runs beside the other cases.
ranks() {
  local pattern=$1 lines=$2 port=$((30000 + case_number++)) script="" variables
  shift 2
  for variables in "$@"; do
    script+="env $variables '$program' 'fault: exits' & "
  done
  script+="status=0; for job in \$(jobs -p); do wait \$job || status=\$?; done; exit \$status"
  beside expect "$*" "$pattern" "$lines" env MASTER_PORT=$port bash -c "$script"
}
case_number=$((RANDOM % 2000))
ranks "^error: environment: RANK=2 does not fit WORLD_SIZE=2" 1 "RANK=2 WORLD_SIZE=2"
ranks "^error: environment: WORLD_SIZE=2 without RANK" 1 "WORLD_SIZE=2"
ranks "^error: environment: WORLD_SIZE=2 without MASTER_ADDR" 1 "RANK=0 WORLD_SIZE=2"
ranks "^error: environment: MASTER_PORT: found 'x', expected a port" 1 "RANK=0 WORLD_SIZE=2 MASTER_ADDR=localhost MASTER_PORT=x"
ranks "^error: rank 1 \(.*\) has WORLD_SIZE=3, but rank 0 has 2" 1 \
  "RANK=0 WORLD_SIZE=2 MASTER_ADDR=localhost" "RANK=1 WORLD_SIZE=3 MASTER_ADDR=localhost"
ranks "^error: rank 1 \(.*\) and \(.*\) have the same RANK" 1 "RANK=0 WORLD_SIZE=3 MASTER_ADDR=localhost" \
  "RANK=1 WORLD_SIZE=3 MASTER_ADDR=localhost" "RANK=1 WORLD_SIZE=3 MASTER_ADDR=localhost"
ranks "^error: 2 of 3 ranks have come within 8 s; not there: rank 2" 1 \
  "RANK=0 WORLD_SIZE=3 MASTER_ADDR=localhost" "RANK=1 WORLD_SIZE=3 MASTER_ADDR=localhost"
ranks "^error: rank 0 was not found at localhost:.* within 8 s: Connection refused" 1 "RANK=1 WORLD_SIZE=2 MASTER_ADDR=localhost"
ranks "^error: (rank 0 cannot wait for the other ranks at port .*: Address already in use|1 of 2 ranks have come)" 2 \
  "RANK=0 WORLD_SIZE=2 MASTER_ADDR=localhost" "RANK=0 WORLD_SIZE=2 MASTER_ADDR=localhost"
for job in $(jobs -p); do
  wait "$job" || failed=1
done
if pgrep -f "$program fault:" >/dev/null; then
  echo "FAILED: processes are left"
  failed=1
fi

# Losses of a run on 1, 2 and 4 ranks.
unset KRAIT_COMM_TIMEOUT
runs=$(mktemp -d)
trap 'rm -rf "$runs"' EXIT
losses() {
  timeout 200 "$start" -n "$1" "$krait" train "$configs/copying_mamba.yaml" runtime.device=cpu data.context=33 \
    data.valid_examples=8 data.test_examples=8 train.micro_batch_size=2 train.tokens_per_step=264 train.steps=4 \
    lr_scheduler.warmup_steps=1 eval.interval=0 checkpoint.interval=0 logging.interval=1 logging.tensorboard=false --run-dir "$runs/$1" >"$runs/$1.log" 2>&1 || cat "$runs/$1.log" >&2
  grep -o '"loss":[^,}]*' "$runs/$1/metrics.jsonl" | cut -d: -f2
}
one=$(losses 1)
for n in 2 4; do
  paste <(echo "$one") <(losses $n) >"$runs/both"
  if awk -v n=4 '{ d = ($1 - $2) / $1; if (d * d > 1e-10) bad = 1 } END { exit bad || NR != n }' "$runs/both" &&
    grep -q "environment (WORLD_SIZE): $n ranks" "$runs/$n.log"; then
    echo "passed: $n ranks have the losses of one"
  else
    echo "FAILED: losses of 1 and of $n ranks:"
    cat "$runs/both"
    failed=1
  fi
done
exit $failed
