"""Random streams that derive from counters, so that resuming needs no generator's state."""

import hashlib

import torch


def derive_seed(*parts: int | str) -> int:
    """A seed of 63 bits from `parts`, e.g. (seed, "dropout", step, shard); other parts, an unrelated stream."""
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def seed_device(device: torch.device, seed: int) -> None:
    """Start the default random stream of `device` (dropout's, and initial weights') at `seed`."""
    if device.type == "cuda":
        torch.cuda.default_generators[device.index].manual_seed(seed)
    else:
        # torch.manual_seed would also visit every other kind of device: ten times the cost, in every step.
        torch.default_generator.manual_seed(seed)
