"""Download with real processes and a real server: one download for all ranks, one failure for all, no files left."""

import contextlib
import gzip
import io
import multiprocessing
import os
import subprocess
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from filelock import FileLock
from torchvision.datasets import FashionMNIST

from fnet_dist.errors import DataError
from fnet_dist.recipes.fashion_mnist import download, files
from fnet_dist.recipes.fashion_mnist.dataset import build_dataset
from fnet_dist.recipes.fashion_mnist.settings import DataConfig

pytestmark = [pytest.mark.processes, pytest.mark.usefixtures("labels")]

RANKS = 4
LABELS = ("train-labels-idx1-ubyte", "t10k-labels-idx1-ubyte")


class Handler(BaseHTTPRequestHandler):
    """Count requests, and answer with the mirror's archives."""

    def answer(self):
        mirror = self.server
        name = self.path.removeprefix("/")
        mirror.requests[name] += 1
        if mirror.silent:
            mirror.asked.set()
            self.rfile.read(1)  # until the client goes away
            mirror.left.set()
            return
        if name not in mirror.archives:
            self.send_error(404)
            return
        self.send_response(200)
        if not mirror.endless:
            self.send_header("Content-Length", str(len(mirror.archives[name])))
        self.end_headers()
        with contextlib.suppress(ConnectionError):
            self.wfile.write(mirror.archives[name])
            while mirror.endless:
                self.wfile.write(mirror.endless)
                time.sleep(0.01)
        mirror.left.set()

    do_GET = answer  # noqa: N815, the name that http.server looks for

    def log_message(self, *args):
        pass


class Mirror(ThreadingHTTPServer):
    """An HTTP server on loopback; `archives` maps names to content."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.requests = Counter()
        self.archives = {}
        self.endless = b""  # sent again and again after each archive
        self.silent = False
        self.asked, self.left = threading.Event(), threading.Event()

    def hold(self, name, content):
        # Without a time stamp: the same archive each time.
        self.archives[f"{name}.gz"] = gzip.compress(content, compresslevel=1, mtime=0)

    def addresses(self):
        """The value of FashionMNIST.mirrors that makes a process download from here."""
        return [f"http://127.0.0.1:{self.server_port}/"]


@pytest.fixture
def mirror(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with Mirror() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def raw(root):
    """The folder of the files, and of all that a download writes."""
    return root / files.FOLDERS[0]


@pytest.fixture
def labels(raw):
    """The two label files' names and content; they are missing in `raw`."""
    content = {name: (raw / name).read_bytes() for name in LABELS}
    for name in LABELS:
        (raw / name).unlink()
    return content


@pytest.fixture(scope="module")
def ranks():
    """RANKS processes that have finished their imports."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torchvision.datasets", "fnet_dist.recipes.fashion_mnist.dataset"])
    barrier = context.Barrier(RANKS, timeout=60)
    with ProcessPoolExecutor(RANKS, mp_context=context, initializer=become_a_rank, initargs=(barrier,)) as executor:
        executor.submit(os.getpid).result()  # starts the executor's own thread, before any test looks for leaks
        yield executor


def become_a_rank(barrier):
    class TogetherLock(FileLock):
        """A lock that no rank acquires before all ranks have found the files missing."""

        def acquire(self, *args, **kwargs):
            barrier.wait()
            return super().acquire(*args, **kwargs)

    download.FileLock = TogetherLock


def build(root, mirrors):
    """In a rank, return the size of the test data or the error, and the output."""
    os.environ["no_proxy"] = "127.0.0.1"
    FashionMNIST.mirrors = mirrors
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(out):
        try:
            result = str(len(build_dataset(DataConfig(root=str(root)), "test", torch.device("cpu"))))
        except DataError as error:
            result = str(error)
    return result, out.getvalue()


def build_on_all(ranks, root, mirror):
    return list(ranks.map(build, [root] * RANKS, [mirror.addresses()] * RANKS, timeout=120))


def fetch_here(root, mirror, monkeypatch):
    monkeypatch.setattr(FashionMNIST, "mirrors", mirror.addresses())
    download.fetch(root)


def listing(root):
    return sorted(str(path.relative_to(root)) for path in root.rglob("*") if not path.is_dir())


def test_one_rank_downloads_for_all_and_all_raise_its_error(ranks, mirror, root, labels):
    failed = build_on_all(ranks, root, mirror)
    assert len(set(failed)) == 1
    message, written = failed[0]
    assert "HTTP Error 404" in message
    assert written == ""
    assert mirror.requests.total() == 1
    assert build_on_all(ranks, root, mirror) == failed
    assert mirror.requests.total() == 2, "a failure is new, though its message is that of the last one"

    for name, content in labels.items():
        mirror.hold(name, content)
    mirror.requests.clear()
    assert build_on_all(ranks, root, mirror) == [("10000", "")] * RANKS
    assert mirror.requests == dict.fromkeys(mirror.archives, 1)
    assert listing(root) == sorted(f"FashionMNIST/raw/{name}" for name in [".fetch.lock", *files.OFFICIAL])
    assert not any(files.verify(root).values())


def test_missing_files_are_downloaded_beside_those_that_are_there(mirror, raw, labels, monkeypatch):
    for name, content in labels.items():
        mirror.hold(name, content)
    fetch_here(raw, mirror, monkeypatch)  # data.root is two levels too deep
    assert listing(raw) == sorted([".fetch.lock", *files.OFFICIAL])


def flip_the_last_bit(content):
    return content[:-1] + bytes([content[-1] ^ 1])


NOT_THE_FILE = "what came as train-labels-idx1-ubyte is not the official file: found 60,008 bytes with sha256 "


@pytest.mark.parametrize(
    ("damage", "endless", "message"),
    [
        (flip_the_last_bit, b"", NOT_THE_FILE),
        (flip_the_last_bit, bytes(10_000), NOT_THE_FILE),
        (lambda content: content + bytes(10**8), b"", "is larger than the official 60,008 bytes"),
        (lambda content: content[:-1], b"", "found 60,007 bytes with sha256"),
    ],
)
def test_nothing_is_kept_of_a_file_that_is_not_the_official_one(
    mirror, root, raw, labels, monkeypatch, damage, endless, message
):
    before = listing(raw)
    for name, content in labels.items():
        mirror.hold(name, damage(content))
    mirror.endless = endless
    with pytest.raises(DataError, match=message):
        fetch_here(root, mirror, monkeypatch)
    assert listing(raw) == sorted([*before, ".fetch.failed", ".fetch.lock"])
    assert not list(raw.glob(".fetching-*"))
    assert mirror.left.wait(5)  # an endless answer is not read on


def test_an_answer_that_is_not_a_gzip_file_is_refused(mirror, root, monkeypatch):
    mirror.archives["train-labels-idx1-ubyte.gz"] = b"<html>please log in</html>"
    mirror.endless = b"<p>"
    with pytest.raises(DataError, match="is not a gzip file"):
        fetch_here(root, mirror, monkeypatch)
    assert mirror.left.wait(5)


@pytest.mark.skipif(os.geteuid() != 0, reason="a small disk is mounted, which only root may")
def test_a_full_disk_is_named_and_nothing_of_the_download_stays(mirror, root, raw, labels, real_data, monkeypatch):
    for name, content in labels.items():
        mirror.hold(name, content)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(raw)], check=True)
    try:
        for name in {*files.OFFICIAL} - {*LABELS}:
            (raw / name).symlink_to(real_data / files.FOLDERS[0] / name)
        with pytest.raises(DataError, match=r"not downloaded \(No space left on device: .*raw"):
            fetch_here(root, mirror, monkeypatch)
        assert {path.name for path in raw.iterdir()} == {".fetch.lock", *files.OFFICIAL} - {*LABELS}
    finally:
        subprocess.run(["umount", "--lazy", str(raw)], check=True)


def test_the_next_mirror_is_tried_when_one_does_not_have_the_official_file(mirror, root, labels, monkeypatch):
    for name, content in labels.items():
        mirror.hold(name, content)
        mirror.archives[f"bad/{name}.gz"] = gzip.compress(flip_the_last_bit(content))
    [address] = mirror.addresses()
    monkeypatch.setattr(FashionMNIST, "mirrors", [f"{address}none/", f"{address}bad/", address])
    download.fetch(root)
    assert not any(files.verify(root).values())


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ({"CONNECT_S": 0.5}, "timed out"),
        ({"QUIET_S": 0.5}, r"no byte came for 0\.5 s"),
    ],
)
def test_a_silent_server_fails_within_the_time_limit(mirror, root, raw, monkeypatch, limits, message):
    assert download.CONNECT_S < download.QUIET_S <= 20
    for name, limit in limits.items():
        monkeypatch.setattr(download, name, limit)
    mirror.silent = True
    start = time.monotonic()
    with pytest.raises(DataError, match=message):
        fetch_here(root, mirror, monkeypatch)
    assert time.monotonic() - start < 8
    assert mirror.asked.is_set()
    assert not list(raw.glob(".fetching-*"))


def test_a_slow_download_fails_at_the_total_limit_and_closes_its_connection(mirror, root, raw, monkeypatch):
    monkeypatch.setattr(download, "TOTAL_S", 0.3)
    mirror.archives["train-labels-idx1-ubyte.gz"] = b"\x1f\x8b\x08\x08" + bytes(6)
    mirror.endless = b"x"  # gzip's header holds a file name, which ends at a zero byte that never comes
    with pytest.raises(DataError, match=r"not done after 0\.3 s"):
        fetch_here(root, mirror, monkeypatch)
    assert mirror.left.wait(5)
    assert not list(raw.glob(".fetching-*"))


def test_a_hanging_name_lookup_fails_in_time_and_does_not_block_the_exit(mirror, root, raw):
    """The resolver has no time limit of its own."""
    program = (
        "import socket, sys, time; from pathlib import Path\n"
        "socket.getaddrinfo = lambda *args, **options: time.sleep(3600)\n"
        "from fnet_dist.recipes.fashion_mnist import download; download.QUIET_S = 0.5\n"
        "from fnet_dist.errors import DataError\n"
        "try: download.fetch(Path(sys.argv[1]))\n"
        "except DataError as error: sys.exit(str(error))"
    )
    ended = subprocess.run(
        [sys.executable, "-c", program, str(root)], capture_output=True, text=True, check=False, timeout=60
    )
    assert ended.returncode == 1
    assert "no byte came for 0.5 s" in ended.stderr
    assert not list(raw.glob(".fetching-*"))


def test_a_killed_process_ends_its_download_and_the_next_removes_its_files(
    ranks, mirror, root, raw, labels, monkeypatch
):
    for name, content in labels.items():
        mirror.hold(name, content)
    mirror.silent = True
    victim = multiprocessing.get_context("forkserver").Process(target=build, args=(root, mirror.addresses()))
    victim.start()
    assert mirror.asked.wait(60)
    victim.kill()
    victim.join()
    assert mirror.left.wait(5)  # CONNECT_S would end it after ten
    assert len(list(raw.glob(".fetching-*"))) == 1
    mirror.silent = False
    mirror.archives.clear()
    with pytest.raises(DataError, match="HTTP Error 404"):
        fetch_here(root, mirror, monkeypatch)
    assert not list(raw.glob(".fetching-*"))


def test_a_lock_that_is_held_too_long_is_named(root, raw, monkeypatch):
    monkeypatch.setattr(download, "_LOCK_S", 0.1)
    with FileLock(raw / ".fetch.lock"), pytest.raises(DataError, match=r"another process has held .*/\.fetch\.lock"):
        download.fetch(root)
