"""Notices: the events of a run that a person is told of, each once over all attempts, in notices.jsonl.

The owner of an attempt appends them. Two outlets read them: W&B's alerts (fnet_dist/tracking/alerts.py) and the site's
command (jobs/launcher/notifier.py). Each has a cursor of its own, the number of notices that it was given.
"""

import json
import threading
import time
from collections import deque
from contextlib import suppress
from pathlib import Path
from typing import Literal, TypedDict

from fnet_dist.config.environment import hide_secrets
from fnet_dist.config.help import one_line
from fnet_dist.run import metrics_log
from fnet_dist.run.attempt import Attempt
from fnet_dist.run.log import LOGGER
from fnet_dist.run.run_dir import RunDir, read_json, write_json
from fnet_dist.run.tail import FileTail

EndKind = Literal["finished", "failed", "stopped", "requeued"]
Kind = EndKind | Literal["straggler", "saves_failing", "node_excluded", "best"]


class Notice(TypedDict):
    """One line of notices.jsonl, and what the site's command gets. All keys are always present."""

    id: str  # of the event in its run: no two lines have the same
    kind: Kind
    text: str  # a sentence, one line
    run: str
    step: int
    attempt: int
    time: float  # Unix time in seconds
    reason: str | None  # as in outcome.json, if the run has ended
    metric: str | None  # run.monitor, with its value, if there was an evaluation
    value: float | None


class NoticeLog:
    """The writer of one attempt's notices. Any thread may call it; it never raises an OSError."""

    def __init__(self, attempt: Attempt) -> None:
        self.attempt = attempt
        self._lock = threading.Lock()
        self._seen: set[str] = set()
        self._unwritten: list[Notice] = []  # a full disk has not taken them yet

    def add(
        self,
        kind: Kind,
        event: str,
        text: str,
        step: int,
        *,
        reason: str | None = None,
        metric: tuple[str, float | None] | None = None,
    ) -> None:
        """Append a notice with the id `event`, unless there is one, or another attempt owns the run.

        `text` goes on after the run's name. Values of variables that hold secrets are replaced.
        """
        run = self.attempt.run
        name, value = metric or (None, None)
        notice: Notice = {
            "id": event,
            "kind": kind,
            "text": one_line(hide_secrets(f"{run.name} {text}")),
            "run": run.name,
            "step": step,
            "attempt": self.attempt.number,
            "time": time.time(),
            "reason": reason,
            "metric": name,
            "value": value,
        }
        with self._lock:
            if event in self._seen:
                return
            self._seen.add(event)
            self._unwritten.append(notice)
        self.write()

    def add_end(
        self,
        kind: EndKind,
        reason: str,
        step: int,
        more: str = "",
        metric: tuple[str, float | None] | None = None,
    ) -> None:
        """Append the notice of an end for `reason`; `more` is what else is known of it, such as an error's message."""
        # A run that was made longer finishes again; an attempt ends once.
        event = f"finished at step {step}" if kind == "finished" else f"{kind} in attempt {self.attempt.number}"
        asked = " and asks Slurm to queue its job again" if kind == "requeued" else ""
        verb = "stopped" if kind == "requeued" else kind
        why = "" if reason == kind else f" ({reason})"
        text = f"has {verb} after step {step:,}{why}{asked}{f': {more}' if more else ''}"
        self.add(kind, event, text, step, reason=reason, metric=metric)

    def write(self) -> None:
        """Append the notices that a full disk has not taken before."""
        run = self.attempt.run
        with self._lock, suppress(OSError):
            if not self._unwritten or self.attempt.is_superseded:
                return
            known = {notice["id"] for notice in read_notices(run)}
            new = [notice for notice in self._unwritten if notice["id"] not in known]
            if not run.notices.exists():  # somebody may have removed it, and not the cursors
                run.notices_given.unlink(missing_ok=True)
                run.alerts_given.unlink(missing_ok=True)
            metrics_log.truncate_torn_line(run.notices)
            metrics_log.append(run.notices, new)
            self._unwritten.clear()


class NoticeReader:
    """The notices that an outlet was not given yet; the file `cursor` holds how many it was given."""

    def __init__(self, run: RunDir, cursor: Path) -> None:
        self._cursor = cursor
        self._tail = FileTail(run.notices)
        self._new: deque[Notice] = deque()
        self._read = 0
        self._given = int((read_json(cursor) or {}).get("given", 0))

    def has_new(self) -> bool:
        """Return True if there is a notice to take."""
        for line in self._tail.read_lines():
            if (notice := _parsed(line)) is not None:
                self._read += 1
                if self._read > self._given:
                    self._new.append(notice)
        return bool(self._new)

    def take(self) -> Notice:
        """Return the next notice, after counting it as given.

        Counted before it is sent: no notice is sent twice, and a kill in between loses one.
        """
        notice = self._new.popleft()
        self._given += 1
        with suppress(OSError):  # a full disk: better told twice, by another process, than never
            self._cursor.parent.mkdir(exist_ok=True)
            write_json(self._cursor, {"given": self._given})
        return notice


def read_notices(run: RunDir) -> list[Notice]:
    """Return all notices of `run`, in order."""
    return [notice for line in FileTail(run.notices).read_lines() if (notice := _parsed(line)) is not None]


def _parsed(line: bytes) -> Notice | None:
    try:
        notice: Notice = json.loads(line)
    except ValueError:  # torn by a kill
        LOGGER.debug(f"a damaged line of the notices: {line!r}")
        return None
    return notice
