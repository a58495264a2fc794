"""Download of the official Fashion-MNIST files, once per file system. No torch at import."""

import secrets
import shutil
import tempfile
import time
import zlib
from http.client import HTTPException, HTTPResponse
from pathlib import Path
from queue import Empty, SimpleQueue
from threading import Thread
from urllib.request import urlopen

from filelock import FileLock, Timeout

from fnet_dist.config.help import one_line
from fnet_dist.errors import DataError
from fnet_dist.recipes.fashion_mnist import files
from fnet_dist.run.run_dir import read_json, write_json

CONNECT_S = 10.0  # for one connection attempt, or for one read
QUIET_S = 20.0  # without a byte, name lookup included: urlopen tries each address of a host for CONNECT_S
TOTAL_S = 600.0  # 30 MB at 50 kB/s
_LOCK_S = TOTAL_S + 60  # longer than any download, so that a waiting process gets the downloader's own message


class MissingDataError(DataError):
    """Files are missing and cannot be downloaded: the one case in which `auto` uses synthetic data."""


def fetch_for_run(root: Path) -> None:
    """Do as `fetch` does, but write nothing among a user's other files: `root` may be a home, or a mistake."""
    absent = files.absent_files(root)
    if len(absent) == len(files.OFFICIAL) and not (root / "FashionMNIST").is_dir() and files.names_in(root):
        raise _unavailable(root, absent, "a run downloads only into a new or empty folder, or one with FashionMNIST/")
    if absent:
        for name in files.OFFICIAL.keys() - {*absent}:
            files.read_official(root, name)  # names a damaged file: no reason for a download or synthetic data
    fetch(root)


def fetch(root: Path) -> None:
    """Download the missing files under `root`; any number of processes and hosts may call this at the same time.

    They go beside those that are there, else where torchvision keeps them. One process downloads while the others
    wait. If it fails, those that waited raise its message, instead of trying one after the other. Raises
    MissingDataError. Files that are there are not checked.
    """
    if not (absent := files.absent_files(root)):
        return
    present = [path.parent for name in files.OFFICIAL for path in files.candidates(root, name)]
    folder = present[0] if present else root / files.FOLDERS[0]
    failure = folder / ".fetch.failed"  # not in the lock file: older releases of filelock empty theirs on opening
    try:
        folder.mkdir(parents=True, exist_ok=True)
        before = read_json(failure)
        with FileLock(folder / ".fetch.lock", timeout=_LOCK_S):
            after = read_json(failure)
            if after not in (None, before):
                raise MissingDataError(after["error"])
            if (absent := files.absent_files(root)) and (why := _download_into_place(folder, absent)):
                error = _unavailable(root, absent, why)
                # The token makes each failure's content unique, so that waiting processes can tell it is a new one.
                write_json(failure, {"error": str(error), "token": secrets.token_hex()})
                raise error
            failure.unlink(missing_ok=True)
    except Timeout:
        why = f"another process has held {folder / '.fetch.lock'} for {_LOCK_S:g} s"
        raise _unavailable(root, absent, why) from None
    except OSError as error:
        raise _unavailable(root, absent, f"{error.strerror}: {error.filename or folder}") from None


def _download_into_place(folder: Path, names: list[str]) -> str:
    """Download `names`, verify them and rename them; return "", or why not. The caller holds the lock."""
    for killed in folder.glob(".fetching-*"):
        shutil.rmtree(killed, ignore_errors=True)
    from torchvision.datasets import FashionMNIST  # for its list of mirrors; here, as it imports torch

    deadline = time.monotonic() + TOTAL_S
    # Beside the files: a rename is atomic only within one file system, so that no reader sees half a file.
    with tempfile.TemporaryDirectory(prefix=".fetching-", dir=folder, ignore_cleanup_errors=True) as parts:
        for name in names:
            for mirror in FashionMNIST.mirrors:
                if not (why := _download(f"{mirror}{name}.gz", Path(parts, name), deadline)):
                    break
            else:
                return why
        for name in names:
            Path(parts, name).rename(folder / name)
    return ""


def _download(url: str, part: Path, deadline: float) -> str:
    """Download `url` and unpack it to `part`. Return "", or the reason if it is not the official file."""
    size, _ = files.OFFICIAL[part.name]
    answers: SimpleQueue[HTTPResponse | str] = SimpleQueue()
    # The system's name lookup has no time limit: a daemon thread stuck in it cannot keep the process from exiting.
    Thread(target=_open, args=(url, answers), daemon=True).start()
    gunzip, content = zlib.decompressobj(wbits=31), bytearray()  # 31: with gzip's header
    try:
        if isinstance(response := answers.get(timeout=QUIET_S), str):
            return f"{url}: {response}"
        with response:
            # read() would wait for all 64 KiB of a slow server.
            while not gunzip.eof and (chunk := response.read1(1 << 16)):
                content += gunzip.decompress(chunk, size + 1)
                if len(content) > size:
                    return f"{url}: is larger than the official {size:,} bytes"
                if time.monotonic() > deadline:
                    return f"{url}: not done after {TOTAL_S:g} s"
    except Empty:
        return f"{url}: no byte came for {QUIET_S:g} s"
    except zlib.error as error:
        return f"{url}: is not a gzip file: {error}"
    except (OSError, HTTPException) as error:
        return f"{url}: {one_line(str(error))}"
    part.write_bytes(content)  # a full disk is no fault of the mirror's
    fault, _ = files.check(part, part.name)
    return f"what came as {part.name} {fault}" if fault else ""


def _open(url: str, answers: "SimpleQueue[HTTPResponse | str]") -> None:
    """Put the opened `url` into `answers`, or why it could not be opened."""
    try:
        answers.put(urlopen(url, timeout=CONNECT_S))
    except Exception as error:  # urlopen and http.client raise many types; none may end the thread unreported
        answers.put(one_line(str(error)))


def _unavailable(root: Path, names: list[str], why: str) -> MissingDataError:
    return MissingDataError(
        f"Fashion-MNIST is missing: {', '.join(names)} not in {root / files.FOLDERS[0]}, packed (.gz) or not, and "
        f"not downloaded ({why}); {files.contents(root)}; run `fnet data fetch --root DIR` where there is internet, "
        "copy DIR here and set FNET_DATA to it, or use --data.dataset synthetic"
    )
