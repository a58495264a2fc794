"""Ask git about code that runs or is copied: its commit, and the files that belong to it.

Two kinds of copies have no .git, but a file that tells both: a job's snapshot, and what `login` has synced to a
cluster. Only the standard library is imported: a laptop may have nothing else.
"""

import json
import subprocess
from contextlib import suppress
from pathlib import Path
from typing import Any

from fnet_dist.errors import ConfigError

# In the root of a copy, JSON: its commit, whether there were changes, its files.
SNAPSHOT = "snapshot.json"  # `fnet submit` has copied it for a job
SYNCED = ".fnet-synced.json"  # `login` has sent it (jobs/login.py)
SECRETS = frozenset({".env", ".netrc", "_netrc", ".pypirc"})  # names of files with keys, which no copy needs
LARGEST_BYTES = 100_000_000  # more is most likely data or weights, in every run's directory once more


def git_state(root: Path) -> dict[str, Any]:
    """Return `commit` and `dirty` of the code at `root`; both None if it is no checkout, or git is missing."""
    for record in (SNAPSHOT, *([] if (root / ".git").exists() else [SYNCED])):
        if (copied := read_record(root / record)) is not None:
            return {key: copied[key] for key in ("commit", "dirty")}
    try:
        commit, changes = (
            subprocess.check_output(
                ["git", "-C", root, *arguments], stderr=subprocess.DEVNULL, text=True, timeout=10
            ).strip()
            for arguments in (["rev-parse", "HEAD"], ["status", "--porcelain"])
        )
    except (OSError, subprocess.SubprocessError):
        return {"commit": None, "dirty": None}
    return {"commit": commit, "dirty": bool(changes)}


def git_files(folder: Path) -> set[Path] | str:
    """Return the files below `folder` that git tracks, or would, relative to it; git's error as text."""
    for root in (folder, *folder.parents):
        if (root / ".git").exists():
            break
        if (synced := read_record(root / SYNCED)) is not None:
            paths = [root / name for name in synced["files"]]
            return {path.relative_to(folder) for path in paths if path.is_relative_to(folder)}
    found = set[Path]()
    for which in (["--cached", "--recurse-submodules"], ["--others", "--exclude-standard"]):
        command = ["git", "-C", str(folder), "ls-files", "-z", *which]
        listed = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        if listed.returncode != 0:
            return listed.stderr.strip() or "git ls-files failed"
        found |= {Path(name) for name in listed.stdout.split("\0") if name}
    return found


def code_files(root: Path) -> list[Path]:
    """Return the sorted files of the code at `root`, relative to it; none of `runs`, and none that holds keys.

    Raises ConfigError if git does not know them, or if they have more than LARGEST_BYTES together.
    """
    found = git_files(root)
    if isinstance(found, str):
        raise ConfigError(f"no copy of {root}: {found}; make it a git checkout")
    here = (path for path in found if path.parts[0] not in ("runs", SNAPSHOT) and path.name not in SECRETS)
    files = sorted(path for path in here if (root / path).is_symlink() or (root / path).is_file())
    if not files:
        raise ConfigError(f"no copy of {root}: git ignores it")
    sizes = {path: (root / path).lstat().st_size for path in files}
    if sum(sizes.values()) > LARGEST_BYTES:
        largest = [f"{path} ({sizes[path] / 1e6:,.1f} MB)" for path in sorted(files, key=lambda path: -sizes[path])[:5]]
        raise ConfigError(
            f"the code at {root} has {sum(sizes.values()) / 1e6:,.0f} MB, expected at most {LARGEST_BYTES / 1e6:,.0f}; "
            f"add to .gitignore what is no code: {', '.join(largest)}"
        )
    return files


def read_record(path: Path) -> dict[str, Any] | None:
    """Return what the record of a copy says; None if there is none, or a damaged one."""
    with suppress(OSError, ValueError):
        record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return record
    return None
