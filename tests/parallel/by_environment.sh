#!/usr/bin/env bash
# Usage: by_environment.sh -n N PROGRAM [arguments]: N processes with RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and
# MASTER_PORT, and nothing else. Ends with the first status that is not 0 once all have ended.
set -u
ranks=$2
shift 2
free_port() {
  local port
  for _ in {1..50}; do
    port=$((20000 + (RANDOM + $$) % 10000))
    (exec 3<>"/dev/tcp/127.0.0.1/$port") 2>/dev/null || break
  done
  echo "$port"
}
export WORLD_SIZE=$ranks MASTER_ADDR=${MASTER_ADDR:-127.0.0.1} MASTER_PORT=${MASTER_PORT:-$(free_port)}
pids=()
trap 'kill "${pids[@]}" 2>/dev/null' TERM INT
for ((rank = 0; rank < ranks; ++rank)); do
  RANK=$rank LOCAL_RANK=$rank "$@" &
  pids+=($!)
done
status=0
for pid in "${pids[@]}"; do
  wait "$pid" 2>/dev/null || { one=$?; ((status)) || status=$one; }
done
exit $status
