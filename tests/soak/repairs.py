"""Repair a private Slurm and its job after a fault, as a person would, and clean up between two cases."""

import time
from collections.abc import Callable
from contextlib import suppress

from jobs.verification.supervised_run import TIMEOUT_S, SupervisedRunError
from jobs.verification.supervised_slurm_run import SupervisedSlurmRun
from slurm import client
from slurm.errors import SlurmError
from slurm.sandbox.conf_files import LocalCluster
from slurm.sandbox.daemons import node_states
from slurm.types import TERMINAL_STATES
from tests.helpers.slurm_commands import ask, naming, stepds, wait_for

FORGOTTEN_S = 40.0  # longer than slurmctld needs to miss a batch script, where it looks at all


def administer(
    cluster: LocalCluster, supervised: SupervisedSlurmRun, submit_again: Callable[[], SupervisedSlurmRun]
) -> tuple[SupervisedSlurmRun, str]:
    """Do what a person would, until the job is over: release it if slurmctld holds it back because its nodes run it
    already, requeue it if slurmctld believes that it runs and nothing of it does, submit it again if slurmctld has
    never heard of it. The job that counts in the end, and what was done, in words."""
    done, seen, place = "", time.monotonic(), str(supervised.run.path)
    began = seen
    while (job := client.show_job(supervised.job_id)) is None or job.state not in TERMINAL_STATES:
        if job is None:
            wait_for(lambda: naming(place) == [])  # slurmctld ends what it does not know
            supervised = submit_again()
            done += "forgotten and submitted again; "
            continue
        if any(stepds(cluster, node, int(supervised.job_id)) for node in cluster.nodes) or job.state != "RUNNING":
            seen = time.monotonic()
        if "held" in (job.reason or ""):
            done += f"held ({job.reason}) and released; "
            for node, state in zip(cluster.nodes, node_states(cluster), strict=False):
                if state.startswith("drain"):
                    ask(cluster, "scontrol", "update", f"NodeName={node}", "State=RESUME")
            ask(cluster, "scontrol", "release", supervised.job_id)
        elif time.monotonic() - seen > FORGOTTEN_S:
            done += f"RUNNING for {FORGOTTEN_S:.0f} s without a process, and requeued by hand; "
            ask(cluster, "scontrol", "requeue", supervised.job_id)
        if time.monotonic() - began > TIMEOUT_S:
            raise SupervisedRunError(f"{done}still {job.state} ({job.reason})")
        time.sleep(0.5)
    return supervised, done.removesuffix("; ")


def heal(cluster: LocalCluster, supervised: SupervisedSlurmRun) -> list[str]:
    """End what is left of the job, and wait until the nodes are idle; what a person had to do for that."""
    done = list[str]()
    with suppress(SlurmError, SupervisedRunError):
        if supervised.job().state not in TERMINAL_STATES:
            done.append(f"cancelled while {supervised.job().state} ({supervised.job().reason})")
            client.cancel(supervised.job_id)
    idle = ["idle"] * len(cluster.nodes)
    for _ in range(2):
        try:
            wait_for(lambda: node_states(cluster) == idle)
            break
        except AssertionError:
            for node, state in zip(cluster.nodes, node_states(cluster), strict=False):
                if state != "idle":
                    shown = ask(cluster, "scontrol", "show", "node", node)
                    reason = next((line.strip() for line in shown.splitlines() if "Reason=" in line), "no reason")
                    done.append(f"{node} was {state} ({reason}), resumed by hand")
                    with suppress(Exception):
                        ask(cluster, "scontrol", "update", f"NodeName={node}", "State=RESUME")
    return done
