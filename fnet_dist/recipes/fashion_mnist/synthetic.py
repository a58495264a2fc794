"""Synthetic data in the shapes and sizes of Fashion-MNIST: ten kinds of garment, the same bytes on every machine.

Hundreds of garments of each kind are drawn from random measures, which overlap between the kinds (a shirt may have the
sleeves of a T-shirt). Each drawing gives ten images, in different fabrics, positions and brightness.
"""

from collections.abc import Callable
from functools import partial
from typing import Literal

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

# float32, and only + - * / sqrt on it: IEEE 754 rounds these alike on every machine, unlike exp or sin.
Floats = NDArray[np.floating]
Range = tuple[float, float]  # the smallest and largest value of a measure

_SIDE = 28
_LEFT = np.arange(_SIDE, dtype=np.float32)  # the left or upper edge of each pixel
_X = _Y = _LEFT + np.float32(0.5)  # the middle of each column and row
_IMAGES_PER_DRAWING = 10
_FABRICS = 200
_SPLITS = {"train": (60_000, 1), "test": (10_000, 2)}  # number of images, seed


def make_synthetic(split: Literal["train", "test"]) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Return images (n, 28, 28) uint8 and labels (n,) uint8 from 0 to 9, the same number of each.

    n is 60,000 for the training data and 10,000 for the test data. Runs in the past were trained on these bytes, and
    resuming or evaluating them requires the same sha256: change no drawing, and no order of random numbers.
    """
    count, seed = _SPLITS[split]
    random = _Random(count, seed, len(_KINDS))
    per_kind = count // len(_KINDS) // _IMAGES_PER_DRAWING
    canvases = [_Canvas(per_kind, seed, kind) for kind in range(len(_KINDS))]
    for canvas, draw in zip(canvases, _KINDS, strict=True):
        draw(canvas)
    drawings = [(np.minimum(canvas.pixels, 1) * 255).astype(np.uint8) for canvas in canvases]
    # With a margin of one pixel, a window at 0, 1 or 2 is the drawing moved by up to one pixel, without a copy.
    moved = sliding_window_view(np.pad(np.concatenate(drawings), ((0, 0), (1, 1), (1, 1))), (_SIDE, _SIDE), axis=(1, 2))
    fabrics = sliding_window_view(_weave(_Random(_FABRICS, seed, len(_KINDS) + 1)), (_SIDE, _SIDE), axis=(1, 2))
    drawing = random.permutation() % len(moved)
    images = np.empty((count, _SIDE, _SIDE), np.uint8)
    for start in range(0, count, 1000):  # in parts, which bounds the memory of the uint16 products
        part = drawing[start : start + 1000]
        random.count = len(part)
        image = moved[part, random.integers(3), random.integers(3)].astype(np.uint16)
        image *= fabrics[random.integers(_FABRICS), random.integers(_SIDE), random.integers(_SIDE)]
        image >>= 8
        image *= (128 + random.integers(128)).astype(np.uint16)[:, None, None]
        images[start : start + 1000] = image >> 8
    return images, (drawing // per_kind).astype(np.uint8)


class _Random:
    """`count` random numbers at a time, from PCG64's raw stream: numpy promises never to change it."""

    def __init__(self, count: int, *seed: int) -> None:
        self.count = count
        self._source = np.random.PCG64(seed)

    def integers(self, end: int) -> NDArray[np.int64]:
        """Return integers from 0 to `end` - 1, (count,)."""
        # Not Generator.integers: numpy may change its stream between versions.
        return (self._source.random_raw(self.count) >> np.uint64(32)).astype(np.int64) * end >> 32

    def permutation(self) -> NDArray[np.int64]:
        """Return the numbers below `count` in random order."""
        return np.argsort(self._source.random_raw(self.count), kind="stable")

    def between(self, low: float, high: float, each: int = 1) -> Floats:
        """Return `each` uniform numbers between `low` and `high` for each of `count`, (count, each)."""
        raw = self._source.random_raw(self.count * each).reshape(self.count, each) >> np.uint64(
            40
        )  # float32 has 24 bits
        return np.float32(low) + np.float32(high - low) * (raw.astype(np.float32) / np.float32(1 << 24))


def _weave(random: _Random) -> NDArray[np.uint8]:
    """Return fabrics (count, 56, 56): plain, striped along or across, or checked; all more or less rough."""
    size = 2 * _SIDE
    period = 2 + random.integers(6)[:, None]
    stripe = (np.arange(size) % period * 2 < period).astype(np.float32)
    contrast, style = random.between(0, 0.6), random.integers(6)[:, None]  # half of the styles are plain
    across = 1 - contrast * stripe * ((style == 3) | (style == 5))
    along = 1 - contrast * stripe * ((style == 4) | (style == 5))
    rough = random.between(0, 1, size * size).reshape(-1, size, size) * random.between(0.05, 0.4)[:, :, None]
    fabrics: NDArray[np.uint8] = (across[:, :, None] * along[:, None, :] * (1 - rough) * 255).astype(np.uint8)
    return fabrics


class _Canvas(_Random):
    """`count` drawings of one kind, `pixels` (count, 28, 28) from 0 to 1, and the random numbers for their measures."""

    def __init__(self, count: int, *seed: int) -> None:
        super().__init__(count, *seed)
        self.pixels: Floats = np.zeros((count, _SIDE, _SIDE), np.float32)

    def draw(self, *ranges: Range) -> list[Floats]:
        """Return one `between` (count, 1) for each range."""
        return [self.between(low, high) for low, high in ranges]

    def paint(self, shape: Floats, shade: Floats) -> None:
        """Lay `shape` (count, 28, 28), the covered part of each pixel, over the drawings in `shade` (count, 1)."""
        self.pixels += (shade[:, :, None] - self.pixels) * shape

    def darken(self, shape: Floats, part: Floats | float = 1.0) -> None:
        """Take away `part` (count, 1) of the brightness inside `shape`."""
        self.pixels *= 1 - shape * (part[:, :, None] if isinstance(part, np.ndarray) else part)


def _covered(low: Floats, high: Floats) -> Floats:
    """Return how much of each pixel of a line lies between `low` and `high`: one more axis of 28."""
    cover: Floats = np.clip(np.minimum(high[..., None], _LEFT + 1) - np.maximum(low[..., None], _LEFT), 0, 1)
    return cover


def _rows(left: Floats, right: Floats, top: Floats, bottom: Floats) -> Floats:
    """Return the shape from `top` to `bottom` (n, 1) that in each row is from `left` to `right`, (n, 28) or (n, 1)."""
    return _covered(left, right) * _covered(top[:, 0], bottom[:, 0])[:, :, None]


def _columns(top: Floats, bottom: Floats, left: Floats, right: Floats) -> Floats:
    """Return the shape from `left` to `right` (n, 1) that in each column is from `top` to `bottom`."""
    return _rows(top, bottom, left, right).swapaxes(1, 2)


def _sides(inner: Floats, outer: Floats, top: Floats, bottom: Floats) -> Floats:
    """Return the shape from `inner` to `outer` away from the vertical middle, on both sides."""
    return np.maximum(_rows(14 - outer, 14 - inner, top, bottom), _rows(14 + inner, 14 + outer, top, bottom))


def _top(
    canvas: _Canvas, sleeve: Range, slope: Range, hem: Range = (23, 26), cut: Range = (0.8, 3.5)
) -> tuple[Floats, Floats]:
    """Draw a garment with sleeves of length `sleeve` in rows, spread by `slope`; return its first and last row."""
    top, bottom, width, neck, depth = canvas.draw((2, 4), hem, (5.8, 7.6), (1.8, 3.4), cut)
    shoulder = neck + 2.2 * (_Y - top + 0.6)
    body = np.minimum(shoulder, width + canvas.between(-0.8, 0.8) * (_Y - top) / 10)
    arm = np.minimum(shoulder, width + canvas.between(*slope) * (_Y - top))
    cuff = np.minimum(top + canvas.between(*sleeve), bottom + 1)
    shade, thick, dim = canvas.draw((0.75, 1), (2.6, 4.2), (0.75, 1))
    canvas.paint(_sides(arm - thick, arm, top, cuff), shade * dim)
    canvas.paint(_rows(14 - body, 14 + body, top, bottom), shade)
    opening = neck * np.clip(1 - ((_Y - top) / depth) * ((_Y - top) / depth), 0, 1)
    canvas.darken(_rows(14 - opening, 14 + opening, top - 1, top + depth))
    return top, bottom


def _trouser(canvas: _Canvas) -> None:
    top, bottom, crotch, waist, flare, spread, gap, shade, dim = canvas.draw(
        (1, 3), (25, 27.5), (7, 12), (3.8, 6), (-0.3, 0.7), (0.06, 0.3), (0, 0.25), (0.75, 1), (0.6, 1)
    )
    outer = waist + flare * (_Y - top) / 10
    canvas.paint(_sides(np.clip((_Y - crotch) * spread, 0, 4) + gap, outer, top, bottom), shade)
    canvas.paint(_rows(14 - outer, 14 + outer, top, top + 1.5), shade * dim)


def _pullover(canvas: _Canvas) -> None:
    _, bottom = _top(canvas, sleeve=(15, 24), slope=(0.1, 0.34), cut=(0.6, 3))
    rib, dark = canvas.draw((0.5, 2), (0, 0.35))
    canvas.darken(_rows(bottom * 0, bottom * 0 + 28, bottom - rib, bottom), dark)


def _dress(canvas: _Canvas) -> None:
    top, bottom, waist, chest, narrow, flare, shade, sleeve, slope, dim, opening, depth = canvas.draw(
        (0.5, 3), (25, 28), (9, 13), (3, 5), (2.4, 4), (0.03, 0.4), (0.75, 1), (-22, 20), (0.05, 0.5), (0.7, 1),
        (1, 2.4), (1, 6),
    )  # fmt: skip
    body = chest + (narrow - chest) * np.clip((_Y - top) / (waist - top), 0, 1) + np.clip(_Y - waist, 0, 28) * flare
    arm = chest + slope * (_Y - top)
    canvas.paint(_sides(arm - 2.4, arm, top, top + np.maximum(sleeve, 0)), shade * dim)  # half have no sleeves
    canvas.paint(_rows(14 - body, 14 + body, top, bottom), shade)
    canvas.darken(_rows(14 - opening, 14 + opening, top - 1, top + depth))


def _coat(canvas: _Canvas) -> None:
    top, bottom = _top(canvas, sleeve=(18, 24), slope=(0.1, 0.3), hem=(24.5, 27.5), cut=(2, 9))
    off, width, dark = canvas.draw((-0.8, 0.8), (0.2, 0.7), (0.1, 0.9))
    canvas.darken(_rows(14 + off - width, 14 + off + width, top, bottom), dark)


def _sandal(canvas: _Canvas) -> None:
    left, right, ground, heel, instep, shade, light = canvas.draw(
        (1, 3), (24.5, 27), (19, 23), (-6, 9), (8, 14), (0.6, 1), (0.6, 1)
    )
    heel = np.maximum(heel, 0)  # two in five are flat
    sole = ground - np.clip((_X - instep) / 10, 0, 1) * heel
    canvas.paint(_columns(sole - canvas.between(1, 2), sole + 0.6, left, right), shade)
    canvas.paint(_columns(sole, ground + 0.6, right - canvas.between(1.5, 6), right), shade)
    high, front, foot_1, lean_1, end_1, foot_2, lean_2, end_2 = canvas.draw(
        (5, 9), (13, 18), (3, 6), (0, 1.2), (3, 6), (7, 9), (-0.6, 1), (3, 6)
    )
    ankle = ground - heel - high
    first, second = (foot_1, lean_1, ground - end_1), (foot_2, lean_2, ground - end_2 - heel / 4)
    for foot, lean, end in (first, second, (front - 4, 4 / (ground - ankle), ankle)):
        middle, width = foot + lean * (ground - _Y), canvas.between(0.5, 1.4)
        strap = np.minimum(_rows(middle - width, middle + width, end, ground), _columns(end, sole, left, right))
        canvas.paint(strap, light)
    canvas.paint(_columns(ankle, ankle + canvas.between(0.8, 1.8), front, right), light)
    canvas.paint(_rows(right - canvas.between(0.8, 2), right, ankle, ground - heel), light)


def _shirt(canvas: _Canvas) -> None:
    top, bottom = _top(canvas, sleeve=(6, 24), slope=(0.1, 0.5), cut=(1, 6))
    placket = _rows(top * 0 + 13.3, top * 0 + 14.7, top, bottom) * canvas.between(0, 0.35)[:, :, None]
    button = ((_LEFT - np.floor(top)) % (3 + canvas.integers(3)[:, None]) < 1).astype(np.float32)
    canvas.darken(placket + placket * button[:, :, None])
    width, height, opaque, shade = canvas.draw((2.5, 4.5), (1, 3.5), (0, 1), (0.5, 1))
    canvas.paint(_sides(np.clip(_Y - top, 0, 4), width, top, top + height) * opaque[:, :, None], shade)


def _shoe(canvas: _Canvas, shaft: Range, heel: Range) -> None:
    """Draw a closed shoe that points to the left; `shaft` and `heel` are the heights of its back and heel in rows."""
    left, right, ground, toe, back, instep, width, dip, lift, shade, heel_width, sole, sole_shade = canvas.draw(
        (0.5, 3), (24.5, 27.5), (20.5, 24), (3, 6), shaft, (7, 11), (4, 8), (0, 2.5), heel, (0.7, 1), (5, 9),
        (0.8, 2.2), (0.35, 1),
    )  # fmt: skip
    rise = np.clip((_X - instep) / width, 0, 1)
    round_toe = np.clip((_X - left) / 3, 0, 1)
    height = toe * np.minimum(1, 0.55 + 0.45 * round_toe) + (back - toe) * rise * rise
    mouth = dip * np.clip(1 - np.abs(_X - right + 5) / 4, 0, 1)
    lift = np.maximum(lift, 0)
    under = ground - lift * np.clip((_X - 6) / 10, 0, 1)
    canvas.paint(_columns(ground - height + mouth, under, left, right), shade)
    canvas.paint(_columns(ground - lift, ground, right - heel_width, right), shade * 0.7)
    canvas.paint(_columns(under - sole, under, left, right), sole_shade)


def _sneaker(canvas: _Canvas) -> None:
    _shoe(canvas, (6.5, 11.5), (-1, 0.5))
    for near, far in ((9, 12), (12, 16)):
        middle, lean, width, low, length, dark = canvas.draw(
            (near, far), (-0.6, 0.6), (0.3, 0.9), (20, 22), (3, 7), (-0.2, 0.6)
        )
        middle = middle + lean * (_Y - 18)  # a lace
        canvas.darken(_rows(middle - width, middle + width, low - length, low), dark)


def _bag(canvas: _Canvas) -> None:
    top, bottom, half, flare, reach, tall, thick, shade, dim, flap, seam = canvas.draw(
        (8, 14), (22.5, 26.5), (8, 12.5), (-2, 2), (3, 9), (0, 10), (0.7, 1.6), (0.7, 1), (0.6, 1), (2, 7), (0, 0.7)
    )
    half = half + flare * (_Y - top) / 14
    # The handle lies between two half ellipses. sqrt, as sin and cos differ between machines.
    parts = [(top - _Y) / np.maximum(height, 0.1) for height in (tall - thick, tall)]
    inner, outer = (np.sqrt(np.clip(1 - part * part, 0, 1)) for part in parts)
    canvas.paint(_sides((reach - thick) * inner, reach * outer, top - tall, top), shade * dim)
    canvas.paint(_rows(14 - half, 14 + half, top, bottom), shade)
    canvas.darken(_rows(14 - half, 14 + half, top + flap, top + flap + 0.8), seam)


_KINDS: tuple[Callable[[_Canvas], object], ...] = (  # in the order of CLASS_NAMES: the index is the label
    partial(_top, sleeve=(5, 9.5), slope=(0.35, 0.85)), _trouser, _pullover, _dress, _coat,
    _sandal, _shirt, _sneaker, _bag, partial(_shoe, shaft=(10, 20), heel=(-1.5, 4)),
)  # fmt: skip
