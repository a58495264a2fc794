"""Detect a hang: a rank that makes no progress reports where it waits, prints its stacks and ends."""

import faulthandler
import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:  # imports torch
    from fnet_dist.distributed.flight_recorder import Exchange

_START_FACTOR = 10  # times the timeout, for start-up, download, compilation and the last save


class Watchdog:
    """A thread that ends this process with exit code 1 if `heartbeat` is not called for `timeout_s`.

    It counts its own ticks: time in which nothing runs, as while Slurm suspends the job, is no hang. Its message names
    rank and place. If the interpreter itself is locked, no Python thread runs: then faulthandler's C thread, which this
    one re-arms while it can, prints the stacks, and the ranks that wait for this one end the attempt.
    """

    def __init__(self, rank: int, timeout_s: float, on_hang: "Callable[[str, Exchange | None], None]") -> None:
        """`on_hang` gets the message, and `exchange` if it was set: it tells for whom this rank waits."""
        self.exchange: Exchange | None = None
        self._rank = rank
        self._on_hang = on_hang
        self._setting_s = timeout_s
        self._timeout_s = _START_FACTOR * timeout_s
        self._where, self._number = "starting up, before step", 1
        self._heartbeats = 0
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)  # daemon: must not delay exit
        self._thread.start()

    def heartbeat(self, where: str, number: int) -> None:
        """Report progress: this rank is now at `where` `number`, e.g. "training, step" 57."""
        self._where, self._number = where, number
        self._heartbeats += 1

    def extend_timeout(self, where: str, number: int) -> None:
        """Report progress before work that may take longer than any step: the timeout is that of the start again."""
        self._timeout_s = _START_FACTOR * self._setting_s
        self.heartbeat(where, number)

    def restore_timeout(self) -> None:
        """Report progress after the first window: from now on `timeout_s` holds."""
        self._timeout_s = self._setting_s
        self._heartbeats += 1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._closed.set()
        self._thread.join()
        faulthandler.cancel_dump_traceback_later()

    def _watch(self) -> None:
        tick_s = min(1.0, self._setting_s / 4)
        heartbeats, silent_s, ticked = -1, 0.0, time.monotonic()
        while not self._closed.wait(tick_s):
            # Not exit=True: it measures clock time, and would end a job that was suspended.
            faulthandler.dump_traceback_later(self._timeout_s + 5)
            before, ticked = ticked, time.monotonic()
            if self._heartbeats != heartbeats:
                heartbeats, silent_s = self._heartbeats, 0.0
                continue
            silent_s += min(ticked - before, 2 * tick_s)  # a tick that took longer was suspended meanwhile
            # Rank 0 first: it writes outcome.json, and torchrun ends all ranks as soon as one has ended.
            if silent_s > self._timeout_s + (tick_s if self._rank else 0):
                self._report_and_exit()

    def _report_and_exit(self) -> None:
        message = (
            f"rank {self._rank} on {socket.gethostname()} made no progress for {self._timeout_s:g} s "
            f"(parallel.timeout_s is {self._setting_s:g}): {self._where} {self._number}"
        )
        sys.stderr.write(f"error: {message}; the stacks of its threads follow\n")
        sys.stderr.flush()  # before faulthandler, which writes to the descriptor
        faulthandler.dump_traceback(all_threads=True)
        try:
            self._on_hang(message, self.exchange)
        finally:
            os._exit(1)  # not sys.exit: that would only end this thread
