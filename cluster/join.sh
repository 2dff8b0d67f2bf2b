#!/usr/bin/env bash
# This machine as part of a Ray cluster, for as long as this script runs:
#   cluster/join.sh FIRST_MACHINE:6379 [OPTIONS OF `ray start`, such as --num-cpus 4]
# Ray gives up a machine that it hears nothing of for a minute, and Ray on that machine then ends: here it starts again.
set -u

command -v ray >/dev/null || PATH=$(cd "$(dirname "$0")/.." && pwd)/.venv/bin:$PATH
export RAY_AUTH_MODE=token # whoever reaches an open Ray can run code as you
trap 'kill $child; wait; exit' TERM INT HUP
while true; do
    # without the stack traces; they stay in the file of exits that Ray names
    ray start --block --address "$@" --dashboard-agent-listen-port 0 --disable-usage-stats --log-color false \
        > >(sed -u '/----- BEGIN/,/----- END/d') 2>&1 &
    child=$!
    wait $child
    echo "Ray has ended; it starts again in 5 seconds"
    sleep 5 &
    child=$!
    wait $child
done
