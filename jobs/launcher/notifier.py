"""Node 0's part in notices: add how the run ended, give notices to the site's command, let W&B have the last ones."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from types import TracebackType
from typing import Self, cast

from fnet_dist.config.schema import Config
from fnet_dist.processes import python_environment
from fnet_dist.run.attempt import Attempt
from fnet_dist.run.console import sync_hint
from fnet_dist.run.log import LOGGER
from fnet_dist.run.notices import EndKind, Notice, NoticeLog, NoticeReader
from fnet_dist.run.run_dir import RunDir, read_json
from fnet_dist.run.stop import stop_reason
from jobs.launcher.restart_policy import RestartDecision

NOTICE_S = 10.0  # for one notice: the site's command, or W&B after the ranks have ended. Then it is killed
LOOK_EVERY_S = 0.5
WORKER = "fnet_dist.tracking.close_run"


class Notifier:
    """The outlets of one launcher, a context manager. `command` is the site's, as words; empty if there is none.

    None of them can change how the run ends: what fails is a warning.
    """

    def __init__(self, command: Sequence[str]) -> None:
        self._command = [*command]
        self._attempt: Attempt | None = None  # the newest
        self._is_on = self._has_alerts = False
        self._over = threading.Event()  # give what there is, and end the thread
        self._thread: threading.Thread | None = None
        self._running: subprocess.Popen[bytes] | None = None
        self._sent_at: float | None = None
        self._has_warned = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """Wait for the site's command, until NOTICE_S after the run's end, and kill it then."""
        self._over.set()
        self._join(NOTICE_S if self._sent_at is None else self._sent_at + NOTICE_S - time.monotonic())
        self._command = []  # the thread starts no other
        if (running := self._running) is not None:
            _kill(running)
        self._join(None)

    def begin(self, attempt: Attempt, config: Config) -> None:
        """Follow the notices of `attempt`, and those of earlier ones that were not given."""
        self._attempt = attempt
        self._is_on = bool(self._command) or config.tracking.alerts != "off"
        self._has_alerts = config.tracking.alerts != "off" and config.tracking.wandb != "disabled"
        self._start_thread(attempt)

    def add_end(self, decision: RestartDecision, *, in_job: bool) -> None:
        """Add the notice of the run's end, unless rank 0 has, or node 0 asks Slurm for a requeue first.

        Call it before end.json is written: `fnet sync --follow` ends when it sees that.
        """
        next_in_slurm = stop_reason(decision.reason).slurm if in_job else "end"
        if next_in_slurm != "requeue":
            more = "Slurm decides if its job starts again" if next_in_slurm == "wait" else ""
            self.add(cast(EndKind, decision.status), decision, more)

    def add(self, kind: EndKind, decision: RestartDecision, more: str = "") -> None:
        """Add a notice of how the run ended, with `more` about it."""
        if self._attempt is not None and self._is_on:
            told = "; ".join(filter(None, (decision.cause, decision.message, more)))
            NoticeLog(self._attempt).add_end(kind, decision.reason, decision.step, told)

    def add_excluded(self, node: str, decision: RestartDecision, why: str) -> None:
        """Add the notice that the next allocation is asked for without `node`."""
        if self._attempt is not None and self._is_on:
            event = f"{node} excluded in attempt {self._attempt.number}"
            NoticeLog(self._attempt).add(
                "node_excluded", event, f"asks Slurm for an allocation without {why}", decision.step
            )

    def send(self, decision: RestartDecision, within_s: float | None = None) -> None:
        """Wait until the outlets have all notices; `within_s` at most, or NOTICE_S."""
        if (attempt := self._attempt) is None or not self._is_on:
            return
        self._sent_at = time.monotonic()
        until = self._sent_at + (NOTICE_S if within_s is None else within_s)
        if self._over.is_set():  # the thread has been told to end before, and may have looked for the last time
            self._join(until - time.monotonic())
        self._start_thread(attempt)
        self._over.set()
        if self._has_alerts:
            self._send_alerts(attempt, decision, until - time.monotonic())
        self._join(until - time.monotonic())

    def _start_thread(self, attempt: Attempt) -> None:
        if self._command and (self._thread is None or not self._thread.is_alive()):
            self._thread = threading.Thread(target=self._give_all, args=(attempt.run,), name="notices", daemon=True)
            self._thread.start()

    def _join(self, seconds: float | None) -> None:
        if self._thread is not None:
            self._thread.join(seconds if seconds is None else max(0.0, seconds))

    def _give_all(self, run: RunDir) -> None:
        """Give each new notice to the site's command, until `_over`, and unless another launcher owns the run."""
        notices: NoticeReader | None = None
        is_over = False
        while not is_over:
            is_over = self._over.wait(LOOK_EVERY_S)  # before reading: what was added before the end is then read
            with suppress(OSError):  # a file system that is away for a moment
                notices = notices or NoticeReader(run, run.notices_given)
                while self._command and notices.has_new() and self._attempt and not self._attempt.is_superseded:
                    self._give(notices.take())

    def _give(self, notice: Notice) -> None:
        """Run the site's command with `notice` as JSON on its standard input, NOTICE_S at most; warn once if it fails.

        Words, never a shell: nothing in a notice can be taken for a command.
        """
        # It has no use for the key. It may need all the rest of the environment.
        env = {name: value for name, value in os.environ.items() if name != "WANDB_API_KEY"}
        content, command = (json.dumps(notice) + "\n").encode(), self._command
        try:
            # Its output goes to a file, not a pipe, which a process that it leaves behind would hold open.
            with tempfile.TemporaryFile() as output:
                process = subprocess.Popen(
                    command, stdin=subprocess.PIPE, stdout=output, stderr=output, env=env, start_new_session=True
                )
                self._running = process
                try:
                    process.communicate(content, NOTICE_S)
                except subprocess.TimeoutExpired:
                    _kill(process)
                    process.wait()
                self._running = None
                output.seek(0)
                said = output.read().decode(errors="replace").strip().splitlines()
        except OSError as error:
            self._warn(f"{command[0]}: {error.strerror or error}")
            return
        if process.returncode == -signal.SIGKILL:
            self._warn(f"{command[0]} has not ended within {NOTICE_S:g} s")
        elif process.returncode != 0:
            last_line = f" ({said[-1]})" if said else ""
            self._warn(f"{command[0]} has ended with exit code {process.returncode}{last_line}")

    def _warn(self, text: str) -> None:
        if not self._has_warned:
            LOGGER.warning(f"`notify` of site.toml: {text}; the run goes on, and later failures are not shown")
        self._has_warned = True

    def _send_alerts(self, attempt: Attempt, decision: RestartDecision, within_s: float) -> None:
        """Let a process send W&B the alerts that the tracking process has not sent, as it has ended before."""
        run = attempt.run
        with suppress(OSError):
            if (read_json(run.tracking) or {}).get("mode") != "online":
                return
            if not NoticeReader(run, run.alerts_given).has_new():
                return
            words = [str(run.path), str(attempt.number), decision.status, decision.reason]
            process = subprocess.Popen(
                [sys.executable, "-m", WORKER, *words],
                env=python_environment(),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                start_new_session=True,
            )
            try:
                process.wait(max(0.0, within_s))
            except subprocess.TimeoutExpired:
                _kill(process)
                process.wait()
            if process.returncode != 0:
                LOGGER.warning(f"W&B has not taken the last alerts; {sync_hint(run)}")


def _kill(process: subprocess.Popen[bytes]) -> None:
    """Kill `process` and all that it has started in its session."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
