#!/usr/bin/env bash
# A pretraining run on a Ray cluster inside one Slurm job. Submit it from the root of a checkout that all machines see,
# with the environment in .venv; what follows is given to the command:
#   sbatch cluster/slurm.sh data.path=/shared/data run.dir=/shared/runs model=small
# with GPUs, and the environment installed with cluster/cuda.txt:
#   sed -e '/# CPU$/d' -e 's/#GPU: //' cluster/slurm.sh > slurm-gpu.sh  and submit that.
# A job that is preempted or runs out of time continues from its last checkpoint when Slurm starts it again.
#SBATCH --job-name=hymate
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=4
#SBATCH --mem=20G # 4 workers of model small, at most 3,514 MiB each (docs/cluster.md, "Sizes"), Ray and the driver
#GPU: #SBATCH --gpus-per-node=1
#SBATCH --time=24:00:00
#SBATCH --signal=B:TERM@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
set -euo pipefail

. .venv/bin/activate
workers=$((SLURM_JOB_NUM_NODES * SLURM_CPUS_PER_TASK))                            # CPU
settings=("train.num_workers=$workers" "train.rows_per_step=$workers")            # CPU
#GPU: workers=$((SLURM_JOB_NUM_NODES * SLURM_GPUS_ON_NODE))
#GPU: settings=("train.num_workers=$workers" "train.rows_per_step=$workers" device=cuda train.precision=bf16)

mapfile -t machines < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
head=$(getent ahostsv4 "${machines[0]}" | awk '{print $1; exit}')
port=$((20000 + SLURM_JOB_ID % 10000)) # jobs that share a machine have clusters of their own
files=/tmp/hymate-$SLURM_JOB_ID
log=$files.log
trap 'rm -f "$log"' EXIT
: >"$log"
export RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S=0 # when the job ends there is nowhere that work could move to
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN # whoever reaches an open Ray can run code as you; a new token for each job
RAY_AUTH_TOKEN=$(od -An -N32 -tx1 /dev/urandom | tr -d ' \n')

# The object store holds what workers exchange, which is nothing; 0 is any free port.
ray=(ray start --block --disable-usage-stats --object-store-memory 134217728 --dashboard-agent-listen-port 0)
ray+=(--num-cpus "$SLURM_CPUS_PER_TASK")
step=(srun --overlap --cpus-per-task "$SLURM_CPUS_PER_TASK")
"${step[@]}" --nodes 1 --ntasks 1 --nodelist "${machines[0]}" \
    "${ray[@]}" --head --node-ip-address "$head" --port "$port" --include-dashboard false --temp-dir "$files" \
    >"$log" 2>&1 &
until grep -q "Ray runtime started" "$log"; do # no machine can join before
    kill -0 $! 2>/dev/null || { cat "$log"; exit 1; }
    sleep 1
done
if [ "${#machines[@]}" -gt 1 ]; then
    others=$(IFS=, && echo "${machines[*]:1}") num_others=$((${#machines[@]} - 1))
    # Ray ends on a machine that was cut off for a minute: it starts again. Its stack traces stay in its own files
    "${step[@]}" --nodes $num_others --ntasks $num_others --nodelist "$others" \
        bash -c 'while true; do "$@" 2>&1 | sed -u "/----- BEGIN/,/----- END/d"; sleep 5; done' \
        join "${ray[@]}" --address "$head:$port" &
fi

RAY_ADDRESS=$head:$port python pretrain/run.py "${settings[@]}" "$@" &
driver=$!
asked=
trap 'asked=1; kill -TERM $driver' TERM # by Slurm: out of time in five minutes, preempted or cancelled
status=0
wait $driver || status=$?
if [ -n "$asked" ]; then # the signal ended that wait
    status=0
    wait $driver || status=$?
    # a cancelled job is no longer running, and one that Slurm preempts is queued again by Slurm
    if [ "$status" != 0 ] && [ "$(squeue --noheader --jobs "$SLURM_JOB_ID" --format %T)" = RUNNING ]; then
        scontrol requeue "$SLURM_JOB_ID"
    fi
fi
exit "$status"
