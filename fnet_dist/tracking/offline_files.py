"""Count the rows in the SDK's offline files (one per attempt), repair a file after a kill, mark files as sent.

The files are LevelDB logs behind a header of their own: blocks of 32 KiB that hold chunks with a header of 7 bytes; a
record is one or more chunks (https://github.com/google/leveldb/blob/main/doc/log_format.md).
"""

import json
import struct
import subprocess
from pathlib import Path

from fnet_dist.run.run_dir import RunDir
from fnet_dist.versions import private_names

_BLOCK, _HEADER = 32768, 7  # bytes; the file's own header happens to have 7 bytes too
_ZERO, _FULL, _LAST = 0, 1, 4  # types of chunks; 2 and 3 begin and continue a record


def offline_files(run: RunDir) -> list[Path]:
    """Return the SDK's offline files of a run, in the order of their start."""
    return sorted(run.wandb.glob("offline-run-*/run-*.wandb"))


def rows_written(run: RunDir) -> int:
    """Return the number of rows in all offline files. It is read back from disk: a kill loses what was not flushed."""
    rows = 0
    for path in offline_files(run):
        with private_names("wandb"):
            from wandb.util import get_core_path

        # wandb-core is called directly: the `wandb` command imports the whole SDK for each file.
        command = [get_core_path(), "leet", "inspect", "--no-observability", "--summary", "--json", "--run-file"]
        done = subprocess.run([*command, str(path)], capture_output=True, text=True, timeout=120, check=True)
        last = json.loads(done.stdout)["step"]  # of the last whole row, counted from 0 in each file; None without rows
        rows += 0 if last is None else last + 1
    return rows


def mark_sent(run: RunDir) -> None:
    """Mark each file as sent in the SDK's own way (an empty file beside it): `wandb sync` passes over it."""
    for path in offline_files(run):
        path.with_name(f"{path.name}.synced").touch()


def make_whole(path: Path) -> None:
    """Cut off a record that a kill has left half written. Only the run's owner may call it.

    `wandb sync` sends such a file without marking it as sent, so a second `wandb sync` would send its rows again.
    """
    data = path.read_bytes()
    whole = _whole_length(data)
    if _HEADER <= whole < len(data):  # never below the file's header, without which it is no W&B file
        with path.open("r+b") as file:
            file.truncate(whole)


def _whole_length(data: bytes) -> int:
    """Return the offset at which the last whole record ends."""
    offset = whole = _HEADER
    while True:
        left = _BLOCK - offset % _BLOCK
        if left < _HEADER:  # no chunk fits: padding up to the next block
            offset += left
        if offset + _HEADER > len(data):
            return whole
        _, length, kind = struct.unpack_from("<IHB", data, offset)
        offset += _HEADER + length
        if kind == _ZERO or offset > len(data):  # zeros: space that was allocated, but not written before the kill
            return whole
        if kind in (_FULL, _LAST):
            whole = offset
