#!/usr/bin/env bash
# Usage: faults.sh cpu|cuda PROGRAM MPIRUN [flags]: each hidden case of fault_test.cpp must end all ranks soon, with a
# status that is not 0 and with one message that says what happened. cuda: those on two GPUs; status 77 without them.
set -uo pipefail
device=$1
program=$2
mpirun=("${@:3}")
ranks=3

# expect CASE PATTERN...: one line of the output matches each.
expect() {
  local begin=$SECONDS out status pattern failed=0
  out=$(KRAIT_COMM_TIMEOUT=3 timeout 60 "${mpirun[@]}" -n "$ranks" "$program" "fault: $1" 2>&1)
  status=$?
  local seconds=$((SECONDS - begin))
  if [ "$status" -eq 0 ] || [ "$status" -eq 124 ] || [ "$seconds" -ge 30 ]; then
    echo "FAILED: $1: status $status after $seconds s"
    failed=1
  fi
  for pattern in "${@:2}"; do
    [ "$(grep -cE "$pattern" <<<"$out")" -eq 1 ] && continue
    echo "FAILED: $1: not one line matches '$pattern'"
    failed=1
  done
  if pgrep -f "$program fault: $1\$" >/dev/null; then
    echo "FAILED: $1: processes are left"
    failed=1
  fi
  if [ "$failed" -ne 0 ]; then echo "$out"; else echo "passed: $1: status $status after $seconds s"; fi
  return $failed
}

if [ "$device" = cuda ]; then
  [ "$(nvidia-smi -L 2>/dev/null | grep -c '^GPU')" -ge 2 ] || exit 77
  ranks=2
  failed=0
  expect "stalls on a GPU" "error: rank 0 of 2 .*: all_reduce of .* in group 'world' .* has not ended after 3" \
    "^ +rank 1 \(.*\) is not in a collective: its call 1, " || failed=1
  expect "killed on a GPU" "signal 9 \(Killed\)" || failed=1
  exit $failed
fi

# Those that wait for a time-out run beside the others.
failed=0
stuck="error: rank 0 of 3 .*: all_reduce of float32 \(3,\) cpu in group 'world' \(world ranks 0, 1, 2\) has not ended after 3"
{
  expect "stalls" "$stuck" "^ +rank 2 \(.*\) is not in a collective: its call 1, .* s ago, was all_reduce" &&
    expect "leaves early" "^ +rank 0 \(.*\) waits too: its call ., .* s ago, was barrier .* in group 'the end of the job'"
} &
{
  expect "stopped" "$stuck" "^ +rank 2 does not answer" &&
    expect "other group" "^ +rank 2 \(.*\) waits too: its call ., .* s ago, was all_reduce \(5 x float32\) in group 'pair'"
} &
expect "killed" "signal 9 \(Killed\)" || failed=1
expect "exits" "error: rank 2 of 3 .*: the process exits before the job's end" || failed=1
expect "leaves without a word" "without .*calling \"finalize\"|error: rank 0 of 3 .*all_reduce of" || failed=1
expect "error" "error: rank 2 of 3 .*: the disk is full" || failed=1
expect "exception" "error: rank 2 of 3 .*: ends with status 1" || failed=1
expect "error on all ranks" "error: rank 0 of 3 .*: no such file" || failed=1
for job in $(jobs -p); do
  wait "$job" || failed=1
done
exit $failed
