"""Faults of W&B do not affect training, and W&B has each row exactly once in the end.

The real SDK, against the backend of tests/helpers/wandb_server.py and its faults.
"""

import os
import re
import signal
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

from fnet_dist.run.outcome import read_outcome
from fnet_dist.run.run_dir import RunDir, read_json
from fnet_dist.tracking.client import END_S
from fnet_dist.tracking.offline_files import offline_files
from tests.helpers.processes import Ended, children, start, wait_until
from tests.helpers.tracked_runs import (
    EVERY,
    check_rows,
    end,
    in_wandb,
    last_step,
    one_process,
    read_back,
    sync,
    wait_for_steps,
)
from tests.helpers.wandb_http import API_KEY
from tests.helpers.wandb_server import WandbServer

pytestmark = [pytest.mark.processes, pytest.mark.usefixtures("measured")]


def worker_of(rank_0: int) -> int:
    """Wait for the tracking worker of the process `rank_0`; return its pid."""

    def found() -> int | None:
        for pid in children(rank_0):
            with suppress(OSError):
                if b"fnet_dist.tracking.worker" in Path(f"/proc/{pid}/cmdline").read_bytes():
                    return pid
        return None

    return wait_until(found) or 0


def test_auto_is_offline_if_the_server_rejects_the_key_and_stays_offline(server: WandbServer, tmp_path: Path) -> None:
    """For other reasons to begin offline, such as no key, see test_mode.py."""
    run = RunDir(tmp_path / "r")
    ended = end(one_process(run, "auto", steps=20), **server.environment() | {"WANDB_API_KEY": API_KEY[::-1]})
    assert ended.code == 0, ended.err
    assert len(re.findall(r"W&B: offline \(.*401", ended.out)) == 1
    assert read_json(run.tracking)["mode"] == "offline"
    ended = end(one_process(run, "online", steps=40), **server.environment())
    assert ended.code == 0, ended.err
    assert server.runs == {}
    check_rows(read_back(run), run)


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("address", "W&B: offline (setting base_url 'wandb.local' (WANDB_BASE_URL, or W&B's settings file): "),
        ("package", "W&B: the tracking process has failed with exit code 1 (its error is above); "),
    ],
)
def test_an_error_before_the_session_opens_is_one_line_and_sync_makes_up_for_it(
    server: WandbServer, tmp_path: Path, fault: str, said: str
) -> None:
    (tmp_path / "wandb").mkdir()
    (tmp_path / "wandb" / "__init__.py").write_text("raise RuntimeError('a broken installation')")
    environment = {"WANDB_BASE_URL": "wandb.local"} if fault == "address" else {"PYTHONPATH": str(tmp_path)}
    run = RunDir(tmp_path / "r")
    with start(*one_process(run, "auto", steps=100_000), **server.environment() | environment) as trainer:
        wait_for_steps(run, 20)
        if fault == "address":  # on a busy machine, the SDK's import takes longer than some steps and END_S
            wait_until(lambda: offline_files(run))
        trainer.process.terminate()
        ended = trainer.end()
    assert ended.code == 75, ended.err
    assert ended.out.count(said) == 1, ended.out
    assert f"/fnet sync {run.path}` sends " in ended.out
    sync(run, server)
    check_rows(in_wandb(run, server).history, run)


# An SDK that has renamed what is private, in the worker alone.
RENAMED = """
import sys, types
if "fnet_dist.tracking.worker" in sys.orig_argv:
    import wandb, wandb.util
    from wandb.sdk import wandb_init, wandb_login
    from wandb.sdk.lib import wbauth
    wandb_init.wbauth = wandb_login.wbauth = types.SimpleNamespace(**vars(wbauth))  # the SDK itself goes on
    del wbauth.authenticate_session, wandb.util.get_core_path, wandb.Settings.model_fields["x_disable_machine_info"]
    wandb.Settings.model_rebuild(force=True)
    wandb.Settings.x_disable_machine_info = False
"""


@pytest.mark.soak
def test_with_an_sdk_that_has_renamed_what_is_private_a_run_is_tracked_or_one_line_says_why_not(
    server: WandbServer, tmp_path: Path
) -> None:
    (tmp_path / "sitecustomize.py").write_text(RENAMED)
    renamed = {"PYTHONPATH": str(tmp_path)}
    for key in ("", API_KEY):  # no key: wandb.init() refuses, and `auto` falls back
        run = RunDir(tmp_path / f"key{len(key)}")
        ended = end(one_process(run, "auto", steps=20), **server.environment() | renamed | {"WANDB_API_KEY": key})
        assert ended.code == 0, ended.err
        assert read_json(run.tracking)["mode"] == ("online" if key else "offline"), ended.out
    check_rows(in_wandb(run, server).history, run)
    run = RunDir(tmp_path / "key0")
    ended = end(one_process(run, "auto", steps=40), **renamed)  # the second attempt counts the rows of the first
    assert ended.code == 0, ended.err
    [line] = [line for line in ended.out.splitlines() if "W&B" in line]
    assert re.match(r"WARNING: W&B: wandb [\d.]+ is another .*get_core_path.*; expected wandb\S+: pip install ", line)
    sync(run, server)
    check_rows(in_wandb(run, server).history, run)


@dataclass(frozen=True)
class Trained:
    """A finished run; seconds to its first recorded step, and from the final weights to its exit."""

    run: RunDir
    server: WandbServer
    first_s: float
    end_s: float
    ended: Ended


def train(folder: Path, mode: str, server: WandbServer) -> Trained:
    run, began = RunDir(folder / "r"), time.time()
    with start(*one_process(run, mode, steps=60), **server.environment()) as trainer:
        wait_until(lambda: last_step(run) > 0)
        first_s = time.time() - began
        wait_until(lambda: run.model.exists())
        trained = time.time()
        ended = trainer.end()
        return Trained(run, server, first_s, time.time() - trained, ended)


@pytest.fixture(scope="module")
def at_once(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Trained]]:
    """Three runs at the same time, to be compared: one with W&B disabled, two whose server is away."""
    folder = tmp_path_factory.mktemp("at_once")
    names = ("undisturbed", "refuses", "hangs")
    with WandbServer() as refusing, WandbServer() as hanging:
        refusing.refuse()
        hanging.hang = True
        with ThreadPoolExecutor(3) as threads:
            folders, modes = [folder / name for name in names], ("disabled", "online", "online")
            trained = list(threads.map(train, folders, modes, (refusing, refusing, hanging)))
        yield dict(zip(names, trained, strict=True))


@pytest.mark.parametrize("fault", ["refuses", "hangs"])
def test_a_server_that_is_away_costs_no_step_and_little_time_and_keeps_the_exit_code(
    fault: str, at_once: dict[str, Trained]
) -> None:
    """An online run keeps only its metrics log; a later sync sends what the server lacks."""
    trained = at_once[fault]
    run, server, ended = trained.run, trained.server, trained.ended
    assert ended.code == 0, ended.err
    assert last_step(run) == 60
    # Measured side by side, as a busy machine slows both. A start that waited for W&B would take a minute and a half.
    assert trained.first_s < 1.5 * at_once["undisturbed"].first_s + 5
    assert trained.end_s < at_once["undisturbed"].end_s + END_S + 5
    if fault == "refuses":
        assert f" sync {run.path}` sends what is missing" in ended.out
        server.accept()
    server.hang = False
    sync(run, server)
    check_rows(in_wandb(run, server).history, run)
    assert in_wandb(run, server).state == "finished"


@pytest.mark.soak
def test_a_server_that_dies_before_the_end_does_not_delay_the_run_and_sync_sends_the_rest(
    server: WandbServer, tmp_path: Path
) -> None:
    """Sync is refused, with what to do, while the run trains and without a key."""
    run = RunDir(tmp_path / "r")
    words = ("-m", "jobs", "sync", str(run.path))
    with start(*one_process(run, "online", steps=100_000), **server.environment()) as trainer:
        wait_until(lambda: server.runs and in_wandb(run, server).history)
        refused = end(words, **server.environment())
        trains = f"error: {run.path} is being trained and sent to W&B by attempt 1 itself\n"
        assert (refused.code, refused.err) == (2, trains)
        server.refuse()
        wait_for_steps(run, 2 * EVERY)
        trainer.process.terminate()
        began = time.time()
        ended = trainer.end()
    assert ended.code == 75, ended.err
    assert time.time() - began < 15 + 2  # until the agreed stop
    assert "WARNING: W&B has not taken the last rows within " in ended.out
    server.accept()
    refused = end(words, **server.environment() | {"WANDB_API_KEY": ""})
    assert refused.code == 2
    assert refused.err.startswith(f"error: W&B cannot be reached from here: no API key for {server.url}; see WANDB_API")
    sync(run, server)
    check_rows(in_wandb(run, server).history, run)
    assert in_wandb(run, server).state == "preempted"  # it may be resumed


def test_if_the_wandb_directory_cannot_be_written_training_goes_on_untracked(
    server: WandbServer, tmp_path: Path
) -> None:
    run = RunDir(tmp_path / "r")
    run.path.mkdir()
    run.wandb.write_text("in the way, as a read-only directory is for who is not root")
    ended = end(one_process(run, "offline", steps=40))
    assert ended.code == 0, ended.err
    assert re.search(r"WARNING: W&B: .*wandb: File exists; the metrics log has every step", ended.out)
    assert last_step(run) == 40
    run.wandb.unlink()
    sync(run, server)  # it was never tracked, and the metrics log is all that a sync needs
    check_rows(in_wandb(run, server).history, run)


@pytest.mark.soak
def test_without_a_key_auto_is_offline_and_asks_the_server_nothing(server: WandbServer, tmp_path: Path) -> None:
    run = RunDir(tmp_path / "r")
    environment = server.environment() | {"WANDB_API_KEY": ""}
    ended = end(one_process(run, "auto", steps=20), **environment)
    assert ended.code == 0, ended.err
    assert ended.out.count("W&B: offline (no API key for http://127.0.0.1") == 1
    assert not any(kind == "graphql" for kind, _ in server.requests)
    assert server.runs == {}
    check_rows(read_back(run), run)


def test_a_server_that_fails_is_slow_and_dies_gets_every_row_and_its_stop_button_works(
    server: WandbServer, tmp_path: Path
) -> None:
    """test_worker.py tests that the button ends all ranks, and that the next attempt continues the rows."""
    run = RunDir(tmp_path / "r")
    with start(*one_process(run, "online", steps=100_000), **server.environment()) as trainer:
        wait_until(lambda: server.runs and in_wandb(run, server).history)
        for status in (500, 429):
            server.fail["file_stream"] = status
            del server.requests[:]
            wait_until(lambda: ("file_stream", in_wandb(run, server).id) in server.requests)
            wait_for_steps(run, 20)
            del server.fail["file_stream"]
        server.refuse()
        wait_for_steps(run, 100)
        server.accept()
        server.delay_s["file_stream"] = 1
        wait_for_steps(run, 100)
        server.stop_runs.add(in_wandb(run, server).id)  # the dashboard's Stop button
        ended = trainer.end()
    assert ended.code == 75, ended.err
    outcome = read_outcome(run)
    assert outcome is not None
    assert (outcome["status"], outcome["reason"], outcome["step"]) == ("stopped", "wandb_stop", last_step(run))
    assert not run.stop.exists()
    shown = in_wandb(run, server)
    check_rows(shown.history, run)
    assert (shown.state, shown.summary["outcome/reason"]) == ("preempted", "wandb_stop")


@pytest.mark.soak
def test_a_server_that_rejects_the_key_is_tried_again_and_then_gets_every_row(
    server: WandbServer, tmp_path: Path
) -> None:
    run = RunDir(tmp_path / "r")
    server.fail["graphql"] = 401
    with start(*one_process(run, "online", steps=100_000), **server.environment()) as launcher:
        for status in (401, 403, 500):
            server.fail["graphql"] = status
            del server.requests[:]
            wait_until(lambda: any(kind == "graphql" for kind, _ in server.requests))
        wait_for_steps(run, 50)
        server.fail.clear()
        wait_until(lambda: server.runs and in_wandb(run, server).history)
        launcher.process.terminate()
        ended = launcher.end()
    assert ended.code == 75, ended.err
    assert "WARNING: W&B: " in ended.out
    check_rows(in_wandb(run, server).history, run)
    assert in_wandb(run, server).state == "preempted"


@pytest.mark.soak
def test_a_killed_wandb_core_is_started_again_and_each_row_arrives_once(server: WandbServer, tmp_path: Path) -> None:
    """Slurm signals every process of a step, and SIGTERM ends wandb-core before the trainer has saved."""
    run = RunDir(tmp_path / "r")
    with start(*one_process(run, "online", steps=100_000), **server.environment()) as trainer:
        tracker = worker_of(trainer.process.pid)
        count = len(wait_until(lambda: server.runs and in_wandb(run, server).history))
        for pid in children(tracker):
            os.kill(pid, signal.SIGTERM)
        wait_until(lambda: len(in_wandb(run, server).history) > count + 1)
        trainer.process.terminate()
        ended = trainer.end()
    assert ended.code == 75, ended.err
    assert "WARNING: W&B: " in ended.out
    check_rows(in_wandb(run, server).history, run)


def test_an_offline_run_whose_wandb_core_is_killed_goes_on_and_never_speaks_of_a_connection(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "r")
    with start(*one_process(run, "offline", steps=100_000)) as trainer:
        files = wait_until(lambda: offline_files(run))
        wait_for_steps(run, EVERY)
        for pid in children(worker_of(trainer.process.pid)):
            os.kill(pid, signal.SIGTERM)
        wait_until(lambda: len(offline_files(run)) > len(files))
        wait_for_steps(run, EVERY)
        trainer.process.terminate()
        ended = trainer.end()
    assert ended.code == 75, ended.err
    assert ended.out.count("WARNING: W&B: wandb-core, the SDK's process on this machine, has ended; ") == 1, ended.out
    assert "connection" not in (ended.out + ended.err).lower()
    check_rows(read_back(run), run)


@pytest.mark.skipif(os.geteuid() != 0, reason="a small disk is mounted, which only root may")
@pytest.mark.soak
def test_on_a_full_disk_training_continues_and_sync_sends_what_is_missing(server: WandbServer, tmp_path: Path) -> None:
    run = RunDir(tmp_path / "r")
    run.wandb.mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(run.wandb)], check=True)
    try:
        ended = end(one_process(run, "offline", steps=400))
        assert ended.code == 0, ended.err
        assert last_step(run) == 400
        kept = len(read_back(run))
    finally:
        subprocess.run(["umount", "--lazy", str(run.wandb)], check=True)
    assert kept < 400 // EVERY, "the disk was not full"
    sync(run, server)
    check_rows(in_wandb(run, server).history, run)
