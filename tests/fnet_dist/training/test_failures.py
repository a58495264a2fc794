"""A failure on one rank ends all ranks soon, with a message that names the rank and the place.

See also test_drill.py (no rank waits for one that hangs), test_restarts.py (a rank that only lost another prints no
traceback) and test_torchrun.py (torchrun's report).
"""

import json
import math
import re
import time
from pathlib import Path
from typing import Any

import pytest

from fnet_dist.run import metrics_log
from fnet_dist.run.outcome import read_outcome
from fnet_dist.run.run_dir import RunDir, read_json
from jobs.monitor.attempts import read_attempts
from jobs.monitor.run_state import State
from tests.fnet_dist.config.test_load_fuzz import malformed
from tests.helpers.processes import FAULTY, JOBS_RUN, NO_NETWORK, TRAINER, Ended, start, start_ranks

pytestmark = pytest.mark.processes

STEPS = 9  # an epoch of the faulty data
TIMEOUT_S = 3
LOST = "error: rank {} lost the connection to another rank, which ended first\n"


@pytest.fixture
def job(tmp_path: Path) -> Path:
    """Return a job file; its run is tmp_path/runs/job."""
    path = tmp_path / "job.toml"
    path.write_text(
        f'run = {{root = "{tmp_path}/runs", epochs = 2}}\n'
        'data = {dataset = "synthetic", global_batch_size = 16}\n'
        f'parallel = {{device = "cpu", timeout_s = {TIMEOUT_S}}}\n'
    )
    return path


def run_of(job: Path) -> RunDir:
    return RunDir(job.parent / "runs" / "job")


def outcome(job: Path) -> dict[str, Any]:
    """Return outcome.json, after a check that the attempt's end.json agrees."""
    run = run_of(job)
    found: dict[str, Any] = read_json(run.outcome)
    end = read_json(run.attempt(1) / "end.json")
    assert {key: end[key] for key in ("reason", "step", "exit_code")} == {
        key: found[key] for key in ("reason", "step", "exit_code")
    }
    return found


def two_ranks(fault: str, job: Path, *arguments: str) -> list[Ended]:
    """Run two ranks with a fault of faulty_data.py, and return how they ended."""
    with start_ranks([(*FAULTY, fault, "--config", str(job), *arguments)] * 2) as ranks:
        return [rank.end() for rank in ranks]


def train_lines(job: Path) -> list[dict[str, Any]]:
    return [line for line in metrics_log.read(run_of(job).metrics_log) if line["kind"] == "train"]


def test_nothing_is_written_from_a_step_that_is_not_finite(job: Path) -> None:
    """In a step of the second epoch, on one rank. For a learning rate that is too large see test_restarts.py."""
    first, second = two_ranks("nan:1:12", job)  # after the batch that is tried, 9 steps and a batch of evaluation
    assert (first.code, second.code, second.out, second.err) == (1, 1, "", "")
    assert first.err.startswith("error: loss is nan at step 10 on rank 1; ")
    assert first.err.count("\n") == 1
    lines = train_lines(job)
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    assert all(math.isfinite(line["loss"]) for line in lines)
    found = outcome(job)
    assert (found["status"], found["reason"], found["step"]) == ("failed", "non_finite", STEPS)
    assert not run_of(job).model.exists()
    assert not run_of(job).predictions.exists()


@pytest.mark.parametrize(
    ("fault", "where"),
    [("sleep:1:4", "reading data for step 3"), (f"sleep:1:{STEPS + 2}", "reading test data after step 9")],
)
def test_the_message_names_the_rank_that_hangs_in_its_data_and_the_place(job: Path, fault: str, where: str) -> None:
    began = time.monotonic()
    first, second = two_ranks(fault, job)
    assert time.monotonic() - began < 40
    assert (first.code, second.code) == (1, 1)
    waited = f"made no progress for {TIMEOUT_S} s"
    assert re.match(rf"error: rank 1 on \S+ {waited} \(parallel.timeout_s is {TIMEOUT_S}\): {where}", second.err)
    assert "in apply_to" in second.err  # its stack shows the function that sleeps
    found = outcome(job)
    assert (found["status"], found["exit_code"]) == ("failed", 1)
    assert found["reason"] == "hang"
    [attempt] = read_attempts(run_of(job), State("failed"))
    assert attempt.message.startswith("rank 1 on ")
    assert f": {where}" in attempt.message
    assert attempt.message.endswith("; rank 0 waits for it")


def test_a_rank_that_fails_to_build_its_data_ends_all_ranks_and_leaves_no_files(job: Path) -> None:
    began = time.monotonic()
    first, second = two_ranks("raise:1:0", job)
    assert time.monotonic() - began < 40
    assert (first.code, second.code, second.err) == (2, 2, "")
    place = r"tests/helpers/faulty_data.py:\d+: LookupError: the third shelf is empty"
    assert re.fullmatch(rf"error: rank 1: build_dataset: {place}; FNET_LOG=debug shows the traceback\n", first.err)
    assert not run_of(job).path.exists()


def test_without_data_and_network_all_ranks_exit_with_65_in_seconds_and_one_message(job: Path, tmp_path: Path) -> None:
    began = time.monotonic()
    program = (*TRAINER, "--config", str(job), "--data.dataset", "fashion-mnist", "--run.name", "job")
    with start_ranks([program] * 2, FNET_DATA=str(tmp_path / "empty"), **NO_NETWORK) as ranks:
        first, second = [rank.end() for rank in ranks]
    assert time.monotonic() - began < 40
    assert (first.code, first.out, second.code, second.out, second.err) == (65, "", 65, "", "")
    assert first.err.startswith("error: Fashion-MNIST is missing: ")
    assert first.err.count("\n") == 1
    for part in ("train-images-idx3-ubyte", str(tmp_path / "empty"), "fnet data fetch", "synthetic"):
        assert part in first.err
    assert not (tmp_path / "runs").exists()


def test_auto_without_data_trains_on_synthetic_data_and_reports_it_everywhere(job: Path, tmp_path: Path) -> None:
    words = (*TRAINER, "--config", str(job), "--data.dataset", "auto", "--run.name", "job", "--run.max-steps", "1")
    with start(*words, FNET_DATA=str(tmp_path / "empty"), **NO_NETWORK) as started:
        ended = started.end()
    assert (ended.code, ended.err) == (0, "")
    warnings = [line for line in ended.out.splitlines() if line.startswith("WARNING: ")]
    assert len(warnings) == 1
    assert "synthetic" in warnings[0]
    assert "Fashion-MNIST" in warnings[0]
    assert read_json(run_of(job).config)["data"]["dataset"] == "synthetic"
    assert read_json(run_of(job).manifest)["dataset"]["name"].startswith("synthetic")
    assert [line for line in ended.out.splitlines() if line.strip().startswith("test accuracy") and "synthetic" in line]


@pytest.mark.parametrize("program", [TRAINER, JOBS_RUN], ids=["one rank", "fnet run"])
def test_when_the_real_data_has_come_the_same_command_trains_on_it_under_the_same_name(
    job: Path, tmp_path: Path, real_data: Path, program: tuple[str, ...]
) -> None:
    config = (str(job),) if program == JOBS_RUN else ("--config", str(job))
    words = (*program, *config, "--data.dataset", "auto", "--run.name", "job", "--run.max-steps", "1")
    for root in (tmp_path / "empty", real_data, *[real_data] * (program == TRAINER)):
        with start(*words, FNET_DATA=str(root), **NO_NETWORK) as started:
            ended = started.end()
        assert ended.code == 0, ended.err
        said = (
            "the real data is there now: job trains on it; the run on synthetic data is job-synthetic now" in ended.out
        )
        assert said == (root == real_data and "finished before" not in ended.out)
    assert ("finished before" in ended.out) == (program == TRAINER)
    run, renamed = run_of(job), RunDir(run_of(job).path.with_name("job-synthetic"))
    assert [read_json(each.manifest)["dataset"]["stand_in"] for each in (run, renamed)] == [False, True]
    assert [read_outcome(each)["status"] for each in (run, renamed)] == ["finished", "finished"]


@pytest.mark.parametrize(
    ("environment", "arguments", "message"),
    [
        ({"RANK": "0", "WORLD_SIZE": "2"}, (), "LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR, MASTER_PORT missing"),
        (
            {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "4"}
            | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"},
            ("--parallel.grad-accum-steps", "5"),
            "data.global_batch_size 16 is smaller than 4 ranks x parallel.grad_accum_steps 5 = 20",
        ),
    ],
)
def test_an_impossible_start_is_refused_before_anything_is_written(
    job: Path, environment: dict[str, str], arguments: tuple[str, ...], message: str
) -> None:
    with start(*TRAINER, "--config", str(job), *arguments, **environment) as started:
        ended = started.end()
    assert (ended.code, ended.out) == (2, "")
    assert ended.err.startswith("error: ")
    assert message in ended.err
    assert ended.err.count("\n") == 1
    assert not run_of(job).path.exists()


def test_malformed_command_lines_are_refused_with_one_line_each(tmp_path: Path) -> None:
    """Four of them; tests/fnet_dist/config/test_load_fuzz.py has hundreds, without starting a process."""
    for seed in range(0, 4, 2):
        folders = [tmp_path / str(number) for number in (seed, seed + 1)]
        for folder in folders:
            folder.mkdir()
        lines = [malformed(number, folder) for number, folder in zip((seed, seed + 1), folders, strict=True)]
        # No argument contains a zero byte: the system allows none. FNET_DATA would override a bad data.root.
        with start(*TRAINER, *lines[0], FNET_DATA="") as one, start(*TRAINER, *lines[1], FNET_DATA="") as two:
            ends = [one.end(), two.end()]
        for number, folder, ended in zip((seed, seed + 1), folders, ends, strict=True):
            assert (ended.code, ended.out) == (2, ""), (number, ended)
            assert ended.err.startswith("error: "), (number, ended)
            assert ended.err.count("\n") == 1, (number, ended)
            assert [path.name for path in folder.iterdir()] == ["job.toml"], json.dumps(lines)
