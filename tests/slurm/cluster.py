"""A SLURM of one node on this machine, in a folder of its own: what it needs it says, and installs nothing.

python tests/slurm/cluster.py FOLDER    start one, and print the line that lets other commands find it
scontrol shutdown                       end it
"""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

NEEDED = ("slurmctld", "slurmd", "sbatch", "srun", "scontrol", "munged")
CPUS = 16
"""What SLURM may give out, whatever the machine has: its jobs here wait more than they work."""
CONF = """ClusterName=one
SlurmctldHost={node}(127.0.0.1)
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
SchedulerParameters=sched_interval=5,bf_interval=5
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
ReturnToService=2
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
SlurmctldParameters=enable_configless
SlurmdParameters=config_overrides
KillWait=30
NodeName={node} NodeAddr=127.0.0.1 CPUs={cpus} State=UNKNOWN
PartitionName=main Nodes={node} Default=YES MaxTime=INFINITE State=UP PriorityTier=1 PreemptMode=REQUEUE GraceTime=0
PartitionName=graced Nodes={node} MaxTime=INFINITE State=UP PriorityTier=1 PreemptMode=REQUEUE GraceTime=30
PartitionName=high Nodes={node} MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF
"""


def missing() -> str | None:
    """What this machine lacks; None: nothing."""
    absent = [name for name in NEEDED if shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin") is None]
    if absent:
        return f"{', '.join(absent)} not found; on Debian: apt-get install --no-install-recommends slurm-wlm munge"
    return None if os.geteuid() == 0 else "SLURM's daemons run as root here; start this as root, in a container"


class Cluster:
    """Start it on entering, end all of it on leaving; `SLURM_CONF` of this process names it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._munged: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Cluster:
        if why := missing():
            raise SystemExit(why)
        for name in ("state", "spool"):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        node = os.uname().nodename.partition(".")[0]
        conf = self.folder / "slurm.conf"
        conf.write_text(CONF.format(node=node, folder=self.folder, cpus=CPUS))
        os.environ |= {"SLURM_CONF": str(conf), "PATH": f"{os.environ['PATH']}:/usr/sbin"}
        self._start_munge()
        for daemon in ("slurmctld", "slurmd"):
            subprocess.run([daemon], check=True)
        self._until_idle()
        return self

    def __exit__(self, *_: Any) -> None:
        subprocess.run(["scancel", "--user=root"], check=False)
        daemons = [Path("/proc", file.read_text().strip()) for file in self.folder.glob("slurm*.pid")]
        subprocess.run(["scontrol", "shutdown"], check=False)
        deadline = time.monotonic() + 20
        while any(daemon.exists() for daemon in daemons) and time.monotonic() < deadline:  # they still write there
            time.sleep(0.2)
        if self._munged is not None:
            self._munged.terminate()
            self._munged.wait()

    def _start_munge(self) -> None:
        """Start the authentication, unless it runs."""
        if subprocess.run(["munge", "-n"], capture_output=True).returncode == 0:
            return
        user = pwd.getpwnam("munge")
        socket = Path("/run/munge")
        socket.mkdir(mode=0o755, exist_ok=True)
        os.chown(socket, user.pw_uid, user.pw_gid)
        self._munged = subprocess.Popen(["munged", "--foreground"], user="munge", group="munge")

    def _until_idle(self) -> None:
        deadline = time.monotonic() + 60
        while "idle" not in said("sinfo", "-h", "-o", "%T"):
            if time.monotonic() > deadline:
                raise SystemExit(f"SLURM does not come up: see {self.folder}/slurmctld.log and slurmd.log")
            time.sleep(1)


def said(*command: str) -> str:
    """What a command of SLURM's prints; empty if it fails."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else ""


if __name__ == "__main__":
    started = Cluster(Path(sys.argv[1]).absolute())
    started.__enter__()
    print(f"export SLURM_CONF={started.folder / 'slurm.conf'}")
