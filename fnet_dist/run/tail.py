"""Read what other processes append to a file, from the last position on."""

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path


class FileTail:
    """A position in a file that others append to. The file may not exist yet; nothing stays open between two calls."""

    def __init__(self, path: Path, offset: int = 0) -> None:
        self.path = path
        self.offset = offset  # bytes returned so far

    def read_lines(self, *, partial: bool = False, max_bytes: int = -1) -> Iterator[bytes]:
        """Yield the lines appended since the last call, with their newline; nothing while there is no file.

        A last line without a newline is being written: it is left for the next call unless `partial`. A line longer
        than `max_bytes` comes in several parts.
        """
        # Opened at each call: on NFS only that makes the client ask the server for new data (close-to-open).
        with suppress(FileNotFoundError), self.path.open("rb") as file:
            file.seek(self.offset)
            while line := file.readline(max_bytes):
                if not (partial or line.endswith(b"\n") or len(line) == max_bytes):
                    return
                self.offset += len(line)
                yield line
