"""Checkpoints on disk: complete or absent, verified before anything is parsed, pruned. No torch here.

A flipped bit in a tensor is valid safetensors, and loads without an error. Therefore all bytes are read and compared
with their SHA-256 before anything is parsed.
"""

import hashlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

from fnet_dist.errors import CheckpointError
from fnet_dist.run.log import LOGGER
from fnet_dist.run.run_dir import RunDir, fsync, read_json, write_json

MODEL = "model.safetensors"  # weights
OPTIMIZER = "optimizer.safetensors"  # tensors of the optimizer
STATE = "state.json"  # small values, the SHA-256 of both files, and last the SHA-256 of its own content above
FORMAT = 2  # 1 had the optimizer's parameters by number, and no evaluations; it is still read
# The values of a checkpoint before the run's first evaluation (see TrainState).
NO_EVALUATION: Mapping[str, Any] = {"evaluated_step": 0, "best_step": 0, "best_value": None, "not_better": 0}


@dataclass(frozen=True)
class CheckpointBytes:
    """A checkpoint's content: `values` go into state.json, `step` and `run_id` among them; the rest is bytes."""

    values: Mapping[str, Any]
    model: bytes
    optimizer: bytes


class CorruptCheckpointError(Exception):
    """A checkpoint differs from what was written; the text says where and how."""


def checkpoint_steps(run: RunDir) -> list[int]:
    """Return the steps that have a checkpoint, valid or not, newest first; symbolic links are ignored."""
    try:
        entries = list(os.scandir(run.checkpoints))  # not glob: it would hide that the directory cannot be read
    except FileNotFoundError:
        return []
    found = [(re.fullmatch(r"step_(\d{8}|[1-9]\d{8,})", entry.name), entry) for entry in entries]
    return sorted((int(name[1]) for name, entry in found if name and entry.is_dir(follow_symlinks=False)), reverse=True)


def newest_step(run: RunDir) -> int:
    """Return the step of the newest checkpoint, valid or not; 0 if there is none."""
    return next(iter(checkpoint_steps(run)), 0)


def save_checkpoint(run: RunDir, content: CheckpointBytes, attempt: int, before_commit: Callable[[], None]) -> None:
    """Commit `content` as the checkpoint of its step, or change nothing and raise OSError.

    A kill at any point leaves the old state or the new one. `before_commit` raises if this process may not commit any
    more. A valid checkpoint of the same step is kept, a corrupt one is moved aside.
    """
    run.checkpoints.mkdir(exist_ok=True)
    final = run.checkpoint(content.values["step"])
    temporary = run.checkpoints / f".{final.name}-{secrets.token_hex(8)}"
    temporary.mkdir()
    try:
        for name, data in _files_of(content).items():
            _write(temporary / name, data)  # with fsync
        fsync(temporary)  # the names of the files in it
        before_commit()  # as late as possible: the fsyncs may have taken longer than STALE_S
        if final.is_symlink() or (final.exists() and find_corruption(final) is not None):
            # rename(2) does not replace a directory that holds files. Moved, not removed: for an examination.
            suffixes = ("" if number == 1 else f"-{number}" for number in count(1))
            aside = (final.with_name(f"{final.name}.damaged-{attempt}{suffix}") for suffix in suffixes)
            final.rename(next(path for path in aside if not path.exists()))
        if not final.exists():
            temporary.rename(final)  # the commit
            fsync(run.checkpoints)  # only then does a power cut not undo the rename
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def read_checkpoint(path: Path, run_id: str | None = None) -> CheckpointBytes:
    """Return the content of the checkpoint directory `path`, every byte verified.

    Raise CorruptCheckpointError if it is corrupt, or not of run `run_id` if one is given.
    """
    values = _read_state(path / STATE)
    if path.name != f"step_{values['step']:08d}":
        raise CorruptCheckpointError(f"{path / STATE} is of step {values['step']}")
    if run_id is not None and values["run_id"] != run_id:
        raise CorruptCheckpointError(f"{path / STATE} belongs to another run ({values['run_id']}, this is {run_id})")
    files = {name: _read(path / name) for name in (MODEL, OPTIMIZER)}
    for name, data in files.items():
        found, written = hashlib.sha256(data).hexdigest(), values["files"][name]
        if found != written:
            raise CorruptCheckpointError(f"{path / name}: sha256 is {found[:12]}, written was {written[:12]}")
    return CheckpointBytes(values, files[MODEL], files[OPTIMIZER])


def find_corruption(path: Path, run_id: str | None = None) -> str | None:
    """Return the defect of the checkpoint in `path`, or None if it is valid."""
    try:
        read_checkpoint(path, run_id)
    except CorruptCheckpointError as error:
        return str(error)
    return None


def newest_valid(run: RunDir, run_id: str) -> CheckpointBytes | None:
    """Return the newest valid checkpoint, None if there is none at all; log a warning for each corrupt one."""
    found = []
    for step in checkpoint_steps(run):
        try:
            return read_checkpoint(run.checkpoint(step), run_id)
        except CorruptCheckpointError as error:
            found.append(str(error))
            LOGGER.warning(f"damaged checkpoint: {error}; using the one before")
    if found:  # an error, not a start from scratch: that would hide the loss
        raise CheckpointError(
            f"all {len(found)} checkpoints in {run.checkpoints} are damaged (newest: {found[0]}); restore one, or "
            "train from scratch in a new directory: --checkpoint.resume new"
        )
    return None


def write_best(run: RunDir, step: int, monitor: str, value: float | None) -> None:
    """Name the checkpoint of `step` as the best, in best.json: `prune` then keeps it."""
    write_json(run.best, {"step": step, "monitor": monitor, "value": value, "checkpoint": run.checkpoint(step).name})


def id_of_checkpoints(run: RunDir) -> str | None:
    """Return the id of the run that the newest readable checkpoint is of, None if there is none."""
    for step in checkpoint_steps(run):
        with suppress(CorruptCheckpointError):
            return str(_read_state(run.checkpoint(step) / STATE)["run_id"])
    return None


def best_step(run: RunDir) -> int | None:
    """Return the step of the best evaluation whose checkpoint is kept, None if there is none."""
    return None if (best := read_json(run.best)) is None else int(best["step"])


def prune(run: RunDir, run_id: str, keep_last: int, before_each: Callable[[], None]) -> None:
    """Remove the checkpoints older than the `keep_last` newest valid ones, but not the best one (best.json).

    `before_each` may raise to stop it.
    """
    valid = 0  # a corrupt checkpoint does not count: it must not displace one that can be loaded
    best = best_step(run)
    for step in checkpoint_steps(run):
        path = run.checkpoint(step)
        if valid < keep_last or step == best:
            valid += find_corruption(path, run_id) is None
            continue
        before_each()
        # Rename first, in one atomic step: a kill during rmtree must not leave half a checkpoint under its name.
        aside = path.with_name(f".pruned-{path.name}")
        shutil.rmtree(aside, ignore_errors=True)  # left by a kill
        path.rename(aside)
        shutil.rmtree(aside, ignore_errors=True)


def remove_temp_dirs(run: RunDir) -> None:
    """Remove what a killed save or prune left behind. For the run's owner, before it saves anything."""
    for left in run.checkpoints.glob(".*"):
        if left.is_dir() and not left.is_symlink():
            shutil.rmtree(left, ignore_errors=True)


def bytes_needed(content: CheckpointBytes) -> int:
    """Return the size of the checkpoint's files in bytes."""
    return sum(map(len, _files_of(content).values()))


def _files_of(content: CheckpointBytes) -> dict[str, bytes]:
    """Return the bytes of each file, state.json last: it holds the hashes of the others."""
    files = {MODEL: content.model, OPTIMIZER: content.optimizer}
    hashes = {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}
    text = json.dumps({"format": FORMAT, **content.values, "files": hashes}, indent=2, allow_nan=False)
    body = text.removesuffix("\n}").encode()
    return {**files, STATE: body + _seal(body)}


def _seal(body: bytes) -> bytes:
    """Return the last line of state.json, which closes its JSON, after the lines `body`."""
    return f',\n  "sha256": "{hashlib.sha256(body).hexdigest()}"\n}}\n'.encode()


def _read_state(path: Path) -> dict[str, Any]:
    """Return the JSON in state.json without its last line, the seal; parse it only after the seal was compared."""
    data = _read(path)
    body = data[: -len(_seal(b""))]
    if data != body + _seal(body):
        raise CorruptCheckpointError(f"{path}: its last line is not the sha256 of the lines above it")
    values: dict[str, Any] = json.loads(body + b"\n}")
    if (found := values.pop("format")) not in (1, FORMAT):
        raise CorruptCheckpointError(f"{path}: format {found}, expected {FORMAT}: written by another version")
    return values


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise CorruptCheckpointError(f"{path}: {error.strerror}") from None


def _write(path: Path, data: bytes) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o660)
    try:
        view = memoryview(data)
        while view:  # write(2) takes at most 2 GiB at a time, and less on a disk that is nearly full
            view = view[os.write(descriptor, view) :]
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
