"""What the SDK writes while offline, a file an attempt: how many rows there are, made whole after a kill, marked sent.

The files are LevelDB logs behind a header of their own: blocks of 32 KiB, in them chunks with 7 bytes of header, a
record being one or more chunks (https://github.com/google/leveldb/blob/main/doc/log_format.md).
"""

import json
import struct
import subprocess
from pathlib import Path
from typing import Any

from wandb.util import get_core_path

from fnet_dist.run.run_dir import RunDir

_BLOCK, _HEADER = 32768, 7
_ZERO, _FULL, _LAST = 0, 1, 4  # kinds of chunks; the others, 2 and 3, begin and continue a record


def offline_files(run: RunDir) -> list[Path]:
    """The SDK's offline files of a run, in the order in which they were begun."""
    return sorted(run.wandb.glob("offline-run-*/run-*.wandb"))


def rows_written(run: RunDir) -> int:
    """How many rows all of them hold, read back: what a kill took with it is not there."""
    last_rows = [_inspect(path)["step"] for path in offline_files(run)]
    return sum(number + 1 for number in last_rows if number is not None)


def mark_sent(run: RunDir) -> None:
    """Leave the SDK's own mark beside each: `wandb sync` passes over them."""
    for path in offline_files(run):
        path.with_name(f"{path.name}.synced").touch()


def make_whole(path: Path) -> None:
    """Cut off a record that a kill has left half written: `wandb sync` sends such a file, but never marks it as sent,
    and would send it again. For whoever owns the run: nobody else writes to it."""
    data = path.read_bytes()
    whole = _whole_length(data)
    if _HEADER <= whole < len(data):
        with path.open("r+b") as file:
            file.truncate(whole)


def _whole_length(data: bytes) -> int:
    """Where the last whole record ends."""
    at = whole = _HEADER
    while True:
        left = _BLOCK - at % _BLOCK
        if left < _HEADER:  # too short for a chunk: filled up
            at += left
        if at + _HEADER > len(data):
            return whole
        _, length, kind = struct.unpack_from("<IHB", data, at)
        at += _HEADER + length
        if kind == _ZERO or at > len(data):
            return whole
        if kind in (_FULL, _LAST):
            whole = at


def _inspect(path: Path) -> dict[str, Any]:
    """What `wandb leet inspect --summary` says of a file, torn or not. `step` is W&B's number of the last whole row;
    `summary` can be of the row after it."""
    command = [get_core_path(), "leet", "inspect", "--no-observability", "--summary", "--json", "--run-file", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    found: dict[str, Any] = json.loads(done.stdout)
    return found
