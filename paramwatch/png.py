"""A picture of numbered colours as PNG, in a few lines of our own: what a heat map needs, with no package for pictures installed.

Format: the PNG specification, third edition (W3C, 2025), colour type 3: one byte a pixel, which is a position in a palette.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Sequence
from typing import TypeAlias

import numpy as np

from paramwatch.columns import Array

Colour: TypeAlias = tuple[int, int, int, int]
"""Red, green, blue, opacity: 0 to 255."""

# points of viridis (S. van der Walt and N. Smith, 2015; public domain): even steps look even, also without colour vision and on paper
_POINTS = ("440154", "482878", "3e4989", "31688e", "26828e", "1f9e89", "35b779", "6ece58", "b5de2b", "fde725")


def png(pixels: Array, palette: Sequence[Colour]) -> bytes:
    """A PNG file.

    Args:
        pixels: uint8 [height, width], both at least 1: positions in the palette, the top line first.
        palette: At most 256 colours.
    """
    height, width = pixels.shape
    # every line begins with the number of its filter: 0, none
    lines = np.concatenate([np.zeros((height, 1), np.uint8), pixels.astype(np.uint8, copy=False)], axis=1)
    return b"".join(
        (
            b"\x89PNG\r\n\x1a\n",
            _chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 3, 0, 0, 0)),
            _chunk(b"PLTE", bytes(value for colour in palette for value in colour[:3])),
            _chunk(b"tRNS", bytes(colour[3] for colour in palette)),
            # level 9 costs far more time for hardly a smaller file
            _chunk(b"IDAT", zlib.compress(lines.tobytes(), 6)),
            _chunk(b"IEND", b""),
        )
    )


def gradient(n: int) -> list[Colour]:
    """So many colours from dark to bright, which rise evenly to the eye."""
    points = np.array([[int(point[i : i + 2], 16) for i in (0, 2, 4)] for point in _POINTS])
    at = np.linspace(0, len(points) - 1, n)
    channels = np.stack([np.interp(at, np.arange(len(points)), channel) for channel in points.T], axis=1)
    return [(round(red), round(green), round(blue), 255) for red, green, blue in channels.tolist()]


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
