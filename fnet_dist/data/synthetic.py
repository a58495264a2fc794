"""A made-up stand-in for Fashion-MNIST: same shapes and sizes, ten kinds of garment.

Some hundred garments of each kind are drawn from measures that overlap between the kinds, then each is cut ten times,
out of different cloths, moved and dimmed. Only integers and + - * / sqrt are used, which IEEE 754 rounds alike on every
machine: each rank makes the same bytes, whatever its processor and its number of threads.
"""

from typing import Literal

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from fnet_dist.data.garments import KINDS, SIDE, Dice

_PER_DRAWING = 10  # images cut after one drawing
_CLOTHS = 200
_SETS = {"train": (60_000, 1), "test": (10_000, 2)}  # images, seed


def make_synthetic(split: Literal["train", "test"]) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Images (n, 28, 28) uint8 and labels (n,) uint8 from 0 to 9, the same number of each; n is 60,000 or 10,000."""
    count, seed = _SETS[split]
    dice = Dice(seed, len(KINDS))
    per_kind = count // len(KINDS) // _PER_DRAWING
    drawings = np.concatenate([draw(Dice(seed, kind), per_kind) for kind, draw in enumerate(KINDS)])
    drawings = (drawings * 255).astype(np.uint8)
    # One pixel of margin, to move a drawing by up to one pixel without cutting a copy for each place.
    moved = sliding_window_view(np.pad(drawings, ((0, 0), (1, 1), (1, 1))), (SIDE, SIDE), axis=(1, 2))
    cloths = sliding_window_view(_weave(Dice(seed, len(KINDS) + 1)), (SIDE, SIDE), axis=(1, 2))
    drawing = dice.order(count) % len(drawings)
    images = np.empty((count, SIDE, SIDE), np.uint8)
    for start in range(0, count, 1000):
        part = drawing[start : start + 1000]
        n = len(part)
        image = moved[part, dice.integers(3, n), dice.integers(3, n)].astype(np.uint16)
        image *= cloths[dice.integers(_CLOTHS, n), dice.integers(SIDE, n), dice.integers(SIDE, n)]
        image >>= 8
        image *= (128 + dice.integers(128, n)).astype(np.uint16)[:, None, None]
        image >>= 8
        images[start : start + 1000] = image
    return images, (drawing // per_kind).astype(np.uint8)


def _weave(dice: Dice) -> NDArray[np.uint8]:
    """Cloths (_CLOTHS, 56, 56): plain, striped along or across, or checked; all more or less rough."""
    size, n = 2 * SIDE, _CLOTHS
    period = 2 + dice.integers(6, n)[:, None]
    stripe = (np.arange(size) % period * 2 < period).astype(np.float32)
    contrast = dice.between(0, 0.6, n)
    style = dice.integers(6, n)[:, None]  # half of the cloths stay plain
    across = 1 - contrast * stripe * ((style == 3) | (style == 5))
    along = 1 - contrast * stripe * ((style == 4) | (style == 5))
    rough = dice.between(0, 1, n * size * size).reshape(n, size, size) * dice.between(0.05, 0.4, n)[:, :, None]
    cloths: NDArray[np.uint8] = ((across[:, :, None] * along[:, None, :] * (1 - rough)) * 255).astype(np.uint8)
    return cloths
