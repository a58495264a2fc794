"""The choice of the device, and what is set before CUDA starts. No GPU is needed: they are counted, not used."""

import os
import socket

import pytest
import torch

from fnet_dist.distributed.device import VisibleGpus, choose_device, set_arithmetic, visible_gpus
from fnet_dist.distributed.launch_env import LaunchEnv
from fnet_dist.errors import ConfigError, FnetError
from fnet_dist.run.stop import is_final
from tests.helpers.config import FashionConfig


def launch_env_of(local_rank=0, local_world_size=1, **fields):
    return LaunchEnv(rank=local_rank, local_rank=local_rank, world_size=8, local_world_size=local_world_size, **fields)


@pytest.mark.parametrize(
    ("kind", "launch_env", "gpus", "device"),
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
def test_the_device_is_the_gpu_of_the_local_rank_or_the_cpu(kind, launch_env, gpus, device):
    assert choose_device(kind, launch_env, VisibleGpus(gpus)) == torch.device(device)


@pytest.mark.parametrize("kind", ["auto", "cuda"])
def test_a_rank_to_which_slurm_has_bound_one_gpu_uses_it_whatever_its_local_rank(kind):
    assert choose_device(kind, launch_env_of(3, 4), VisibleGpus(1)) == torch.device("cuda:0")


@pytest.mark.parametrize("kind", ["auto", "cuda"])
@pytest.mark.parametrize(
    ("launch_env", "gpus"),
    [({}, 2), ({"launcher": 7}, 1), ({"launch_id": "none"}, 1)],
    ids=["", "fnet run", "torchrun"],
)
def test_more_ranks_than_gpus_raises_on_every_rank_with_both_numbers(kind, launch_env, gpus):
    for local_rank in range(4):
        with pytest.raises(
            ConfigError, match=rf"^4 ranks on this node but {gpus} visible GPUs; .*--nproc-per-node {gpus}"
        ) as caught:
            choose_device(kind, launch_env_of(local_rank, 4, **launch_env), VisibleGpus(gpus))
        assert caught.value.exit_code == 2


def test_cuda_without_a_gpu_raises():
    with pytest.raises(ConfigError, match=r"parallel\.device is cuda, but torch sees no GPU on "):
        choose_device("cuda", launch_env_of(), VisibleGpus(0))


def test_in_a_job_that_asks_for_gpus_auto_means_cuda_and_outside_of_one_a_laptop_trains_on_its_cpu():
    config = FashionConfig.model_validate({"resources": {"gpus_per_node": 8}})
    here = launch_env_of()
    assert choose_device("auto", here, visible_gpus(config, here)) == torch.device("cpu")
    in_job = launch_env_of(slurm_job="7")
    host = socket.gethostname()
    with pytest.raises(FnetError, match=f"^the job asks for 8 GPUs a node, but torch sees no GPU on {host}; ") as error:
        choose_device("auto", in_job, visible_gpus(config, in_job))
    assert not is_final(error.value.reason, error.value.exit_code), "a fault of the node"
    assert choose_device("cpu", in_job, visible_gpus(config, in_job)) == torch.device("cpu")
    assert choose_device("auto", in_job, VisibleGpus(8, asked=8)) == torch.device("cuda:0")


@pytest.fixture
def arithmetic(monkeypatch):
    """Undo what set_arithmetic sets besides the environment."""
    precision, deterministic = torch.backends.fp32_precision, torch.backends.cudnn.deterministic
    monkeypatch.setenv("NCCL_ALGO", "")  # so that it is put back
    for name in ("NCCL_ALGO", "CUBLAS_WORKSPACE_CONFIG"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    yield
    torch.backends.fp32_precision, torch.backends.cudnn.deterministic = precision, deterministic


def test_on_gpus_sums_are_the_same_in_each_call_unless_the_user_has_chosen_otherwise(arithmetic, monkeypatch):
    monkeypatch.setenv("NCCL_ALGO", "Ring")
    set_arithmetic(FashionConfig(), torch.device("cuda:0"))
    assert (os.environ["NCCL_ALGO"], os.environ["CUBLAS_WORKSPACE_CONFIG"]) == ("Ring", ":4096:8")
    assert torch.backends.cudnn.deterministic
    monkeypatch.delenv("NCCL_ALGO")
    set_arithmetic(FashionConfig(), torch.device("cuda:0"))
    assert os.environ["NCCL_ALGO"] == "^NVLS,NVLSTree"


def test_on_cpus_nothing_of_nccl_or_cublas_is_set(arithmetic):
    set_arithmetic(FashionConfig(), torch.device("cpu"))
    assert not {"NCCL_ALGO", "CUBLAS_WORKSPACE_CONFIG"} & {*os.environ}
