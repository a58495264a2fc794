"""Fetching with real processes and a real server: one download for all, one failure for all, nothing left behind."""

import contextlib
import gzip
import hashlib
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

from fnet_dist.config.schema import DataConfig
from fnet_dist.data import download
from fnet_dist.data import fashion_mnist as fetch
from fnet_dist.dataset import build_dataset
from fnet_dist.errors import DataError

pytestmark = pytest.mark.processes

RANKS = 4
IMAGES = ("train-images-idx3-ubyte", "t10k-images-idx3-ubyte")
LABELS = ("train-labels-idx1-ubyte", "t10k-labels-idx1-ubyte")


class Handler(BaseHTTPRequestHandler):
    """Counts requests, and answers with what the mirror holds."""

    def answer(self):
        mirror = self.server
        name = self.path.removeprefix("/")
        mirror.requests[self.command, name] += 1
        if mirror.silent == self.command:
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
        if self.command == "HEAD":
            return
        with contextlib.suppress(ConnectionError):
            self.wfile.write(mirror.archives[name])
            while mirror.endless:
                self.wfile.write(bytes(10_000))

    do_HEAD = do_GET = answer  # noqa: N815, the names that http.server looks for

    def log_message(self, *args):
        pass


class Mirror(ThreadingHTTPServer):
    """An HTTP server on loopback; `archives` maps names to what is served."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.requests = Counter()
        self.archives = {}
        self.endless = False
        self.silent = None  # or the command that is never answered
        self.asked, self.left = threading.Event(), threading.Event()

    def hold(self, name, content):
        # Without a time stamp: the same archive each time.
        self.archives[f"{name}.gz"] = gzip.compress(content, compresslevel=1, mtime=0)

    def settings(self):
        """What a process must know to fetch from here: FashionMNIST's mirrors and resources."""
        resources = [
            (f"{name}.gz", hashlib.md5(self.archives.get(f"{name}.gz", b"")).hexdigest()) for name in IMAGES + LABELS
        ]
        return [f"http://127.0.0.1:{self.server_port}/"], resources


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
def root(tmp_path, real_data):
    """A data folder that lacks the label files."""
    raw = tmp_path / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    for name in IMAGES:
        (raw / name).symlink_to(real_data / "FashionMNIST" / "raw" / name)
    return tmp_path


@pytest.fixture
def labels(real_data):
    """The two label files' names and content."""
    return {name: (real_data / "FashionMNIST" / "raw" / name).read_bytes() for name in LABELS}


@pytest.fixture(scope="module")
def ranks():
    """RANKS processes that have imported everything already."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torchvision.datasets", "fnet_dist.dataset"])
    barrier = context.Barrier(RANKS, timeout=60)
    with ProcessPoolExecutor(RANKS, mp_context=context, initializer=become_a_rank, initargs=(barrier,)) as executor:
        executor.submit(os.getpid).result()  # starts the executor's own thread, before any test looks for leaks
        yield executor


def become_a_rank(barrier):
    class TogetherLock(FileLock):
        """Nobody takes the lock before all have seen what is missing, and are about to wait."""

        def acquire(self, *args, **kwargs):
            barrier.wait()
            return super().acquire(*args, **kwargs)

    fetch.FileLock = TogetherLock


def build(root, settings):
    """In a rank: the size of the test data or the error, and what was written to stdout and stderr."""
    os.environ["no_proxy"] = "127.0.0.1"
    FashionMNIST.mirrors, FashionMNIST.resources = settings
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(out):
        try:
            result = str(len(build_dataset(DataConfig(root=str(root)), "test", torch.device("cpu"))))
        except DataError as error:
            result = str(error)
    return result, out.getvalue()


def build_on_all(ranks, root, mirror):
    return list(ranks.map(build, [root] * RANKS, [mirror.settings()] * RANKS, timeout=120))


def fetch_here(root, mirror, monkeypatch):
    mirrors, resources = mirror.settings()
    monkeypatch.setattr(FashionMNIST, "mirrors", mirrors)
    monkeypatch.setattr(FashionMNIST, "resources", resources)
    fetch.fetch(root)


def listing(root):
    return sorted(str(path.relative_to(root)) for path in root.rglob("*") if not path.is_dir())


def test_one_rank_fetches_for_all_and_one_failure_is_everybodys(ranks, mirror, root, labels):
    failed = build_on_all(ranks, root, mirror)
    assert len(set(failed)) == 1
    message, written = failed[0]
    assert "HTTP Error 404" in message
    assert written == ""
    assert mirror.requests.total() == 1

    for name, content in labels.items():
        mirror.hold(name, content)
    mirror.requests.clear()
    assert build_on_all(ranks, root, mirror) == [("10000", "")] * RANKS
    gets = {name: count for (command, name), count in mirror.requests.items() if command == "GET"}
    # torchvision gets every file twice: once for the address it is redirected to, once for its content.
    assert gets == dict.fromkeys(mirror.archives, 2)
    assert listing(root) == sorted([".fetch.lock", *(f"FashionMNIST/raw/{name}" for name in IMAGES + LABELS)])
    assert all(check.ok for check in fetch.verify(root))


@pytest.mark.parametrize(
    ("endless", "message"),
    [
        (False, "what came as train-labels-idx1-ubyte is not the official file: found 60,008 bytes with sha256 "),
        (True, "File too large"),
    ],
)
def test_of_what_is_not_the_official_file_nothing_is_kept(mirror, root, labels, monkeypatch, endless, message):
    before = listing(root)
    for name, content in labels.items():
        mirror.hold(name, content[:-1] + bytes([content[-1] ^ 1]))
    mirror.endless = endless
    with pytest.raises(DataError, match=message):
        fetch_here(root, mirror, monkeypatch)
    assert listing(root) == sorted([*before, ".fetch.failed", ".fetch.lock"])


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ({"CONNECT_S": 0.5}, "timed out"),
        ({"QUIET_S": 0.5}, r"no answer within 0\.5 s"),
    ],
)
def test_a_server_that_never_answers_is_given_up_in_time(mirror, root, monkeypatch, limits, message):
    assert download.CONNECT_S < download.QUIET_S <= 20
    for name, limit in limits.items():
        monkeypatch.setattr(download, name, limit)
    mirror.silent = "HEAD"
    start = time.monotonic()
    with pytest.raises(DataError, match=message):
        fetch_here(root, mirror, monkeypatch)
    assert time.monotonic() - start < 8
    assert mirror.asked.is_set()
    assert not list(root.glob(".fetching-*"))


def test_a_killed_fetch_ends_its_download_and_the_next_one_cleans_up(ranks, mirror, root, labels, monkeypatch):
    for name, content in labels.items():
        mirror.hold(name, content)
    mirror.silent = "GET"
    victim = multiprocessing.get_context("forkserver").Process(target=build, args=(root, mirror.settings()))
    victim.start()
    assert mirror.asked.wait(60)
    victim.kill()
    victim.join()
    assert mirror.left.wait(5)  # CONNECT_S would end it after ten
    assert len(list(root.glob(".fetching-*"))) == 1
    mirror.archives.clear()
    with pytest.raises(DataError, match="HTTP Error 404"):
        fetch_here(root, mirror, monkeypatch)
    assert not list(root.glob(".fetching-*"))


@pytest.mark.parametrize(
    ("parent", "quiet_s", "total_s", "message"),
    [
        ("os.getppid()", 0.3, 60, "no byte came for 0.3 s"),
        ("os.getppid()", 60, 0.3, "not done after 0.3 s, when 5 bytes had come"),
        ("0", 60, 60, "nobody waits for it"),
    ],
)
def test_a_download_gives_up_by_itself(tmp_path, parent, quiet_s, total_s, message):
    (tmp_path / "part").write_bytes(b"12345")
    program = "import os; from fnet_dist import download; download._watch(download._Order("
    program += f"{parent}, {str(tmp_path)!r}, [], 1, 1, {quiet_s}, {total_s}))"
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stdout, ended.stderr) == (1, message, "")


def test_a_lock_that_is_held_for_too_long_is_named(root, monkeypatch):
    monkeypatch.setattr(fetch, "_WAIT_S", 0.1)
    with FileLock(root / ".fetch.lock"), pytest.raises(DataError, match=r"another process has held .*/\.fetch\.lock"):
        fetch.fetch(root)
