"""This rank's device, and how it computes there: chosen and set before any work on it begins."""

import os
import socket
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch

from fnet_dist.config.schema import Config
from fnet_dist.distributed.launch_env import LaunchEnv
from fnet_dist.errors import ConfigError, FnetError

# Unless the user has set them. NVLink SHARP adds in another order from call to call (NCCL issues 1497 and 2360), and
# cuBLAS with several streams may choose another algorithm ("Results reproducibility" in its documentation).
_REPRODUCIBLE = {"NCCL_ALGO": "^NVLS,NVLSTree", "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
# The order of NCCL's sums depends on these.
_NCCL_SETTINGS = ("ALGO", "PROTO", "MIN_NCHANNELS", "MAX_NCHANNELS", "NVLS_ENABLE", "COLLNET_ENABLE", "PXN_DISABLE")


@dataclass(frozen=True)
class VisibleGpus:
    """The GPUs that torch sees here, and those that the Slurm job has asked for on each node, 0 outside of a job."""

    visible: int
    asked: int = 0


def visible_gpus(config: Config, launch_env: LaunchEnv) -> VisibleGpus:
    """Count this process's GPUs, without starting CUDA."""
    asked = config.resources.gpus_per_node if launch_env.slurm_job is not None else 0
    return VisibleGpus(torch.cuda.device_count(), asked)


def choose_device(kind: str, launch_env: LaunchEnv, gpus: VisibleGpus) -> torch.device:
    """Return this rank's device: GPU `local_rank`, or the CPU.

    Raise ConfigError if there are fewer GPUs than ranks. In a job that has asked for GPUs raise FnetError for that, and
    if there is none: a fault of the node, which another attempt may not have. Ranks on its CPU would keep those of all
    other nodes waiting.
    """
    kind_of_error = FnetError if gpus.asked else ConfigError
    if kind == "cpu" or (kind == "auto" and gpus.visible == 0 and gpus.asked == 0):
        return torch.device("cpu")
    if gpus.visible == 0:
        wanted = f"the job asks for {gpus.asked} GPUs a node" if gpus.asked else "parallel.device is cuda"
        raise kind_of_error(
            f"{wanted}, but torch sees no GPU on {socket.gethostname()}; see nvidia-smi there, or use "
            "--parallel.device cpu"
        )
    # Both launchers give all ranks of a node the same environment. Without one, Slurm may have bound one GPU to each.
    is_bound = gpus.visible == 1 and launch_env.launcher is None and launch_env.launch_id is None
    if launch_env.local_world_size > gpus.visible and not is_bound:
        raise kind_of_error(
            f"{launch_env.local_world_size} ranks on this node but {gpus.visible} visible GPUs; use --nproc-per-node "
            f"{gpus.visible}, or --parallel.device cpu"
        )
    return torch.device("cuda", 0 if is_bound else launch_env.local_rank)


def set_arithmetic(config: Config, device: torch.device) -> None:
    """Set how this process computes: the same bits each time, in full float32 unless `config` says otherwise."""
    precision = config.parallel.precision
    if precision == "tf32" and device.type != "cuda":
        raise ConfigError("parallel.precision tf32 needs a GPU, found the CPU; use --parallel.precision fp32")
    torch.backends.fp32_precision = "tf32" if precision == "tf32" else "ieee"  # type: ignore[attr-defined]  # not in torch's stubs
    if device.type == "cuda":
        for name, value in _REPRODUCIBLE.items():
            os.environ.setdefault(name, value)
        torch.backends.cudnn.deterministic = True
    else:
        # Adam's averages decay into denormals where a pixel never changes: its step would take three times as long.
        torch.set_flush_denormal(True)
    if config.parallel.compile:
        inductor: Any = import_module("torch._inductor.config")
        inductor.deterministic = True  # no choice between kernels by their timing
    if config.parallel.numerics == "invariant":  # the bits depend on the number of threads, and launchers set it
        torch.set_num_threads(config.resources.cpus_per_rank)  # by the number of ranks


def compute_conditions(device: torch.device) -> dict[str, str]:
    """Return {name: value} of what the bits depend on where `device` computes, besides torch's build."""
    if device.type != "cuda":
        # AVX2 and AVX-512 kernels add in other orders.
        return {"device": "cpu", "cpu_capability": torch.backends.cpu.get_cpu_capability()}
    given = {name: os.environ.get(f"NCCL_{name}") for name in _NCCL_SETTINGS}
    settings = " ".join(f"NCCL_{name}={value}" for name, value in given.items() if value)
    version = ".".join(map(str, torch.cuda.nccl.version()))
    return {"device": torch.cuda.get_device_name(device), "nccl": f"{version} {settings}".strip()}
