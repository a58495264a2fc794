"""Ten kinds of garment, drawn with straight lines and half ellipses on 28 x 28 pixels.

Every function draws n garments from random measures, as (n, 28, 28) floats from 0 to 1. The measures overlap between
kinds (a shirt may have the sleeves of a T-shirt, a boot the shaft of a sneaker), so that nothing tells them all apart.
"""

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.floating]  # float32, which numpy keeps beside plain numbers

SIDE = 28

_EDGE = np.arange(SIDE, dtype=np.float32)  # where pixels begin
_MIDDLE = _EDGE + np.float32(0.5)


class Dice:
    """Random numbers from the raw stream of PCG64, the part of numpy's that is promised never to change."""

    def __init__(self, *seed: int) -> None:
        self._source = np.random.PCG64(seed)

    def integers(self, end: int, count: int) -> NDArray[np.int64]:
        """From 0 to `end` - 1, (count,)."""
        return (self._source.random_raw(count) >> np.uint64(32)).astype(np.int64) * end >> 32

    def order(self, count: int) -> NDArray[np.int64]:
        """A permutation of `count`."""
        return np.argsort(self._source.random_raw(count), kind="stable")

    def between(self, low: float, high: float, count: int) -> Floats:
        """Evenly between `low` and `high`, (count, 1)."""
        fraction: Floats = (self._source.random_raw(count) >> np.uint64(40)).astype(np.float32) / np.float32(1 << 24)
        return (np.float32(low) + np.float32(high - low) * fraction)[:, None]


def _covered(low: Floats, high: Floats) -> Floats:
    """How much of each pixel of a line lies between `low` and `high`: one more axis of 28."""
    cover: Floats = np.clip(np.minimum(high[..., None], _EDGE + 1) - np.maximum(low[..., None], _EDGE), 0, 1)
    return cover


def _rows(left: Floats, right: Floats, top: Floats, bottom: Floats) -> Floats:
    """A shape (n, 28, 28) from `top` to `bottom` (n, 1), in each row from `left` to `right`, (n, 28) or (n, 1)."""
    return _covered(left, right) * _covered(top[:, 0], bottom[:, 0])[:, :, None]


def _columns(top: Floats, bottom: Floats, left: Floats, right: Floats) -> Floats:
    """The same from `left` to `right`, in each column from `top` to `bottom`."""
    return _rows(top, bottom, left, right).swapaxes(1, 2)


def _nothing(n: int) -> Floats:
    return np.zeros((n, SIDE, SIDE), np.float32)


def _paint(canvas: Floats, shape: Floats, shade: Floats) -> Floats:
    """`canvas` with `shape` laid over it in `shade` (n, 1)."""
    return canvas + (shade[:, :, None] - canvas) * shape


def _both_sides(inner: Floats, outer: Floats, top: Floats, bottom: Floats) -> Floats:
    """`_rows` at both sides of the middle."""
    return np.maximum(_rows(14 - outer, 14 - inner, top, bottom), _rows(14 + inner, 14 + outer, top, bottom))


def _upper(
    dice: Dice,
    n: int,
    *,
    shoulder: tuple[float, float] = (5.8, 7.6),
    hem: tuple[float, float] = (23, 26),
    flare: tuple[float, float] = (-0.8, 0.8),
    sleeve: tuple[float, float],
    slope: tuple[float, float],
    cut: tuple[float, float] = (0.8, 3.5),
) -> tuple[Floats, Floats, Floats]:
    """A garment with sleeves, and where it begins and ends. `sleeve` is a length in rows, `slope` its spread."""
    y = _MIDDLE
    top, bottom, width = dice.between(2, 4, n), dice.between(*hem, n), dice.between(*shoulder, n)
    neck, depth = dice.between(1.8, 3.4, n), dice.between(*cut, n)
    line = neck + 2.2 * (y - top + 0.6)  # the shoulder falls to both sides
    body = np.minimum(line, width + dice.between(*flare, n) * (y - top) / 10)
    arm = np.minimum(line, width + dice.between(*slope, n) * (y - top))
    cuff = np.minimum(top + dice.between(*sleeve, n), bottom + 1)
    shade = dice.between(0.75, 1, n)
    canvas = _paint(
        _nothing(n),
        _both_sides(arm - dice.between(2.6, 4.2, n), arm, top, cuff),
        shade * dice.between(0.75, 1, n),
    )
    canvas = _paint(canvas, _rows(14 - body, 14 + body, top, bottom), shade)
    opening = neck * np.clip(1 - ((y - top) / depth) * ((y - top) / depth), 0, 1)
    return canvas * (1 - _rows(14 - opening, 14 + opening, top - 1, top + depth)), top, bottom


def _t_shirt(dice: Dice, n: int) -> Floats:
    return _upper(dice, n, sleeve=(5, 9.5), slope=(0.35, 0.85))[0]


def _trouser(dice: Dice, n: int) -> Floats:
    y = _MIDDLE
    top, bottom, crotch = dice.between(1, 3, n), dice.between(25, 27.5, n), dice.between(7, 12, n)
    outer = dice.between(3.8, 6, n) + dice.between(-0.3, 0.7, n) * (y - top) / 10
    inner = np.clip((y - crotch) * dice.between(0.06, 0.3, n), 0, 4) + dice.between(0, 0.25, n)
    shade = dice.between(0.75, 1, n)
    canvas = _paint(_nothing(n), _both_sides(inner, outer, top, bottom), shade)
    return _paint(canvas, _rows(14 - outer, 14 + outer, top, top + 1.5), shade * dice.between(0.6, 1, n))


def _pullover(dice: Dice, n: int) -> Floats:
    canvas, _, bottom = _upper(dice, n, sleeve=(15, 24), slope=(0.1, 0.34), cut=(0.6, 3))
    rib = _rows(bottom * 0, bottom * 0 + 28, bottom - dice.between(0.5, 2, n), bottom)
    return canvas * (1 - rib * dice.between(0, 0.35, n)[:, :, None])


def _dress(dice: Dice, n: int) -> Floats:
    y = _MIDDLE
    top, bottom, waist = dice.between(0.5, 3, n), dice.between(25, 28, n), dice.between(9, 13, n)
    chest, narrow = dice.between(3, 5, n), dice.between(2.4, 4, n)
    above = chest + (narrow - chest) * np.clip((y - top) / (waist - top), 0, 1)
    body = above + np.clip(y - waist, 0, 28) * dice.between(0.03, 0.4, n)
    shade = dice.between(0.75, 1, n)
    cuff = top + np.maximum(dice.between(-22, 20, n), 0)  # half of them without sleeves
    arm = chest + dice.between(0.05, 0.5, n) * (y - top)
    canvas = _nothing(n)
    canvas = _paint(canvas, _both_sides(arm - 2.4, arm, top, cuff), shade * dice.between(0.7, 1, n))
    canvas = _paint(canvas, _rows(14 - body, 14 + body, top, bottom), shade)
    opening, depth = dice.between(1, 2.4, n), dice.between(1, 6, n)
    return canvas * (1 - _rows(14 - opening, 14 + opening, top - 1, top + depth))


def _coat(dice: Dice, n: int) -> Floats:
    canvas, top, bottom = _upper(dice, n, sleeve=(18, 24), slope=(0.1, 0.3), hem=(24.5, 27.5), cut=(2, 9))
    middle, width = 14 + dice.between(-0.8, 0.8, n), dice.between(0.2, 0.7, n)
    front = _rows(middle - width, middle + width, top, bottom)
    return canvas * (1 - front * dice.between(0.1, 0.9, n)[:, :, None])


def _sandal(dice: Dice, n: int) -> Floats:
    x, y = _MIDDLE, _MIDDLE
    left, right, ground = dice.between(1, 3, n), dice.between(24.5, 27, n), dice.between(19, 23, n)
    heel = np.maximum(dice.between(-6, 9, n), 0)  # two in five are flat
    rise = np.clip((x - dice.between(8, 14, n)) / 10, 0, 1) * heel
    sole = ground - rise
    shade, light = dice.between(0.6, 1, n), dice.between(0.6, 1, n)
    canvas = _nothing(n)
    canvas = _paint(canvas, _columns(sole - dice.between(1, 2, n), sole + 0.6, left, right), shade)
    canvas = _paint(canvas, _columns(sole, ground + 0.6, right - dice.between(1.5, 6, n), right), shade)
    ankle, front = ground - heel - dice.between(5, 9, n), dice.between(13, 18, n)
    straps = [
        # Where it stands, how far it leans to the right from row to row, where it ends.
        (dice.between(3, 6, n), dice.between(0, 1.2, n), ground - dice.between(3, 6, n)),
        (dice.between(7, 9, n), dice.between(-0.6, 1, n), ground - dice.between(3, 6, n) - heel / 4),
        (front - 4, 4 / (ground - ankle), ankle),
    ]
    for foot, lean, end in straps:
        middle, width = foot + lean * (ground - y), dice.between(0.5, 1.4, n)
        strap = np.minimum(_rows(middle - width, middle + width, end, ground), _columns(end, sole, left, right))
        canvas = _paint(canvas, strap, light)
    canvas = _paint(canvas, _columns(ankle, ankle + dice.between(0.8, 1.8, n), front, right), light)
    return _paint(canvas, _rows(right - dice.between(0.8, 2, n), right, ankle, ground - heel), light)


def _shirt(dice: Dice, n: int) -> Floats:
    canvas, top, bottom = _upper(dice, n, sleeve=(6, 24), slope=(0.1, 0.5), cut=(1, 6))
    placket = _rows(top * 0 + 13.3, top * 0 + 14.7, top, bottom) * dice.between(0, 0.35, n)[:, :, None]
    button = ((_EDGE - np.floor(top)) % (3 + dice.integers(3, n)[:, None]) < 1).astype(np.float32)
    canvas = canvas * (1 - placket - placket * button[:, :, None])
    collar = _both_sides(np.clip(_MIDDLE - top, 0, 4), dice.between(2.5, 4.5, n), top, top + dice.between(1, 3.5, n))
    return _paint(canvas, collar * dice.between(0, 1, n)[:, :, None], dice.between(0.5, 1, n))


def _shoe(dice: Dice, n: int, shaft: tuple[float, float], heel: tuple[float, float]) -> Floats:
    """A closed shoe that looks to the left; `shaft` and `heel` are the heights of its back and of its heel in rows."""
    x = _MIDDLE
    left, right, ground = dice.between(0.5, 3, n), dice.between(24.5, 27.5, n), dice.between(20.5, 24, n)
    toe, back = dice.between(3, 6, n), dice.between(*shaft, n)
    start, width = dice.between(7, 11, n), dice.between(4, 8, n)  # where the instep rises, and over how many columns
    rise = np.clip((x - start) / width, 0, 1)
    round_toe = np.clip((x - left) / 3, 0, 1)
    height = toe * np.minimum(1, 0.55 + 0.45 * round_toe) + (back - toe) * rise * rise
    mouth = dice.between(0, 2.5, n) * np.clip(1 - np.abs(x - right + 5) / 4, 0, 1)
    lift = np.maximum(dice.between(*heel, n), 0)
    under = ground - lift * np.clip((x - 6) / 10, 0, 1)
    shade = dice.between(0.7, 1, n)
    canvas = _nothing(n)
    canvas = _paint(canvas, _columns(ground - height + mouth, under, left, right), shade)
    canvas = _paint(canvas, _columns(ground - lift, ground, right - dice.between(5, 9, n), right), shade * 0.7)
    sole = _columns(under - dice.between(0.8, 2.2, n), under, left, right)
    return _paint(canvas, sole, dice.between(0.35, 1, n))


def _sneaker(dice: Dice, n: int) -> Floats:
    canvas = _shoe(dice, n, (6.5, 11.5), (-1, 0.5))
    y = _MIDDLE
    for near, far in ((9, 12), (12, 16)):
        middle = dice.between(near, far, n) + dice.between(-0.6, 0.6, n) * (y - 18)
        width, low = dice.between(0.3, 0.9, n), dice.between(20, 22, n)
        stripe = _rows(middle - width, middle + width, low - dice.between(3, 7, n), low)
        canvas = canvas * (1 - stripe * dice.between(-0.2, 0.6, n)[:, :, None])
    return np.minimum(canvas, 1)


def _bag(dice: Dice, n: int) -> Floats:
    y = _MIDDLE
    top, bottom = dice.between(8, 14, n), dice.between(22.5, 26.5, n)
    half = dice.between(8, 12.5, n) + dice.between(-2, 2, n) * (y - top) / 14
    reach, tall, thick = dice.between(3, 9, n), dice.between(0, 10, n), dice.between(0.7, 1.6, n)
    outer = _arc(y, top, reach, tall)
    inner = _arc(y, top, reach - thick, tall - thick)
    shade = dice.between(0.7, 1, n)
    canvas = _nothing(n)
    canvas = _paint(canvas, _both_sides(inner, outer, top - tall, top), shade * dice.between(0.6, 1, n))
    canvas = _paint(canvas, _rows(14 - half, 14 + half, top, bottom), shade)
    flap = top + dice.between(2, 7, n)
    seam = _rows(14 - half, 14 + half, flap, flap + 0.8) * dice.between(0, 0.7, n)[:, :, None]
    return canvas * (1 - seam)


def _arc(y: Floats, foot: Floats, reach: Floats, tall: Floats) -> Floats:
    """Half the width of a half ellipse that stands on `foot`, 0 above it."""
    part = (foot - y) / np.maximum(tall, 0.1)
    return reach * np.sqrt(np.clip(1 - part * part, 0, 1))


def _ankle_boot(dice: Dice, n: int) -> Floats:
    return _shoe(dice, n, (10, 20), (-1.5, 4))


KINDS = (_t_shirt, _trouser, _pullover, _dress, _coat, _sandal, _shirt, _sneaker, _bag, _ankle_boot)
