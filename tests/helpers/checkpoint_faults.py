"""Test the save protocol under faults: a kill at every system call, a full disk, corrupt files.

Functions of a folder, a seed and a count. They return how many of how many cases passed and print the others, so that a
short test and a long soak share the code. No torch here.
"""

import errno
import os
import resource
import shutil
import signal
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from random import Random
from typing import Any
from unittest.mock import patch

from fnet_dist.checkpoint.storage import (
    MODEL,
    OPTIMIZER,
    STATE,
    CheckpointBytes,
    checkpoint_steps,
    find_corruption,
    newest_valid,
    prune,
    remove_temp_dirs,
    save_checkpoint,
)
from fnet_dist.run.run_dir import RunDir
from tests.helpers.log_lines import log_lines

RUN_ID = "5eed" * 4
KEEP = 2
CALLS = ("open", "write", "fsync", "close", "mkdir", "rename", "replace", "link", "unlink", "remove", "rmdir")


def make_content(step: int, random: Random, run_id: str = RUN_ID) -> CheckpointBytes:
    """Return a checkpoint's content like the trainer's: two files of bytes (zeros among them), and small values."""
    values = {"run_id": run_id, "step": step, "epoch": 1, "epoch_loss_sum": random.random(), "optimizer_state": {}}
    model, optimizer = (random.randbytes(size) + bytes(600) + random.randbytes(size) for size in (900, 1900))
    return CheckpointBytes(values, model, optimizer)


def make_run(
    path: Path, random: Random, steps: tuple[int, ...], run_id: str = RUN_ID
) -> tuple[RunDir, list[CheckpointBytes]]:
    """Make a run directory with a checkpoint of each of `steps`; return it and their contents."""
    run = RunDir(path)
    run.path.mkdir(parents=True)
    contents = [make_content(step, random, run_id) for step in steps]
    for content in contents:
        save_checkpoint(run, content, 1, lambda: None)
    return run, contents


def same(found: CheckpointBytes | None, written: CheckpointBytes) -> bool:
    """Return True if `found` equals what was written, byte for byte."""
    if found is None:
        return False
    values = {key: value for key, value in found.values.items() if key != "files"}
    return (values, found.model, found.optimizer) == (written.values, written.model, written.optimizer)


def good_steps(run: RunDir) -> list[int]:
    """Return the steps of the valid checkpoints, newest first."""
    return [step for step in checkpoint_steps(run) if find_corruption(run.checkpoint(step), RUN_ID) is None]


def hidden(run: RunDir) -> list[str]:
    """Return the names of temporary directories."""
    return sorted(path.name for path in run.checkpoints.glob(".*")) if run.checkpoints.exists() else []


def holds(check: Callable[[], None], case: str) -> bool:
    """Return True if `check` passes; else print `case` and the failed assertion."""
    try:
        check()
    except AssertionError as error:
        print(f"{case}: {error}", flush=True)
        return False
    return True


# Kills ----------------------------------------------------------------------------------------------------------------


def save_kills(folder: Path, seed: int, kills: int, every: int = 1) -> tuple[int, int]:
    """Kill a save and its pruning at each `every`-th system call in each situation, until there were `kills` or more.

    After each kill, the newest valid checkpoint is the old one or the new one, no kept checkpoint is lost, and the next
    owner removes temporary directories and saves.
    """
    random, held, of = Random(seed), 0, 0
    for turn in count(1):
        for situation in (("first", (), ()), ("later", (10, 20), ()), ("over a damaged one", (10, 20, 30), (30,))):
            good, done = _kill_at_each_call(folder / f"{turn} {situation[0]}", random, *situation[1:], seed, every)
            held, of = held + good, of + done
        if of >= kills:
            break
    return held, of


def _kill_at_each_call(
    folder: Path, random: Random, steps: tuple[int, ...], damaged: tuple[int, ...], seed: int, every: int
) -> tuple[int, int]:
    made, contents = make_run(folder / "made", random, steps)
    for step in damaged:
        (made.checkpoint(step) / MODEL).write_bytes(b"")
    old = [content for content in contents if content.values["step"] not in damaged]
    new, largest = make_content(30, random), random.choice([300, 1000, 1 << 20])
    held = of = 0
    for call in count(random.randint(1, every), every):
        run = RunDir(Path(shutil.copytree(made.path, folder / str(call))))
        killed = _in_child(lambda run=run: _save_and_prune(run, new), call, largest)
        case = f"{folder.name}, call {call}, writes of at most {largest} bytes, seed {seed}"
        good = holds(lambda run=run, killed=killed: _check_after_kill(run, old, new, {*damaged}, killed), case)
        shutil.rmtree(run.path)
        if not killed:
            assert good, f"not even undisturbed: {case}"
            return held, of
        held, of = held + good, of + 1
    raise AssertionError("unreachable")


def _check_after_kill(
    run: RunDir, old: list[CheckpointBytes], new: CheckpointBytes, damaged: set[int], killed: bool
) -> None:
    found = newest_valid(run, RUN_ID)
    may_be_old = killed and (same(found, old[-1]) if old else found is None)
    assert same(found, new) or may_be_old, f"found {found and found.values}"
    assert len(good_steps(run)) >= min(len(old), KEEP), "one that counts is lost"
    assert {*checkpoint_steps(run)} - {*good_steps(run)} <= damaged, "half of one under its name"
    assert killed or hidden(run) == [], "a temporary after a whole save"
    remove_temp_dirs(run)
    assert hidden(run) == [], "temporary directories are left"
    _save_and_prune(run, new)
    assert same(newest_without_warning(run, RUN_ID), new), "the next save"
    assert good_steps(run) == [30, 20][: len(old) + 1], "the next pruning"


def _save_and_prune(run: RunDir, content: CheckpointBytes) -> None:
    save_checkpoint(run, content, 1, lambda: None)
    prune(run, RUN_ID, KEEP, lambda: None)


def newest_without_warning(run: RunDir, run_id: str) -> CheckpointBytes | None:
    """Return the newest valid checkpoint; no other one may be corrupt."""
    with log_lines() as lines:
        found = newest_valid(run, run_id)
    assert lines == []
    return found


def _in_child(work: Callable[[], None], call: int, largest: int) -> bool:
    """Run `work` in a forked process that is killed at system call number `call`; return True if it was killed."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # a fork beside threads: this one only calls and dies
        child = os.fork()
    if child == 0:
        try:
            _die_at(call, largest)
            work()
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    assert code in (0, -signal.SIGKILL), f"the save failed: {code}"
    return code != 0


def _die_at(call: int, largest: int) -> None:
    """Let this process be killed at system call number `call` from now on; half of a write is done before that.

    Writes are cut to `largest` bytes, which a disk may do at any time.
    """
    calls, really = count(1), {name: getattr(os, name) for name in CALLS}

    def wrap(name: str) -> Callable[..., Any]:
        def wrapped(*arguments: Any, **options: Any) -> Any:
            if name == "write":
                arguments = (arguments[0], arguments[1][:largest])
            if next(calls) == call:
                if name == "write":
                    really["write"](arguments[0], arguments[1][: len(arguments[1]) // 2])
                os.kill(os.getpid(), signal.SIGKILL)
            return really[name](*arguments, **options)

        return wrapped

    for name in CALLS:
        setattr(os, name, wrap(name))


# A full disk ----------------------------------------------------------------------------------------------------------


def full_disks(folder: Path, seed: int, offsets: int) -> tuple[int, int]:
    """Let the disk be full at `offsets` bytes of a save: nothing is lost or left over, and the next save succeeds.

    The first and the last byte of each file are among them.
    """
    random = Random(seed)
    run, contents = make_run(folder / "full", random, (10, 20))
    new = make_content(30, random)
    sizes = _sizes_on_disk(folder / "measured", new)
    places = {(name, at) for name, size in sizes.items() for at in (0, size - 1)}
    while len(places) < offsets:
        name = random.choice([MODEL, OPTIMIZER, STATE])
        places.add((name, random.randrange(sizes[name])))
    before = sorted(path.name for path in run.checkpoints.iterdir())

    def check(name: str, at: int) -> None:
        with _full_at(name, at):
            refused = None
            try:
                save_checkpoint(run, new, 1, lambda: None)
            except OSError as error:
                refused = error.errno
            assert refused == errno.EFBIG, "saved on a full disk"
        assert sorted(path.name for path in run.checkpoints.iterdir()) == before, "something is left, or lost"
        assert same(newest_without_warning(run, RUN_ID), contents[-1]), "the old one"

    held = sum(
        holds(lambda name=name, at=at: check(name, at), f"full at byte {at} of {name}, seed {seed}")
        for name, at in sorted(places)
    )
    save_checkpoint(run, new, 1, lambda: None)
    assert same(newest_without_warning(run, RUN_ID), new)
    return held, len(places)


def _sizes_on_disk(folder: Path, content: CheckpointBytes) -> dict[str, int]:
    run = RunDir(folder)
    run.path.mkdir()
    save_checkpoint(run, content, 1, lambda: None)
    return {path.name: path.stat().st_size for path in run.checkpoint(content.values["step"]).iterdir()}


@contextmanager
def _full_at(name: str, at: int) -> Iterator[None]:
    """Let writes to the file `name` fail from byte `at` on."""
    really, (soft, hard) = os.open, resource.getrlimit(resource.RLIMIT_FSIZE)

    def opened(path: Any, *arguments: Any, **options: Any) -> int:
        if Path(path).name == name:
            resource.setrlimit(resource.RLIMIT_FSIZE, (at, hard))
        return really(path, *arguments, **options)

    try:
        with patch.object(os, "open", opened):
            yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def save(run: RunDir, content: CheckpointBytes, attempt: int = 7) -> None:
    """Save `content` as an attempt that owns the run."""
    save_checkpoint(run, content, attempt, lambda: None)


def spoil(run: RunDir, step: int, name: str = MODEL) -> None:
    """Corrupt a file of the checkpoint of `step`."""
    (run.checkpoint(step) / name).write_bytes(b"spoilt")


def names(run: RunDir) -> list[str]:
    """Return the names in the directory of checkpoints."""
    return sorted(path.name for path in run.checkpoints.iterdir())
