#!/usr/bin/env bash
# Run a command in a pod: launch/pod.sh COMMAND ...
#
# Training that is stopped saves and ends with status 0, which Kubernetes would take for done: where the pod itself was
# told to stop, this ends with 143, so that the JobSet starts all again.
set -uo pipefail

stopped=
trap 'stopped=1; kill -TERM "$child"' TERM
"$@" &
child=$!
wait "$child"
status=$?
while [[ $stopped ]] && kill -0 "$child" 2>/dev/null; do # the signal ended the first wait
  wait "$child"
  status=$?
done
[[ $stopped ]] && exit 143
exit "$status"
