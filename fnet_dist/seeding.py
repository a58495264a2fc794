"""Random streams whose seeds derive from counters, so that a checkpoint needs no generator's state."""

import hashlib
import random

import numpy as np
import torch
from torch import Tensor


def derive_seed(*parts: int | str) -> int:
    """Return a seed of 63 bits from `parts`, e.g. (seed, "order", epoch); other parts give an unrelated stream."""
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def step_seed(base: int, step: int, microbatch: int) -> int:
    """Return a seed of 64 bits: a cheap derive_seed for each microbatch of each step.

    It is the last round of SplitMix64 (Steele, Lea and Flood 2014). A hash takes 1 us by itself, but 15 us within a
    step, because the matrix products have emptied the caches.
    """
    mixed = (base + step * 0x9E3779B97F4A7C15 + microbatch * 0xD1B54A32D192ED03) % 2**64
    mixed = (mixed ^ mixed >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    mixed = (mixed ^ mixed >> 27) * 0x94D049BB133111EB % 2**64
    return mixed ^ mixed >> 31


def seed_device(device: torch.device, seed: int) -> None:
    """Seed the default random stream of `device`, from which dropout and initial weights draw."""
    if device.type == "cuda":
        torch.cuda.default_generators[device.index].manual_seed(seed)
    else:
        # torch.manual_seed would also seed every other kind of device: ten times the time, in every step.
        torch.default_generator.manual_seed(seed)


def seed_sample(key: int, index: int) -> None:
    """Seed the default generators of torch (CPU), random and numpy for the sample at `index`; `key` as in Dataset."""
    seed = step_seed(key, index, 0)
    torch.default_generator.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed & 0xFFFFFFFF)  # its seed has 32 bits; a list of more takes 10 us


def sample_random(key: int, indices: Tensor, count: int) -> Tensor:
    """Return `count` random numbers of each sample, (n, count) float32 in [0, 1), on the device of `indices` (n,).

    A function of `key` and each index alone, in integers: the same bits on any device, in any batch and order. It is
    SplitMix64 (Steele, Lea and Flood 2014) of a counter, twice.
    """
    samples = _mix(indices.to(torch.int64) * _signed(0x9E3779B97F4A7C15) + _signed(key)).unsqueeze(1)
    numbers = torch.arange(1, count + 1, device=indices.device) * _signed(0xD1B54A32D192ED03)
    bits = _mix(samples + numbers) >> 40 & 0xFFFFFF  # float32 has 24
    return bits.to(torch.float32) * 2.0**-24


def _mix(x: Tensor) -> Tensor:
    """Return the last round of SplitMix64 of each element; int64 products wrap around as unsigned ones do."""
    # torch shifts in copies of the sign: the mask removes them.
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        x = (x ^ (x >> shift & (1 << 64 - shift) - 1)) * _signed(factor)
    return x ^ (x >> 31 & (1 << 33) - 1)


def _signed(number: int) -> int:
    """Return the int64 with the lowest 64 bits of `number`."""
    return (number + 2**63) % 2**64 - 2**63
