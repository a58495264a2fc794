"""What a private Slurm is, and the texts that tell its daemons (man slurm.conf, gres.conf, slurmdbd.conf)."""

import os
import pwd
import socket
import time
from dataclasses import dataclass
from pathlib import Path

from slurm.errors import SlurmError

CONTROLLER = "controller"  # the host name of slurmctld and slurmdbd, where they have one of their own
LOOPBACK = "127.0.0.1"
# In every slurm.conf. Times are as short as Slurm allows: SlurmdTimeout is how long a node may be silent before it is
# down, KillWait how long a job may take to end. config_overrides: nodes may have more than the machine.
_ALWAYS = """\
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
    """A cluster in a private directory. `own_hosts`: whether nodes have host names and process ids of their own.

    Its daemons listen at `port` and those after it, on loopback: slurmctld, slurmdbd, and a slurmd for each node.
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
        """What a client must have in its environment."""
        return {"SLURM_CONF": str(self.directory / "slurm.conf")}


def hosts(cluster: LocalCluster) -> str:
    """The hosts file of the nodes: the machine's names, then theirs."""
    return Path("/etc/hosts").read_text() + f"\n{LOOPBACK} {CONTROLLER} {' '.join(cluster.nodes)}\n"


def user() -> str:
    """The name of the user whom everything belongs to. Raises SlurmError if there is none."""
    try:
        return pwd.getpwuid(os.geteuid()).pw_name
    except KeyError:
        raise SlurmError(f"user {os.geteuid()} has no name in passwd; Slurm needs one") from None


def machine() -> str:
    """This machine's name, as Slurm asks for it."""
    return socket.gethostname().partition(".")[0]


def slurm_conf(cluster: LocalCluster) -> str:
    """slurm.conf for clients and slurmctld.

    cred_expire (5 s is the least) is how long a job that was requeued is held back; FirstJobId keeps a job of the last
    cluster from being taken for one of this.
    """
    directory, gpus = cluster.directory, cluster.gpus_per_node
    host = CONTROLLER if cluster.own_hosts else machine()
    # slurmctld listens at the address of its host's name, which may be anywhere if the name is the machine's.
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
{_ALWAYS}"""


def slurmd_conf(cluster: LocalCluster) -> str:
    """slurm.conf for slurmd and what it starts: they listen at the address of their host's name, which is loopback.

    Outside of the nodes srun may not: it would listen at the machine's address, and be called back on loopback.
    """
    binding = "CommunicationParameters=NoInAddrAny\n" if cluster.own_hosts else ""
    return f"Include {cluster.directory}/slurm.conf\n{binding}"


def gres_conf(cluster: LocalCluster) -> str:
    """gres.conf: a pretended GPU is a link to /dev/null, as Slurm takes only device files."""
    if not cluster.gpus_per_node:
        return ""
    return f"Name=gpu File={cluster.directory}/dev/nvidia[0-{cluster.gpus_per_node - 1}]\n"


def slurmdbd_conf(cluster: LocalCluster) -> str:
    """slurmdbd.conf; which socket the database listens at is not among its keys (see start_accounting)."""
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
