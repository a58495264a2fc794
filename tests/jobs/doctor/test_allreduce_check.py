"""doctor's all-reduce between real ranks: correct sums are OK, and a rank with a wrong sum is named."""

import pytest

from jobs.doctor.allreduce_check import all_reduce
from jobs.doctor.result import MISS, OK
from jobs.launcher.node_spec import NodeSpec

pytestmark = pytest.mark.processes

WRONG = """
import os, sys
if os.environ.get("RANK") == "1" and "jobs.doctor.allreduce_check" in sys.orig_argv:
    import torch.distributed as dist
    all_reduce = dist.all_reduce
    def wrong(tensor, *args, **kwargs):
        all_reduce(tensor, *args, **kwargs)
        tensor[-1] += 1
    dist.all_reduce = wrong
"""


def test_two_ranks_sum_right_and_the_bandwidth_is_reported(tmp_path):
    [check] = all_reduce(NodeSpec(1, 0, 2), tmp_path, "cpu")
    assert check.verdict == OK, check
    assert check.found.startswith("2 ranks, gloo: right sums, ")


def test_a_rank_with_a_wrong_sum_is_named(tmp_path, monkeypatch):
    (tmp_path / "sitecustomize.py").write_text(WRONG)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    [check] = all_reduce(NodeSpec(1, 0, 2), tmp_path, "cpu")
    assert (check.verdict, check.found) == (MISS, "a wrong sum on ranks [1]")
