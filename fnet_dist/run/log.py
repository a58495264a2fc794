"""Report what ranks, the launcher and the tracking process do, through `logging`.

By default a line is the message alone, for people at a terminal. FNET_LOG=debug, info, warning or error sets the level,
and then each line also has its time, level, attempt and process, for a site that collects logs.
"""

import logging
import os
import sys
from contextlib import suppress
from pathlib import Path
from typing import TextIO

from fnet_dist.config.environment import log_level
from fnet_dist.processes import prepare_output

LOGGER = logging.getLogger("fnet_dist")

_PREFIXES = {logging.WARNING: "WARNING: ", logging.ERROR: "error: "}


def configure_logging(process: str, attempt: int | None = None, *, reports: bool = True) -> None:
    """Log as `process`, such as "rank 0/4", of `attempt` once it is known. A second call replaces the first.

    A process that does not report for the others (`reports`) logs errors only, unless FNET_LOG is set. Raise
    ConfigError on an unknown FNET_LOG; even then errors are shown.
    """
    prepare_output()
    handler = _ConsoleHandler()
    LOGGER.handlers[:] = [handler]
    LOGGER.propagate = False  # else user code that configures the root logger prints each line twice
    LOGGER.setLevel(logging.INFO if reports else logging.ERROR)
    level = log_level()
    if level is not None:
        LOGGER.setLevel(level)
        where = process if attempt is None else f"attempt {attempt} {process}"
        handler.setFormatter(logging.Formatter(f"%(asctime)s %(levelname)s {where}: %(message)s"))


class _ConsoleHandler(logging.Handler):
    """Write errors to standard error, everything else to standard output. Neither may end the run."""

    def emit(self, record: logging.LogRecord) -> None:
        prefix = "" if self.formatter else _PREFIXES.get(record.levelno, "")
        # Looked up at each call: while it is shown, a progress bar replaces them, to print above itself.
        write(f"{prefix}{self.format(record)}\n", sys.stderr if record.levelno >= logging.ERROR else sys.stdout)


def write(text: str, stream: TextIO) -> None:
    """Write `text` to `stream`. A reader that has gone (`| head`) or a full disk ends the output, not the run."""
    try:
        stream.write(text)
        stream.flush()
    except BrokenPipeError:
        mute(stream)
    except (OSError, ValueError):  # a full disk, where later lines may fit again
        pass


def mute(stream: TextIO) -> None:
    """Discard all further output to `stream`: its reader has gone."""
    # Not `close`: Python flushes the stream at exit, and would fail again.
    with suppress(OSError), Path(os.devnull).open("wb") as null:
        os.dup2(null.fileno(), stream.fileno())
