"""Hash all weights: to log them, and to check that all ranks still have the same."""

import hashlib
from collections import Counter

import torch
from torch import Tensor, nn

from fnet_dist.distributed.process_group import Group, gather_rows
from fnet_dist.errors import DesyncError


def compare_weights(group: Group, model: nn.Module, step: int) -> dict[str, str]:
    """Return the SHA-256 of each parameter's bytes after `step`, in hex; raise DesyncError on all ranks if they differ.

    Buffers are left out: between DDP's broadcasts, BatchNorm's statistics are each rank's own.
    """
    mine = {name: _sha256(parameter) for name, parameter in model.named_parameters()}
    digests = torch.frombuffer(bytearray.fromhex("".join(mine.values())), dtype=torch.int64)
    rows = gather_rows(group, digests.to(group.device)).cpu()
    by_rank = [tuple(row) for row in rows.tolist()]
    [(majority, votes), *others] = Counter(by_rank).most_common()
    if others:
        odd = [rank for rank, row in enumerate(by_rank) if row != majority]
        differs = (rows[odd[0]] != torch.tensor(majority)).view(-1, 4).any(dim=1)  # a SHA-256 is four int64
        names = [name for name, is_other in zip(mine, differs.tolist(), strict=True) if is_other]
        ranks = f"rank{'s' * (len(odd) > 1)} {', '.join(map(str, odd))}"
        rest = "the others" if votes > len(odd) else "rank 0, or it is rank 0 that is wrong"  # of two, either may be
        text = (
            f"after step {step:,} {ranks} ha{'ve' if len(odd) > 1 else 's'} other weights than {rest} in {names[0]}"
            f"{f' and {len(names) - 1} more' if len(names) > 1 else ''}; nothing was saved from it: check that "
            "machine's memory and device; the same command goes on from the last checkpoint"
        )
        raise DesyncError(text, odd[0] if len(odd) == 1 and votes > 1 else None)
    return mine


def _sha256(parameter: Tensor) -> str:
    content = parameter.detach().cpu().contiguous().flatten().view(torch.uint8)
    return hashlib.sha256(content.numpy().data).hexdigest()
