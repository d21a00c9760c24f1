"""The paths of a histogram against the bins that numpy finds, over everything a tensor can be."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_measure import DENSE, INF, NAN, OTHERS, UNSUPPORTED, by_name, noise, path
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from paramwatch.bins import BINS, ZERO, merged, positions
from paramwatch.measure import native
from paramwatch.measure.histograms import histograms, update_histograms
from paramwatch.measure.naive import as_reals, histogram

__all__ = ["path"]

WIDE = torch.from_numpy(np.ldexp(noise(60_000, dtype=torch.float64).numpy(), np.arange(60_000) % 2110 - 1090))
"""Every exponent of float64, subnormal numbers and zeros included."""

EDGES = torch.from_numpy(np.concatenate([sign * np.ldexp([1.0, 1 - 1e-7], np.arange(-150, 128)[:, None]).ravel() for sign in (1, -1)]))

CASES: dict[str, Tensor] = {
    **DENSE,
    **OTHERS,
    "every float64 exponent": WIDE,
    **{f"every exponent of {dtype}": WIDE.to(dtype) for dtype in (torch.float32, torch.bfloat16, torch.float16)},
    "powers of two": EDGES.float(),
    "every float16": torch.arange(65536).to(torch.uint16).view(torch.float16),
    "every bfloat16": torch.arange(65536).to(torch.uint16).view(torch.bfloat16),
    "several chunks": noise(200_001),
}


def truth(x: Tensor) -> np.ndarray:
    x = x.detach().to_dense() if x.is_sparse else x.detach()
    x = torch.view_as_real(x.resolve_conj()) if x.is_complex() else x
    return np.bincount(positions(x.to(torch.float64).contiguous().numpy().ravel()), minlength=BINS + 1)[:BINS]


def assert_counts(found: np.ndarray, expected: Sequence[np.ndarray] | np.ndarray) -> None:
    np.testing.assert_array_equal(found, expected)


@by_name(CASES)
def test_a_histogram_counts_every_finite_element_in_its_bin(x: Tensor) -> None:
    found = histograms([x]).numpy()

    assert_counts(found, [truth(x)])
    assert_counts(histogram(as_reals(x)).numpy(), truth(x))


@pytest.mark.parametrize("scale", [torch.tensor(65536.0), torch.tensor([3.0]), torch.tensor(0.1, dtype=torch.float64)])
def test_a_factor_that_the_elements_carry_is_taken_out(scale: Tensor) -> None:
    chosen = [x for x in CASES.values() if x.is_floating_point() and x.dtype.itemsize > 1]

    assert_counts(histograms(chosen, scale).numpy(), [truth(as_reals(x) / scale.double()) for x in chosen])


def test_many_tensors_are_counted_together_and_what_is_not_there_is_null() -> None:
    tensors = [*CASES.values(), None, *UNSUPPORTED.values()]
    found = histograms(tensors).numpy()

    assert_counts(found[: len(CASES)], [truth(x) for x in CASES.values()])
    assert np.isnan(found[len(CASES) :]).all()


def test_an_update_is_counted_by_its_exact_difference() -> None:
    close = torch.nextafter(EDGES.float(), torch.tensor(0.0))
    pairs = [(x * 1.01, x.detach()) for x in DENSE.values()]
    pairs += [(EDGES.float(), close), (torch.full((9,), 3e38), torch.full((9,), -3e38)), (noise(7).to_sparse(), noise(7).to_sparse())]
    pairs += [(noise(4, 6).t(), noise(4, 6).t().contiguous()), (torch.full((5,), INF), torch.full((5,), INF)), (WIDE, WIDE.flip(0))]
    after, before = zip(*pairs, strict=True)
    expected = [truth(as_reals(new) - as_reals(old)) for new, old in pairs]

    assert_counts(update_histograms(after, before).numpy(), expected)
    assert np.isnan(update_histograms([torch.zeros(3)], [torch.zeros(4)]).numpy()).all()


@settings(max_examples=30)
@given(
    numbers=st.lists(st.floats(width=16) | st.sampled_from([0.0, -0.0, 6e-8, NAN, INF]), max_size=60),
    cuts=st.lists(st.integers(0, 60), max_size=4),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]),
)
def test_any_split_of_a_tensor_merges_to_the_whole(numbers: list[float], cuts: list[int], dtype: torch.dtype) -> None:
    x = torch.tensor(numbers, dtype=torch.float64).to(dtype)
    found = histograms(x.tensor_split(sorted(cuts))).numpy()

    assert_counts(merged(found.astype(np.int64), np.arange(len(found)), np.array([0])), [truth(x)])
    assert_counts(histograms([x]).numpy(), [truth(x)])


def test_what_is_counted_and_what_is_not_finite_are_all_elements() -> None:
    x = CASES["NaN, +inf and -inf"]

    assert histograms([x]).numpy().sum() + (~torch.isfinite(x)).sum() == x.numel()
    assert histograms([torch.full((10,), -0.0)]).numpy()[0, ZERO] == 10


@pytest.mark.usefixtures("path")
def test_the_counts_are_the_same_for_any_number_of_threads() -> None:
    x, known = noise(700_001), torch.get_num_threads()
    try:
        for threads in (1, 4):
            torch.set_num_threads(threads)
            assert_counts(histograms([x, x[1:]]).numpy(), [truth(x), truth(x[1:])])
    finally:
        torch.set_num_threads(known)


class _Counted(TorchDispatchMode):
    """Counts operations."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.seen += 1
        return func(*args, **(kwargs or {}))


def test_the_compiled_kernel_takes_no_operation_of_torch() -> None:
    if not native.available():
        pytest.skip("of the compiled kernel alone")
    tensors = [noise(n) for n in range(1, 30)]
    with _Counted() as counted:
        histograms(tensors)
        update_histograms(tensors, tensors)

    assert counted.seen == 0
