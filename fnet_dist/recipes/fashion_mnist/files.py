"""The four official Fashion-MNIST files: verified at every start, downloaded once per file system. No torch here."""

import hashlib
import os
import secrets
import shutil
import stat
import tempfile
import time
import zlib
from contextlib import suppress
from pathlib import Path
from queue import Empty, SimpleQueue
from threading import Event, Thread
from typing import Literal
from urllib.request import urlopen

from filelock import FileLock, Timeout

from fnet_dist.errors import DataError

CONNECT_S = 10.0  # for one connection attempt, or for one read
QUIET_S = 20.0  # without a byte, name lookup included: urlopen tries each address of a host for CONNECT_S
TOTAL_S = 600.0  # 30 MB at 50 kB/s
_LOCK_S = TOTAL_S + 60  # longer than any download, so that a waiting process gets the downloader's own message
# Size and sha256 as published, decompressed. Labels first: a small damaged file is refused sooner than a large one.
_OFFICIAL = {
    "train-labels-idx1-ubyte": (60_008, "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9"),
    "t10k-labels-idx1-ubyte": (10_008, "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34"),
    "t10k-images-idx3-ubyte": (7_840_016, "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b"),
    "train-images-idx3-ubyte": (47_040_016, "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888"),
}
_MISSING = "is missing"


class MissingDataError(DataError):
    """Files are missing and cannot be downloaded: the one case in which `auto` uses synthetic data."""


def verified_files(root: Path, split: Literal["train", "test"]) -> tuple[str, str]:
    """Return the paths of the images and the labels of `split`, verified by sha256; download missing files first.

    Raises DataError for a damaged file, MissingDataError for a file of either split that cannot be downloaded.
    """
    labels, images = paths = _paths(root, "train" if split == "train" else "t10k")
    if _missing(paths) or not all(path.exists() for path in _paths(root)):
        fetch(root)  # verifies all four
    return str(images), str(labels)


def verify(root: Path) -> dict[Path, str | None]:
    """Return the path of each of the four files under `root` and its fault, None if it is good. Change nothing."""
    return {path: _fault(path) for path in _paths(root)}


def fetch(root: Path) -> None:
    """Download the missing files under `root`; any number of processes and hosts may call this at the same time.

    One process downloads while the others wait. If it fails, those that waited raise its message, instead of trying
    one after the other. Raises DataError for a damaged file, MissingDataError for one that cannot be downloaded.
    """
    failure = root / ".fetch.failed"  # not in the lock file: older releases of filelock empty theirs on opening
    try:
        root.mkdir(parents=True, exist_ok=True)
        before = _read(failure)
        with FileLock(root / ".fetch.lock", timeout=_LOCK_S):
            after = _read(failure)
            if after is not None and after != before:
                raise MissingDataError(after.partition("\n")[0])
            try:
                if missing := _missing(_paths(root)):
                    _download_into_place(root, missing)
            except MissingDataError as error:
                # The token makes each failure's content unique, so that waiting processes can tell it is a new one.
                failure.write_text(f"{error}\n{secrets.token_hex()}\n", encoding="utf-8")
                raise
            failure.unlink(missing_ok=True)
    except Timeout:
        why = f"another process has held {root / '.fetch.lock'} for {_LOCK_S:g} s"
        raise _unavailable(_paths(root), why) from None
    except OSError as error:
        raise _unavailable(_paths(root), f"{error.strerror}: {error.filename or root}") from None


def _download_into_place(root: Path, paths: list[Path]) -> None:
    """Download `paths` to a temporary directory, verify them and rename them; the caller holds the lock."""
    for killed in root.glob(".fetching-*"):
        shutil.rmtree(killed, ignore_errors=True)
    from torchvision.datasets import FashionMNIST  # for its list of mirrors; here, as it imports torch

    deadline = time.monotonic() + TOTAL_S
    # Under `root`: a rename is atomic only within one file system, so that no reader sees half a file.
    with tempfile.TemporaryDirectory(prefix=".fetching-", dir=root, ignore_cleanup_errors=True) as folder:
        for path in paths:
            why = "no mirror is known"
            for mirror in FashionMNIST.mirrors:
                if not (why := _download(f"{mirror}{path.name}.gz", Path(folder, path.name), deadline)):
                    break
            if why:
                raise _unavailable(paths, why)
        for path in paths:
            path.parent.mkdir(parents=True, exist_ok=True)
            Path(folder, path.name).rename(path)


def _download(url: str, part: Path, deadline: float) -> str:
    """Download `url` and decompress it to `part`. Return "", or the reason if it is not the official file."""
    size, _ = _OFFICIAL[part.name]
    chunks: SimpleQueue[bytes | Exception] = SimpleQueue()
    stop, gunzip = Event(), zlib.decompressobj(wbits=31)  # 31: with gzip's header
    # The system's name lookup has no time limit: a daemon thread stuck in it cannot keep the process from exiting.
    Thread(target=_receive, args=(url, chunks, stop), daemon=True).start()
    try:
        with part.open("wb") as file:
            while not gunzip.eof and (chunk := chunks.get(timeout=QUIET_S)):
                if isinstance(chunk, Exception):
                    return f"{url}: {' '.join(str(chunk).split()) or type(chunk).__name__}"
                file.write(gunzip.decompress(chunk, size + 1))
                if file.tell() > size:  # never fill the disk
                    return f"{url}: is larger than the official {size:,} bytes"
                if time.monotonic() > deadline:
                    return f"{url}: not done after {TOTAL_S:g} s"
    except Empty:
        return f"{url}: no byte came for {QUIET_S:g} s"
    except zlib.error as error:
        return f"{url}: is not a gzip file: {error}"
    finally:
        stop.set()
    return f"what came as {part.name} {fault}" if (fault := _fault(part)) else ""


def _receive(url: str, chunks: "SimpleQueue[bytes | Exception]", stop: Event) -> None:
    """Put the content of `url` into `chunks`, then b"" at its end; or the error that ended it."""
    try:
        with urlopen(url, timeout=CONNECT_S) as response:
            chunk = b"any"
            while chunk and not stop.is_set():
                chunk = response.read1(1 << 16)  # read() would wait for all 64 KiB of a slow server
                chunks.put(chunk)
    except Exception as error:  # urlopen and http.client raise many types; none may end the thread unreported
        chunks.put(error)


def _paths(root: Path, start: str = "") -> list[Path]:
    """Return where torchvision keeps the official files whose names begin with `start`."""
    return [root / "FashionMNIST" / "raw" / name for name in _OFFICIAL if name.startswith(start)]


def _missing(paths: list[Path]) -> list[Path]:
    """Return the missing ones of `paths`. Raise DataError if a file is there but is not the official one."""
    missing = []
    for path in paths:
        if (fault := _fault(path)) == _MISSING:
            missing.append(path)
        elif fault is not None:
            fix = f"repair it, or move it away and fetch it: fnet data fetch --root {path.parents[2]}"
            raise DataError(f"{path} {fault}; {fix}")
    return missing


def _fault(path: Path) -> str | None:
    """Return why `path` does not hold the official bytes of a file of its name, None if it does."""
    size, sha256 = _OFFICIAL[path.name]
    try:
        # Without O_NONBLOCK, opening a FIFO would wait for a writer.
        with os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb") as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                return "is not a regular file"
            found = hashlib.file_digest(file, "sha256").hexdigest()
    except FileNotFoundError:
        return f"is a link to {path.readlink()}, which does not exist" if path.is_symlink() else _MISSING
    except OSError as error:
        return f"cannot be read: {error.strerror}"
    if (status.st_size, found) == (size, sha256):
        return None
    got = f"found {status.st_size:,} bytes with sha256 {found}"
    return f"is not the official file: {got}, expected {size:,} bytes with sha256 {sha256}"


def _unavailable(paths: list[Path], why: str) -> MissingDataError:
    return MissingDataError(
        f"Fashion-MNIST is missing: {', '.join(path.name for path in paths)} not in {paths[0].parent}, and the "
        f"download failed ({why}); run `fnet data fetch --root DIR` where there is internet, copy DIR here and set "
        "FNET_DATA to it, or use --data.dataset synthetic"
    )


def _read(path: Path) -> str | None:
    with suppress(FileNotFoundError):  # no exists() first: another process may remove the file in between
        return path.read_text(encoding="utf-8")
    return None
