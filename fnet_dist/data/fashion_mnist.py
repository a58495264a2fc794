"""The four official Fashion-MNIST files: checked at every start, fetched once per file system. No torch here."""

import hashlib
import os
import secrets
import shutil
import stat
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from filelock import FileLock, Timeout

from fnet_dist.data.download import TOTAL_S, download
from fnet_dist.errors import DataError

_WAIT_S = TOTAL_S + 60


@dataclass(frozen=True)
class OfficialFile:
    """One file as published, decompressed, by its name under FashionMNIST/raw."""

    name: str
    size: int
    sha256: str

    def under(self, root: Path) -> Path:
        """Where torchvision keeps it."""
        return root / "FashionMNIST" / "raw" / self.name


@dataclass(frozen=True)
class FileCheck:
    """What `verify` found: `message` is "ok" or what is wrong."""

    file: Path
    ok: bool
    message: str


class MissingDataError(DataError):
    """The files are not here and cannot be fetched: the one case in which `auto` takes the stand-in."""


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
# Labels first: the small file is the quick one to refuse.
_SPLITS = {"train": (_TRAIN_LABELS, _TRAIN_IMAGES), "test": (_TEST_LABELS, _TEST_IMAGES)}
_ALL = (_TRAIN_LABELS, _TEST_LABELS, _TEST_IMAGES, _TRAIN_IMAGES)


def verified_files(root: Path, split: Literal["train", "test"]) -> tuple[str, str]:
    """Paths of the images and the labels of `split`, checked to the last byte; what is missing is fetched first.

    Raises DataError for a damaged file, MissingDataError for one that cannot be had, be it the other split's.
    """
    if _missing(root, _SPLITS[split]) or not all(official.under(root).exists() for official in _ALL):
        fetch(root)
        _missing(root, _SPLITS[split])
    labels, images = (str(official.under(root)) for official in _SPLITS[split])
    return images, labels


def verify(root: Path) -> list[FileCheck]:
    """Look at the four files under `root`, and change nothing."""
    checks = []
    for official in _ALL:
        path = official.under(root)
        try:
            fault = _fault(path, official)
        except FileNotFoundError:
            fault = "is missing"
        checks.append(FileCheck(path, fault is None, fault or "ok"))
    return checks


def fetch(root: Path) -> None:
    """Fetch those of the four files that are missing under `root`; any number of processes and hosts may call it.

    One of them does it and the others wait; if it fails, those that waited fail with its message, instead of trying
    one after the other. Raises DataError for a damaged file, MissingDataError for one that cannot be had.
    """
    failure = root / ".fetch.failed"
    try:
        root.mkdir(parents=True, exist_ok=True)
        before = _read(failure)
        with FileLock(root / ".fetch.lock", timeout=_WAIT_S):
            # Beside the lock file, not in it: older releases of filelock empty theirs when they open it.
            after = _read(failure)
            if after is not None and after != before:
                raise MissingDataError(after.partition("\n")[0])
            missing = _missing(root, _ALL)
            try:
                if missing:
                    _fetch_into_place(root, missing)
            except MissingDataError as error:
                # The second line makes each failure's content its own.
                failure.write_text(f"{error}\n{secrets.token_hex()}\n", encoding="utf-8")
                raise
            failure.unlink(missing_ok=True)
    except Timeout:
        raise _unavailable(root, _ALL, f"another process has held {root / '.fetch.lock'} for {_WAIT_S:g} s") from None
    except OSError as error:
        raise _unavailable(root, _ALL, f"{error.strerror}: {error.filename or root}") from None


def _fetch_into_place(root: Path, files: Sequence[OfficialFile]) -> None:
    """Download `files` beside their place, check them and rename them; the caller holds the lock."""
    for killed in root.glob(".fetching-*"):
        shutil.rmtree(killed, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix=".fetching-", dir=root, ignore_cleanup_errors=True) as name:
        folder = Path(name)
        why = download(folder, [official.name for official in files], max(official.size for official in files))
        if why is not None:
            raise _unavailable(root, files, why)
        for official in files:
            fault = _fault(folder / official.name, official)
            if fault is not None:
                raise _unavailable(root, files, f"what came as {official.name} {fault}")
        for official in files:
            official.under(root).parent.mkdir(parents=True, exist_ok=True)
            (folder / official.name).rename(official.under(root))


def _missing(root: Path, files: Sequence[OfficialFile]) -> list[OfficialFile]:
    """Those of `files` that are not under `root`. Raises DataError for one that is, but is not the official one."""
    missing = []
    for official in files:
        path = official.under(root)
        try:
            fault = _fault(path, official)
        except FileNotFoundError:
            missing.append(official)
            continue
        if fault is not None:
            raise DataError(
                f"{path} {fault}; repair it, or move it away and fetch it: python -m jobs data fetch --root {root}"
            )
    return missing


def _fault(path: Path, official: OfficialFile) -> str | None:
    """What is wrong with `path`, None if it holds the official bytes. Raises FileNotFoundError if nothing is there."""
    try:
        # Without O_NONBLOCK, opening a FIFO would wait for somebody to write into it.
        with os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb") as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                return "is not a regular file"
            found = hashlib.file_digest(file, "sha256").hexdigest()
    except FileNotFoundError:
        if path.is_symlink():
            return f"is a link to {path.readlink()}, where nothing is"
        raise
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
        f"{files[0].under(root).parent} and not to be fetched ({why}); run `python -m jobs data fetch --root DIR` "
        "where there is internet, copy DIR here and set FNET_DATA to it, or take the stand-in: --data.dataset synthetic"
    )


def _read(path: Path) -> str | None:
    with suppress(FileNotFoundError):
        return path.read_text(encoding="utf-8")
    return None
