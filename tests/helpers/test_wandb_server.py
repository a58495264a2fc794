"""The fake W&B backend of tests/helpers/wandb_server.py serves the real SDK, and its faults work."""

import base64
import os
import re
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.helpers.processes import wait_until
from tests.helpers.wandb_http import API_KEY
from tests.helpers.wandb_runs import Run
from tests.helpers.wandb_server import WandbServer

pytestmark = [pytest.mark.processes, pytest.mark.timeout(120)]

# Goes on after the last step that the server knows of. Reads "log N", "model" and "finish CODE" on its standard
# input and says each time that it is done.
TRAINER = """
import sys, wandb
from pathlib import Path
settings = wandb.Settings(console="off", silent=True, init_timeout=20, finish_timeout=30)
run = wandb.init(project="project", id="one", resume="allow", group="group", config={"lr": 0.1}, settings=settings)
last = run.summary.get("trainer/step", -1)
print("started", run.resumed, run.starting_step, last, flush=True)
for word, *value in map(str.split, sys.stdin):
    if word == "log":
        for last in range(last + 1, last + 1 + int(value[0])):
            run.log({"trainer/step": last, "loss": 1 / (last + 1)})
    elif word == "model":
        Path("model.bin").write_text("weights")
        run.log_model("model.bin", "model", aliases=["best"])
    else:
        run.finish(exit_code=int(value[0]))
    print("done", flush=True)
"""


class Trainer:
    """A process that logs to W&B on command."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process

    def line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def tell(self, words: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(words + "\n")
        self.process.stdin.flush()
        assert self.line() == "done"

    def end(self, code: int = 0) -> None:
        self.tell(f"finish {code}")
        assert self.process.stdin is not None
        self.process.stdin.close()
        assert self.process.wait(30) == 0


@contextmanager
def trainer(server: WandbServer, folder: Path, **environment: str) -> Iterator[Trainer]:
    """Run a trainer in `folder`, its standard error in "errors" there; kill it at the end, and so its wandb-core."""
    outside = {name: value for name, value in os.environ.items() if not name.startswith("WANDB")}
    with (folder / "errors").open("w") as errors:
        process = subprocess.Popen(
            [sys.executable, "-c", TRAINER],
            cwd=folder,
            env=outside | server.environment() | environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        )
    with process:
        try:
            yield Trainer(process)
        finally:
            process.kill()


def steps(run: Run) -> list[tuple[int, int]]:
    """Return W&B's step and our step of each line."""
    return [(row["_step"], row["trainer/step"]) for row in run.history]


def straight(count: int) -> list[tuple[int, int]]:
    """Return what `steps` returns if each row is there once and in order."""
    return [(step, step) for step in range(count)]


def test_each_row_arrives_once_and_in_order_with_the_run_and_its_model(tmp_path: Path) -> None:
    with WandbServer() as server, trainer(server, tmp_path) as job:
        assert job.line() == "started False 0 -1"
        job.tell("log 500")
        job.tell("model")
        job.end()
        run = server.runs["one"]
        assert steps(run) == straight(500)
        assert run.history[3]["loss"] == 0.25
        assert run.summary["trainer/step"] == 499
        assert (run.state, run.exit_code, run.initialised) == ("finished", 0, 1)
        assert (run.entity, run.project, run.group, run.config) == ("tester", "project", "group", {"lr": 0.1})
        assert run.artifacts == {"model": [{"model.bin": b"weights"}]}
        assert run.files["config.yaml"]
        assert server.requests.count(("graphql", "CommitArtifact")) == 1


def test_a_killed_run_resumes_after_its_last_row(tmp_path: Path) -> None:
    with WandbServer() as server:
        with trainer(server, tmp_path) as job:
            job.line()
            job.tell("log 100")
            wait_until(lambda: len(server.runs["one"].history) == 100)
            job.process.send_signal(signal.SIGKILL)
        run = server.runs["one"]
        assert run.state == "running"  # the server has not received its end
        run.crashed_after_s = 0
        assert run.state == "crashed"
        run.crashed_after_s = 300
        with trainer(server, tmp_path) as job:
            assert job.line() == "started True 100 99"
            job.tell("log 50")
            job.end()
        assert steps(run) == straight(150)
        assert (run.overwritten, run.missing_lines, run.initialised, run.state) == ([], [], 2, "finished")


def test_a_lost_answer_does_not_duplicate_a_row(tmp_path: Path) -> None:
    with WandbServer() as server, trainer(server, tmp_path) as job:
        job.line()
        job.tell("log 100")
        wait_until(lambda: len(server.runs["one"].history) == 100)
        server.lose_answers.add("file_stream")
        del server.requests[:]
        job.tell("log 100")
        wait_until(lambda: server.requests.count(("file_stream", "one")) >= 2)
        server.lose_answers.clear()
        job.tell("log 100")
        job.end()
        run = server.runs["one"]
        assert steps(run) == straight(300)
        assert (run.overwritten, run.missing_lines, run.state) == ([], [], "finished")


def test_a_wrong_key_is_rejected(tmp_path: Path) -> None:
    with WandbServer() as server:
        with trainer(server, tmp_path, WANDB_API_KEY=API_KEY[::-1]) as job:
            assert job.line() == ""
            assert job.process.wait(30) == 1
        assert "error 401" in (tmp_path / "errors").read_text()
        assert server.runs == {}


def test_a_server_that_refuses_connections_keeps_its_port_and_data() -> None:
    with WandbServer() as server:
        key = base64.b64encode(f"api:{API_KEY}".encode()).decode()
        ask = urllib.request.Request(
            server.url + "/graphql", b'{"query": "query Viewer {}"}', {"Authorization": f"Basic {key}"}
        )
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(ask, timeout=5) as answer:
            assert re.search(b"tester", answer.read())
        server.refuse()
        with pytest.raises(urllib.error.URLError, match="refused"):
            opener.open(ask, timeout=5)
        server.accept()
        with opener.open(ask, timeout=5) as answer:
            assert answer.status == 200
        assert server.requests == [("graphql", "Viewer")] * 2
