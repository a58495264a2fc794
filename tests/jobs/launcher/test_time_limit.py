"""The end of an allocation, which may move while the job runs; Slurm's answers are recorded, see test_on_slurm.py."""

import math
import time
from types import SimpleNamespace

import pytest

from jobs.launcher import time_limit
from jobs.launcher.time_limit import TimeLimit
from slurm.errors import NoAnswerError


@pytest.fixture
def slurm(monkeypatch):
    """Slurm's answer; None: it does not answer. How often it was asked is in `asked`."""
    answer = SimpleNamespace(ends=None, asked=0)

    def show_job(job_id):
        assert job_id == "12"
        answer.asked += 1
        if answer.ends is None:
            raise NoAnswerError("slurmctld is away")
        return answer

    monkeypatch.setattr(time_limit.client, "show_job", show_job)
    return answer


def test_slurm_is_not_asked_before_it_is_time(slurm):
    assert not TimeLimit("12", 60, time.time() + 100).has_come()
    assert not TimeLimit("12", 60, math.inf).has_come()
    assert slurm.asked == 0


@pytest.mark.parametrize("later", [100.0, math.inf])
def test_a_limit_that_has_moved_meanwhile_has_not_come(slurm, later):
    limit = TimeLimit("12", 60, time.time() + 59)
    slurm.ends = time.time() + later
    assert not limit.has_come()
    assert not limit.has_come()
    assert slurm.asked == 1, "the new end counts from then on"


@pytest.mark.parametrize("answers", [True, False])
def test_it_comes_once(slurm, answers):
    limit = TimeLimit("12", 60, time.time() + 59)
    slurm.ends = time.time() + 59 if answers else None
    assert [limit.has_come() for _ in range(3)] == [True, False, False]
