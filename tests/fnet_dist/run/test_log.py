"""Log lines: quiet at a terminal, and with time, level, attempt and process where FNET_LOG asks for them."""

import os
import re
import subprocess
import sys

import pytest

from fnet_dist.run.log import LOGGER, configure_logging


@pytest.fixture(autouse=True)
def restored():
    yield
    configure_logging("tests")


def log_all():
    LOGGER.debug("saved")
    LOGGER.info("attempt 1: 2 ranks")
    LOGGER.warning("damaged checkpoint")
    LOGGER.error("rank 1 failed")


def test_by_default_a_line_is_the_message_for_people(capsys):
    configure_logging("rank 0/2", 1)
    log_all()
    assert capsys.readouterr() == ("attempt 1: 2 ranks\nWARNING: damaged checkpoint\n", "error: rank 1 failed\n")


def test_only_one_rank_reports_and_every_rank_reports_errors(capsys):
    configure_logging("rank 1/2", 1, reports=False)
    log_all()
    assert capsys.readouterr() == ("", "error: rank 1 failed\n")


def test_fnet_log_adds_time_level_attempt_and_process_on_every_rank(capsys, monkeypatch):
    monkeypatch.setenv("FNET_LOG", "debug")
    configure_logging("rank 1/2", reports=False)
    LOGGER.info("connected")
    configure_logging("rank 1/2", 3, reports=False)
    log_all()
    out, err = capsys.readouterr()
    lines = (out + err).splitlines()
    assert [re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} ", line) is not None for line in lines] == [True] * 5
    assert [line.split(" ", 2)[2] for line in lines] == [
        "INFO rank 1/2: connected",
        "DEBUG attempt 3 rank 1/2: saved",
        "INFO attempt 3 rank 1/2: attempt 1: 2 ranks",
        "WARNING attempt 3 rank 1/2: damaged checkpoint",
        "ERROR attempt 3 rank 1/2: rank 1 failed",
    ]


def test_fnet_log_sets_the_level(capsys, monkeypatch):
    monkeypatch.setenv("FNET_LOG", "WARNING")
    configure_logging("rank 0/2")
    log_all()
    out, err = capsys.readouterr()
    assert [line.split(" ")[2] for line in (out + err).splitlines()] == ["WARNING", "ERROR"]


def test_an_unknown_level_is_one_line_and_exit_code_2():
    environment = {**os.environ, "FNET_LOG": "loud"}
    rank = subprocess.run(
        [sys.executable, "-m", "fnet_dist.train"], env=environment, capture_output=True, text=True, timeout=60
    )
    assert (rank.returncode, rank.stdout) == (2, "")
    assert rank.stderr == "error: FNET_LOG='loud', expected debug, info, warning or error\n"


def test_a_reader_that_has_gone_ends_the_output_and_nothing_else():
    code = (
        "from fnet_dist.run.log import LOGGER, configure_logging\n"
        "configure_logging('rank 0/1')\n"
        "for number in range(100_000): LOGGER.info('line %d', number)\n"
        "LOGGER.error('still here')"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout.readline() == "line 0\n"
        process.stdout.close()
        assert process.stderr.read() == "error: still here\n"
    assert process.returncode == 0
