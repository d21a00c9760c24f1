"""The truth harness in Lightning: a Trainer with the callback, beside one without it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from types import ModuleType
from typing import Any

import lightning.pytorch
import numpy as np
import pytest
import pytorch_lightning
import torch
from harness import Lab, Loop, verify
from loops import LR, OPTIONS, by_name, closure_of, loss_of, mlp
from torch import Tensor, nn
from torch.optim import LBFGS, SGD, Optimizer
from torch.utils.data import DataLoader

from paramwatch.lightning import ParamWatch

quietly = [
    # hints that do not concern loaders of four batches
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:The number of training batches"),
    # a deprecation inside Lightning
    pytest.mark.filterwarnings("ignore:.*LeafSpec"),
]
pytestmark = quietly
NAMESPACES = {"lightning.pytorch": lightning.pytorch, "pytorch_lightning": pytorch_lightning}
for namespace in NAMESPACES:
    logging.getLogger(f"{namespace}.utilities.rank_zero").setLevel(logging.WARNING)

LOW = 0.05
"""Far below the norm of every gradient."""

BATCHES = 4

Books = Callable[[Lab, Any, Optimizer, int], AbstractContextManager[None]]
"""What is put around the optimizer step of a LightningModule on a batch."""


def by_update(lab: Lab, module: Any, optimizer: Optimizer, i: int) -> AbstractContextManager[None]:
    return lab.by_update(optimizer)


def fit(lab: Lab, own: type, pl: ModuleType = lightning.pytorch, later: Sequence[Any] = (), **options: Any) -> None:
    """Train a LightningModule with the methods of `own`; callbacks that are `later` come after ours."""
    module = type("Lit", (own, pl.LightningModule), {})()
    lab.records_raw = True
    lab.follow(module)

    class LooksBeforeClipping(pl.Callback):  # type: ignore[misc,name-defined]
        def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Optimizer) -> None:
            # fused optimizers divide by the scale themselves, later, and Lightning refuses to clip what they are given
            if module.automatic_optimization and not getattr(optimizer, "_step_supports_amp_scaling", False):
                lab.raw()

    callbacks: list[Any] = [LooksBeforeClipping()]
    if lab.watched:
        callbacks.append(ParamWatch(**lab.options))
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    trainer = pl.Trainer(**quiet, accelerator="cpu", max_epochs=1, callbacks=[*callbacks, *later], **options)
    trainer.fit(module, DataLoader(range(BATCHES), batch_size=None))
    if lab.watched:
        lab.watch = callbacks[1].watch


def automatic(
    lab: Lab,
    make: Callable[..., Optimizer] = SGD,
    books: Books = by_update,
    loss: Callable[[Any, int], Tensor | None] = lambda module, i: loss_of(module.net, i),
    dtype: torch.dtype = torch.float64,
    pl: ModuleType = lightning.pytorch,
    **options: Any,
) -> None:
    """Automatic optimization with one optimizer of class `make`, with `books` around each of its steps."""

    class Automatic:
        def __init__(self: Any) -> None:
            super().__init__()
            self.net = mlp(dtype=dtype)

        def training_step(self: Any, batch: Tensor, batch_idx: int) -> Tensor | None:
            found = loss(self, batch_idx)
            if found is not None:
                lab.losses.append(found.item())
            return found

        def configure_optimizers(self: Any) -> Optimizer:
            return make(self.parameters(), lr=LR)

        def optimizer_step(self: Any, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
            with books(lab, self, optimizer.optimizer, batch_idx):
                super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)  # type: ignore[misc]

    fit(lab, Automatic, pl, **options)


# ---- automatic optimization -------------------------------------------------------------------


def plain(lab: Lab, pl: ModuleType = lightning.pytorch) -> None:
    automatic(lab, pl=pl)


def accumulating(lab: Lab) -> None:
    automatic(lab, accumulate_grad_batches=3)


def clipping_by_norm(lab: Lab, pl: ModuleType = lightning.pytorch) -> None:
    automatic(lab, gradient_clip_val=LOW, pl=pl)


def clipping_by_value(lab: Lab) -> None:
    automatic(lab, gradient_clip_val=LOW, gradient_clip_algorithm="value")


def accumulating_and_clipping(lab: Lab) -> None:
    automatic(lab, accumulate_grad_batches=2, gradient_clip_val=LOW)


def without_a_loss(lab: Lab) -> None:
    """`training_step` gives None for one batch: Lightning steps all the same, without gradients."""
    automatic(lab, loss=lambda module, i: None if i == 2 else loss_of(module.net, i))


def beside_one_that_steps_in_training_step(lab: Lab) -> None:
    """Lightning knows nothing of it."""
    others: dict[int, Optimizer] = {}

    def other(module: Any) -> Optimizer:
        return others.setdefault(id(module), SGD(module.net[2].parameters(), lr=LR))

    def loss(module: Any, i: int) -> Tensor:
        loss_of(module.net, i).backward()
        other(module).step()
        module.zero_grad()
        return loss_of(module.net[:2], i)

    automatic(
        lab,
        make=lambda params, lr: SGD([*params][:2], lr=lr),
        books=lambda lab, module, optimizer, i: lab.by_update(optimizer, other(module)),
        loss=loss,
    )


def lbfgs(lab: Lab) -> None:
    def books(lab: Lab, module: Any, optimizer: Optimizer, i: int) -> AbstractContextManager[None]:
        return lab.by_closure(optimizer, lambda model, twin: evaluation(model, twin, i))

    automatic(lab, make=lambda params, lr: LBFGS(params, lr=lr, max_iter=3), books=books)


def nesterov(lab: Lab) -> None:
    """Its gradients are others once it has stepped."""

    def books(lab: Lab, module: Any, optimizer: Optimizer, i: int) -> AbstractContextManager[None]:
        return lab.by_closure(optimizer, lambda model, twin: evaluation(model, twin, i))

    automatic(lab, make=lambda params, lr: SGD(params, lr=lr, momentum=0.5, nesterov=True, foreach=True), books=books)


def evaluation(model: Any, optimizer: Optimizer, i: int, dtype: torch.dtype | None = None, scale: float = 1.0) -> Callable[[], Tensor]:
    """What Lightning's closure and its precision plugin do."""

    def evaluate() -> Tensor:
        with torch.autocast("cpu", dtype=dtype, enabled=dtype is not None, cache_enabled=False):
            loss = loss_of(model.net, i)
        optimizer.zero_grad()
        (loss * scale).backward()
        for param in model.parameters():
            param.grad.mul_(1 / scale)
        return loss

    return evaluate


# ---- manual optimization ----------------------------------------------------------------------


def manual(lab: Lab, step: Callable[[Any, int], None], dtype: torch.dtype = torch.float64, **options: Any) -> None:
    """One optimizer for each layer, and a training step that does everything itself."""

    class Manual:
        automatic_optimization = False

        def __init__(self: Any) -> None:
            super().__init__()
            self.net = mlp(dtype=dtype)

        def training_step(self: Any, batch: Tensor, batch_idx: int) -> None:
            step(self, batch_idx)

        def configure_optimizers(self: Any) -> list[Optimizer]:
            return [SGD(layer.parameters(), lr=LR) for layer in (self.net[0], self.net[2])]

    fit(lab, Manual, **options)


def two_in_turn(lab: Lab, pl: ModuleType = lightning.pytorch) -> None:
    """Each has a loss and a clipping of its own: one record a batch."""

    def step(module: Any, i: int) -> None:
        both = module.optimizers()
        with lab.by_update(*(each.optimizer for each in both)):
            for k, optimizer in enumerate(both):
                optimizer.zero_grad()
                loss = loss_of(module.net, 2 * i + k)
                module.manual_backward(loss)
                lab.losses.append(loss.item())
                lab.raw(optimizer.optimizer)
                module.clip_gradients(optimizer, LOW, "norm" if k else "value")
                optimizer.step()

    manual(lab, step, pl=pl)


def manual_accumulation(lab: Lab) -> None:
    """Two batches to each round."""

    def step(module: Any, i: int) -> None:
        both = module.optimizers()
        module.manual_backward(loss_of(module.net, i))
        if i % 2:
            with lab.by_update(*(each.optimizer for each in both)):
                for optimizer in both:
                    optimizer.step()
                    optimizer.zero_grad()

    manual(lab, step)


def one_with_a_closure(lab: Lab) -> None:
    """A closure of the user's, which Lightning passes on; the other optimizer never steps."""

    def step(module: Any, i: int) -> None:
        optimizer = module.optimizers()[0]

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = loss_of(module.net, i)
            module.manual_backward(loss)
            return loss

        with lab.by_update(optimizer.optimizer):
            optimizer.step(closure)

    manual(lab, step)


LOOPS = by_name(
    plain,
    accumulating,
    clipping_by_norm,
    clipping_by_value,
    accumulating_and_clipping,
    without_a_loss,
    beside_one_that_steps_in_training_step,
    lbfgs,
    nesterov,
    two_in_turn,
    manual_accumulation,
    one_with_a_closure,
)


# said once by Lightning where `training_step` gives None
@pytest.mark.filterwarnings("ignore:`training_step` returned `None`")
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("loop", LOOPS.values(), ids=LOOPS)
def test_the_books_agree(loop: Loop, options: dict[str, Any]) -> None:
    verify(loop, **options)


@pytest.mark.parametrize("loop", [plain, clipping_by_norm, two_in_turn])
def test_the_books_agree_in_the_other_namespace(loop: Callable[..., None]) -> None:
    verify(lambda lab: loop(lab, pl=pytorch_lightning))


# ---- what a user sees -------------------------------------------------------------------------

MOST = 1.5
"""Some gradients of these loops are larger than that, and some are not."""


def clipped_in_lightning(lab: Lab) -> None:
    automatic(lab, gradient_clip_val=MOST)


def clipped_in_a_plain_loop(lab: Lab) -> None:
    net = mlp()
    optimizer = SGD(net.parameters(), lr=LR)
    lab.attach(net)
    for i in range(BATCHES):
        closure_of(net, optimizer, i)()
        lab.raw()
        nn.utils.clip_grad_norm_(net.parameters(), MOST)
        with lab.by_update(optimizer):
            optimizer.step()


@pytest.mark.parametrize("loop", [clipped_in_lightning, clipped_in_a_plain_loop])
def test_one_frame_shows_whether_clipping_works(loop: Loop) -> None:
    watch = verify(loop, raw_gradients=True).watch
    assert watch is not None
    steps = watch.steps[["grad_raw_norm", "grad_norm", "clip_coef"]]
    too_large = steps["grad_raw_norm"] > MOST
    assert 0 < too_large.sum() < BATCHES
    assert (steps["grad_norm"] <= MOST * (1 + 1e-9)).all()
    np.testing.assert_allclose(steps["clip_coef"], steps["grad_norm"] / steps["grad_raw_norm"], rtol=1e-9)
    np.testing.assert_allclose(steps["clip_coef"], np.minimum(1, MOST / steps["grad_raw_norm"]), rtol=1e-6)
    # a clipping by norm scales all rows alike
    rows = watch.frame("clip_coef")
    np.testing.assert_allclose(rows, np.broadcast_to(steps[["clip_coef"]], rows.shape), rtol=1e-6)
    np.testing.assert_allclose(rows, watch.frame("grad_norm") / watch.frame("grad_raw_norm"), rtol=1e-9)
