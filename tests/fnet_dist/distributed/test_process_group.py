"""Devices, and the exchanges of a world of one, which are the identity. Worlds of many are in tests/promises."""

import pytest
import torch

from fnet_dist.distributed.launch_env import LaunchEnv
from fnet_dist.distributed.process_group import (
    Group,
    choose_device,
    gather_json,
    gather_rows,
    open_process_group,
    raise_on_all_ranks,
    run_on_rank0,
)
from fnet_dist.errors import ConfigError, DataError, FnetError

ALONE = Group(0, 1, torch.device("cpu"))


def ranks(local_rank=0, local_world_size=1):
    return LaunchEnv(rank=local_rank, local_rank=local_rank, world_size=8, local_world_size=local_world_size)


@pytest.mark.parametrize(
    ("kind", "launch_env", "visible_gpus", "device"),
    [
        ("auto", ranks(), 0, "cpu"),
        ("auto", ranks(3, 4), 0, "cpu"),
        ("cpu", ranks(1, 4), 4, "cpu"),
        ("cpu", ranks(7, 8), 2, "cpu"),
        ("auto", ranks(), 1, "cuda:0"),
        ("auto", ranks(3, 4), 4, "cuda:3"),
        ("cuda", ranks(1, 2), 8, "cuda:1"),
    ],
)
def test_the_device_is_the_gpu_of_the_local_rank_or_the_cpu(kind, launch_env, visible_gpus, device):
    assert choose_device(kind, launch_env, visible_gpus) == torch.device(device)


@pytest.mark.parametrize("kind", ["auto", "cuda"])
def test_a_rank_that_was_bound_to_one_gpu_uses_it_whatever_its_number(kind):
    assert choose_device(kind, ranks(3, 4), 1) == torch.device("cuda:0")


@pytest.mark.parametrize("kind", ["auto", "cuda"])
def test_more_ranks_than_gpus_is_told_with_both_numbers_on_every_rank(kind):
    for local_rank in range(4):
        with pytest.raises(
            ConfigError, match=r"^4 ranks on this node but 2 visible GPUs; .*--nproc-per-node=2"
        ) as caught:
            choose_device(kind, ranks(local_rank, 4), 2)
        assert caught.value.exit_code == 2


def test_a_gpu_that_is_asked_for_and_not_there_is_told():
    with pytest.raises(ConfigError, match=r"parallel\.device is cuda but torch sees no GPU"):
        choose_device("cuda", ranks(), 0)


def test_a_world_of_one_has_no_process_group():
    with open_process_group(LaunchEnv(), torch.device("cpu"), timeout_s=1) as group:
        assert group == ALONE
        assert group.is_rank0
        assert not torch.distributed.is_initialized()


def test_only_rank_0_is_main():
    assert not Group(1, 2, torch.device("cpu")).is_rank0


def test_alone_every_exchange_is_the_identity():
    row = torch.tensor([1.0, 2.0], dtype=torch.float64)
    assert gather_rows(ALONE, row).tolist() == [[1.0, 2.0]]
    assert gather_rows(ALONE, row).dtype == torch.float64
    value = {"a": [1, None]}
    assert gather_json(ALONE, value) == [value]
    assert raise_on_all_ranks(ALONE, lambda: value) is value
    assert raise_on_all_ranks(ALONE, lambda: None) is None
    assert run_on_rank0(ALONE, lambda: 7) == 7


@pytest.mark.parametrize("exchange", [raise_on_all_ranks, run_on_rank0])
def test_an_explained_error_keeps_its_text_code_and_reason(exchange):
    def fail():
        raise DataError("train-images is damaged")

    with pytest.raises(FnetError, match=r"^train-images is damaged$") as caught:
        exchange(ALONE, fail)
    assert (caught.value.exit_code, caught.value.reason) == (65, "data")
    assert isinstance(caught.value.__cause__, DataError)


@pytest.mark.parametrize("exchange", [raise_on_all_ranks, run_on_rank0])
def test_a_file_that_cannot_be_made_is_an_explained_error_that_names_it(exchange, tmp_path):
    with pytest.raises(FnetError, match=r"no/such/folder: No such file or directory$") as caught:
        exchange(ALONE, (tmp_path / "no/such/folder").mkdir)
    assert (caught.value.exit_code, caught.value.reason) == (74, "io")


@pytest.mark.parametrize("exchange", [raise_on_all_ranks, run_on_rank0])
def test_an_unexplained_error_comes_through_as_it_is(exchange):
    with pytest.raises(ZeroDivisionError):
        exchange(ALONE, lambda: 1 // 0)
