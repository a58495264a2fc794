"""Gradients of ranks that are processes of one machine and compute on its CPUs: they meet in memory that all share.

Inside a step of two busy cores gloo's all_reduce of 235,146 gradients takes ten times as long as to copy and add them:
its threads wait to be woken (tests/benchmarks/NOTES.md). Only on x86-64, where every core sees another's stores in
their order (Intel SDM, volume 3, 8.2.2): there is no other synchronisation.
"""

import fcntl
import mmap
import os
import platform
import secrets
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed import GradBucket  # type: ignore[attr-defined]  # not in torch's list of exports

from fnet_dist.group import Group, gather_json, gather_rows

_NAME = "fnet-gradients"
# Bytes. Every rank reads all others' gradients: for large ones and many ranks more than gloo sends.
_MOST = 2**28
_LINE = 64  # bytes of a cache line: no two ranks write the same one
_LOOKS = 1_000  # about 100 us without sleep: longer than balanced ranks wait for each other
_NAP_S = 20e-6
_NAPS = 1_000  # between looks whether a rank has left, some 0.1 s


class SharedMemory:
    """The ranks' gradients side by side, twice: a rank that writes step k's is past step k - 1's sum, and so all others
    are past step k - 2's. Each rank counts its exchanges where the others can see it, and locks a byte of its own: the
    system lets go of it however a process ends."""

    def __init__(self, group: Group, descriptor: int, share: int) -> None:
        self._rank, self._world_size, self._descriptor, self._share = group.rank, group.world_size, descriptor, share
        memory = memoryview(mmap.mmap(descriptor, 0))
        self._counts = memory[: _LINE * (1 + group.world_size)].cast("q")
        self._bytes = torch.frombuffer(memory, dtype=torch.uint8)
        fcntl.lockf(descriptor, fcntl.LOCK_EX, 1, group.rank)
        self._exchanges = self._offset = 0
        self._waiting = list[tuple[Tensor, list[Tensor], torch.futures.Future[Tensor]]]()
        self._parts = dict[tuple[int, int, int], list[Tensor]]()  # making a view costs 5 us in a step, finding it 1

    def average(self, bucket: GradBucket) -> torch.futures.Future[Tensor]:
        """For DDP's hook: the mean over all ranks in place of the bucket, there when the step's last one is.

        Added in the ranks' order, so with the same bits everywhere. Raises RuntimeError if a rank has left.
        """
        gradients = bucket.buffer()
        parts = self._parts_of(gradients)
        torch.div(gradients, self._world_size, out=parts[self._rank])
        future = torch.futures.Future[Tensor]()
        self._waiting.append((gradients, parts, future))
        self._offset += _lines(gradients)
        if bucket.is_last():
            self._exchanges += 1
            self._counts[_LINE // 8 * (1 + self._rank)] = self._exchanges
            for rank in range(self._world_size):
                self._wait_for(rank)
            for gradients, (first, second, *others), future in self._waiting:
                torch.add(first, second, out=gradients)
                for other in others:
                    gradients.add_(other)
                future.set_result(gradients)
            self._waiting.clear()
            self._offset = 0
        return future

    def _parts_of(self, gradients: Tensor) -> list[Tensor]:
        """Where each rank puts the bucket `gradients` in the exchange under way."""
        half = self._exchanges % 2
        key = half, self._offset, gradients.nbytes
        if key not in self._parts:
            first = _LINE * (1 + self._world_size) + half * self._world_size * self._share + self._offset
            starts = [first + rank * self._share for rank in range(self._world_size)]
            self._parts[key] = [self._bytes[start : start + gradients.nbytes].view(gradients.dtype) for start in starts]
        return self._parts[key]

    def _wait_for(self, rank: int) -> None:
        looks = 0
        while self._counts[_LINE // 8 * (1 + rank)] < self._exchanges:
            looks += 1
            if looks > _LOOKS:
                time.sleep(_NAP_S)
                if looks % _NAPS == 0 and self._has_left(rank):
                    raise RuntimeError(f"connection closed by peer: rank {rank} has left")

    def _has_left(self, rank: int) -> bool:
        with suppress(OSError):
            fcntl.lockf(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, rank)
            return True
        return False


def share_memory(group: Group, gradients: Iterable[Tensor]) -> SharedMemory | None:
    """Memory for `gradients`, those of one rank, if all ranks of `group` can share it: called by all of them."""
    share = sum(map(_lines, gradients))
    size = _LINE * (1 + group.world_size) + 2 * group.world_size * share
    if group.device.type != "cpu" or size > _MOST:
        return None
    able = platform.machine() == "x86_64" and hasattr(os, "memfd_create")  # of this rank: another's machine may differ
    descriptor, token = -1, secrets.token_bytes(32)
    if group.is_main and able:
        with suppress(OSError):
            descriptor = os.memfd_create(_NAME)
            os.ftruncate(descriptor, size)
            os.pwrite(descriptor, token, 0)
    path, token_hex = gather_json(group, [f"/proc/{os.getpid()}/fd/{descriptor}", token.hex()])[0]
    if not group.is_main and able:
        descriptor = _open(path, token_hex)
    if not gather_rows(group, torch.tensor([descriptor >= 0])).all():
        if descriptor >= 0:
            os.close(descriptor)
        return None
    shared = SharedMemory(group, descriptor, share)
    gather_rows(group, torch.zeros(1))  # nobody looks for a rank that has not locked its byte yet
    return shared


def _lines(tensor: Tensor) -> int:
    """Its bytes, in whole lines."""
    return -(-tensor.nbytes // _LINE) * _LINE


def _open(path: str, token_hex: str) -> int:
    """Rank 0's memory, or -1: on another machine or in another container the path names nothing, or something else."""
    with suppress(OSError):
        if str(Path(path).readlink()).startswith(f"/memfd:{_NAME}"):
            descriptor = os.open(path, os.O_RDWR)
            if os.pread(descriptor, 32, 0).hex() == token_hex:
                return descriptor
            os.close(descriptor)
    return -1
