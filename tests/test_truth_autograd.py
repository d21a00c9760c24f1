"""The truth harness over what autograd can do besides a plain backward, under whatever the user has set in torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import pytest
import torch
from harness import Lab, Loop, verify
from loops import loss_of, mlp, sgd
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

Gradients = Callable[[nn.Sequential, int], None]
"""Leaves the gradients of a batch on a net whose gradients are not there yet."""


def loop_of(gradients: Gradients, prepare: Callable[[nn.Sequential], object] = lambda net: None) -> Loop:
    """A loop of plain SGD whose gradients come about in this way."""

    def loop(lab: Lab) -> None:
        net = mlp()
        optimizer = sgd(net)
        prepare(net)
        lab.attach(net)
        for i in range(3):
            optimizer.zero_grad()
            gradients(net, i)
            lab.losses.append(loss_of(net, i).item())
            with lab.by_update(optimizer):
                optimizer.step()

    return loop


def batch(i: int) -> Tensor:
    return torch.randn(5, 3, generator=torch.Generator().manual_seed(i), dtype=torch.float64)


# ---- ways to a gradient -----------------------------------------------------------------------


def a_penalty_on_the_slope_of_a_critic(net: nn.Sequential, i: int) -> None:
    x = batch(i).requires_grad_()
    score = net(x)
    (slope,) = torch.autograd.grad(score.sum(), x, create_graph=True)
    (score.mean() + 10 * (slope.norm(2, dim=1) - 1).square().mean()).backward()


def a_penalty_on_the_gradients_of_the_parameters(net: nn.Sequential, i: int) -> None:
    params = list(net.parameters())
    loss = loss_of(net, i)
    slopes = torch.autograd.grad(loss, params, create_graph=True)
    (loss + sum(slope.square().sum() for slope in slopes)).backward()


def gradients_that_hold_a_graph(net: nn.Sequential, i: int) -> None:
    for param, slope in zip(net.parameters(), torch.autograd.grad(loss_of(net, i), list(net.parameters()), create_graph=True), strict=True):
        param.grad = slope
        assert slope.grad_fn is not None


def a_backward_to_some_inputs(net: nn.Sequential, i: int) -> None:
    loss_of(net, i).backward(inputs=list(net[i % 2 * 2].parameters()))


def a_graph_used_twice(net: nn.Sequential, i: int) -> None:
    loss = loss_of(net, i)
    loss.backward(retain_graph=True)
    (2 * loss).backward()


def a_reentrant_checkpoint(net: nn.Sequential, i: int) -> None:
    checkpoint(net, batch(i).requires_grad_(), use_reentrant=True).square().mean().backward()


def a_checkpoint_without_reentry(net: nn.Sequential, i: int) -> None:
    checkpoint(net, batch(i), use_reentrant=False).square().mean().backward()


def a_functional_call_on_its_own_parameters(net: nn.Sequential, i: int) -> None:
    functional_call(net, dict(net.named_parameters()), (batch(i),)).square().mean().backward()


def a_functional_call_on_copies(net: nn.Sequential, i: int) -> None:
    copies = {name: param.detach().clone().requires_grad_() for name, param in net.named_parameters()}
    functional_call(net, copies, (batch(i),)).square().mean().backward()
    for name, param in net.named_parameters():
        param.grad = copies[name].grad


def a_functional_gradient(net: nn.Sequential, i: int) -> None:
    def loss(params: dict[str, Tensor]) -> Tensor:
        return functional_call(net, params, (batch(i),)).square().mean()

    for name, slope in torch.func.grad(loss)({name: param.detach() for name, param in net.named_parameters()}).items():
        net.get_parameter(name).grad = slope


def a_gradient_for_each_example(net: nn.Sequential, i: int) -> None:
    def loss(params: dict[str, Tensor], x: Tensor) -> Tensor:
        return functional_call(net, params, (x[None],)).square().sum()

    params = {name: param.detach() for name, param in net.named_parameters()}
    for name, slopes in torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(params, batch(i)).items():
        net.get_parameter(name).grad = slopes.clamp(-1, 1).mean(0)


def gradients_made_in_inference_mode(net: nn.Sequential, i: int) -> None:
    with torch.inference_mode():
        for param in net.parameters():
            param.grad = param * 0.5 + i


def a_look_at_the_model_in_between(net: nn.Sequential, i: int) -> None:
    loss_of(net, i).backward()
    with torch.inference_mode():
        net.eval()(batch(i))
    with torch.no_grad():
        net.train()(batch(i))


WAYS: tuple[Gradients, ...] = (
    a_penalty_on_the_slope_of_a_critic,
    a_penalty_on_the_gradients_of_the_parameters,
    gradients_that_hold_a_graph,
    a_backward_to_some_inputs,
    a_graph_used_twice,
    a_reentrant_checkpoint,
    a_checkpoint_without_reentry,
    a_functional_call_on_its_own_parameters,
    a_functional_call_on_copies,
    a_functional_gradient,
    a_gradient_for_each_example,
    gradients_made_in_inference_mode,
    a_look_at_the_model_in_between,
)
OPTIONS: dict[str, dict[str, Any]] = {"default": {}, "full": {"detail": "full", "raw_gradients": True}}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("gradients", WAYS)
def test_the_books_agree(gradients: Gradients, options: dict[str, Any]) -> None:
    verify(loop_of(gradients), **options)


# ---- hooks of the user ------------------------------------------------------------------------


def backward(net: nn.Sequential, i: int) -> None:
    loss_of(net, i).backward()


def tensor_hooks_that_scale(net: nn.Sequential) -> None:
    for param in net.parameters():
        param.register_hook(lambda grad: grad * 0.125)


def hooks_that_clip_what_was_accumulated(net: nn.Sequential) -> None:
    def clip(param: Tensor) -> None:
        assert param.grad is not None
        param.grad.clamp_(-0.01, 0.01)

    for param in net.parameters():
        param.register_post_accumulate_grad_hook(clip)


def module_hooks_that_scale(net: nn.Sequential) -> None:
    net[1].register_full_backward_hook(lambda module, inputs, outputs: tuple(0.5 * x for x in inputs))


@pytest.mark.parametrize("hooks", [tensor_hooks_that_scale, hooks_that_clip_what_was_accumulated, module_hooks_that_scale])
def test_the_books_agree_under_hooks_of_the_user(hooks: Callable[[nn.Sequential], None]) -> None:
    free = verify(loop_of(backward))
    held = verify(loop_of(backward, hooks))

    assert free.watch is not None
    assert held.watch is not None
    assert not held.watch.frame("grad_norm").equals(free.watch.frame("grad_norm"))


def test_the_hooks_of_the_user_are_there_and_are_called_as_often_as_unwatched() -> None:
    calls: list[list[str]] = []

    def counting(net: nn.Sequential) -> None:
        calls.append([])
        for name, param in net.named_parameters():
            param.register_hook(lambda grad, name=name, calls=calls[-1]: calls.append(f"{name}, given"))
            param.register_post_accumulate_grad_hook(lambda param, name=name, calls=calls[-1]: calls.append(f"{name}, added"))

    verify(loop_of(a_graph_used_twice, counting), detail="full", raw_gradients=True)
    bare, watched = calls

    assert len(bare) == 3 * 2 * 8
    assert watched == bare


# ---- what the user has set in torch -----------------------------------------------------------


@contextmanager
def default_dtype() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    try:
        yield
        assert torch.get_default_dtype() is torch.float64
    finally:
        torch.set_default_dtype(torch.float32)


@contextmanager
def default_device() -> Iterator[None]:
    # `torch.set_default_device(None)` does not undo all of it in torch 2.6
    with torch.device("meta"):
        yield
        assert torch.empty(0).is_meta


@contextmanager
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    try:
        yield
        assert torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)


@contextmanager
def gradients_disabled() -> Iterator[None]:
    torch.set_grad_enabled(False)
    try:
        yield
        assert not torch.is_grad_enabled()
    finally:
        torch.set_grad_enabled(True)


@contextmanager
def inference() -> Iterator[None]:
    with torch.inference_mode():
        yield
        assert torch.is_inference_mode_enabled()


@contextmanager
def autocast() -> Iterator[None]:
    with torch.autocast("cpu", torch.bfloat16):
        yield
        assert torch.is_autocast_enabled("cpu")


Surrounding = Callable[[], AbstractContextManager[Any]]
AROUND_THE_STEP: dict[str, Surrounding] = {
    "default dtype float64": default_dtype,
    "default device meta": default_device,
    "deterministic algorithms": deterministic,
    "anomalies": torch.autograd.detect_anomaly,
    "no gradients": gradients_disabled,
    "gradients": torch.enable_grad,
    "inference": inference,
    "autocast": autocast,
    "one thread for backward": lambda: torch.autograd.set_multithreading_enabled(False),
}
AROUND_THE_LOOP = {name: AROUND_THE_STEP[name] for name in ("default dtype float64", "deterministic algorithms", "anomalies")}


# what detecting anomalies says of itself
@pytest.mark.filterwarnings("ignore:Anomaly Detection has been enabled:UserWarning")
@pytest.mark.parametrize("surrounding", AROUND_THE_LOOP.values(), ids=AROUND_THE_LOOP)
def test_the_books_agree_whatever_is_set_around_the_loop(surrounding: Surrounding) -> None:
    def loop(lab: Lab) -> None:
        with surrounding():
            loop_of(a_penalty_on_the_slope_of_a_critic)(lab)

    verify(loop, detail="full", raw_gradients=True)


@pytest.mark.filterwarnings("ignore:Anomaly Detection has been enabled:UserWarning")
@pytest.mark.parametrize("surrounding", AROUND_THE_STEP.values(), ids=AROUND_THE_STEP)
def test_the_books_agree_whatever_is_set_around_clipping_and_step(surrounding: Surrounding) -> None:
    def loop(lab: Lab) -> None:
        net = mlp()
        optimizer = torch.optim.SGD(net.parameters(), lr=0.125, foreach=False)
        lab.attach(net)
        for i in range(3):
            optimizer.zero_grad()
            loss_of(net, i).backward()
            with lab.by_update(optimizer):
                lab.raw()
                with surrounding():
                    nn.utils.clip_grad_norm_(net.parameters(), 0.1)
                    optimizer.step()

    verify(loop, detail="full", raw_gradients=True)
