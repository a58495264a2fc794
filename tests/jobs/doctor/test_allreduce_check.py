"""doctor's all-reduce between real ranks: correct sums are OK, and a rank with a wrong sum is named."""

import pytest

from jobs.doctor import allreduce_check
from jobs.doctor.allreduce_check import all_reduce
from jobs.doctor.result import MISS, OK
from jobs.launcher.node_spec import NodeSpec
from tests.helpers.slurm_commands import naming, wait_for

pytestmark = pytest.mark.processes

# sitecustomize is imported before the ranks are forked, so it patches the function when torch.distributed is there.
SPOIL = """
import os, sys
if "jobs.doctor.allreduce_check" in sys.orig_argv:
    import torch.distributed as dist
    all_reduce = dist.all_reduce
    def spoiled(tensor, *args, **kwargs):
        all_reduce(tensor, *args, **kwargs)
        if dist.get_rank() == 1:
            PLACEHOLDER
    dist.all_reduce = spoiled
"""


@pytest.fixture
def spoil_rank_1(tmp_path, monkeypatch):
    """Run a statement in rank 1 after each all-reduce."""

    def spoil(statement: str) -> None:
        (tmp_path / "sitecustomize.py").write_text(SPOIL.replace("PLACEHOLDER", statement))
        monkeypatch.setenv("PYTHONPATH", str(tmp_path))

    return spoil


def test_two_ranks_sum_right_and_the_bandwidth_is_reported(tmp_path):
    [check] = all_reduce(NodeSpec(1, 0, 2), tmp_path, "cpu")
    assert check.verdict == OK, check
    assert check.found.startswith("2 ranks, gloo: right sums, ")


def test_a_rank_with_a_wrong_sum_is_named(tmp_path, spoil_rank_1):
    spoil_rank_1("tensor[-1] += 1")
    [check] = all_reduce(NodeSpec(1, 0, 2), tmp_path, "cpu")
    assert (check.verdict, check.found) == (MISS, "a wrong sum on ranks [1]")


@pytest.mark.parametrize(
    ("statement", "text"),
    [
        ("raise ValueError('no link')", "ranks here failed: ValueError: no link"),
        ("os.kill(os.getpid(), 11)", "process 1 terminated with signal SIGSEGV"),
    ],
)
def test_the_rank_that_failed_first_is_reported(statement, text, tmp_path, spoil_rank_1):
    spoil_rank_1(statement)
    [check] = all_reduce(NodeSpec(1, 0, 2), tmp_path, "cpu")
    assert check.verdict == MISS
    assert text in check.found


def test_ranks_that_hang_are_ended(tmp_path, spoil_rank_1, monkeypatch):
    spoil_rank_1("import time; time.sleep(1000)")
    monkeypatch.setattr(allreduce_check, "RANKS_S", 15.0)
    [check] = all_reduce(NodeSpec(1, 0, 2), tmp_path, "cpu")
    assert (check.verdict, check.found) == (MISS, "ranks here failed: the ranks did not end within 15 s")
    wait_for(lambda: not naming(str(tmp_path)))
