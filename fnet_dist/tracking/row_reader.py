"""Read rows from a run's metrics log, in the next attempt not from its first line again. Does not import wandb.

A line takes 5 us to read: without a saved position, W&B would see nothing new for a minute after each hour trained.
"""

import json
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict

from fnet_dist.config.load import read_section
from fnet_dist.run.metrics_log import LogPosition, MetricsReader
from fnet_dist.run.run_dir import RunDir, planned_length, read_manifest, write_atomically
from fnet_dist.tracking.rows import Row, RowBuilder, RowState

SAVED_AFTER_S = 60.0  # by then W&B has the rows before a position, unless it cannot be reached


def metric_directions(run: RunDir) -> dict[str, str]:
    """Return {metric: "higher" or "lower"}; a run of format 1 has the accuracy alone."""
    directions: dict[str, str] = read_manifest(run).get("metrics", {"accuracy": "higher"})
    return directions


class RowReader:
    """The rows of a metrics log that may still grow. `number` is how many were returned or lie before the start.

    It starts at the position that an earlier process saved, if W&B has the rows before it (`rows_there`).
    """

    def __init__(self, run: RunDir, every_steps: int, rows_there: int) -> None:
        self.run = run
        monitor, directions = read_manifest(run).get("monitor", "accuracy"), metric_directions(run)
        self.builder = RowBuilder(every_steps, monitor, directions)
        self._conditions = {"every_steps": every_steps, "monitor": monitor, "directions": directions}
        self.number, position = 0, LogPosition()
        with suppress(OSError, ValueError, TypeError, KeyError):
            saved = json.loads(run.tracking_position.read_text(encoding="utf-8"))
            found, state = LogPosition(**saved["log"]), RowState(**saved["rows"])
            is_usable = saved["conditions"] == self._conditions and saved["number"] <= rows_there
            if is_usable and found.ends_line(run.metrics_log):
                self.number, position, self.builder.state = saved["number"], found, state
        self._reader = MetricsReader(run.metrics_log, position)
        self._take_position()

    def new(self) -> Iterator[Row]:
        """Yield the rows that lines appended since the last call have completed."""
        for line in self._reader.new():
            if (row := self.builder.add(line)) is not None:
                self.number += 1
                yield row
        if time.monotonic() - self._taken > SAVED_AFTER_S:
            self.save()
            self._take_position()

    def last(self) -> Iterator[Row]:
        """Yield the row of the last step, if no line can follow that would complete it."""
        self._take_position()  # before it: what follows in a log that goes on must find the step pending
        step, length = self.builder.pending_step, planned_length(self.run)
        if step is not None and length is not None:
            if step % length.steps_per_epoch == 0 or step == length.total_steps:
                return  # the step ends an epoch or the run: the next attempt may still write its epoch line
            every = read_section(self.run.config, "run").evaluate_every_steps
            if every is not None and step % every == 0 and not self.builder.has_pending_evaluation:
                return  # or its evaluation
        if (row := self.builder.pending_row()) is not None:
            self.number += 1
            yield row

    def save(self) -> None:
        """Write the last position taken, before which W&B has all rows.

        A reader that finds none, or a damaged one, reads the whole log. So an error changes nothing.
        """
        with suppress(OSError):
            write_atomically(self.run.tracking_position, self._position.encode(), sync=False)

    def _take_position(self) -> None:
        state, log = asdict(self.builder.state), asdict(self._reader.position)
        position = {"number": self.number, "log": log, "rows": state, "conditions": self._conditions}
        self._position, self._taken = json.dumps(position), time.monotonic()
