"""A stop saves a checkpoint and prints the command that resumes; nothing is lost.

One run is stopped in every way, each start resuming where the last one ended, and is then compared with an
uninterrupted run. Its launcher starts one rank: that several ranks stop after the same step is the test of
tests/promises/test_stopping_costs_nothing.py and, by torchrun, of test_train.py; `make soak` stops two.
"""

import os
import re
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from fnet_dist.checkpoint.storage import find_corruption
from fnet_dist.run import metrics_log
from fnet_dist.run.outcome import Outcome, read_outcome
from fnet_dist.run.run_dir import RunDir, read_json
from jobs.verification.compare_runs import gaps, run_differences
from jobs.verification.supervised_run import ranks_of as rank_pids
from tests.helpers.processes import (
    JOBS_RUN,
    TRAINER,
    Ended,
    Started,
    children,
    is_running,
    start,
    wait_until,
    words_after_python,
)

pytestmark = pytest.mark.processes

STEPS = 800  # an epoch has 235; a start that is stopped as soon as it has trained takes at most 200
TO_COMMIT_S, TO_END_S = 2, 10  # from asking to outcome.json, which follows the checkpoint, and to the launcher's end


def write_job(folder: Path) -> Path:
    """Write a job file whose steps depend on everything that a checkpoint holds."""
    job = folder / "job.toml"
    job.write_text(
        f'run = {{root = "{folder}/runs", epochs = 3, max_steps = {STEPS}}}\n'
        'data = {dataset = "synthetic", global_batch_size = 256}\nmodel = {dropout = 0.25}\n'
        'optim = {max_grad_norm = 0.5}\nschedule = {name = "cosine"}\nparallel = {device = "cpu"}\n'
    )
    return job


def trained(run: RunDir) -> int:
    return metrics_log.last_steps(run.metrics_log)["train"]


def ranks_of(launcher: Started, count: int = 1) -> list[int]:
    """Return the pids of the ranks, as soon as `count` run."""
    return wait_until(lambda: len(found := [*rank_pids(launcher.process.pid).values()]) == count and found)


def has_handlers(pid: int) -> bool:
    """Return True if a Python process handles SIGUSR1, which needs a handler, and does not block it (see proc(5))."""
    status = Path(f"/proc/{pid}/status").read_text()
    caught, blocked = (int(re.findall(rf"{name}:\s+(\w+)", status)[0], 16) for name in ("SigCgt", "SigBlk"))
    return bool((caught & ~blocked) >> (signal.SIGUSR1 - 1) & 1)


@dataclass(frozen=True)
class Stop:
    """A stopped start: its output, the run's state, and the seconds from the request to checkpoint and end."""

    ended: Ended
    outcome: Outcome
    before: int
    trained: int
    corruption: str | None
    stop_file_left: bool
    to_commit_s: float
    to_end_s: float

    @property
    def command(self) -> list[str]:
        """The printed command that resumes the run, as words after `python`."""
        (line,) = [line for line in self.ended.out.splitlines() if line.startswith("to go on: ")]
        return words_after_python(line.removeprefix("to go on: "))


def stopped(words: Sequence[str], run: RunDir, ask: Callable[[Started], None], **environment: str) -> Stop:
    """Start `words`, let `ask` wait for its moment and request a stop, and wait for the end."""
    before = trained(run)
    with start(*words, **environment) as launcher:
        ask(launcher)
        asked, ranks = time.time(), children(launcher.process.pid)
        ended = launcher.end(60)
        took_s = time.time() - asked
        assert not any(map(is_running, ranks))
    outcome = read_outcome(run)
    assert outcome is not None, ended
    step = outcome["step"]
    return Stop(
        ended,
        outcome,
        before,
        trained(run),
        find_corruption(run.checkpoint(step), read_json(run.manifest)["id"]) if step else None,
        run.stop.exists(),
        run.outcome.stat().st_mtime - asked,
        took_s,
    )


def after_a_new_step(run: RunDir, ask: Callable[[Started], None]) -> Callable[[Started], None]:
    """Return a function that calls `ask` once the start has trained a step."""
    before = trained(run)

    def wait_and_ask(launcher: Started) -> None:
        wait_until(lambda: trained(run) > before)
        ask(launcher)

    return wait_and_ask


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    folder = tmp_path_factory.mktemp("undisturbed")
    with start(*JOBS_RUN, str(write_job(folder))) as launcher:
        ended = launcher.end(120)
    assert ended.code == 0, ended.err
    return RunDir(folder / "runs" / "job")


# Ctrl-C has an exit code of its own. SIGTERM is sent during the start here, and during training in test_train.py. All
# four signals set the same flag: test_stop.py. `make soak` sends all four.
SIGNALS = {"signal_int": signal.SIGINT}


@pytest.fixture(scope="module")
def driven(tmp_path_factory: pytest.TempPathFactory) -> tuple[RunDir, dict[str, Stop], Ended]:
    """Stop a run in every way, resume it each time with the printed command, and let it finish."""
    folder = tmp_path_factory.mktemp("driven")
    job, run = write_job(folder), RunDir(folder / "runs" / "job")
    stops: dict[str, Stop] = {}
    command = [*JOBS_RUN, str(job)]

    def starting_up(launcher: Started) -> None:
        ranks_of(launcher)
        launcher.process.send_signal(signal.SIGTERM)

    stops["start-up"] = stopped(command, run, starting_up)
    for reason, number in SIGNALS.items():
        command = stops[[*stops][-1]].command
        ask = after_a_new_step(run, lambda launcher, number=number: launcher.process.send_signal(number))
        stops[reason] = stopped(command, run, ask)
    ask = after_a_new_step(run, lambda launcher: run.stop.touch())
    stops["stop_file"] = stopped(stops["signal_int"].command, run, ask)
    # It has passed before the first step: the user who sets it wants no more work than that.
    deadline = {"FNET_DEADLINE": str(time.time())}
    stops["deadline"] = stopped(stops["stop_file"].command, run, ranks_of, **deadline)
    with start(*stops["deadline"].command) as launcher:
        return run, stops, launcher.end(120)


@pytest.mark.timeout(400)  # the first of these tests drives the run
@pytest.mark.parametrize("reason", [*SIGNALS, "stop_file"])
def test_a_stop_in_training_saves_the_step_that_it_reports_within_seconds(
    driven: tuple[RunDir, dict[str, Stop], Ended], reason: str
) -> None:
    stop = driven[1][reason]
    code = 130 if reason == "signal_int" else 75
    assert (stop.ended.code, stop.ended.err) == (code, "")
    assert (stop.outcome["status"], stop.outcome["reason"], stop.outcome["exit_code"]) == ("stopped", reason, code)
    assert stop.before < stop.outcome["step"] == stop.trained < STEPS
    assert stop.corruption is None
    assert f"stopped at step {stop.trained:,} as asked ({reason}), checkpointed" in stop.ended.out
    assert not stop.stop_file_left
    assert stop.to_commit_s < TO_COMMIT_S
    assert stop.to_end_s < TO_END_S


@pytest.mark.parametrize(("when", "reason"), [("start-up", "signal_term"), ("deadline", "deadline")])
def test_a_stop_before_the_first_step_trains_nothing(
    driven: tuple[RunDir, dict[str, Stop], Ended], when: str, reason: str
) -> None:
    stop = driven[1][when]
    assert (stop.ended.code, stop.ended.err) == (75, "")
    assert (stop.outcome["status"], stop.outcome["reason"]) == ("stopped", reason)
    assert stop.before == stop.outcome["step"] == stop.trained
    assert stop.corruption is None


def test_a_run_stopped_four_times_is_bit_identical_to_an_uninterrupted_one(
    driven: tuple[RunDir, dict[str, Stop], Ended], undisturbed: RunDir
) -> None:
    run, stops, ended = driven
    assert ended.code == 0, ended.err
    assert f"going on from step {stops['deadline'].trained:,} (epoch " in ended.out
    assert [path.name for path in sorted(run.attempts.iterdir())] == [f"{number:04d}" for number in range(1, 6)]
    assert run_differences(undisturbed, run) == []
    assert gaps(run) == []


def test_a_second_ctrl_c_ends_at_once_with_130(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "runs" / "job")
    with start(*JOBS_RUN, str(write_job(tmp_path)), "--nproc-per-node", "2") as launcher:
        ranks = ranks_of(launcher, 2)
        wait_until(lambda: all(map(has_handlers, ranks)))  # they are about to import torch, which takes seconds
        began = time.monotonic()
        while any(map(is_running, ranks)):  # as a person does; two that come at once are one to the kernel
            launcher.process.send_signal(signal.SIGINT)
            time.sleep(0.1)
            assert time.monotonic() - began < TO_END_S
        ended = launcher.end(1)
        assert not any(map(is_running, ranks))
    assert ended.code == 130
    assert "stopped at step" not in ended.out  # what the first one alone would have come to
    outcome = read_outcome(run)
    assert outcome is not None
    assert (outcome["status"], outcome["reason"], outcome["step"]) == ("stopped", "signal_int", 0)


def test_ranks_that_torchrun_restarts_after_a_stop_exit_again(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "runs" / "job")
    words = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=3", *TRAINER)
    with start(*words, "--config", str(write_job(tmp_path)), "--run.max-steps", "none") as agent:
        wait_until(lambda: trained(run))
        os.kill(ranks_of(agent, 2)[1], signal.SIGTERM)  # one of them: all leave together
        ended = agent.end(60)
    assert ended.code == 1  # torchrun's own
    outcome = read_outcome(run)
    assert outcome is not None
    assert (outcome["status"], outcome["reason"], outcome["exit_code"]) == ("stopped", "signal_term", 75)
    assert [path.name for path in run.attempts.iterdir()] == ["0001"]
    words_of_the_end = f"stopped at step {outcome['step']:,} as asked (signal_term), checkpointed"
    assert words_of_the_end in ended.err.partition("Root Cause")[2]
    assert "fnet_dist/" not in ended.err  # no traceback of ours
    assert find_corruption(run.checkpoint(outcome["step"])) is None
