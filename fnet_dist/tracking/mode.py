"""Choose how a run is tracked, online or offline, once for all its attempts; allow one writer at a time."""

import ssl
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace

import filelock
import wandb
from pydantic import ValidationError

from fnet_dist.config.help import one_line
from fnet_dist.config.load import read_section
from fnet_dist.config.schema import TrackingConfig
from fnet_dist.errors import ConfigError
from fnet_dist.run.run_dir import RunDir, read_json, write_json
from fnet_dist.tracking.offline_files import mark_sent, offline_files
from fnet_dist.versions import private_names

PROBE_S = 3.0  # a start of the run waits that long at most for an unreachable server
POLL_S = 0.5  # between looks at the metrics log: short enough to look live


@dataclass(frozen=True)
class TrackingMode:
    """The content of tracking.json, fixed at a run's first start.

    `mode` is online or offline; `why` says why `auto` chose offline. `url` is the run's page in W&B. `synced` means
    that `sync` sends this run: `wandb sync` must not send the SDK's offline files too. `entity`, `project` and `id` are
    what `sync` was told to use in place of the run's settings and id; "" if nothing.
    """

    mode: str
    log_every_steps: int
    why: str = ""
    synced: bool = False
    url: str = ""
    entity: str = ""
    project: str = ""
    id: str = ""


def choose_mode(run: RunDir, tracking: TrackingConfig) -> TrackingMode:
    """Return the run's mode, and save it unless it is `auto`'s online, which the server may still refuse.

    `auto` is online if there is a key and a server answers; it never prompts for a key. Raises OSError if `wandb/`
    cannot be written.
    """
    run.wandb.mkdir(exist_ok=True)
    if (saved := read_mode(run)) is not None:
        return saved
    problem = why_not_online() if tracking.wandb == "auto" else ""
    if run.tracking.exists() and offline_files(run):  # a damaged file: the rows of earlier attempts are in these
        problem = f"{run.tracking.name} was damaged; the run has offline files"
    if problem is None:
        return TrackingMode("online", tracking.log_every_steps)
    return save_mode(run, TrackingMode("offline" if problem else tracking.wandb, tracking.log_every_steps, problem))


def read_mode(run: RunDir) -> TrackingMode | None:
    """Return the run's saved mode, None before it is fixed or if tracking.json is damaged."""
    try:
        return TrackingMode(**(read_json(run.tracking) or {}))
    except TypeError:  # not all of its values are there
        return None


def save_mode(run: RunDir, mode: TrackingMode) -> TrackingMode:
    """Write tracking.json for all attempts of the run; once it exists, only `url` changes. Return `mode`."""
    saved = read_mode(run)
    if saved is None or mode.url:
        write_json(run.tracking, asdict(mode if saved is None else replace(saved, url=mode.url)))
    return mode


def mark_synced(run: RunDir, **place: str) -> TrackingMode:
    """Record that `sync` sends this run, so that `wandb sync` passes over the offline files, also later ones.

    `place` is where all attempts send it from now on: entity, project or id. Raises OSError if the run directory
    cannot be written: rows could then be sent twice.
    """
    run.wandb.mkdir(exist_ok=True)
    mode = read_mode(run) or TrackingMode("offline", read_section(run.config, "tracking").log_every_steps)
    moved = {**place, "url": ""} if place else {}
    mode = TrackingMode(**{**asdict(mode), "synced": True, **moved})
    write_json(run.tracking, asdict(mode))
    mark_sent(run)
    return mode


def why_not_online(probe_s: float = PROBE_S) -> str | None:
    """Return why W&B cannot be used from here, None if there is a key and the server answers within `probe_s`."""
    try:
        missing, url = missing_key(), server_url()
    except ConfigError:  # the SDK has renamed what these call: wandb.init() finds out instead
        return None
    if missing is not None:
        return missing
    return None if server_answers(url, probe_s) else f"{url} does not answer within {probe_s:g} s"


def missing_key() -> str | None:
    """Return why there is no server or no usable API key for it, None if there is one. Does not prompt."""
    # Private, because wandb.login() asks on a terminal and contacts the server. It looks where wandb.init() will look:
    # WANDB_API_KEY, an identity token, ~/.netrc.
    try:
        with private_names("wandb"):
            from wandb.sdk.lib import wbauth

            auth = wbauth.authenticate_session(
                host=server_url(), source="fnet_dist", prompt=False, update_session=False
            )
    except wandb.errors.AuthenticationError as error:
        return str(error)
    except ValidationError as error:
        return describe_sdk_error(error)
    return f"no API key for {server_url()}" if auth is None else None


def describe_sdk_error(error: Exception) -> str:
    """Return an error of the SDK as one line, that of a setting with its name. Holds no key."""
    if isinstance(error, ValidationError):
        first = error.errors()[0]
        name = "_".join(map(str, first["loc"]))
        found = "" if "key" in name else f" {first['input']!r}"
        text = f"setting {name}{found} (WANDB_{name.upper()}, or W&B's settings file): {first['msg']}"
    elif isinstance(error, ConnectionError) or (_is_internal(error) and not str(error)):
        # Of a local socket, or the SDK's MailboxClosedError; errors of the network are wandb.Error.
        text = "wandb-core, the SDK's process on this machine, has ended"
    else:
        text = str(error) or type(error).__name__
    return one_line(text).rstrip(".")


def is_sdk_error(error: Exception) -> bool:
    """Return True for what the SDK raises about its server, the network, its settings or wandb-core."""
    return isinstance(error, (wandb.Error, TimeoutError, ConnectionError, ValidationError)) or _is_internal(error)


def _is_internal(error: Exception) -> bool:
    """Return True for the SDK's exceptions that it does not export, such as those of a closed mailbox."""
    return type(error).__module__.startswith("wandb.sdk.")


def server_url() -> str:
    """Return the URL of the W&B server that the SDK's settings and WANDB_BASE_URL add up to."""
    with private_names("wandb"):  # no public call returns it
        from wandb.sdk import wandb_setup

        return wandb_setup.singleton().settings.base_url


def can_send() -> bool:
    """Return True if the server answers within PROBE_S, or if the SDK does not say which one it is."""
    try:
        return server_answers(server_url(), PROBE_S)
    except ConfigError:
        return True


def server_answers(url: str, within_s: float) -> bool:
    """Return True if anything answers at `url` within `within_s` seconds, through the environment's proxies."""
    answered = threading.Event()

    def request() -> None:
        try:
            urllib.request.urlopen(url, timeout=within_s).close()
        except urllib.error.HTTPError:
            pass
        except OSError as error:  # the SDK may know a certificate that Python does not
            if not isinstance(getattr(error, "reason", None), ssl.SSLError):
                return
        answered.set()

    # In a thread, because urlopen's timeout does not cover name resolution, which can hang for a minute.
    threading.Thread(target=request, daemon=True).start()
    return answered.wait(within_s)


@contextmanager
def tracking_lock(run: RunDir, give_up: Callable[[], bool]) -> Iterator[bool]:
    """Hold the run's lock inside the block: one process at a time sends rows to the server, on this file system.

    Yields False, without the lock, if `give_up` returns True while another process holds it.
    """
    lock, locked = filelock.FileLock(run.tracking_lock, mode=0o660), True
    while locked and not lock.is_locked:
        try:
            lock.acquire(timeout=POLL_S)
        except filelock.Timeout:
            locked = not give_up()
        except (OSError, NotImplementedError):  # a file system without locks: better tracked than not
            break
    try:
        yield locked
    finally:
        lock.release()
