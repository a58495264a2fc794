"""The process group: open and close it, exchange small values between ranks."""

import gc
import json
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import PrefixStore, Store, TCPStore  # type: ignore[attr-defined]  # not in torch's list of exports
from torch.distributed.rendezvous import rendezvous

from fnet_dist.distributed.flight_recorder import start_recorder
from fnet_dist.distributed.launch_env import LaunchEnv
from fnet_dist.errors import ConfigError, FnetError, SharedError, StorageError, describe
from fnet_dist.processes import raise_open_files

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


@contextmanager
def open_process_group(launch_env: LaunchEnv, device: torch.device, timeout_s: float) -> Iterator[Group]:
    """Open the process group (NCCL on GPUs, gloo on CPUs) with this timeout of collectives; close it after success."""
    group = Group(launch_env.rank, launch_env.world_size, device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if group.world_size == 1:
        yield group
        return
    start_recorder()
    raise_open_files(1024 + 4 * group.world_size)  # gloo connects each pair of ranks, and rank 0 serves the store
    timeout, url = timedelta(seconds=timeout_s), launch_env.init_method
    if url is not None and url.startswith("tcp://"):
        host, _, port = url.removeprefix("tcp://").rpartition(":")
        fd = launch_env.listen_fd  # bound by rank 0's launcher: no other process can take the port in between
        store: Store = TCPStore(
            host, int(port), group.world_size, fd is not None, timeout, wait_for_workers=False, master_listen_fd=fd
        )
    else:
        store, *_ = next(rendezvous(url or "env://", group.rank, group.world_size, timeout=timeout))
        store.set_timeout(timeout)
    compare_ranks(PrefixStore("ranks", store), group)
    backend, device_id = ("nccl", device) if device.type == "cuda" else ("gloo", None)
    dist.init_process_group(
        backend, store=store, rank=group.rank, world_size=group.world_size, timeout=timeout, device_id=device_id
    )
    yield group  # no `finally`: after an error, closing would wait for ranks that have ended
    gc.collect()  # DDP is part of reference cycles that hold the group: gloo's threads would outlive the interpreter
    dist.destroy_process_group()


def compare_ranks(store: Store, group: Group) -> None:
    """Raise ConfigError unless all ranks have one kind of device and one torch: else they would wait for each other.

    Through the store, as no backend connects a rank on a GPU to one on the CPU. Rank 0 reads what all have written.
    """
    mine = f"device {group.device.type} and torch {torch.__version__}"
    store.set(str(group.rank), f"{mine}\n{socket.gethostname()}")
    if group.is_rank0:
        problem = ""
        for rank in range(1, group.world_size):
            theirs, host = store.get(str(rank)).decode().split("\n")
            if theirs != mine:
                here = f"rank 0 on {socket.gethostname()} has {mine}"
                fix = "expected the same on all ranks: `fnet doctor --cluster` compares nodes"
                problem = f"rank {rank} on {host} has {theirs}, {here}; {fix}"
                break
        store.set("problem", problem)
    if problem := store.get("problem").decode():
        raise ConfigError(problem)


def gather_rows(group: Group, row: Tensor) -> Tensor:
    """Return every rank's `row` (n,) as (world_size, n), on every rank. All must have the same length and dtype."""
    if group.world_size == 1:
        return row[None]
    rows = row.new_empty(group.world_size * len(row))
    dist.all_gather_into_tensor(rows, row)
    return rows.view(group.world_size, len(row))


def all_reduce(group: Group, mine: Tensor, operation: Literal["sum", "max", "min"]) -> Tensor:
    """Return the sum, maximum or minimum of every rank's `mine`, on every rank."""
    if group.world_size == 1:
        return mine
    result = mine.contiguous().clone()
    dist.all_reduce(result, {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX, "min": dist.ReduceOp.MIN}[operation])
    return result


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
    except (FnetError, OSError) as error:
        failure = error if isinstance(error, FnetError) else StorageError(describe(error))
    mine = None if failure is None else (str(failure), failure.exit_code, failure.reason)
    for rank, theirs in enumerate(gather_json(group, mine)):
        if theirs is not None:
            text, exit_code, reason = theirs
            error_of_all = SharedError(text if rank == 0 else f"rank {rank}: {text}", rank)
            error_of_all.exit_code, error_of_all.reason = exit_code, reason
            raise error_of_all from failure
    return cast("T", result)  # None only if `build` returned None


def run_on_rank0(group: Group, build: Callable[[], T]) -> T:
    """Run `build()` on rank 0 alone; return its result, which must fit into JSON, or raise its error, on every rank."""
    result = raise_on_all_ranks(group, lambda: build() if group.is_rank0 else None)
    return cast("T", gather_json(group, result)[0])
