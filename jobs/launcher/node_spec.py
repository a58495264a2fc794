"""The part of a run that this node trains: the number of its ranks and, in a Slurm job, its place in the job."""

import socket
from collections.abc import Callable
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path

from fnet_dist.errors import ConfigError, FnetError
from jobs.launcher.time_limit import TimeLimit, read_end
from slurm import client
from slurm.errors import SlurmError
from slurm.job_env import Allocation


@dataclass(frozen=True)
class NodeSpec:
    """This node's part of a run: it is number `node_rank`, counted from 0, of `nnodes`.

    `allocation` is set in a Slurm job. `interface` is the network interface between nodes, if one was chosen; else node
    0 takes the one that leads to `peer`, another node's address, and has the job's `time_limit`. `code` is the snapshot
    that runs, if it is one. `notify` is the site's command for notices, as words. Node 0 of a Slurm job knows the names
    of all `nodes`, in their order. `ask_slurm` takes the place of requeue.ask_slurm in a run that shares its task with
    others.
    """

    nnodes: int
    node_rank: int
    nproc_per_node: int
    allocation: Allocation | None = None
    interface: str | None = None
    peer: str | None = None
    time_limit: TimeLimit | None = None
    code: Path | None = None
    notify: tuple[str, ...] = ()
    nodes: tuple[str, ...] = ()
    ask_slurm: Callable[[str], str | None] | None = None

    @property
    def world_size(self) -> int:
        """The number of all ranks."""
        return self.nnodes * self.nproc_per_node

    @property
    def process(self) -> str:
        """This node's launcher in the log."""
        return f"launcher {self.node_rank}/{self.nnodes}"

    def node_of(self, rank: int) -> str | None:
        """Return the name of the node that runs `rank`; None if names are not known."""
        return self.nodes[rank // self.nproc_per_node] if self.nodes else None

    @property
    def ranks(self) -> range:
        """This node's ranks."""
        return range(self.node_rank * self.nproc_per_node, (self.node_rank + 1) * self.nproc_per_node)


def node_spec_in_job(
    allocation: Allocation, nproc: int, signal_s: float, interface: str | None, code: Path | None
) -> NodeSpec:
    """Return this node's part of a Slurm job with one task a node.

    Raises ConfigError for several tasks on a node, FnetError if node 0 finds no address of node 1, SlurmError if Slurm
    does not know its own nodes.
    """
    if allocation.ntasks != allocation.nnodes:
        raise ConfigError(
            f"srun started {allocation.ntasks} tasks on {allocation.nnodes} nodes, expected one on each, which starts "
            "the ranks: srun --ntasks-per-node=1, and --nproc-per-node for the ranks"
        )
    peer = time_limit = None
    nodes: tuple[str, ...] = ()
    if allocation.node_rank == 0:
        with suppress(SlurmError) if interface is not None else nullcontext():  # a container may have no scontrol
            nodes = client.host_names(allocation.node_list)
        with suppress(SlurmError):  # slurmctld may be away for a while: then the warning signal has to do
            time_limit = TimeLimit(allocation.raw_job_id, signal_s / 2, read_end(allocation.raw_job_id))
        if allocation.nnodes > 1 and interface is None:
            peer = address_of_node(nodes[1])
    where = (allocation.nnodes, allocation.node_rank, nproc, allocation)
    return NodeSpec(*where, interface, peer, time_limit, code, nodes=nodes)


def address_of_node(name: str) -> str:
    """Return a node's IPv4 address: its name's, else NodeAddr's of slurm.conf. Raises FnetError if none is known."""
    with suppress(OSError):
        return socket.gethostbyname(name)
    try:
        return socket.gethostbyname(client.node_address(name) or name)
    except OSError as error:
        raise FnetError(
            f"{socket.gethostname()} cannot resolve {name}: {error.strerror or error}; ask the site, or name the "
            "network that nodes share: `interface` in slurm/site.toml"
        ) from None
