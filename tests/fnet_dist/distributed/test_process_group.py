"""The comparison of ranks, and the collectives of a single rank. For several ranks see tests/promises."""

import re

import pytest
import torch
from torch.distributed import HashStore

from fnet_dist.distributed.launch_env import LaunchEnv
from fnet_dist.distributed.process_group import (
    Group,
    compare_ranks,
    gather_json,
    gather_rows,
    open_process_group,
    raise_on_all_ranks,
    run_on_rank0,
)
from fnet_dist.errors import ConfigError, DataError, FnetError, SharedError
from tests.helpers.ranks import run_ranks

SINGLE_RANK = Group(0, 1, torch.device("cpu"))


@pytest.mark.parametrize(
    ("device", "torch_version"), [("cuda", torch.__version__), ("cpu", "2.0.1")], ids=["device", "torch"]
)
def test_ranks_with_another_device_or_torch_are_named_before_they_would_wait(device, torch_version):
    store = HashStore()
    store.set("1", f"device cpu and torch {torch.__version__}\nnode0")
    store.set("2", f"device {device} and torch {torch_version}\nnode7")
    said = (
        rf"^rank 2 on node7 has device {device} and torch {re.escape(torch_version)}, rank 0 on \S+ has device cpu and "
        rf"torch {re.escape(torch.__version__)}; expected the same on all ranks: "
    )
    for rank in (0, 1):  # rank 0 tells the others
        with pytest.raises(ConfigError, match=said):
            compare_ranks(store, Group(rank, 3, torch.device("cpu")))


def test_a_single_rank_has_no_process_group():
    with open_process_group(LaunchEnv(), torch.device("cpu"), timeout_s=1) as group:
        assert group == SINGLE_RANK
        assert group.is_rank0
        assert not torch.distributed.is_initialized()


def test_only_rank_0_is_rank0():
    assert not Group(1, 2, torch.device("cpu")).is_rank0


def test_the_collectives_of_a_single_rank_return_its_value():
    row = torch.tensor([1.0, 2.0], dtype=torch.float64)
    assert gather_rows(SINGLE_RANK, row).tolist() == [[1.0, 2.0]]
    assert gather_rows(SINGLE_RANK, row).dtype == torch.float64
    value = {"a": [1, None]}
    assert gather_json(SINGLE_RANK, value) == [value]
    assert raise_on_all_ranks(SINGLE_RANK, lambda: value) is value
    assert raise_on_all_ranks(SINGLE_RANK, lambda: None) is None
    assert run_on_rank0(SINGLE_RANK, lambda: 7) == 7


@pytest.mark.parametrize("collective", [raise_on_all_ranks, run_on_rank0])
def test_an_fnet_error_keeps_its_text_exit_code_and_reason(collective):
    def fail():
        raise DataError("train-images is damaged")

    with pytest.raises(FnetError, match=r"^train-images is damaged$") as caught:
        collective(SINGLE_RANK, fail)
    assert (caught.value.exit_code, caught.value.reason) == (65, "data")
    assert isinstance(caught.value.__cause__, DataError)


@pytest.mark.parametrize("collective", [raise_on_all_ranks, run_on_rank0])
def test_an_os_error_becomes_an_fnet_error_that_names_the_file(collective, tmp_path):
    with pytest.raises(FnetError, match=r"no/such/folder: No such file or directory$") as caught:
        collective(SINGLE_RANK, (tmp_path / "no/such/folder").mkdir)
    assert (caught.value.exit_code, caught.value.reason) == (74, "io")


@pytest.mark.parametrize("collective", [raise_on_all_ranks, run_on_rank0])
def test_any_other_error_is_raised_as_it_is(collective):
    with pytest.raises(ZeroDivisionError):
        collective(SINGLE_RANK, lambda: 1 // 0)


def fail_on_rank_1(group: Group) -> None:
    def build() -> None:
        if group.rank == 1:
            raise DataError("no GPU left")

    with pytest.raises(SharedError, match=r"^rank 1: no GPU left$") as caught:
        raise_on_all_ranks(group, build)
    assert (caught.value.rank, caught.value.exit_code) == (1, 65)


@pytest.mark.processes
def test_all_ranks_know_which_rank_failed():
    run_ranks(fail_on_rank_1, 2)
