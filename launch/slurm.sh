#!/usr/bin/env bash
# Train on Slurm: sbatch launch/slurm.sh CONFIG WORKDIR [--config.KEY=VALUE ...]
#
# One task a GPU: that is what JAX takes from Slurm (task SLURM_LOCALID of a node gets that GPU and no other). Every
# task sees all GPUs of its node (--gpus-per-node, not --gpus-per-task), so that they copy to one another directly.
# Nodes without GPUs: sbatch --gpus-per-node=0 --ntasks-per-node=1 launch/slurm.sh ...
#
#SBATCH --job-name=peftax
#SBATCH --nodes=2
#SBATCH --gpus-per-node=8
#SBATCH --ntasks-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.out
#SBATCH --signal=B:TERM@120
set -euo pipefail

PYTHON=${PYTHON:-.venv/bin/python}
TRIES=${TRIES:-3} # how often a job whose training failed goes back into the queue

if (($# < 2)); then
  echo "usage: sbatch $0 CONFIG WORKDIR [--config.KEY=VALUE ...]" >&2
  exit 2
fi
config=$1 workdir=$2 # the workdir lies on storage that all nodes share
shift 2

again() {
  echo "$1: back into the queue, it goes on where it stopped" >&2
  scontrol requeue "$SLURM_JOB_ID"
}

# 120 s before the time is over this script gets SIGTERM and hands it on: training saves after its step and ends.
stopped=
trap 'stopped=1; scancel --signal=TERM "$SLURM_JOB_ID"' TERM

srun --kill-on-bad-exit=1 "$PYTHON" -m peftax.cli train --config="$config" --workdir="$workdir" "$@" &
status=0
wait "$!" || status=$?
while [[ $stopped ]] && kill -0 "$!" 2>/dev/null; do # the signal ended the first wait
  status=0
  wait "$!" || status=$?
done

if [[ $stopped ]]; then
  again "stopped before its time is over"
elif ((status != 0 && ${SLURM_RESTART_COUNT:-0} < TRIES)); then
  again "status $status, try $((${SLURM_RESTART_COUNT:-0} + 1)) of $TRIES"
fi
exit "$status"
