"""Faults, one function each, all from outside: signals, edited files, a second start, a file-size limit, a huge lr."""

import hashlib
import os
import resource
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from fnet_dist.checkpoint.storage import MODEL, OPTIMIZER, STATE, checkpoint_steps, find_corruption
from fnet_dist.processes import is_running
from fnet_dist.run.outcome import read_outcome
from fnet_dist.run.run_dir import RunDir, read_json
from jobs.verification.compare_runs import gaps, run_differences
from jobs.verification.supervised_run import SupervisedRun, SupervisedRunError, ranks_of, wait_until

ORPHANS_S = 2.0


@dataclass(frozen=True)
class Result:
    """What a fault cost: steps that were trained again, and seconds until the run was further than before it."""

    lost_steps: int | None
    recovery_s: float | None
    seen: str


def kill_rank(trial: SupervisedRun, fault_step: int) -> Result:
    """SIGKILL one rank: the launcher starts another attempt."""
    launcher = trial.start()
    trial.wait_for_step(fault_step)
    os.kill(ranks_of(launcher.pid)[1], signal.SIGKILL)
    result = _recover(trial, 1, "rank 1 killed, restarted")
    trial.end(launcher, 0)
    return result


def kill_launcher(trial: SupervisedRun, fault_step: int) -> Result:
    """SIGKILL the launcher: no rank survives it, and the same command goes on."""
    launcher = trial.start()
    trial.wait_for_step(fault_step)
    ranks = ranks_of(launcher.pid)
    launcher.kill()
    launcher.wait()
    gone_s = wait_until(lambda: not any(map(is_running, ranks.values())), "the end of the ranks")
    if gone_s > ORPHANS_S:
        raise SupervisedRunError(f"ranks lived on for {gone_s:.1f} s after their launcher")
    again = trial.start()
    result = _recover(trial, 1, f"ranks gone after {gone_s:.2f} s, started again")
    trial.end(again, 0)
    return result


def preempt(trial: SupervisedRun, fault_step: int) -> Result:
    """SIGTERM: a checkpoint at an agreed step, exit code 75, and the same command goes on without a step lost."""
    saved_s = _stop(trial, fault_step)
    again = trial.start()
    result = _recover(trial, 1, f"saved and gone {saved_s:.1f} s after SIGTERM")
    trial.end(again, 0)
    return result


def hang(trial: SupervisedRun, fault_step: int) -> Result:
    """SIGSTOP one rank: the others notice, show their stacks and end; the launcher starts another attempt."""
    launcher = trial.start()
    trial.wait_for_step(fault_step)
    first = trial.attempt()
    stopped = time.monotonic()
    os.kill(ranks_of(launcher.pid)[1], signal.SIGSTOP)
    wait_until(first.end.exists, "the end of the attempt that hangs", launcher)
    noticed_s = time.monotonic() - stopped
    log = first.log(0).read_text()
    if "made no progress" not in log or "most recent call first" not in log:
        raise SupervisedRunError(f"no stacks of the living rank in {first.log(0)}")
    result = _recover(trial, 1, f"noticed after {noticed_s:.0f} s, stacks shown, restarted", since=stopped)
    trial.end(launcher, 0)
    return result


def torn_checkpoint(trial: SupervisedRun, fault_step: int) -> Result:
    """Half of the newest checkpoint is gone: it is named, and the one before is taken."""
    _stop(trial, fault_step)
    newest = trial.run.checkpoint(trial.committed_step())
    os.truncate(newest / OPTIMIZER, (newest / OPTIMIZER).stat().st_size // 2)
    again = trial.start()
    result = _recover(trial, 1, f"{newest.name} named as damaged, the one before taken")
    trial.end(again, 0)
    if f"damaged checkpoint: {newest}" not in trial.output.read_text():
        raise SupervisedRunError(f"the damaged checkpoint was not named in {trial.output}")
    return result


def disk_full(trial: SupervisedRun, fault_step: int) -> Result:
    """A file-size limit on rank 0 fails each save, until it is lifted: training goes on meanwhile."""
    launcher = trial.start()
    step = trial.wait_for_step(fault_step)
    committed, rank = trial.committed_step(), ranks_of(launcher.pid)[0]
    size = trial.run.checkpoint(committed).joinpath(OPTIMIZER).stat().st_size
    before = resource.prlimit(rank, resource.RLIMIT_FSIZE, (size // 2, resource.RLIM_INFINITY))
    log = trial.attempt().log(0)
    wait_until(lambda: "WARNING: checkpoint not saved" in log.read_text(), "a save that fails", launcher)
    resource.prlimit(rank, resource.RLIMIT_FSIZE, before)
    if wrong := find_corruption(trial.run.checkpoint(committed)):
        raise SupervisedRunError(f"the last good checkpoint was lost: {wrong}")
    trial.end(launcher, 0)
    if trial.attempt().number != 1 or trial.step() <= step:
        raise SupervisedRunError("training did not go on while no checkpoint could be saved")
    return Result(0, 0.0, "saves failed loudly, training went on, saved again when there was room")


def two_owners(trial: SupervisedRun, fault_step: int) -> Result:
    """All of a run is stopped, another start takes over, then the first wakes up: it leaves without a write."""
    launcher = trial.start()
    trial.wait_for_step(fault_step)
    processes = [launcher.pid, *ranks_of(launcher.pid).values()]
    for pid in processes:
        os.kill(pid, signal.SIGSTOP)
    again = trial.start()
    result = _recover(trial, 1, "the stopped owner woke up, left with 75, wrote nothing")
    files = _hashes(trial.run)
    for pid in processes:
        os.kill(pid, signal.SIGCONT)
    trial.end(launcher, 75)
    trial.end(again, 0)
    if changed := [path for path, digest in files.items() if digest and _hash(path) not in (digest, None)]:
        raise SupervisedRunError(f"a checkpoint was changed after the takeover: {changed[0]}")
    return result


def non_finite(trial: SupervisedRun, fault_step: int) -> Result:
    """A learning rate of 1e30 from a checkpoint on: all ranks stop at one step, once, and the checkpoint stands."""
    _stop(trial, fault_step)
    good = trial.run.checkpoint(trial.committed_step())
    run = RunDir(trial.run.path.with_name(f"{trial.run.name}-lr"))
    poisoned = SupervisedRun(run, [*trial.job, "--checkpoint.resume", str(good), "--optim.lr", "1e30"])
    try:
        poisoned.end(poisoned.start(), 1)
    finally:
        poisoned.clear()
    outcome, attempt = read_outcome(run), poisoned.attempt()
    said = {rank: read_json(attempt.error(rank))["message"]["message"] for rank in (0, 1)}
    if outcome is None or outcome["reason"] != "non_finite" or attempt.number != 1:
        raise SupervisedRunError(f"expected one attempt that ends as non_finite, found {attempt.number} and {outcome}")
    if said[0] != said[1] or f" at step {poisoned.committed_step() + 2}" not in said[0]:
        raise SupervisedRunError(f"the ranks did not stop at one step: {said}")
    if poisoned.committed_step() != int(good.name.removeprefix("step_")) or find_corruption(
        run.checkpoint(outcome["step"] - 1)
    ):
        raise SupervisedRunError("the last good checkpoint does not stand")
    trial.end(trial.start(), 0)
    return Result(0, None, "all ranks stopped at one step, not retried; the last checkpoint stands")


FAULTS: dict[str, Callable[[SupervisedRun, int], Result]] = {
    "kill-rank": kill_rank,
    "kill-launcher": kill_launcher,
    "preempt": preempt,
    "hang": hang,
    "torn-checkpoint": torn_checkpoint,
    "disk-full": disk_full,
    "two-owners": two_owners,
    "non-finite": non_finite,
}


def strike(fault: str, trial: SupervisedRun, undisturbed: RunDir, fault_step: int) -> Result:
    """Run `trial` with `fault` after `fault_step`. Raises TrialError unless it ends as `undisturbed` did."""
    result = FAULTS[fault](trial, fault_step)
    if wrong := [*run_differences(undisturbed, trial.run), *gaps(trial.run)]:
        raise SupervisedRunError(wrong[0])
    return result


def _stop(trial: SupervisedRun, fault_step: int) -> float:
    """Start the run and ask it to stop after `fault_step`; seconds until it has saved and gone."""
    launcher = trial.start()
    trial.wait_for_step(fault_step)
    asked = time.monotonic()
    launcher.send_signal(signal.SIGTERM)
    trial.end(launcher, 75)
    return time.monotonic() - asked


def _recover(trial: SupervisedRun, before: int, seen: str, since: float | None = None) -> Result:
    """Wait until an attempt after number `before` is further than the run was when the fault struck, `since`."""
    since = time.monotonic() if since is None else since
    wait_until(lambda: trial.attempt().number > before, f"an attempt after {before}", trial.launchers[-1])
    step = trial.step()
    wait_until(lambda: trial.step() > step, f"a step after {step}", trial.launchers[-1])
    return Result(step - trial.went_on_from(), time.monotonic() - since, seen)


def _hashes(run: RunDir) -> dict[Path, str | None]:
    """The hash of each file of each checkpoint, None where it has been pruned meanwhile."""
    paths = [run.checkpoint(step) / name for step in checkpoint_steps(run) for name in (MODEL, OPTIMIZER, STATE)]
    return {path: _hash(path) for path in paths}


def _hash(path: Path) -> str | None:
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError:
        return None
