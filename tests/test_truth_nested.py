"""The truth harness over steps inside steps: subclasses that call their parent's, and two passes over a batch."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from harness import LR, Lab, Loop, verify
from loops import OPTIONS, by_name, closure_of, mlp, step_with_closures
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_
from torch.optim import SGD, AdamW, Optimizer

import paramwatch

LOW = 0.05
"""Far below the norm of every gradient."""


class PassesOn(SGD):
    """A subclass that calls its parent's `step`, whose hooks fire as well."""

    def step(self, closure: Any = None) -> Any:
        return super().step(closure)


class Evaluates(SGD):
    """A subclass that calls the closure itself, and then its parent's `step` without one."""

    def step(self, closure: Any = None) -> Any:
        with torch.enable_grad():
            loss = closure()
        super().step()
        return loss


class Clips(SGD):
    """A subclass that clips before it calls its parent's `step`."""

    def step(self, closure: Any = None) -> None:
        clip_grad_norm_([param for group in self.param_groups for param in group["params"]], LOW)
        super().step()


def _subclass(kind: type[SGD], net: nn.Module) -> SGD:
    SGD(mlp().parameters())  # torch puts hooks into a class when it is first instantiated
    return kind(net.parameters(), lr=LR)


def parents_step(lab: Lab) -> None:
    lab.attach(mlp())
    optimizer = _subclass(PassesOn, lab.model)
    for i in range(3):
        closure_of(lab.model, optimizer, i)()
        with lab.by_update(optimizer):
            optimizer.step()


def parents_step_with_a_closure(lab: Lab) -> None:
    lab.attach(mlp())
    step_with_closures(lab, _subclass(PassesOn, lab.model))


def parents_step_after_the_closure(lab: Lab) -> None:
    lab.attach(mlp())
    step_with_closures(lab, _subclass(Evaluates, lab.model))


def parents_step_after_clipping(lab: Lab) -> None:
    lab.attach(mlp())
    optimizer = _subclass(Clips, lab.model)
    for i in range(3):
        closure_of(lab.model, optimizer, i)()
        lab.raw()
        with lab.by_update(optimizer):
            optimizer.step()


# ---- parents of which there is no instance, so that torch puts no hooks into their `step` -------


class Parent(Optimizer):
    """Plain gradient descent, which nobody uses but its children."""

    def __init__(self, params: Iterable[Tensor]) -> None:
        super().__init__(params, {"lr": LR})

    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:
        with torch.enable_grad():
            loss = None if closure is None else closure()
        with torch.no_grad():
            for group in self.param_groups:
                for param in group["params"]:
                    param.sub_(param.grad, alpha=group["lr"])
        return loss


class Signs(Parent):
    """Changes the gradients, and then steps."""

    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:
        with torch.no_grad():
            for group in self.param_groups:
                for param in group["params"]:
                    param.grad.sign_()
        return super().step()


class OfABatch(Parent):
    """Is given a number and a model, and makes the closure itself."""

    def step(self, i: int, net: nn.Module) -> Tensor | None:  # type: ignore[override]  # as users write it
        return super().step(closure_of(net, self, i))


class OfAModel(Signs):
    """Is given the model, and notes something on it."""

    def step(self, net: nn.Module) -> Tensor | None:  # type: ignore[override]  # as users write it
        assert isinstance(net, nn.Module)
        net.steps = getattr(net, "steps", 0) + 1
        return super().step()


def a_parent_without_hooks(lab: Lab) -> None:
    def shift(optimizer: Any, *_: Any) -> None:
        optimizer.param_groups[0]["params"][0].grad.add_(0.25)

    def used(net: Any) -> None:
        net[0].weight.grad.add_(0.25)
        for param in net.parameters():
            param.grad.sign_()

    lab.attach(mlp())
    optimizer = Signs(lab.model.parameters())
    # has to run once, watched or not
    optimizer.register_step_pre_hook(shift)
    for i in range(3):
        closure_of(lab.model, optimizer, i)()
        with lab.by_twin(optimizer, grads=used):
            optimizer.step()


def a_parent_without_hooks_and_a_closure(lab: Lab) -> None:
    lab.attach(mlp())
    optimizer = OfABatch(lab.model.parameters())
    for i in range(3):
        with lab.by_update(optimizer):
            optimizer.step(i, lab.model)


def a_step_of_a_model(lab: Lab) -> None:
    lab.attach(mlp())
    optimizer = OfAModel(lab.model.parameters())
    for i in range(3):
        closure_of(lab.model, optimizer, i)()
        with lab.by_update(optimizer):
            optimizer.step(lab.model)
    assert lab.model.steps == 3


# ---- two passes -----------------------------------------------------------------------------


class TwoPasses(Optimizer):
    """Sharpness-aware: climbs along the gradient, evaluates there, goes back and lets its base optimizer step."""

    def __init__(self, params: Iterable[Tensor], base: Callable[..., Optimizer], **options: Any) -> None:
        super().__init__(params, {"rho": 0.5})
        self.base = base(self.param_groups, **options)
        self.param_groups = self.base.param_groups

    @torch.no_grad()
    def climb(self) -> None:
        for group in self.param_groups:
            for param in group["params"]:
                self.state[param]["old"] = param.data.clone()
                param.add_(param.grad, alpha=group["rho"])

    @torch.no_grad()
    def descend(self) -> None:
        for group in self.param_groups:
            for param in group["params"]:
                param.data = self.state[param]["old"]
        self.base.step()

    def step(self, closure: Callable[[], Tensor]) -> Tensor:
        with torch.enable_grad():
            loss = closure()
        self.climb()
        with torch.enable_grad():
            closure()
        self.descend()
        return loss


def two_passes(lab: Lab) -> None:
    lab.attach(mlp())
    step_with_closures(lab, TwoPasses(lab.model.parameters(), SGD, lr=LR))


def two_passes_with_adam_inside(lab: Lab) -> None:
    lab.attach(mlp())
    step_with_closures(lab, TwoPasses(lab.model.parameters(), AdamW, lr=LR), keyword=True)


def two_passes_by_hand(lab: Lab) -> None:
    net = mlp()
    optimizer = TwoPasses(net.parameters(), SGD, lr=LR)
    lab.attach(net)
    for i in range(3):
        with lab.by_update(optimizer):
            closure_of(net, optimizer, i)()
            optimizer.climb()
            closure_of(net, optimizer, i)()
            optimizer.descend()


class Mixes(TwoPasses):
    """Uses neither gradient of its two passes but their mean."""

    def step(self, closure: Callable[[], Tensor]) -> Tensor:
        with torch.enable_grad():
            loss = closure()
        params = [param for group in self.param_groups for param in group["params"]]
        first = [param.grad.clone() for param in params]
        self.climb()
        with torch.enable_grad():
            closure()
        for param, grad in zip(params, first, strict=True):
            param.grad.add_(grad).mul_(0.5)
        self.descend()
        return loss


def two_passes_that_are_mixed(lab: Lab) -> None:
    net = mlp()
    optimizer = Mixes(net.parameters(), SGD, lr=LR)
    lab.attach(net)
    for i in range(3):
        with lab.by_update(optimizer):
            optimizer.step(closure_of(net, optimizer, i))


LOOPS: dict[str, Loop] = by_name(
    parents_step,
    parents_step_with_a_closure,
    parents_step_after_the_closure,
    parents_step_after_clipping,
    a_parent_without_hooks,
    a_parent_without_hooks_and_a_closure,
    a_step_of_a_model,
    two_passes,
    two_passes_with_adam_inside,
    two_passes_by_hand,
    two_passes_that_are_mixed,
)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("loop", LOOPS.values(), ids=LOOPS)
def test_the_books_agree(loop: Loop, options: dict[str, Any]) -> None:
    verify(loop, **options)


def test_the_classes_of_optimizers_are_as_before_when_nobody_watches() -> None:
    before = Parent.step, Signs.step
    watch = paramwatch.attach(net := mlp())
    optimizer = OfAModel(net.parameters())
    for i in range(2):
        closure_of(net, optimizer, i)()
        optimizer.step(net)
        assert (Parent.step, Signs.step) != before
    watch.close()

    assert (Parent.step, Signs.step) == before
