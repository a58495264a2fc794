"""Bad nodes: count the failed attempts of a Slurm job on each node, and name those that the job can do without.

A failure counts on the node of the rank at fault. Only attempts of this job count: a new job begins with no list.
"""

from collections.abc import Collection, Sequence

from fnet_dist.checkpoint.storage import newest_step
from fnet_dist.config.schema import Config
from fnet_dist.errors import NonFiniteError
from fnet_dist.run.attempt import Attempt, list_attempts
from fnet_dist.run.failure import REPLAYED, AttemptFailure, read_attempt_failure
from fnet_dist.run.log import LOGGER
from fnet_dist.run.run_dir import RunDir
from slurm import client
from slurm.errors import SlurmError
from slurm.job_env import Allocation

_COUNTED = ("crash", "hang", *REPLAYED)  # not "io": all nodes share the file system


def failures_by_bad_node(
    run: RunDir, config: Config, job_id: str, last: tuple[Attempt, AttemptFailure] | None = None
) -> dict[str, list[str]]:
    """Return the nodes on which `resources.max_node_failures` attempts of the job failed, with a line for each failure.

    `last` is an attempt whose end.json is still to be written, and its failure.
    """
    attempts = [attempt for attempt in list_attempts(run) if attempt.read_begin()["slurm_job_id"] == job_id]
    failures = {attempt.number: read_attempt_failure(attempt) for attempt in attempts}
    if last is not None:
        failures[last[0].number] = last[1]
    found: dict[str, list[str]] = {}
    for number, failure in failures.items():
        if failure is None or failure.node is None or failure.reason not in _COUNTED:
            continue
        later = [each for other, each in failures.items() if other > number]
        if failure.reason == NonFiniteError.reason and not was_trained_later(run, failure, later):
            continue
        found.setdefault(failure.node, []).append(f"attempt {number}: {failure.message}")
    limit = config.resources.max_node_failures
    return {node: lines for node, lines in found.items() if limit is not None and len(lines) >= limit}


def was_trained_later(run: RunDir, failure: AttemptFailure, later: Sequence[AttemptFailure | None]) -> bool:
    """Return True if the step of `failure` was trained without an error afterwards: then the machine was the cause.

    A checkpoint says so: all ranks compare their weights before it.
    """
    seen = [newest_step(run)]
    if failure.reason == NonFiniteError.reason:
        # Losses before such a failure were finite; those before a crash may lie in a window that nobody has seen.
        for each in later:
            if each is not None and each.step is not None and each.reason in REPLAYED:
                seen.append(each.step - (each.reason == NonFiniteError.reason))
    return failure.step is not None and max(seen) >= failure.step


def excluded_nodes(allocation: Allocation, bad: Collection[str]) -> set[str]:
    """Return those of the `bad` nodes that the job excludes; where Slurm does not tell, those that it does not run on.

    Slurm is asked only if there are any.
    """
    try:
        job = client.show_job(allocation.raw_job_id) if bad else None
        return {*bad} & {*(() if job is None else client.host_names(job.excluded))}
    except SlurmError:
        return {*bad} - {*client.host_names(allocation.node_list)}


def nodes_to_exclude(allocation: Allocation, bad: Sequence[str]) -> list[str]:
    """Return the `bad` nodes that the job does not exclude yet and can do without; say why it cannot do without one."""
    found: list[str] = []
    try:
        if not bad or (job := client.show_job(allocation.raw_job_id)) is None:
            return []
        excluded, required = client.host_names(job.excluded), client.host_names(job.required)
        nodes = {node.name: node for node in client.nodes_of(job.partition)}
    except SlurmError as error:
        LOGGER.warning(f"no node is excluded: {error}")
        return []
    for name in bad:
        if name in excluded:
            continue
        usable = {each.name for each in nodes.values() if name in nodes and each.can_replace(nodes[name])}
        others = usable - {*excluded, *found, name}
        if not (job.requeue and job.is_batch):
            LOGGER.warning(f"{name} is not excluded: Slurm does not requeue this job (sbatch --requeue allows it)")
        elif name in required:
            LOGGER.warning(f"{name} is not excluded: the job asks for it (sbatch --nodelist)")
        elif len(others) < allocation.nnodes:
            has = f"{len(others)} other node{'s' * (len(others) != 1)} like it"
            LOGGER.warning(f"{name} is not excluded: the job needs {allocation.nnodes}, {job.partition} has {has}")
        else:
            found.append(name)
    return found
