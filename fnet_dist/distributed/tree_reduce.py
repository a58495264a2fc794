"""Sums whose order of additions does not depend on the number of ranks: one binary tree over a batch's logical shards.

Floating-point addition is not associative, but a + b has the same bits as b + a. With 2^k shards on 2^j ranks, each
rank adds up the subtree of its own shards; then ranks at distance 1, 2, 4, ... exchange and add their sums (recursive
doubling; Thakur, Rabenseifner and Gropp 2005, "Optimization of collective communication operations in MPICH"). Every
sum on the way is a node of the same tree, on every rank that computes it.
"""

import torch
import torch.distributed as dist
from torch import Tensor

from fnet_dist.distributed.process_group import Group


class TreeSum:
    """A running sum of leaves, each a list of tensors: two sums over equally many leaves become one at once."""

    def __init__(self) -> None:
        # (number of leaves, their sum), each with more leaves than the next, like the bits of a binary counter.
        self._sums: list[tuple[int, list[Tensor]]] = []

    def add(self, leaf: list[Tensor]) -> None:
        """Add the next leaf. Its tensors are kept, and may be changed in place."""
        count = 1
        while self._sums and self._sums[-1][0] == count:
            _, total = self._sums.pop()
            for mine, other in zip(total, leaf, strict=True):
                mine.add_(other)
            leaf, count = total, 2 * count
        self._sums.append((count, leaf))

    def take(self) -> list[Tensor]:
        """Return the sum of all leaves, which must be a power of two, and start anew."""
        [(_, total)] = self._sums
        self._sums.clear()
        return total


def pairwise_all_reduce(group: Group, mine: Tensor) -> Tensor:
    """Return the sum of every rank's `mine`, on every rank, added as a tree. The world size must be a power of two."""
    distance = 1
    while distance < group.world_size:  # as many rounds as the tree has levels above one rank's subtree
        partner, theirs = group.rank ^ distance, torch.empty_like(mine)
        both = [dist.P2POp(dist.isend, mine, partner), dist.P2POp(dist.irecv, theirs, partner)]
        for work in dist.batch_isend_irecv(both):
            work.wait()
        mine = mine + theirs
        distance *= 2
    return mine
