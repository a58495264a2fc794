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
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor

from fnet_dist.distributed.process_group import Group, gather_json, gather_rows

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

    def __init__(self, group: Group, descriptor: int, like: Sequence[Tensor]) -> None:
        self._rank, self._world_size, self._descriptor = group.rank, group.world_size, descriptor
        memory = memoryview(mmap.mmap(descriptor, 0))
        self._counts = memory[: _LINE * (1 + group.world_size)].cast("q")
        fcntl.lockf(descriptor, fcntl.LOCK_EX, 1, group.rank)
        self._exchanges = 0
        used, share = sum(tensor.nbytes for tensor in like), _share_of(like)
        everything = torch.frombuffer(memory, dtype=torch.uint8)[_LINE * (1 + group.world_size) :]
        shares = [everything[start : start + used] for start in range(0, 2 * group.world_size * share, share)]
        flat = [each.view(like[0].dtype) for each in shares]
        self._halves = flat[: group.world_size], flat[group.world_size :]
        self._mine = [views_like(half[group.rank], like) for half in self._halves]
        self._sum = torch.empty_like(flat[0])
        self._sums = views_like(self._sum, like)

    def put(self, gradients: Iterable[Tensor], divisor: int) -> Tensor:
        """Show this rank's gradients, divided, to the others; what they see, all in one row."""
        half = self._exchanges % 2
        for gradient, place in zip(gradients, self._mine[half], strict=True):
            torch.div(gradient, divisor, out=place)
        self._exchanges += 1
        self._counts[_LINE // 8 * (1 + self._rank)] = self._exchanges
        return self._halves[half][self._rank]

    def take(self) -> list[Tensor]:
        """The sum of what all ranks have put, in the gradients' shapes, until the next is taken.

        Added in pairs of neighbours, and pairs of pairs: with the same bits everywhere. Raises RuntimeError if a rank
        has left.
        """
        for rank in range(self._world_size):
            self._wait_for(rank)
        parts = self._halves[(self._exchanges - 1) % 2]
        while len(parts) > 2:
            parts = [torch.add(*pair) if len(pair) == 2 else pair[0] for pair in _pairs(parts)]
        torch.add(*parts, out=self._sum)
        return self._sums

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


def open_shared_memory(group: Group, like: Sequence[Tensor]) -> SharedMemory | None:
    """Memory for gradients like these, of one rank, if all ranks of `group` can share it: called by all of them."""
    size = _LINE * (1 + group.world_size) + 2 * group.world_size * _share_of(like)
    if group.device.type != "cpu" or size > _MOST or len({tensor.dtype for tensor in like}) > 1:
        return None
    able = platform.machine() == "x86_64" and hasattr(os, "memfd_create")  # of this rank: another's machine may differ
    descriptor, token = -1, secrets.token_bytes(32)
    if group.is_rank0 and able:
        with suppress(OSError):
            descriptor = os.memfd_create(_NAME)
            os.ftruncate(descriptor, size)
            os.pwrite(descriptor, token, 0)
    path, token_hex = gather_json(group, [f"/proc/{os.getpid()}/fd/{descriptor}", token.hex()])[0]
    if not group.is_rank0 and able:
        descriptor = _open(path, token_hex)
    if not gather_rows(group, torch.tensor([descriptor >= 0])).all():
        if descriptor >= 0:
            os.close(descriptor)
        return None
    shared = SharedMemory(group, descriptor, like)
    gather_rows(group, torch.zeros(1))  # nobody looks for a rank that has not locked its byte yet
    return shared


def _share_of(like: Sequence[Tensor]) -> int:
    """Bytes of a rank's gradients, in whole lines."""
    return -(-sum(tensor.nbytes for tensor in like) // _LINE) * _LINE


def _pairs(parts: Sequence[Tensor]) -> list[Sequence[Tensor]]:
    """Neighbours in twos; of an odd number the last stays by itself."""
    return [parts[start : start + 2] for start in range(0, len(parts), 2)]


def views_like(flat: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """Parts of `flat`, one after the other, in the shapes of `like`."""
    parts = flat.split([tensor.numel() for tensor in like])
    return [part.view(tensor.shape) for part, tensor in zip(parts, like, strict=True)]


def _open(path: str, token_hex: str) -> int:
    """Rank 0's memory, or -1: on another machine or in another container the path names nothing, or something else."""
    with suppress(OSError):
        if str(Path(path).readlink()).startswith(f"/memfd:{_NAME}"):
            descriptor = os.open(path, os.O_RDWR)
            if os.pread(descriptor, 32, 0).hex() == token_hex:
                return descriptor
            os.close(descriptor)
    return -1
