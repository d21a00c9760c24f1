"""A watched run is the run without the watch, bit for bit; nothing stays on the model or in torch; our failures stay ours."""

from __future__ import annotations

import copy
import io
import logging
import pickle
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.optim.optimizer as torch_optimizer
from loops import LR, loss_of, mlp, sgd
from models import BY_NAME
from torch import Tensor, nn
from torch.nn.utils import clip_grad

import paramwatch
from paramwatch import assemble, inventory, measure, recorder, rules, steps, updates, worker
from paramwatch.store import Store
from paramwatch.testing import ListSink

pytestmark = pytest.mark.usefixtures("nothing_open")

Loop = Callable[[nn.Module], list[float]]
"""Trains a model, and gives the loss of each step."""


Step = Callable[..., None]
"""Makes a step, and calls something during it."""


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
        assert not watch.recorder.guard.failed
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
    return [*map(dict, registries), dict(vars(clip_grad)), dict(vars(torch)), torch.nn.modules.module._global_forward_hooks.copy()]


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


def closed_in_a_closure(watch: paramwatch.Watch, step: Step) -> None:
    step(lambda: watch.close())


def closed_in_an_own_hook(watch: paramwatch.Watch, step: Step) -> None:
    step(None, lambda *_: watch.close())


def closed_from_another_thread(watch: paramwatch.Watch, step: Step) -> None:
    def closing() -> None:
        thread = threading.Thread(target=watch.close)
        thread.start()
        thread.join()

    step(closing)


def closed_in_a_step_inside(watch: paramwatch.Watch, step: Step) -> None:
    step(lambda: step(lambda: watch.close()))


CLOSINGS = {
    "closure": closed_in_a_closure,
    "hook": closed_in_an_own_hook,
    "thread": closed_from_another_thread,
    "inside": closed_in_a_step_inside,
}


@pytest.mark.parametrize("strangers", ["none", "pre", "post", "both"])
@pytest.mark.parametrize("close", CLOSINGS.values(), ids=CLOSINGS)
def test_after_close_inside_a_step_torch_is_as_before_by_itself(close: Callable[..., None], strangers: str) -> None:
    net, calls = mlp(), [0, 0]

    def step(during: Callable[[], object] | None, hook: Callable[..., object] | None = None) -> None:
        def closure() -> Tensor:
            loss = loss_of(net)
            loss.backward()
            if during is not None:
                during()
            return loss

        optimizer = sgd(net)
        if hook is not None:
            optimizer.register_step_pre_hook(hook)
        optimizer.step(closure)

    def count(i: int) -> Callable[..., None]:
        def called(*_: Any) -> None:
            calls[i] += 1

        return called

    watch = paramwatch.attach(net)
    theirs = []
    if strangers in ("pre", "both"):
        theirs.append(torch_optimizer.register_optimizer_step_pre_hook(count(0)))
    if strangers in ("post", "both"):
        theirs.append(torch_optimizer.register_optimizer_step_post_hook(count(1)))
    close(watch, step)
    seen = tuple(calls)
    step(None)

    registries = (torch_optimizer._global_optimizer_pre_hooks, torch_optimizer._global_optimizer_post_hooks)
    assert [len(registry) for registry in registries] == [strangers in ("pre", "both"), strangers in ("post", "both")]
    assert [after - before for before, after in zip(seen, calls, strict=True)] == [len(registry) for registry in registries]
    for handle in theirs:
        handle.remove()


# a deprecation inside torch
@pytest.mark.filterwarnings("ignore:.*script_method:DeprecationWarning")
def test_after_close_inside_a_compiled_step_torch_is_as_before_by_itself() -> None:
    net = mlp()
    watch, optimizer = paramwatch.attach(net), sgd(net)
    theirs = torch_optimizer.register_optimizer_step_post_hook(lambda *_: None)

    @torch.compile(backend="eager")
    def compiled() -> None:
        optimizer.step()

    for i in range(4):
        loss_of(net, i).backward()
        if i == 2:
            optimizer.register_step_pre_hook(torch.compiler.disable(lambda *_: watch.close()))
        compiled()

    assert len(torch_optimizer._global_optimizer_pre_hooks) == 0
    assert len(torch_optimizer._global_optimizer_post_hooks) == 1
    theirs.remove()


def test_hooks_are_not_taken_away_while_another_thread_is_inside_a_step() -> None:
    net, inside, go_on = mlp(), threading.Event(), threading.Event()

    def waiting(*_: Any) -> None:
        inside.set()
        go_on.wait(30)

    watch = paramwatch.attach(net)
    first = torch_optimizer._global_optimizer_pre_hooks
    theirs = torch_optimizer.register_optimizer_step_pre_hook(waiting)
    # the other thread is held by a hook that comes before ours
    first.move_to_end(theirs.id, last=False)
    failures: list[BaseException] = []
    stranger = mlp(1)

    def stepping() -> None:
        try:
            sgd(stranger).step()
        except BaseException as error:  # noqa: BLE001
            failures.append(error)

    thread = threading.Thread(target=stepping)
    thread.start()
    inside.wait(30)
    watch.close()
    go_on.set()
    thread.join()
    theirs.remove()
    sgd(stranger).step()

    assert not failures
    assert not first


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


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda net: pickle.loads(pickle.dumps(net))], ids=["deepcopy", "pickle"])
@pytest.mark.parametrize("log_dir", [None, "run"])
def test_a_module_that_holds_its_watch_can_be_copied(copied: Callable[[nn.Module], nn.Module], log_dir: str | None, tmp_path: Path) -> None:
    net = mlp()
    net.watch = paramwatch.attach(net, None if log_dir is None else tmp_path / log_dir)
    LOOPS["sgd"](net)
    net.watch.flush()
    copy_of = copied(net).watch

    assert type(copy_of) is paramwatch.Run
    assert copy_of.path == net.watch.path
    assert len(copy_of.steps) == STEPS if log_dir else repr(copy_of) == "<Run in memory: no steps yet>"
    if log_dir is None:
        assert copy_of.findings.empty
        with pytest.raises(paramwatch.ParamWatchError, match="its records stayed with the Watch itself"):
            copy_of.frame()
    LOOPS["sgd"](net)
    assert len(net.watch.steps) == 2 * STEPS


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
    "updates": (updates, "measure_end", "recording an optimizer step"),
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
    monkeypatch.setattr(recorder.LiveInventory, "named", failing)
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
    monkeypatch.setattr(first.recorder, "begin", failing)
    for net in nets:
        LOOPS["sgd"](net)
    second.close()

    assert len(sink.records) == STEPS
    assert first.recorder.guard.failed


def test_a_failure_to_read_the_stacks_of_other_threads_is_contained(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    net = mlp()
    watch = paramwatch.attach(net)
    with monkeypatch.context() as patch:
        patch.setattr(steps, "steps_running", failing)
        patch.setattr(steps, "is_only_step", failing)
        LOOPS["sgd"](net)
        watch.close()
        LOOPS["sgd"](net)
    LOOPS["sgd"](net)

    assert caplog.text.count("paramwatch failed while taking away the hooks") == 1
    assert not torch_optimizer._global_optimizer_pre_hooks


def test_a_failure_that_stops_all_watches_is_known_to_each(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    nets = net, _ = mlp(0), mlp(1)
    watches = [paramwatch.attach(each, raw_gradients=True) for each in nets]
    LOOPS["sgd"](net)
    monkeypatch.setattr(steps, "open_entry", failing)
    LOOPS["sgd"](net)
    for watch in watches:
        watch.close()

    assert [watch.recorder.guard.failed for watch in watches] == [True, True]
    failure, report = (record.message for record in caplog.records)
    assert failure.endswith("Recording has stopped; training goes on.")
    assert report == f"paramwatch: {STEPS} optimizer steps of Sequential seen before the failure, 4 rows"
    assert vars(clip_grad)["_group_tensors_by_device_and_dtype"].__module__.startswith("torch.")


def test_what_was_recorded_before_a_failure_can_be_read(monkeypatch: pytest.MonkeyPatch) -> None:
    net = mlp()
    watch = paramwatch.attach(net)
    LOOPS["sgd"](net)
    before = watch.frame()
    monkeypatch.setattr(watch.recorder, "begin", failing)
    LOOPS["sgd"](net)

    assert watch.recorder.guard.failed
    assert watch.frame().equals(before)
    watch.close()
    assert not torch_optimizer._global_optimizer_pre_hooks


def test_after_a_failure_the_model_can_be_attached_again(monkeypatch: pytest.MonkeyPatch) -> None:
    net = mlp()
    monkeypatch.setattr(paramwatch.attach(net).recorder, "begin", failing)
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
    monkeypatch.setattr(watch.recorder, method, interrupted)
    with pytest.raises(KeyboardInterrupt):
        LOOPS["sgd"](net)
    monkeypatch.undo()
    LOOPS["sgd"](net)

    assert not watch.recorder.guard.failed
    assert list(watch.steps.index) == list(range(STEPS))
