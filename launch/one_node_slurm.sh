#!/usr/bin/env bash
# A Slurm of this one machine, to try slurm.sh: launch/one_node_slurm.sh FOLDER (as root; apt-get install slurm-wlm munge)
#
# Its files lie in FOLDER; export SLURM_CONF=FOLDER/slurm.conf and use sbatch as ever. To end it: kill the processes
# whose numbers FOLDER/*.pid hold.
set -euo pipefail

folder=$(realpath -m "${1:?the folder for its files}")
mkdir -p "$folder"/{state,spool}
host=$(hostname -s)
cat >"$folder/slurm.conf" <<EOF
ClusterName=one
SlurmctldHost=$host
SlurmUser=root
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/slurmd.pid
SlurmctldLogFile=$folder/slurmctld.log
SlurmdLogFile=$folder/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
ReturnToService=2
SchedulerParameters=sched_interval=5
MinJobAge=3600
$(slurmd -C | head -n 1) State=UNKNOWN
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP OverSubscribe=FORCE:8
EOF
export SLURM_CONF=$folder/slurm.conf
[[ -e /etc/munge/munge.key ]] || mungekey
pgrep -x munged >/dev/null || { mkdir -p /run/munge && chown munge: /run/munge && runuser -u munge -- munged; }
slurmctld
slurmd
for _ in $(seq 30); do
  sinfo --noheader --states=idle --format=%D 2>/dev/null | grep -q 1 && exec sinfo
  sleep 1
done
echo "no idle node after 30 s; see $folder/*.log" >&2
exit 1
