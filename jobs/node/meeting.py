"""How nodes find each other: node 0 publishes its address in the attempt it claims, the others look there."""

import fcntl
import socket
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fnet_dist.attempt import STALE_S, Attempt, last_attempt
from fnet_dist.errors import FnetError
from fnet_dist.run_dir import RunDir, read_json

_SIOCGIFADDR = 0x8915  # netdevice(7)
LOOK_EVERY_S = 0.2


def open_door() -> socket.socket:
    """Listen on the interface of the default route (loopback where there is none), on a port that the kernel gives."""
    name = _default_interface()
    host = (name and _address_of(name)) or "127.0.0.1"
    return socket.create_server((host, 0), backlog=4096)


def interface_towards(host: str) -> str | None:
    """The network interface by which this node reaches node 0 at `host`, for GLOO_ and NCCL_SOCKET_IFNAME."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((host, 9))  # asks the routing table, sends nothing
        mine = probe.getsockname()[0]
    return next((name for _, name in socket.if_nameindex() if _address_of(name) == mine), None)


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


class Pulse:
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
    run: RunDir, after: int, begun: int, patience_s: float, asked: Callable[[], bool]
) -> Attempt | None:
    """The newest attempt above number `after` that node 0 holds, or held; None if this node is asked to stop meanwhile.

    Numbers above `begun` were claimed while this node waited. Of the others an old one may be a dead node 0's: one that
    is held changes its `alive`. Raises FnetError after `patience_s`.
    """
    began, seen = time.monotonic(), dict[int, str]()
    while time.monotonic() - began < patience_s:
        attempt = last_attempt(run)
        if attempt is not None and attempt.number > after:
            alive = _alive(attempt)
            if attempt.number > begun or seen.setdefault(attempt.number, alive) != alive:
                return attempt
        if asked():
            return None
        time.sleep(LOOK_EVERY_S)
    raise FnetError(
        f"node 0 has begun no attempt of {run.path} within {patience_s:g} s; does it run, and share this directory?"
    )


def _alive(attempt: Attempt) -> str:
    try:
        return attempt.alive.read_text()
    except OSError:
        return ""
