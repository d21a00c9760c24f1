"""The Triton kernels against the specification: in Triton's interpreter, a process of its own, and on a GPU where there is one."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

import gpu_trials
import numpy as np
import pytest
import torch
from gpu_cases import cases, large, most, noise, not_read_once, steps
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from paramwatch.bins import BINS, positions
from paramwatch.columns import PARTS, Array
from paramwatch.measure.naive import ORDER, as_reals, parts
from paramwatch.measure.native import TYPES
from paramwatch.merging import merge

triton = pytest.importorskip("triton")

MEAN, STD, RMS, DOT = (ORDER.index(part) for part in ("mean", "std", "rms", "dot"))
COUNTS = [i for i, part in enumerate(ORDER) if PARTS[part].integer]
EXTREMES = [ORDER.index("min"), ORDER.index("max")]

Run = Callable[..., Any]


@pytest.fixture(scope="module")
def interpreter() -> Iterator[ProcessPoolExecutor]:
    if triton.__version__.startswith("3.2.") and np.lib.NumpyVersion(np.__version__) >= "2.4.0":
        pytest.skip("the interpreter of Triton 3.2 makes a number of an array, which numpy does not do since 2.4")
    with ProcessPoolExecutor(1, get_context("spawn"), gpu_trials.interpreted) as pool:
        yield pool


@pytest.fixture(scope="module", params=["interpreter", "gpu"])
def run(request: pytest.FixtureRequest) -> Run:
    """Runs a trial in one of the two places; what was tried once is known."""
    if request.param == "gpu" and not torch.cuda.is_available():
        pytest.skip("no GPU")
    known: dict[tuple[Any, ...], Any] = {}

    def run(trial: Callable[..., Any], *args: Any) -> Any:
        key = (trial, *args)
        if key not in known:
            if request.param == "gpu":
                known[key] = trial(*args, "cuda")
            else:
                known[key] = request.getfixturevalue("interpreter").submit(trial, *args, "cpu").result()
        return known[key]

    return run


def magnitude(x: torch.Tensor) -> float:
    """The mean of the absolute values of the finite elements."""
    reals = as_reals(x)
    reals = reals[torch.isfinite(reals)]
    return float((reals.abs() / reals.numel()).sum()) if reals.numel() else 0.0


def assert_parts(found: Array, expected: Array, x: torch.Tensor, rounded: bool = False) -> None:
    """Counts and extremes exactly; the rest as near as float32 in a chunk can be, a spread relative to the spread itself.

    Args:
        found: What a kernel says.
        expected: What the specification says.
        x: The elements.
        rounded: Differences are formed in float32, which their extremes are held in anyway.
    """
    exactly = (lambda values: values.astype(np.float32)) if rounded else (lambda values: values)
    np.testing.assert_array_equal(found[COUNTS], expected[COUNTS])
    with np.errstate(over="ignore"):
        np.testing.assert_array_equal(exactly(found[EXTREMES]), exactly(expected[EXTREMES]))
    size = magnitude(x)
    np.testing.assert_allclose(found[MEAN], expected[MEAN], rtol=0, atol=1e-6 * size if size < math.inf else math.inf)
    np.testing.assert_allclose(found[RMS], expected[RMS], rtol=1e-6)
    np.testing.assert_allclose(found[STD], expected[STD], rtol=1e-6, atol=1e-12 * size if size < math.inf else 0)


# ---- reading --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", most(cases()))
def test_a_tensor_has_the_parts_that_the_specification_says(run: Run, name: str) -> None:
    x = cases()[name]

    assert_parts(run(gpu_trials.read, name)["alone"][0], parts(as_reals(x)).numpy(), x)


@pytest.mark.parametrize("name", most(cases()))
def test_a_copy_holds_the_same_bits_and_changes_none_of_the_parts(run: Run, name: str) -> None:
    found = run(gpu_trials.read, name)

    np.testing.assert_array_equal(found["copy"], found["x"])
    np.testing.assert_array_equal(found["with a copy"], found["alone"])


@pytest.mark.thorough
@pytest.mark.parametrize("name", ["1537", "bfloat16 1025", "float16", "float64"])
def test_a_copy_need_not_be_aligned(run: Run, name: str) -> None:
    plain, copied, x, copy = run(gpu_trials.read_to_a_misaligned_copy, name)

    np.testing.assert_array_equal(copy, x)
    np.testing.assert_array_equal(copied, plain)


@pytest.mark.thorough
def test_what_is_measured_beside_a_tensor_changes_no_bit_of_it(run: Run) -> None:
    for name, found in run(gpu_trials.together).items():
        np.testing.assert_array_equal(found, run(gpu_trials.read, name)["alone"][0], err_msg=name)


@pytest.mark.thorough
def test_a_constant_tensor_has_no_spread(run: Run) -> None:
    for name in ("constant", "constant, 7", "constant, 1001 bfloat16", "all zero"):
        assert run(gpu_trials.read, name)["alone"][0, STD] == 0


@pytest.mark.thorough
@pytest.mark.parametrize("factor", [8.0, 65536.0, 3.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_scale_that_the_elements_carry_is_taken_out(run: Run, factor: float, dtype: torch.dtype) -> None:
    found, plain, dot, plain_dot = run(gpu_trials.scaled, "1537", factor, dtype)

    if math.log2(factor).is_integer():
        np.testing.assert_array_equal(found, plain)
        np.testing.assert_array_equal(dot, plain_dot)
    else:
        np.testing.assert_allclose(found, plain, rtol=2e-6)
        np.testing.assert_allclose(dot, plain_dot, rtol=2e-6)


@pytest.mark.thorough
@pytest.mark.parametrize("name", large())
def test_chunks_of_full_size_are_as_near_to_the_specification(run: Run, name: str) -> None:
    x = large()[name]

    assert_parts(run(gpu_trials.at_full_size, name), parts(as_reals(x)).numpy(), x)


@pytest.mark.thorough
@pytest.mark.parametrize(("name", "expected"), [(name, int(name in not_read_once())) for name in large() if name != "rising"])
def test_only_a_chunk_that_float32_is_not_enough_for_is_read_twice(run: Run, name: str, expected: float) -> None:
    assert run(gpu_trials.read_twice, name) == expected


@pytest.mark.thorough
@settings(max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(n=st.integers(1, 1500), offset=st.integers(0, 9), chunk=st.sampled_from([512, 1024, 8192]), lanes=st.sampled_from([32, 64]))
def test_any_way_to_cut_a_tensor_into_chunks_gives_the_same_parts(run: Run, n: int, offset: int, chunk: int, lanes: int) -> None:
    x = (1 + noise(3000))[offset : offset + n]

    assert_parts(run(gpu_trials.in_chunks, n, offset, chunk, lanes), parts(as_reals(x)).numpy(), x)


@pytest.mark.thorough
@settings(max_examples=8, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(n=st.integers(0, 1200), cuts=st.lists(st.integers(0, 1200), max_size=3).map(tuple))
def test_pieces_of_a_tensor_merge_to_the_whole(run: Run, n: int, cuts: tuple[int, ...]) -> None:
    whole, found = run(gpu_trials.pieces, n, cuts)
    columns = {part: found[:, i].astype(np.int64) if PARTS[part].integer else found[:, i] for i, part in enumerate(ORDER)}
    merged = {part: column[0] for part, column in merge(columns, [range(len(found))]).items()}

    for part, value in zip(ORDER, whole[0], strict=True):
        if part != "dot":
            assert merged[part] == pytest.approx(value, rel=2e-6, abs=2e-6, nan_ok=True), part


@pytest.mark.thorough
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_elements_beyond_the_reach_of_32_bits_are_found(run: Run, dtype: torch.dtype) -> None:
    (finite, zero, mean, std, least, most), expected = run(gpu_trials.beyond_32_bits, dtype)
    known = dict(zip(ORDER, expected, strict=True))

    assert (finite, zero, least, most) == (700, known["zero"], known["min"], known["max"])
    assert mean == pytest.approx(known["mean"], rel=1e-6)
    assert std == pytest.approx(known["std"], rel=1e-6)


# ---- the update -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", most(steps()))
def test_an_update_has_the_parts_of_the_float64_difference(run: Run, name: str) -> None:
    before, after, grad = steps()[name]
    difference, pull = as_reals(after) - as_reals(before), as_reals(grad)
    expected = parts(difference, pull).numpy()
    found = run(gpu_trials.step, name)["update"]

    assert_parts(found, expected, difference, rounded=True)
    both = torch.isfinite(difference) & torch.isfinite(pull)
    terms = float((difference[both] * pull[both]).abs().sum())
    np.testing.assert_allclose(found[DOT], expected[DOT], rtol=0, atol=1e-6 * terms)


@pytest.mark.parametrize("name", most(steps()))
def test_after_an_update_a_tensor_has_the_same_bits_as_measured_alone(run: Run, name: str) -> None:
    found = run(gpu_trials.step, name)

    np.testing.assert_array_equal(found["itself"], found["alone"])


@pytest.mark.thorough
@pytest.mark.parametrize(
    "name", ["1537", "bfloat16 1025", "misaligned", "float64", "bfloat16 with all of them", "misaligned before", "by a sign"]
)
def test_a_gradient_adds_nothing_but_the_inner_product(run: Run, name: str) -> None:
    found, (update, itself) = run(gpu_trials.step, name), run(gpu_trials.step_without_gradient, name)

    np.testing.assert_array_equal(itself, found["itself"])
    np.testing.assert_array_equal(np.delete(update, DOT), np.delete(found["update"], DOT))
    assert np.isnan(update[DOT])


@pytest.mark.thorough
def test_what_moves_beside_a_tensor_changes_no_bit_of_its_update(run: Run) -> None:
    for name, (update, itself) in run(gpu_trials.steps_together).items():
        found = run(gpu_trials.step, name)
        np.testing.assert_array_equal(update, found["update"], err_msg=name)
        np.testing.assert_array_equal(itself, found["itself"], err_msg=name)


@pytest.mark.thorough
def test_where_only_some_have_a_gradient_only_these_have_an_inner_product(run: Run) -> None:
    found, expected = run(gpu_trials.some_with_gradients)

    np.testing.assert_array_equal(np.isnan(found[:, DOT]), [True, False] * 3)
    np.testing.assert_allclose(found[:, DOT], expected[:, DOT], rtol=1e-5)
    np.testing.assert_array_equal(found[:, COUNTS], expected[:, COUNTS])


# ---- what it costs --------------------------------------------------------------------------


def test_the_number_of_torch_operations_is_the_same_for_any_number_of_tensors(run: Run) -> None:
    found = run(gpu_trials.operations)

    assert found["few"] == found["many"]
    assert found["few again"] == found["many again"] <= found["few"]


def test_nothing_is_held_of_what_was_measured(run: Run) -> None:
    assert not run(gpu_trials.holds)


def test_the_interpreter_leaves_no_trace_in_this_process(interpreter: ProcessPoolExecutor) -> None:
    assert interpreter.submit(os.getenv, "TRITON_INTERPRET").result() == "1"
    assert "TRITON_INTERPRET" not in os.environ


# ---- histograms -----------------------------------------------------------------------------


def histogram(x: torch.Tensor) -> Array:
    return np.bincount(positions(x.numpy()), minlength=BINS + 1)[:BINS]


@pytest.mark.parametrize("name", most(cases()))
def test_a_histogram_counts_every_finite_element_in_its_bin(run: Run, name: str) -> None:
    found, reals = run(gpu_trials.counted, name), as_reals(cases()[name])

    np.testing.assert_array_equal(found["alone"], histogram(reals))
    np.testing.assert_array_equal(found["unscaled"], histogram(reals / 3))
    if name in steps():
        before, after, _ = steps()[name]
        np.testing.assert_array_equal(found["update"], histogram(as_reals(after) - as_reals(before)))


@pytest.mark.thorough
def test_histograms_of_many_tensors_are_those_of_each(run: Run) -> None:
    for name, found in run(gpu_trials.counted_together).items():
        np.testing.assert_array_equal(found, histogram(as_reals(cases()[name])), err_msg=name)


# ---- the path as a whole, in the interpreter ------------------------------------------------


@pytest.mark.parametrize("dtype", most(TYPES, [torch.bfloat16]), ids=str)
def test_what_is_tried_before_the_kernels_are_trusted_is_right(run: Run, dtype: torch.dtype) -> None:
    assert run(gpu_trials.tried, dtype) == ("", "")


def test_kernels_that_are_wrong_or_fail_are_not_trusted_and_that_is_said_once(run: Run) -> None:
    (wrong, trusted), (failed, trusted_too) = run(gpu_trials.tried_broken)

    assert (trusted, trusted_too) == (False, False)
    assert wrong.count("gave wrong numbers for torch.float32 (measured)") == failed.count("out of resources") == 1


@pytest.mark.parametrize("failing", most([False, True], [False]))
def test_a_training_measured_by_the_kernels_has_the_records_of_one_measured_in_plain_torch(
    interpreter: ProcessPoolExecutor, failing: bool
) -> None:
    found, histograms, losses = interpreter.submit(gpu_trials.trained, True, failing).result()
    expected, counts, same = interpreter.submit(gpu_trials.trained, False).result()

    assert losses == same
    assert [set(each) for each in histograms] == [{"param", "grad", "update"}, set()]
    for kind in counts[0]:
        np.testing.assert_array_equal(histograms[0][kind], counts[0][kind], kind)
    for one, other in zip(found, expected, strict=True):
        for name, part in PARTS.items():
            if part.integer or name in ("min", "max"):
                np.testing.assert_array_equal(one[name], other[name], name)
            else:
                np.testing.assert_allclose(one[name], other[name], rtol=1e-5, atol=1e-7, err_msg=name)
