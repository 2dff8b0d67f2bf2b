#!/usr/bin/env bash
# A Ray cluster of this machine alone, for `ray job submit`.
#   cluster/local.sh start [OPTIONS OF `ray start`, such as --num-cpus 2]
#   cluster/local.sh status
#   cluster/local.sh stop
# Ray's files and logs are below $HYMATE_CLUSTER. Unlike `ray stop`, stop ends this cluster and no other Ray instance.
set -euo pipefail

folder=${HYMATE_CLUSTER:-/tmp/hymate-$(id -un)} # short: Ray puts sockets below it, whose paths are limited
token=${RAY_AUTH_TOKEN_PATH:-$HOME/.ray/auth_token}
command -v ray >/dev/null || PATH=$(cd "$(dirname "$0")/.." && pwd)/.venv/bin:$PATH # a job's `python` is this one too

export RAY_AUTH_MODE=token                     # whoever reaches an open Ray can run code as you
export RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER=0     # makes Ray listen on the loopback interface only
export RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S=0 # there is no other machine that work could move to
export RAY_JOB_STOP_WAIT_TIME_S=120            # seconds that a stopped job has to save where it stands; 3 by default

fail() {
    echo "error: $*" >&2
    exit 1
}

running() {
    [ -f "$folder/pid" ] && ps -ww -p "$(cat "$folder/pid")" -o args= | grep -qF -- "--temp-dir $folder/ray "
}

start() {
    ! running || fail "a cluster is running in $folder already; cluster/local.sh stop ends it"
    mkdir -p "$folder" "$(dirname "$token")"
    chmod 700 "$folder" # Ray lets everybody write to its own folder below it
    rm -rf "$folder/ray"
    [ -s "$token" ] || (umask 077 && od -An -N32 -tx1 /dev/urandom | tr -d ' \n' >"$token")
    chmod 600 "$token"
    : >"$folder/log" # what the last cluster said must not count
    # Every Ray instance on a machine wants port 52365 for its job agent, and where that is taken it runs without one: "No
    # available agent to submit job". 0 is any free port.
    nohup ray start --head --block --temp-dir "$folder/ray" --port 0 --dashboard-host 127.0.0.1 \
        --dashboard-agent-listen-port 0 --disable-usage-stats --log-color false "$@" \
        </dev/null >"$folder/log" 2>&1 &
    echo $! >"$folder/pid"
    until grep -q "Ray runtime started" "$folder/log"; do
        kill -0 $! 2>/dev/null || fail "Ray did not start:"$'\n'"$(cat "$folder/log")"
        sleep 0.2
    done
    address=$(sed -n "s/.*RAY_API_SERVER_ADDRESS='\([^']*\)'.*/\1/p" "$folder/log")
    [ -n "$address" ] || { stop; fail "Ray has no dashboard: is its port taken? --dashboard-port chooses another"; }
    echo "export RAY_AUTH_MODE=token"
    echo "ray job submit --address $address --working-dir . -- python pretrain/run.py ..."
}

status() {
    running || fail "no cluster is running in $folder"
    ray status --address "$(cat "$folder/ray/ray_current_cluster")"
}

stop() {
    running || fail "no cluster is running in $folder"
    kill "$(cat "$folder/pid")"
    while running; do sleep 0.2; done
    rm "$folder/pid"
}

case ${1-} in
start | status | stop) "$@" ;;
*) fail "usage: cluster/local.sh start|status|stop" ;;
esac
