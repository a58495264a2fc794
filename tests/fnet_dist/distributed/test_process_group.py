"""The choice of the device, and the collectives of a single rank. For several ranks see tests/promises."""

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

SINGLE_RANK = Group(0, 1, torch.device("cpu"))


def launch_env_of(local_rank=0, local_world_size=1):
    return LaunchEnv(rank=local_rank, local_rank=local_rank, world_size=8, local_world_size=local_world_size)


@pytest.mark.parametrize(
    ("kind", "launch_env", "visible_gpus", "device"),
    [
        ("auto", launch_env_of(), 0, "cpu"),
        ("auto", launch_env_of(3, 4), 0, "cpu"),
        ("cpu", launch_env_of(1, 4), 4, "cpu"),
        ("cpu", launch_env_of(7, 8), 2, "cpu"),
        ("auto", launch_env_of(), 1, "cuda:0"),
        ("auto", launch_env_of(3, 4), 4, "cuda:3"),
        ("cuda", launch_env_of(1, 2), 8, "cuda:1"),
    ],
)
def test_the_device_is_the_gpu_of_the_local_rank_or_the_cpu(kind, launch_env, visible_gpus, device):
    assert choose_device(kind, launch_env, visible_gpus) == torch.device(device)


@pytest.mark.parametrize("kind", ["auto", "cuda"])
def test_a_rank_that_sees_one_gpu_uses_it_whatever_its_local_rank(kind):
    assert choose_device(kind, launch_env_of(3, 4), 1) == torch.device("cuda:0")


@pytest.mark.parametrize("kind", ["auto", "cuda"])
def test_more_ranks_than_gpus_raises_on_every_rank_with_both_numbers(kind):
    for local_rank in range(4):
        with pytest.raises(
            ConfigError, match=r"^4 ranks on this node but 2 visible GPUs; .*--nproc-per-node=2"
        ) as caught:
            choose_device(kind, launch_env_of(local_rank, 4), 2)
        assert caught.value.exit_code == 2


def test_cuda_without_a_gpu_raises():
    with pytest.raises(ConfigError, match=r"parallel\.device is cuda but torch sees no GPU"):
        choose_device("cuda", launch_env_of(), 0)


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
