"""The checks as a short Slurm job, sent as `submit` sends a run: one task a node, each writes what it finds as JSON."""

import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import chdir, contextmanager
from dataclasses import asdict
from pathlib import Path

import submitit
from submitit.core.utils import FailedJobError, FailedSubmissionError

from fnet_dist.config.help import one_line
from fnet_dist.config.load import dump_config, read_config
from fnet_dist.config.schema import Config
from fnet_dist.config.slurm_resources import limit_s
from fnet_dist.errors import ConfigError
from fnet_dist.run.run_dir import RunDir, read_json, write_json
from jobs.doctor import machine
from jobs.doctor.allreduce_check import all_reduce
from jobs.doctor.python_env import ROOT, ask_torch, last_words, packages, python, torch
from jobs.doctor.result import MISS, OK, WARN, Check, Reports
from jobs.doctor.slurm_checks import ask_slurm, controller
from jobs.launcher.node_spec import NodeSpec, Topology, node_spec_in_job
from jobs.launcher.workers import chosen_interface
from jobs.submission.preflight import cluster_lacks, not_shared, not_writable
from jobs.submission.sbatch import Job, build_executor, script
from jobs.submission.snapshot import code_files, digest_of, take_snapshot
from slurm import client
from slurm.errors import SlurmError
from slurm.job_env import read_allocation
from slurm.sbatch_options import Options
from slurm.site_config import Site
from slurm.submit_env import submission_environment
from slurm.types import QueuedJob

PLACE = "doctor"  # beside the runs: a directory for each job of checks, which goes where all is well
QUEUED_S = 1800.0
LATE_S = 10.0  # for a shared disk to show what a job wrote that has ended
LOOK_EVERY_S = 1.0
ALIKE = ("Python", "torch")  # what must not differ between nodes


def script_of(config: Config, options: Options, site: Site, *, copied: bool) -> str:
    """The text that would be sent to sbatch. Writes nothing."""
    return script(build_executor(_job(RunDir(_root(config) / "check"), config, options, site, copied)))


def check_nodes(config: Config, options: Options, site: Site, *, copied: bool) -> Reports:
    """Each node's checks, by its name, in the nodes' order.

    Raises ConfigError or SlurmError, before anything is written, where no such job can be sent.
    """
    root = _root(config)
    for wrong in (
        cluster_lacks(config, options, client.partitions()),
        not_writable(root),
        not_shared(root, site.run_root),
    ):
        if wrong is not None:
            raise ConfigError(wrong)
    root.mkdir(parents=True, exist_ok=True)
    place = RunDir(Path(tempfile.mkdtemp(prefix="check-", dir=root)))
    try:
        at = config.run.model_copy(update={"root": str(root.parent)})  # nodes start elsewhere
        write_json(place.config, dump_config(config.model_copy(update={"run": at})))
        job = _job(place, config, options, site, copied)
        if copied:
            take_snapshot(ROOT, place.code)
        reports = _collect(place, _send(job, place), config.resources.nodes, limit_s(config.resources.time))
    except BaseException:
        shutil.rmtree(place.path, ignore_errors=True)
        raise
    if any(check.verdict == MISS for checks in reports.values() for check in checks):
        print(f"what the nodes printed is in {place.submitit}", file=sys.stderr)
    else:
        shutil.rmtree(place.path, ignore_errors=True)
    return reports


def _root(config: Config) -> Path:
    return Path(config.run.root).expanduser().absolute() / PLACE


def _job(place: RunDir, config: Config, options: Options, site: Site, copied: bool) -> Job:
    code = place.code / digest_of(ROOT, code_files(ROOT)) if copied else ROOT
    return Job(PLACE, config.resources, options, site.setup, site.interface, code, place.submitit)


def _send(job: Job, place: RunDir) -> str:
    """Submit the checks; the job's id."""
    try:
        with submission_environment(job.options), chdir(job.code):
            sent: submitit.Job[None] = build_executor(job).submit(check_this_node, str(place.path))
    except (FailedJobError, FailedSubmissionError) as error:
        raise SlurmError(one_line(f"sbatch refused: {error}")) from None
    return str(sent.job_id)


def check_this_node(place: str) -> None:
    """What the job runs on each node: its checks into a file of its own, and its part of the all-reduce."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # there is nothing to save
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
    run, allocation = RunDir(Path(place)), read_allocation()
    if allocation is None:
        raise ConfigError("this is no task of a Slurm job; run `python -m jobs doctor --cluster`")
    config, asked_slurm, answer = read_config(run.config), ask_slurm(), ask_torch()
    sizes = config.resources
    checks = [
        python(),
        packages(),
        torch(answer),
        *machine.devices(answer, sizes.gpus_per_node),
        machine.bindings(allocation, sizes.cpus_per_rank * sizes.ranks_per_node),
        machine.data(config),
        machine.disk(Path(config.run.root).expanduser()),
        machine.wandb(config),
        asked_slurm if isinstance(asked_slurm, Check) else controller(asked_slurm),
        machine.node_names(client.host_names(allocation.node_list)),
    ]
    found = {"node": allocation.node_name, "checks": [*map(asdict, checks)], "all": False}
    write_json(_report(run, allocation.node_rank), found)  # ranks that hang may take the job's time
    node_spec = node_spec_in_job(allocation, sizes.ranks_per_node, sizes.signal_s, chosen_interface(), None)
    if node_spec.sizes.world_size > 1:
        checks += all_reduce(node_spec, run.path)
    else:
        checks += all_reduce(NodeSpec(Topology(1, 0, 2)), run.path, "cpu")
    write_json(_report(run, allocation.node_rank), {**found, "checks": [*map(asdict, checks)], "all": True})


def _report(place: RunDir, node_rank: int) -> Path:
    return place.path / f"node_{node_rank}.json"


def _collect(place: RunDir, job_id: str, nodes: int, limit: int) -> Reports:
    """Wait until the job has left the queue; what each node wrote, and of those that wrote nothing, what is known.

    Whatever ends the wait before ends the job.
    """
    names: tuple[str, ...] = ()
    with _cancelled_if_left(job_id):
        for job in _watch(job_id, QUEUED_S, limit):
            names = job.nodes or names
    deadline = time.monotonic() + LATE_S
    wanted = [_report(place, rank) for rank in range(nodes)]
    while not {*wanted} <= {*place.path.iterdir()} and time.monotonic() < deadline:
        time.sleep(LOOK_EVERY_S)
    reports: dict[str, Sequence[Check]] = {}
    for rank, path in enumerate(wanted):
        name = names[rank] if rank < len(names) else f"node {rank} of the job"
        written = read_json(path) or {"node": name, "checks": [], "all": False}
        checks = [Check(**check) for check in written["checks"]]
        reports[written["node"]] = checks if written["all"] else [*checks, _cut_off(place, job_id, rank)]
    return differences(reports)


def differences(reports: Reports) -> Reports:
    """The reports, with a warning on every node of what should be alike and is not."""
    marked = {node: [*checks] for node, checks in reports.items()}
    for name in ALIKE:
        found = {
            node: check.found
            for node, checks in reports.items()
            for check in checks
            if (check.name, check.verdict) == (name, OK)
        }
        if len({*found.values()}) > 1:
            for node, text in found.items():
                fix = "one environment for all nodes, on a disk that they share"
                marked[node].append(Check(f"same {name}", WARN, text, fix))
    return marked


def _cut_off(place: RunDir, job_id: str, rank: int) -> Check:
    """What is known of a node that has not told all."""
    try:
        state = client.state_of(job_id)
        how = "is forgotten" if state is None else f"ended as {state}"
    except SlurmError as error:
        how = f"ended ({error})"
    log = next(iter(place.submitit.glob(f"*_{rank}_log.out")), None)
    said = "printed nothing" if log is None else last_words(log.read_text(errors="replace"), 0)
    return Check("job", MISS, f"job {job_id} {how}, and this node has not told all: {said}", "its log; or a longer -t")


@contextmanager
def _cancelled_if_left(job_id: str) -> Iterator[None]:
    try:
        yield
    except BaseException:
        client.cancel(job_id)
        print(f"job {job_id} is cancelled", file=sys.stderr)
        raise


def _watch(job_id: str, queued_s: float, limit: int) -> Iterator[QueuedJob]:
    """The job, again and again while it is in the queue; where it stands is told when that changes.

    Raises SlurmError where it waits longer than `queued_s`, runs longer than its limit and two minutes, or Slurm does
    not answer that long.
    """
    began, started, told = time.monotonic(), 0.0, ""
    while True:
        try:
            job = next(iter(client.queue([job_id])), None)
        except SlurmError as error:
            words = str(error)
        else:
            if job is None:
                return
            yield job
            where = f"on {job.node_list}" if job.nodes else f"({job.reason or 'no reason given'})"
            words = f"job {job_id} is {job.state.lower()} {where}"
            if job.nodes and not started:
                started = time.monotonic()
        if words != told:
            print(words, file=sys.stderr)
            told = words
        waited = time.monotonic() - (started or began)
        if waited > (limit + 120 if started else queued_s):
            raise SlurmError(f"{words}, for {waited:,.0f} s now; ask for less, or another --partition")
        time.sleep(LOOK_EVERY_S)
