"""Run Slurm's own commands on a private cluster, wait for their results, and kill its daemons as faults do."""

import os
import re
import signal
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

from slurm.sandbox.conf_files import LocalCluster
from slurm.sandbox.processes import kill, path_of, processes

T = TypeVar("T")
# A batch script that leaves a process behind, without a parent and with an empty environment.
ORPHAN = "(env -i setsid sleep {0} &); srun sleep {0}"


def ask(cluster: LocalCluster, *command: str) -> str:
    """Run a command, which must succeed, and return its output."""
    environment = {**os.environ, **cluster.environment}
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=30).stdout


def submit(cluster: LocalCluster, output: Path, script: str, *options: str) -> int:
    """Submit a shell script with sbatch, and return the job's number. Its output is appended to `output`."""
    command = ["sbatch", "--parsable", "--open-mode=append", f"--output={output}", *options, f"--wrap={script}"]
    return int(ask(cluster, *command))


def job(cluster: LocalCluster, number: int) -> dict[str, str]:
    """Return the fields that scontrol shows of a job."""
    return dict(re.findall(r"(\S+?)=(\S*)", ask(cluster, "scontrol", "--oneliner", "show", "job", str(number))))


def wait_for(condition: Callable[[], T], timeout_s: float = 30) -> T:
    """Return the first true value of `condition`. Fails after `timeout_s`."""
    deadline = time.monotonic() + timeout_s
    while not (found := condition()):
        assert time.monotonic() < deadline, f"not true within {timeout_s:g} s"
        time.sleep(0.1)
    return found


def wait_until_saved(cluster: LocalCluster, number: int) -> None:
    """Wait until slurmctld has saved its state of a job, which it does up to 5 s after a change.

    If it is killed before, it restarts with an older state: it starts the job again, sees that it runs, and drains the
    node ("Duplicate jobid on nodes").
    """
    saved = cluster.directory / "state" / "job_state"
    now = time.time()
    ask(cluster, "scontrol", "update", f"JobId={number}", "Comment=saved")  # so that there is a change
    wait_for(lambda: saved.exists() and saved.stat().st_mtime > now)


def running(cluster: LocalCluster, number: int) -> bool:
    """Return if a job runs."""
    return job(cluster, number)["JobState"] == "RUNNING"


def naming(text: str) -> list[int]:
    """Return the pids of the processes with `text` in their command line or environment."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it has ended
            if text.encode() in (path / "cmdline").read_bytes() + (path / "environ").read_bytes():
                found.append(int(path.name))
    return found


def start_slurmd(cluster: LocalCluster, node: str) -> None:
    """Start the slurmd of a node again after kill_slurmd. Return at once."""

    def wake() -> bool:
        try:
            pipe = os.open(cluster.directory / "run" / f"{node}.wake", os.O_WRONLY | os.O_NONBLOCK)
        except OSError:  # ENXIO: the node's shell does not read yet
            return False
        os.write(pipe, b"\n")
        os.close(pipe)
        return True

    wait_for(wake)


def kill_controller(cluster: LocalCluster) -> None:
    """Send SIGKILL to slurmctld."""
    kill(cluster.directory, "slurmctld")


def kill_node(cluster: LocalCluster, node: str) -> None:
    """Kill all processes of a node at once, as a power cut does."""
    kill(cluster.directory, node)


def kill_slurmd(cluster: LocalCluster, node: str) -> None:
    """Send SIGKILL to the slurmd of a node only. The node's jobs go on."""
    for pid in processes(cluster.directory, node):
        if title(pid)[:1] == [path_of("slurmd")]:
            os.kill(pid, signal.SIGKILL)


def stepds(cluster: LocalCluster, node: str, job: int) -> dict[str, int]:
    """Return the process id of the slurmstepd of each step of a job on a node, by the step's name ("batch", "0")."""
    found = {}
    for pid in processes(cluster.directory, node):
        command = title(pid)  # slurmstepd: [12.batch]
        if command[:1] == ["slurmstepd:"] and command[1].startswith(f"[{job}."):
            found[command[1].strip("[]").partition(".")[2]] = pid
    return found


def process_name(pid: int) -> str:
    """Return a process's name, of at most 15 characters; "" if it has ended."""
    try:
        return Path(f"/proc/{pid}/comm").read_text().strip()
    except OSError:
        return ""


def title(pid: int) -> list[str]:
    """Return the words of a process's command line; [] if it has ended."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_text(errors="replace").replace("\0", " ").split()
    except OSError:
        return []
