"""The code that a run was trained with, file by file: a start with edited code says so. No torch here."""

import hashlib
from collections.abc import Mapping
from typing import Any

from fnet_dist.config.load_recipe import recipe_files
from fnet_dist.processes import CODE_ROOT


def source_hashes(recipe: str) -> dict[str, str]:
    """Return {file: first digits of its SHA-256} of the trainer's code and the recipe's."""
    package = CODE_ROOT / "fnet_dist"
    files = {path.relative_to(CODE_ROOT).as_posix(): path for path in package.rglob("*.py")}
    files |= {name: path for name, path in recipe_files(recipe).items() if not path.is_relative_to(package)}
    return {name: hashlib.sha256(path.read_bytes()).hexdigest()[:12] for name, path in sorted(files.items())}


def edited_sources(manifest: Mapping[str, Any] | None, now: Mapping[str, str]) -> str | None:
    """Return one line that names the files which differ in `now` from the attempt in `manifest`; None if none does."""
    before = (manifest or {}).get("sources")  # a run of format 1 has none
    if before is None:
        return None
    then = before["files"]
    changed = [name for name in sorted({*then, *now}) if then.get(name) != now.get(name)]
    if not changed:
        return None
    more = f" and {len(changed) - 5} more" if len(changed) > 5 else ""
    return f"the code has changed since attempt {before['attempt']}: {', '.join(changed[:5])}{more}"
