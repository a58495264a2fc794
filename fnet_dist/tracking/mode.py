"""How a run is tracked, settled at its first start: online or offline, and by one writer at a time."""

import ssl
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace

import filelock
import wandb
from wandb.sdk import wandb_setup
from wandb.sdk.lib import wbauth

from fnet_dist.config.load import read_config
from fnet_dist.config.schema import TrackingConfig
from fnet_dist.run.run_dir import RunDir, read_json, write_json
from fnet_dist.tracking.offline_files import mark_sent

PROBE_S = 3.0
LOOK_EVERY_S = 0.5


@dataclass(frozen=True)
class TrackingMode:
    """How a run is tracked, from its first start on: `mode` is online or offline, `why` where nobody has chosen it.

    `url` is where its server shows it. `synced` says that `jobs sync` sends this run: what the SDK has written here is
    not to be sent too. `falls_back` says that `auto` found a server, which has not let us in yet: if it does not,
    offline it is.
    """

    mode: str
    log_every_steps: int
    why: str = ""
    synced: bool = False
    url: str = ""
    falls_back: bool = False


def choose_mode(run: RunDir, tracking: TrackingConfig) -> TrackingMode:
    """Online or offline, as settled at the run's first start. An OSError says that `wandb/` cannot be written.

    `auto` is online if there is a key and a server answers; nobody is ever asked for a key.
    """
    run.wandb.mkdir(exist_ok=True)
    settled = _settled(run)
    if settled is not None:
        return settled
    if tracking.wandb != "auto":
        return save_mode(run, TrackingMode(tracking.wandb, tracking.log_every_steps))
    if missing := why_not_online():
        return save_mode(run, TrackingMode("offline", tracking.log_every_steps, missing))
    return TrackingMode("online", tracking.log_every_steps, falls_back=True)


def save_mode(run: RunDir, place: TrackingMode) -> TrackingMode:
    """Settle `place` for all attempts of the run; of one that is settled, only its address on the server is new."""
    place, settled = replace(place, falls_back=False), _settled(run)
    if settled is None:
        _settle(run, place)
    elif place.url:
        _settle(run, replace(settled, url=place.url))
    return place


def take_over(run: RunDir) -> TrackingMode:
    """From now on `jobs sync` sends this run: `wandb sync` passes over what the SDK has written here, and will write.

    Raises OSError if the run directory cannot be written: rows could then be sent twice.
    """
    run.wandb.mkdir(exist_ok=True)
    place = _settled(run) or TrackingMode("offline", read_config(run.config).tracking.log_every_steps)
    _settle(run, replace(place, synced=True))
    mark_sent(run)
    return place


def _settled(run: RunDir) -> TrackingMode | None:
    found = read_json(run.tracking)
    return None if found is None else TrackingMode(**found)


def _settle(run: RunDir, place: TrackingMode) -> None:
    kept = asdict(place)
    del kept["falls_back"]
    write_json(run.tracking, kept)


def why_not_online(probe_s: float = PROBE_S) -> str | None:
    """Why W&B cannot be reached from here, or None: a key, or a server that answers within `probe_s`."""
    url = wandb_setup.singleton().settings.base_url
    return missing_key() or (None if server_answers(url, probe_s) else f"{url} does not answer within {probe_s:g} s")


def missing_key() -> str | None:
    """That there is no usable key for the server, or None. Asks nobody."""
    url = wandb_setup.singleton().settings.base_url
    try:
        found = wbauth.authenticate_session(host=url, source="fnet_dist", prompt=False, update_session=False)
    except wandb.errors.AuthenticationError as error:
        return str(error)
    return f"no API key for {url}" if found is None else None


def server_answers(url: str, within_s: float) -> bool:
    """Whether anything answers at `url`, through the environment's proxies; a name server may hang too."""
    answered = threading.Event()

    def ask() -> None:
        try:
            urllib.request.urlopen(url, timeout=within_s).close()
        except urllib.error.HTTPError:
            pass
        except OSError as error:  # the SDK may know a certificate that Python does not
            if not isinstance(getattr(error, "reason", None), ssl.SSLError):
                return
        answered.set()

    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(within_s)
    return answered.is_set()


@contextmanager
def tracking_lock(run: RunDir, give_up: Callable[[], bool]) -> Iterator[bool]:
    """Inside, nobody else on this file system writes to the run's online history. False if `give_up` came first."""
    lock = filelock.FileLock(run.tracking_lock)
    while True:
        try:
            lock.acquire(timeout=LOOK_EVERY_S)
            break
        except filelock.Timeout:
            if give_up():
                yield False
                return
        except (OSError, NotImplementedError):  # a file system without locks
            break
    try:
        yield True
    finally:
        lock.release()
