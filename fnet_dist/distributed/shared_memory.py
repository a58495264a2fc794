"""All-reduce gradients between CPU ranks of one machine through shared memory.

gloo's all_reduce of 235,146 gradients takes ten times as long as to copy and add them, because its threads wait to be
scheduled while both cores are busy (tests/benchmarks/NOTES.md). Only on x86-64: every core sees another core's stores
in the order in which they were made (Intel SDM, volume 3, 8.2.2), and there is no other synchronisation.
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
_MAX_BYTES = 2**28  # every rank reads all others' gradients: beyond this gloo, which sends less, is faster
_CACHE_LINE = 64  # bytes; no two ranks write to the same line
_SPINS = 1_000  # polls before the first sleep, about 100 us: balanced ranks wait less for each other
_SLEEP_S = 20e-6
_POLLS_PER_LIVENESS_CHECK = 1_000  # about 0.1 s with the sleeps


class SharedMemory:
    """A memory block with two slots for each rank's gradients, used in alternate steps.

    Two are enough: a rank that writes its gradients of step k has added up all of step k - 1, so every rank had
    written those, and so had finished reading step k - 2, whose slots are now reused.
    Layout: one line in which rank 0 puts a token; for each rank a line with the number of its `put`s; then the slots.
    Each rank also locks a byte of the file. The kernel releases it however the process ends, which tells the others.
    """

    def __init__(self, group: Group, descriptor: int, like: Sequence[Tensor]) -> None:
        self._rank, self._world_size, self._descriptor = group.rank, group.world_size, descriptor
        memory = memoryview(mmap.mmap(descriptor, 0))
        header = _CACHE_LINE * (1 + group.world_size)
        self._puts = memory[_CACHE_LINE:header].cast("q")[:: _CACHE_LINE // 8]  # of each rank
        fcntl.lockf(descriptor, fcntl.LOCK_EX, 1, group.rank)
        self._my_puts = 0
        self.waits_for: int | None = None  # the rank whose `put` is awaited in `take`
        used = sum(tensor.nbytes for tensor in like)
        area = torch.frombuffer(memory, dtype=torch.uint8)[header:]
        slots: list[Tensor] = [slot[:used].view(like[0].dtype) for slot in area.split(_slot_bytes(like))]
        self._halves = slots[: group.world_size], slots[group.world_size :]
        self._mine = [views_like(half[group.rank], like) for half in self._halves]
        self._sum = torch.empty_like(slots[0])
        self._sums = views_like(self._sum, like)

    @property
    def begun(self) -> int:
        """Return the number of exchanges that this rank has begun."""
        return self._my_puts

    def put(self, gradients: Iterable[Tensor], divisor: int) -> Tensor:
        """Publish this rank's `gradients` / `divisor` to the other ranks, and return them as one flat tensor."""
        half = self._my_puts % 2
        for gradient, slot in zip(gradients, self._mine[half], strict=True):
            torch.div(gradient, divisor, out=slot)
        self._my_puts += 1
        self._puts[self._rank] = self._my_puts  # last: a rank that sees the new count sees the gradients too
        return self._halves[half][self._rank]

    def take(self) -> list[Tensor]:
        """Wait for all ranks' `put` and return the sum, in the gradients' shapes; valid until the next call.

        Neighbours are added in pairs, then pairs of pairs: the same bits on every rank. Raise RuntimeError if a rank
        has ended.
        """
        for rank in range(self._world_size):
            polls = 0
            while self._puts[rank] < self._my_puts:
                polls += 1
                if polls <= _SPINS:
                    continue
                self.waits_for = rank
                time.sleep(_SLEEP_S)
                if polls % _POLLS_PER_LIVENESS_CHECK == 0:
                    with suppress(OSError):  # the lock is held: that rank is alive
                        fcntl.lockf(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, rank)
                        raise RuntimeError(f"connection closed by peer: rank {rank} has left")
        self.waits_for = None
        parts = self._halves[(self._my_puts - 1) % 2]
        while len(parts) > 2:
            pairs = [parts[start : start + 2] for start in range(0, len(parts), 2)]  # of an odd number one stays alone
            parts = [torch.add(*pair) if len(pair) == 2 else pair[0] for pair in pairs]
        torch.add(*parts, out=self._sum)
        return self._sums


def open_shared_memory(group: Group, like: Sequence[Tensor]) -> SharedMemory | None:
    """Return memory for gradients shaped `like` these, or None on all ranks if any rank cannot share it. A collective.

    Rank 0 creates an anonymous file, the others open it through /proc. The token in it proves that they found the same
    file: on another machine or in another container, the path names nothing or something else.
    """
    size = _CACHE_LINE * (1 + group.world_size) + 2 * group.world_size * _slot_bytes(like)
    if group.device.type != "cpu" or size > _MAX_BYTES or len({tensor.dtype for tensor in like}) > 1:
        return None
    is_able = platform.machine() == "x86_64" and hasattr(os, "memfd_create")  # other ranks' machines may differ
    descriptor, token = -1, secrets.token_bytes(32)
    if group.is_rank0 and is_able:
        with suppress(OSError):
            descriptor = os.memfd_create(_NAME)
            os.ftruncate(descriptor, size)
            os.pwrite(descriptor, token, 0)
    path, token_hex = gather_json(group, [f"/proc/{os.getpid()}/fd/{descriptor}", token.hex()])[0]
    if not group.is_rank0 and is_able:
        descriptor = _open(path, token_hex)
    if not gather_rows(group, torch.tensor([descriptor >= 0])).all():  # all ranks share the memory, or none does
        if descriptor >= 0:
            os.close(descriptor)
        return None
    shared = SharedMemory(group, descriptor, like)
    gather_rows(group, torch.zeros(1))  # a barrier: a rank that has not locked its byte yet would count as ended
    return shared


def _open(path: str, token_hex: str) -> int:
    """Return a descriptor of rank 0's memory, or -1 if `path` does not name it here."""
    with suppress(OSError):
        if str(Path(path).readlink()).startswith(f"/memfd:{_NAME}"):
            descriptor = os.open(path, os.O_RDWR)
            if os.pread(descriptor, 32, 0).hex() == token_hex:
                return descriptor
            os.close(descriptor)
    return -1


def _slot_bytes(like: Sequence[Tensor]) -> int:
    """Return the bytes of one rank's gradients, rounded up to whole cache lines."""
    return -(-sum(tensor.nbytes for tensor in like) // _CACHE_LINE) * _CACHE_LINE


def views_like(flat: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """Return consecutive parts of `flat` (n,) as views in the shapes of `like`."""
    parts = flat.split([tensor.numel() for tensor in like])
    return [part.view(tensor.shape) for part, tensor in zip(parts, like, strict=True)]
