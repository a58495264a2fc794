"""Share a run with a group. The mode of its directory says so, whatever settings a later process has."""

import os
import pwd
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from fnet_dist.run.run_dir import RunDir

Mode = Literal["private", "group"]  # run.mode


def make_run_dir(path: Path, mode: Mode) -> None:
    """Make a run's directory if there is none, with mode 0700, or 2770 for "group"; then do as share_files."""
    if not path.exists():
        if mode == "group":
            os.umask(0o007)  # the folder of all runs, if it is new: others of the group make runs in it
        path.mkdir(mode=0o700, parents=True, exist_ok=True)  # parents get the umask's mode
        if mode == "group":
            path.chmod(0o2770)  # what is made in it has its group: that of the folder of all runs, if that is setgid
    share_files(path)


def share_files(path: Path) -> None:
    """If the run at `path` is shared, let this process and those that it starts make files that the group may write."""
    if is_shared(path):
        os.umask(0o007)


@contextmanager
def closed_files() -> Iterator[int]:
    """Inside the block, new files have mode 0600, in a shared run too: they may hold keys. Yield the previous umask."""
    before = os.umask(0o077)
    try:
        yield before
    finally:
        os.umask(before)


def is_shared(path: Path) -> bool:
    """Return True if the run's directory at `path` is its group's too."""
    try:
        mode = path.stat().st_mode
    except OSError:
        return False
    return mode & (stat.S_ISGID | stat.S_IRWXG) == stat.S_ISGID | stat.S_IRWXG


def other_owner(run: RunDir) -> str | None:
    """Return the user who made the shared `run`; None for this process's user, for root, and if it is not shared."""
    if not is_shared(run.path) or (user := run.path.stat().st_uid) == os.geteuid() or os.geteuid() == 0:
        return None
    try:
        return pwd.getpwuid(user).pw_name
    except KeyError:
        return f"user {user}"
