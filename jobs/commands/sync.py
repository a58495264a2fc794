"""fnet sync [RUN ...]: send to W&B what it lacks of the metrics log; safe to repeat; --follow, --all (look 5)

Create or continue the runs in W&B from their metrics logs, on a machine with internet and a key.
"""

import secrets
import signal
import sys
import tempfile
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from fnet_dist.config.fields import LABEL, is_label
from fnet_dist.errors import ConfigError, FnetError
from fnet_dist.run.attempt import is_alive, last_attempt
from fnet_dist.run.outcome import read_outcome
from fnet_dist.run.run_dir import RunDir, read_json
from fnet_dist.run.sharing import share_files
from fnet_dist.run.stop import request_stop
from jobs.cells import find_runs
from jobs.runs import command_parser, run_root

PROBE_S = 10.0
FINISH_S = 600.0  # for the server to take the last rows: no job waits for this command


def main(argv: Sequence[str]) -> int:
    """Send the rows and print how many; return 130 if Ctrl-C ended it.

    With several runs, go on after an error, print it, and raise the last one. Raises ConfigError if there is nothing to
    send, no key, or the run's own job tracks it online; FnetError if W&B does not take the rows.
    """
    parser = command_parser(__doc__)
    parser.add_argument("runs", nargs="*", metavar="RUN", help="name, directory or job id of a run or a sweep")
    parser.add_argument("--all", action="store_true", help="every run in runs/ that its own job does not send")
    parser.add_argument("--follow", action="store_true", help="go on while the run is trained, also on other machines")
    parser.add_argument("--entity", help="user or team, from now on, in place of tracking.entity")
    parser.add_argument("--project", help="project, from now on, in place of tracking.project")
    parser.add_argument("--new-id", action="store_true", help="send it as a new run, as after a deletion in W&B")
    args = parser.parse_args(argv)
    if args.all and args.runs:
        raise ConfigError("--all sends every run; leave out the names, or --all")
    runs = _all_runs() if args.all else [run for text in args.runs or [None] for run in find_runs(text)]
    if len(runs) > 1 and (args.follow or args.new_id):
        raise ConfigError(f"--follow and --new-id are for one run, found {len(runs)}; name one")
    place = {name: text for name in ("entity", "project") if (text := _checked(name, getattr(args, name)))}
    if args.new_id:
        place["id"] = secrets.token_hex(8)
    interrupted = threading.Event()
    before = signal.signal(signal.SIGINT, lambda number, frame: interrupted.set())  # rows on their way are still sent
    if len(runs) == 1:  # a run with nothing to send needs no server
        _check(runs[0], follow=args.follow)
    _check_server()  # once: each of many runs would wait for it
    errors: list[FnetError] = []
    try:
        for run in runs:
            try:
                _check(run, follow=args.follow)
                _send(run, place, interrupted, follow=args.follow)
            except FnetError as error:
                errors.append(error)
            if interrupted.is_set():
                return 130
    finally:
        signal.signal(signal.SIGINT, before)
    for earlier in errors[:-1]:
        print(f"error: {earlier}", file=sys.stderr)
    if errors:
        raise errors[-1]
    return 0


def _all_runs() -> list[RunDir]:
    """Return the runs with a metrics log, except those that are being trained and sent by their own job."""
    root = run_root()
    runs = [run for path in sorted(root.glob("*")) if (run := RunDir(path)).metrics_log.exists()]
    if not (found := [run for run in runs if not _sends_itself(run)]):
        raise ConfigError(f"no run in {root.absolute()} has anything to send")
    return found


def _check(run: RunDir, *, follow: bool) -> None:
    if not run.metrics_log.exists() and not (follow and _is_trained(run)):
        raise ConfigError(f"{run.path} has recorded no step yet; there is nothing to send")
    if _sends_itself(run):
        last = last_attempt(run)
        raise ConfigError(f"{run.path} is being trained and sent to W&B by attempt {last.number if last else 0} itself")


def _check_server() -> None:
    """Prepare the SDK. Raises ConfigError if there is no key, or no server answers."""
    from fnet_dist.tracking import mode, wandb_run  # importing the SDK takes seconds: a wrong name is reported before

    wandb_run.prepare_sdk()
    if problem := mode.why_not_online(PROBE_S):
        raise ConfigError(f"W&B cannot be reached from here: {problem}; see WANDB_API_KEY, WANDB_BASE_URL, wandb login")


def _checked(name: str, text: str | None) -> str | None:
    """Return `text`. Raises ConfigError if it is no name of an entity or a project."""
    if text is not None and not is_label(text):
        raise ConfigError(f"--{name} {text!r}: expected {LABEL}")
    return text


def _send(run: RunDir, place: Mapping[str, str], interrupted: threading.Event, *, follow: bool) -> None:
    """Resume the run in W&B, or start it in another `place`, send its rows, and close it.

    With `follow`, send them until the run ends. After Ctrl-C before that, W&B shows the run in its state from before.
    """
    from fnet_dist.tracking import mode, wandb_run

    share_files(run.path)

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

            def open_session(*, ends_run: bool) -> wandb_run.Session:
                return wandb_run.open_session(run, Path(folder), "online", FINISH_S, None, stop, ends_run=ends_run)

            session = open_session(ends_run=not follow)
            there = session.rows_there
            print(f"{run.name}: {session.wandb_run.url}", flush=True)
            wait_for_end = _end_of(run, interrupted, mode.POLL_S) if follow else lambda: True
            rows, written = wandb_run.follow(run, session, every_steps, wait_for_end, lambda: True)
            if follow:
                session.wandb_run.finish()  # not the run's end
            if not (follow and _is_trained(run)):
                if follow:
                    session = open_session(ends_run=True)
                # Without an outcome the run may go on: W&B shows it as stopped.
                outcome = read_outcome(run) or {"status": "stopped", "reason": ""}
                wandb_run.close_session(session, rows, outcome["status"], outcome["reason"])
        except Exception as error:  # the SDK raises many types
            if not mode.is_sdk_error(error):
                raise
            hint = "repeat it later; --entity and --project correct those, --new-id is for a run that was deleted there"
            raise FnetError(f"W&B has not taken all of {run.name}: {mode.describe_sdk_error(error)}; {hint}") from None
    print(f"{run.name}: {written:,} rows sent, {there:,} were there")


def _end_of(run: RunDir, interrupted: threading.Event, poll_s: float) -> Callable[[], bool]:
    """Return a function that waits a moment, and returns True once nothing more is to be sent."""
    return lambda: not _is_trained(run) or interrupted.wait(poll_s)


def _sends_itself(run: RunDir) -> bool:
    return (read_json(run.tracking) or {}).get("mode") == "online" and _is_trained(run)


def _is_trained(run: RunDir) -> bool:
    last = last_attempt(run)
    return last is not None and is_alive(last)
