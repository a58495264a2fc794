"""Describe a private Slurm, and write its configuration files from templates/."""

import os
import pwd
import socket
import time
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined

from slurm.errors import SlurmError

CONTROLLER = "controller"  # the host name of slurmctld and slurmdbd, where nodes have host names of their own
LOOPBACK = "127.0.0.1"


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


def user() -> str:
    """Return the name of this user. Raises SlurmError if passwd has none."""
    try:
        return pwd.getpwuid(os.geteuid()).pw_name
    except KeyError:
        raise SlurmError(f"user {os.geteuid()} has no name in passwd; Slurm needs one") from None


def write_conf_files(cluster: LocalCluster) -> None:
    """Write slurm.conf, slurmd.conf, gres.conf and slurmdbd.conf into the cluster's directory."""
    templates = Environment(
        loader=PackageLoader("slurm.sandbox"), undefined=StrictUndefined, trim_blocks=True, keep_trailing_newline=True
    )
    # The machine's short host name is what Slurm compares with NodeHostname.
    host = CONTROLLER if cluster.own_hosts else socket.gethostname().partition(".")[0]
    names = {"host": host, "user": user(), "loopback": LOOPBACK, "first_job_id": int(time.time()) % 1_000_000 + 1}
    for name in templates.list_templates():
        path = cluster.directory / name
        path.touch(mode=0o600)  # slurmdbd refuses a file that others can read
        path.write_text(templates.get_template(name).render(names, cluster=cluster), encoding="utf-8")
