"""Find the git commit of the code that runs."""

import subprocess
from pathlib import Path
from typing import Any

from fnet_dist.run.run_dir import SNAPSHOT, read_json


def git_state(root: Path) -> dict[str, Any]:
    """Return `commit` and `dirty` of the code at `root`; both None if it is no checkout, or git is missing."""
    # The copy of the code that a Slurm job runs has no .git: `jobs submit` recorded the commit when it made the copy.
    snapshot = read_json(root / SNAPSHOT)
    if snapshot is not None:
        return {key: snapshot[key] for key in ("commit", "dirty")}
    try:
        commit, changes = (
            subprocess.run(
                ["git", "-C", str(root), *arguments], capture_output=True, text=True, timeout=10, check=True
            ).stdout.strip()
            for arguments in (["rev-parse", "HEAD"], ["status", "--porcelain"])
        )
    except (OSError, subprocess.SubprocessError):
        return {"commit": None, "dirty": None}
    return {"commit": commit, "dirty": bool(changes)}
