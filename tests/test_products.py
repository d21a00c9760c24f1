"""Inner products in the kernel against those in PyTorch: the same numbers, and the same bits for any number of threads."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from paramwatch.measure import native
from paramwatch.measure.products import can_multiply, products
from paramwatch.uses.gram import gram, plain_gram

pytestmark = pytest.mark.skipif(not native.available(), reason="no C++ compiler was found")


def vectors(k: int, n: int, dtype: torch.dtype) -> tuple[list[Tensor], Tensor]:
    noise = torch.Generator().manual_seed(k)
    grads = [(torch.randn(n, generator=noise) * 10.0 ** (i % 3)).to(dtype) for i in range(k)]
    return grads, (sum(grads) + torch.randn(n, generator=noise)).to(dtype)


@pytest.mark.parametrize("dtype", native.TYPES, ids=str)
@pytest.mark.parametrize(("k", "n"), [(1, 1), (2, 200_003), (7, 70_001), (30, 1_000), (65, 700)])
def test_products_are_those_of_pytorch(k: int, n: int, dtype: torch.dtype) -> None:
    grads, total = vectors(k, n, dtype)
    assert can_multiply((*grads, total))
    found, true = gram(grads, total), plain_gram(grads, total)
    sizes = true.diagonal().sqrt()

    assert torch.equal(found.isnan(), true.isnan())
    assert ((found - true).abs() <= 1e-13 * sizes[:, None] * sizes).logical_or(true.isnan()).all()


def test_types_may_differ() -> None:
    grads, total = vectors(4, 3_000, torch.float64)
    mixed = [grad.to(dtype) for grad, dtype in zip(grads, native.TYPES, strict=True)]

    np.testing.assert_allclose(gram(mixed, total), plain_gram(mixed, total), rtol=1e-12)


def test_products_have_the_same_bits_for_any_number_of_threads() -> None:
    grads, total = vectors(3, 400_007, torch.float32)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            found.append(products(grads, total, pairs=True).tobytes())
    finally:
        torch.set_num_threads(before)

    assert len(set(found)) == 1


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_no_number_stays_with_its_vector(bad: float) -> None:
    grads, total = vectors(3, 5_000, torch.float32)
    grads[1][4_999] = bad
    found = gram(grads, total)

    assert torch.equal(found.isfinite(), plain_gram(grads, total).isfinite())
    assert found[0, 2].isfinite()
    assert not found[1, 1].isfinite()


def test_squares_of_vanishing_gradients_do_not_vanish() -> None:
    grads = [torch.full((1_000,), 1e-30), torch.full((1_000,), -1e-30)]

    assert gram(grads, torch.zeros(1_000))[0, 1] == pytest.approx(-1e-57, rel=1e-6)


def test_empty_vectors_have_products_of_zero() -> None:
    assert not gram([torch.empty(0)] * 2, torch.empty(0)).any()
    with pytest.raises(ValueError, match="elements"):
        products([torch.empty(2)], torch.empty(3), pairs=True)
