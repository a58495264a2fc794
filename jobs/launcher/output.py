"""Print the launcher's messages; a closed output does not end the run."""

import sys
from typing import TextIO

from fnet_dist.run.console import mute


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
