"""Whatever is made of a watched model, its optimizer or a process of both is what would have been made of them unwatched.

`harness.assert_nothing_left`, which every loop of the truth harness calls after every step, is about the model itself; this is about what
comes of it: copies, files, scripts, graphs, processes.
"""

from __future__ import annotations

import contextlib
import copy
import gc
import io
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.optim.optimizer as torch_optimizer
from harness import assert_nothing_left
from loops import loss_of, mlp
from torch import Tensor, nn
from torch.func import functional_call
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import paramwatch
from paramwatch import attached

# what torch says of its own ways to script and trace
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.*` is (deprecated|not supported).*:DeprecationWarning")

Made = list[Any]
"""Tensors, strings, bytes: what can be compared."""


def trained() -> tuple[nn.Sequential, Optimizer]:
    net = mlp()
    return net, torch.optim.Adam(net.parameters(), lr=0.1)


def train(net: nn.Module, optimizer: Optimizer, first: int = 0, steps: int = 2) -> None:
    for i in range(first, first + steps):
        optimizer.zero_grad()
        loss_of(net, i).backward()
        nn.utils.clip_grad_norm_(net.parameters(), 0.1)
        optimizer.step()


def tensors(net: nn.Module) -> Made:
    return [tensor.detach().clone() for tensor in net.state_dict().values()]


def assert_same(found: Made, expected: Made) -> None:
    assert len(found) == len(expected) > 0
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other) if isinstance(one, Tensor) else one == other


X = torch.linspace(-1, 1, 15, dtype=torch.float64).reshape(5, 3)


# ---- made between steps -----------------------------------------------------------------------


def its_pickle(net: nn.Sequential, optimizer: Optimizer) -> Made:
    written = pickle.dumps((net, optimizer))
    other, stepping = pickle.loads(written)
    assert_nothing_left(other, [stepping])
    train(other, stepping, first=7)
    return [b"paramwatch" in written, sorted(vars(stepping)), *tensors(other)]


def its_file(net: nn.Sequential, optimizer: Optimizer) -> Made:
    file = io.BytesIO()
    torch.save({"net": net, "optimizer": optimizer, "state": net.state_dict()}, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    train(loaded["net"], loaded["optimizer"])
    return [file.getvalue(), *tensors(loaded["net"])]


def a_copy_of_both_that_is_trained(net: nn.Sequential, optimizer: Optimizer) -> Made:
    other, stepping = copy.deepcopy((net, optimizer))
    assert_nothing_left(other, [stepping])
    train(other, stepping, first=7)
    return [sorted(vars(stepping)), *tensors(other)]


def its_average(net: nn.Sequential, optimizer: Optimizer) -> Made:
    average = AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    average.update_parameters(net)
    assert_nothing_left(average, [])
    return [average(X).detach(), *tensors(average)]


def its_script(net: nn.Sequential, optimizer: Optimizer) -> Made:
    scripted = torch.jit.script(net)
    return [scripted.code, str(scripted.graph), scripted(X).detach()]


def its_trace(net: nn.Sequential, optimizer: Optimizer) -> Made:
    traced = torch.jit.trace(net, X)
    file = io.BytesIO()
    torch.jit.save(traced, file)
    file.seek(0)
    loaded = torch.jit.load(file)
    return [traced.code, loaded.code, loaded(X).detach()]


def its_symbolic_trace(net: nn.Sequential, optimizer: Optimizer) -> Made:
    module = torch.fx.symbolic_trace(net)
    assert_nothing_left(module, [])
    return [module.code, str(module.graph), module(X).detach()]


def its_export(net: nn.Sequential, optimizer: Optimizer) -> Made:
    program = torch.export.export(net, (X,))
    return [str(program.graph), str(program.graph_signature), sorted(program.state_dict), program.module()(X).detach()]


def a_functional_call(net: nn.Sequential, optimizer: Optimizer) -> Made:
    doubled = {name: 2 * param for name, param in net.named_parameters()}
    return [functional_call(net, doubled, (X,)).detach(), torch.func.vmap(net)(X).detach(), torch.func.jacrev(net)(X).detach()]


def its_shared_memory(net: nn.Sequential, optimizer: Optimizer) -> Made:
    net.share_memory()
    return [all(param.is_shared() for param in net.parameters()), *tensors(net)]


WAYS = (
    its_pickle,
    its_file,
    a_copy_of_both_that_is_trained,
    its_average,
    its_script,
    its_trace,
    its_symbolic_trace,
    its_export,
    a_functional_call,
    its_shared_memory,
)


@pytest.mark.parametrize("way", WAYS)
def test_what_is_made_of_a_watched_model_is_what_is_made_of_another(way: Callable[[nn.Sequential, Optimizer], Made]) -> None:
    outcomes = []
    for watched in (False, True):
        net, optimizer = trained()
        watch = paramwatch.attach(net, detail="full", raw_gradients=True) if watched else None
        train(net, optimizer)
        made = way(net, optimizer)
        train(net, optimizer, first=2)
        outcomes.append([*made, *tensors(net)])
        if watch is not None:
            # its own steps, and none of what was made of it
            assert len(watch.steps) == 4
            watch.close()
            assert not watch.recorder.guard.failed

    assert_same(*outcomes)


# ---- made inside a step -----------------------------------------------------------------------

Copy = Callable[..., None]


def in_a_hook_before(net: nn.Sequential, optimizer: Optimizer, take: Copy) -> None:
    optimizer.register_step_pre_hook(lambda *_: take())
    train(net, optimizer)


def in_a_hook_after(net: nn.Sequential, optimizer: Optimizer, take: Copy) -> None:
    optimizer.register_step_post_hook(lambda *_: take())
    train(net, optimizer)


def in_a_global_hook(net: nn.Sequential, optimizer: Optimizer, take: Copy) -> None:
    handle = torch_optimizer.register_optimizer_step_pre_hook(lambda *_: take())
    train(net, optimizer)
    handle.remove()


def in_a_closure(net: nn.Sequential, optimizer: Optimizer, take: Copy) -> None:
    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = loss_of(net)
        loss.backward()
        take()
        return loss

    optimizer.step(closure)
    optimizer.step(closure)


@pytest.mark.parametrize("way", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))], ids=["deepcopy", "pickle"])
@pytest.mark.parametrize("moment", [in_a_hook_before, in_a_hook_after, in_a_global_hook, in_a_closure])
def test_a_copy_of_model_and_optimizer_taken_inside_a_step_is_as_if_unwatched(moment: Callable[..., None], way: Any) -> None:
    outcomes = []
    for watched in (False, True):
        net, optimizer = trained()
        watch = paramwatch.attach(net, raw_gradients=True) if watched else None
        copies: list[tuple[nn.Module, Optimizer]] = []
        moment(net, optimizer, lambda copies=copies, net=net, optimizer=optimizer: copies.append(way((net, optimizer))))
        made = []
        for other, stepping in copies:
            assert_nothing_left(other, [stepping])
            made += [len(stepping._optimizer_step_pre_hooks), *tensors(other)]
            stepping._optimizer_step_pre_hooks.clear()
            stepping._optimizer_step_post_hooks.clear()
            train(other, stepping, first=7)
            made += tensors(other)
        outcomes.append([*made, *tensors(net)])
        assert watch is None or len(watch.steps) == 2
        if watch is not None:
            watch.close()

    assert_same(*outcomes)


# ---- processes --------------------------------------------------------------------------------


def child(rank: int, net: nn.Sequential, folder: str) -> None:
    """What a child process does: it looks for hooks, trains what it was given, and leaves that in a file."""
    torch.set_num_threads(1)
    hooks = len(torch_optimizer._global_optimizer_pre_hooks) + len(torch_optimizer._global_optimizer_post_hooks)
    optimizer = torch.optim.Adam(net.parameters(), lr=0.1)
    train(net, optimizer)
    assert_nothing_left(net, [optimizer])
    open_here = len(attached.opened)
    torch.save([hooks, open_here, *tensors(net)], Path(folder, "found"))


def in_a_spawned_process(net: nn.Sequential, folder: str) -> None:
    torch.multiprocessing.spawn(child, (net, folder))


def in_a_forked_process(net: nn.Sequential, folder: str) -> None:
    if not hasattr(os, "fork"):
        pytest.skip("this system does not fork")
    pid = os.fork()
    if pid == 0:
        try:
            child(0, net, folder)
        finally:
            os._exit(0)
    os.waitpid(pid, 0)


@pytest.mark.parametrize("process", [in_a_spawned_process, in_a_forked_process])
def test_another_process_trains_a_watched_model_as_if_it_were_not(process: Callable[..., None], tmp_path: Path) -> None:
    net, optimizer = trained()
    with paramwatch.attach(net, tmp_path / "run", raw_gradients=True) as watch:
        train(net, optimizer)
        other = copy.deepcopy(net)
        process(net, str(tmp_path))
        assert len(watch.steps) == 2
    train(other, torch.optim.Adam(other.parameters(), lr=0.1))
    hooks, open_there, *found = torch.load(tmp_path / "found")

    assert_same(found, tensors(other))
    assert (hooks, open_there) == (0, 0)


def test_steps_leave_nothing_to_the_collector() -> None:
    net, optimizer = trained()

    def step(closes: bool, raises: bool) -> None:
        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = loss_of(net, 0)
            loss.backward()
            assert not raises
            return loss

        with contextlib.suppress(AssertionError, TypeError):
            optimizer.step(closure if closes else 1 if raises else None)  # type: ignore[arg-type]  # cannot be called, so it raises

    with paramwatch.attach(net) as watch:
        step(True, False)
        watch.flush()
        gc.collect()
        gc.disable()
        gc.set_debug(gc.DEBUG_SAVEALL)
        try:
            for kind in ((True, False), (True, True), (False, False), (False, True), (True, False)):
                step(*kind)
            gc.collect()
            found = [type(each).__name__ for each in gc.garbage]
        finally:
            gc.set_debug(0)
            gc.garbage.clear()
            gc.enable()
    assert not {"Entry", "ReportingClosure", "OptimizerStep", "Tensor", "frame"} & set(found)
