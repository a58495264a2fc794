"""Send notices to W&B as alerts, which W&B hands on by mail or Slack."""

import time
from collections.abc import Mapping
from datetime import timedelta

import wandb

from fnet_dist.run.notices import Kind, Notice, NoticeReader
from fnet_dist.tracking.mode import can_send

# Of all other kinds INFO.
_WARN: tuple[Kind, ...] = ("stopped", "straggler", "saves_failing", "node_excluded")
LEVELS: Mapping[Kind, str] = {"failed": "ERROR", **dict.fromkeys(_WARN, "WARN")}
MAX_TITLE = 63  # characters, says the SDK


def send_alerts(wandb_run: wandb.Run, notices: NoticeReader) -> None:
    """Send an alert for each new notice. While the server does not answer, the notices wait."""
    # The SDK does not say whether an alert has arrived, and the notice counts as given once the SDK has it.
    while notices.has_new() and can_send():
        notice = notices.take()
        # W&B drops an alert whose title was used within `wait_duration`, by default a minute. Each is sent only once.
        wait = timedelta(milliseconds=1)
        wandb_run.alert(_title(notice), _text(notice), LEVELS.get(notice["kind"], "INFO"), wait)


def _title(notice: Notice) -> str:
    return f"{notice['kind'].replace('_', ' ')}: {notice['run']}"[:MAX_TITLE]


def _text(notice: Notice) -> str:
    """Return the sentence, with the event's own time: `sync` may send it days later."""
    when = time.strftime("%Y-%m-%d %H:%M:%S %z", time.localtime(notice["time"]))
    return f"{notice['text']} (attempt {notice['attempt']}, {when})"
