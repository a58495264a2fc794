"""Checkpoints on disk: whole or not there, verified before anything is parsed, pruned. No torch here.

checkpoints/step_00000938/
  model.safetensors  optimizer.safetensors
  state.json         small values, the sha256 of both files and, last, of its own other content

Bytes are made in memory, hashed, written into a temporary directory, fsynced, and the directory renamed: a reader sees
all of a checkpoint or nothing. torch.load and safetensors load flipped bits without a word, so the hash comes first.
"""

import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fnet_dist.errors import CheckpointError
from fnet_dist.run.run_dir import RunDir

MODEL, OPTIMIZER, STATE = "model.safetensors", "optimizer.safetensors", "state.json"
FORMAT = 1
_SEAL = ',\n  "sha256": "{}"\n}}\n'
_SEAL_BYTES = len(_SEAL.format("0" * 64))


@dataclass(frozen=True)
class CheckpointBytes:
    """What a checkpoint holds: `values` as JSON, among them `step` and `run_id`; `model` and `optimizer` as bytes."""

    values: Mapping[str, Any]
    model: bytes
    optimizer: bytes


class CorruptCheckpointError(Exception):
    """A checkpoint that is not what was written; the text says where and how it differs."""


def checkpoint_steps(run: RunDir) -> list[int]:
    """The steps of which there is a checkpoint, good or not, newest first; links count as nothing."""
    try:
        entries = list(os.scandir(run.checkpoints))
    except FileNotFoundError:
        return []
    found = [(re.fullmatch(r"step_(\d{8}|[1-9]\d{8,})", entry.name), entry) for entry in entries]
    return sorted((int(name[1]) for name, entry in found if name and entry.is_dir(follow_symlinks=False)), reverse=True)


def save_checkpoint(run: RunDir, content: CheckpointBytes, attempt: int, before_commit: Callable[[], None]) -> None:
    """Commit `content` as the checkpoint of its step, or leave everything as it was and raise OSError.

    `before_commit` is called when all is on disk but the name; it raises if this process may not commit any more. A
    good checkpoint of the same step stays, a damaged one is moved aside.
    """
    run.checkpoints.mkdir(exist_ok=True)
    final = run.checkpoint(content.values["step"])
    temporary = Path(tempfile.mkdtemp(prefix=f".{final.name}-", dir=run.checkpoints))
    try:
        for name, data in _files_of(content).items():
            _write(temporary / name, data)
        _sync(temporary)
        before_commit()
        if final.is_symlink() or (final.exists() and find_corruption(final) is not None):
            final.rename(_free_name(final, attempt))
        if not final.exists():
            temporary.rename(final)
            _sync(run.checkpoints)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def read_checkpoint(path: Path, run_id: str | None = None) -> CheckpointBytes:
    """The content of the checkpoint directory `path`, every byte of it verified; of run `run_id` where one is given.

    Raises DamagedError.
    """
    values = _unseal(path / STATE)
    if path.name != f"step_{values['step']:08d}":
        raise CorruptCheckpointError(f"{path / STATE} is of step {values['step']}")
    if run_id is not None and values["run_id"] != run_id:
        raise CorruptCheckpointError(f"{path / STATE} belongs to another run ({values['run_id']}, this is {run_id})")
    read = {name: _read(path / name) for name in (MODEL, OPTIMIZER)}
    for name, data in read.items():
        if (found := hashlib.sha256(data).hexdigest()) != values["files"][name]:
            raise CorruptCheckpointError(
                f"{path / name}: sha256 is {found[:12]}, written was {values['files'][name][:12]}"
            )
    return CheckpointBytes(values, read[MODEL], read[OPTIMIZER])


def find_corruption(path: Path, run_id: str | None = None) -> str | None:
    """What is wrong with the checkpoint in `path`; None if it is good."""
    try:
        read_checkpoint(path, run_id)
    except CorruptCheckpointError as error:
        return str(error)
    return None


def newest_valid(run: RunDir, run_id: str, say: Callable[[str], None]) -> CheckpointBytes | None:
    """The newest good checkpoint; None if there is none at all. Each damaged one on the way is said.

    Raises CheckpointError if there are some and all are damaged.
    """
    found = []
    for step in checkpoint_steps(run):
        try:
            return read_checkpoint(run.checkpoint(step), run_id)
        except CorruptCheckpointError as error:
            found.append(str(error))
            say(f"WARNING: damaged checkpoint: {error}; going on from the one before")
    if found:
        raise CheckpointError(
            f"all {len(found)} checkpoints in {run.checkpoints} are damaged (newest: {found[0]}); restore one, or "
            "start anew with --checkpoint.resume never"
        )
    return None


def import_checkpoint(source: Path, run: RunDir, run_id: str) -> None:
    """Make the good checkpoint in `source` the first of `run`."""
    content = read_checkpoint(source)
    save_checkpoint(
        run, CheckpointBytes({**content.values, "run_id": run_id}, content.model, content.optimizer), 0, lambda: None
    )


def prune(run: RunDir, run_id: str, keep_last: int, before_each: Callable[[], None]) -> None:
    """Remove what is older than the `keep_last` newest good checkpoints; links are not followed."""
    good = 0
    for step in checkpoint_steps(run):
        path = run.checkpoint(step)
        if good < keep_last:
            good += find_corruption(path, run_id) is None
            continue
        before_each()
        # First out of sight, in one step: a kill must not leave half a checkpoint under its name.
        aside = path.with_name(f".pruned-{path.name}")
        shutil.rmtree(aside, ignore_errors=True)
        path.rename(aside)
        shutil.rmtree(aside, ignore_errors=True)


def remove_temp_dirs(run: RunDir) -> None:
    """Remove what a kill left half written or half removed: for the owner of the run alone, before it saves."""
    for left in run.checkpoints.glob(".*"):
        if left.is_dir() and not left.is_symlink():
            shutil.rmtree(left, ignore_errors=True)


def bytes_needed(content: CheckpointBytes) -> int:
    """How much disk a checkpoint takes, without the file system's own."""
    return sum(map(len, _files_of(content).values()))


def _files_of(content: CheckpointBytes) -> dict[str, bytes]:
    files = {MODEL: content.model, OPTIMIZER: content.optimizer}
    hashes = {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}
    text = json.dumps({"format": FORMAT, **content.values, "files": hashes}, indent=2, allow_nan=False)
    body = text.removesuffix("\n}")
    sealed = body + _SEAL.format(hashlib.sha256(body.encode()).hexdigest())
    return {**files, STATE: sealed.encode()}


def _unseal(path: Path) -> dict[str, Any]:
    """The JSON in state.json without its seal, parsed only after the seal has been compared."""
    data = _read(path)
    body, seal = data[:-_SEAL_BYTES], data[-_SEAL_BYTES:]
    if seal != _SEAL.format(hashlib.sha256(body).hexdigest()).encode():
        raise CorruptCheckpointError(f"{path}: its last line is not the sha256 of what stands above it")
    values: dict[str, Any] = json.loads(body + b"\n}")
    if values["format"] != FORMAT:
        raise CorruptCheckpointError(
            f"{path}: format {values['format']}, expected {FORMAT}: written by another version"
        )
    return {key: value for key, value in values.items() if key != "format"}


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise CorruptCheckpointError(f"{path}: {error.strerror}") from None


def _write(path: Path, data: bytes) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        view = memoryview(data)
        while view:
            view = view[os.write(descriptor, view) :]
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sync(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _free_name(path: Path, attempt: int) -> Path:
    names = [
        path.with_name(f"{path.name}.damaged-{attempt}{suffix}") for suffix in ("", *map("-{}".format, range(2, 99)))
    ]
    return next(name for name in names if not name.exists())
