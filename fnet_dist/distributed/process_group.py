"""The process group: choose the device, open and close the group, exchange small values between ranks."""

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
    """The ranks that train together. A single rank has no process group: every collective returns its own value."""

    rank: int
    world_size: int
    device: torch.device

    @property
    def is_rank0(self) -> bool:
        """Return True on rank 0, which prints and writes for all."""
        return self.rank == 0


def choose_device(kind: str, launch_env: LaunchEnv, visible_gpus: int) -> torch.device:
    """Return this rank's device: GPU `local_rank`, or the CPU. `visible_gpus` is torch.cuda.device_count().

    A rank that sees exactly one GPU uses it, because the scheduler bound it. Raise ConfigError if there are too few.
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
    """Set how this process computes: full float32 unless `parallel` says otherwise, denormals flushed to zero.

    Adam's averages decay into denormals where a pixel never changes, and its step would take three times as long.
    """
    if parallel.precision == "tf32" and device.type != "cuda":
        raise ConfigError("parallel.precision tf32 needs a GPU, found the CPU; use --parallel.precision fp32")
    torch.backends.fp32_precision = "tf32" if parallel.precision == "tf32" else "ieee"  # type: ignore[attr-defined]  # not in torch's stubs
    torch.set_flush_denormal(True)


@contextmanager
def open_process_group(launch_env: LaunchEnv, device: torch.device, timeout_s: float) -> Iterator[Group]:
    """Open the process group (NCCL on GPUs, gloo on CPUs), and close it after success.

    `timeout_s` is the collectives' own timeout. After an error the group is not closed: that would wait for ranks that
    have ended, and the process ends anyway.
    """
    group = Group(launch_env.rank, launch_env.world_size, device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if group.world_size == 1:
        yield group
        return
    rendezvous: dict[str, Any] = {"init_method": launch_env.init_method}
    if launch_env.init_method is not None and launch_env.init_method.startswith("tcp://"):
        rendezvous = {"store": _open_store(launch_env, timeout_s)}
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        rank=launch_env.rank,
        world_size=launch_env.world_size,
        timeout=timedelta(seconds=timeout_s),
        device_id=device if device.type == "cuda" else None,
        **rendezvous,
    )
    yield group
    gc.collect()  # DDP is part of reference cycles that hold the group: gloo's threads would outlive the interpreter
    dist.destroy_process_group()


def _open_store(launch_env: LaunchEnv, timeout_s: float) -> TCPStore:
    """Connect to the store at `init_method`, tcp://HOST:PORT; on rank 0 serve it, on the launcher's listening socket.

    The launcher has bound one port on one interface, which no other process can take in between.
    """
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
    """Return every rank's `row` (n,) as (world_size, n), on every rank. All must have the same length and dtype."""
    if group.world_size == 1:
        return row[None]
    rows = row.new_empty(group.world_size * len(row))
    dist.all_gather_into_tensor(rows, row)
    return rows.view(group.world_size, len(row))


def gather_json(group: Group, value: Any) -> list[Any]:
    """Return every rank's `value`, on every rank. JSON, not pickle: nothing from the network is unpickled."""
    if group.world_size == 1:
        return [value]
    text = json.dumps(value).encode()
    lengths = gather_rows(group, torch.tensor([len(text)], device=group.device)).flatten().tolist()
    padded = torch.zeros(max(lengths), dtype=torch.uint8)
    padded[: len(text)] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    rows = gather_rows(group, padded.to(group.device)).cpu()
    return [json.loads(bytes(row[:length].tolist())) for row, length in zip(rows, lengths, strict=True)]


def raise_on_all_ranks(group: Group, build: Callable[[], T]) -> T:
    """Return `build()` on every rank; if it raises FnetError or OSError on some, raise the first rank's on all.

    Without this, the other ranks would wait in their next collective for a rank that has ended.
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
            error_of_all = FnetError(theirs["text"] if rank == 0 else f"rank {rank}: {theirs['text']}")
            error_of_all.exit_code, error_of_all.reason = theirs["code"], theirs["reason"]
            raise error_of_all from failure
    return cast("T", result)  # None only if `build` returned None


def run_on_rank0(group: Group, build: Callable[[], T]) -> T:
    """Run `build()` on rank 0 alone; return its result, which must fit into JSON, or raise its error, on every rank."""
    value = raise_on_all_ranks(group, lambda: build() if group.is_rank0 else None)
    result: T = gather_json(group, value)[0]
    return result
