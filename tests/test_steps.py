"""One record for each step, with the gradient as the optimizer used it, whatever the loop does."""

from __future__ import annotations

import gc
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
from paramwatch.rounds import Rounds
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


def test_a_plain_loop_gives_one_record_a_step() -> None:
    net = mlp()
    truth, optimizer = Truth(net), sgd(net)
    with paramwatch.attach(net) as watch:
        train(optimizer, net, truth, steps=5)

    assert_recorded(watch, truth)
    assert (watch.frame("lr") == LR).all(axis=None)


def test_parameters_are_those_of_the_entry_and_updates_those_of_the_step() -> None:
    net = mlp()
    optimizer = sgd(net)
    watch = paramwatch.attach(net, update="exact")
    before = [float(p.detach().norm()) for p in net.parameters()]
    train(optimizer, net, truth := Truth(net), steps=1)

    np.testing.assert_allclose(watch.frame("param_norm").loc[0], before, rtol=1e-6)
    np.testing.assert_allclose(watch.frame("update_norm").loc[0], LR * truth.norms()[0], rtol=1e-6)


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


def test_accumulated_gradients_are_recorded_as_their_sum() -> None:
    net = mlp()
    truth, optimizer, watch = Truth(net), sgd(net), paramwatch.attach(net)
    for i in range(9):
        loss_of(net, i).backward()
        if i % 3 == 2:
            with truth.sgd_step():
                optimizer.step()
            optimizer.zero_grad()

    assert len(truth.grads) == 3
    assert_recorded(watch, truth)


CLIPS = {
    "norm": lambda net: torch.nn.utils.clip_grad_norm_(net.parameters(), 0.1),
    "norm_foreach": lambda net: torch.nn.utils.clip_grad_norm_(net.parameters(), 0.1, foreach=True),
    "value": lambda net: torch.nn.utils.clip_grad_value_(net.parameters(), 0.01),
}


@pytest.mark.parametrize("clip", CLIPS.values(), ids=CLIPS)
def test_clipped_gradients_are_recorded_clipped(clip: Callable[[nn.Module], object]) -> None:
    net = mlp()
    truth, optimizer, watch = Truth(net), sgd(net), paramwatch.attach(net)
    train(optimizer, net, truth, before=lambda: clip(net))

    assert truth.norms().max() < 0.2
    assert_recorded(watch, truth)


def test_clipping_in_the_optimizers_own_pre_hook_is_seen() -> None:
    net = mlp()
    truth, optimizer, watch = Truth(net), sgd(net), paramwatch.attach(net)
    optimizer.register_step_pre_hook(lambda *_: CLIPS["norm"](net) and None)
    train(optimizer, net, truth)

    assert truth.norms().max() < 0.2
    assert_recorded(watch, truth)
    assert len(optimizer._optimizer_step_pre_hooks) == 1


def test_clipping_in_a_global_pre_hook_registered_after_ours_is_seen() -> None:
    net = mlp()
    truth, optimizer, watch = Truth(net), sgd(net), paramwatch.attach(net)
    handle = torch_optimizer.register_optimizer_step_pre_hook(lambda *_: CLIPS["norm"](net) and None)
    try:
        train(optimizer, net, truth)
    finally:
        handle.remove()

    assert truth.norms().max() < 0.2
    assert_recorded(watch, truth)
    assert not optimizer._optimizer_step_pre_hooks


def test_nesterov_with_foreach_which_changes_gradients_in_its_step() -> None:
    net = mlp()
    optimizer = sgd(net, momentum=0.9, nesterov=True, foreach=True)
    truth, watch = Truth(net), paramwatch.attach(net)
    changed = []
    for i in range(3):
        optimizer.zero_grad()
        loss_of(net, i).backward()
        truth.take()
        optimizer.step()
        changed.append(not torch.equal(net[0].weight.grad, truth.grads[-1]["0.weight"]))

    assert any(changed)
    assert_recorded(watch, truth)


FUSED = ("SGD", "Adam", "AdamW", "Adagrad")


@pytest.mark.parametrize("name", FUSED)
def test_fused_optimizers_on_the_cpu(name: str) -> None:
    net = mlp()
    optimizer = getattr(torch.optim, name)(net.parameters(), lr=LR, fused=True)
    truth, watch = Truth(net), paramwatch.attach(net, update="exact")
    for i in range(3):
        optimizer.zero_grad()
        loss_of(net, i).backward()
        truth.take()
        optimizer.step()

    assert_recorded(watch, truth)
    assert (watch.frame("update_norm") > 0).all(axis=None)


def test_every_fused_optimizer_is_tried() -> None:
    def takes_fused(optimizer: type[Optimizer]) -> bool:
        return "fused" in optimizer.__init__.__code__.co_varnames

    found = {name for name, kind in vars(torch.optim).items() if isinstance(kind, type) and takes_fused(kind)}
    assert found == set(FUSED)


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


@pytest.mark.parametrize("keyword", [False, True])
def test_with_a_closure_the_gradient_is_the_one_it_computed(keyword: bool) -> None:
    net = mlp()
    truth, optimizer, watch = Truth(net), sgd(net), paramwatch.attach(net)
    for i in range(3):
        closure = closure_of(net, optimizer, i)
        with truth.sgd_step():
            loss = optimizer.step(closure=closure) if keyword else optimizer.step(closure)
        assert isinstance(loss, Tensor)

    assert_recorded(watch, truth)
    assert list(watch.steps["evaluations"]) == [1, 1, 1]


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


class Twice(torch.optim.SGD):
    """A subclass that calls its parent's `step`, whose hooks fire as well."""

    def step(self, closure: Any = None) -> Any:
        return super().step(closure)


@pytest.mark.parametrize("with_closure", [False, True])
def test_a_subclass_that_calls_its_parents_step_makes_one_step(with_closure: bool) -> None:
    net = mlp()
    torch.optim.SGD(mlp().parameters())  # torch patches a class when it is first instantiated
    optimizer = Twice(net.parameters(), lr=LR)
    truth, watch = Truth(net), paramwatch.attach(net)
    for i in range(3):
        closure = closure_of(net, optimizer, i)
        if not with_closure:
            closure()
        with truth.sgd_step():
            optimizer.step(closure if with_closure else None)

    assert_recorded(watch, truth)


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


def test_one_optimizer_for_each_layer_makes_one_record_a_round() -> None:
    net = mlp()
    optimizers, truth, watch = [sgd(net[0]), sgd(net[2])], Truth(net), paramwatch.attach(net)
    for i in range(3):
        net.zero_grad()
        loss_of(net, i).backward()
        with truth.sgd_step():
            for optimizer in optimizers:
                optimizer.step()

    assert_recorded(watch, truth)


def test_optimizers_that_step_inside_backward_make_one_record_a_round() -> None:
    net = mlp()
    watch, optimizers = paramwatch.attach(net), {p: sgd([p]) for p in net.parameters()}

    def step_now(param: Tensor) -> None:
        optimizers[param].step()
        param.grad = None

    for param in net.parameters():
        param.register_post_accumulate_grad_hook(step_now)
    truth = Truth(net)
    for i in range(3):
        with truth.sgd_step():
            loss_of(net, i).backward()

    assert_recorded(watch, truth)


def test_an_optimizer_made_anew_goes_on_with_the_next_step() -> None:
    net = mlp()
    truth, watch = Truth(net), paramwatch.attach(net)
    for _ in range(3):
        train(sgd(net), net, truth, steps=2)

    assert_recorded(watch, truth)


def test_what_is_known_of_optimizers_and_tensors_that_are_gone_does_not_pile_up() -> None:
    net = mlp()
    rounds = Rounds(0, {id(param) for param in net.parameters()}.__contains__)
    kept = []
    for _ in range(20):
        strangers = [torch.zeros(1) for _ in range(5)]
        kept.append(strangers)
        rounds.take(sgd([*net.parameters(), *strangers]))
        gc.collect()

    assert len(rounds._known) <= 2
    assert len(rounds._place_of) <= 4 + 2 * 5
    assert rounds.step == 19


def test_optimizers_that_take_turns_over_the_same_parameters_make_one_step_each() -> None:
    net = mlp()
    truth, watch, optimizers = Truth(net), paramwatch.attach(net), [sgd(net), sgd(net)]
    for i in range(6):
        train(optimizers[i % 2], net, truth, steps=1)

    assert_recorded(watch, truth)


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


# ---- mixed precision ------------------------------------------------------------------------


def amp_loop(net: nn.Module, optimizer: Optimizer, truth: Truth, *, infinite_at: int | None = None, clip: bool = False) -> None:
    """Four steps under a `GradScaler`; the truth holds what a step that was made has used."""
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for i in range(4):
        optimizer.zero_grad()
        loss = loss_of(net, i) * (float("inf") if i == infinite_at else 1.0)
        scaler.scale(loss).backward()
        if clip:
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(net.parameters(), 0.1)
        with truth.sgd_step():
            scaler.step(optimizer)
        scaler.update()


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("fused", [False, True])
def test_gradients_under_a_grad_scaler_are_without_the_scale(fused: bool, clip: bool) -> None:
    net = mlp(dtype=torch.float32)
    truth, watch = Truth(net), paramwatch.attach(net)
    amp_loop(net, sgd(net, fused=fused), truth, clip=clip)

    # the update of a float32 parameter is known to its rounding
    assert_recorded(watch, truth, rtol=1e-4)
    assert (watch.steps["amp_scale"].dropna() == 1024).all()
    assert watch.steps["amp_scale"].notna().all() == (fused and not clip)


def test_a_step_that_a_fused_optimizer_skips_is_a_record_without_an_update() -> None:
    net = mlp(dtype=torch.float32)
    truth, watch = Truth(net), paramwatch.attach(net)
    amp_loop(net, sgd(net, fused=True), truth, infinite_at=1)

    assert list(watch.steps["skipped"]) == [False, True, False, False]
    assert list(watch.steps["amp_scale"]) == [1024, 1024, 512, 512]
    updates = watch.frame("update_norm").notna()
    assert list(updates.all(axis=1)) == list(updates.any(axis=1)) == [True, False, True, True]
    assert watch.findings.empty


def test_a_step_that_an_ordinary_optimizer_skips_is_no_step() -> None:
    net = mlp(dtype=torch.float32)
    truth, watch = Truth(net), paramwatch.attach(net)
    amp_loop(net, sgd(net), truth, infinite_at=1)

    assert truth.grads.pop(1) == {}
    assert_recorded(watch, truth, rtol=1e-4)


# ---- rows that do not step, and rows that change --------------------------------------------


def test_rows_of_no_optimizer_are_measured_at_the_first_step_at_powers_of_two_and_at_close() -> None:
    net = mlp()
    watch = paramwatch.attach(net)
    train(sgd(net[2]), net, Truth(net), steps=12)
    watch.close()

    frame = watch.frame(parameters="0.weight").droplevel("parameter")
    assert list(frame.index[frame["param_norm"].notna()]) == [0, 1, 2, 4, 8, 11]
    assert frame["grad_norm"].isna().all()
    assert set(frame["grad_state"]) == {"unowned"}
    assert not watch.parameters.loc["0.weight", "owned"]


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


def test_parameters_added_to_the_optimizer_later_are_recorded_from_then_on() -> None:
    net = mlp()
    truth, optimizer, watch = Truth(net), sgd(net[2]), paramwatch.attach(net)
    train(optimizer, net, truth, steps=2)
    optimizer.add_param_group({"params": list(net[0].parameters()), "lr": LR})
    train(optimizer, net, truth, steps=2)

    assert_recorded(watch, truth)
    assert watch.parameters["owned"].all()


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


# ---- compiled -------------------------------------------------------------------------------


def test_a_compiled_model_is_recorded_at_every_step_under_its_own_names() -> None:
    net = mlp()
    compiled = torch.compile(net, backend="eager")
    truth, optimizer, watch = Truth(net), sgd(net), paramwatch.attach(compiled)
    train(optimizer, compiled, truth)

    assert_recorded(watch, truth)
    assert list(watch.parameters.index) == [name for name, _ in net.named_parameters()]


# what dynamo does to itself when it traces an optimizer, and a loss
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize("with_closure", [False, True])
def test_a_compiled_step_is_recorded_every_time(with_closure: bool) -> None:
    net = mlp()
    truth, optimizer, watch = Truth(net), sgd(net), paramwatch.attach(net)
    step = torch.compile(lambda *closure: optimizer.step(*closure), backend="eager")
    for i in range(4):
        closure = closure_of(net, optimizer, i)
        if not with_closure:
            closure()
        with truth.sgd_step():
            step(*([closure] if with_closure else []))

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
    np.testing.assert_allclose(watch.frame("grad_raw_norm"), raw.norms()[1::2], rtol=1e-6)


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
