"""The four official Fashion-MNIST files: found as people copy them, and verified. Nothing is written, no torch here."""

import gzip
import hashlib
import zlib
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from fnet_dist.errors import DataError
from fnet_dist.processes import quoted

# Size and sha256 as published, decompressed. Labels first: a small damaged file is refused sooner than a large one.
OFFICIAL = {
    "train-labels-idx1-ubyte": (60_008, "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9"),
    "t10k-labels-idx1-ubyte": (10_008, "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34"),
    "t10k-images-idx3-ubyte": (7_840_016, "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b"),
    "train-images-idx3-ubyte": (47_040_016, "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888"),
}
# Under data.root: torchvision's; where data.root is one level too deep, or two; a clone of the authors' repository.
FOLDERS = ("FashionMNIST/raw", "FashionMNIST", "raw", "", "data/fashion")


def verify(root: Path) -> dict[Path, str | None]:
    """Return where each of the four files is under `root` and its fault, None if it is good. Change nothing."""
    return {path: fault for path, fault, _ in (_find(root, name) for name in OFFICIAL)}


def read_official(root: Path, name: str) -> bytearray:
    """Return the content of the official file `name`. Raise DataError if no file under `root` holds it."""
    path, fault, content = _find(root, name)
    if fault is not None:
        fix = f"repair it, or move it away and fetch it: fnet data fetch --root {quoted(root)}"
        raise DataError(f"{path} {fault}; {fix}, or name another folder: --data.root, FNET_DATA")
    return content


def absent_files(root: Path) -> list[str]:
    """Return the names of the files that are not under `root` in any form, good or damaged."""
    return [name for name in OFFICIAL if not any(candidates(root, name))]


def contents(root: Path) -> str:
    """Return what is in the folder under `root` where the files would be, as a part of a message."""
    folder = next((path for path in (root / name for name in FOLDERS) if path.is_dir()), root)
    names = names_in(folder)
    more = f" and {len(names) - 4} more" if len(names) > 4 else ""
    return f"{folder} holds {', '.join(map(repr, names[:4]))}{more}" if names else f"{folder} is empty or missing"


def names_in(folder: Path) -> list[str]:
    """Return the names in `folder`, which may be missing, without what a download leaves."""
    with suppress(OSError):
        return sorted(path.name for path in folder.iterdir() if not path.name.startswith(".fetch"))
    return []


def candidates(root: Path, name: str) -> Iterator[Path]:
    """Yield the files under `root` whose names say that they hold the official file `name`, its own name first.

    As people copy it: packed or not, `train-images.idx3-ubyte`, in upper case, with ` (1)` or `.1` at the end.
    """
    for folder in (*FOLDERS, name):  # Kaggle's archive has a folder for each file
        try:
            found = sorted((root / folder).iterdir())
        except FileNotFoundError:
            continue
        except OSError:
            found = [root / folder / name]  # to open it tells why
        yield from (path for path in found if path.name.lower().replace(".", "-").startswith(name))


def _find(root: Path, name: str) -> tuple[Path, str | None, bytearray]:
    """Return the path of the official file `name`, None and its content; else the first candidate and its fault."""
    faulty = None
    for path in candidates(root, name):
        fault, content = check(path, name)
        if fault is None:
            return path, None, content
        faulty = faulty or (path, fault, bytearray())
    return faulty or (root / FOLDERS[0] / name, "is missing", bytearray())


def check(path: Path, name: str) -> tuple[str | None, bytearray]:
    """Return why `path` does not hold the official file `name`, packed or not, None if it does; and its content."""
    size, sha256 = OFFICIAL[name]
    content = bytearray()
    try:
        if path.is_fifo() or path.is_char_device():
            return "is not a regular file", content  # reading it would wait for a writer, or never end
        stored = path.read_bytes()
        # Not by the name: browsers unpack a download and leave the `.gz` in its name.
        content += gzip.decompress(stored) if stored[:2] == b"\x1f\x8b" else stored
        digest = hashlib.sha256(content).hexdigest()
        if digest == sha256:
            return None, content
        found = f"{len(content):,} bytes with sha256 {digest}"
    except FileNotFoundError:
        return (f"is a link to {path.readlink()}, which does not exist" if path.is_symlink() else "is missing"), content
    except NotADirectoryError:
        return f"cannot be read: Not a directory: {next(p for p in path.parents if p.exists())}", content
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        found = f"a damaged .gz ({error})"
    except OSError as error:
        return f"cannot be read: {error.strerror}", content
    return f"is not the official file: found {found}, expected {size:,} bytes with sha256 {sha256}", content
