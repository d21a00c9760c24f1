"""The quick way through a step against the general one, which is its specification; and what the quick way costs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import test_truth_amp
import test_truth_clipping
import test_truth_closures
import test_truth_foreign
import test_truth_inside
import test_truth_nested
import test_truth_plain
import test_truth_several
import torch
from harness import Lab
from hypothesis import given, settings
from hypothesis import strategies as st
from loops import mlp, sgd
from recorded import one_by_one, rounds_of
from test_batching import LOOPS as ACTIONS
from test_batching import put_together
from torch import Tensor, nn

import paramwatch
from paramwatch.batch import Batch
from paramwatch.measure import forms, native
from paramwatch.measure.forms import Forms
from paramwatch.plan import Plan
from paramwatch.record import Record
from paramwatch.recorder import Recorder
from paramwatch.streak import Streak
from paramwatch.testing import ListSink

pytestmark = pytest.mark.skipif(not native.available(), reason="no C++ compiler: there is no quick way")

MODULES = (
    *(test_truth_amp, test_truth_clipping, test_truth_closures, test_truth_foreign, test_truth_inside),
    *(test_truth_nested, test_truth_plain, test_truth_several),
)
LOOPS: dict[str, Callable[[Lab], None]] = {name: loop for module in MODULES for name, loop in module.LOOPS.items()}


@pytest.fixture
def entered(monkeypatch: pytest.MonkeyPatch) -> list[Plan]:
    """The plans of the steps that go the quick way."""
    found: list[Plan] = []
    enter, enter_again = Plan.enter, Streak.enter

    def noted(self: Plan, *args: Any) -> Any:
        found.append(self)
        return enter(self, *args)

    def noted_again(self: Streak, optimizer: torch.optim.Optimizer) -> bool:
        if entered := enter_again(self, optimizer):
            found.append(self._plan)
        return entered

    monkeypatch.setattr(Plan, "enter", noted)
    monkeypatch.setattr(Streak, "enter", noted_again)
    return found


def assert_same(quick: Record, general: Record, changes: bool = True) -> None:
    """But for the time; and for what changed outside a step where it depends on when the collector comes by."""
    apart = ("overhead_us",)
    assert quick.step == general.step
    assert {k: v for k, v in quick.steps.items() if k not in apart} == {k: v for k, v in general.steps.items() if k not in apart}
    assert quick.inventory == general.inventory
    assert quick.changes == general.changes or not changes
    for name in general.values:
        np.testing.assert_array_equal(quick.values[name], general.values[name], err_msg=f"step {quick.step}, {name}")
    for name in ("stepped", "lr", "grad_state"):
        np.testing.assert_array_equal(getattr(quick, name), getattr(general, name), err_msg=f"step {quick.step}, {name}")


# ---- both ways ------------------------------------------------------------------------------


@pytest.mark.parametrize("loop", LOOPS.values(), ids=LOOPS)
def test_a_loop_of_the_harness_has_equal_records_both_ways(loop: Callable[[Lab], None], monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[list[Record]] = []
    for plans in (True, False):
        monkeypatch.setattr(Recorder, "plans", plans)
        sink = ListSink()
        lab = Lab(True, {"update": "exact", "raw_gradients": True, "sinks": [sink]})
        torch.manual_seed(0)
        loop(lab)
        assert lab.watch is not None
        lab.watch.close()
        assert not lab.watch.recorder.guard.failed
        found.append(sink.records)

    assert len(found[0]) == len(found[1]) > 0
    for quick, general in zip(*found, strict=True):
        assert_same(quick, general)


@settings(max_examples=25)
@given(ACTIONS, st.sampled_from(["exact", "off"]), st.sampled_from([1, 1, 2]), st.booleans(), st.sampled_from([2, 256]))
def test_whatever_happens_the_records_are_equal_both_ways(actions: list[str], update: Any, every: int, raw: bool, most: int) -> None:
    quick = rounds_of(actions, update=update, every=every, raw=raw)
    general = one_by_one(rounds_of(actions, update=update, every=every, raw=raw, plans=False))
    alone = one_by_one(quick)
    together = [each for part in put_together(quick, most) for each in (part if isinstance(part, Batch) else [part])]

    assert len(alone) == len(together) == len(general)
    for i, each in enumerate(general):
        # a step that raised makes others unsure for as long as anything holds it
        assert_same(alone[i], each, "raises" not in actions)
        assert_same(together[i], each, "raises" not in actions)


def net_of(rows: int) -> nn.ParameterList:
    return nn.ParameterList([nn.Parameter(torch.full((3,), float(i))) for i in range(rows)])


def step(optimizer: torch.optim.Optimizer) -> None:
    for group in optimizer.param_groups:
        for param in group["params"]:
            param.grad = torch.ones_like(param)
    optimizer.step()


def test_nearly_all_steps_of_a_plain_loop_go_the_quick_way(entered: list[Plan]) -> None:
    net = mlp()
    optimizer = sgd(net)
    with paramwatch.attach(net):
        for _ in range(64):
            step(optimizer)
    # the general way at the first step and after the model was read again, at powers of two
    assert len(entered) == 64 - 1 - 7


@pytest.mark.parametrize(
    "change",
    [
        lambda net, optimizer: net[0].weight.requires_grad_(False),
        lambda net, optimizer: setattr(net[0].weight, "data", net[0].weight.data.t().contiguous().t()),
        lambda net, optimizer: setattr(net[0].weight, "data", net[0].weight.data.float()),
        lambda net, optimizer: setattr(net[0], "weight", nn.Parameter(net[0].weight.detach().clone())),
        lambda net, optimizer: setattr(net, "more", nn.Linear(1, 1)),
        lambda net, optimizer: net[1].add_module("more", nn.Linear(1, 1)),
        lambda net, optimizer: optimizer.param_groups[0]["params"].pop(),
        lambda net, optimizer: optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(2))]}),
    ],
    ids=["frozen", "strides", "dtype", "replaced", "layer added", "layer added to one that had none", "row dropped", "row added"],
)
def test_whatever_a_plan_rests_on_makes_the_next_step_go_the_general_way(
    change: Callable[[nn.Sequential, torch.optim.Optimizer], object], entered: list[Plan]
) -> None:
    net = mlp()
    optimizer = sgd(net)
    with paramwatch.attach(net):
        for _ in range(7):
            step(optimizer)
        before = len(entered)
        change(net, optimizer)
        step(optimizer)
        assert len(entered) == before
        step(optimizer)
    assert len({id(plan) for plan in entered}) > 1 or len(entered) == before


def test_memory_that_moves_is_followed(entered: list[Plan]) -> None:
    net = net_of(3)
    optimizer = sgd(net)
    held = []
    with paramwatch.attach(net) as watch:
        for i in range(8):
            with torch.no_grad():
                for param in net:
                    held.append(param.data)
                    param.data = torch.full((3,), float(i))
            step(optimizer)
        frame = watch.frame("param_mean")
    assert len(entered) > 2
    np.testing.assert_array_equal(frame.to_numpy(), np.repeat(np.arange(8.0)[:, None], 3, axis=1))


def test_a_step_that_moves_its_own_memory_is_measured_the_general_way(entered: list[Plan]) -> None:
    class Moves(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:  # type: ignore[override]  # it gives no loss
            with torch.no_grad():
                for param in self.param_groups[0]["params"]:
                    param.data = param.data + 2.0

    net = net_of(3)
    optimizer = Moves(net.parameters(), lr=1.0)
    with paramwatch.attach(net) as watch:
        for _ in range(8):
            step(optimizer)
        assert len(entered) > 2
        np.testing.assert_allclose(watch.frame("update_norm").to_numpy(), 2 * 3**0.5)


def test_two_steps_in_progress_never_share_their_copies(entered: list[Plan]) -> None:
    net = net_of(2)
    optimizer = sgd(net)
    with paramwatch.attach(net) as watch:
        for _ in range(8):
            step(optimizer)
        plan, tensors = entered[-1], list(net)
        first, second = plan.enter(tensors), plan.enter(tensors)
        with torch.no_grad():
            first.see([param.grad for param in tensors]), second.see([param.grad for param in tensors])
            tensors[0] += 1.0
        assert first.end(optimizer, tensors)
        assert second.end(optimizer, tensors)
        assert len(plan.rooms) == len({id(room) for room in plan.rooms}) == 2
        assert not watch.recorder.guard.failed


def test_a_step_left_by_an_exception_takes_its_copies_with_it(entered: list[Plan]) -> None:
    class Fails(torch.optim.SGD):
        fails = False

        def step(self, closure: Any = None) -> None:  # type: ignore[override]  # it gives no loss
            if self.fails:
                raise RuntimeError
            for param in self.param_groups[0]["params"]:
                param.data.sub_(0.5 * param.grad)

    net = net_of(2)
    optimizer = Fails(net.parameters(), lr=0.5)
    with paramwatch.attach(net) as watch:
        for i in range(12):
            optimizer.fails = i == 6
            try:
                step(optimizer)
            except RuntimeError:
                assert optimizer.fails
        assert len(watch.steps) == 11
        np.testing.assert_allclose(watch.frame("update_norm").to_numpy(), 0.5 * 3**0.5)
    assert len(entered[-1].rooms) == 1


# ---- forms ----------------------------------------------------------------------------------


@pytest.mark.parametrize("together", [True, False], ids=["torch's check", "one by one"])
def test_another_form_is_told_apart(together: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not together:
        monkeypatch.setattr(forms, "_check_of_many", lambda: None)
    x = torch.zeros(2, 3)
    known = Forms([torch.ones(4), x])
    same = [x, x.clone(), torch.zeros(6).view(2, 3), torch.zeros(4, 3)[1:3]]
    others = [
        *(x.t(), torch.zeros(3, 2).t(), torch.zeros(2, 6)[:, ::2], torch.zeros(2, 3, 1), x.double(), x.half(), x.int(), x.to("meta")),
        *(nn.Parameter(x), torch.zeros(2, 3, requires_grad=True), torch._neg_view(x), x.to_sparse(), x.to_mkldnn()),
    ]
    assert all(known.hold([torch.ones(4), each]) for each in same)
    assert not any(known.hold([torch.ones(4), each]) for each in others)
    with torch.autocast("cpu"):
        assert known.hold([torch.ones(4), x])


# ---- what it costs --------------------------------------------------------------------------


class Counting(torch.utils._python_dispatch.TorchDispatchMode):
    """Counts operations that torch dispatches, but those of the step itself."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(str(function))
        return function(*args, **(kwargs or {}))


def operations(rows: int, **options: Any) -> list[str]:
    """What a watched step dispatches and a bare one does not."""
    seen = []
    for watched in (False, True):
        net = net_of(rows)
        optimizer = torch.optim.SGD(net.parameters(), lr=0.5, foreach=True)
        watch = paramwatch.attach(net, **options) if watched else None
        for _ in range(6):
            step(optimizer)
        with Counting() as counting:
            optimizer.step()
        seen.append(counting.seen)
        if watch is not None:
            watch.close()
    bare, watched_too = seen
    for each in bare:
        watched_too.remove(each)
    return watched_too


@pytest.mark.parametrize("rows", [1, 5, 50])
def test_a_quick_step_dispatches_nothing(rows: int) -> None:
    assert operations(rows, update="exact") == []


def test_no_way_waits_for_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    for available in (True, False):
        monkeypatch.setattr(native, "available", lambda available=available: available)
        for options in ({"update": "exact"}, {"update": "sampled"}, {"detail": "full"}):
            seen = operations(3, **options)
            assert not [each for each in seen if "local_scalar_dense" in each or "item" in each], options


def test_without_a_kernel_a_row_takes_few_operations(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "available", lambda: False)
    few, many = len(operations(10, update="exact")), len(operations(20, update="exact"))
    assert (many - few) / 10 <= 3 * 6


def test_gradients_that_come_and_go(entered: list[Plan]) -> None:
    """Rows without a gradient have no numbers, whatever the step before had."""
    net = net_of(3)
    optimizer = sgd(net)
    with paramwatch.attach(net) as watch:
        for i in range(12):
            for j, param in enumerate(net):
                param.grad = None if (i + j) % 3 == 0 else torch.full((3,), float(i))
            optimizer.step()
        frame = watch.frame("grad_mean")
    assert len(entered) > 5
    for i in range(12):
        expected = [np.nan if (i + j) % 3 == 0 else float(i) for j in range(3)]
        np.testing.assert_array_equal(frame.iloc[i].to_numpy(dtype=float), expected)


def test_gradients_of_other_forms(entered: list[Plan]) -> None:
    net = nn.ParameterList([nn.Parameter(torch.zeros(4, 6)), nn.Parameter(torch.zeros(4, 6))])
    optimizer = sgd(net)
    kinds: list[Callable[[Tensor], Tensor]] = [
        *(lambda x: x, lambda x: x.t().contiguous().t(), lambda x: torch.cat([x, x], 1)[:, :6], lambda x: x.to_sparse()),
        *(lambda x: torch._neg_view(-x), lambda x: x[:1].expand(4, 6)),
    ]
    with paramwatch.attach(net) as watch:
        for _ in range(2):
            for i, kind in enumerate(kinds):
                x = torch.arange(24.0).view(4, 6) + i
                net[0].grad, net[1].grad = kind(x.clone()), x
                wanted = float(kind(x.clone()).to_dense().double().mean())
                optimizer.step()
                watch.flush()
                found = watch.frame("grad_mean").iloc[-1]
                assert float(found.iloc[0]) == pytest.approx(wanted)
                assert float(found.iloc[1]) == pytest.approx(float(x.double().mean()))
    assert len(entered) > 4
