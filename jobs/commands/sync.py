"""fnet sync [RUN]: send to W&B what it lacks of the metrics log; safe to repeat; --follow (look)"""

import argparse
import signal
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from fnet_dist.config.help import one_line
from fnet_dist.errors import ConfigError, FnetError
from fnet_dist.run.attempt import is_alive, last_attempt
from fnet_dist.run.outcome import read_outcome
from fnet_dist.run.run_dir import RunDir, read_json
from fnet_dist.run.stop import request_stop
from jobs.runs import find_run_or_job

PROBE_S = 10.0
FINISH_S = 600.0


def main(argv: Sequence[str]) -> int:
    """Send, and say how much; 130 if Ctrl-C ended it.

    Raises ConfigError where there is nothing to send, no key, or the run's own job tracks it online; FnetError if W&B
    does not take it.
    """
    parser = argparse.ArgumentParser(
        prog="fnet sync",
        description="Build or continue the run in W&B from the ledger, on a machine with internet and a key.",
    )
    parser.add_argument("run", nargs="?", metavar="RUN", help="a run's name or directory; the newest if left out")
    parser.add_argument("--follow", action="store_true", help="go on while the run is trained, elsewhere perhaps")
    asked = parser.parse_args(argv)
    run = find_run_or_job(asked.run)
    if not run.metrics_log.exists() and not (asked.follow and _is_trained(run)):
        raise ConfigError(f"{run.path} has recorded no step yet; there is nothing to send")
    mode = (read_json(run.tracking) or {}).get("mode")
    last = last_attempt(run)
    if mode == "online" and _is_trained(run):
        raise ConfigError(f"{run.path} is being trained and sent to W&B by attempt {last.number if last else 0} itself")
    interrupted = threading.Event()
    before = signal.signal(signal.SIGINT, lambda number, frame: interrupted.set())
    try:
        _send(run, interrupted, lambda: not asked.follow or not _is_trained(run))
    finally:
        signal.signal(signal.SIGINT, before)
    return 130 if interrupted.is_set() else 0


def _send(run: RunDir, interrupted: threading.Event, is_through: Callable[[], bool]) -> None:
    """Open the run in W&B where it stands, follow the ledger until it is through, and close it."""
    import wandb  # seconds: a mistyped name answers before

    from fnet_dist.tracking import mode as place
    from fnet_dist.tracking import wandb_run as tracking

    tracking.prepare_sdk()
    if missing := place.why_not_online(PROBE_S):
        raise ConfigError(f"W&B cannot be reached from here: {missing}; see WANDB_API_KEY, WANDB_BASE_URL, wandb login")

    def stop() -> None:
        if _is_trained(run):
            request_stop(run, "wandb_stop")

    # What the SDK keeps of this is no use: the ledger has it all.
    with tempfile.TemporaryDirectory(prefix="sync-", ignore_cleanup_errors=True) as folder, _alone(run):
        try:
            settled = place.take_over(run)
            session = tracking.open_session(run, Path(folder), "online", FINISH_S, None, stop)
            print(f"{run.name}: {session.wandb_run.url}", flush=True)
            followed = tracking.follow(
                run,
                session,
                settled.log_every_steps,
                lambda: interrupted.is_set() or is_through(),
                lambda: interrupted.wait(place.LOOK_EVERY_S),
                lambda: True,
            )
            tracking.close_session(run, session, followed, *_how_it_stands(run))
        except (wandb.Error, TimeoutError, ConnectionError) as error:
            raise FnetError(one_line(f"W&B has not taken all of {run.name}: {error}; repeat it later")) from None
    print(f"{run.name}: {followed.written:,} rows sent, {session.rows_there:,} were there")


@contextmanager
def _alone(run: RunDir) -> Iterator[None]:
    """Raises ConfigError if somebody else sends the run."""
    from fnet_dist.tracking import mode as place

    with place.tracking_lock(run, lambda: True) as alone:
        if not alone:
            raise ConfigError(f"another process sends {run.path} to W&B at this moment")
        yield


def _is_trained(run: RunDir) -> bool:
    last = last_attempt(run)
    return last is not None and is_alive(last)


def _how_it_stands(run: RunDir) -> tuple[str, str]:
    """Status and reason as W&B is to show them: only a finished run as finished, one that may go on as stopped."""
    outcome = read_outcome(run)
    return ("stopped", "") if outcome is None else (outcome["status"], outcome["reason"])
