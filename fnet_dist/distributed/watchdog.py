"""Hangs: a rank that makes no progress says where it waits, shows its stacks and ends."""

import faulthandler
import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from typing import Self


class Watchdog:
    """Ends this process with exit code 1 if `beat` is not called for `timeout_s`.

    A thread watches, so that the message can name rank and place. Should the interpreter itself be locked, the thread
    cannot run: faulthandler's own C thread, which it re-arms while it can, then prints the stacks and exits.
    """

    def __init__(self, rank: int, timeout_s: float, on_hang: Callable[[str], None]) -> None:
        self._rank = rank
        self._on_hang = on_hang
        self._setting_s = timeout_s
        # Start-up, download and compilation come before the first window.
        self._timeout_s = 10 * timeout_s
        self._where, self._number = "starting up, before step", 1
        self._last = time.monotonic()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="hang-guard", daemon=True)
        self._thread.start()

    def heartbeat(self, where: str, number: int) -> None:
        """Progress: this rank is now at `where` `number`, e.g. "training, step" 57."""
        self._where, self._number, self._last = where, number, time.monotonic()

    def extend_timeout(self, where: str, number: int) -> None:
        """Like `beat`, before what may take longer than any step: as long as at the start, until `started`."""
        self._timeout_s = 10 * self._setting_s
        self.heartbeat(where, number)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._closed.set()
        self._thread.join()
        faulthandler.cancel_dump_traceback_later()

    def started(self) -> None:
        """The first window is through: from now on `timeout_s` holds as it is."""
        self._last = time.monotonic()
        self._timeout_s = self._setting_s

    def _watch(self) -> None:
        tick_s = min(1.0, self._setting_s / 4)
        while not self._closed.wait(tick_s):
            faulthandler.dump_traceback_later(self._timeout_s + 5, exit=True)
            # Rank 0 first: it writes how the run ended, before torchrun ends it for another's sake.
            if time.monotonic() - self._last > self._timeout_s + (tick_s if self._rank else 0):
                self._end()

    def _end(self) -> None:
        message = (
            f"rank {self._rank} on {socket.gethostname()} made no progress for {self._timeout_s:g} s "
            f"(parallel.timeout_s is {self._setting_s:g}): {self._where} {self._number}"
        )
        sys.stderr.write(f"error: {message}; the stacks of its threads follow\n")
        sys.stderr.flush()
        faulthandler.dump_traceback(all_threads=True)
        try:
            self._on_hang(message)
        finally:
            os._exit(1)
