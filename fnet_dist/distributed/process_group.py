"""The process group: device, start and end, and the few ways in which ranks tell each other something."""

import gc
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import TCPStore  # type: ignore[attr-defined]  # not in torch's list of exports

from fnet_dist.config.schema import ParallelConfig
from fnet_dist.distributed.launch_env import LaunchEnv
from fnet_dist.errors import ConfigError, FnetError, StorageError, describe

T = TypeVar("T")


@dataclass(frozen=True)
class Group:
    """The ranks that train together. A world of one has no process group: every exchange is the identity."""

    rank: int
    world_size: int
    device: torch.device

    @property
    def is_rank0(self) -> bool:
        return self.rank == 0


def choose_device(kind: str, launch_env: LaunchEnv, visible_gpus: int) -> torch.device:
    """The device of this rank: GPU local_rank, or the CPU. `visible_gpus` is torch.cuda.device_count().

    A rank that sees exactly one GPU uses it: the scheduler bound it. Raises ConfigError if there are too few.
    """
    if kind == "cpu" or (kind == "auto" and visible_gpus == 0):
        return torch.device("cpu")
    if visible_gpus == 0:
        raise ConfigError("parallel.device is cuda but torch sees no GPU; use --parallel.device cpu, or see nvidia-smi")
    if visible_gpus == 1:
        return torch.device("cuda", 0)
    if launch_env.local_world_size > visible_gpus:
        raise ConfigError(
            f"{launch_env.local_world_size} ranks on this node but {visible_gpus} visible GPUs; start torchrun with "
            f"--nproc-per-node={visible_gpus}, or use --parallel.device cpu"
        )
    return torch.device("cuda", launch_env.local_rank)


def configure_arithmetic(parallel: ParallelConfig, device: torch.device) -> None:
    """How this process computes: full float32 unless asked otherwise, denormals as zero.

    Adam's averages decay into denormals where a pixel never changes: its step then takes almost three times as long.
    """
    if parallel.precision == "tf32" and device.type != "cuda":
        raise ConfigError("parallel.precision tf32 needs a GPU, found the CPU; use --parallel.precision fp32")
    torch.backends.fp32_precision = "tf32" if parallel.precision == "tf32" else "ieee"  # type: ignore[attr-defined]  # not in torch's stubs
    torch.set_flush_denormal(True)


@contextmanager
def open_process_group(launch_env: LaunchEnv, device: torch.device, timeout_s: float) -> Iterator[Group]:
    """Bring the process group up (NCCL on GPUs, gloo on CPUs) and, after success, down.

    `timeout_s` is the collectives' own timeout. After an error the group is left alone: the process ends, and
    waiting for ranks that are gone would hide why.
    """
    group = Group(launch_env.rank, launch_env.world_size, device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if group.world_size == 1:
        yield group
        return
    meeting: dict[str, Any] = {"init_method": launch_env.init_method}
    if launch_env.init_method is not None and launch_env.init_method.startswith("tcp://"):
        meeting = {"store": _init_process_group(launch_env, timeout_s)}
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        rank=launch_env.rank,
        world_size=launch_env.world_size,
        timeout=timedelta(seconds=timeout_s),
        device_id=device if device.type == "cuda" else None,
        **meeting,
    )
    yield group
    gc.collect()  # DDP is part of cycles: what still holds the group would keep gloo's threads alive past Python's end
    dist.destroy_process_group()


def _init_process_group(launch_env: LaunchEnv, timeout_s: float) -> TCPStore:
    """The store at `init_method`, tcp://HOST:PORT. Its socket was bound by the launcher: one port, one interface, and
    nobody can take it in between."""
    host, _, port = (launch_env.init_method or "").removeprefix("tcp://").rpartition(":")
    return TCPStore(
        host,
        int(port),
        launch_env.world_size,
        is_master=launch_env.listen_fd is not None,
        timeout=timedelta(seconds=timeout_s),
        wait_for_workers=False,
        master_listen_fd=launch_env.listen_fd,
    )


def gather_rows(group: Group, row: Tensor) -> Tensor:
    """Every rank's `row` (n,), as (world_size, n), on every rank. All rows have the same length and dtype."""
    if group.world_size == 1:
        return row[None]
    rows = row.new_empty(group.world_size * len(row))
    dist.all_gather_into_tensor(rows, row)
    return rows.view(group.world_size, len(row))


def gather_json(group: Group, value: Any) -> list[Any]:
    """Every rank's `value`, on every rank. It travels as JSON: nothing from the network is unpickled."""
    if group.world_size == 1:
        return [value]
    text = json.dumps(value).encode()
    lengths = gather_rows(group, torch.tensor([len(text)], device=group.device)).flatten().tolist()
    padded = torch.zeros(max(lengths), dtype=torch.uint8)
    padded[: len(text)] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    rows = gather_rows(group, padded.to(group.device)).cpu()
    return [json.loads(bytes(row[:length].tolist())) for row, length in zip(rows, lengths, strict=True)]


def raise_on_all_ranks(group: Group, build: Callable[[], T]) -> T:
    """`build()` on every rank; if it fails with an explained error on one, all ranks raise the first one's.

    Nobody waits for a rank that has left, and nobody leaves alone.
    """
    result: T | None = None
    failure: FnetError | None = None
    try:
        result = build()
    except FnetError as error:
        failure = error
    except OSError as error:
        failure = StorageError(describe(error))
    mine = None if failure is None else {"text": str(failure), "code": failure.exit_code, "reason": failure.reason}
    for rank, theirs in enumerate(gather_json(group, mine)):
        if theirs is not None:
            agreed = FnetError(theirs["text"] if rank == 0 else f"rank {rank}: {theirs['text']}")
            agreed.exit_code, agreed.reason = theirs["code"], theirs["reason"]
            raise agreed from failure
    return cast("T", result)  # None only if build gave None


def run_on_rank0(group: Group, build: Callable[[], T]) -> T:
    """`build()` on rank 0 alone; every rank gets its JSON-able result, or raises its explained error."""
    value = raise_on_all_ranks(group, lambda: build() if group.is_rank0 else None)
    result: T = gather_json(group, value)[0]
    return result
