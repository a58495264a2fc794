"""Bad nodes: count the failed attempts of a Slurm job on each node, and name those that the job can do without.

A failure counts on the node of the rank at fault. Only attempts of this job count: a new job begins with no list.
"""

from collections.abc import Sequence

from fnet_dist.checkpoint.storage import newest_step
from fnet_dist.config.schema import Config
from fnet_dist.errors import NonFiniteError
from fnet_dist.run.attempt import list_attempts
from fnet_dist.run.failure import REPLAYED, AttemptFailure, read_attempt_failure
from fnet_dist.run.log import LOGGER
from fnet_dist.run.run_dir import RunDir
from slurm import client
from slurm.errors import SlurmError
from slurm.job_env import Allocation

_COUNTED = ("crash", "hang", *REPLAYED)  # not "io": all nodes share the file system


def bad_nodes(run: RunDir, config: Config, job_id: str, last: AttemptFailure | None = None) -> dict[str, list[str]]:
    """Return the nodes on which `resources.max_node_failures` attempts of the job failed, with a line for each failure.

    `last` is the failure of the newest attempt, before its end.json is written.
    """
    attempts = [attempt for attempt in list_attempts(run) if attempt.read_begin()["slurm_job_id"] == job_id]
    failures = [read_attempt_failure(attempt) for attempt in attempts]
    if last is not None:
        failures[-1] = last
    found: dict[str, list[str]] = {}
    for index, (attempt, failure) in enumerate(zip(attempts, failures, strict=True)):
        if failure is None or failure.node is None or failure.reason not in _COUNTED:
            continue
        if failure.reason == NonFiniteError.reason and not was_passed(run, failure, failures[index + 1 :]):
            continue
        found.setdefault(failure.node, []).append(f"attempt {attempt.number}: {failure.message}")
    limit = config.resources.max_node_failures
    return {node: lines for node, lines in found.items() if limit is not None and len(lines) >= limit}


def was_passed(run: RunDir, failure: AttemptFailure, later: Sequence[AttemptFailure | None]) -> bool:
    """Return True if the step of `failure` was trained without an error afterwards: then the machine was the cause."""
    failed_at = [each.step for each in later if each is not None and each.step is not None]
    return failure.step is not None and max([newest_step(run), *(step - 1 for step in failed_at)]) >= failure.step


def nodes_to_leave_out(allocation: Allocation, bad: Sequence[str]) -> list[str]:
    """Return the `bad` nodes that the job does not exclude yet and can do without; say why it cannot do without one.

    Only nodes like it can replace a node, with its features and GPUs: the job may ask for them.
    """
    left_out: list[str] = []
    try:
        if not bad or (job := client.show_job(allocation.raw_job_id)) is None:
            return []
        excluded = client.host_names(job.excluded)
        nodes = {node.name: node for node in client.nodes_of(job.partition)}
    except SlurmError as error:
        LOGGER.warning(f"no node is left out: {error}")
        return []
    for name in bad:
        if name in excluded:
            continue
        kind = (nodes[name].features, nodes[name].gres) if name in nodes else None
        alike = {each.name for each in nodes.values() if each.is_usable and (each.features, each.gres) == kind}
        others = alike - {*excluded, *left_out, name}
        if not job.may_requeue:
            LOGGER.warning(f"{name} is not left out: Slurm must not requeue this job (sbatch --requeue allows it)")
        elif len(others) < allocation.nnodes:
            has = f"{len(others)} other node{'s' * (len(others) != 1)} like it"
            LOGGER.warning(f"{name} is not left out: the job needs {allocation.nnodes}, {job.partition} has {has}")
        else:
            left_out.append(name)
    return left_out
