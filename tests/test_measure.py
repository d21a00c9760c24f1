"""The paths of a measurement against the specification, and the specification against numpy, over everything a tensor can be."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from paramwatch.columns import PARTS
from paramwatch.measure import (
    SAMPLE,
    Kept,
    is_supported,
    measure,
    measure_end,
    measure_sampled_update,
    measure_update,
    native,
    read_scalars,
    sample,
)
from paramwatch.measure.chunked import CHUNK, chunked_parts
from paramwatch.measure.naive import ORDER, as_reals, parts
from paramwatch.measure.packed import SMALL, fits, parts_of
from paramwatch.merging import merge

WHOLE = [i for i, part in enumerate(ORDER) if PARTS[part].integer]
EXTREMES = [ORDER.index("min"), ORDER.index("max")]
NAN, INF = float("nan"), float("inf")


@pytest.fixture(autouse=True, params=["compiled", "plain torch"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Everything here holds with the compiled kernel and without."""
    if request.param == "plain torch":
        monkeypatch.setattr(native, "available", lambda: False)
    return str(request.param)


def noise(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=dtype)


def holding(x: Tensor, **at: float) -> Tensor:
    """A copy with some elements replaced: `_7=nan` is the eighth."""
    x = x.clone()
    for position, value in at.items():
        x.view(-1)[int(position[1:])] = value
    return x


DENSE: dict[str, Tensor] = {
    "0-dim": torch.tensor(2.5),
    "1 element": noise(1),
    "63": noise(63),
    "1024": noise(1024),
    "50001": noise(50001),
    "transposed": noise(64, 70).t(),
    "strided": noise(100, 100)[::2, ::3],
    "channels_last": noise(4, 3, 5, 5).to(memory_format=torch.channels_last),
    "expanded": noise(5, 1).expand(5, 7),
    "misaligned": noise(5001)[1:],
    "misaligned bfloat16": noise(5003).bfloat16()[3:],
    "bfloat16": noise(10007).bfloat16(),
    "float16": noise(10007).half(),
    "float64": noise(1000, dtype=torch.float64),
    "NaN": holding(noise(500), _3=NAN, _499=NAN),
    "+inf": holding(noise(500), _0=INF),
    "-inf": holding(noise(500), _7=-INF),
    "NaN, +inf and -inf": holding(noise(5000), _3=NAN, _4097=INF, _4999=-INF, _10=0.0),
    "float16 with inf": holding(noise(9000).half(), _5=INF),
    "all NaN": torch.full((100,), NAN),
    "all +inf": torch.full((3,), INF),
    "all zero": torch.zeros(3000),
    "-0.0": torch.full((10,), -0.0),
    "subnormal": noise(500) * 1e-40,
    "1e30": noise(3000) * 1e30,
    "1e-25": noise(3000) * 1e-25,
    "1 + 1e-4 noise": 1 + 1e-4 * noise(30000),
    "outlier first": holding(noise(20000) * 1e-3, _0=100.0),
    "constant": torch.full((7777,), 0.1),
}
"""What `packed` takes."""

OTHERS: dict[str, Tensor] = {
    "empty": torch.empty(0),
    "empty 0 x 3": torch.empty(0, 3),
    "above the limit of packed": noise(SMALL + 1),
    "complex64": torch.complex(noise(100), noise(200)[100:]),
    "complex128 conjugate view": torch.complex(noise(100).double(), noise(200)[100:].double()).conj(),
    "complex with NaN": torch.tensor([complex(NAN, 1.0), complex(2.0, INF)]),
    "sparse, not coalesced": torch.sparse_coo_tensor([[0, 2, 0]], [1.0, 2.0, 3.0], (5,), check_invariants=True),
    "bool": noise(77) > 0,
    "int8": torch.arange(-128, 128, dtype=torch.int8),
    "uint8": torch.arange(256, dtype=torch.uint8),
    "int64": torch.arange(-5, 1000),
    "uint16": torch.arange(300).to(torch.uint16),
    "float8_e4m3fn": noise(300).to(torch.float8_e4m3fn),
    "float8_e5m2": (noise(300) * 1e5).to(torch.float8_e5m2),
    "parameter": torch.nn.Parameter(noise(9)),
}

BIG = noise(3 * SMALL)

UNSUPPORTED: dict[str, Tensor] = {"meta": torch.empty(3, device="meta")}


if hasattr(torch, "float4_e2m1fn_x2"):
    UNSUPPORTED["float4"] = torch.zeros(4, dtype=torch.uint8).view(torch.float4_e2m1fn_x2)


def by_name(cases: dict[str, Tensor]) -> Any:
    return pytest.mark.parametrize("x", [pytest.param(x, id=name) for name, x in cases.items()])


def truth(x: Tensor) -> np.ndarray:
    """Every part, in numpy."""
    x = x.detach().to_dense() if x.is_sparse else x.detach()
    x = torch.view_as_real(x.resolve_conj()) if x.is_complex() else x
    a = x.to(torch.float64).contiguous().numpy().ravel()
    finite = a[np.isfinite(a)]
    found: dict[str, float] = {"count": a.size, "nan": np.isnan(a).sum(), "posinf": (a == INF).sum(), "neginf": (a == -INF).sum()}
    found |= {"zero": (a == 0).sum()} | dict.fromkeys(("mean", "std", "rms", "min", "max", "dot"), NAN)
    if finite.size:
        found |= {"mean": finite.mean(), "std": finite.std(), "rms": np.sqrt(np.mean(finite**2)), "min": finite.min(), "max": finite.max()}
    return np.array([found[part] for part in ORDER], float)


def assert_same_parts(found: np.ndarray, expected: np.ndarray, scale: float, rtol: float = 1e-10) -> None:
    """Counts and extremes exactly; the rest to rounding, on the scale of the elements themselves."""
    exact = WHOLE + EXTREMES
    np.testing.assert_array_equal(found[..., exact], expected[..., exact])
    np.testing.assert_allclose(found, expected, rtol=rtol, atol=rtol * scale)


def scale_of(x: Tensor) -> float:
    """The mean magnitude of the finite elements."""
    reals = as_reals(x)
    return float(reals[torch.isfinite(reals)].abs().mean()) if torch.isfinite(reals).any() else 0.0


# ---- one path against another ---------------------------------------------------------------


@by_name(DENSE | OTHERS)
def test_the_specification_is_what_numpy_says(x: Tensor) -> None:
    assert_same_parts(parts(as_reals(x)).numpy(), truth(x), scale_of(x))


@by_name(DENSE)
def test_packed_is_what_the_specification_says(x: Tensor) -> None:
    neighbours = [noise(3), x, torch.full((2,), NAN), noise(1)]

    assert all(fits(each) for each in neighbours)
    found = parts_of(neighbours)
    assert_same_parts(found[1], parts(as_reals(x)).numpy(), scale_of(x))


class Operations(TorchDispatchMode):
    """Counts what torch is asked to do."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


def test_tensors_that_are_not_finite_are_measured_together_too() -> None:
    counts = []
    for many in ([noise(9)] * 50, [holding(noise(9), _0=NAN, _3=INF)] * 50):
        with Operations() as operations:
            measure(many)
        counts.append(operations.count)

    assert counts[0] == counts[1]


def test_a_rate_that_many_rows_share_is_read_once() -> None:
    one, other, counts = torch.tensor(0.5), torch.tensor(0.25, dtype=torch.bfloat16), []
    for rows in (3, 300):
        rates = [one, other, 1, None] * rows
        with Operations() as operations:
            found = read_scalars(rates).numpy()
        counts.append(operations.count)
        np.testing.assert_array_equal(found, [0.5, 0.25, 1.0, NAN] * rows)

    assert counts[0] == counts[1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("difference", [False, True])
def test_without_a_kernel_a_chunk_takes_six_operations(dtype: torch.dtype, difference: bool) -> None:
    counts = []
    for chunks in (3, 10):
        # about a mean, so that a pivot is taken
        x = (noise(chunks * CHUNK) + 3).to(dtype)
        before = noise(chunks * CHUNK).to(dtype) if difference else None
        with Operations() as operations:
            chunked_parts(x, before)
        counts.append(operations.count)

    assert (counts[1] - counts[0]) / 7 <= 6
    assert counts[0] <= 3 * 6 + 16


@pytest.mark.parametrize("special", [NAN, INF, -INF])
def test_neighbours_that_are_not_finite_change_no_bit_of_a_tensor(special: float) -> None:
    alone, among = noise(5001), torch.full((3,), special)

    np.testing.assert_array_equal(measure([among, alone, among]).numpy()[1], measure([alone]).numpy()[0])


@by_name(DENSE | OTHERS)
def test_measuring_a_tensor_among_others_is_what_numpy_says(x: Tensor) -> None:
    found = measure([noise(5), x, None, noise(70, 3).bfloat16()]).numpy()

    assert_same_parts(found[1], truth(x), scale_of(x))
    assert np.isnan(found[2]).all()
    assert not np.isnan(found[[0, 3]][:, : ORDER.index("dot")]).any()


@by_name(OTHERS)
def test_what_is_not_plain_is_not_packed(x: Tensor) -> None:
    assert fits(x) == (type(x) is torch.nn.Parameter)


@by_name(UNSUPPORTED)
def test_what_cannot_be_read_is_unsupported_and_nothing_is_known_of_it(x: Tensor) -> None:
    assert not is_supported(x)
    assert np.isnan(measure([x]).numpy()).all()
    assert np.isnan(measure_update([x], Kept([x])).numpy()).all()
    assert np.isnan(measure_sampled_update([x], [sample(x)]).numpy()).all()


@by_name(DENSE | OTHERS)
def test_a_scale_that_the_tensors_carry_is_taken_out(x: Tensor) -> None:
    if x.dtype in (torch.float32, torch.float64) and not x.is_sparse:
        found = measure([x * 8.0], scale=torch.tensor(8.0)).numpy()
        assert_same_parts(found[0], truth(x), scale_of(x))
    else:
        expected = measure([x]).numpy()
        np.testing.assert_array_equal(measure([x], scale=torch.tensor(1.0)).numpy()[0, WHOLE], expected[0, WHOLE])


def test_nothing_at_all_is_measured_as_no_rows() -> None:
    assert measure([]).numpy().shape == (0, len(ORDER))


# ---- the update -----------------------------------------------------------------------------


@by_name({name: x for name, x in (DENSE | OTHERS).items() if x.is_floating_point() and not x.is_sparse and x.dtype.itemsize > 1})
@pytest.mark.parametrize("with_gradient", [False, True])
def test_the_update_is_the_float64_difference(x: Tensor, with_gradient: bool) -> None:
    before, after = x.detach().clone(), (x.detach().to(torch.float64) * 1.01 + 0.5).to(x.dtype)
    grads = None if not with_gradient else [noise(*x.shape).to(x.dtype)]

    found = measure_update([after], Kept([before]), grads).numpy()[0]
    difference = as_reals(after) - as_reals(before)
    assert_same_parts(found[: ORDER.index("dot")], truth(difference)[: ORDER.index("dot")], scale_of(difference))


def test_the_inner_product_of_update_and_gradient_is_over_what_is_finite_in_both() -> None:
    before, after, grad = torch.zeros(5), torch.tensor([1.0, 2.0, NAN, 4.0, 5.0]), torch.tensor([1.0, INF, 3.0, -4.0, 0.5])

    found = measure_update([after], Kept([before]), [grad], scale=torch.tensor(2.0)).numpy()[0]
    assert found[ORDER.index("dot")] == (1.0 - 16.0 + 2.5) / 2


def test_where_the_shape_changed_there_is_no_update() -> None:
    old, new = noise(4), noise(5)

    for found in (
        measure_update([new], Kept([old])),
        measure_update([new], Kept([old]), [None]),
        measure_sampled_update([new], [sample(old)]),
    ):
        assert np.isnan(found.numpy()).all()


@pytest.mark.parametrize("others", [[], [noise(3)], [noise(SMALL + 1), noise(2).half()]], ids=["alone", "with another", "with others"])
@pytest.mark.parametrize("filled", [True, False])
def test_what_is_kept_is_a_copy_that_later_changes_do_not_reach(others: list[Tensor], filled: bool) -> None:
    x = noise(8)
    kept = Kept([x, *others], filled=filled)
    if not filled:
        np.testing.assert_array_equal(measure([x, *others], kept=kept).numpy(), measure([x, *others]).numpy())
    x += 1

    assert all(torch.equal(copy, old) for copy, old in zip(kept.copies, [noise(8), *others], strict=True))
    np.testing.assert_allclose(measure_update([x, *others], kept).numpy()[0, ORDER.index("mean")], 1.0, rtol=1e-6)


@by_name(DENSE | OTHERS)
def test_what_a_step_leaves_is_measured_with_the_bits_that_the_next_one_finds(x: Tensor) -> None:
    tensors = [noise(70_001), x.detach(), noise(3)]
    _, left = measure_end(tensors, Kept(tensors))

    np.testing.assert_array_equal(left.numpy(), measure(tensors).numpy())
    np.testing.assert_array_equal(left.numpy()[1:2], measure([x.detach()]).numpy())


def test_where_one_shape_changed_the_updates_of_the_others_are_known() -> None:
    found = measure_update([noise(5), noise(6) + 1, torch.zeros(SMALL + 1)], Kept([noise(4), noise(6), torch.ones(SMALL + 1)])).numpy()

    np.testing.assert_allclose(found[:, ORDER.index("mean")], [NAN, 1.0, -1.0], rtol=1e-6)


@pytest.mark.parametrize("x", [noise(SAMPLE), noise(40, 3).t(), torch.complex(noise(9), noise(9)), torch.tensor(3.0)], ids=str.__call__)
def test_a_sample_of_a_small_tensor_is_all_of_it(x: Tensor) -> None:
    assert torch.equal(sample(x), as_reals(x))


@pytest.mark.parametrize("numel", [SAMPLE + 1, 2 * SAMPLE - 1, 1 << 20])
def test_a_sample_of_a_large_tensor_has_distinct_elements_spread_over_all_of_it(numel: int) -> None:
    chosen = sample(torch.arange(numel, dtype=torch.float64))

    assert len(chosen) == SAMPLE
    assert len(chosen.unique()) == SAMPLE
    assert (chosen.diff() < 2 * numel / SAMPLE + 1).all()


def test_a_sample_is_a_copy_that_later_changes_do_not_reach() -> None:
    for x in (noise(8, dtype=torch.float64), noise(2 * SAMPLE, dtype=torch.float64)):
        taken = sample(x)
        kept = taken.clone()
        x += 1
        assert torch.equal(taken, kept)


def test_a_sampled_update_counts_all_elements_and_knows_no_extremes() -> None:
    before = torch.complex(noise(3 * SAMPLE), noise(3 * SAMPLE))
    found = dict(zip(ORDER, measure_sampled_update([before * 2], [sample(before)]).numpy()[0], strict=True))

    assert found["count"] == 6 * SAMPLE
    assert found["rms"] == pytest.approx(truth(before)[ORDER.index("rms")], rel=0.05)
    assert np.isnan([found["min"], found["max"]]).all()


def test_scalars_are_read_wherever_they_are() -> None:
    found = read_scalars([0.1, None, torch.tensor(2.0), torch.tensor([3]), 4]).numpy()

    np.testing.assert_array_equal(found, [0.1, NAN, 2.0, 3.0, 4.0])


# ---- merging --------------------------------------------------------------------------------

elements = st.lists(st.floats(width=32) | st.sampled_from([NAN, INF, -INF, 0.0, -0.0]), max_size=40)


def merged(pieces: list[Tensor]) -> dict[str, float]:
    """The parts of all pieces taken together."""
    found = measure(pieces).numpy()
    columns = {part: found[:, i].astype(np.int64) if PARTS[part].integer else found[:, i] for i, part in enumerate(ORDER)}
    return {part: float(column[0]) for part, column in merge(columns, [range(len(pieces))]).items() if part != "dot"}


@given(elements, st.lists(st.integers(0, 40), max_size=5))
def test_any_split_of_a_tensor_measured_and_merged_equals_the_whole(values: list[float], cuts: list[int]) -> None:
    whole = torch.tensor(values, dtype=torch.float32)
    pieces = list(torch.tensor_split(whole, sorted(cuts)))

    expected = dict(zip(ORDER, truth(whole), strict=True))
    scale = float(as_reals(whole)[torch.isfinite(whole)].abs().amax()) if torch.isfinite(whole).any() else 0.0
    for part, found in merged(pieces).items():
        assert found == pytest.approx(expected[part], rel=1e-9, abs=1e-9 * scale if part in ("mean", "std") else 0.0, nan_ok=True), part


@given(st.lists(elements, min_size=1, max_size=6))
def test_tensors_packed_together_have_the_numbers_each_has_alone(many: list[list[float]]) -> None:
    tensors = [torch.tensor(values, dtype=torch.float32) for values in many]

    np.testing.assert_array_equal(measure(tensors).numpy(), np.concatenate([measure([x]).numpy() for x in tensors]))


# ---- the same numbers whatever else is going on ---------------------------------------------


def everything() -> list[np.ndarray]:
    """A measurement of each kind, of tensors of each kind."""
    tensors = [*DENSE.values(), *OTHERS.values()]
    moved = [x * 2 for x in DENSE.values()]
    old = list(DENSE.values())
    return [
        measure(tensors).numpy(),
        measure(old, scale=torch.tensor(4.0, dtype=torch.float32, device="cpu")).numpy(),
        measure_update(moved, Kept(old)).numpy(),
        measure_update(moved, Kept(old), moved).numpy(),
        measure_sampled_update([*moved, BIG * 2], [sample(x) for x in [*old, BIG]]).numpy(),
        read_scalars([0.1, torch.tensor(0.1, dtype=torch.float32, device="cpu"), None]).numpy(),
    ]


def assert_same_bits(found: list[np.ndarray], expected: list[np.ndarray]) -> None:
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(one, other)


@contextlib.contextmanager
def default_dtype() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


@contextlib.contextmanager
def default_device() -> Iterator[None]:
    # `torch.set_default_device(None)` does not undo all of it in torch 2.6
    with torch.device("meta"):
        yield


SURROUNDINGS: dict[str, Callable[[], contextlib.AbstractContextManager[Any]]] = {
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "default dtype float64": default_dtype,
    "default device meta": default_device,
    "inference mode": torch.inference_mode,
    "gradients enabled": torch.enable_grad,
    "numpy raises": lambda: np.errstate(all="raise"),
}


@pytest.mark.parametrize("surrounding", SURROUNDINGS.values(), ids=SURROUNDINGS.keys())
def test_the_surroundings_change_nothing(surrounding: Callable[[], contextlib.AbstractContextManager[Any]]) -> None:
    expected = everything()
    with surrounding():
        found = everything()

    assert_same_bits(found, expected)


def test_the_same_bits_run_to_run_and_for_any_number_of_threads() -> None:
    threads = torch.get_num_threads()
    tensors = [noise(1_000_003), noise(1000, 700).t(), noise(300_001).bfloat16()]
    runs = []
    try:
        for number in (1, 2, 3, 2, 8):
            torch.set_num_threads(number)
            runs.append(measure(tensors).numpy())
    finally:
        torch.set_num_threads(threads)

    for run in runs[1:]:
        np.testing.assert_array_equal(run, runs[0])


@pytest.mark.parametrize("step", [1, 2], ids=["in one piece", "strided"])
@pytest.mark.parametrize("n", [5, 300, 70_000, 300_000])
def test_the_sign_of_a_zero_does_not_depend_on_which_is_seen_first(n: int, step: int) -> None:
    """A sum of threads, or of lanes, meets them in another order: an extreme of 0 is 0.0 for all of them."""
    zeros = torch.where(torch.arange(n * step) % 3 == 0, -0.0, 0.0)
    tensors = [x[::step] for x in (zeros + 0, -zeros, zeros.abs().neg(), noise(n * step).abs() * zeros, -noise(n * step).abs() - zeros)]
    tensors[-1][n // 2] = -0.0
    found = measure(tensors).numpy()[:, EXTREMES]
    moved = measure_update(tensors, Kept([torch.zeros_like(x) for x in tensors])).numpy()[:, EXTREMES]

    assert not np.signbit(found[found == 0]).any()
    assert not np.signbit(moved[moved == 0]).any()
    assert (found[:, 1] == 0).all()


def test_no_random_number_is_drawn() -> None:
    before = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    everything()

    assert torch.equal(torch.get_rng_state(), before[0])
    assert (np.random.get_state()[1] == before[1]).all()
    assert random.getstate() == before[2]


def test_nothing_measured_is_kept_in_a_graph_or_changed() -> None:
    x = noise(100).requires_grad_()
    y = x * 2
    version = y._version
    measure([x, y])
    measure_update([y], Kept([x]))

    assert y._version == version
    assert torch.equal(y, noise(100) * 2)
