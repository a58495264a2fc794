"""fnet sync [RUN]: send to W&B what it lacks of the metrics log; safe to repeat; --follow (look 5)

Create or continue the run in W&B from its metrics log, on a machine with internet and a key.
"""

import secrets
import signal
import tempfile
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from fnet_dist.config.fields import LABEL, is_label
from fnet_dist.errors import ConfigError, FnetError
from fnet_dist.run.attempt import is_alive, last_attempt
from fnet_dist.run.outcome import read_outcome
from fnet_dist.run.run_dir import RunDir, read_json
from fnet_dist.run.stop import request_stop
from jobs.runs import command_parser, find_run_or_job

PROBE_S = 10.0
FINISH_S = 600.0  # for the server to take the last rows: no job waits for this command


def main(argv: Sequence[str]) -> int:
    """Send the rows and print how many; return 130 if Ctrl-C ended it.

    Raises ConfigError if there is nothing to send, no key, or the run's own job tracks it online; FnetError if W&B does
    not take the rows.
    """
    parser = command_parser(__doc__)
    parser.add_argument("--follow", action="store_true", help="go on while the run is trained, also on other machines")
    parser.add_argument("--entity", help="user or team, from now on, in place of tracking.entity")
    parser.add_argument("--project", help="project, from now on, in place of tracking.project")
    parser.add_argument("--new-id", action="store_true", help="send it as a new run, as after a deletion in W&B")
    args = parser.parse_args(argv)
    run = find_run_or_job(args.run)
    if not run.metrics_log.exists() and not (args.follow and _is_trained(run)):
        raise ConfigError(f"{run.path} has recorded no step yet; there is nothing to send")
    if (read_json(run.tracking) or {}).get("mode") == "online" and _is_trained(run):
        last = last_attempt(run)
        raise ConfigError(f"{run.path} is being trained and sent to W&B by attempt {last.number if last else 0} itself")
    place = {name: text for name in ("entity", "project") if (text := _checked(name, getattr(args, name)))}
    if args.new_id:
        place["id"] = secrets.token_hex(8)
    interrupted = threading.Event()
    before = signal.signal(signal.SIGINT, lambda number, frame: interrupted.set())  # rows on their way are still sent
    try:
        _send(run, place, interrupted, lambda: not args.follow or not _is_trained(run))
    finally:
        signal.signal(signal.SIGINT, before)
    return 130 if interrupted.is_set() else 0


def _checked(name: str, text: str | None) -> str | None:
    """Return `text`. Raises ConfigError if it is no name of an entity or a project."""
    if text is not None and not is_label(text):
        raise ConfigError(f"--{name} {text!r}: expected {LABEL}")
    return text


def _send(run: RunDir, place: Mapping[str, str], interrupted: threading.Event, has_ended: Callable[[], bool]) -> None:
    """Resume the run in W&B, or start it in another `place`, follow the metrics log to the run's end, and close it."""
    from fnet_dist.tracking import mode, wandb_run  # importing the SDK takes seconds: a wrong name is reported before

    wandb_run.prepare_sdk()
    if problem := mode.why_not_online(PROBE_S):
        raise ConfigError(f"W&B cannot be reached from here: {problem}; see WANDB_API_KEY, WANDB_BASE_URL, wandb login")

    def stop() -> None:
        if _is_trained(run):
            request_stop(run, "wandb_stop")

    # The SDK's own files are thrown away: the metrics log has everything.
    with (
        tempfile.TemporaryDirectory(prefix="sync-", ignore_cleanup_errors=True) as folder,
        mode.tracking_lock(run, lambda: True) as locked,
    ):
        if not locked:
            raise ConfigError(f"another process sends {run.path} to W&B at this moment")
        try:
            every_steps = mode.mark_synced(run, **place).log_every_steps
            session = wandb_run.open_session(run, Path(folder), "online", FINISH_S, None, stop)
            print(f"{run.name}: {session.wandb_run.url}", flush=True)
            rows, written = wandb_run.follow(
                run,
                session,
                every_steps,
                lambda: has_ended() or interrupted.wait(mode.POLL_S),
                lambda: True,
            )
            # Without an outcome the run may go on: W&B shows it as stopped.
            outcome = read_outcome(run) or {"status": "stopped", "reason": ""}
            wandb_run.close_session(session, rows, outcome["status"], outcome["reason"])
        except Exception as error:  # the SDK raises many types
            if not mode.is_sdk_error(error):
                raise
            hint = "repeat it later; --entity and --project correct those, --new-id is for a run that was deleted there"
            raise FnetError(f"W&B has not taken all of {run.name}: {mode.describe_sdk_error(error)}; {hint}") from None
    print(f"{run.name}: {written:,} rows sent, {session.rows_there:,} were there")


def _is_trained(run: RunDir) -> bool:
    last = last_attempt(run)
    return last is not None and is_alive(last)
