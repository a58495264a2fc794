"""A run's state by its files and by Slurm's answers, which are those that a real Slurm gave."""

import json
import time
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from fnet_dist.run.attempt import claim_attempt
from fnet_dist.run.outcome import end_attempt
from fnet_dist.run.run_dir import RunDir, RunLength, read_json, write_json
from jobs.commands import status
from jobs.monitor import job_state
from jobs.monitor.attempts import read_attempts
from jobs.monitor.job_state import merge_slurm_state, waiting_message
from jobs.monitor.log_view import launcher_logs
from jobs.monitor.run_state import Figures, State, Status
from jobs.monitor.slurm_queue import RunJob, SlurmJob, SlurmSnapshot, ask, run_job_of
from jobs.monitor.tables import table_of
from slurm.types import PastJob
from tests.helpers import made_run
from tests.helpers.made_run import NOTHING, Made, change_owner, claimed, make_run

AWAY = SlurmSnapshot(frozenset({"12"}), note="Slurm does not answer", unreachable=True, answered=False)
NO_PROGRAMS = SlurmSnapshot(frozenset({"12"}), note="not on the PATH", answered=False)
FORGOTTEN = SlurmSnapshot(frozenset({"12"}))
NO_ACCOUNTING = SlurmSnapshot(frozenset({"12"}), note="sacct: Connection refused")
RUNNING = State("running", ended=False)
SILENT = State("silent", ended=False, for_s=40)
USR2 = State("stopped", "(signal_usr2)")
CRASH = State("failed", "(crash)")


def answer(state: str, reason: str | None = None, restarts: int | None = 0) -> SlurmSnapshot:
    """Return Slurm's answer about job 12."""
    job = SlurmJob("12", state, reason, "node[0-1]", 100, None, None, None, restarts, "squeue")
    return SlurmSnapshot(frozenset({"12"}), {"12": job})


def run_job(restarts: int | None, reason: str | None = None) -> RunJob:
    return RunJob("12", restarts, reason, 0.0)


CANCELLED = RunJob("12", 0, None, 0.0, is_cancelled=True)


@pytest.mark.parametrize(
    ("state", "job", "snapshot", "text", "ended"),
    [
        # Before its first attempt.
        (State("no attempts"), run_job(None), answer("PENDING", "Resources"), "queued 30 s (Resources)", False),
        (State("no attempts"), run_job(None), answer("PENDING"), "queued 30 s", False),
        (CRASH, run_job(None), answer("PENDING", "Priority"), "queued 30 s (Priority)", False),
        (State("no attempts"), run_job(None), answer("RUNNING"), "starting", False),
        (State("no attempts"), run_job(None), answer("COMPLETING"), "ending", False),
        (State("no attempts"), run_job(None), answer("FAILED"), "failed (not begun)", True),
        (State("no attempts"), run_job(None), answer("FAILED", "JobLaunchFailure"), "failed (not launched)", True),
        (State("no attempts"), run_job(None), answer("FAILED", "RaisedSignal:53(R)"), "failed (not launched)", True),
        (State("no attempts"), run_job(None), answer("CANCELLED"), "cancelled (not begun)", True),
        (State("no attempts"), run_job(None), FORGOTTEN, "gone (not begun)", True),
        (State("no attempts"), run_job(None), AWAY, "submitted", False),
        (State("no attempts"), run_job(None), NO_PROGRAMS, "submitted", False),
        (State("finished"), run_job(None), answer("COMPLETED"), "finished", True),
        # While an attempt lives, and after one that was killed.
        (RUNNING, run_job(0), answer("RUNNING"), "running", False),
        (SILENT, run_job(0), answer("RUNNING"), "silent 40 s", False),
        (SILENT, run_job(0), answer("PENDING", "BeginTime", 1), "requeued 30 s (BeginTime)", False),
        (RUNNING, run_job(0), answer("COMPLETING", None, 1), "requeued 30 s", False),
        (
            RUNNING,
            run_job(1),
            answer("PENDING", "BeginTime", 1),
            "running",
            False,
        ),  # it has begun since Slurm was asked
        (SILENT, run_job(0), answer("SUSPENDED", None, 1), "suspended", False),
        (RUNNING, run_job(0), answer("CANCELLED"), "cancelled", True),
        (SILENT, run_job(0), answer("TIMEOUT"), "timeout", True),
        (SILENT, run_job(0), answer("NODE_FAIL"), "node failure", True),
        (SILENT, run_job(0), answer("OUT_OF_MEMORY"), "out of memory", True),
        (SILENT, run_job(0), FORGOTTEN, "gone", True),
        (SILENT, run_job(0), NO_ACCOUNTING, "gone", True),
        (SILENT, CANCELLED, FORGOTTEN, "cancelled", True),
        (State("resuming", ended=False), CANCELLED, NO_ACCOUNTING, "cancelled", True),
        (State("no attempts"), replace(CANCELLED, restarts=None), FORGOTTEN, "cancelled (not begun)", True),
        (USR2, replace(CANCELLED, reason="signal_usr2"), FORGOTTEN, "cancelled (signal_usr2)", True),
        (State("stopped", "(stop_file)"), run_job(0), answer("COMPLETED"), "stopped (stop_file)", True),
        (SILENT, run_job(0), AWAY, "silent 40 s", False),
        (State("gone"), run_job(0), AWAY, "gone", False),
        (State("gone"), run_job(0), NO_PROGRAMS, "gone", True),
        # After an end that may not be the job's.
        (
            USR2,
            run_job(0, "signal_usr2"),
            answer("RUNNING"),
            "stopped (signal_usr2)",
            False,
        ),  # node 0 asks for a requeue
        (USR2, run_job(0, "signal_usr2"), answer("PENDING", "BeginTime", 1), "requeued 30 s (BeginTime)", False),
        (USR2, run_job(0, "signal_usr2"), answer("RUNNING", None, 1), "starting", False),
        (USR2, run_job(0, "signal_usr2"), answer("CANCELLED", None, 1), "cancelled (signal_usr2)", True),
        (USR2, run_job(0, "signal_usr2"), answer("FAILED"), "stopped (signal_usr2)", True),
        (USR2, run_job(0, "signal_usr2"), FORGOTTEN, "stopped (signal_usr2)", True),
        (USR2, run_job(0, "signal_usr2"), AWAY, "stopped (signal_usr2)", False),
        # After one that is.
        (CRASH, run_job(0, "crash"), answer("COMPLETING"), "failed (crash)", True),
        (CRASH, run_job(0, "crash"), AWAY, "failed (crash)", True),
    ],
)
def test_slurm_adds_jobs_that_wait_and_jobs_that_were_killed(
    state: State, job: RunJob, snapshot: SlurmSnapshot, text: str, ended: bool
) -> None:
    found = merge_slurm_state(state, replace(job, since=time.time() - 30), snapshot)
    assert (found.text.replace("\n", " "), found.ended) == (text, ended)


@pytest.mark.parametrize(("silent_s", "word"), [(5, "running"), (31, "gone")])
def test_a_heartbeat_outranks_the_jobs_absence_from_slurms_list(silent_s: float, word: str) -> None:
    job = replace(run_job(0), since=time.time() - silent_s)
    assert merge_slurm_state(RUNNING, job, FORGOTTEN).word == word


def test_the_next_attempt_is_resuming_if_steps_are_recorded() -> None:
    assert (
        merge_slurm_state(USR2, run_job(0, "signal_usr2"), answer("RUNNING", None, 1), resumes=True).word == "resuming"
    )


def test_the_waiting_message_names_the_job_and_slurms_reason() -> None:
    assert waiting_message(run_job(None), answer("PENDING", "Resources")) == "queued: job 12 (Resources)"
    assert waiting_message(run_job(0), answer("PENDING")) == "queued again: job 12"
    assert waiting_message(run_job(0), answer("RUNNING")) == ""
    assert waiting_message(run_job(None), AWAY) == "job 12: Slurm does not answer"


# From the run directory ---------------------------------------------------------------------------------------------


def test_the_newest_job_is_the_submitted_one_until_its_first_attempt(tmp_path: Path) -> None:
    run = make_run(tmp_path, NOTHING)
    assert run_job_of(run) is None
    write_json(run.job, {"id": "77", "cluster": "local", "time": 100.0})
    assert run_job_of(run) is None
    write_json(run.job, {"id": "12", "cluster": "slurm", "time": 100.0})
    assert run_job_of(run) == RunJob("12", None, None, 100.0)
    attempt = claim_attempt(run, slurm_job_id="12", slurm_restart_count=3)
    assert (found := run_job_of(run)) is not None
    assert (found.job_id, found.restarts, found.reason, found.is_over) == ("12", 3, None, False)
    end_attempt(attempt, "crash", 40, 1, restarts=True)
    assert (found := run_job_of(run)) is not None
    assert found.reason is None, "its launcher begins another"
    ends = {"signal_usr2": False, "deadline": False, "bad_node": False, "signal_term": False, "stop_file": True}
    for reason, is_over in ends.items():
        end_attempt(attempt, reason, 40, 75)
        assert (found := run_job_of(run)) is not None
        assert (found.reason, found.is_over) == (reason, is_over)
    write_json(run.job, {"id": "13", "cluster": "slurm", "time": time.time() + 1})
    assert run_job_of(run) == RunJob("13", None, None, pytest.approx(time.time(), abs=5))
    change_owner(claim_attempt(run), time=time.time() + 5)
    assert run_job_of(run) is None, "somebody resumed it outside of Slurm"


def test_without_jobs_slurm_is_not_asked_and_a_recent_answer_is_reused() -> None:
    assert ask([]) == SlurmSnapshot()
    fresh = SlurmSnapshot(frozenset({"12", "13"}), time=time.monotonic())
    assert ask(["12"], fresh) is fresh


def test_without_slurms_programs_there_is_a_note_and_no_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    answers = ask(["12"])
    assert not answers.unreachable
    assert answers.note.startswith("Slurm's programs are not on the PATH")


def started(run: RunDir, restarts: int, began: float, job_id: str | None = "12") -> Any:
    attempt = claim_attempt(run, slurm_job_id=job_id, slurm_restart_count=restarts, nodes="node[0-1]", world_size=2)
    change_owner(attempt, time=began)
    return attempt


def ended(attempt: Any, reason: str, at: float, *, restarts: bool = False) -> None:
    write_json(attempt.end, {"reason": reason, "step": 40, "exit_code": 75, "restarts": restarts, "time": at})


def test_attempts_show_how_long_each_waited_for_its_allocation(tmp_path: Path) -> None:
    run = make_run(tmp_path, NOTHING)
    write_json(run.job, {"id": "12", "cluster": "slurm", "time": 1000.0})
    ended(started(run, 0, 1060.0), "signal_usr2", 1100.0)
    ended(started(run, 1, 1220.0), "crash", 1300.0, restarts=True)
    ended(started(run, 1, 1301.0), "stop_file", 1400.0)
    ended(started(run, 0, 2000.0, "13"), "stop_file", 2100.0)  # by sbatch: nobody knows when that was
    found = read_attempts(run, State("stopped", "(stop_file)"))
    assert [past.number for past in found] == [4, 3, 2, 1]
    assert [past.waited_s for past in found] == [None, None, 120.0, 60.0]
    assert [(past.end, past.detail) for past in found[2:]] == [("crash", "(restarted)"), ("signal_usr2", "")]


def test_a_killed_attempt_is_explained_by_accounting_or_by_the_requeue(tmp_path: Path) -> None:
    run = make_run(tmp_path, NOTHING)
    started(run, 0, 1060.0)
    ended(started(run, 1, 1220.0), "stop_file", 1300.0)
    first = read_attempts(run, State("stopped"))[-1]
    assert (first.end, first.detail) == ("no word", "(requeued)")
    record = PastJob("12", "12", "NODE_FAIL", 1000, 1058, 1110, "node[0-1]", None)
    later = replace(record, state="CANCELLED", started=1218, ended=1301)
    for records in ([record, later], [later, record]):
        assert read_attempts(run, State("stopped"), records)[-1].end == "node failure"


def test_an_attempt_that_begins_between_two_reads_is_starting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run(tmp_path, NOTHING)
    write_json(run.job, {"id": "12", "cluster": "slurm", "time": 1000.0})
    read = job_state.read_status

    def read_then_begin(of: RunDir) -> Status:
        status = read(of)
        started(of, 0, time.time())
        return status

    monkeypatch.setattr(job_state, "read_status", read_then_begin)
    monkeypatch.setattr(job_state, "ask", lambda *asked: answer("RUNNING"))
    (status,), _ = job_state.read_statuses([run])
    assert (status.state.word, status.state.ended) == ("starting", False)


def test_a_failed_run_shows_the_error_of_the_rank_that_failed_first(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, attempt = claimed(tmp_path, NOTHING)
    for rank, aftermath, when, message in ((0, True, 1, "lost rank 2"), (2, False, 3, "nan\nat 9"), (3, False, 4, "x")):
        extra = {"message": message, "extraInfo": {"timestamp": str(when)}}
        write_json(attempt.error(rank), {"message": extra, "reason": "non_finite", "aftermath": aftermath})
    attempt.error(1).write_text('{"mess')
    ended(attempt, "non_finite", time.time())
    write_json(run.outcome, made_run.CRASH)
    assert [past.message for past in read_attempts(run, State("failed"))] == ["rank 2: nan at 9"]
    assert status.main(["r", "--root", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert "failed: rank 2: nan at 9; the end of its logs: fnet logs r\n" in said
    write_json(attempt.error(3), read_json(attempt.error(2)))
    assert [past.message for past in read_attempts(run, State("failed"))] == ["nan at 9"]  # they agree


# How it is shown -----------------------------------------------------------------------------------------------------


def test_json_has_the_same_keys_for_every_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_run(tmp_path, Made(name="done"))
    claimed(tmp_path, Made(name="r", steps=120, finished=False))
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text("{")
    assert status.main(["--root", str(tmp_path), "--json"]) == 0
    found = {values["run"]: values for values in json.loads(capsys.readouterr().out)}
    assert len({tuple(values) for values in found.values()}) == 1
    assert {name: values["state"] for name, values in found.items()} == {
        "done": "finished",
        "r": "running",
        "broken": "no attempts",
    }
    one = found["r"]
    assert (one["step"], one["total_steps"], one["epoch"], one["ended"], one["job"]) == (120, 2_814, 2, False, None)
    assert one["time_left_s"] > 0
    assert one["evaluation"] == {"step": 94, "loss": pytest.approx(0.45), "metrics": {"accuracy": 0.79}}
    assert (one["monitor"], found["broken"]["evaluation"]) == ("accuracy", None)
    assert found["done"]["time_left_s"] is None
    assert [attempt["end"] for attempt in one["attempts"]] == ["running"]
    assert status.status_json.__doc__ is not None
    told = [*one, *one["attempts"][0], "node_list", "told_by"]
    assert [key for key in told if key not in status.status_json.__doc__] == []
    assert status.main(["r", "--root", str(tmp_path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["run"] == "r"


def test_a_narrow_table_with_a_job_column_still_shows_every_name(tmp_path: Path) -> None:
    job = SlurmJob("1234567_12", "RUNNING", None, "node[000-127]", 1, 2, None, 3, 0, "squeue")
    state = State("requeued", "(JobArrayTaskLimit)", ended=False, for_s=100)
    window = {"slowest_rank": 1023, "max_over_median": 1.5, "samples_per_second": 123_456.0}
    evaluation = {"step": 123_000, "loss": 0.3, "metrics": {"accuracy": 0.9}}
    figures = Figures({"step": 123_456, "epoch": 1}, window, evaluation, 0.25)
    length = RunLength(1_000, 1_000_000)
    run_job = RunJob("1234567_12", 0, None, 0.0)
    found = [Status("a-longer-name-0a1b2c", state, figures, length, run_job=run_job, slurm_job=job)]
    console = Console(file=StringIO(), width=76)
    console.print(table_of(found, console))
    assert isinstance(console.file, StringIO)
    out = console.file.getvalue()
    assert max(map(len, out.splitlines())) <= 76
    assert "".join(row[:12].strip() for row in out.splitlines()[2:]).startswith("a-longer-nam")
    for words in ("requeued 1 min 40 s", "(JobArrayTaskLimit)", "1234567_12"):
        assert words in out


def test_launcher_logs_are_found_by_job_and_for_an_array_in_its_sweep(tmp_path: Path) -> None:
    run = make_run(tmp_path, NOTHING)
    sweep = tmp_path / "sweeps" / "s" / run.submitit.name
    run.submitit.mkdir()
    for name in ("12_0_log.out", "12_10_log.out", "12_2_log.out", "121_0_log.out"):
        (run.submitit / name).touch()
    sweep.mkdir(parents=True)
    (sweep / "30_1_0_log.out").touch()
    assert [log.label for log in launcher_logs(run, "12")] == ["node 0", "node 2", "node 10"]
    assert [log.tail.path for log in launcher_logs(run, "30_1")] == [sweep / "30_1_0_log.out"]
