"""Which tensors are called orthogonal: what `orthogonal_` filled, also one row and what was rounded; hardly anything else."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch
from torch import Tensor, nn
from torch.nn import init
from verdicts import frame_of, looks, named_in

SHAPES = [(300, 1), (1, 300), (128, 2), (2, 128), (128, 4), (4, 128), (60, 7), (16, 16)]


@pytest.mark.parametrize("shape", [(2, 2), (3, 40), (300, 20), (64, 64)], ids=str)
def test_orthogonal_is_told_whatever_the_size_and_its_gain_with_it(shape: tuple[int, int]) -> None:
    assert set(looks(lambda: nn.Linear(*shape), lambda w: init.orthogonal_(w, gain=2.0), 20)) == {"orthogonal, gain 2"}


def test_rows_that_are_orthogonal_and_not_equally_long_are_not_orthogonal() -> None:
    def scaled(w: Tensor) -> None:
        init.orthogonal_(w)
        w.data[0] *= 1.01

    assert not any("orthogonal" in text for text in looks(lambda: nn.Linear(64, 64), scaled, 20))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("gain", [1.0, math.sqrt(2), 5 / 3, 0.01])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_few_rows_and_rounded_ones_are_told(shape: tuple[int, int], gain: float, dtype: torch.dtype) -> None:
    frame = frame_of(lambda: nn.Linear(*shape, bias=False), lambda w: init.orthogonal_(w, gain), 50, dtype)
    expected = "orthogonal" if gain == 1 else f"orthogonal, gain {gain:.3g}"

    # a bound of five standard deviations of what rounding does
    assert all(named_in(text)[0] == expected for text in frame["looks_like"]), Counter(frame["looks_like"])
    assert frame["theoretical_std"].to_numpy() == pytest.approx(gain / math.sqrt(max(shape)), rel=1e-2)


@pytest.mark.parametrize("shape", [(300, 1), (1, 300), (40, 1)], ids=str)
def test_of_one_row_the_law_that_it_fits_is_said_too(shape: tuple[int, int]) -> None:
    frame = frame_of(lambda: nn.Linear(*shape, bias=False), init.orthogonal_, 50)

    large = math.prod(shape) >= 256
    assert set(frame["family"]) <= ({"orthogonal or normal", "orthogonal or normal or truncated"} if large else {"small"})
    assert all(text.startswith("orthogonal or " if large else "too small to tell: fits orthogonal, ") for text in frame["looks_like"])


@pytest.mark.parametrize(("dtype", "most"), [(torch.float32, 0), (torch.float16, 5), (torch.bfloat16, 40)])
@pytest.mark.parametrize("shape", [(300, 1), (128, 2), (128, 4)], ids=str)
def test_normal_rows_of_the_same_scale_are_called_orthogonal_as_rarely_as_rounding_allows(
    shape: tuple[int, int], dtype: torch.dtype, most: int
) -> None:
    # their expected length is that of orthogonal rows: the worst case
    frame = frame_of(lambda: nn.Linear(*shape, bias=False), lambda w: init.normal_(w, std=1 / math.sqrt(shape[0])), 1000, dtype)
    found = frame["family"][frame["family"].str.contains("orthogonal")]

    assert len(found) <= (most if shape[1] == 1 else 0)
    assert found.str.startswith("orthogonal or normal").all()


def test_a_row_of_a_known_length_that_is_not_normal_is_not_orthogonal() -> None:
    def scaled(w: Tensor) -> None:
        w.data /= w.data.norm()

    assert not any("orthogonal" in text for text in looks(lambda: nn.Linear(300, 1), scaled, 20))
