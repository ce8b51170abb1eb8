#!/bin/sh
# Start a SLURM of one node on this machine, for tests/scenarios/test_launchers.py: as root, on Debian, in a minute.
#   apt-get install --no-install-recommends slurm-wlm munge
#   . tests/one_node_slurm.sh FOLDER
# It exports SLURM_CONF. `scontrol shutdown` ends it.
folder=${1:-/tmp/slurm} node=$(hostname -s)
mkdir -p "$folder/state" "$folder/spool"
cat >"$folder/slurm.conf" <<END
ClusterName=one
SlurmctldHost=$node(127.0.0.1)
SlurmctldPort=16817
SlurmdPort=16818
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
SlurmUser=root
AuthType=auth/munge
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerType=sched/backfill
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
ReturnToService=2
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/slurmd.pid
SlurmctldLogFile=$folder/slurmctld.log
SlurmdLogFile=$folder/slurmd.log
SlurmctldParameters=enable_configless
KillWait=30
NodeName=$node NodeAddr=127.0.0.1 CPUs=$(nproc --all) State=UNKNOWN
PartitionName=main Nodes=$node Default=YES MaxTime=INFINITE State=UP PriorityTier=1 PreemptMode=REQUEUE GraceTime=30
PartitionName=high Nodes=$node MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF
END
install -d -o munge -g munge /run/munge
pidof munged >/dev/null || runuser -u munge -- munged
export SLURM_CONF="$folder/slurm.conf"
slurmctld && slurmd && sinfo
