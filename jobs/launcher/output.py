"""What the launcher shows to people: its own lines, and the log of rank 0 as it grows."""

import sys
from pathlib import Path
from typing import TextIO

from fnet_dist.run.console import mute
from fnet_dist.run.tail import FileTail

LOG_LINES = 60  # of a failed rank's log: more than a traceback of torch


def print_message(text: str, stream: TextIO | None = None, end: str = "\n") -> None:
    """Print on `stream` (standard output if None). A reader that has gone (`| head`) ends the output, not the run."""
    stream = sys.stdout if stream is None else stream
    try:
        print(text, end=end, file=stream, flush=True)
    except OSError:
        mute(stream)


def print_error(text: str) -> None:
    """Print on standard error."""
    print_message(text, sys.stderr)


def last_lines(log: Path) -> str:
    """Return the last LOG_LINES lines of a rank's log."""
    return "\n".join(log.read_text(errors="replace").splitlines()[-LOG_LINES:])


class LogPrinter(FileTail):
    """Print what is appended to a rank's log."""

    @property
    def is_empty(self) -> bool:
        """Return True if nothing has come yet: rank 0 first prints when all ranks are connected."""
        return self.offset == 0

    def print_new(self) -> None:
        """Print what has come since the last call, an unfinished line too."""
        if new := b"".join(self.read_lines(partial=True)):
            print_message(new.decode(errors="replace"), end="")
