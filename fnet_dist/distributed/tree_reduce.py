"""Sums whose order of additions does not depend on the number of ranks: one binary tree over a batch's shards.

Floating-point addition is not associative, but a + b has the bits of b + a. So with 2^k shards, each rank adds up the
subtree of its own, and ranks at distance 1, 2, 4, ... exchange what they have (recursive doubling; Thakur, Rabenseifner
and Gropp 2005, "Optimization of collective communication operations in MPICH"): every sum on the way is a node of the
same tree, whoever computes it.
"""

import torch
import torch.distributed as dist
from torch import Tensor

from fnet_dist.distributed.process_group import Group


class TreeSum:
    """Adds up leaves, each a list of tensors, as they come: two sums of as many leaves become one."""

    def __init__(self) -> None:
        self._sums: list[tuple[int, list[Tensor]]] = []  # how many leaves, and their sum; each more than the next

    def add(self, leaf: list[Tensor]) -> None:
        """The next leaf; its tensors are taken over."""
        count = 1
        while self._sums and self._sums[-1][0] == count:
            _, left = self._sums.pop()
            torch._foreach_add_(left, leaf)
            leaf, count = left, 2 * count
        self._sums.append((count, leaf))

    def take(self) -> list[Tensor]:
        """The sum of all leaves, of which there were a power of two."""
        [(_, total)] = self._sums
        self._sums.clear()
        return total


def pairwise_all_reduce(group: Group, mine: Tensor) -> Tensor:
    """The sum of every rank's `mine`, of which there are a power of two: as of leaves in the ranks' order."""
    distance = 1
    while distance < group.world_size:
        partner, theirs = group.rank ^ distance, torch.empty_like(mine)
        both = [dist.P2POp(dist.isend, mine, partner), dist.P2POp(dist.irecv, theirs, partner)]
        for work in dist.batch_isend_irecv(both):
            work.wait()
        mine = mine + theirs
        distance *= 2
    return mine
