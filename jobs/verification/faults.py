"""Faults for `fnet drill`, one function each, from outside the ranks: signals, edited files, a second start, limits."""

import hashlib
import os
import resource
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from fnet_dist.checkpoint.storage import MODEL, OPTIMIZER, STATE, checkpoint_steps, find_corruption
from fnet_dist.processes import is_running
from fnet_dist.run.outcome import read_outcome
from fnet_dist.run.run_dir import RunDir, read_json
from jobs.verification.supervised_run import (
    SupervisedRun,
    SupervisedRunError,
    ranks_of,
    supervised,
    text_of,
    wait_until,
)

ORPHANS_S = 2.0  # for the ranks to end after their launcher was killed


@dataclass(frozen=True)
class Result:
    """The cost of a fault: steps trained again, and seconds until the run was further than before the fault."""

    lost_steps: int | None
    recovery_s: float | None
    seen: str


def kill_rank(training: SupervisedRun, fault_step: int) -> Result:
    """Kill one rank (SIGKILL): the launcher starts another attempt."""
    launcher = training.start_until(fault_step)
    os.kill(ranks_of(launcher.pid)[1], signal.SIGKILL)
    return _recover_and_finish(training, "rank 1 killed, restarted")


def kill_launcher(training: SupervisedRun, fault_step: int) -> Result:
    """Kill the launcher (SIGKILL): no rank outlives it, and the same command continues the run."""
    launcher = training.start_until(fault_step)
    ranks = ranks_of(launcher.pid)  # before the kill: orphans are no children of the launcher
    launcher.kill()
    launcher.wait()  # else it stays a zombie
    gone_s = wait_until(lambda: not any(map(is_running, ranks.values())), "the end of the ranks")
    if gone_s > ORPHANS_S:
        raise SupervisedRunError(f"ranks ran for {gone_s:.1f} s after the end of their launcher")
    training.start()
    return _recover_and_finish(training, f"ranks gone after {gone_s:.2f} s, started again")


def preempt(training: SupervisedRun, fault_step: int) -> Result:
    """Send SIGTERM: the run saves at an agreed step and ends with 75; the same command loses no step."""
    saved_s = _stop(training, fault_step)
    training.start()
    return _recover_and_finish(training, f"saved and ended {saved_s:.1f} s after SIGTERM")


def hang(training: SupervisedRun, fault_step: int) -> Result:
    """Stop one rank (SIGSTOP): the others detect it, print their stacks and end; the launcher restarts."""
    launcher = training.start_until(fault_step)
    first = training.attempt()  # before a restart begins the second
    stopped = time.monotonic()
    os.kill(ranks_of(launcher.pid)[1], signal.SIGSTOP)  # a stopped rank looks like one that waits forever
    wait_until(first.end.exists, "the end of the attempt that hangs", launcher)
    noticed_s = time.monotonic() - stopped
    log = text_of(first.log(0))
    if "made no progress" not in log or "most recent call first" not in log:
        raise SupervisedRunError(f"no stacks of rank 0 in {first.log(0)}")
    return _recover_and_finish(training, f"detected after {noticed_s:.0f} s, stacks printed, restarted", stopped)


def torn_checkpoint(training: SupervisedRun, fault_step: int) -> Result:
    """Truncate the newest checkpoint to a half: it is reported, and the one before is used."""
    _stop(training, fault_step)
    newest = training.run.checkpoint(training.committed_step())
    os.truncate(newest / OPTIMIZER, (newest / OPTIMIZER).stat().st_size // 2)  # as a power cut can leave it
    training.start()
    result = _recover_and_finish(training, f"{newest.name} reported as damaged, the one before used")
    if f"damaged checkpoint: {newest}" not in text_of(training.output):
        raise SupervisedRunError(f"the damaged checkpoint was not reported in {training.output}")
    return result


def disk_full(training: SupervisedRun, fault_step: int) -> Result:
    """Let saves fail by a file-size limit on rank 0, and lift it: training goes on meanwhile."""
    launcher = training.start_until(fault_step)
    step, committed, rank = training.step(), training.committed_step(), ranks_of(launcher.pid)[0]
    size = training.run.checkpoint(committed).joinpath(OPTIMIZER).stat().st_size
    before = resource.prlimit(rank, resource.RLIMIT_FSIZE, (size // 2, resource.RLIM_INFINITY))
    log = training.attempt().log(0)
    wait_until(lambda: "WARNING: checkpoint not saved" in text_of(log), "a save that fails", launcher)
    resource.prlimit(rank, resource.RLIMIT_FSIZE, before)  # space again
    if wrong := find_corruption(training.run.checkpoint(committed)):
        raise SupervisedRunError(f"the last good checkpoint was lost: {wrong}")
    training.end(launcher, 0)
    if training.attempt().number != 1 or training.step() <= step:
        raise SupervisedRunError("training did not go on while no checkpoint could be saved")
    return Result(0, 0.0, "saves failed with a warning, training went on, saved again when there was space")


def two_owners(training: SupervisedRun, fault_step: int) -> Result:
    """Stop all processes of a run, let another start take over, and continue the first: it ends without a write."""
    launcher = training.start_until(fault_step)
    processes = [launcher.pid, *ranks_of(launcher.pid).values()]  # the launcher too: it would restart ranks
    for pid in processes:
        os.kill(pid, signal.SIGSTOP)
    second = training.start()  # takes over once the heartbeat is old
    result = _recover(training, "the stopped owner continued, ended with 75, wrote nothing")
    hashes = _hashes(training.run)
    for pid in processes:
        os.kill(pid, signal.SIGCONT)
    training.end(launcher, 75)
    training.end(second, 0)
    after = _hashes(training.run)
    # The second owner may have pruned a checkpoint meanwhile, but no process may have changed one.
    if changed := [path for path in hashes.keys() & after.keys() if after[path] != hashes[path]]:
        raise SupervisedRunError(f"a checkpoint was changed after the takeover: {changed[0]}")
    return result


def non_finite(training: SupervisedRun, fault_step: int) -> Result:
    """Resume with a learning rate of 1e30: all ranks stop at one step, twice, and the checkpoint is intact."""
    _stop(training, fault_step)
    good = training.run.checkpoint(training.committed_step())
    run = RunDir(training.run.path.with_name(f"{training.run.name}-lr"))  # a run of its own: this one ends as failed
    job = [*training.job, "--checkpoint.resume", str(good), "--optim.lr", "1e30"]
    with supervised(SupervisedRun(run, job)) as diverging:
        diverging.end(diverging.start(), 1)
    outcome, attempt = read_outcome(run), diverging.attempt()
    messages = {rank: read_json(attempt.error(rank))["message"]["message"] for rank in (0, 1)}
    if outcome is None or outcome["reason"] != "non_finite" or attempt.number != 2:  # the second repeats the steps
        raise SupervisedRunError(f"expected two attempts that end as non_finite, found {attempt.number} and {outcome}")
    # The first step with this rate still has the loss of the good weights: the one after it is not finite.
    if messages[0] != messages[1] or f" at step {diverging.committed_step() + 2}" not in messages[0]:
        raise SupervisedRunError(f"the ranks did not stop at one step: {messages}")
    corruption = find_corruption(run.checkpoint(outcome["step"] - 1))
    if corruption or diverging.committed_step() != int(good.name.removeprefix("step_")):
        raise SupervisedRunError("the last good checkpoint is not intact")
    training.end(training.start(), 0)
    return Result(0, None, "all ranks stopped at one step, and again when it was repeated; the checkpoint is intact")


_ALL = (kill_rank, kill_launcher, preempt, hang, torn_checkpoint, disk_full, two_owners, non_finite)
# By the name on the command line: "kill-rank" and so on. Each injects its fault after the given step.
FAULTS: dict[str, Callable[[SupervisedRun, int], Result]] = {fault.__name__.replace("_", "-"): fault for fault in _ALL}


def _stop(training: SupervisedRun, fault_step: int) -> float:
    """Start the run and send SIGTERM after `fault_step`. Return the seconds until it has saved and ended."""
    launcher = training.start_until(fault_step)
    sent = time.monotonic()
    launcher.send_signal(signal.SIGTERM)
    training.end(launcher, 75)
    return time.monotonic() - sent


def _recover(training: SupervisedRun, seen: str, since: float | None = None) -> Result:
    """Wait until a second attempt is further than the run was at the fault, which happened at `since` (None: now)."""
    since = time.monotonic() if since is None else since
    wait_until(lambda: training.attempt().number > 1, "a second attempt", training.launchers[-1])
    step = training.step()
    wait_until(lambda: training.step() > step, f"a step after {step}", training.launchers[-1])
    return Result(step - training.resumed_step(), time.monotonic() - since, seen)


def _recover_and_finish(training: SupervisedRun, seen: str, since: float | None = None) -> Result:
    result = _recover(training, seen, since)
    training.end(training.launchers[-1], 0)
    return result


def _hashes(run: RunDir) -> dict[Path, str]:
    """Return the hash of each checkpoint file."""
    hashes = {}
    for path in (run.checkpoint(step) / name for step in checkpoint_steps(run) for name in (MODEL, OPTIMIZER, STATE)):
        with suppress(OSError):  # it has just been pruned
            hashes[path] = hashlib.sha256(path.read_bytes()).hexdigest()
    return hashes
