"""A gradient that something else than autograd changes, or that is there before the first backward pass: what is split, and said."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from test_uses_edges import Chain, X, loss, mlp, near
from torch import Tensor, nn

import paramwatch
from paramwatch import Watch
from paramwatch.uses import watched

ROW = "2.weight"
FIRST, SECOND = X[:8], X[8:]

Change = Callable[[nn.Module], Any]


def halve(net: nn.Module) -> None:
    for parameter in net.parameters():
        parameter.grad.mul_(0.5)


def halve_data(net: nn.Module) -> None:
    """No version of anything is another one after that."""
    for parameter in net.parameters():
        parameter.grad.data.mul_(0.5)


def replace(net: nn.Module) -> None:
    for parameter in net.parameters():
        parameter.grad = parameter.grad * 0.5


def zero(net: nn.Module) -> None:
    net.zero_grad(set_to_none=False)


def zero_data(net: nn.Module) -> None:
    for parameter in net.parameters():
        parameter.grad.data.zero_()


def add(net: nn.Module) -> None:
    for parameter in net.parameters():
        parameter.grad.add_(0.01)


def add_data(net: nn.Module) -> None:
    for parameter in net.parameters():
        parameter.grad.data.add_(0.01)


def turn(net: nn.Module) -> None:
    """Of the same norm as before."""
    for parameter in net.parameters():
        parameter.grad.data.neg_()


def reorder(net: nn.Module) -> None:
    """So is that, and it is no multiple."""
    for parameter in net.parameters():
        parameter.grad.data.copy_(parameter.grad.flip(0).clone())


def penalise(net: nn.Module) -> None:
    """A backward pass that does not lead through the model."""
    net[2].weight.square().sum().mul(0.01).backward()


def nothing(net: nn.Module) -> None:
    pass


def steps(
    between: Change, before: Change = nothing, after: Change = nothing, zeroes: bool = True, n: int = 3
) -> tuple[Watch, list[Tensor]]:
    """Of two backward passes each, and the gradient as each used it."""
    net, used = mlp(), []
    optimizer = torch.optim.SGD(net.parameters(), lr=0.0)
    with paramwatch.attach(net, uses=1) as watch:
        for _ in range(n):
            if zeroes:
                optimizer.zero_grad()
            before(net)
            loss(net, FIRST).backward()
            between(net)
            loss(net, SECOND).backward()
            after(net)
            used.append(net[2].weight.grad.double().clone())
            optimizer.step()
    assert not watch.recorder.splits.guard.failed  # type: ignore[union-attr]  # with `uses` there are splits
    return watch, used


def truth(factor: float) -> dict[str, Tensor]:
    """What the uses contribute to the second pass, and `factor` times what they contribute to the first."""
    found = {}
    for x, times in ((FIRST, factor), (SECOND, 1.0)):
        twin = mlp(tied=False)
        loss(twin, x).backward()
        for name in "24":
            found[name] = found.get(name, 0) + times * twin[int(name)].weight.grad.double()
    return found


def assert_parts(watch: Watch, step: int, parts: dict[str, Tensor], used: Tensor) -> None:
    """The frame has these parts of this gradient, and what is left of it as unattributed, if it is more than rounding."""
    frame = watch.uses().loc[(step, ROW)]
    missing = used - sum(parts.values())
    if missing.norm() > 1e-6 * used.norm():
        parts = {**parts, "(unattributed)": missing}
    assert dict(frame["use_norm"]) == near({name: float(part.norm()) for name, part in parts.items()})
    assert dict(frame["use_share"]) == near({name: float((part * used).sum() / used.square().sum()) for name, part in parts.items()})
    assert frame["use_share"].sum() == pytest.approx(1, abs=1e-6)


VERSIONED = {"halve": (halve, 0.5), "replace": (replace, 0.5), "zero": (zero, 0.0), "nothing": (nothing, 1.0)}
EXACT = VERSIONED | {"halve data": (halve_data, 0.5), "zero data": (zero_data, 0.0), "turn": (turn, -1.0)}


@pytest.mark.parametrize(("change", "factor"), EXACT.values(), ids=EXACT)
def test_a_gradient_that_is_multiplied_between_two_passes_is_split_as_it_is_used(change: Change, factor: float) -> None:
    watch, used = steps(change)

    for step in range(3):
        assert_parts(watch, step, truth(factor), used[step])
        assert set(watch.uses().loc[step]["mode"]) == {"full"}
    assert (watch.uses(parameters=ROW)["backwards"] == (2 if factor else 1)).all()


class Fighting(nn.Module):
    """Four uses that all but cancel: their sum is far smaller than what rounds in it; and a part of the gradient that is in no use."""

    def __init__(self, tied: bool, cast: bool = False, decay: float = 0.0) -> None:
        super().__init__()
        layer = nn.Linear(8, 8, bias=False)
        with torch.no_grad():
            layer.weight.copy_(torch.randn(8, 8, generator=torch.manual_seed(0)) / 3)
        self.layers = nn.ModuleList([layer if tied else copy.deepcopy(layer) for _ in range(4)])
        self.cast, self.decay = cast, decay

    def forward(self, x: Tensor) -> Tensor:
        a, b, c, d = self.layers
        with torch.autocast("cpu", torch.bfloat16, enabled=self.cast):
            return torch.tanh(b(torch.tanh(a(x)))).sum().float() - torch.tanh(d(torch.tanh(c(x * 1.001)))).sum().float()


@pytest.mark.parametrize("options", [{}, {"cast": True}, {"decay": 0.01}], ids=str)
@pytest.mark.parametrize("factor", [0.3, -1.0])
def test_a_factor_between_two_passes_is_one_in_the_first_split_step_too_where_uses_are_not_all_of_the_gradient(
    options: dict[str, Any], factor: float
) -> None:
    net, bare, twin = Fighting(True, **options), Fighting(True, **options), Fighting(False, **options)
    grads: list[Tensor] = []
    with paramwatch.attach(net, uses=1) as watch:
        for each in (net, bare, twin):
            optimizer = torch.optim.SGD(each.parameters(), lr=0.1)
            for seed in range(2):
                x = torch.randn(5, 8, generator=torch.manual_seed(seed))
                decays = each.decay * each.layers[0].weight.square().sum() if each is not twin else 0.0
                (each(x) + decays).backward()
                if not seed:
                    for parameter in each.parameters():
                        parameter.grad.data.mul_(factor)
            grads.append(each.layers[0].weight.grad.double().clone())
            optimizer.step()

    parts = torch.stack([layer.weight.grad.double() for layer in twin.layers])
    frame = watch.uses().loc[0].drop(index="(unattributed)", level="use", errors="ignore")
    close = pytest.approx if not options.get("cast") else partial(pytest.approx, rel=3e-2)
    assert set(frame["mode"]) == {"full"}
    assert list(frame["use_norm"]) == close(parts.norm(dim=(1, 2)).tolist())
    used = grads[0]
    share = 1 - float((parts.sum(0) * used).sum() / used.square().sum())
    assert watch.agreement()["unattributed"].iloc[0] == pytest.approx(share, abs=0.1 if options.get("cast") else 1e-3)
    assert not any("by a factor" in said for said in watch.findings["message"])
    assert all(map(torch.equal, net.parameters(), bare.parameters()))


@pytest.mark.parametrize("change", [add, add_data, reorder])
def test_what_is_added_between_two_passes_is_unattributed_and_said_once(change: Change, caplog: pytest.LogCaptureFixture) -> None:
    watch, used = steps(change)

    for step in range(3):
        assert_parts(watch, step, truth(1.0), used[step])
    assert set(watch.uses(parameters=ROW)["mode"]) == {"full, changed between"}
    (said,) = watch.findings["message"]
    assert "between two backward passes" in said
    assert "after the last" in said


def test_what_is_left_from_the_steps_before_is_unattributed_and_said_once() -> None:
    watch, used = steps(nothing, zeroes=False)

    for step in range(3):
        assert_parts(watch, step, truth(1.0), used[step])
        assert set(watch.uses().loc[step]["mode"]) == {"full, left over" if step else "full"}
    (said,) = watch.findings["message"]
    assert "before the first backward pass through the model" in said
    assert "zero_grad" in said


@pytest.mark.parametrize("budget", [None, 0])
@pytest.mark.parametrize("uses", [2, 6])
def test_what_is_left_is_unattributed_in_every_mode(budget: int | None, uses: int, monkeypatch: pytest.MonkeyPatch) -> None:
    if budget is not None:
        monkeypatch.setattr(watched, "LEAST_BUDGET", budget)
        monkeypatch.setattr(watched, "share_of_device", lambda device: 0)
    net, left = Chain(True, uses), torch.randn(4, 4, generator=torch.manual_seed(1))
    twin = Chain(False, uses)
    with paramwatch.attach(net, uses=1, uses_of="layer.weight") as watch:
        net.layer.weight.grad = left.clone()
        loss(net).backward()
        torch.optim.SGD(net.parameters(), lr=0.1).step()
    loss(twin).backward()

    grads = torch.stack([layer.weight.grad.double().flatten() for layer in twin.copies])  # type: ignore[union-attr]  # it is untied
    frame, row = watch.uses().loc[(0, "layer.weight")], watch.agreement().loc[(0, "layer.weight")]
    norms = [*grads.norm(dim=1).tolist(), float(left.norm())]
    assert list(frame["use_norm"]) == pytest.approx(norms, rel=1e-5)
    assert frame.index[-1] == "(unattributed)"
    assert all(mode.endswith(", left over") for mode in frame["mode"])
    summed = grads.sum(0)
    pairs = sum(norms[:-1]) ** 2 - float(grads.square().sum())
    assert row["agreement"] == pytest.approx(float(summed.square().sum() - grads.square().sum()) / pairs, rel=1e-4)
    assert row["residual"] == pytest.approx(float(left.norm() / (summed.view(4, 4) + left).norm()), rel=1e-5)
    assert "left over" not in watch.findings["message"][0]
    assert "before the first backward pass" in watch.findings["message"][0]


@pytest.mark.parametrize("place", ["before", "between", "after"])
def test_a_backward_pass_beside_the_model_is_a_part_of_the_gradient(place: str) -> None:
    watch, used = steps(**{"between": nothing, place: penalise})

    for step in range(3):
        assert_parts(watch, step, truth(1.0), used[step])
    (said,) = watch.findings["message"]
    assert "watch.root(loss)" in said


def test_on_a_device_nothing_is_asked_and_the_same_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where numbers stay on their device until the record is made."""
    monkeypatch.setattr(Tensor, "is_cpu", False)
    for change, factor in VERSIONED.values():
        watch, used = steps(change)
        for step in range(3):
            assert_parts(watch, step, truth(factor), used[step])
            assert set(watch.uses().loc[step]["mode"]) == {"full"}
        assert (watch.uses(parameters=ROW)["backwards"] == (2 if factor else 1)).all()


def clip_values(net: nn.Module) -> None:
    torch.nn.utils.clip_grad_value_(net.parameters(), 1e-3)


def clip_data(net: nn.Module) -> None:
    for parameter in net.parameters():
        parameter.grad.data.clamp_(-1e-3, 1e-3)


def add_by_numpy(net: nn.Module) -> None:
    for parameter in net.parameters():
        parameter.grad.numpy()[...] += 1


def decay_data(net: nn.Module) -> None:
    for parameter in net.parameters():
        parameter.grad.data.add_(parameter.data)


LATER = dict.fromkeys((add, add_data, clip_values, clip_data, add_by_numpy, decay_data), "full, changed later")
SCALED = dict.fromkeys((halve, halve_data, replace, nothing), "full")


@pytest.mark.parametrize(("change", "mode"), (LATER | SCALED).items())
@pytest.mark.parametrize("passes", [1, 2])
def test_what_is_done_to_a_gradient_after_the_last_pass_is_in_the_mode_unless_it_is_a_factor(
    change: Change, mode: str, passes: int
) -> None:
    net = mlp()
    with paramwatch.attach(net, uses=1) as watch:
        optimizer = torch.optim.SGD(net.parameters(), lr=0.0)
        for _ in range(2):
            optimizer.zero_grad()
            for _ in range(passes):
                loss(net).backward()
            change(net)
            optimizer.step()

    assert set(watch.uses(parameters=ROW)["mode"]) == {mode}
    shares = watch.uses(parameters=ROW)["use_share"].groupby("step").sum()
    assert list(shares) == pytest.approx([1, 1], abs=1e-6)


class Token:
    pass


@pytest.mark.parametrize("collects", [False, True])
def test_a_pass_beside_the_model_is_told_of_whether_or_not_garbage_was_collected_before_it(collects: bool) -> None:
    net, bare, used = mlp(), mlp(), []
    with paramwatch.attach(net, uses=1) as watch:
        for each in (net, bare):
            optimizer = torch.optim.SGD(each.parameters(), lr=0.1)
            for _ in range(2):
                optimizer.zero_grad()
                loss(each, FIRST).backward()
                if collects:
                    gc.collect()
                penalise(each)
                used.append(each[2].weight.grad.double().clone())
                optimizer.step()

    twin = mlp(tied=False)
    loss(twin, FIRST).backward()
    assert_parts(watch, 0, {name: twin[int(name)].weight.grad.double() for name in "24"}, used[0])
    (said,) = watch.findings["message"]
    assert "watch.root(loss)" in said
    assert all(map(torch.equal, net.parameters(), bare.parameters()))


def test_what_delivers_a_gradient_is_freed_when_its_step_is_over() -> None:
    """Without waiting for a collection: nothing that is called by it holds it."""
    net, freed = mlp(), []
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    with paramwatch.attach(net, uses=2):
        gc.disable()
        try:
            for _ in range(3):
                value = loss(net, FIRST)
                token = torch.autograd.graph.get_gradient_edge(net[2].weight).node.metadata["token"] = Token()
                freed.append(weakref.ref(token))
                del token
                value.backward()
                del value
                optimizer.step()
                assert [each() for each in freed] == [None] * len(freed)
        finally:
            gc.enable()


@pytest.mark.parametrize("beside", ["nothing", "decay", "hook"])
def test_where_only_norms_are_kept_what_is_in_no_use_makes_the_agreement_unknown_and_is_said(
    beside: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watched, "LEAST_BUDGET", 0)
    monkeypatch.setattr(watched, "share_of_device", lambda device: 0)
    net, bare, twin = Chain(True, 5), Chain(True, 5), Chain(False, 5)
    loss(twin).backward()
    with paramwatch.attach(net, uses=1, uses_of="layer.weight") as watch:
        for each in (net, bare):
            handle = each.layer.weight.register_hook(lambda grad: grad * 10) if beside == "hook" else None
            decay = 0.01 * each.layer.weight.square().sum() if beside == "decay" else 0.0
            (loss(each) + decay).backward()
            torch.optim.SGD(each.parameters(), lr=0.1).step()
            if handle is not None:
                handle.remove()

    frame, row = watch.uses(), watch.agreement().iloc[0]
    grads = torch.stack([layer.weight.grad.double().flatten() for layer in twin.copies])  # type: ignore[union-attr]  # it is untied
    norms = grads.norm(dim=1)
    assert list(frame["use_norm"][:5]) == pytest.approx(norms.tolist(), rel=1e-5)
    if beside == "nothing":
        apart = norms.sum() ** 2 - norms.square().sum()
        assert row["agreement"] == pytest.approx(float((grads.sum(0).square().sum() - norms.square().sum()) / apart), rel=1e-4)
        assert set(frame["mode"]) == {"norms"}
        assert watch.findings.empty
    else:
        assert row[["agreement", "coherence", "residual"]].isna().all()
        assert set(frame["mode"]) == {"norms, not all of it"}
        (said,) = watch.findings["message"]
        assert "how much is not known" in said
    assert all(map(torch.equal, net.parameters(), bare.parameters()))


class Queries(nn.Module):
    """An addition hands one gradient to both of its parameters; autograd may make it the `grad` of the one as it is."""

    def __init__(self, tied: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.query, self.first, self.out = nn.Parameter(torch.randn(8, 4)), nn.Parameter(torch.randn(8, 4)), nn.Linear(4, 4)
        self.second = self.first if tied else nn.Parameter(self.first.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.out(torch.tanh(self.out(self.query + self.first)) + self.second * x)
        return found


@pytest.mark.parametrize(("how", "budget"), [("twice", 1 << 20), ("hook", 1 << 20), ("hook", 0)])
def test_a_contribution_stays_what_it_was_when_its_memory_is_the_gradient_of_another_parameter(
    how: str, budget: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second pass adds to that gradient in place, and a hook on the other parameter multiplies it."""
    monkeypatch.setattr(watched, "LEAST_BUDGET", budget)
    monkeypatch.setattr(watched, "share_of_device", lambda device: 0)
    net, twin = Queries(True), Queries(False)
    watch = paramwatch.attach(net, uses=1)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.0)
    for each in (net, twin):
        if how == "hook":
            each.query.register_post_accumulate_grad_hook(scale)
        for x in (FIRST, 2 * SECOND)[: 2 if how == "twice" else 1]:
            each(x).square().mean().backward()
    optimizer.step()

    frame = watch.uses()
    assert frame["use_norm"].tolist() == pytest.approx([float(x.grad.norm()) for x in (twin.first, twin.second)], rel=1e-5)
    # where there is no room for a copy norms need none
    assert set(frame["mode"]) == {"full" if budget else "norms"}
    watch.close()


def scale(parameter: Tensor) -> None:
    parameter.grad.mul_(0.01)
