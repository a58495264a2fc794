"""All weights as hashes: a receipt in the ledger, and the look whether all ranks still have the same."""

import hashlib
from collections import Counter

import torch
from torch import Tensor, nn

from fnet_dist.distributed.process_group import Group, gather_rows
from fnet_dist.errors import DesyncError


def compare_weights(group: Group, model: nn.Module, step: int) -> dict[str, str]:
    """SHA-256 of each parameter's bytes after `step`, in hex, the same on all ranks; or DesyncError on all of them.

    Not of buffers: BatchNorm's statistics, say, are each rank's own between DDP's broadcasts.
    """
    mine = {name: _sha256(parameter) for name, parameter in model.named_parameters()}
    digests = torch.frombuffer(bytearray.fromhex("".join(mine.values())), dtype=torch.int64)
    rows = gather_rows(group, digests.to(group.device)).cpu()
    found = [tuple(row) for row in rows.tolist()]
    [(common, votes), *others] = Counter(found).most_common()
    if others:
        odd = [rank for rank, row in enumerate(found) if row != common]
        other = rows[odd[0]] != torch.tensor(common)
        names = [name for name, differs in zip(mine, other.view(-1, 4).any(dim=1).tolist(), strict=True) if differs]
        they = f"rank{'s' * (len(odd) > 1)} {', '.join(map(str, odd))}"
        sure = votes > len(odd)
        raise DesyncError(
            f"after step {step:,} {they} ha{'ve' if len(odd) > 1 else 's'} other weights than "
            f"{'the others' if sure else 'rank 0, or it is rank 0 that is wrong'} in {names[0]}"
            f"{f' and {len(names) - 1} more' if len(names) > 1 else ''}; nothing was saved from it: look at that "
            "machine's memory and device; the same command goes on from the last checkpoint"
        )
    return mine


def _sha256(parameter: Tensor) -> str:
    content = parameter.detach().cpu().contiguous().flatten().view(torch.uint8)
    return hashlib.sha256(content.numpy().data).hexdigest()
