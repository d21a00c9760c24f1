"""One record for each step, with the gradient as the optimizer used it, whatever the loop does."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.optim.optimizer as torch_optimizer
from loops import LR, Truth, assert_recorded, loss_of, mlp, sgd
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_ as clip_norm_imported_before
from torch.nn.utils import clip_grad_value_ as clip_value_imported_before
from torch.optim import Optimizer

import paramwatch
from paramwatch import attached
from paramwatch.testing import ListSink

HOOKS = (torch_optimizer._global_optimizer_pre_hooks, torch_optimizer._global_optimizer_post_hooks)


@pytest.fixture(autouse=True)
def torch_without_hooks() -> Iterator[None]:
    """Watches go with their models, and leave nothing in torch."""
    yield
    for watch in tuple(attached.opened):
        watch.close()
    assert [len(hooks) for hooks in HOOKS] == [0, 0]


def train(optimizer: Optimizer, model: nn.Module, truth: Truth, steps: int = 3, before: Callable[[], object] = lambda: None) -> None:
    for i in range(steps):
        optimizer.zero_grad()
        loss_of(model, i).backward()
        before()
        with truth.sgd_step():
            optimizer.step()


# ---- which gradient -------------------------------------------------------------------------


@pytest.mark.parametrize("to_none", [True, False])
def test_a_parameter_without_a_gradient_is_told_from_one_whose_gradient_is_zero(to_none: bool) -> None:
    net = mlp()
    optimizer, watch = sgd(net), paramwatch.attach(net)
    loss_of(net).backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=to_none)
    net[0].weight.sum().backward()
    optimizer.step()

    states = watch.frame("grad_state").loc[1]
    assert states["0.weight"] == "used"
    assert set(states.drop("0.weight")) == {"none" if to_none else "zero"}
    assert watch.frame("grad_norm").loc[1, "0.bias"] == 0 or to_none


CLIPS = {
    "norm": lambda net: torch.nn.utils.clip_grad_norm_(net.parameters(), 0.1),
    "norm_foreach": lambda net: torch.nn.utils.clip_grad_norm_(net.parameters(), 0.1, foreach=True),
    "value": lambda net: torch.nn.utils.clip_grad_value_(net.parameters(), 0.01),
}


def test_a_rate_that_is_a_tensor_is_recorded_as_it_was_at_each_step() -> None:
    net = mlp()
    rate = torch.tensor(0.5)
    optimizer, watch = torch.optim.Adam(net.parameters(), lr=rate), paramwatch.attach(net)
    for i in range(3):
        loss_of(net, i).backward()
        optimizer.step()
        rate.mul_(0.5)

    assert list(watch.steps["lr"]) == [0.5, 0.25, 0.125]


# ---- closures -------------------------------------------------------------------------------


def closure_of(net: nn.Module, optimizer: Optimizer, i: int) -> Callable[[], Tensor]:
    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = loss_of(net, i)
        loss.backward()
        return loss

    return closure


def test_of_the_evaluations_of_lbfgs_the_last_one_counts() -> None:
    net = mlp()
    optimizer, watch = torch.optim.LBFGS(net.parameters(), max_iter=3), paramwatch.attach(net, update="exact")
    truth, counts = Truth(net), []
    for i in range(3):
        evaluations = Truth(net)

        def closure(i: int = i, evaluations: Truth = evaluations) -> Tensor:
            loss = closure_of(net, optimizer, i)()
            evaluations.take()
            return loss

        optimizer.step(closure)
        truth.grads.append(evaluations.grads[-1])
        counts.append(len(evaluations.grads))

    assert counts[0] > 1
    assert_recorded(watch, truth)
    assert list(watch.steps["evaluations"]) == counts


@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt])
def test_a_closure_that_raises_leaves_nothing_and_the_next_step_is_right(error: type[BaseException]) -> None:
    net = mlp()
    truth, optimizer, watch = Truth(net), sgd(net), paramwatch.attach(net)
    train(optimizer, net, truth, steps=2)

    def failing() -> Tensor:
        closure_of(net, optimizer, 7)()
        raise error("mine")

    with pytest.raises(error, match=r"^mine$"):
        optimizer.step(failing)

    assert not optimizer._optimizer_step_pre_hooks
    train(optimizer, net, truth, steps=2)
    assert_recorded(watch, truth)


def test_a_step_that_raises_is_no_step() -> None:
    net = mlp()
    truth, optimizer, watch = Truth(net), sgd(net), paramwatch.attach(net)

    def failing(*_: Any) -> None:
        raise ZeroDivisionError

    handle = optimizer.register_step_pre_hook(failing)
    with pytest.raises(ZeroDivisionError):
        optimizer.step()
    handle.remove()

    train(optimizer, net, truth)
    assert not optimizer._optimizer_step_pre_hooks
    assert_recorded(watch, truth)


# ---- steps inside steps ---------------------------------------------------------------------


class TwoPasses(Optimizer):
    """Sharpness-aware: climbs along the gradient, evaluates there, goes back and lets its base optimizer step."""

    def __init__(self, params: Any, base: Callable[..., Optimizer]) -> None:
        super().__init__(params, {"rho": 0.5})
        self.base = base(self.param_groups)

    def step(self, closure: Callable[[], Tensor]) -> None:
        with torch.enable_grad():
            closure()
        params = [p for group in self.param_groups for p in group["params"]]
        with torch.no_grad():
            climbed = [p.grad.mul(0.5) for p in params]
            torch._foreach_add_(params, climbed)
        with torch.enable_grad():
            closure()
        with torch.no_grad():
            torch._foreach_sub_(params, climbed)
        self.base.step()


def test_a_two_pass_optimizer_makes_one_step_with_the_gradient_of_its_base() -> None:
    net = mlp()
    optimizer = TwoPasses(net.parameters(), lambda groups: torch.optim.SGD(groups, lr=LR))
    truth, watch = Truth(net), paramwatch.attach(net, update="exact")
    for i in range(3):
        before = [p.detach().clone() for p in net.parameters()]
        optimizer.step(closure_of(net, optimizer, i))
        truth.take()
        moved = [float((p.detach() - old).norm()) for p, old in zip(net.parameters(), before, strict=True)]
        np.testing.assert_allclose(watch.frame("update_norm").loc[i], moved, rtol=1e-6)
        np.testing.assert_allclose(watch.frame("param_norm").loc[i], [float(old.norm()) for old in before], rtol=1e-6)

    assert_recorded(watch, truth)
    assert list(watch.steps["evaluations"]) == [2, 2, 2]


# ---- rounds of several optimizers -----------------------------------------------------------


def pair() -> tuple[nn.ModuleDict, Optimizer, Optimizer]:
    """A generator and a critic in one module, and their optimizers."""
    both = nn.ModuleDict({"critic": mlp(0), "generator": mlp(1)})
    return both, sgd(both["critic"]), sgd(both["generator"])


def adversarial(both: nn.ModuleDict, critic: Optimizer, generator: Optimizer, truth: Truth, pattern: str) -> None:
    """Step the critic (c) and the generator (g); each letter is one step, each space ends a round of the truth."""
    for i, letters in enumerate(pattern.split()):
        with truth.sgd_step():
            for letter in letters:
                optimizer, name = (critic, "critic") if letter == "c" else (generator, "generator")
                optimizer.zero_grad()
                loss_of(both[name], i).backward()
                optimizer.step()


@pytest.mark.parametrize("pattern", ["cg cg cg", "c c c c cg c c c c cg", "cg c g", "g gc gc c"])
def test_a_round_ends_when_an_optimizer_steps_that_does_not_come_after_the_last(pattern: str) -> None:
    both, critic, generator = pair()
    truth, sink = Truth(both), ListSink()
    watch = paramwatch.attach(both, sinks=[sink])
    adversarial(both, critic, generator, truth, pattern)

    if pattern == "cg c g":
        # the last two steps are one round
        truth.grads[1:] = [truth.grads[1] | truth.grads[2]]
    assert_recorded(watch, truth)
    assert [record.step for record in sink.records] == list(range(len(truth.grads)))


def toggled(both: nn.ModuleDict, critic: Optimizer, generator: Optimizer, truth: Truth, rounds: int) -> None:
    """The idiom of adversarial training: what does not step just now is frozen."""
    for i in range(rounds):
        with truth.sgd_step():
            for optimizer, name, other in ((critic, "critic", "generator"), (generator, "generator", "critic")):
                both[name].requires_grad_(True)
                both[other].requires_grad_(False)
                optimizer.zero_grad()
                (loss_of(both["critic"], i) + loss_of(both["generator"], i)).backward()
                optimizer.step()


def test_freezing_in_turns_makes_one_record_a_round_and_a_handful_of_files(tmp_path: Path) -> None:
    both, critic, generator = pair()
    truth, sink = Truth(both), ListSink()
    with paramwatch.attach(both, tmp_path, sinks=[sink]) as watch:
        toggled(both, critic, generator, truth, rounds=40)
        assert watch.parameters["trainable"].sum() == 4

    assert_recorded(watch, truth)
    assert len(sink.records) <= 41
    assert len(list((tmp_path / "paramwatch").glob("*.arrow"))) <= 6
    assert (watch.frame("grad_state") == "used").all(axis=None)
    assert {row.trainable for row in sink.records[-1].inventory.rows} == {True}


def test_a_row_without_a_gradient_is_frozen_or_not_as_it_was_when_it_stepped() -> None:
    net = mlp()
    optimizer, watch = sgd(net), paramwatch.attach(net)
    for frozen in (False, True, False):
        net[0].requires_grad_(not frozen)
        optimizer.zero_grad()
        (net[2](torch.ones(1, 4, dtype=torch.float64))).sum().backward()
        optimizer.step()
        net[0].requires_grad_(frozen)

    assert list(watch.frame("grad_state")["0.weight"]) == ["none", "frozen", "none"]


def test_reading_in_the_middle_of_a_round_does_not_use_up_its_number() -> None:
    both, critic, generator = pair()
    sink = ListSink()
    watch = paramwatch.attach(both, sinks=[sink])
    loss_of(both["critic"]).backward()
    loss_of(both["generator"]).backward()
    truth = Truth(both)
    with truth.sgd_step():
        critic.step()
        assert list(watch.frame().index.unique("step")) == [0]
        assert watch.frame("grad_norm").filter(like="generator").isna().all(axis=None)
        generator.step()

    assert_recorded(watch, truth)
    assert [record.step for record in sink.records] == [0, 0]
    assert len(watch.steps) == 1


def test_every_counts_the_steps_of_each_optimizer() -> None:
    both, critic, generator = pair()
    watch = paramwatch.attach(both, every=3)
    adversarial(both, critic, generator, Truth(both), "c c c c cg " * 4)

    norms = watch.frame("grad_norm")
    seen = {name: [int(step) for step in norms.index[norms[f"{name}.0.weight"].notna()]] for name in ("critic", "generator")}
    assert seen == {"critic": [0, 3, 6, 9, 12, 15, 18], "generator": [4, 19]}


def test_two_models_trained_in_two_threads_do_not_mix() -> None:
    nets = [mlp(0), mlp(1)]
    truths = [Truth(net) for net in nets]
    watches = [paramwatch.attach(net) for net in nets]
    start = threading.Barrier(2)

    def run(net: nn.Module, truth: Truth) -> None:
        optimizer = sgd(net)
        start.wait()
        train(optimizer, net, truth, steps=20)

    threads = [threading.Thread(target=run, args=pair) for pair in zip(nets, truths, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    for watch, truth in zip(watches, truths, strict=True):
        assert_recorded(watch, truth)
        watch.close()


# ---- rows that do not step, and rows that change --------------------------------------------


def test_a_row_that_is_frozen_in_the_middle_of_a_run_is_recorded_as_frozen() -> None:
    net = mlp()
    truth, optimizer, watch = Truth(net), sgd(net), paramwatch.attach(net)
    train(optimizer, net, truth, steps=2)
    net[0].requires_grad_(False)
    train(optimizer, net, truth, steps=2)

    assert_recorded(watch, truth)
    states = watch.frame("grad_state")["0.weight"]
    assert list(states) == ["used", "used", "frozen", "frozen"]
    assert watch.frame("param_norm")["0.weight"].notna().all()


# ---- optimizers that torch's hooks cannot see -----------------------------------------------


class Foreign:
    """No `torch.optim.Optimizer`, so nothing fires."""

    def __init__(self, params: Any) -> None:
        self.param_groups = [{"params": list(params), "lr": LR}]

    def step(self) -> None:
        with torch.no_grad():
            for param in self.param_groups[0]["params"]:
                param.sub_(param.grad, alpha=LR)


@pytest.mark.parametrize("named", [True, False])
def test_watch_step_records_an_optimizer_that_hooks_cannot_see(named: bool) -> None:
    net = mlp()
    optimizer, truth, watch = Foreign(net.parameters()), Truth(net), paramwatch.attach(net, update="exact")
    for i in range(3):
        net.zero_grad()
        loss_of(net, i).backward()
        with truth.sgd_step(), watch.step(optimizer if named else None):
            optimizer.step()

    assert_recorded(watch, truth)
    np.testing.assert_allclose(watch.frame("update_norm"), LR * truth.norms(), rtol=1e-6)
    assert watch.frame("lr").notna().all(axis=None) == named


@pytest.mark.parametrize("named", [True, False])
def test_watch_step_around_an_optimizer_that_hooks_see_changes_nothing(named: bool) -> None:
    net = mlp()
    optimizer, truth, watch = sgd(net), Truth(net), paramwatch.attach(net)
    for i in range(4):
        closure = closure_of(net, optimizer, i)
        with truth.sgd_step(), watch.step(optimizer if named else None):
            optimizer.step(closure)
    train(optimizer, net, truth, steps=2)

    assert_recorded(watch, truth)
    assert (watch.frame("lr") == LR).all(axis=None)


def test_watch_step_records_nothing_when_the_block_raises() -> None:
    net = mlp()
    optimizer, truth, watch = Foreign(net.parameters()), Truth(net), paramwatch.attach(net)
    with pytest.raises(ZeroDivisionError), watch.step(optimizer):
        raise ZeroDivisionError

    loss_of(net).backward()
    with truth.sgd_step(), watch.step(optimizer):
        optimizer.step()
    assert_recorded(watch, truth)


# ---- gradients before clipping --------------------------------------------------------------

RAW_CLIPS = {
    "norm": lambda net: torch.nn.utils.clip_grad_norm_(net.parameters(), 0.1),
    "value": lambda net: torch.nn.utils.clip_grad_value_(net.parameters(), 0.01),
    "norm_imported_before": lambda net: clip_norm_imported_before(net.parameters(), 0.1),
    "value_imported_before": lambda net: clip_value_imported_before(net.parameters(), 0.01),
    "norm_then_value": lambda net: (CLIPS["norm"](net), CLIPS["value"](net)),
    "look_first": lambda net: (torch.nn.utils.get_total_norm([p.grad for p in net.parameters()]), CLIPS["norm"](net)),
}


@pytest.mark.parametrize("clip", RAW_CLIPS.values(), ids=RAW_CLIPS)
def test_raw_gradients_are_those_before_torchs_clip_functions(clip: Callable[[nn.Module], object]) -> None:
    net = mlp()
    raw, used, optimizer = Truth(net), Truth(net), sgd(net)
    watch = paramwatch.attach(net, raw_gradients=True)
    train(optimizer, net, used, before=lambda: (raw.take(), clip(net)))

    assert_recorded(watch, used)
    np.testing.assert_allclose(watch.frame("grad_raw_norm"), raw.norms(), rtol=1e-6)
    np.testing.assert_allclose(watch.frame("clip_coef"), used.norms() / raw.norms(), rtol=1e-5)
    assert (watch.steps["clip_coef"] < 1).all()


def test_where_nothing_was_clipped_raw_is_what_was_used() -> None:
    net = mlp()
    watch = paramwatch.attach(net, raw_gradients=True)
    train(sgd(net), net, Truth(net))

    assert watch.frame("grad_raw_norm").equals(watch.frame("grad_norm"))
    assert (watch.frame("clip_coef") == 1).all(axis=None)


def test_looking_at_the_total_norm_is_no_clipping() -> None:
    net = mlp()

    def look_and_halve() -> None:
        grads = [p.grad for p in net.parameters()]
        torch.nn.utils.get_total_norm(grads)
        torch._foreach_mul_(grads, 0.5)

    watch = paramwatch.attach(net, raw_gradients=True)
    train(sgd(net), net, Truth(net), before=look_and_halve)

    assert (watch.frame("clip_coef") == 1).all(axis=None)


def test_without_raw_gradients_the_columns_are_there_and_null() -> None:
    net = mlp()
    watch = paramwatch.attach(net)
    train(sgd(net), net, Truth(net), before=lambda: CLIPS["norm"](net))

    assert watch.frame()[["grad_raw_norm", "clip_coef"]].isna().all(axis=None)
    assert watch.steps[["grad_raw_norm", "clip_coef"]].isna().all(axis=None)


@pytest.mark.parametrize("to_none", [True, False], ids=["to none", "to zero"])
@pytest.mark.parametrize("clip", ["always", "only the first"])
@pytest.mark.parametrize("by", [CLIPS["norm"], CLIPS["value"]], ids=["norm", "value"])
def test_a_clipped_gradient_that_is_thrown_away_is_not_the_raw_one_of_the_next_step(
    by: Callable[[nn.Module], object], clip: str, to_none: bool
) -> None:
    net = mlp()
    raw, used, optimizer, watch = Truth(net), Truth(net), sgd(net), paramwatch.attach(net, raw_gradients=True)
    for i in range(6):
        optimizer.zero_grad(set_to_none=to_none)
        (loss_of(net, i) * (1000 if i % 2 == 0 else 1)).backward()
        thrown_away = i % 2 == 0
        raw.take()
        if clip == "always" or thrown_away:
            by(net)
        if not thrown_away:
            with used.sgd_step():
                optimizer.step()

    assert_recorded(watch, used)
    # what is set to zero and added to could be a clipped micro-batch that is added to
    known = 1.0 if clip == "always" or to_none else np.nan
    np.testing.assert_allclose(watch.frame("grad_raw_norm"), raw.norms()[1::2] * known, rtol=1e-6)


@pytest.mark.parametrize("to_none", [True, False], ids=["to none", "to zero"])
@pytest.mark.parametrize("left_out", [(1,), (0, 1, 2)], ids=str)
def test_raw_gradients_of_a_step_that_a_scaler_left_out_are_not_those_of_the_next(left_out: tuple[int, ...], to_none: bool) -> None:
    net = mlp(dtype=torch.float32)
    raw, optimizer, scaler = Truth(net), sgd(net), torch.amp.GradScaler("cpu", init_scale=1024.0)
    watch = paramwatch.attach(net, raw_gradients=True)
    for i in range(5):
        optimizer.zero_grad(set_to_none=to_none)
        scaler.scale(loss_of(net, i) * (float("inf") if i in left_out else 1.0)).backward()
        scaler.unscale_(optimizer)
        if i not in left_out:
            raw.take()
        CLIPS["norm"](net)
        scaler.step(optimizer)
        scaler.update()

    np.testing.assert_allclose(watch.frame("grad_raw_norm"), raw.norms(), rtol=1e-5)
    assert (watch.steps["clip_coef"] < 1).all()


@pytest.mark.parametrize("foreach", [True, False], ids=["foreach", "one by one"])
def test_of_several_clippings_the_first_one_sees_the_raw_gradient(foreach: bool) -> None:
    net = mlp()

    def clip() -> None:
        raw.take()
        torch.nn.utils.clip_grad_value_(net.parameters(), 0.05, foreach=foreach)
        torch.nn.utils.clip_grad_norm_(net.parameters(), 0.1, foreach=foreach)
        torch.nn.utils.clip_grad_value_(net.parameters(), 0.01, foreach=foreach)

    raw, used, watch = Truth(net), Truth(net), paramwatch.attach(net, raw_gradients=True)
    train(sgd(net, foreach=foreach), net, used, before=clip)

    assert_recorded(watch, used)
    np.testing.assert_allclose(watch.frame("grad_raw_norm"), raw.norms(), rtol=1e-6)


def test_raw_gradients_with_nesterov_and_foreach_which_changes_gradients_in_its_step() -> None:
    net = mlp()
    optimizer = sgd(net, momentum=0.9, nesterov=True, foreach=True)
    raw, watch = Truth(net), paramwatch.attach(net, raw_gradients=True)
    for i in range(3):
        optimizer.zero_grad(set_to_none=False)
        loss_of(net, i).backward()
        raw.take()
        CLIPS["norm"](net)
        optimizer.step()

    np.testing.assert_allclose(watch.frame("grad_raw_norm"), raw.norms(), rtol=1e-6)


def test_raw_gradients_with_a_closure_are_those_of_its_last_evaluation() -> None:
    net = mlp()
    optimizer = torch.optim.LBFGS(net.parameters(), max_iter=3)
    raw, watch = Truth(net), paramwatch.attach(net, raw_gradients=True)
    for i in range(2):
        evaluations = Truth(net)

        def closure(i: int = i, evaluations: Truth = evaluations) -> Tensor:
            loss = closure_of(net, optimizer, i)()
            evaluations.take()
            CLIPS["norm"](net)
            return loss

        optimizer.step(closure)
        raw.grads.append(evaluations.grads[-1])

    np.testing.assert_allclose(watch.frame("grad_raw_norm"), raw.norms(), rtol=1e-6)


def test_no_gradient_is_kept_alive_between_its_clipping_and_the_step() -> None:
    net = mlp()
    watch = paramwatch.attach(net, raw_gradients=True)
    loss_of(net).backward()
    CLIPS["norm"](net)
    grad = weakref.ref(net[0].weight.grad)
    net.zero_grad()

    assert grad() is None
    watch.close()


def test_raw_gradients_of_a_step_that_is_not_measured_are_not_those_of_the_next() -> None:
    net = mlp()
    raw, watch = Truth(net), paramwatch.attach(net, raw_gradients=True, every=2)
    train(sgd(net), net, Truth(net), steps=5, before=lambda: (raw.take(), CLIPS["norm"](net)))

    np.testing.assert_allclose(watch.frame("grad_raw_norm"), raw.norms()[::2], rtol=1e-6)


def test_clipping_all_gradients_is_no_measurement_of_rows_that_do_not_step() -> None:
    both, critic, generator = pair()
    watch = paramwatch.attach(both, raw_gradients=True)
    for name in both:
        loss_of(both[name]).backward()
    CLIPS["norm"](both)
    critic.step()
    critic.step()
    generator.step()

    raw = watch.frame("grad_raw_norm")
    assert raw.filter(like="generator").isna().all(axis=1).tolist() == [True, False]
    assert raw.filter(like="critic").notna().all(axis=None)
