"""Which commit the code that runs is of."""

import subprocess
from pathlib import Path
from typing import Any

from fnet_dist.run.run_dir import SNAPSHOT, read_json


def git_state(root: Path) -> dict[str, Any]:
    """Commit of the checkout at `root` and whether it has changes; None where it is no checkout or git is missing.

    A snapshot of the code has no history: it was told when it was taken.
    """
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
