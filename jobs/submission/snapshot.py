"""Copy the checkout for a job: edits that are made while the job is queued do not change what it runs."""

import hashlib
import shutil
import subprocess
import tempfile
from collections.abc import Iterable
from pathlib import Path

from fnet_dist.errors import ConfigError
from fnet_dist.processes import CODE_ROOT
from fnet_dist.run.git import git_state
from fnet_dist.run.run_dir import SNAPSHOT, read_json, write_json

LARGEST_BYTES = 100_000_000  # more is most likely data or weights, in every run's directory once more
DIGITS = 12  # 48 bits: the few copies of one run do not collide


def snapshot_path(into: Path) -> Path:
    """Return the directory that take_snapshot(CODE_ROOT, into) will give, without writing anything."""
    return into / digest_of(CODE_ROOT, code_files(CODE_ROOT))


def take_snapshot(root: Path, into: Path) -> Path:
    """Copy the code at `root` (tracked, or untracked and not ignored) to `into`/DIGEST; return that directory. The same
    code is copied once. Raises ConfigError if it is in no git checkout, or too large."""
    files = code_files(root)
    code = into / digest_of(root, files)
    if code.exists() and is_whole(code):
        return code
    into.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=into, prefix=".copy-", ignore_cleanup_errors=True) as temporary:
        copy = Path(temporary) / "code"
        for file in files:
            (copy / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(root / file, copy / file, follow_symlinks=False)
        write_json(copy / SNAPSHOT, {**git_state(root), "files": [file.as_posix() for file in files]})
        if code.exists():  # damaged
            code.rename(Path(temporary) / "before")
        copy.rename(code)  # atomic: no job finds half a copy
    return code


def code_files(root: Path) -> list[Path]:
    """Return the sorted files of the code at `root`, relative to it; none of `runs`. Raises ConfigError if git does not
    know them, or if they have more than LARGEST_BYTES together."""
    found = set[Path]()
    for which in (["--cached", "--recurse-submodules"], ["--others", "--exclude-standard"]):
        listed = subprocess.run(
            ["git", "-C", str(root), "ls-files", "-z", *which], capture_output=True, text=True, timeout=60, check=False
        )
        if listed.returncode != 0:
            raise ConfigError(
                f"no snapshot of {root}: {listed.stderr.strip() or 'git ls-files failed'}; make it a git checkout, or "
                "run the code where it lies: --no-snapshot"
            )
        found |= {Path(name) for name in listed.stdout.split("\0") if name}
    here = (path for path in found if path.parts[0] not in ("runs", SNAPSHOT))
    files = sorted(path for path in here if (root / path).is_symlink() or (root / path).is_file())
    if not files:
        raise ConfigError(f"no snapshot of {root}: git ignores it; run the code where it lies: --no-snapshot")
    sizes = {path: (root / path).lstat().st_size for path in files}
    if sum(sizes.values()) > LARGEST_BYTES:
        largest = [f"{path} ({sizes[path] / 1e6:,.1f} MB)" for path in sorted(files, key=lambda path: -sizes[path])[:5]]
        raise ConfigError(
            f"the code at {root} has {sum(sizes.values()) / 1e6:,.0f} MB, expected at most {LARGEST_BYTES / 1e6:,.0f}; "
            f"add to .gitignore what is no code: {', '.join(largest)}"
        )
    return files


def is_whole(code: Path) -> bool:
    """Return True if the files of the snapshot `code` still have the digest that is its name."""
    try:  # only the copied files count: ranks leave compiled modules or a core dump beside them
        return digest_of(code, map(Path, (read_json(code / SNAPSHOT) or {"files": []})["files"])) == code.name
    except FileNotFoundError:
        return False


def digest_of(root: Path, files: Iterable[Path]) -> str:
    """Return the first DIGITS hex digits of a sha256 over names, modes and contents."""
    whole = hashlib.sha256()
    for file in files:
        path = root / file
        content = str(path.readlink()).encode() if path.is_symlink() else path.read_bytes()
        kind = "link" if path.is_symlink() else f"{path.stat().st_mode & 0o100:o}"
        whole.update(f"{file.as_posix()}\0{kind}\0{len(content)}\0".encode() + content)
    return whole.hexdigest()[:DIGITS]
