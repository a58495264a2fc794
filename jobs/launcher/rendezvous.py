"""How nodes find each other: node 0 publishes its address in the attempt it claims, the others look there."""

import fcntl
import socket
import struct
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fnet_dist.errors import FnetError
from fnet_dist.run.attempt import STALE_S, Attempt, last_attempt
from fnet_dist.run.run_dir import RunDir, read_json

_SIOCGIFADDR = 0x8915  # netdevice(7)
LOOK_EVERY_S = 0.2
CONNECT_S = 30.0


def open_listening_socket(interface: str | None, peer: str | None) -> socket.socket:
    """Listen on a port that the kernel gives, at the address of `interface`; else at the one by which this node reaches
    `peer`, a host's name or address; else at that of the default route (loopback where there is none).

    Raises FnetError if the interface has no address, or the peer's name none.
    """
    host = _address_of(interface) if interface else _route_to(peer) if peer else None
    if interface and host is None:
        there = ", ".join(name for _, name in socket.if_nameindex())
        raise FnetError(f"network interface {interface!r} has no IPv4 address here; this node has {there}")
    default = _default_interface()
    return socket.create_server((host or (default and _address_of(default)) or "127.0.0.1", 0), backlog=4096)


@contextmanager
def meeting_place(address: str | None, interface: str | None = None) -> Iterator[dict[str, str]]:
    """Where the ranks meet, as variables: node 0's door, or on one node a file that nobody else can reach.

    On one node everything listens on loopback, if it listens at all; on several on `interface`, else on the one that
    leads to the door.
    """
    with tempfile.TemporaryDirectory(prefix="fnet-") as private:  # 0700
        host, _, port = (address or "127.0.0.1:0").rpartition(":")
        name = "lo" if address is None else interface or _interface_of(_route_to(host))
        named = {} if name is None else {"GLOO_SOCKET_IFNAME": name, "NCCL_SOCKET_IFNAME": name}
        where = f"file://{private}/meeting" if address is None else f"tcp://{address}"
        yield {"MASTER_ADDR": host, "MASTER_PORT": port, "FNET_INIT_METHOD": where, **named}


def check_connection(address: str, is_over: Callable[[], bool]) -> None:
    """Raise FnetError, naming host and port, if nothing can be reached at `address` within CONNECT_S.

    Returns as well once the attempt `is_over`: then nobody is to be met.
    """
    host, _, port = address.rpartition(":")
    began = time.monotonic()
    while not is_over():
        try:
            socket.create_connection((host, int(port)), timeout=5).close()
            return
        except OSError as error:
            if time.monotonic() - began > CONNECT_S:
                raise FnetError(
                    f"{socket.gethostname()} cannot reach node 0 at {host} port {port} within {CONNECT_S:g} s: "
                    f"{error.strerror or error}; if the nodes share another network, name it: `interface` in "
                    "slurm/site.toml, or GLOO_SOCKET_IFNAME"
                ) from None
        time.sleep(LOOK_EVERY_S)


def _route_to(host: str) -> str:
    """The own address by which this node reaches `host`. Asks the routing table, sends nothing."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((host, 9))
        except OSError as error:
            raise FnetError(f"{socket.gethostname()} knows no way to {host}: {error.strerror or error}") from None
        mine: str = probe.getsockname()[0]
    return mine


def _interface_of(address: str) -> str | None:
    return next((name for _, name in socket.if_nameindex() if _address_of(name) == address), None)


def _default_interface() -> str | None:
    rows = [row.split() for row in Path("/proc/net/route").read_text().splitlines()[1:]]
    return next((row[0] for row in rows if row[1] == "00000000"), None)


def _address_of(interface: str) -> str | None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            answer = fcntl.ioctl(probe, _SIOCGIFADDR, struct.pack("256s", interface.encode()[:15]))
        except OSError:
            return None  # it has none
    return socket.inet_ntoa(answer[20:24])


class HeartbeatMonitor:
    """Whether an attempt goes on, as a node sees it that does not own it: by its files, and by `alive` that changes."""

    def __init__(self, attempt: Attempt) -> None:
        self._attempt = attempt
        self._seen, self._since = _alive(attempt), time.monotonic()

    def is_over(self) -> bool:
        """Whether it has ended, a newer one has begun, or its owner has shown no life for STALE_S."""
        if (alive := _alive(self._attempt)) != self._seen:
            self._seen, self._since = alive, time.monotonic()
        silent = time.monotonic() - self._since > STALE_S
        return silent or self._attempt.is_superseded or self._attempt.end.exists()

    def wait_for_end(self) -> dict[str, Any] | None:
        """end.json, once it is over; None if it has none."""
        while not self.is_over():
            time.sleep(LOOK_EVERY_S)
        end: dict[str, Any] | None = read_json(self._attempt.end)
        return end


def wait_for_attempt(
    run: RunDir,
    after: int,
    begun: int,
    patience_s: float,
    asked: Callable[[], bool],
    slurm_job: tuple[str, int] | None,
) -> Attempt | None:
    """The newest attempt above number `after` that node 0 holds, or held; None if this node is asked to stop meanwhile.

    Numbers above `begun` were claimed while this node waited. Of the others an old one may be a dead node 0's: one that
    is held changes its `alive`. In a Slurm job (id and restart count) only its own count: the node 0 of an earlier
    start may be cut off and live. Raises FnetError after `patience_s`.
    """
    began, seen = time.monotonic(), dict[int, str]()
    while time.monotonic() - began < patience_s:
        attempt = last_attempt(run)
        if attempt is not None and attempt.number > after and slurm_job in (None, _slurm_job_of(attempt)):
            alive = _alive(attempt)
            if attempt.number > begun or seen.setdefault(attempt.number, alive) != alive:
                return attempt
        if asked():
            return None
        time.sleep(LOOK_EVERY_S)
    raise FnetError(
        f"node 0 has begun no attempt of {run.path} within {patience_s:g} s; does it run, and share this directory?"
    )


def _slurm_job_of(attempt: Attempt) -> tuple[str, int]:
    begin = read_json(attempt.begin)
    return begin["slurm_job_id"], begin["slurm_restart_count"]


def _alive(attempt: Attempt) -> str:
    try:
        return attempt.heartbeat.read_text()
    except OSError:
        return ""
