"""Connect the nodes of a run: node 0 listens and writes its address to begin.json, where the others read it."""

import fcntl
import socket
import struct
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from fnet_dist.errors import FnetError
from fnet_dist.run.attempt import STALE_S, Attempt, last_attempt, read_heartbeat
from fnet_dist.run.run_dir import RunDir

_SIOCGIFADDR = 0x8915  # netdevice(7)
ANYWHERE = "192.0.2.1"  # no host has it (RFC 5737), so the default route leads there
LOOK_EVERY_S = 0.2  # each look is a request to the file server
CONNECT_S = 30.0  # a firewall drops packets without an answer: connect would try for minutes


def open_listening_socket(interface: str | None, peer: str | None) -> socket.socket:
    """Return a socket that listens on a free port, at the address of `interface`.

    Without one: at the address by which this node reaches `peer`, a host's name or address; else at that of the default
    route, or on loopback. Raises FnetError if the interface has no address or there is no route to the peer.
    """
    try:
        host = _address_of(interface) if interface else _route_to(peer or ANYWHERE)
    except FnetError:
        if peer:
            raise
        host = "127.0.0.1"  # a machine without a network
    if host is None:
        there = ", ".join(name for _, name in socket.if_nameindex())
        raise FnetError(f"network interface {interface!r} has no IPv4 address here; this node has {there}")
    return socket.create_server((host, 0), backlog=4096)  # the kernel cuts the backlog to net.core.somaxconn


@contextmanager
def meeting_place(address: str | None, interface: str | None = None) -> Iterator[dict[str, str]]:
    """Yield the environment variables by which ranks connect: to `address`, or on one node through a private file.

    A file needs no port, which another user of the node could connect to. gloo and NCCL listen on loopback there; on
    several nodes on `interface`, else on the one that leads to `address`.
    """
    with tempfile.TemporaryDirectory(prefix="fnet-") as private:  # with mode 0700
        host, _, port = (address or "127.0.0.1:0").rpartition(":")
        name = "lo" if address is None else interface
        if name is None:
            mine = _route_to(host)
            name = next((name for _, name in socket.if_nameindex() if _address_of(name) == mine), None)
        # "=": NCCL takes a bare name for a prefix, and eth1 for eth10 too.
        named = {} if name is None else {"GLOO_SOCKET_IFNAME": name, "NCCL_SOCKET_IFNAME": f"={name}"}
        init_method = f"file://{private}/meeting" if address is None else f"tcp://{address}"
        yield {"MASTER_ADDR": host, "MASTER_PORT": port, "FNET_INIT_METHOD": init_method, **named}


def add_meeting(env: Mapping[str, str], meeting: Mapping[str, str]) -> dict[str, str]:
    """Return a rank's environment `env` with `meeting` added; a network interface that the user has named stays."""
    kept = {name: env[name] for name in meeting if name.endswith("_SOCKET_IFNAME") and env.get(name)}
    return {**env, **meeting, **kept}


def check_connection(address: str, is_over: Callable[[], bool]) -> None:
    """Raise FnetError unless a connection to `address` succeeds within CONNECT_S, or the attempt `is_over` before."""
    # Without this check torch would wait for its own timeout, and name neither host nor port.
    host, _, port = address.rpartition(":")
    began = time.monotonic()
    while not is_over():
        try:
            socket.create_connection((host, int(port)), timeout=5).close()
            return
        except OSError as error:
            if time.monotonic() - began > CONNECT_S:
                raise FnetError(  # usually a firewall, or an address of a network that nodes do not share
                    f"{socket.gethostname()} cannot reach node 0 at {host} port {port} within {CONNECT_S:g} s: "
                    f"{error.strerror or error}; if the nodes share another network, name it: `interface` in "
                    "slurm/site.toml, or GLOO_SOCKET_IFNAME"
                ) from None
        time.sleep(LOOK_EVERY_S)


def _route_to(host: str) -> str:
    """Return this node's address on the route to `host`: connecting a UDP socket looks it up and sends nothing."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((host, 9))  # any port: nothing is sent
        except OSError as error:
            raise FnetError(f"{socket.gethostname()} has no route to {host}: {error.strerror or error}") from None
        return str(probe.getsockname()[0])


def _address_of(interface: str) -> str | None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            answer = fcntl.ioctl(probe, _SIOCGIFADDR, struct.pack("256s", interface.encode()[:15]))
        except OSError:
            return None  # the interface has no IPv4 address
    return socket.inet_ntoa(answer[20:24])


class HeartbeatMonitor:
    """Another node's view of an attempt: whether it goes on, by its files and by changes of its heartbeat."""

    def __init__(self, attempt: Attempt) -> None:
        self._attempt = attempt
        self._seen, self._since = read_heartbeat(attempt), time.monotonic()  # clocks of two nodes may differ

    def is_over(self) -> bool:
        """Return True if it has ended, a newer one has begun, or the heartbeat has not changed for STALE_S."""
        if (heartbeat := read_heartbeat(self._attempt)) != self._seen:
            self._seen, self._since = heartbeat, time.monotonic()
        silent = time.monotonic() - self._since > STALE_S
        return silent or self._attempt.is_superseded or self._attempt.end.exists()

    def wait(self) -> None:
        """Wait until it is over."""
        while not self.is_over():
            time.sleep(LOOK_EVERY_S)


def wait_for_attempt(
    run: RunDir, after: int, begun: int, patience_s: float, is_stopped: Callable[[], bool], job: tuple[str, int] | None
) -> Attempt | None:
    """Wait for node 0 to claim an attempt with a number above `after`; None if this node is asked to stop meanwhile.

    Attempts above `begun` were claimed while this node waited. An earlier one may be left of a node 0 that died: it
    counts once its heartbeat changes. In a Slurm job (id and restart count) only attempts of this start of the job
    count: node 0 of an earlier start may be cut off and still run. Raises FnetError after `patience_s`.
    """
    began, seen = time.monotonic(), dict[int, str | None]()
    while time.monotonic() - began < patience_s:
        attempt = last_attempt(run)
        if attempt is not None and attempt.number > after:
            begin, heartbeat = attempt.read_begin(), read_heartbeat(attempt)
            is_new = attempt.number > begun or seen.setdefault(attempt.number, heartbeat) != heartbeat
            if is_new and job in (None, (begin["slurm_job_id"], begin["slurm_restart_count"])):
                return attempt
        if is_stopped():
            return None
        time.sleep(LOOK_EVERY_S)
    raise FnetError(
        f"node 0 has begun no attempt of {run.path} within {patience_s:g} s; does it run, and share this directory?"
    )
