"""What a training loop knows of itself: a small net in float64, and the gradient that plain SGD must have used."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from paramwatch import Watch

if TYPE_CHECKING:
    from harness import Lab

LR = 0.125
"""A power of two, so that dividing an update by it rounds nothing."""

OPTIONS: dict[str, dict[str, Any]] = {"default": {}, "full": {"detail": "full", "raw_gradients": True}}
"""What the loops of the truth harness are watched with."""


def by_name(*loops: Callable[..., Any]) -> dict[str, Callable[..., Any]]:
    """Loops under their names, for parameters and their ids."""
    return {loop.__name__: loop for loop in loops}


def mlp(seed: int = 0, dtype: torch.dtype = torch.float64) -> nn.Sequential:
    """The same MLP 3-4-1 for the same seed."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 4, dtype=dtype), nn.Tanh(), nn.Linear(4, 1, dtype=dtype))


def sgd(model: nn.Module | Iterable[Tensor], **options: Any) -> torch.optim.SGD:
    """Plain SGD, whose update is the gradient times `LR`."""
    return torch.optim.SGD(model.parameters() if isinstance(model, nn.Module) else model, lr=LR, **options)


def loss_of(model: nn.Module, i: int = 0) -> Tensor:
    """The loss on batch number i."""
    weight = next(model.parameters())
    x = torch.randn(5, 3, generator=torch.Generator().manual_seed(i)).to(weight.dtype)
    return (model(x) - x.sum(1, keepdim=True)).square().mean()


def closure_of(model: nn.Module, optimizer: Any, i: int = 0) -> Callable[[], Tensor]:
    """What `optimizer.step(closure)` evaluates: the loss on batch number i, and its gradients from zero."""

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = loss_of(model, i)
        loss.backward()
        return loss

    return closure


def step_with_closures(lab: Lab, optimizer: Any, steps: int = 4, keyword: bool = False) -> None:
    """Steps with a closure each; those of odd number are not the first to compute these gradients."""
    net = lab.model
    for i in range(steps):
        if i % 2:
            closure_of(net, optimizer, i)()

        def closure(model: nn.Module, optimizer: Any, i: int = i) -> Callable[[], Tensor]:
            return closure_of(model, optimizer, i)

        with lab.by_closure(optimizer, closure):
            loss = optimizer.step(closure=closure(net, optimizer)) if keyword else optimizer.step(closure(net, optimizer))
        lab.losses.append(float(torch.as_tensor(loss).detach()))


class Truth:
    """The gradients that the steps of a loop used, by parameter name, found without paramwatch.

    Args:
        model: What is trained.
    """

    def __init__(self, model: nn.Module) -> None:
        self.grads: list[dict[str, Tensor]] = []
        self._model = model

    @contextmanager
    def sgd_step(self) -> Iterator[None]:
        """Around a step of plain SGD: what it used follows from what it did. Parameters that did not change used none."""
        before = {name: p.detach().clone() for name, p in self._model.named_parameters()}
        yield
        after = dict(self._model.named_parameters())
        self.grads.append({name: (old - after[name].detach()) / LR for name, old in before.items() if not old.equal(after[name])})

    def take(self) -> None:
        """The gradients are now as the next step will use them."""
        grads = {name: p.grad.detach().clone() for name, p in self._model.named_parameters() if p.grad is not None}
        self.grads.append(grads)

    def norms(self) -> np.ndarray:
        """[steps, parameters], NaN where a parameter did not step."""
        names = [name for name, _ in self._model.named_parameters()]
        return np.array([[float(grads[n].double().norm()) if n in grads else np.nan for n in names] for grads in self.grads])


def assert_recorded(watch: Watch, truth: Truth, first_step: int = 0, rtol: float = 1e-6) -> None:
    """One record for each step of the truth, numbered without a gap, and its gradients are those that were used."""
    norms = watch.frame("grad_norm")
    assert list(norms.index) == list(range(first_step, first_step + len(truth.grads)))
    np.testing.assert_allclose(norms.to_numpy(), truth.norms(), rtol=rtol)
