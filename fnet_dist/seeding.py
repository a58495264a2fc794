"""Random streams that derive from counters, so that resuming needs no generator's state."""

import hashlib

import torch


def derive_seed(*parts: int | str) -> int:
    """A seed of 63 bits from `parts`, e.g. (seed, "dropout", step, shard); other parts, an unrelated stream."""
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def step_seed(base: int, step: int, shard: int) -> int:
    """What derive_seed is for, once a step and shard: SplitMix64's last round (Steele, Lea and Flood 2014).

    A hash costs 1 us by itself but 15 us in a step, whose products have emptied the caches.
    """
    mixed = (base + step * 0x9E3779B97F4A7C15 + shard * 0xD1B54A32D192ED03) % 2**64
    mixed = (mixed ^ mixed >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    mixed = (mixed ^ mixed >> 27) * 0x94D049BB133111EB % 2**64
    return mixed ^ mixed >> 31


def seed_device(device: torch.device, seed: int) -> None:
    """Start the default random stream of `device` (dropout's, and initial weights') at `seed`."""
    if device.type == "cuda":
        torch.cuda.default_generators[device.index].manual_seed(seed)
    else:
        # torch.manual_seed would also visit every other kind of device: ten times the cost, in every step.
        torch.default_generator.manual_seed(seed)
