"""torchvision's download, in a process of its own.

That process can be ended whatever it hangs in (name servers are asked without a time limit), cannot fill the disk,
dies with its parent, and keeps torchvision's progress bars out of the job's output.
"""

import json
import os
import resource
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NoReturn
from urllib.request import Request, urlopen

CONNECT_S = 10.0  # for one address, or for one read
QUIET_S = 20.0  # for all addresses and mirrors together, without a byte coming
TOTAL_S = 600.0  # 30 MB at 50 kB/s


@dataclass(frozen=True)
class _Order:
    """What the process is to do, and for how long: `files` are (archive, md5, addresses)."""

    parent: int
    folder: str
    files: Sequence[tuple[str, str, Sequence[str]]]
    most_bytes: int
    connect_s: float
    quiet_s: float
    total_s: float


def download(folder: Path, names: Sequence[str], most_bytes: int) -> str | None:
    """Have torchvision download Fashion-MNIST's files `names` and unpack them into `folder`; none may be larger.

    Gives None, or in one line why it failed.
    """
    from torchvision.datasets import FashionMNIST

    md5 = dict(FashionMNIST.resources)
    archives = [f"{name}.gz" for name in names]
    files = [(archive, md5[archive], [mirror + archive for mirror in FashionMNIST.mirrors]) for archive in archives]
    order = _Order(os.getpid(), str(folder), files, most_bytes, CONNECT_S, QUIET_S, TOTAL_S)
    child = subprocess.run(
        [sys.executable, "-m", __name__, json.dumps(asdict(order))],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        start_new_session=True,  # Ctrl-C is the parent's to answer
        check=False,
    )
    if child.returncode == 0:
        return None
    return " ".join(child.stdout.split()) or f"the download ended with exit code {child.returncode}"


def _carry_out(order: _Order) -> None:
    socket.setdefaulttimeout(order.connect_s)
    resource.setrlimit(resource.RLIMIT_FSIZE, (order.most_bytes, order.most_bytes))
    _ask_a_mirror(order)
    from torchvision.datasets.utils import download_and_extract_archive

    threading.Thread(target=_watch, args=(order,), daemon=True).start()
    for archive, md5, addresses in order.files:
        why = ""
        for address in addresses:
            try:
                download_and_extract_archive(address, order.folder, filename=archive, md5=md5)
                break
            except Exception as error:
                why = _reason(address, error)
        else:
            _give_up(why)


def _ask_a_mirror(order: _Order) -> None:
    """Give up before the seconds that importing torchvision takes, if no mirror answers."""
    addresses = order.files[0][2]
    patience = threading.Timer(
        order.quiet_s, _give_up, [f"{' '.join(addresses)}: no answer within {order.quiet_s:g} s"]
    )
    patience.daemon = True
    patience.start()
    why = ""
    for address in addresses:
        try:
            urlopen(Request(address, method="HEAD")).close()
            break
        except Exception as error:
            why = _reason(address, error)
    else:
        _give_up(why)
    patience.cancel()


def _watch(order: _Order) -> None:
    start = last_byte = time.monotonic()
    most = 0
    try:
        while os.getppid() == order.parent:
            time.sleep(0.2)
            now, size = time.monotonic(), sum(path.stat().st_size for path in Path(order.folder).iterdir())
            if size > most:
                most, last_byte = size, now
            if now - last_byte > order.quiet_s:
                _give_up(f"no byte came for {order.quiet_s:g} s")
            if now - start > order.total_s:
                _give_up(f"not done after {order.total_s:g} s, when {size:,} bytes had come")
    finally:
        _give_up("nobody waits for it")


def _reason(address: str, error: Exception) -> str:
    return f"{address}: {error or type(error).__name__}"


def _give_up(why: str) -> NoReturn:
    """End the process, from whatever thread, and even where nobody reads why."""
    try:
        sys.stdout.write(why)
        sys.stdout.flush()
    finally:
        os._exit(1)


if __name__ == "__main__":
    _carry_out(_Order(**json.loads(sys.argv[1])))
