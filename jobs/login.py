"""Run a command on a cluster: sync the checkout to the host that `login` names, and run it there through ssh.

`run_there` is the side of the laptop. It imports only the standard library: a laptop needs no environment. `arrive` is
the side of the cluster, before the command itself. Only the command's words travel, no variable and no setting.
"""

import fcntl
import hashlib
import json
import os
import posixpath
import re
import shlex
import shutil
import signal
import subprocess
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from fnet_dist.errors import ConfigError, FnetError
from fnet_dist.processes import CODE_ROOT
from fnet_dist.run.git import SYNCED, code_files, git_state, read_record
from slurm.site_config import Site

FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
VANISHED = 24  # rsync's exit code if a file was removed while it ran, as editors do
NOT_CONNECTED = 255  # ssh's exit code for its own errors, and for a command that a signal killed
_SSH = ("ssh", "-o", "LogLevel=ERROR")  # else it prints a line when a terminal's connection ends
_ARRIVING = f"{SYNCED}.new"
# All that a shell on the host reads; words follow as arguments. rsync: $0 is the directory, $1 tells where from.
_RECEIVE = (
    "from=$1; shift; "
    '[ ! -e "$0/.git" ] || { echo "$0 there is a git checkout of its own, whose files would be overwritten; name '
    'another directory, or remove its .git" >&2; exit 2; }; '
    f'for record in "$0/{SYNCED}" "$0/{_ARRIVING}"; do [ ! -e "$record" ] || grep -qF -- "$from" "$record" || '
    '{ echo "$0 there was sent from another directory; name another one, or remove it" >&2; exit 2; }; done; '
    f'[ -e "$0/{SYNCED}" ] || [ -e "$0/{_ARRIVING}" ] || [ -z "$(ls -A -- "$0" 2>/dev/null)" ] || '
    '{ echo "$0 there has files that fnet has not sent; name a directory that is new or empty" >&2; exit 2; }; '
    'command -v rsync >/dev/null || { echo "rsync is not installed there" >&2; exit 2; }; '
    'mkdir -p -- "$0" && exec rsync "$@"'
)
# A login shell, because PATH and the like often come from a profile; what a profile prints goes to standard error.
_LOGIN_SHELL = 'exec bash -lc "$0" "$@" 3>&1 >&2'
_START = (
    'unset CDPATH; cd && cd -- "$1" && root=$PWD && cd -- "$2" && project=$PWD && '
    'cd -- "$root" && cd -- "$3" || exit 2; '
    "python=${4:-$root/.venv/bin/python}; "
    'command -v -- "$python" >/dev/null || { echo "error: $5" >&2; exit 2; }; program=$6; shift 6; '
    'exec env FNET_LOGIN= "$python" -c "$program" "$root" "$project" "$@" >&3 3>&-'
)
# Do as `python -m jobs` in the checkout, in any directory.
_PROGRAM = (
    "import sys; sys.path[0] = sys.argv[1]; from jobs.__main__ import main; from jobs.login import arrive; "
    "arrive(*sys.argv[1:3]); sys.exit(main(sys.argv[3:]))"
)


class ConnectionLostError(FnetError):
    """The cluster cannot be reached, or could not take the files."""

    exit_code = 74
    reason = "io"


@dataclass(frozen=True)
class Login:
    """The place where commands run: a host as ssh takes it, the directory of the checkout there (from the home
    directory on, if it is relative), and the Python there (None: the environment in that directory)."""

    host: str
    folder: str
    python: str | None


def chosen_login(site: Site) -> Login | None:
    """Return what FNET_LOGIN, or else the site, says of where commands run; None: here. Raises ConfigError if it is
    malformed."""
    text = os.environ.get("FNET_LOGIN", site.login or "")
    if not text:
        return None
    host, _, folder = text.partition(":")
    folder = posixpath.normpath(folder.removeprefix("~/") or CODE_ROOT.name)
    is_place = folder.isprintable() and not set(folder) & set("~$") and folder not in (".", "..", "/")
    if not re.fullmatch(r"\w[^\s:/]*", host) or not is_place:
        raise ConfigError(f"login {text!r}: expected me@cluster, or me@cluster:DIRECTORY with a directory of its own")
    return Login(host, folder, site.python)


def run_there(login: Login, words: Sequence[str]) -> int:
    """Sync the checkout, and the git repository of the current directory, and run `fnet WORDS` there.

    Return its exit code. Raises ConfigError for a job file that is not synced, ConnectionLostError.
    """
    if missing := [program for program in ("git", "rsync", "ssh") if shutil.which(program) is None]:
        raise ConfigError(f"not installed here: {', '.join(missing)}; login needs git, rsync and ssh")
    places = _places(login)
    words = [_job_file_there(word, places) for word in words]
    for root, place in places.items():
        _sync(root, login, posixpath.normpath(posixpath.join(login.folder, place)))
    project, there = [*places.values()][-1], _place_of(Path.cwd(), places) or "."
    no_python = (
        f"no Python environment in {login.host}:{login.folder}; make it: ssh {login.host}, cd {login.folder}, make run"
        if login.python is None
        else f"{login.python}, the python of site.toml, is not on {login.host}"
    )
    start = [_START, "fnet", login.folder, project, there, login.python or "", no_python, _PROGRAM, *words]
    terminal = all(map(os.isatty, range(3)))  # with one, ssh has no standard error apart
    command = [*_SSH, "-t" if terminal else "-T", login.host, shlex.join(["exec", "sh", "-c", _LOGIN_SHELL, *start])]
    code, received = _connect(command, terminal)
    if code != NOT_CONNECTED:
        return code if code >= 0 else 128 - code
    if received:  # the command has no handler for it
        return 128 + received[-1]
    raise ConnectionLostError(f"the connection to {login.host} has ended, or fnet was killed there; see fnet status")


def _places(login: Login) -> dict[Path, str]:
    """Return {directory that is synced: its place there, relative to the checkout's}: the checkout first, and the git
    repository of the current directory if that lies elsewhere."""
    places, here = {CODE_ROOT.resolve(): "."}, Path.cwd()
    if not here.is_relative_to(CODE_ROOT.resolve()):
        asked = ["git", "-C", str(here), "rev-parse", "--show-toplevel"]
        found = subprocess.run(asked, capture_output=True, text=True, timeout=60, check=False).stdout.rstrip("\n")
        project = Path(found)
        # A repository of dotfiles has keys beside it, which git may not ignore.
        if found and not Path.home().resolve().is_relative_to(project):
            if project.name == posixpath.basename(login.folder):
                raise ConfigError(f"{project} and the checkout would be one directory on {login.host}; rename one")
            places[project] = posixpath.join("..", project.name)
    return places


def _place_of(path: Path, places: Mapping[Path, str]) -> str | None:
    """Return where `path` is there, relative to the checkout; None if it is not synced."""
    for root, place in places.items():
        if path.is_relative_to(root):
            return posixpath.normpath(posixpath.join(place, path.relative_to(root).as_posix()))
    return None


def _job_file_there(word: str, places: Mapping[Path, str]) -> str:
    """Return a word of the command line as it is, but the path of a job file as it is there."""
    path = Path(word).expanduser()
    if path.suffix != ".toml" or not path.is_file():
        return word
    if (place := _place_of(path.resolve(), places)) is None:
        raise ConfigError(f"{word} is not in {' or '.join(map(str, places))}, which login syncs; move it there")
    return posixpath.relpath(place, _place_of(Path.cwd(), places) or ".")


def _sync(root: Path, login: Login, place: str) -> None:
    """Send the files that git tracks, or would, from `root` to `place` on the host. `arrive` removes what is gone."""
    files = {path.as_posix(): _digest(root / path) for path in code_files(root)}
    source = {"from": str(root)}
    with tempfile.TemporaryDirectory() as folder:
        record = {**source, **git_state(root), "files": files}
        Path(folder, _ARRIVING).write_text(json.dumps(record), encoding="utf-8")
        names = [f"{root}/./{file}" for file in files] + [f"{folder}/./{_ARRIVING}"]  # rsync makes what follows /./
        receive = shlex.join(["exec", "sh", "-c", _RECEIVE, place, json.dumps(source)[1:-1]])
        # By checksum: an edit within the second of the one before would go unseen.
        command = ["rsync", "-lpczs", "--from0", "--files-from=-", "-e", shlex.join(_SSH)]
        command += [f"--rsync-path={receive}", "/", f"{login.host}:{place}/"]
        ended = subprocess.run(command, input="\0".join(names).encode(), capture_output=True, check=False)
    if ended.returncode not in (0, VANISHED):
        lines = ended.stderr.decode(errors="replace").splitlines()
        # Its cause is the last line before rsync's own summary; a shell may have warned of other things before.
        told = [
            line for line in lines if not line.startswith(("rsync error:", "rsync: connection unexpectedly closed"))
        ]
        why = [f"rsync ended with {ended.returncode}", *lines, *told][-1].strip()
        raise ConnectionLostError(f"{root} was not sent to {login.host}: {why}")


def _connect(command: Sequence[str], terminal: bool) -> tuple[int, list[int]]:
    """Run ssh; return its exit code, and the signals that this process got meanwhile and has forwarded.

    With a terminal, ssh forwards its keys. Without one, each signal is a byte on the standard input of `arrive`.
    """
    received: list[int] = []

    def forward(number: int, frame: FrameType | None) -> None:
        received.append(number)
        if ssh.stdin is None:
            ssh.send_signal(number)
        else:
            with suppress(OSError):  # ssh has ended
                os.write(ssh.stdin.fileno(), bytes([number]))
        if received.count(signal.SIGINT) > 1:
            raise KeyboardInterrupt

    caught = [number for number in FORWARDED if signal.getsignal(number) != signal.SIG_IGN]  # as nohup has SIGHUP
    before = {number: signal.getsignal(number) for number in caught}
    if not terminal and signal.SIGINT in caught:  # Ctrl-C reaches ssh too, which is to bring the command's last words
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    with subprocess.Popen(command, stdin=None if terminal else subprocess.PIPE) as ssh:
        for number in caught:
            signal.signal(number, forward)
        try:
            return ssh.wait(), received
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def arrive(root: str, project: str) -> None:
    """On the host, before the command: remove what is gone from the synced directories, and take forwarded signals."""
    for directory in {root: "", project: ""}:
        _remove_vanished(Path(directory))
    if os.isatty(0):  # sshd ends what runs on a terminal that is gone
        return
    control, nothing = os.dup(0), os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)  # processes that the command starts
    os.close(nothing)

    def watch() -> None:
        while received := os.read(control, 1):
            os.kill(0, received[0])  # the process group, as a terminal does
        os.kill(0, signal.SIGHUP)  # nobody is there any more

    threading.Thread(target=watch, name="login", daemon=True).start()


def _remove_vanished(root: Path) -> None:
    """Remove the files that an earlier sync has sent to `root`, that the last one has not, and that nobody has changed.

    What lies behind a link is never removed.
    """
    arriving, synced = root / _ARRIVING, root / SYNCED
    with _locked(root):
        if (now := read_record(arriving)) is None:  # another command has done it
            return
        before = (read_record(synced) or {"files": {}})["files"]
        for name in before.keys() - now["files"].keys():
            path, parents = root / name, [root / parent for parent in Path(name).parents]
            if any(parent.is_symlink() for parent in parents[:-1]) or _digest(path) != before[name]:
                continue
            with suppress(OSError):  # a directory that is not empty
                path.unlink()
                for parent in parents[:-1]:
                    parent.rmdir()
        arriving.replace(synced)


@contextmanager
def _locked(directory: Path) -> Iterator[None]:
    """Wait until no other command does the same in `directory`, where its file system has locks."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        with suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _digest(path: Path) -> str | None:
    """Return the SHA-256 of a file, or of what a link names; None if there is neither."""
    with suppress(OSError):
        return hashlib.sha256(bytes(path.readlink()) if path.is_symlink() else path.read_bytes()).hexdigest()
    return None
