"""Pictures are PNG files that others read, pixel for pixel."""

from __future__ import annotations

import io

import numpy as np
import pytest

from paramwatch.png import gradient, png

Image = pytest.importorskip("PIL.Image", reason="Pillow reads what we wrote")


@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (200, 31)], ids=str)
def test_another_reader_sees_the_colours_and_opacities_that_were_meant(shape: tuple[int, int]) -> None:
    palette = [*gradient(254), (255, 0, 0, 255), (0, 0, 0, 0)]
    pixels = np.random.default_rng(0).integers(0, 256, shape)

    seen = np.asarray(Image.open(io.BytesIO(png(pixels, palette))).convert("RGBA"))

    np.testing.assert_array_equal(seen, np.array(palette)[pixels])


def test_a_gradient_gets_brighter_all_the_way() -> None:
    brightness = np.array(gradient(252)) @ [0.2126, 0.7152, 0.0722, 0]
    assert (np.diff(brightness) > -0.5).all()
    assert brightness[-1] - brightness[0] > 150
