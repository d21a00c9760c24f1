"""A watched run is the run without the watch, bit for bit; nothing stays on the model or in torch; our failures stay ours."""

from __future__ import annotations

import copy
import io
import logging
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.optim.optimizer as torch_optimizer
from loops import LR, loss_of, mlp, sgd
from models import BY_NAME
from torch import Tensor, nn
from torch.nn.utils import clip_grad

import paramwatch
from paramwatch import assemble, attached, inventory, measure, recorder, rules, worker
from paramwatch.store import Store
from paramwatch.testing import ListSink

Loop = Callable[[nn.Module], list[float]]
"""Trains a model, and gives the loss of each step."""


@pytest.fixture(autouse=True)
def nothing_open() -> Iterator[None]:
    yield
    for watch in tuple(attached.opened):
        watch.close()


# ---- the loops ------------------------------------------------------------------------------

STEPS = 6


def with_optimizer(make: Callable[..., torch.optim.Optimizer], clip: bool = False, **options: Any) -> Loop:
    def loop(net: nn.Module) -> list[float]:
        optimizer, losses = make(net.parameters(), lr=LR, **options), []
        for i in range(STEPS):
            optimizer.zero_grad()
            loss = loss_of(net, i)
            loss.backward()
            if clip:
                nn.utils.clip_grad_norm_(net.parameters(), 0.1)
            optimizer.step()
            losses.append(loss.item())
        return losses

    return loop


def lbfgs(net: nn.Module) -> list[float]:
    optimizer, losses = torch.optim.LBFGS(net.parameters(), max_iter=3), []
    for i in range(STEPS):

        def closure(i: int = i) -> Tensor:
            optimizer.zero_grad()
            loss = loss_of(net, i)
            loss.backward()
            losses.append(loss.item())
            return loss

        optimizer.step(closure)
    return losses


def accumulation(net: nn.Module) -> list[float]:
    optimizer, losses = sgd(net, momentum=0.9), []
    for i in range(3 * STEPS):
        loss = loss_of(net, i) / 3
        loss.backward()
        losses.append(loss.item())
        if i % 3 == 2:
            optimizer.step()
            optimizer.zero_grad(set_to_none=i % 2 == 0)
    return losses


def adversarial(net: nn.Module) -> list[float]:
    """Two halves of one net pull in opposite directions, with the gradient of each leaking into the other."""
    optimizers, losses = [torch.optim.Adam(net[0].parameters(), lr=LR), sgd(net[-1])], []
    for i in range(2 * STEPS):
        optimizers[i % 2].zero_grad()
        loss = loss_of(net, i) * (1 if i % 2 else -1)
        loss.backward()
        optimizers[i % 2].step()
        losses.append(loss.item())
    return losses


LOOPS: dict[str, Loop] = {
    "sgd": with_optimizer(torch.optim.SGD),
    "nesterov_foreach": with_optimizer(torch.optim.SGD, momentum=0.9, nesterov=True, foreach=True),
    "adam": with_optimizer(torch.optim.Adam),
    "adamw_fused": with_optimizer(torch.optim.AdamW, fused=True),
    "clipping": with_optimizer(torch.optim.SGD, clip=True),
    "lbfgs": lbfgs,
    "accumulation": accumulation,
    "adversarial": adversarial,
}
OPTIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "cheap": {"detail": "cheap", "update": "off"},
    "full": {"detail": "full", "update": "exact", "raw_gradients": True},
    "sampled": {"update": "sampled", "every": 2},
}


def dropout_net() -> nn.Sequential:
    """A net that draws random numbers in each forward, and has buffers."""
    net = mlp()
    return nn.Sequential(net[0], nn.BatchNorm1d(4, dtype=torch.float64), nn.Dropout(0.3), net[1], net[2])


def outcome(loop: Loop, options: dict[str, Any] | None) -> list[Any]:
    """Losses, parameters, buffers and the state of the random numbers after a run, watched if options are given."""
    net = dropout_net()
    watch = None if options is None else paramwatch.attach(net, **options)
    losses = loop(net)
    if watch is not None:
        assert len(watch.frame()) > 0
        watch.close()
        assert not watch._guard.failed
    return [losses, *(t.clone() for t in net.state_dict().values()), *(p.grad for p in net.parameters()), torch.get_rng_state()]


def assert_same(one: list[Any], other: list[Any]) -> None:
    assert len(one) == len(other)
    for a, b in zip(one, other, strict=True):
        assert torch.equal(a, b) if isinstance(a, Tensor) else a == b


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("loop", LOOPS.values(), ids=LOOPS)
def test_a_watched_run_is_bit_for_bit_the_run_without(loop: Loop, options: dict[str, Any]) -> None:
    assert_same(outcome(loop, options), outcome(loop, None))


def test_two_different_runs_are_told_apart() -> None:
    with pytest.raises(AssertionError):
        assert_same(outcome(LOOPS["sgd"], None), outcome(LOOPS["clipping"], None))


# ---- nothing on the model -------------------------------------------------------------------


def traces(net: nn.Module) -> list[Any]:
    """Everything that can be put on a model: attributes, hooks of modules, hooks and attributes of parameters."""
    found: list[Any] = []
    for module in net.modules():
        found += [(key, id(value), len(value) if isinstance(value, dict) else None) for key, value in vars(module).items()]
        found.append(type(module))
    for param in net.parameters():
        found += [type(param), dict(vars(param)), param._backward_hooks, param._post_accumulate_grad_hooks, param.grad_fn]
    return found


@pytest.mark.parametrize("detail", ["cheap", "full"])
def test_nothing_is_put_on_modules_and_parameters(detail: Any) -> None:
    net = mlp()
    before = traces(net)
    watch = paramwatch.attach(net, detail=detail, raw_gradients=True)
    assert traces(net) == before
    optimizer = torch.optim.Adam(net.parameters())
    for i in range(3):
        optimizer.zero_grad()
        loss_of(net, i).backward()
        optimizer.step()
        assert traces(net) == before
        assert not optimizer._optimizer_step_pre_hooks
    watch.close()

    assert traces(net) == before


def torchs_globals() -> list[Any]:
    registries = (torch_optimizer._global_optimizer_pre_hooks, torch_optimizer._global_optimizer_post_hooks)
    return [*map(dict, registries), dict(vars(clip_grad)), torch.nn.modules.module._global_forward_hooks.copy()]


def test_after_close_torch_is_as_before() -> None:
    theirs = torch_optimizer.register_optimizer_step_pre_hook(lambda *_: None)
    before = torchs_globals()
    nets = mlp(0), mlp(1)
    watches = [paramwatch.attach(net, raw_gradients=True) for net in nets]
    assert torchs_globals() != before
    for net in nets:
        LOOPS["clipping"](net)
    for watch in watches:
        watch.close()

    assert torchs_globals() == before
    theirs.remove()


def test_a_clip_helper_that_someone_else_wrapped_in_turn_goes_on_working(monkeypatch: pytest.MonkeyPatch) -> None:
    net = mlp()
    watch = paramwatch.attach(net, raw_gradients=True)
    ours = clip_grad._group_tensors_by_device_and_dtype
    monkeypatch.setattr(clip_grad, "_group_tensors_by_device_and_dtype", lambda *args, **kwargs: ours(*args, **kwargs))
    watch.close()
    LOOPS["clipping"](net)
    with paramwatch.attach(net, raw_gradients=True) as watch:
        LOOPS["clipping"](net)

    assert (watch.steps["clip_coef"] < 1).all()
    monkeypatch.undo()
    paramwatch.attach(net, raw_gradients=True).close()
    assert clip_grad._group_tensors_by_device_and_dtype.__module__.startswith("torch")


def deep_copied(net: nn.Module) -> nn.Module:
    return copy.deepcopy(net)


def pickled(net: nn.Module) -> nn.Module:
    copied: nn.Module = pickle.loads(pickle.dumps(net))
    return copied


def saved(net: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(net, file)
    file.seek(0)
    loaded: nn.Module = torch.load(file, weights_only=False)
    return loaded


def compiled(net: nn.Module) -> nn.Module:
    made: nn.Module = torch.compile(net, backend="eager", fullgraph=True)
    return made


def exported(net: nn.Module) -> nn.Module:
    return torch.export.export(net, (torch.zeros(5, 3, dtype=torch.float64),)).module()


@pytest.mark.parametrize("copied", [deep_copied, pickled, saved, compiled, exported])
def test_a_watched_model_can_be_copied_saved_compiled_and_exported(copied: Callable[[nn.Module], nn.Module]) -> None:
    net = mlp()
    watch = paramwatch.attach(net)
    LOOPS["adam"](net)
    other = copied(net)
    x = torch.randn(5, 3, dtype=torch.float64)

    assert torch.equal(other(x), net(x))
    LOOPS["adam"](net)
    assert len(watch.steps) == 2 * STEPS


def test_a_copy_is_not_watched() -> None:
    net = mlp()
    watch = paramwatch.attach(net)
    LOOPS["sgd"](copy.deepcopy(net))

    assert len(watch.steps) == 0


@pytest.mark.parametrize("swap", [False, True])
def test_a_watched_model_can_be_converted(swap: bool) -> None:
    net = mlp()
    watch = paramwatch.attach(net)
    LOOPS["sgd"](net)
    torch.__future__.set_swap_module_params_on_conversion(swap)
    try:
        net.to(torch.float32)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    LOOPS["sgd"](net)

    assert len(watch.steps) == 2 * STEPS
    assert set(watch.parameters["dtype"]) == {"float32"}


@pytest.mark.parametrize("name", ["tied_head", "sparse_gradient", "bfloat16", "complex"])
def test_odd_models_train_the_same_while_watched(name: str) -> None:
    def end(watched: bool) -> list[Tensor]:
        net, optimizer = BY_NAME[name].build()
        watch = paramwatch.attach(net, detail="full") if watched else None
        for _ in range(3):
            optimizer.zero_grad()
            out = net(BY_NAME[name].batch())
            (torch.view_as_real(out) if out.is_complex() else out).square().mean().backward()
            optimizer.step()
        assert watch is None or len(watch.steps) == 3
        return [p.detach() for p in net.parameters()]

    assert_same(end(True), end(False))


# ---- failures of ours -----------------------------------------------------------------------

ENTRIES: dict[str, tuple[Any, str, str]] = {
    "entering": (recorder.Recorder, "begin", "entering an optimizer step"),
    "rows": (inventory.LiveInventory, "tensors", "entering an optimizer step"),
    "names": (inventory, "places", "entering an optimizer step"),
    "measuring": (recorder, "measure", "entering an optimizer step"),
    "gradients": (recorder.Recorder, "gradients", "measuring gradients"),
    "updates": (recorder, "measure_update", "recording an optimizer step"),
    "leaving": (recorder.Recorder, "end", "recording an optimizer step"),
    "reading": (measure.Reading, "numpy", "putting together the record of step 0"),
    "assembling": (worker, "assemble", "putting together the record of step 0"),
    "states": (assemble, "_states", "putting together the record of step 0"),
    "rules": (rules.FirstNonFinite, "__call__", "putting together the record of step 0"),
    "storing": (Store, "write", "writing step 0 to Store"),
    "closing": (recorder.Recorder, "finish", "closing"),
}


def failing(*_: Any, **__: Any) -> Any:
    raise ZeroDivisionError("ours")


@pytest.mark.parametrize("loop", ["adam", "lbfgs", "clipping"])
@pytest.mark.parametrize(("owner", "function", "doing"), ENTRIES.values(), ids=ENTRIES)
def test_a_failure_of_ours_is_reported_once_and_training_goes_on(
    owner: Any, function: str, doing: str, loop: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    expected = outcome(LOOPS[loop], None)
    net = dropout_net()
    watch = paramwatch.attach(net, raw_gradients=loop != "clipping")
    monkeypatch.setattr(owner, function, failing)
    losses = LOOPS[loop](net)
    watch.close()
    monkeypatch.undo()

    assert_same([losses, *net.state_dict().values(), *(p.grad for p in net.parameters()), torch.get_rng_state()], expected)
    (said,) = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert said.message.startswith(f"paramwatch failed while {doing} (ZeroDivisionError: ours). ")
    assert said.exc_info is not None
    assert said.exc_info[1].args == ("ours",)


def test_a_failure_before_clipping_is_contained(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    expected = outcome(LOOPS["clipping"], None)
    monkeypatch.setattr(recorder.LiveInventory, "tensors", failing)
    net = dropout_net()
    paramwatch.attach(net, raw_gradients=True)
    losses = LOOPS["clipping"](net)

    assert losses == expected[0]
    assert [record.message for record in caplog.records] == [
        "paramwatch failed while measuring gradients before clipping (ZeroDivisionError: ours). This Watch has stopped; training goes on."
    ]


def test_a_failure_of_one_watch_leaves_the_others_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    nets, sink = (mlp(0), mlp(1)), ListSink()
    first, second = paramwatch.attach(nets[0]), paramwatch.attach(nets[1], sinks=[sink])
    monkeypatch.setattr(first._recorder, "begin", failing)
    for net in nets:
        LOOPS["sgd"](net)
    second.close()

    assert len(sink.records) == STEPS
    assert first._guard.failed


def test_what_was_recorded_before_a_failure_can_be_read(monkeypatch: pytest.MonkeyPatch) -> None:
    net = mlp()
    watch = paramwatch.attach(net)
    LOOPS["sgd"](net)
    before = watch.frame()
    monkeypatch.setattr(watch._recorder, "begin", failing)
    LOOPS["sgd"](net)

    assert watch._guard.failed
    assert watch.frame().equals(before)
    watch.close()
    assert not torch_optimizer._global_optimizer_pre_hooks


def test_after_a_failure_the_model_can_be_attached_again(monkeypatch: pytest.MonkeyPatch) -> None:
    net = mlp()
    monkeypatch.setattr(paramwatch.attach(net)._recorder, "begin", failing)
    LOOPS["sgd"](net)
    watch = paramwatch.attach(net)
    LOOPS["sgd"](net)

    assert len(watch.steps) == STEPS


@pytest.mark.parametrize("method", ["begin", "gradients", "end"])
def test_an_interrupt_inside_our_code_passes(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    net = mlp()
    watch = paramwatch.attach(net)
    monkeypatch.setattr(watch._recorder, method, interrupted)
    with pytest.raises(KeyboardInterrupt):
        LOOPS["sgd"](net)
    monkeypatch.undo()
    LOOPS["sgd"](net)

    assert not watch._guard.failed
    assert list(watch.steps.index) == list(range(STEPS))
