"""The truth harness where others own the loop: `attach` works unchanged in Fabric, Accelerate and a Hugging Face Trainer."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import Lab, Loop, verify
from loops import LR, OPTIONS, by_name, closure_of, loss_of, mlp, sgd
from torch import Tensor, nn
from torch.optim import LBFGS, AdamW

LOW = 0.05
"""Far below the norm of every gradient."""

STEPS = 4


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Without the network; on one thread, since models this small have nothing to share out, and waiting for each other takes seconds."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# ---- Lightning Fabric -------------------------------------------------------------------------


def fabric_of(**options: Any) -> Any:
    fabric = pytest.importorskip("lightning.fabric", reason="lightning is not installed: Fabric is not tried")
    return fabric.Fabric(accelerator="cpu", devices=1, **options)


def fabric_plain(lab: Lab) -> None:
    """Attached to what Fabric makes of the model: the names are still those of the model."""
    fabric, net = fabric_of(), mlp()
    wrapped, optimizer = fabric.setup(net, sgd(net))
    lab.attach(wrapped)
    lab.follow(net)
    for i in range(STEPS):
        optimizer.zero_grad()
        loss = loss_of(wrapped, i)
        fabric.backward(loss)
        lab.losses.append(loss.item())
        with lab.by_update(optimizer.optimizer):
            optimizer.step()


def fabric_accumulating_and_clipping(lab: Lab) -> None:
    fabric, net = fabric_of(), mlp()
    lab.attach(net)
    wrapped, optimizer = fabric.setup(net, sgd(net))
    for i in range(2 * STEPS):
        with fabric.no_backward_sync(wrapped, enabled=i % 2 == 0):
            fabric.backward(loss_of(wrapped, i))
        if i % 2:
            lab.raw()
            if i % 4 == 1:
                fabric.clip_gradients(wrapped, optimizer, max_norm=LOW)
            else:
                fabric.clip_gradients(wrapped, optimizer, clip_val=LOW)
            with lab.by_update(optimizer.optimizer):
                optimizer.step()
            optimizer.zero_grad()


def fabric_with_a_closure(lab: Lab) -> None:
    fabric, net = fabric_of(), mlp()
    lab.attach(net)
    wrapped, optimizer = fabric.setup(net, LBFGS(net.parameters(), max_iter=3))
    for i in range(STEPS):

        def closure(model: nn.Module, optimizer: Any, i: int = i) -> Callable[[], Tensor]:
            return closure_of(model, optimizer, i)

        with lab.by_closure(optimizer.optimizer, closure):
            optimizer.step(closure(wrapped, optimizer))


def fabric_bfloat16(lab: Lab) -> None:
    fabric, net = fabric_of(precision="bf16-mixed"), mlp(dtype=torch.float32)
    lab.attach(net)
    wrapped, optimizer = fabric.setup(net, AdamW(net.parameters(), lr=LR))
    for i in range(STEPS):
        optimizer.zero_grad()
        fabric.backward(loss_of(wrapped, i))
        with lab.by_twin(optimizer.optimizer):
            optimizer.step()


def fabric_scaled(lab: Lab) -> None:
    """A scaler on the CPU; where it meets an infinity no step is made, and none is seen."""
    from lightning.fabric.plugins import MixedPrecision

    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    fabric, net = fabric_of(plugins=[MixedPrecision("16-mixed", "cpu", scaler)]), mlp(dtype=torch.float32)
    lab.attach(net)
    wrapped, optimizer = fabric.setup(net, sgd(net))

    def unscale(model: nn.Module) -> None:
        for param in model.parameters():
            assert param.grad is not None
            param.grad.mul_(1 / scaler.get_scale())

    for i in range(STEPS):
        optimizer.zero_grad()
        bad = i == 2
        fabric.backward(loss_of(wrapped, i) * (torch.inf if bad else 1))
        with contextlib.nullcontext() if bad else lab.by_twin(optimizer.optimizer, grads=unscale):
            optimizer.step()
    assert scaler.get_scale() == 32


# ---- Accelerate -------------------------------------------------------------------------------


def accelerator_of(**options: Any) -> Any:
    accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed: its loop is not tried")
    # it keeps what the first of a process was given
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    accelerate.state.GradientState._reset_state()
    return accelerate.Accelerator(cpu=True, **options)


def accelerate_accumulating_and_clipping(lab: Lab) -> None:
    """`optimizer.step` is called for every batch, and Accelerate makes a step of each second call."""
    accelerator, net = accelerator_of(gradient_accumulation_steps=2), mlp()
    lab.attach(net)
    wrapped, optimizer = accelerator.prepare(net, sgd(net))
    for i in range(2 * STEPS):
        with accelerator.accumulate(wrapped), contextlib.ExitStack() as books:
            loss = loss_of(wrapped, i)
            accelerator.backward(loss)
            lab.losses.append(loss.item())
            if accelerator.sync_gradients:
                lab.raw()
                accelerator.clip_grad_norm_(wrapped.parameters(), LOW)
                books.enter_context(lab.by_update(optimizer.optimizer))
            optimizer.step()
            books.close()
            optimizer.zero_grad()


def accelerate_bfloat16(lab: Lab) -> None:
    accelerator, net = accelerator_of(mixed_precision="bf16"), mlp(dtype=torch.float32)
    lab.attach(net)
    wrapped, optimizer = accelerator.prepare(net, AdamW(net.parameters(), lr=LR))
    for i in range(STEPS):
        optimizer.zero_grad()
        accelerator.backward(loss_of(wrapped, i))
        lab.raw()
        accelerator.clip_grad_value_(wrapped.parameters(), LOW)
        with lab.by_twin(optimizer.optimizer):
            optimizer.step()


LOOPS = by_name(
    fabric_plain,
    fabric_accumulating_and_clipping,
    fabric_with_a_closure,
    fabric_bfloat16,
    fabric_scaled,
    accelerate_accumulating_and_clipping,
    accelerate_bfloat16,
)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("loop", LOOPS.values(), ids=LOOPS)
def test_the_books_agree(loop: Loop, options: dict[str, Any]) -> None:
    verify(loop, **options)


# ---- Hugging Face -----------------------------------------------------------------------------


def hugging_face(lab: Lab, folder: Path, **options: Any) -> None:
    """A Trainer fits two layers of GPT-2 to noise, with dropout and with its own optimizer."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed: its Trainer is not tried")
    config = transformers.GPT2Config(n_layer=2, n_embd=16, n_head=2, vocab_size=32, n_positions=8, bos_token_id=0, eos_token_id=0)
    net = transformers.GPT2LMHeadModel(config)
    lab.attach(net)
    tokens = torch.randint(32, (16, 8), generator=torch.Generator().manual_seed(1))

    class Books(transformers.TrainerCallback):  # type: ignore[misc,name-defined]
        def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
            self.stack = contextlib.ExitStack()
            self.stack.enter_context(lab.by_twin(trainer.optimizer.optimizer))

        def on_optimizer_step(self, *_: Any, **__: Any) -> None:
            self.stack.close()

    class Looks(transformers.Trainer):  # type: ignore[misc,name-defined]
        def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
            loss: Tensor = super().training_step(*args, **kwargs)
            lab.losses.append(loss.item())
            lab.raw()
            return loss

    quiet = {"report_to": [], "disable_tqdm": True, "save_strategy": "no", "logging_strategy": "no", "use_cpu": True}
    arguments = transformers.TrainingArguments(str(folder), per_device_train_batch_size=2, max_steps=3, **quiet, **options)
    data = [{"input_ids": line, "labels": line} for line in tokens]
    trainer = Looks(net, arguments, train_dataset=data, callbacks=[Books()])
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.train()


TRAINERS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "plain": ({"max_grad_norm": 0.0}, OPTIONS["default"]),
    "accumulating and clipping": ({"gradient_accumulation_steps": 2, "max_grad_norm": LOW}, OPTIONS["full"]),
    "bf16": ({"bf16": True}, OPTIONS["full"]),
}


@pytest.mark.parametrize(("trainer", "options"), TRAINERS.values(), ids=TRAINERS)
def test_the_books_agree_in_a_hugging_face_trainer(trainer: dict[str, Any], options: dict[str, Any], tmp_path: Path) -> None:
    lab = verify(lambda lab: hugging_face(lab, tmp_path, **trainer), **options)

    assert lab.watch is not None
    assert lab.watch.parameters.loc["transformer.wte.weight", "aliases"] == ("lm_head.weight",)
    assert [tie.names for tie in lab.watch.ties] == [("transformer.wte.weight", "lm_head.weight")]
    assert lab.watch.frame("grad_norm", aliases=True)["lm_head.weight"].gt(0).all()
