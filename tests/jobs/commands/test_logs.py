"""Tests of `fnet logs`: the ranks and attempts that it shows, and how it follows them, on runs without training."""

import os
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest

from fnet_dist.run.attempt import Attempt, claim_attempt
from fnet_dist.run.outcome import end_attempt
from fnet_dist.run.run_dir import RunDir, write_json
from fnet_dist.run.tail import FileTail
from jobs.__main__ import main
from jobs.commands import logs
from jobs.errors import READER_HAS_LEFT
from jobs.monitor import log_view
from tests.helpers.made_run import NOTHING, Made, age, change_owner, claimed, make_run

Screen = pytest.CaptureFixture[bytes]


def add(attempt: Attempt, rank: int, text: str | bytes) -> None:
    """Append to the log of `rank`."""
    with attempt.log(rank).open("ab") as log:
        log.write(text.encode() if isinstance(text, str) else text)


def shown(screen: Screen, *argv: str | Path) -> str:
    assert logs.main([*map(str, argv)]) == 0
    return screen.readouterr().out.decode()


@pytest.fixture
def two(tmp_path: Path) -> RunDir:
    """A run of two attempts of 2 ranks, the second of which lives."""
    run, attempt = claimed(tmp_path, NOTHING)
    add(attempt, 0, "loss 9\n")
    add(attempt, 1, "loss 8\nerror: lost\n")
    end_attempt(attempt, "crash", 40, 1, restarts=True)
    attempt = claim_attempt(run, world_size=2)
    add(attempt, 0, "hello\nloss 0.5\n")
    add(attempt, 1, "loss 0.25\nhalf")
    return run


def refused(argv: list[str | Path], monkeypatch: pytest.MonkeyPatch, repository: Path, screen: Screen) -> str:
    """Return the one error line; the exit code is 2 and nothing is on standard output."""
    monkeypatch.chdir(repository)
    assert main(["logs", *map(str, argv)]) == 2
    out, err = screen.readouterr()
    assert out == b""
    assert err.count(b"\n") == 1
    return err.decode().strip().removeprefix("error: ")


# One look ----------------------------------------------------------------------------------------------------------


def test_rank_0_of_the_newest_attempt_of_the_newest_run_is_shown(
    two: RunDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfdbinary: Screen
) -> None:
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "runs").symlink_to(tmp_path)
    monkeypatch.chdir(tmp_path / "work")
    age(make_run(tmp_path, Made(name="older", finished=False)).path, 1000)
    assert shown(capfdbinary) == "hello\nloss 0.5\n"
    assert shown(capfdbinary, "r") == "hello\nloss 0.5\n"


def test_lines_of_several_ranks_have_a_prefix_and_come_rank_after_rank(two: RunDir, capfdbinary: Screen) -> None:
    both = "rank 0 | hello\nrank 0 | loss 0.5\nrank 1 | loss 0.25\nrank 1 | half\n"
    assert shown(capfdbinary, two.path, "--rank", "all") == both
    assert shown(capfdbinary, two.path, "--rank", "1,0") == both
    assert shown(capfdbinary, two.path, "--rank", "1") == "loss 0.25\nhalf\n"


def test_an_empty_log_is_reported(tmp_path: Path, capfdbinary: Screen) -> None:
    run, attempt = claimed(tmp_path, NOTHING)
    add(attempt, 0, "")
    assert logs.main([str(run.path)]) == 0
    assert capfdbinary.readouterr() == (b"attempt 1 has printed nothing yet; -f waits for it\n", b"")


def test_an_earlier_attempt_can_be_asked_for(two: RunDir, capfdbinary: Screen) -> None:
    assert shown(capfdbinary, two.path, "--attempt", "1") == "loss 9\n"
    assert shown(capfdbinary, two.path, "--attempt", "1", "-f") == "loss 9\n"


def test_grep_matches_literal_text_and_not_the_prefix(two: RunDir, capfdbinary: Screen) -> None:
    add(Attempt(two, 2), 1, "\n[rank1]: Traceback\n")
    assert shown(capfdbinary, two.path, "--rank", "all", "--grep", "0.5") == "rank 0 | loss 0.5\n"
    assert shown(capfdbinary, two.path, "--rank", "all", "--grep", "[rank1]") == "rank 1 | [rank1]: Traceback\n"
    assert shown(capfdbinary, two.path, "--rank", "all", "--grep", "rank ") == ""


def test_bytes_pass_unchanged_and_a_prefixed_progress_line_shows_its_last_state(
    two: RunDir, capfdbinary: Screen
) -> None:
    add(Attempt(two, 2), 0, b"\xff\xfe\n 10%\r 20%\r\n")
    for argv, expected in (
        (["--rank", "0"], b"hello\nloss 0.5\n\xff\xfe\n 10%\r 20%\r\n"),
        (["--rank", "0,1", "--grep", "%"], b"rank 0 |  20%\n"),
    ):
        assert logs.main([str(two.path), *argv]) == 0
        assert capfdbinary.readouterr().out == expected


def test_on_a_terminal_each_rank_has_a_colour_unless_no_color_is_set(
    two: RunDir, monkeypatch: pytest.MonkeyPatch, capfdbinary: Screen
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich takes a pipe for a terminal
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    argv = (two.path, "--rank", "all", "--grep", "loss")
    assert shown(capfdbinary, *argv) == "\x1b[36mrank 0 | \x1b[0mloss 0.5\n\x1b[32mrank 1 | \x1b[0mloss 0.25\n"
    monkeypatch.setenv("NO_COLOR", "1")
    assert shown(capfdbinary, *argv) == "rank 0 | loss 0.5\nrank 1 | loss 0.25\n"


def test_a_long_log_is_not_held_in_memory_even_if_it_is_one_line(two: RunDir, capfdbinary: Screen) -> None:
    path = Attempt(two, 2).log(0)
    size = 16 * log_view.MAX_LINE
    os.truncate(path, size)
    log = log_view.Log("rank 0", FileTail(path))
    tracemalloc.start()
    try:
        log.print_new(b"no such text", partial=False)
        assert size - log_view.MAX_LINE < log.tail.offset <= size
        assert tracemalloc.get_traced_memory()[1] < 4 * log_view.MAX_LINE
    finally:
        tracemalloc.stop()
    assert capfdbinary.readouterr().out == b""


def test_an_error_names_the_ranks_and_attempts_that_exist(
    two: RunDir, monkeypatch: pytest.MonkeyPatch, repository: Path, capfdbinary: Screen
) -> None:
    def said(*argv: str) -> str:
        return refused([two.path, *argv], monkeypatch, repository, capfdbinary)

    assert said("--rank", "0,7") == "attempt 2 of r has no rank 7; it has rank 0 to rank 1"
    assert said("--rank", "7", "-f") == "attempt 2 of r has no rank 7; it has rank 0 to rank 1"
    assert said("--attempt", "3") == "r has no attempt 3; it has attempt 1 to attempt 2"
    assert said("--attempt", "0") == "r has no attempt 0; it has attempt 1 to attempt 2"
    assert said("--rank", "0-1") == "--rank '0-1': expected a rank, several as in 0,3, or all"
    Attempt(two, 2).log(0).unlink()
    assert said().startswith("attempt 2 of r has no log of rank 0; only `fnet run` keeps logs")


def test_a_run_without_an_attempt_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, repository: Path, capfdbinary: Screen
) -> None:
    run = make_run(tmp_path, NOTHING)
    assert refused([run.path], monkeypatch, repository, capfdbinary) == "r has no attempt yet; -f waits for it"
    said = refused([run.path, "--attempt", "1"], monkeypatch, repository, capfdbinary)
    assert said == "r has no attempt 1; it has none yet"


# Following ---------------------------------------------------------------------------------------------------------


def followed(
    run: RunDir, screen: Screen, *happens: Callable[[], object], view: log_view.View, number: int | None = None
) -> list[str]:
    """Return what each look prints; one of `happens` is called before each look but the first. One too many fails."""
    waiting, looks = list(happens), []

    def wait(seconds: float) -> None:
        assert seconds == log_view.FOLLOW_EVERY_S
        looks.append(screen.readouterr().out.decode())
        waiting.pop(0)()

    log_view.follow(run, number, view, wait)
    assert waiting == [], "it ended too early"
    return [*looks, screen.readouterr().out.decode()]


RANK_0 = log_view.View()
ALL = log_view.View(None)


def test_follow_prints_whole_lines_as_they_come_and_the_unfinished_rest_at_the_end(
    two: RunDir, capfdbinary: Screen
) -> None:
    attempt = Attempt(two, 2)

    def end() -> None:
        add(attempt, 0, "lo")
        write_json(two.outcome, {"status": "finished", "reason": "finished"})
        end_attempt(attempt, "finished", 120, 0)

    looks = followed(
        two,
        capfdbinary,
        lambda: add(attempt, 1, " past\nquar"),
        lambda: add(attempt, 0, "epoch 1\nhel"),
        lambda: None,
        end,
        view=ALL,
    )
    assert looks == [
        "rank 0 | hello\nrank 0 | loss 0.5\nrank 1 | loss 0.25\n",
        "rank 1 | half past\n",
        "rank 0 | epoch 1\n",
        "",
        "rank 0 | hello\nrank 1 | quar\n",
    ]


def test_follow_continues_with_the_next_attempt_after_a_restart(tmp_path: Path, capfdbinary: Screen) -> None:
    run, first = claimed(tmp_path, NOTHING)
    add(first, 0, "a\nerror: lo")

    def restart() -> None:
        add(first, 0, "st")
        add(claim_attempt(run, world_size=2), 0, "b\n")

    looks = followed(
        run,
        capfdbinary,
        lambda: end_attempt(first, "crash", 40, 1, restarts=True),  # not the end: its launcher lives
        restart,
        lambda: end_attempt(Attempt(run, 2), "stop_file", 80, 75),
        view=RANK_0,
    )
    assert looks == ["a\n", "", "error: lost\nattempt 2\nb\n", ""]


def test_follow_of_one_attempt_stops_at_its_end(tmp_path: Path, capfdbinary: Screen) -> None:
    run, first = claimed(tmp_path, NOTHING)
    add(first, 0, "a\n")

    def restart() -> None:
        end_attempt(first, "crash", 40, 1, restarts=True)
        add(claim_attempt(run, world_size=2), 0, "b\n")

    assert followed(run, capfdbinary, restart, view=RANK_0, number=1) == ["a\n", ""]


def test_follow_waits_for_a_run_that_has_not_started_and_for_its_log(tmp_path: Path, capfdbinary: Screen) -> None:
    run = make_run(tmp_path, NOTHING)

    def begin() -> None:
        claim_attempt(run, world_size=1)

    def end() -> None:
        add(Attempt(run, 1), 0, "a\n")
        end_attempt(Attempt(run, 1), "stop_file", 80, 75)

    looks = followed(run, capfdbinary, lambda: None, begin, end, view=RANK_0)
    assert looks == ["r has no attempt yet; waiting for it\n", "", "", "a\n"]


def test_notes_are_dim_on_a_terminal(two: RunDir, monkeypatch: pytest.MonkeyPatch, capfdbinary: Screen) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    end_attempt(Attempt(two, 2), "stop_file", 80, 75)
    Attempt(two, 2).log(0).unlink()
    out = shown(capfdbinary, two.path, "-f")
    assert out.startswith("\x1b[2mattempt 2 of r has no log of rank 0; ")
    assert out.count("\n") == 1


def test_follow_ends_when_the_run_is_killed(tmp_path: Path, capfdbinary: Screen, gone_pid: int) -> None:
    run, attempt = claimed(tmp_path, NOTHING)
    add(attempt, 0, "a\nha")
    assert followed(run, capfdbinary, lambda: change_owner(attempt, pid=gone_pid), view=RANK_0) == ["a\n", "ha\n"]


@pytest.mark.parametrize(("words", "code"), [(["logs", "-f"], READER_HAS_LEFT), (["status", "--json"], 0)])
def test_a_closed_pipe_ends_the_command_without_an_error_message(
    two: RunDir, words: list[str], code: int, repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)  # or the last flush has nothing left to complain about
    out, gone = os.pipe()
    os.close(out)
    argv = [sys.executable, "-m", "jobs", *words, str(two.path)]
    try:
        ended = subprocess.run(argv, cwd=repository, stdout=gone, stderr=subprocess.PIPE, timeout=20, check=False)
    finally:
        os.close(gone)
    assert (ended.returncode, ended.stderr) == (code, b"")
