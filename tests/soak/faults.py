"""Faults that apply_to runs on a private Slurm at random moments, and what is promised to come of each."""

import os
import random
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from fnet_dist.run.run_dir import RunDir
from jobs.verification.compare_runs import gaps, run_differences
from jobs.verification.supervised_run import SupervisedRunError, wait_until
from jobs.verification.supervised_slurm_run import SupervisedSlurmRun, preempt
from slurm import client
from slurm.errors import SlurmError
from slurm.sandbox.conf_files import LocalCluster
from slurm.sandbox.daemons import start_controller, start_node
from slurm.sandbox.processes import processes
from slurm.submit_env import changed
from slurm.types import TERMINAL_STATES, ShownJob
from tests.helpers.slurm_commands import (
    ask,
    kill_controller,
    kill_node,
    kill_slurmd,
    naming,
    start_slurmd,
    stepds,
    title,
    wait_for,
)
from tests.helpers.submitted_runs import JOB, ranks_on, submit
from tests.soak.repairs import administer, heal

# A real limit of a minute. Slurm looks every 30 s, and warns when its next look would come too late: 29 to 59 s after
# the start. 6,000 steps need more than that, and less than two allocations.
SHORT_TIME = ("--resources.time", "1", "--resources.signal-s", "1")
LONG_JOB = ["6000" if word == "480" else word for word in JOB]


@dataclass(frozen=True)
class Case:
    """A run on a cluster, and the chance that decides when and where it is struck."""

    cluster: LocalCluster
    supervised: SupervisedSlurmRun
    rng: random.Random

    def node(self) -> str:
        """One of the job's nodes."""
        return self.rng.choice(client.host_names(self.supervised.job().node_list))

    def pause(self, most_s: float) -> float:
        """Let up to `most_s` seconds pass; how many."""
        seconds = self.rng.uniform(0, most_s)
        time.sleep(seconds)
        return seconds


@dataclass(frozen=True)
class Fault:
    """`apply_to` makes it, repairs what it broke of the cluster and says where it was.

    `restarts`: requeues that it is to cost; `fails`: the job is to end FAILED, and the same submit goes on; `forgets`:
    slurmctld comes back with what it knew up to 5 s before, and an administrator may have to help; `early_s` and
    `steps`: the most that the job runs before.
    """

    promise: str
    apply_to: Callable[[Case], str]
    restarts: int
    options: tuple[str, ...] = ()
    job: list[str] = field(default_factory=lambda: JOB)
    fails: bool = False
    forgets: bool = False
    early_s: float = 6.0
    steps: int = 440


@dataclass(frozen=True)
class Seen:
    """The result of a case; `wrong` is empty if every promise held."""

    story: str
    wrong: list[str]
    is_late: bool


def warn(case: Case) -> str:
    client.signal_job(case.supervised.job_id, "USR2")
    return ""


def requeue(case: Case) -> str:
    ask(case.cluster, "scontrol", "requeue", case.supervised.job_id)
    return ""


def reach_the_limit(case: Case) -> str:
    """As often as this machine needs it."""
    wait_for(lambda: case.supervised.job().state in TERMINAL_STATES, 600)
    return ""


def come_first(case: Case) -> str:
    preempt(case.supervised.run.path.with_name(f"{case.supervised.run.name}-above"), len(case.cluster.nodes))
    return ""


def kill_rank(case: Case) -> str:
    node = case.node()
    return _kill(wait_for(lambda: ranks_on(case.cluster, node, case.supervised.run))[0], node)


def kill_launcher(case: Case) -> str:
    node = case.node()
    return _kill(wait_for(lambda: _launchers(case.cluster, node, case.supervised.run))[0], node)


def lose_slurmd(case: Case) -> str:
    """For less than SlurmdTimeout."""
    node = case.node()
    kill_slurmd(case.cluster, node)
    away_s = case.pause(3)
    start_slurmd(case.cluster, node)
    return f"{node}, for {away_s:.1f} s"


def kill_stepd(case: Case) -> str:
    node = case.node()
    return _kill(wait_for(lambda: _stepd(case, node, "0")), node)


def kill_stepd_of_script(case: Case) -> str:
    node = next(iter(client.host_names(case.supervised.job().node_list)), "")
    return _kill(wait_for(lambda: _stepd(case, node, "batch")), node)


def lose_both_daemons(case: Case) -> str:
    """Until Slurm has given the node up."""
    node = case.node()
    wait_for(lambda: _stepd(case, node, "0"))
    kill_slurmd(case.cluster, node)
    for pid in stepds(case.cluster, node, int(case.supervised.job_id)).values():
        os.kill(pid, signal.SIGKILL)
    _wait_for_a_requeue(case)
    start_slurmd(case.cluster, node)
    return node


def lose_node(case: Case) -> str:
    node = case.node()
    kill_node(case.cluster, node)
    _wait_for_a_requeue(case)
    start_node(case.cluster, node)
    return node


def lose_controller(case: Case) -> str:
    kill_controller(case.cluster)
    away_s = case.pause(8)
    start_controller(case.cluster)
    return f"for {away_s:.1f} s"


def lose_controller_at_requeue(case: Case) -> str:
    """From the moment on at which node 0 asks for another allocation."""
    client.signal_job(case.supervised.job_id, "USR2")
    wait_until(case.supervised.run.attempt(1).joinpath("end.json").exists, "the end of attempt 1")
    after_s = case.pause(case.rng.choice([0, 0.3, 5]))
    return f"{after_s:.1f} s after the save, {lose_controller(case)}"


FAULTS = {
    "warning": Fault("scancel --signal=USR2: 1 requeue of ours", warn, 1),
    "requeue": Fault("scontrol requeue: 1 of Slurm's", requeue, 1),
    "limit": Fault(
        "a real time limit of 1 minute: a requeue of ours for each allocation that was too short",
        reach_the_limit, 1, SHORT_TIME, LONG_JOB, early_s=0, steps=0,
    ),
    "preemption": Fault("a job of a higher partition, PreemptMode=REQUEUE: 1 of Slurm's", come_first, 1, ("-p", "low")),
    "grace": Fault("the same with GraceTime=15: 1 of Slurm's", come_first, 1, ("-p", "grace")),
    "rank": Fault("kill -9 of a rank: restarted in the allocation", kill_rank, 0),
    "launcher": Fault(
        "kill -9 of a node's launcher: FAILED, and the same submit goes on", kill_launcher, 0, fails=True
    ),
    "slurmd": Fault("kill -9 of slurmd, back within 3 s: no requeue", lose_slurmd, 0),
    "stepd": Fault(
        "kill -9 of a step's slurmstepd: FAILED, and the same submit goes on", kill_stepd, 0, fails=True
    ),
    "script": Fault(
        "kill -9 of the script's slurmstepd: the run goes on, 1 of Slurm's once it sees that the script has gone",
        kill_stepd_of_script, 1,
    ),
    "daemons": Fault("kill -9 of slurmd and slurmstepd of a node: 1 of Slurm's", lose_both_daemons, 1),
    "node": Fault("a node killed with all that runs on it: 1 of Slurm's", lose_node, 1),
    "controller": Fault("kill -9 of slurmctld, back within 8 s: no requeue", lose_controller, 0, forgets=True),
    "at requeue": Fault(
        "kill -9 of slurmctld as the run asks for its requeue: 1 of ours", lose_controller_at_requeue, 1, forgets=True
    ),
}  # fmt: skip


def apply_to(cluster: LocalCluster, name: str, undisturbed: RunDir, place: Path, seed: int) -> Seen:
    """One run, struck once at a random moment; what came of it. The cluster is well again afterwards."""
    fault, rng, run, began = FAULTS[name], random.Random(seed), RunDir(place), time.monotonic()
    with changed(cluster.environment):
        supervised = submit(run, *fault.options, job=fault.job)
        when, wrong, late, helped = "?", list[str](), False, ""
        try:
            wait_for(lambda: supervised.job().state != "PENDING")
            when, struck, failed = _random_moment(fault, rng, supervised), time.time(), ""
            try:
                when += f", {where}" if (where := fault.apply_to(Case(cluster, supervised, rng))) else ""
            except (AssertionError, SlurmError, SupervisedRunError) as error:
                failed = f"not struck: {error}"
            if fault.forgets:
                supervised, helped = administer(cluster, supervised, lambda: submit(run, *fault.options, job=fault.job))
                when += f", {helped}" if helped else ""
            first = supervised.wait_for_end()
            late = _is_late(supervised, struck)
            wrong += [failed] if failed and not late else []
            wrong += _promised(fault, supervised, first, undisturbed, late or bool(helped))
        except (AssertionError, SlurmError, SupervisedRunError) as error:
            wrong.append(f"{type(error).__name__}: {error}")
        wrong += heal(cluster, supervised)
        ends = ", ".join(str(end) for end in supervised.ends())
        job = client.show_job(supervised.job_id)
    took = time.monotonic() - began
    story = f"{when}: {job and job.state}, {job and job.restarts} requeues, attempts: {ends or 'none'}; {took:.0f} s"
    return Seen(story, wrong, late)


def _promised(
    fault: Fault, supervised: SupervisedSlurmRun, ended: ShownJob, undisturbed: RunDir, excused: bool
) -> list[str]:
    """Return what is not as promised. The number of requeues is not checked where the run had finished before the fault
    or an administrator helped."""
    wrong = list[str]()
    if fault.fails and not excused:
        if (ended.state, ended.restarts) != ("FAILED", 0):
            wrong.append(f"{ended.state} after {ended.restarts} requeues")
        if supervised.ends()[-1:] != ["finished"]:
            ended = submit(supervised.run, *fault.options, job=fault.job).wait_for_end()
    expected = max(1, len(supervised.ends()) - 1) if fault.options == SHORT_TIME else fault.restarts
    if ended.state != "COMPLETED":
        wrong.append(f"{ended.state} ({ended.reason}, exit code {ended.exit_code})")
    if ended.restarts != expected and not excused:
        wrong.append(f"{ended.restarts} requeues, expected {expected}")
    wrong += [*run_differences(undisturbed, supervised.run), *gaps(supervised.run)]
    try:
        wait_for(lambda: naming(str(supervised.run.path)) == [])
    except AssertionError:
        wrong.append(f"orphans: {[' '.join(title(pid)) for pid in naming(str(supervised.run.path))]}")
    return wrong


def _is_late(supervised: SupervisedSlurmRun, struck: float) -> bool:
    """Return whether the run had finished, or was about to, at the fault (Unix time): then the fault had no effect."""
    job, ends = supervised.job(), supervised.ends()
    undisturbed = (job.state, job.restarts, ends) == ("COMPLETED", 0, ["finished"])
    return undisturbed and supervised.end_of(1)["time"] < struck + 2


def _random_moment(fault: Fault, rng: random.Random, supervised: SupervisedSlurmRun) -> str:
    """Let the job go on to a moment of its first seconds, or to any step; in words."""
    if fault.steps == 0:
        return "at Slurm's time"
    if rng.random() < 0.3:
        seconds = rng.uniform(0, fault.early_s)
        time.sleep(seconds)
        return f"{seconds:.1f} s after its start"
    step = rng.randrange(1, fault.steps)
    with suppress(SupervisedRunError):
        supervised.wait_for_step(step)
    return f"at step {supervised.step()}"


def _wait_for_a_requeue(case: Case) -> None:
    wait_for(lambda: case.supervised.job().restarts == 1 or case.supervised.job().state in TERMINAL_STATES, 60)


def _launchers(cluster: LocalCluster, node: str, run: RunDir) -> list[int]:
    """The process of the node's task, by its words: srun and the script's shell have them too."""
    mine = f"submitit.core._submit {run.submitit}"
    return [
        pid
        for pid in processes(cluster.directory, node)
        if mine in (words := " ".join(title(pid))) and "srun" not in words and "python" in words.split()[0]
    ]


def _kill(pid: int, node: str) -> str:
    os.kill(pid, signal.SIGKILL)
    return node


def _stepd(case: Case, node: str, step: str) -> int | None:
    return stepds(case.cluster, node, int(case.supervised.job_id)).get(step)
