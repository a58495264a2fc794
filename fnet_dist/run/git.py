"""Find the git commit of the code that runs."""

import subprocess
from pathlib import Path
from typing import Any

from fnet_dist.run.run_dir import SNAPSHOT, read_json


def git_state(root: Path) -> dict[str, Any]:
    """Return `commit` and `dirty` of the code at `root`; both None if it is no checkout, or git is missing."""
    if (snapshot := read_json(root / SNAPSHOT)) is not None:  # a Slurm job's code has no .git: `fnet submit` wrote it
        return {key: snapshot[key] for key in ("commit", "dirty")}
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
