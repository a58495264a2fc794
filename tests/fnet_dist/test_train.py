"""The commands of a user, on real processes: torchrun, the same command again, Ctrl-C, two starts of one run."""

import json
import os
import re
import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from fnet_dist.checkpoint.storage import read_checkpoint
from fnet_dist.run.console import final_table
from fnet_dist.run.run_dir import RunDir, read_json
from jobs.monitor.attempts import read_attempts
from jobs.monitor.run_state import State
from jobs.verification.supervised_run import ranks_of
from tests.helpers.processes import (
    FAULTY,
    TRAINER,
    Ended,
    Started,
    is_running,
    start,
    torchrun,
    wait_until,
)

pytestmark = pytest.mark.processes

STEPS, BATCH = 120, 64
MANIFEST = {"format", "id", "versions", "git", "dataset", "device", "world_size", "resumed_from"}
TRAIN = {"kind", "step", "epoch", "samples", "loss", "loss_per_rank", "loss_min", "loss_max", "worst_rank"} | {
    "lr", "grad_norm", "time", "attempt",
}  # fmt: skip
WINDOW = {"kind", "first_step", "last_step", "time", "samples_per_second", "step_ms", "slowest_rank"} | {
    "max_over_median", "max_memory_gib", "world_size", "data_ms", "compute_ms", "exchange_ms", "gpu_percent",
    "gpu_memory_gib", "gpu_watts", "gpu_celsius", "attempt",
}  # fmt: skip
EPOCH = {"kind", "epoch", "step", "train_loss", "seconds", "samples_per_second", "attempt"}
EVAL = {"kind", "step", "epoch", "loss", "metrics", "count", "seconds", "attempt"}
OUTCOME = {"status", "reason", "step", "epoch", "metrics", "exit_code", "launch_id"}
BEGIN = {"host", "machine", "pid", "pid_started", "since", "time", "address", "world_size", "slurm_job_id"} | {
    "slurm_restart_count", "launch_id", "committed_step", "settings",
}  # fmt: skip
END = {"reason", "step", "exit_code", "restarts", "time"}


def write_job(folder: Path) -> Path:
    """A job file; its run is FOLDER/runs/job."""
    job = folder / "job.toml"
    job.write_text(
        f'run = {{root = "{folder}/runs", epochs = 1}}\n'
        f'data = {{dataset = "synthetic", global_batch_size = {BATCH}}}\nparallel = {{device = "cpu"}}\n'
    )
    return job


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Ended]:
    """The job file of a run that two ranks have finished, and what that start printed."""
    job = write_job(tmp_path_factory.mktemp("finished"))
    with start(*torchrun(2), *TRAINER, "--config", str(job), "--run.max-steps", str(STEPS)) as started:
        return job, started.end()


def content(folder: Path) -> dict[str, tuple[bytes, int]]:
    """Every file below `folder`: its bytes and when it was written."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path): (path.read_bytes(), path.stat().st_mtime_ns) for path in files}


def rows(run: RunDir, kind: str) -> list[dict[str, Any]]:
    """The raw lines of the metrics log, nothing left out."""
    lines = [json.loads(row) for row in run.metrics_log.read_text().splitlines()]
    return [line for line in lines if line["kind"] == kind]


def test_two_ranks_leave_a_complete_run_directory(finished: tuple[Path, Ended]) -> None:
    job, ended = finished
    assert ended.code == 0, ended.err
    run = RunDir(job.parent / "runs" / "job")
    assert {str(path.relative_to(run.path)) for path in run.path.rglob("*") if path.is_file()} == {
        "config.json",
        "manifest.json",
        "metrics.jsonl",
        "metrics.position.json",
        "model.safetensors",
        "predictions.safetensors",
        "outcome.json",
        "attempts/0001/begin.json",
        "attempts/0001/end.json",
        "attempts/0001/alive",
        f"checkpoints/step_{STEPS:08d}/model.safetensors",
        f"checkpoints/step_{STEPS:08d}/optimizer.safetensors",
        f"checkpoints/step_{STEPS:08d}/state.json",
    }
    assert run.path.stat().st_mode & 0o777 == 0o700
    config, manifest = read_json(run.config), read_json(run.manifest)
    assert (config["data"]["dataset"], config["checkpoint"]["resume"]) == ("synthetic", "auto")
    assert config["run"]["root"] == str(job.parent.absolute() / "runs")
    assert (manifest["format"], manifest["world_size"]) == (2, 2)
    assert manifest.keys() >= MANIFEST
    outcome = read_json(run.outcome)
    assert outcome.keys() == OUTCOME
    assert (outcome["status"], outcome["reason"], outcome["step"], outcome["exit_code"]) == (
        "finished", "finished", STEPS, 0,
    )  # fmt: skip
    begin, end = (read_json(run.attempt(1) / name) for name in ("begin.json", "end.json"))
    assert begin.keys() == BEGIN
    assert (begin["world_size"], begin["committed_step"], begin["settings"]) == (2, 0, config)
    assert end.keys() == END
    assert (end["reason"], end["step"], end["restarts"]) == ("finished", STEPS, False)
    assert read_checkpoint(run.checkpoint(STEPS), manifest["id"]).model == run.model.read_bytes()


def test_every_step_is_in_the_metrics_log_once_with_the_documented_keys(finished: tuple[Path, Ended]) -> None:
    run = RunDir(finished[0].parent / "runs" / "job")
    train, windows, (epoch,) = rows(run, "train"), rows(run, "window"), rows(run, "epoch")
    assert [line["step"] for line in train] == list(range(1, STEPS + 1))
    assert [line["samples"] for line in train] == [BATCH * step for step in range(1, STEPS + 1)]
    assert all(line.keys() == TRAIN for line in train)
    assert all(line.keys() == WINDOW for line in windows)
    assert epoch.keys() == EPOCH
    assert [line["step"] for line in train if line["grad_norm"] is not None] == [50, 100]
    for line in train:
        assert line["loss"] == pytest.approx(sum(line["loss_per_rank"]) / 2, rel=1e-6)  # equal shares
        assert line["loss_per_rank"][0] != line["loss_per_rank"][1]
    assert [line["first_step"] for line in windows] == [1, *(line["last_step"] + 1 for line in windows[:-1])]
    assert windows[-1]["last_step"] == STEPS
    assert epoch["train_loss"] == pytest.approx(np.mean([line["loss"] for line in train]), rel=1e-12)
    [evaluation] = rows(run, "eval")
    assert evaluation.keys() == EVAL
    assert (epoch["step"], evaluation["step"], evaluation["count"]) == (STEPS, STEPS, 10_000)
    assert [*evaluation["metrics"]] == ["accuracy"]


def test_weights_and_predictions_are_those_of_the_whole_test_set(finished: tuple[Path, Ended]) -> None:
    run = RunDir(finished[0].parent / "runs" / "job")
    assert set(load_file(run.model)) == {
        f"{layer}.{part}" for layer in ("hidden1", "hidden2", "output") for part in ("weight", "bias")
    }
    predictions = load_file(run.predictions)
    correct = (predictions["predicted"] == predictions["true"]).sum()
    assert (len(predictions["true"]), correct) == (10_000, round(10_000 * rows(run, "eval")[0]["metrics"]["accuracy"]))
    assert predictions["thumbnails"].shape == (40, 28, 28)


def test_the_output_ends_with_the_table_and_the_report_command(finished: tuple[Path, Ended]) -> None:
    job, ended = finished
    run = RunDir(job.parent / "runs" / "job")
    assert ended.out.endswith(final_table(run) + "\n")
    assert ended.out.splitlines()[-1].endswith(f" report {run.path}")
    assert "Training loss: " in ended.out
    assert ended.out.count("finished: ") == 1


def test_the_same_command_again_shows_the_table_without_torch_and_changes_nothing(finished: tuple[Path, Ended]) -> None:
    job, _ = finished
    run = RunDir(job.parent / "runs" / "job")
    before = content(run.path.parent)
    program = (
        "import sys; from fnet_dist.train import main; code = main(sys.argv[1:]); assert 'torch' not in sys.modules"
    )
    program += "; assert 'matplotlib' not in sys.modules; sys.exit(code)"
    with start("-c", program, "--config", str(job), "--run.max-steps", str(STEPS)) as started:
        ended = started.end()
    first, second, table = ended.out.split("\n", 2)
    assert first == "finished before: nothing is trained now"
    for way in ("--run.epochs", "--run.max-steps", "--checkpoint.resume new", "job-2"):
        assert way in second
    assert (ended.code, table, ended.err) == (0, final_table(run) + "\n", "")
    assert content(run.path.parent) == before


def test_a_finished_run_resumes_when_it_is_asked_for_more_steps(finished: tuple[Path, Ended], tmp_path: Path) -> None:
    """For a step more of the same epoch; for more epochs: tests/golden. No module that imports long is needed."""
    job, run, last = write_job(tmp_path), RunDir(tmp_path / "runs" / "job"), STEPS + 1
    shutil.copytree(finished[0].parent / "runs", tmp_path / "runs")
    before = [json.dumps(line) for line in rows(run, "train")]
    program = (
        "import sys; from fnet_dist.train import main; code = main(sys.argv[1:]); "
        "assert not {'torch._dynamo', 'torchvision'} & set(sys.modules); sys.exit(code)"
    )
    with start("-c", program, "--config", str(job), "--run.max-steps", str(last)) as started:
        ended = started.end()
    assert (ended.code, ended.err) == (0, "")
    assert f"going on from step {STEPS} (epoch 1)" in ended.out
    after = rows(run, "train")
    assert [json.dumps(line) for line in after[:STEPS]] == before
    assert [(line["step"], line["attempt"]) for line in after[STEPS:]] == [(last, 2)]
    assert [(line["epoch"], line["step"]) for line in rows(run, "epoch")] == [(1, STEPS), (1, last)]
    assert (read_json(run.outcome)["status"], read_json(run.outcome)["step"]) == ("finished", last)


HANDLED = "--signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1,SIGUSR2"  # torchrun's flag, as README says


@pytest.mark.parametrize(
    ("number", "reason"), [(signal.SIGHUP, "signal_term"), (signal.SIGUSR2, "signal_usr2")], ids=["terminal", "scancel"]
)
def test_a_signal_to_torchrun_stops_all_ranks_after_the_same_step(
    tmp_path: Path, number: signal.Signals, reason: str
) -> None:
    """A terminal that closes (torchrun handles SIGHUP with nohup too), and `scancel -s USR2` of an srun torchrun."""
    job = write_job(tmp_path)
    with start(*torchrun(2), HANDLED, *FAULTY, "long", "--config", str(job), SLURM_JOB_ID="7") as agent:
        ranks = ranks_that_train(agent, tmp_path)
        agent.process.send_signal(number)
        ended = agent.end(30)
        assert ended.code == 1  # torchrun's own, whatever its ranks' was
        assert not any(map(is_running, ranks))
    assert "Unable to shutdown" not in ended.err  # torchrun's words when it kills
    assert "WARNING: SIGUSR1 and SIGUSR2" not in ended.out
    was_stopped(RunDir(tmp_path / "runs" / "job"), reason, 75)


def ranks_that_train(agent: Started, folder: Path) -> list[int]:
    """Return the process ids of torchrun's two ranks, rank 0 first, once they have trained a step."""
    log = RunDir(folder / "runs" / "job").metrics_log
    wait_until(lambda: log.exists() and log.stat().st_size > 0)
    ranks = ranks_of(agent.process.pid)
    assert [*ranks] == [0, 1]
    return [*ranks.values()]


def test_status_names_the_rank_that_was_killed_under_torchrun(tmp_path: Path) -> None:
    job, run = write_job(tmp_path), RunDir(tmp_path / "runs" / "job")
    with start(*torchrun(2), *FAULTY, "long", "--config", str(job)) as agent:
        os.kill(ranks_that_train(agent, tmp_path)[1], signal.SIGKILL)
        assert agent.end(40).code == 1
    assert read_json(run.outcome)["reason"] == "crash"
    (attempt,) = read_attempts(run, State("failed"))
    assert attempt.message == "rank 1: ended without a message: killed, perhaps for memory (dmesg on its node tells)"


@pytest.mark.parametrize("nohup", [False, True])
def test_a_closed_terminal_stops_one_process_unless_nohup_ignores_it(tmp_path: Path, nohup: bool) -> None:
    job, run = write_job(tmp_path), RunDir(tmp_path / "runs" / "job")
    ignored = "import signal; signal.signal(signal.SIGHUP, signal.SIG_IGN); " if nohup else ""
    program = f"{ignored}import os, sys; os.execv(sys.executable, [sys.executable, *sys.argv[1:]])"
    with start("-c", program, *FAULTY, "long", "--config", str(job)) as rank:
        wait_until(lambda: run.metrics_log.exists() and run.metrics_log.stat().st_size > 0)
        rank.process.send_signal(signal.SIGHUP)
        if nohup:
            size = run.metrics_log.stat().st_size
            wait_until(lambda: run.metrics_log.stat().st_size > size)
            rank.process.send_signal(signal.SIGTERM)
        assert rank.end(30).code == 75
    was_stopped(run, "signal_term", 75)


def was_stopped(run: RunDir, reason: str, code: int) -> None:
    """The metrics log ends with the step that outcome.json names, which is saved; there are no final weights."""
    outcome, end = read_json(run.outcome), read_json(run.attempt(1) / "end.json")
    assert (outcome["status"], outcome["reason"], outcome["exit_code"]) == ("stopped", reason, code)
    assert (end["reason"], end["step"]) == (reason, outcome["step"])
    assert [line["step"] for line in rows(run, "train")] == list(range(1, outcome["step"] + 1))
    assert outcome["step"] >= 1
    assert read_checkpoint(run.checkpoint(outcome["step"]), read_json(run.manifest)["id"])
    assert not run.model.exists()


def test_torchrun_shows_the_sample_that_could_not_be_read_as_the_root_cause(tmp_path: Path) -> None:
    with start(*torchrun(2), *FAULTY, "raise:1:4", "--config", str(write_job(tmp_path))) as agent:
        ended = agent.end()
    assert ended.code == 1
    root_cause = ended.err.partition("Root Cause (first observed failure):")[2]
    assert "rank      : 1 (local_rank: 1)" in root_cause
    error = r"random: samples? [\d, .]+: LookupError: the third shelf is empty \(tests/helpers/faulty_data.py:\d+\)"
    assert re.search(error, root_cause)
    assert len(re.findall(f"^error: {error}$", ended.err, re.MULTILINE)) == 1


def test_of_several_starts_one_trains_until_ctrl_c_and_the_others_name_it(tmp_path: Path) -> None:
    words = (*TRAINER, "--config", str(write_job(tmp_path)), "--optim.lr", "0.0001", "--run.epochs", "10000")
    with start(*words) as one, start(*words) as other:
        owner, at_the_same_moment = first_to_print(one, other)
        with start(*words) as later:
            for refused in (at_the_same_moment, later):
                ended = refused.end()
                assert (ended.code, ended.out, ended.err.count("\n")) == (2, "", 1)
                assert f"pid {owner.process.pid}" in ended.err
        owner.process.send_signal(signal.SIGINT)
        ended = owner.end()
    assert (ended.code, ended.err) == (130, "")
    (path,) = (tmp_path / "runs").iterdir()
    assert path.name.startswith("job-")  # another learning rate is another run
    was_stopped(RunDir(path), "signal_int", 130)
    stopped, to_go_on = ended.out.splitlines()[-2:]
    assert stopped == f"stopped at step {read_json(RunDir(path).outcome)['step']:,} as asked (signal_int), checkpointed"
    assert to_go_on.startswith("to go on: ")
    assert to_go_on.endswith(f" run {path}/config.json --nproc-per-node 1")


def first_to_print(one: Started, other: Started) -> tuple[Started, Started]:
    """The two in the order in which they end: a refused start says nothing and closes its output."""
    return (one, other) if one.line() else (other, one)
