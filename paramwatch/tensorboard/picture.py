"""A heat map as a picture, with names, steps and colours beside it, for TensorBoard's images.

Text is drawn by Pillow, which TensorBoard needs itself; everything else is numbers of colours, which make a small file.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from functools import cache, lru_cache

import numpy as np

# TensorBoard requires it
from PIL import Image, ImageDraw, ImageFont

from paramwatch.columns import Array
from paramwatch.heatmap import NOT_FINITE, NOT_MEASURED, PALETTE, ZERO, Scale, pool, stretches
from paramwatch.lettering import shortened, visible, width_of
from paramwatch.png import png

WIDTH, HEIGHT = 350, 212
"""Pixels. Those of TensorBoard's own places for a picture: it leaves out or doubles pixels of any other, and with them parts of letters."""

PLOT_HEIGHT = 172
"""Pixels of the rows together."""

_TOP, _GAP, _BAR, _TICK = 4, 8, 10, 5
_FONT_SIZE, _TEXT_HEIGHT, _MOST_LETTERS, _MOST_TICKS = 11, 12, 18, 5
_LEAST_STRETCH, _LEAST_CUT = 3, 8
"""Pixels that a stretch of rows takes at least to be told from its neighbours, and to be cut off from them by a line."""

_SPECIALS = {ZERO: "zero", NOT_FINITE: "non-finite", NOT_MEASURED: "not measured"}

# half as many colours look the same and compress better; behind them come greys, from black to white
_COLOURS = (*PALETTE[:3], *PALETTE[3::2])
_GREYS = tuple((grey, grey, grey, 255) for grey in np.linspace(0, 255, 64).round().astype(int).tolist())
_PAPER = len(_COLOURS) + len(_GREYS) - 1
_INK, _FAINT, _WHITE = 60, 150, 255


def picture(found: Array, names: Sequence[str], first: Sequence[int], last: int) -> tuple[bytes, int, int]:
    """A heat map as a PNG file, and its width and height in pixels.

    Args:
        found: Levels [lines, columns]; lines are rows, or neighbouring rows taken together.
        names: Of the rows, from the top.
        first: The first step in each column.
        last: The last step of all.
    """
    height = PLOT_HEIGHT
    labels, cuts, ticks = _labels(tuple(names), height)
    left = _width(("step", *(text for text, _ in labels))) + 10
    scale = Scale.of(found)
    # at least as much as most scales need, so that the pictures of a run agree
    width = WIDTH - left - _GAP - _BAR - _TICK - max(_width(("1e-9",)), _width(map(_power, scale.decades))) - 3
    plot = _plot(scale, found, height, width)
    if height >= _LEAST_CUT * (len(cuts) + 1):
        plot[cuts] = _PAPER
    specials = [pixel for pixel in _SPECIALS if (plot == pixel).any()]

    letters = Image.new("L", (WIDTH, HEIGHT), _WHITE)
    draw = ImageDraw.Draw(letters)
    for y in ticks:
        draw.line((left - 4, _TOP + y, left - 1, _TOP + y), fill=_FAINT)
    for text, middle in labels:
        draw.text((left - 6, _TOP + middle), text, fill=_INK, font=_font(), anchor="rm")
    _draw_steps(draw, first, last, left, _TOP + height, width)
    bar = left + width + _GAP
    _draw_decades(draw, scale.decades, bar + _BAR, height)
    meanings = HEIGHT - 14
    places = _draw_meanings(draw, specials, left, meanings)

    canvas = (len(_COLOURS) + np.asarray(letters) // 4).astype(np.uint8)
    canvas[_TOP : _TOP + height, left : left + width] = plot
    canvas[_TOP : _TOP + height, bar : bar + _BAR] = np.linspace(len(_COLOURS) - 1, NOT_MEASURED + 2, height).round()[:, None]
    for pixel, x in zip(specials, places, strict=True):
        canvas[meanings : meanings + 10, x : x + 10] = pixel
    return png(canvas, (*_COLOURS, *_GREYS)), WIDTH, HEIGHT


def _plot(scale: Scale, found: Array, height: int, width: int) -> Array:
    """Colours in exactly so many pixels. What is not finite is a little larger: a single pixel of it would not be seen."""
    found = pool(found, len(found), width)
    lines, columns = found.shape
    pixels = scale.pixels(found[np.arange(height) * lines // height][:, np.arange(width) * columns // width])
    spoilt = np.pad(pixels == NOT_FINITE, 1)
    near = [spoilt[i : i + height, j : j + width] for i in range(3) for j in range(3)]
    return np.where(np.logical_or.reduce(near), NOT_FINITE, np.where(pixels > NOT_FINITE, 3 + (pixels - 3) // 2, pixels))


@lru_cache(maxsize=4)
def _labels(names: tuple[str, ...], height: int) -> tuple[list[tuple[str, float]], list[int], list[int]]:
    """What is written beside the rows and where, where stretches of rows meet, and what of that is marked beside the rows.

    The same for every picture of a run.
    """
    n, names = len(names), tuple(map(_shown, names))
    blocks = stretches(names, max(1, height // _LEAST_STRETCH))
    cuts = [min(round(block.start * height / n), height - 1) for block in blocks[1:]]
    many = len(blocks) < min(height // _TEXT_HEIGHT, n)
    if many:
        # too many to be told apart, but not to say where some of them are
        blocks = stretches(names, height, least=min(height // _TEXT_HEIGHT, n))
    placed: list[tuple[str, float]] = []
    ticks = cuts.copy()
    for block in sorted(blocks, key=lambda block: block.start - block.end):
        y = min(max((block.start + block.end) / 2 * height / n, _TEXT_HEIGHT / 2), height - _TEXT_HEIGHT / 2)
        if all(abs(y - other) >= _TEXT_HEIGHT for _, other in placed):
            placed.append((_fitted(block.name), y))
            if many:
                ticks.append(min(round(block.start * height / n), height - 1))
    return placed, cuts, ticks


def _fitted(name: str) -> str:
    """A name in few letters: its last components say more than the first, which it shares with its neighbours."""
    rest = name
    while width_of(rest) >= _MOST_LETTERS and "." in rest:
        rest = rest.partition(".")[2]
    return name if width_of(name) <= _MOST_LETTERS else "…" + rest if width_of(rest) < _MOST_LETTERS else shortened(name, _MOST_LETTERS)


def _draw_steps(draw: ImageDraw.ImageDraw, first: Sequence[int], last: int, left: int, y: int, width: int) -> None:
    """Round step numbers below the columns in which they are."""
    span = max(1, last - first[0])
    unit = next(size for k in range(20) for size in (10**k, 2 * 10**k, 5 * 10**k) if span / size <= _MOST_TICKS)
    for step in range(-(-first[0] // unit) * unit, last + 1, unit):
        column = int(np.searchsorted(first, step, side="right")) - 1
        x = left + (column + 0.5) * width / len(first)
        draw.line((x, y, x, y + 3), fill=_FAINT)
        draw.text((x, y + 6), f"{step:,}", fill=_INK, font=_font(), anchor="mt")
    draw.text((left - 10, y + 6), "step", fill=_FAINT, font=_font(), anchor="rt")


def _draw_decades(draw: ImageDraw.ImageDraw, decades: Sequence[int], x: int, height: int) -> None:
    """Powers of ten beside the colours of the scale, of which the brightest is at the top."""
    every = -(-len(decades) * _TEXT_HEIGHT // height)
    for i in range(0, len(decades), every):
        y = _TOP + (height - 1) * (1 - i / (len(decades) - 1))
        draw.line((x, y, x + 2, y), fill=_FAINT)
        draw.text((x + _TICK, min(max(y, _TOP + 4), _TOP + height - 5)), _power(decades[i]), fill=_INK, font=_font(), anchor="lm")


def _draw_meanings(draw: ImageDraw.ImageDraw, specials: Sequence[int], x: int, y: int) -> list[int]:
    """What the colours outside the scale mean, of those that are seen; gives where these colours belong."""
    places = []
    for pixel in specials:
        places.append(x)
        draw.text((x + 14, y + 5), _SPECIALS[pixel], fill=_INK, font=_font(), anchor="lm")
        x += 26 + round(_font().getlength(_SPECIALS[pixel]))
    return places


def _power(decade: int) -> str:
    return f"1e{decade}"


def _width(texts: Iterable[str]) -> int:
    return math.ceil(max(map(_font().getlength, texts)))


def _shown(name: str) -> str:
    """A name in letters that the font has."""
    return "".join(letter if _has(letter) else letter.encode("unicode_escape").decode() for letter in visible(name))


@cache
def _has(letter: str) -> bool:
    return letter.isascii() or bytes(_font().getmask(letter)) != bytes(_font().getmask("\ue000"))


@cache
def _font() -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(_FONT_SIZE)
