"""The truth harness in Lightning under mixed precision: a copy of the optimizer has to arrive at the same bits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import pytest
import torch
from harness import Lab, Loop, verify
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.plugins import MixedPrecision
from loops import OPTIONS, by_name, loss_of, mlp
from test_truth_lightning import BATCHES, LOW, automatic, evaluation, manual, quietly
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer
from torch.utils.data import DataLoader

from paramwatch.lightning import ParamWatch

pytestmark = quietly


def bfloat16(lab: Lab) -> None:
    def books(lab: Lab, module: Any, optimizer: Optimizer, i: int) -> AbstractContextManager[None]:
        return lab.by_closure(optimizer, lambda model, twin: evaluation(model, twin, i, torch.bfloat16))

    automatic(lab, make=AdamW, books=books, dtype=torch.float32, precision="bf16-mixed")


BAD = 2
"""The batch whose loss is infinite."""


def float16(
    lab: Lab, make: Callable[..., Optimizer], fused: bool = False, clip: float | None = None, later: Sequence[Callback] = ()
) -> None:
    """A scaler on the CPU, which meets infinities in two rows."""

    def books(lab: Lab, module: Any, optimizer: Optimizer, i: int) -> AbstractContextManager[None]:
        scale = module.trainer.precision_plugin.scaler.get_scale()
        if i == BAD:
            return lab.by_nothing(optimizer, scale=scale if fused else 1.0)

        def clipped(model: nn.Module, twin: Optimizer) -> Callable[[], Tensor]:
            evaluate = evaluation(model, twin, i, torch.float16, scale)

            def then_clip() -> Tensor:
                found = evaluate()
                if clip is not None:
                    nn.utils.clip_grad_norm_(model.parameters(), clip)
                return found

            return then_clip

        return lab.by_closure(optimizer, clipped)

    automatic(lab, make=make, books=books, loss=loss, dtype=torch.float32, plugins=[scaler()], gradient_clip_val=clip, later=later)
    assert_one_is_skipped(lab)


def loss(module: Any, i: int) -> Tensor:
    found = loss_of(module.net, i)
    return found + torch.inf * (module.net[0].bias.sum() + module.net[2].bias.sum()) if i == BAD else found


def scaler() -> MixedPrecision:
    return MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=64.0))


def assert_one_is_skipped(lab: Lab) -> None:
    if lab.watched:
        assert lab.watch is not None
        assert list(lab.watch.steps["skipped"]) == [i == BAD for i in range(BATCHES)]


def scaled(lab: Lab) -> None:
    float16(lab, SGD)


def scaled_and_clipped(lab: Lab) -> None:
    float16(lab, AdamW, clip=LOW)


def scaled_and_fused(lab: Lab) -> None:
    float16(lab, lambda params, lr: AdamW(params, lr=lr, fused=True), fused=True)


def scaled_fused_and_looked_at(lab: Lab) -> None:
    """A callback that may change gradients, but these still have the scale in them."""

    class Looks(Callback):
        def on_before_optimizer_step(self, *_: Any) -> None:
            pass

    float16(lab, lambda params, lr: SGD(params, lr=lr, fused=True), fused=True, later=[Looks()])


def two_scaled_in_turn(lab: Lab) -> None:
    """Manual optimization: the scaler is asked for a step of each optimizer, of which one is clipped with the scale in its gradients."""

    def step(module: Any, i: int) -> None:
        both = module.optimizers()
        for optimizer in both:
            optimizer.zero_grad()
        module.manual_backward(loss(module, i))
        scale = module.trainer.precision_plugin.scaler.get_scale()
        lab.raw(both[0].optimizer, scale=scale)
        module.clip_gradients(both[0], LOW, "norm")

        def unscale(model: nn.Module) -> None:
            for param in model.parameters():
                assert param.grad is not None
                param.grad.mul_(1 / scale)

        raw = [optimizer.optimizer for optimizer in both]
        with lab.by_nothing(*raw) if i == BAD else lab.by_twin(*raw, grads=unscale):
            for optimizer in both:
                optimizer.step()

    manual(lab, step, dtype=torch.float32, plugins=[scaler()])
    assert_one_is_skipped(lab)


LOOPS = by_name(bfloat16, scaled, scaled_and_clipped, scaled_and_fused, scaled_fused_and_looked_at, two_scaled_in_turn)


@pytest.mark.filterwarnings("ignore:`training_step` returned `None`")
@pytest.mark.parametrize(("fused", "clip"), [(False, None), (False, LOW), (True, None)])
def test_a_step_that_is_not_made_since_there_is_no_loss_has_gradients_without_the_scale(fused: bool, clip: float | None) -> None:
    class Left(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.noted = mlp(dtype=torch.float32), list[list[float]]()

        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor | None:
            return None if batch_idx == 1 else loss_of(self.net, batch_idx)

        def on_after_backward(self) -> None:
            grads = [param.grad for param in self.parameters() if param.grad is not None]
            self.noted.append([float(grad.norm()) / 64 for grad in grads])

        def configure_optimizers(self) -> Optimizer:
            return SGD(self.parameters(), lr=0.1, fused=fused)

    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    module, ours = Left(), ParamWatch()
    trainer = Trainer(**quiet, max_epochs=1, callbacks=[ours], plugins=[scaler()], accumulate_grad_batches=2, gradient_clip_val=clip)
    trainer.fit(module, DataLoader(range(4), batch_size=None))
    watch = ours.watch

    assert watch is not None
    assert list(watch.steps["skipped"]) == [True, False]
    # Lightning clips all the same
    carried = clip / 64 / float(np.linalg.norm(module.noted[0])) if clip else 1.0
    np.testing.assert_allclose(watch.frame("grad_raw_norm").loc[0], module.noted[0], rtol=1e-6)
    np.testing.assert_allclose(watch.frame("grad_norm").loc[0], carried * np.array(module.noted[0]), rtol=1e-4)
    np.testing.assert_allclose(watch.frame("clip_coef").loc[0], carried, rtol=1e-4)
    np.testing.assert_allclose(watch.frame("grad_raw_norm").loc[1], module.noted[-1], rtol=1e-6)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("loop", LOOPS.values(), ids=LOOPS)
def test_the_books_agree(loop: Loop, options: dict[str, Any]) -> None:
    verify(loop, **options)
