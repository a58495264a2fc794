"""The four official Fashion-MNIST files: verified at every start, downloaded once per file system. No torch here."""

import hashlib
import os
import secrets
import shutil
import stat
import tempfile
import time
import zlib
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
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


@dataclass(frozen=True)
class OfficialFile:
    """One file as published, decompressed, by its name under FashionMNIST/raw."""

    name: str
    size: int
    sha256: str

    def under(self, root: Path) -> Path:
        """Return the path at which torchvision keeps the file."""
        return root / "FashionMNIST" / "raw" / self.name


@dataclass(frozen=True)
class FileCheck:
    """The result for one file: `message` is "ok" or the fault."""

    file: Path
    ok: bool
    message: str


class MissingDataError(DataError):
    """Files are missing and cannot be downloaded: the one case in which `auto` uses synthetic data."""


_TRAIN_LABELS = OfficialFile(
    "train-labels-idx1-ubyte", 60_008, "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9"
)
_TRAIN_IMAGES = OfficialFile(
    "train-images-idx3-ubyte", 47_040_016, "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888"
)
_TEST_LABELS = OfficialFile(
    "t10k-labels-idx1-ubyte", 10_008, "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34"
)
_TEST_IMAGES = OfficialFile(
    "t10k-images-idx3-ubyte", 7_840_016, "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b"
)
# Labels first: a small damaged file is refused sooner than a large one.
_SPLITS = {"train": (_TRAIN_LABELS, _TRAIN_IMAGES), "test": (_TEST_LABELS, _TEST_IMAGES)}
_ALL = (_TRAIN_LABELS, _TEST_LABELS, _TEST_IMAGES, _TRAIN_IMAGES)
_MISSING = "is missing"


def verified_files(root: Path, split: Literal["train", "test"]) -> tuple[str, str]:
    """Return the paths of the images and the labels of `split`, verified by sha256; download missing files first.

    Raises DataError for a damaged file, MissingDataError for a file of either split that cannot be downloaded.
    """
    if _missing(root, _SPLITS[split]) or not all(official.under(root).exists() for official in _ALL):
        fetch(root)  # which verifies all four
    labels, images = (str(official.under(root)) for official in _SPLITS[split])
    return images, labels


def verify(root: Path) -> list[FileCheck]:
    """Check the four files under `root` without changing anything."""
    faults = [(official.under(root), _fault(official.under(root), official)) for official in _ALL]
    return [FileCheck(path, fault is None, fault or "ok") for path, fault in faults]


def fetch(root: Path) -> None:
    """Download the missing files under `root`; any number of processes and hosts may call this at the same time.

    One process downloads while the others wait. If it fails, those that waited raise its message, instead of trying
    one after the other. Raises DataError for a damaged file, MissingDataError for one that cannot be downloaded.
    """
    failure = root / ".fetch.failed"
    try:
        root.mkdir(parents=True, exist_ok=True)
        before = _read(failure)
        with FileLock(root / ".fetch.lock", timeout=_LOCK_S):
            # Beside the lock file, not in it: older releases of filelock empty theirs when they open it.
            after = _read(failure)
            if after is not None and after != before:
                raise MissingDataError(after.partition("\n")[0])
            missing = _missing(root, _ALL)
            try:
                if missing:
                    _download_into_place(root, missing)
            except MissingDataError as error:
                # The token makes each failure's content unique, so that waiting processes can tell it is a new one.
                failure.write_text(f"{error}\n{secrets.token_hex()}\n", encoding="utf-8")
                raise
            failure.unlink(missing_ok=True)
    except Timeout:
        raise _unavailable(root, _ALL, f"another process has held {root / '.fetch.lock'} for {_LOCK_S:g} s") from None
    except OSError as error:
        raise _unavailable(root, _ALL, f"{error.strerror}: {error.filename or root}") from None


def _download_into_place(root: Path, files: Sequence[OfficialFile]) -> None:
    """Download `files` to a temporary directory, verify them and rename them; the caller holds the lock."""
    for killed in root.glob(".fetching-*"):
        shutil.rmtree(killed, ignore_errors=True)
    from torchvision.datasets import FashionMNIST  # for its list of mirrors; here, as it imports torch

    deadline = time.monotonic() + TOTAL_S
    with tempfile.TemporaryDirectory(prefix=".fetching-", dir=root, ignore_cleanup_errors=True) as folder:
        for official in files:
            part, why = Path(folder, official.name), "no mirror is known"
            for mirror in FashionMNIST.mirrors:
                why = _download(f"{mirror}{official.name}.gz", part, official, deadline)
                if not why:
                    break
            if why:
                raise _unavailable(root, files, why)
        for official in files:
            official.under(root).parent.mkdir(parents=True, exist_ok=True)
            Path(folder, official.name).rename(official.under(root))


def _download(url: str, part: Path, official: OfficialFile, deadline: float) -> str:
    """Download `url` and decompress it to `part`. Return "", or the reason if it is not the official file."""
    chunks: SimpleQueue[bytes | Exception] = SimpleQueue()
    stop, gunzip = Event(), zlib.decompressobj(wbits=31)  # 31: with gzip's header
    # The system's name lookup has no time limit: a daemon thread stuck in it cannot keep the process from exiting.
    Thread(target=_receive, args=(url, chunks, stop), daemon=True).start()
    try:
        with part.open("wb") as file:
            while not gunzip.eof and (chunk := chunks.get(timeout=QUIET_S)):
                if isinstance(chunk, Exception):
                    return f"{url}: {' '.join(str(chunk).split()) or type(chunk).__name__}"
                file.write(gunzip.decompress(chunk, official.size + 1))
                if file.tell() > official.size:  # never fill the disk
                    return f"{url}: is larger than the official {official.size:,} bytes"
                if time.monotonic() > deadline:
                    return f"{url}: not done after {TOTAL_S:g} s"
    except Empty:
        return f"{url}: no byte came for {QUIET_S:g} s"
    except zlib.error as error:
        return f"{url}: is not a gzip file: {error}"
    finally:
        stop.set()
    fault = _fault(part, official)
    return f"what came as {official.name} {fault}" if fault else ""


def _receive(url: str, chunks: "SimpleQueue[bytes | Exception]", stop: Event) -> None:
    """Put the content of `url` into `chunks`, then b"" at its end; or the error that ended it."""
    try:
        with urlopen(url, timeout=CONNECT_S) as response:
            chunk = b"any"
            while chunk and not stop.is_set():
                chunk = response.read1(1 << 16)
                chunks.put(chunk)
    except Exception as error:
        chunks.put(error)


def _missing(root: Path, files: Sequence[OfficialFile]) -> list[OfficialFile]:
    """Return those of `files` that are not under `root`. Raise DataError if one is there but not the official one."""
    missing = []
    for official in files:
        path = official.under(root)
        fault = _fault(path, official)
        if fault == _MISSING:
            missing.append(official)
        elif fault is not None:
            raise DataError(
                f"{path} {fault}; repair it, or move it away and fetch it: python -m jobs data fetch --root {root}"
            )
    return missing


def _fault(path: Path, official: OfficialFile) -> str | None:
    """Return why `path` does not hold the official bytes, None if it does."""
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
    if (status.st_size, found) == (official.size, official.sha256):
        return None
    return (
        f"is not the official file: found {status.st_size:,} bytes with sha256 {found}, "
        f"expected {official.size:,} bytes with sha256 {official.sha256}"
    )


def _unavailable(root: Path, files: Sequence[OfficialFile], why: str) -> MissingDataError:
    return MissingDataError(
        f"Fashion-MNIST is missing: {', '.join(official.name for official in files)} not in "
        f"{files[0].under(root).parent}, and the download failed ({why}); run `python -m jobs data fetch --root DIR` "
        "where there is internet, copy DIR here and set FNET_DATA to it, or use --data.dataset synthetic"
    )


def _read(path: Path) -> str | None:
    with suppress(FileNotFoundError):
        return path.read_text(encoding="utf-8")
    return None
