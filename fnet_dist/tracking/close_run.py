"""Send W&B what it lacks of an attempt that has ended: python -m fnet_dist.tracking.close_run RUN ATTEMPT STATUS REASON

The launcher decides how a run ended (failed, stopped, requeued) after the attempt's tracking process has gone. It
starts this process then, if there are alerts to send, and kills it if it takes too long.
"""

import os
import signal
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from fnet_dist.processes import exit_with_parent
from fnet_dist.run.attempt import Attempt
from fnet_dist.run.exit import exit_process
from fnet_dist.run.log import LOGGER, configure_logging
from fnet_dist.run.run_dir import RunDir
from fnet_dist.run.stop import SIGNALS
from fnet_dist.tracking.mode import can_send, describe_sdk_error, read_mode, tracking_lock
from fnet_dist.tracking.wandb_run import close_session, follow, open_session, prepare_sdk

FINISH_S = 8.0  # for the server; the launcher waits a little longer


def main(argv: Sequence[str]) -> int:
    """Send the rows and alerts; return 1 if W&B has not taken them. An error is in the attempt's wandb.log."""
    path, number, status, reason = argv
    for signum in (*SIGNALS, signal.SIGHUP):  # Slurm signals every process; the launcher ends this one
        signal.signal(signum, signal.SIG_IGN)
    exit_with_parent()
    attempt = Attempt(RunDir(Path(path)), int(number))
    with attempt.tracking_log.open("ab") as log:
        for stream in (sys.stdout, sys.stderr):
            os.dup2(log.fileno(), stream.fileno())
    configure_logging("alerts", attempt.number)
    prepare_sdk()
    if not can_send():  # the SDK would try for longer
        return 1
    try:
        _send(attempt, status, reason)
    except Exception as error:  # the SDK raises many types
        LOGGER.warning(f"W&B has not taken the last alerts: {describe_sdk_error(error)}")
        return 1
    return 0


def _send(attempt: Attempt, status: str, reason: str) -> None:
    """Open the W&B run once more, send what it lacks, and close it with `status` and `reason`."""
    run, mode = attempt.run, read_mode(attempt.run)
    with (
        tempfile.TemporaryDirectory(prefix="alerts-", ignore_cleanup_errors=True) as folder,
        tracking_lock(run, lambda: True) as locked,
    ):
        if locked and mode is not None and mode.mode == "online":
            session = open_session(run, Path(folder), "online", FINISH_S, None, lambda: None)
            rows, _ = follow(run, session, mode.log_every_steps, lambda: True, lambda: not attempt.is_superseded)
            close_session(session, rows, status, reason)


if __name__ == "__main__":
    exit_process(main(sys.argv[1:]))
