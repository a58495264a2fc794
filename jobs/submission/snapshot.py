"""Copy the checkout for a job: edits that are made while the job is queued do not change what it runs."""

import hashlib
import shlex
import shutil
import tempfile
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path

from fnet_dist.config.load_recipe import DEFAULT_RECIPE, load_recipe, recipe_files
from fnet_dist.errors import ConfigError
from fnet_dist.processes import CODE_ROOT
from fnet_dist.run.git import SECRETS, SNAPSHOT, code_files, git_files, git_state
from fnet_dist.run.run_dir import read_json, write_json

DIGITS = 12  # 48 bits: the few copies of one run do not collide


def snapshot_path(into: Path, recipe: str = DEFAULT_RECIPE) -> Path:
    """Return the directory that take_snapshot(CODE_ROOT, into, recipe) will give, without writing anything."""
    return into / digest_of(job_files(CODE_ROOT, recipe))


def take_snapshot(root: Path, into: Path, recipe: str = DEFAULT_RECIPE) -> Path:
    """Copy the code at `root` (tracked, or untracked and not ignored) and the recipe's to `into`/DIGEST.

    Return that directory. The same code is copied once. Raises ConfigError if it is in no git checkout, or too large.
    """
    files = job_files(root, recipe)
    code = into / digest_of(files)
    if code.exists() and is_whole(code):
        return code
    into.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=into, prefix=".copy-", ignore_cleanup_errors=True) as temporary:
        copy = Path(temporary) / "code"
        for file, source in files.items():
            (copy / file).parent.mkdir(parents=True, exist_ok=True)
            if not source.is_symlink():  # a mode by the umask: the run may be its group's. What is closed stays so
                mode = source.stat().st_mode
                (copy / file).touch(mode=(0o777 if mode & 0o100 else 0o666) & (0o777 if mode & 0o077 else 0o700))
            shutil.copyfile(source, copy / file, follow_symlinks=False)
        write_json(copy / SNAPSHOT, {**git_state(root), "files": [file.as_posix() for file in files]})
        if code.exists():  # damaged
            code.rename(Path(temporary) / "before")
        copy.rename(code)  # atomic: no job finds half a copy
    return code


def job_files(root: Path, recipe: str) -> dict[Path, Path]:
    """Return {place in the copy: file} of the code at `root`, and of a recipe that lies elsewhere."""
    try:
        files = {path: root / path for path in code_files(root)}
    except ConfigError as error:
        raise ConfigError(f"{error}; or run the code where it lies: --no-snapshot") from None
    return dict(sorted({**recipe_sources(recipe), **files}.items()))


def recipe_sources(recipe: str) -> dict[Path, Path]:
    """Return {place below a directory of sys.path: file} of a recipe's package, or of a lone module's files."""
    load_recipe(recipe)
    top = import_module(recipe.partition(".")[0])
    folders = [Path(path).resolve() for path in getattr(top, "__path__", ())]
    if CODE_ROOT.resolve() / "fnet_dist" in folders:
        return {}
    if not folders:
        return {Path(name): path for name, path in recipe_files(recipe).items()}
    found = ((folder.parent, path) for folder in folders for path in _package_files(folder) if path.name not in SECRETS)
    return {path.relative_to(parent): path for parent, path in found}


def recipe_setup(code: Path, recipe: str) -> tuple[str, ...]:
    """Return the script's setup lines for a recipe that only the current directory has: a copy of the code has it too.

    One that is installed or on PYTHONPATH is found in the job as it is here.
    """
    if code != CODE_ROOT:
        return ()
    top = import_module(load_recipe(recipe).__name__.partition(".")[0])
    folder = Path([*getattr(top, "__path__", ()), top.__file__ or ""][0]).parent
    if folder == CODE_ROOT or folder != Path.cwd():
        return ()
    return (f"export PYTHONPATH=${{PYTHONPATH:+$PYTHONPATH:}}{shlex.quote(str(folder))}",)


def _package_files(folder: Path) -> list[Path]:
    """Return the files of a package that a job needs: those that git does not ignore, or all but caches."""
    listed = git_files(folder)
    if not isinstance(listed, str) and listed:
        return [folder / path for path in listed if (folder / path).is_file()]
    files = (path for path in folder.rglob("*") if path.is_file())
    inside = {path: path.relative_to(folder).parts for path in files}
    return [path for path, parts in inside.items() if not any(p[0] == "." or p == "__pycache__" for p in parts)]


def is_whole(code: Path) -> bool:
    """Return True if the files of the snapshot `code` still have the digest that is its name."""
    try:  # only the copied files count: ranks leave compiled modules or a core dump beside them
        files = map(Path, (read_json(code / SNAPSHOT) or {"files": []})["files"])
        return digest_of({file: code / file for file in files}) == code.name
    except FileNotFoundError:
        return False


def digest_of(files: Mapping[Path, Path]) -> str:
    """Return the first DIGITS hex digits of a sha256 over names, modes and contents of {place: file}."""
    whole = hashlib.sha256()
    for file, path in files.items():
        content = str(path.readlink()).encode() if path.is_symlink() else path.read_bytes()
        kind = "link" if path.is_symlink() else f"{path.stat().st_mode & 0o100:o}"
        whole.update(f"{file.as_posix()}\0{kind}\0{len(content)}\0".encode() + content)
    return whole.hexdigest()[:DIGITS]
