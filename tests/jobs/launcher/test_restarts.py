"""A run whose rank is killed restarts and ends bit-identical; a failure that would repeat is not restarted."""

import os
import pickle
import re
import signal
import socket
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from fnet_dist.checkpoint.storage import checkpoint_steps
from fnet_dist.run import metrics_log
from fnet_dist.run.outcome import read_outcome
from fnet_dist.run.run_dir import RunDir, read_json
from jobs.monitor.attempts import read_attempts
from jobs.monitor.run_state import State
from jobs.verification.compare_runs import gaps, run_differences
from jobs.verification.supervised_run import ranks_of as rank_pids
from tests.helpers.processes import (
    JOBS_RUN,
    TRAINER,
    Ended,
    Started,
    all_gone,
    children,
    is_running,
    start,
    torchrun,
    wait_until,
)
from tests.helpers.slurm_commands import process_name

pytestmark = [pytest.mark.processes, pytest.mark.usefixtures("alone")]

STEPS, SAVE_EVERY = 200, 30
LOOPBACK = {"0100007F", "00000000000000000000000001000000"}  # 127.0.0.1 and ::1 as /proc/net/tcp and tcp6 spell them
LISTENS = "0A"


def write_job(folder: Path) -> Path:
    """A job file whose steps depend on all that a checkpoint holds; its run is FOLDER/runs/job."""
    job = folder / "job.toml"
    job.write_text(
        f'run = {{root = "{folder}/runs", epochs = 3, max_steps = {STEPS}}}\n'
        'data = {dataset = "synthetic", global_batch_size = 256}\nmodel = {dropout = 0.25}\n'
        'optim = {name = "sgd", lr = 0.05, momentum = 0.9, max_grad_norm = 0.5}\nparallel = {device = "cpu"}\n'
        f"checkpoint = {{every_steps = {SAVE_EVERY}}}\n"
    )
    return job


def run_of(job: Path) -> RunDir:
    return RunDir(job.parent / "runs" / "job")


def two_ranks(job: Path, *overrides: str) -> tuple[str, ...]:
    return (*JOBS_RUN, str(job), "--nproc-per-node", "2", *overrides)


def ranks_of(launcher: Started, among: int = 2, other_than: Sequence[int] = ()) -> list[int]:
    """The ranks that it has started, in order, once there are as many as `among` and none is of `other_than`."""

    def new() -> list[int] | None:
        assert launcher.process.poll() is None
        found = [*rank_pids(launcher.process.pid).values()]
        return found if len(found) == among and not set(found) & set(other_than) else None

    return wait_until(new) or []


def first_checkpoint(run: RunDir) -> int:
    """The step of the first checkpoint there is; waits for it."""
    return wait_until(lambda: checkpoint_steps(run))[-1]


def attempts(run: RunDir) -> list[str]:
    return sorted(path.name for path in run.attempts.iterdir())


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    job = write_job(tmp_path_factory.mktemp("undisturbed"))
    with start(*two_ranks(job)) as launcher:
        ended = launcher.end(120)
    assert ended.code == 0, ended.err
    return run_of(job)


@dataclass(frozen=True)
class Listener:
    """A socket that waits for connections: the process that holds it, its address as the kernel spells it."""

    pid: int
    address: str
    port: int


def listeners(pids: Sequence[int]) -> list[Listener]:
    """Every TCP socket of these processes that listens."""
    rows = [row.split() for table in ("tcp", "tcp6") for row in Path(f"/proc/net/{table}").read_text().splitlines()[1:]]
    where = {row[9]: row[1] for row in rows if row[3] == LISTENS}  # by inode
    found = []
    for pid in pids:
        names = [str(path.readlink()) for path in Path(f"/proc/{pid}/fd").iterdir()]
        for inode in [name[8:-1] for name in names if name.startswith("socket:[")]:
            if inode in where:
                address, port = where[inode].split(":")
                found.append(Listener(pid, address, int(port, 16)))
    return found


class Planted:
    """Whoever unpickles it makes the directory `path`."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def send_rubbish(port: int, planted: Path) -> None:
    """Connect to a port three times: with nothing, noise and a pickle; nobody has to answer."""
    noise = bytes(range(256)) * 64
    for content in (b"", noise, pickle.dumps(Planted(planted))):
        with socket.create_connection(("127.0.0.1", port), timeout=5) as client:
            client.sendall(content)


@dataclass(frozen=True)
class Killed:
    """A run of which strangers knocked at every port, and then a rank was killed."""

    run: RunDir
    ended: Ended
    listeners: list[Listener]
    ranks: list[int]
    planted: Path


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Killed:
    folder = tmp_path_factory.mktemp("killed")
    job = write_job(folder)
    with start(*two_ranks(job), umask=0) as launcher:
        ranks = ranks_of(launcher)
        wait_until(lambda: metrics_log.last_steps(run_of(job).metrics_log)["train"])
        found = listeners([launcher.process.pid, *ranks])
        for one in found:
            send_rubbish(one.port, folder / "planted")
        first_checkpoint(run_of(job))
        os.kill(ranks[1], signal.SIGKILL)
        ranks_of(launcher, other_than=ranks)
        return Killed(run_of(job), launcher.end(120), found, ranks, folder / "planted")


def test_a_killed_rank_is_restarted_and_the_run_ends_bit_identical_to_an_undisturbed_one(
    killed: Killed, undisturbed: RunDir
) -> None:
    assert killed.ended.code == 0, killed.ended.err
    assert attempts(killed.run) == ["0001", "0002"]
    end = read_json(killed.run.attempt(1) / "end.json")
    assert (end["reason"], end["restarts"]) == ("crash", True)
    assert re.search(r"going on from step [1-9]\d* \(epoch", killed.ended.out)
    assert killed.ended.out.count("WARNING: another number of ranks will not give the same training: dropout ") == 2
    assert run_differences(undisturbed, killed.run) == []
    assert gaps(killed.run) == []


def test_only_the_rank_that_was_killed_is_named(killed: Killed) -> None:
    said = killed.ended.out + killed.ended.err
    assert "attempt 1: rank 1 failed first: was killed by SIGKILL" in killed.ended.err
    assert killed.ended.err.count("failed first") == 1
    assert "Traceback" not in said


def test_on_one_node_ranks_listen_on_loopback_only_and_ignore_foreign_data(killed: Killed) -> None:
    assert {one.pid for one in killed.listeners} == set(killed.ranks)  # gloo's, and none of the launcher
    assert {one.address for one in killed.listeners} <= LOOPBACK
    assert not killed.planted.exists()
    # That the run went on and ended alike is the test of the killed rank: its ports had been knocked at before.


def test_a_run_directory_has_mode_0700_whatever_the_umask(killed: Killed) -> None:
    assert killed.run.path.stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize(
    ("overrides", "code", "reason", "says"),
    [
        (("--parallel.device", "cuda"), 2, None, "parallel.device is cuda, but torch sees no GPU"),
        (
            ("--optim.lr", "1e30", "--optim.max-grad-norm", "none", "--parallel.replay-on-failure", "false"),
            *(1, "non_finite", "is nan at step 2 on rank 0"),
        ),
    ],
)
def test_a_failure_that_would_repeat_is_not_restarted(
    tmp_path: Path, overrides: tuple[str, ...], code: int, reason: str | None, says: str
) -> None:
    job = write_job(tmp_path)
    with start(*JOBS_RUN, str(job), "--run.name", "job", *overrides, CUDA_VISIBLE_DEVICES="") as launcher:
        ended = launcher.end(60)
    outcome = read_outcome(run_of(job))
    assert outcome is not None
    assert (ended.code, outcome["status"], outcome["exit_code"]) == (code, "failed", code)
    assert reason is None or outcome["reason"] == reason
    assert says in ended.out
    assert "Traceback" not in ended.out + ended.err
    assert attempts(run_of(job)) == ["0001"]


BROKEN_RECIPE = """
import torch
from torch import nn
from fnet_dist.recipe import Classification, DataConfig, DatasetInfo, InMemoryDataset, Section as ModelConfig

metrics = Classification()

def build_dataset(config, split, device):
    inputs = torch.arange(40.0).reshape(40, 1) + (0 if split == "train" else 100)
    info = DatasetInfo("numbers", "1", class_names=("even", "odd"))
    return InMemoryDataset(inputs, inputs[:, 0].long() % 2, device, info)

class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(1, 2)

    def forward(self, x):
        if (x == 17).any():
            raise ArithmeticError("17 is not to be had")
        return self.layer(x)

def build_model(config, train_data):
    return Model()
"""


def test_the_same_exception_at_the_same_step_twice_ends_the_run_with_it(tmp_path: Path) -> None:
    """From a checkpoint between; a third attempt would save nothing new, and a fourth end as no_progress."""
    (tmp_path / "broken.py").write_text(BROKEN_RECIPE)
    job = tmp_path / "job.toml"
    job.write_text(
        f'recipe = "broken"\nrun = {{root = "{tmp_path}/runs", name = "job"}}\ndata = {{global_batch_size = 4}}\n'
        'parallel = {device = "cpu"}\ncheckpoint = {every_steps = 1}\n'
    )
    with start(*two_ranks(job), PYTHONPATH=str(tmp_path)) as launcher:
        ended = launcher.end(90)
    outcome = read_outcome(run_of(job))
    assert outcome is not None
    assert (ended.code, outcome["status"], outcome["reason"], outcome["exit_code"]) == (1, "failed", "crash", 1)
    assert attempts(run_of(job)) == ["0001", "0002"]
    step = outcome["step"]
    assert step > 0
    assert ended.err.count(f"failed first: ArithmeticError: 17 is not to be had (after step {step})") == 2
    assert "the same error as in attempt 1, after the same step: not tried again" in ended.err


def test_three_attempts_in_a_row_without_a_checkpoint_are_the_last(tmp_path: Path) -> None:
    """If the fork server was killed, the ranks of the next attempt are started by themselves."""
    job, ranks, servers = write_job(tmp_path), list[int](), list[list[int]]()
    with start(*two_ranks(job)) as launcher:
        for attempt in (1, 2, 3):
            ranks = ranks_of(launcher, other_than=ranks)
            servers.append([pid for pid in children(launcher.process.pid) if process_name(pid) == "fork server"])
            if attempt == 1:
                os.kill(servers[0][0], signal.SIGKILL)
            os.kill(ranks[1], signal.SIGKILL)
        began = time.monotonic()
        ended = launcher.end(60)
        assert time.monotonic() - began < 5
        assert not any(map(is_running, ranks))
    assert [len(found) for found in servers] == [1, 0, 1]
    assert servers[0] != servers[2]
    assert all_gone(servers[2])
    outcome = read_outcome(run_of(job))
    assert outcome is not None
    assert (ended.code, outcome["status"], outcome["reason"], outcome["step"]) == (1, "failed", "no_progress", 0)
    assert attempts(run_of(job)) == ["0001", "0002", "0003"]
    assert ended.err.count("rank 1 failed first: was killed by SIGKILL") == 3
    said = [past.message or "" for past in read_attempts(run_of(job), State("failed"))]
    assert [message.partition(" (")[0] for message in said] == ["rank 1: was killed by SIGKILL"] * 3
    assert "3 attempts in a row without a new checkpoint, given up (parallel.max_restarts is 3)" in ended.err


def test_no_rank_outlives_torchruns_agent(tmp_path: Path) -> None:
    """Nor `fnet run`, which then goes on with the run: tests/jobs/launcher/test_on_slurm.py."""
    with start(*torchrun(2), *TRAINER, "--config", str(write_job(tmp_path))) as agent:
        ranks = ranks_of(agent)
        wait_until(lambda: metrics_log.last_steps(run_of(tmp_path / "job.toml").metrics_log)["train"])
        agent.process.kill()
        assert all_gone(ranks)


@pytest.mark.soak
def test_two_nodes_that_lose_a_rank_restart_and_end_bit_identical_to_one_node_with_two_ranks(
    tmp_path: Path, undisturbed: RunDir
) -> None:
    job = write_job(tmp_path)
    words = (*JOBS_RUN, str(job), "--nnodes", "2", "--nproc-per-node", "1", "--node-rank")
    with start(*words, "0") as first, start(*words, "1") as second:
        (early,) = ranks_of(second, among=1)
        os.kill(early, signal.SIGKILL)  # node 0's rank waits for it, and would for long
        wait_until(lambda: attempts(run_of(job)) == ["0001", "0002"])
        first_checkpoint(run_of(job))
        (late,) = ranks_of(second, among=1)
        os.kill(late, signal.SIGKILL)
        ended = [node.end(120) for node in (first, second)]
    assert [node.code for node in ended] == [0, 0], ended
    assert "rank 1, on another node, failed: was killed by SIGKILL" in ended[0].err
    assert "attempt 2: rank 1 failed first: was killed by SIGKILL" in ended[1].err
    assert attempts(run_of(job)) == ["0001", "0002", "0003"]
    assert {
        len(line["loss_per_rank"]) for line in metrics_log.read(run_of(job).metrics_log) if line["kind"] == "train"
    } == {2}
    assert run_differences(undisturbed, run_of(job)) == []
    assert gaps(run_of(job)) == []


@pytest.mark.parametrize("suspended", [pytest.param(0, marks=pytest.mark.soak), 1])
def test_on_two_nodes_node_0_names_the_rank_that_is_suspended_on_either(tmp_path: Path, suspended: int) -> None:
    job = write_job(tmp_path)
    run, options = run_of(job), ("--parallel.timeout-s", "2", "--parallel.max-restarts", "0", "--run.name", "job")
    words = (*JOBS_RUN, str(job), *options, "--run.max-steps", "100000", "--run.epochs", "1000")
    words = (*words, "--nnodes", "2", "--nproc-per-node", "1", "--node-rank")
    with start(*words, "0") as first, start(*words, "1") as second:
        ranks = [*ranks_of(first, among=1), *ranks_of(second, among=1)]
        wait_until(lambda: metrics_log.last_steps(run.metrics_log)["train"] > SAVE_EVERY)
        os.kill(ranks[suspended], signal.SIGSTOP)
        ended = [node.end() for node in (first, second)]
    assert [node.code for node in ended] == [1, 1], ended
    said = f"attempt 1: rank {suspended} shows no life: suspended, or stuck in a call that locks Python; "
    assert f"{said}rank {1 - suspended} waits for it" in ended[0].err


@dataclass(frozen=True)
class Alone:
    """Node 0 of two, whose other never comes, and its rank."""

    job: Path
    launcher: Started
    rank: int


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Alone]:
    """Asked to stop, it waits 20 s for the other node: beside the other tests."""
    job = write_job(tmp_path_factory.mktemp("alone"))
    words = (*JOBS_RUN, str(job), "--nnodes", "2", "--node-rank", "0", "--nproc-per-node", "1")
    with start(*words) as launcher:
        (rank,) = ranks_of(launcher, among=1)
        launcher.process.send_signal(signal.SIGTERM)
        yield Alone(job, launcher, rank)


def test_node_0_can_be_stopped_while_it_waits_for_the_other_node(alone: Alone) -> None:
    """Its rank waits inside torch and sees no signal; nothing has been trained that could be lost."""
    ended = alone.launcher.end(60)
    assert all_gone([alone.rank])
    assert ended.code == 75
    assert "not restarted, as SIGTERM asked for a stop; there is no checkpoint yet" in ended.out
    outcome = read_outcome(run_of(alone.job))
    assert outcome is not None
    assert (outcome["status"], outcome["reason"], outcome["step"]) == ("stopped", "signal_term", 0)


@pytest.mark.parametrize(
    ("numerics", "rank_0_waits"),
    [("fast", "waiting for rank 2"), ("bf16_gradients", "its last collective gloo:all_reduce")],
    ids=["shared memory", "gloo"],
)
def test_a_hang_names_the_rank_that_is_suspended_and_not_those_that_wait_for_it(
    tmp_path: Path, numerics: str, rank_0_waits: str
) -> None:
    job = write_job(tmp_path)
    run, options = run_of(job), ("--parallel.timeout-s", "2", "--parallel.max-restarts", "0", "--run.name", "job")
    words = (*JOBS_RUN, str(job), "--nproc-per-node", "3", *options, "--parallel.numerics", numerics)
    with start(*words, "--run.max-steps", "100000", "--run.epochs", "1000") as launcher:
        *_, rank_2 = ranks_of(launcher, among=3)
        wait_until(lambda: metrics_log.last_steps(run.metrics_log)["train"] > SAVE_EVERY)
        os.kill(rank_2, signal.SIGSTOP)
        ended = launcher.end()
    assert ended.code == 1
    said = "rank 2 shows no life: suspended, or stuck in a call that locks Python; ranks 0, 1 wait for it"
    assert f"attempt 1: {said}" in ended.err
    [attempt] = read_attempts(run, State("failed"))
    assert attempt.message is not None
    assert re.fullmatch(rf"{said} \(rank 0 on .*, {rank_0_waits}\)", attempt.message)
    recorded = read_json(run.attempt(1) / "rank_0.collectives.json")["entries"]
    assert 0 < len(recorded) <= 2000
    if numerics == "bf16_gradients":
        assert recorded[-1]["profiling_name"] == "gloo:all_reduce"


@pytest.mark.soak
def test_a_run_that_is_suspended_for_25_times_its_timeout_goes_on_where_it_was(tmp_path: Path) -> None:
    """Suspended while rank 0 waits for rank 1 in gloo, whose own timeout counts the time."""
    job = write_job(tmp_path)
    run, options = (
        run_of(job),
        ("--parallel.timeout-s", "1", "--parallel.numerics", "bf16_gradients", "--run.name", "job"),
    )
    with start(*two_ranks(job, *options, "--run.max-steps", "400")) as launcher:
        rank_0, rank_1 = ranks_of(launcher)
        wait_until(lambda: metrics_log.last_steps(run.metrics_log)["train"] > SAVE_EVERY)
        began = time.monotonic()
        for pid, at in ((rank_1, 0), (rank_0, 0.1), (launcher.process.pid, 0.1)):
            wait_until(lambda at=at: time.monotonic() - began > at)
            os.kill(pid, signal.SIGSTOP)
        for pid, at in ((launcher.process.pid, 25), (rank_0, 25), (rank_1, 25.1)):
            wait_until(lambda at=at: time.monotonic() - began > at)
            os.kill(pid, signal.SIGCONT)
        ended = launcher.end()
    assert ended.code == 0, ended.err
    assert attempts(run) == ["0001"]
