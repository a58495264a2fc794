"""Run the checks as a short Slurm job, submitted as `submit` submits a run. Each node writes its checks as JSON."""

import shutil
import signal
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

from fnet_dist.config.load import dump_config, read_config
from fnet_dist.config.schema import Config
from fnet_dist.config.slurm_resources import limit_s
from fnet_dist.errors import ConfigError
from fnet_dist.processes import absolute
from fnet_dist.run.run_dir import RunDir, read_json, write_json
from jobs.doctor import machine
from jobs.doctor.allreduce_check import all_reduce
from jobs.doctor.python_env import last_line, packages, python
from jobs.doctor.result import MISS, OK, WARN, Check, Reports, has_miss
from jobs.doctor.slurm_checks import slurm_on_node
from jobs.launcher.node_spec import node_spec_in_job
from jobs.launcher.workers import chosen_interface
from jobs.submission.preflight import cluster_refuses, not_shared, not_writable
from jobs.submission.sbatch import build_executor, script
from jobs.submission.submit import plan_job, submit_job
from slurm import client
from slurm.errors import SlurmError
from slurm.job_env import read_allocation
from slurm.sbatch_options import Options
from slurm.site_config import Site

NAME = "doctor"  # of the directory beside the runs that holds one directory for each job, doctor-*
REPORT = "node_{}.json"
QUEUED_S = 1800.0  # and the job's time limit
STORAGE_DELAY_S = 10.0  # for an NFS client to see what the job wrote just before its end
SAME_ON_ALL_NODES = ("Python", "torch")


def dry_run(config: Config, options: Options, site: Site, *, copied: bool) -> str:
    """Return the text that would be sent to sbatch. Writes nothing."""
    return script(build_executor(plan_job(config, options, site, RunDir(_root(config) / NAME), copied=copied)))


def check_nodes(config: Config, options: Options, site: Site, *, copied: bool) -> Reports:
    """Submit the job, wait for it, and return each node's checks by the node's name, in the order of the nodes.

    Raises ConfigError, before anything is written, if the job cannot run; SlurmError if sbatch refuses it.
    """
    root = _root(config)
    lacking = cluster_refuses(config, options, dry_run(config, options, site, copied=copied))
    if refusal := lacking or not_writable(root) or not_shared(root, site.run_root):
        raise ConfigError(refusal)
    root.mkdir(parents=True, exist_ok=True)
    # A name of its own: two doctors may run at once.
    folder = RunDir(Path(tempfile.mkdtemp(prefix=f"{NAME}-", dir=root)))
    reports: Reports = {}
    try:
        # Absolute: nodes start in the snapshot, not here.
        run = config.run.model_copy(update={"root": str(root.parent)})
        write_json(folder.config, dump_config(config.model_copy(update={"run": run})))
        job = plan_job(config, options, site, folder, copied=copied)
        [sent] = submit_job(build_executor(job), job, config.recipe, check_this_node, [str(folder.path)])
        reports = _collect(folder, sent.job_id, config)
    finally:
        if has_miss(reports):
            print(f"the output of the nodes is in {folder.submitit}", file=sys.stderr)
        else:
            shutil.rmtree(folder.path, ignore_errors=True)
    return reports


def check_this_node(path: str) -> None:
    """Check this node, as its task of the job: write its checks to a file, and take part in the all-reduce."""
    # The submission blocks these signals for a run that saves a checkpoint. Here scancel may end the task at once.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
    folder, allocation = RunDir(Path(path)), read_allocation()
    if allocation is None:
        raise ConfigError("this is not a task of a Slurm job; run `fnet doctor --cluster`")
    config = read_config(folder.config)
    sizes = config.resources
    checks = [
        python(),
        packages(),
        *machine.check_machine(config, sizes.gpus_per_node)[0],
        machine.bindings(allocation, sizes.cpus_per_rank * sizes.ranks_per_node),
        slurm_on_node(),
        machine.node_names(client.host_names(allocation.node_list)),
    ]
    file, node = folder.path / REPORT.format(allocation.node_rank), allocation.node_name
    # Before the all-reduce too: ranks that hang may use up the job's time limit.
    write_json(file, {"node": node, "checks": [*map(asdict, checks)], "all": False})
    node_spec = node_spec_in_job(allocation, sizes.ranks_per_node, sizes.warning_s, chosen_interface(), None)
    checks += all_reduce(node_spec, folder.path)
    write_json(file, {"node": node, "checks": [*map(asdict, checks)], "all": True})


def differences(reports: Reports) -> Reports:
    """Return the reports, with a warning added on every node for each of SAME_ON_ALL_NODES that differs."""
    marked = {node: [*checks] for node, checks in reports.items()}
    for name in SAME_ON_ALL_NODES:
        good = {node: check for node, checks in reports.items() for check in checks if check.name == name}
        good = {node: check for node, check in good.items() if check.verdict == OK}
        if len({*good.values()}) > 1:
            for node, check in good.items():
                fix = "one environment for all nodes, on a disk that they share"
                marked[node].append(Check(f"same {name}", WARN, check.found, fix))
    return marked


def _root(config: Config) -> Path:
    return absolute(Path(config.run.root).expanduser()) / NAME


def _collect(folder: RunDir, job_id: str, config: Config) -> Reports:
    """Wait for the job and return what each node wrote, with a MISS where a node did not finish.

    Any exception while it waits, Ctrl-C too, cancels the job.
    """
    try:
        names = _wait_for_end(job_id, limit_s(config.resources.time))
    except BaseException:  # KeyboardInterrupt too: nothing would wait for the job
        client.cancel(job_id)
        print(f"job {job_id} is cancelled", file=sys.stderr)
        raise
    paths = [folder.path / REPORT.format(rank) for rank in range(config.resources.nodes)]
    deadline = time.monotonic() + STORAGE_DELAY_S
    while not {*paths} <= {*folder.path.iterdir()} and time.monotonic() < deadline:
        time.sleep(1.0)
    reports = {}
    for rank, path in enumerate(paths):
        name = names[rank] if rank < len(names) else f"node {rank} of the job"
        written = read_json(path) or {"node": name, "checks": [], "all": False}
        unfinished = [] if written["all"] else [_unfinished(folder, job_id, rank)]
        reports[written["node"]] = [*(Check(**check) for check in written["checks"]), *unfinished]
    return differences(reports)


def _unfinished(folder: RunDir, job_id: str, rank: int) -> Check:
    """Return the check for a node that did not finish: the job's state, and the last line of the node's log."""
    try:
        state = client.state_of(job_id)
        job = "is forgotten by Slurm" if state is None else f"ended as {state}"
    except SlurmError as error:
        job = f"ended ({error})"
    log = next(iter(folder.submitit.glob(f"*_{rank}_log.out")), None)
    printed = "nothing printed" if log is None else last_line(log.read_text(errors="replace"), 0)
    return Check("job", MISS, f"job {job_id} {job}, this node did not finish: {printed}", "its log; or a longer -t")


def _wait_for_end(job_id: str, limit: int) -> tuple[str, ...]:
    """Wait until the job has left the queue, printing each change of its state. Return its nodes' names, if it had any.

    Raises SlurmError if the job is still there after QUEUED_S and its time limit.
    """
    deadline, printed, names = time.monotonic() + QUEUED_S + limit, "", tuple[str, ...]()
    while time.monotonic() < deadline:
        try:
            if not (jobs := client.queue([job_id])):
                return names
            names = jobs[0].nodes or names
            place = f"on {jobs[0].node_list}" if jobs[0].nodes else f"({jobs[0].reason or 'no reason given'})"
            status = f"job {job_id} is {jobs[0].state.lower()} {place}"
        except SlurmError as error:
            status = str(error)  # slurmctld may be away for a while
        if status != printed:
            print(status, file=sys.stderr)
            printed = status
        time.sleep(1.0)
    raise SlurmError(f"{status}, for too long now; ask for less, or another --partition")
