#!/usr/bin/env bash
# Train on a TPU slice's VMs: TPU=NAME ZONE=ZONE launch/tpu_vm.sh CONFIG WORKDIR [--config.KEY=VALUE ...]
#
# Every worker of the slice starts the same command; JAX learns from the VM's metadata how many there are. The command
# runs until it is done; a worker that is lost ends all others, and this script starts all again, TRIES times at most.
set -euo pipefail

TPU=${TPU:?the name of the TPU}
ZONE=${ZONE:?its zone}
SOURCE=${SOURCE:-peftax} # the checkout on every worker, with its environment: see README.md
PYTHON=${PYTHON:-.venv/bin/python}
TRIES=${TRIES:-3}

if (($# < 2)); then
  echo "usage: TPU=NAME ZONE=ZONE $0 CONFIG WORKDIR [--config.KEY=VALUE ...]" >&2
  exit 2
fi
config=$1 workdir=$2 # the workdir lies on storage that all workers mount
shift 2

printf -v command '%q ' "$PYTHON" -m peftax.cli train --config="$config" --workdir="$workdir" "$@"
for ((try = 1; ; try++)); do
  status=0
  gcloud compute tpus tpu-vm ssh "$TPU" --zone="$ZONE" --worker=all --command="cd $(printf %q "$SOURCE") && $command" ||
    status=$?
  if ((status == 0 || try > TRIES)); then
    exit "$status"
  fi
  echo "status $status: again, $try of $TRIES: it goes on where it stopped" >&2
  sleep 30
done
