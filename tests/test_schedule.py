"""Which steps are kept, and that they fit."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from paramwatch.schedule import HORIZON, LEAST_BASE, Schedule


def with_base(base: int) -> Schedule:
    """The schedule whose budget is just large enough for this base."""
    return Schedule(1, 2**40, max_base=base)


bases = st.integers(5, 19).map(lambda power: 2**power)


@given(bases, st.integers(0, 2**30))
def test_every_step_is_kept_below_twice_the_base_and_multiples_of_the_stride_beyond(base: int, step: int) -> None:
    schedule = with_base(base)
    stride = schedule.stride(step)
    assert schedule.base == base
    assert stride & (stride - 1) == 0
    assert schedule.keeps(step) == (step % stride == 0)
    assert schedule.full_rate(step) == (step < 2 * base) == (stride == 1)


@given(bases, st.integers(1, 12))
def test_the_stride_doubles_exactly_where_the_step_number_has_doubled(base: int, doublings: int) -> None:
    schedule, edge = with_base(base), base << doublings
    assert (schedule.stride(edge - 1), schedule.stride(edge)) == (2 ** (doublings - 1), 2**doublings)
    assert schedule.keeps(edge)
    assert (schedule.full_rate(edge - 1), schedule.full_rate(edge)) == (doublings == 1, False)


@given(bases, st.integers(0, 2000), st.integers(0, 8))
def test_a_step_that_a_small_base_keeps_is_kept_by_a_larger_one(base: int, step: int, shift: int) -> None:
    step <<= shift
    assert with_base(2 * base).keeps(step) or not with_base(base).keeps(step) or base == HORIZON // 2


@given(bases, st.integers(0, 2**21), st.lists(st.integers(1, 300), max_size=40) | st.integers(0, 40).map(lambda n: [1] * n))
def test_of_many_steps_those_are_chosen_that_are_kept_one_by_one(base: int, first: int, apart: list[int]) -> None:
    schedule, steps = with_base(base), [first + sum(apart[:i]) for i in range(len(apart) + 1)]
    assert schedule.chosen(steps) == [i for i, step in enumerate(steps) if schedule.keeps(step)]


@given(st.integers(0, 5000))
def test_the_number_of_kept_steps_is_what_counting_them_gives(steps: int) -> None:
    schedule = with_base(32)
    assert schedule.kept(steps) == sum(map(schedule.keeps, range(steps)))


@given(st.floats(1, 1e6), st.floats(1, 1e12))
def test_the_base_is_the_largest_whose_steps_fit_the_budget(bytes_per_step: float, budget: float) -> None:
    schedule = Schedule(bytes_per_step, budget)
    larger = with_base(schedule.base * 2)
    assert schedule.base == LEAST_BASE or schedule.kept(HORIZON) * bytes_per_step <= budget
    assert schedule.base == HORIZON // 2 or larger.kept(HORIZON) * bytes_per_step > budget


@pytest.mark.parametrize(("base", "kept"), [(32, 32 * 16), (1024, 1024 * 11), (HORIZON // 2, HORIZON)])
def test_a_horizon_of_steps_keeps_one_base_for_each_doubling(base: int, kept: int) -> None:
    assert with_base(base).kept(HORIZON) == kept


def test_a_cap_holds_whatever_the_budget() -> None:
    assert Schedule(1, 1e15, 512).base == 512
    assert Schedule(1, 1e15, 1000).base == 512


def test_it_prints_what_it_does() -> None:
    assert repr(with_base(512)) == "<Schedule: every step below 1024, then 512 for each doubling of the step number>"
