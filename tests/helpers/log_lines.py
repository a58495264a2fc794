"""Collect what the package logs."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from fnet_dist.run.log import LOGGER


@contextmanager
def log_lines() -> Iterator[list[str]]:
    """Yield a list that gets "LEVEL: message" for each line logged inside the block; no console shows the line."""
    lines: list[str] = []
    handler = logging.Handler()
    handler.setFormatter(logging.Formatter("%(levelname)s: %(message)s"))
    handler.emit = lambda record: lines.append(handler.format(record))  # type: ignore[method-assign]
    before, LOGGER.handlers[:] = LOGGER.handlers[:], [handler]
    try:
        yield lines
    finally:
        LOGGER.handlers[:] = before
