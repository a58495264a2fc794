"""Describe a private Slurm, and generate its slurm.conf, gres.conf and slurmdbd.conf (man pages of these names)."""

import os
import pwd
import socket
import time
from dataclasses import dataclass
from pathlib import Path

from slurm.errors import SlurmError

CONTROLLER = "controller"  # the host name of slurmctld and slurmdbd, where nodes have host names of their own
LOOPBACK = "127.0.0.1"
# The part of slurm.conf that is the same for all. Timeouts are as short as Slurm allows, so that tests need not wait: a
# node is down after SlurmdTimeout, a job that ignores TERM is killed after KillWait. config_overrides: nodes may have
# more CPUs and memory than the machine. task/none and jobacct_gather/none need no cgroup.
_COMMON = """\
MailProg=/bin/true
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,bf_interval=1,batch_sched_delay=0,sched_min_interval=0
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
ReturnToService=2
SlurmctldTimeout=10
SlurmdTimeout=5
KillWait=5
MessageTimeout=5
PropagateResourceLimits=NONE
GresTypes=gpu
DebugFlags=NO_CONF_HASH
SlurmdParameters=config_overrides
PartitionName=DEFAULT Nodes=ALL State=UP MaxTime=INFINITE PreemptMode=OFF
PartitionName=main PriorityTier=1 Default=YES
PartitionName=low PriorityTier=1 PreemptMode=REQUEUE GraceTime=0
PartitionName=grace PriorityTier=1 PreemptMode=REQUEUE GraceTime=15
PartitionName=high PriorityTier=2 MaxTime=60
"""


@dataclass(frozen=True)
class LocalCluster:
    """A cluster in a private directory. With `own_hosts`, nodes have host names and process ids of their own.

    On loopback, slurmctld listens on `port`, slurmdbd on the next one, and the slurmd of each node on those after it.
    """

    directory: Path
    nodes: tuple[str, ...]
    port: int
    own_hosts: bool
    accounting: bool
    gpus_per_node: int
    cpus_per_node: int
    proctrack: str

    @property
    def environment(self) -> dict[str, str]:
        """The variables that Slurm's client programs need."""
        return {"SLURM_CONF": str(self.directory / "slurm.conf")}


def hosts(cluster: LocalCluster) -> str:
    """Return the nodes' hosts file: the machine's own, and the names of the nodes."""
    return Path("/etc/hosts").read_text() + f"\n{LOOPBACK} {CONTROLLER} {' '.join(cluster.nodes)}\n"


def user() -> str:
    """Return the name of this user. Raises SlurmError if passwd has none."""
    try:
        return pwd.getpwuid(os.geteuid()).pw_name
    except KeyError:
        raise SlurmError(f"user {os.geteuid()} has no name in passwd; Slurm needs one") from None


def machine() -> str:
    """Return this machine's short host name, which Slurm compares with NodeHostname."""
    return socket.gethostname().partition(".")[0]


def slurm_conf(cluster: LocalCluster) -> str:
    """Return slurm.conf for clients and slurmctld."""
    directory, gpus = cluster.directory, cluster.gpus_per_node
    host = CONTROLLER if cluster.own_hosts else machine()
    # NoCtldInAddrAny: listen on the address of the host's name only. That is loopback for CONTROLLER; the machine's own
    # name can have any address.
    binding = "CommunicationParameters=NoCtldInAddrAny\n" if cluster.own_hosts else ""
    gres = f" Gres=gpu:{gpus}" if gpus else ""
    storage = "none"
    if cluster.accounting:
        storage = f"""slurmdbd
AccountingStorageHost={LOOPBACK}
AccountingStoragePort={cluster.port + 1}
AccountingStoragePass={directory}/run/munge.sock
AccountingStorageTRES=gres/gpu"""
    nodes = "\n".join(
        f"NodeName={name} NodeHostname={name if cluster.own_hosts else host} NodeAddr={LOOPBACK} Port={port}"
        for port, name in enumerate(cluster.nodes, cluster.port + 2)
    )
    # cred_expire: a requeued job waits that long before it starts again; 5 s is the minimum.
    # FirstJobId: a run directory that a former cluster's job wrote must not seem to belong to a job of this one.
    return f"""ClusterName=local
SlurmctldHost={host}({LOOPBACK})
SlurmctldPort={cluster.port}
SlurmUser={user()}
SlurmdUser={user()}
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={directory}/run/munge.sock,cred_expire=5
{binding}StateSaveLocation={directory}/state
SlurmdSpoolDir={directory}/%n
SlurmctldPidFile={directory}/run/slurmctld.pid
SlurmdPidFile={directory}/run/%n.pid
SlurmctldLogFile={directory}/log/slurmctld.log
SlurmdLogFile={directory}/log/%n.log
FirstJobId={int(time.time()) % 1_000_000 + 1}
ProctrackType=proctrack/{cluster.proctrack}
AccountingStorageType=accounting_storage/{storage}
NodeName=DEFAULT CPUs={cluster.cpus_per_node} Boards=1 SocketsPerBoard=1 CoresPerSocket={cluster.cpus_per_node} \
ThreadsPerCore=1 RealMemory=4000000{gres} State=UNKNOWN
{nodes}
{_COMMON}"""


def slurmd_conf(cluster: LocalCluster) -> str:
    """Return slurm.conf for slurmd and its job steps, which listen on the address of their host's name: loopback.

    NoInAddrAny cannot be in the clients' file: an srun outside the nodes would then listen on the address of the
    machine's name, while the nodes connect to loopback.
    """
    binding = "CommunicationParameters=NoInAddrAny\n" if cluster.own_hosts else ""
    return f"Include {cluster.directory}/slurm.conf\n{binding}"


def gres_conf(cluster: LocalCluster) -> str:
    """Return gres.conf. A simulated GPU is a link to /dev/null, as Slurm accepts only device files."""
    if not cluster.gpus_per_node:
        return ""
    return f"Name=gpu File={cluster.directory}/dev/nvidia[0-{cluster.gpus_per_node - 1}]\n"


def slurmdbd_conf(cluster: LocalCluster) -> str:
    """Return slurmdbd.conf. It has no key for the database's socket: start_accounting sets MYSQL_UNIX_PORT."""
    binding = "CommunicationParameters=NoInAddrAny\n" if cluster.own_hosts else ""
    return f"""{binding}AuthType=auth/munge
AuthInfo=socket={cluster.directory}/run/munge.sock
DbdHost={CONTROLLER if cluster.own_hosts else machine()}
DbdAddr={LOOPBACK}
DbdPort={cluster.port + 1}
SlurmUser={user()}
StorageType=accounting_storage/mysql
StorageHost=localhost
StorageUser={user()}
StorageLoc=slurm
PidFile={cluster.directory}/run/slurmdbd.pid
LogFile={cluster.directory}/log/slurmdbd.log
"""
