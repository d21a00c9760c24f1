"""Where uses cannot be told apart that is said in one sentence, with the way out, and the frame has `(unattributed)` in their place."""

from __future__ import annotations

import contextlib
import copy
import logging
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules import module as torch_modules
from used_models import OverTime, shared_mlp

import paramwatch
from paramwatch import Watch
from paramwatch.uses.obstacles import WAYS, merged

X = torch.randn(16, 4, generator=torch.Generator().manual_seed(0))

Forward = Callable[[nn.Module], Tensor]
"""A model's loss."""

pytestmark = [
    # what dynamo does to itself
    pytest.mark.filterwarnings("ignore:.*script_method` is deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*torch.jit.(trace|script).* is deprecated:DeprecationWarning"),
]


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return shared_mlp(True)[0]


def train(net: nn.Module, forward: Forward, steps: int = 3, **options: Any) -> Watch:
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    with paramwatch.attach(net, **{"uses": 1, **options}) as watch:
        for _ in range(steps):
            optimizer.zero_grad()
            forward(net).backward()
            optimizer.step()
    assert not watch.recorder.splits.guard.failed  # type: ignore[union-attr]  # with `uses` there are splits
    assert not torch_modules._global_forward_hooks
    return watch


def sentence(caplog: pytest.LogCaptureFixture) -> str:
    """The one thing that was said, but for what a Watch of an earlier test says at its end."""
    said = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    (found,) = [message for message in said if "optimizer steps of" not in message]
    return found


def assert_unattributed(watch: Watch, mode: str, *rows: str, steps: int = 3) -> None:
    uses = watch.uses()
    assert list(uses.index) == [(step, row, "(unattributed)") for step in range(steps) for row in rows]
    assert uses["use_share"].eq(1).all()
    assert list(uses["mode"].unique()) == [mode]
    grads = watch.frame().loc[uses.index.droplevel("use"), "grad_norm"]
    assert list(uses["use_norm"]) == pytest.approx(list(grads), rel=1e-6)
    assert watch.agreement()["use_count"].eq(0).all()
    assert watch.agreement()["agreement"].isna().all()


# ---- what is compiled -------------------------------------------------------------------------


def beside(net: nn.Module) -> Callable[[Tensor], Tensor]:
    return torch.compile(net, backend="eager")


def in_place(net: nn.Module) -> Callable[[Tensor], Tensor]:
    net.compile(backend="eager")
    return net


def in_part(net: nn.Module) -> Callable[[Tensor], Tensor]:
    net[2].compile(backend="eager")
    return net


@pytest.mark.parametrize(("compiled", "what"), [(beside, "the model"), (in_place, "the model"), (in_part, "'2'")])
def test_a_compiled_model_is_named_and_the_way_out(compiled: Callable[..., Any], what: str, caplog: pytest.LogCaptureFixture) -> None:
    net = mlp()
    call = compiled(net)

    watch = train(net, lambda _: call(X).square().mean())

    assert f"uses inside a compiled region cannot be told apart, and {what} is one" in sentence(caplog)
    assert "torch.compiler.set_stance('force_eager')" in sentence(caplog)
    assert_unattributed(watch, "off", "2.weight", "2.bias")


def test_a_step_of_a_compiled_model_that_runs_eagerly_is_split() -> None:
    net, bare = mlp(), mlp()
    call, bare_call = (torch.compile(each, backend="eager") for each in (net, bare))
    optimizers = [torch.optim.SGD(each.parameters(), lr=0.1) for each in (net, bare)]
    with paramwatch.attach(net, uses=3) as watch:
        for step in range(5):
            for each, optimizer in zip((call, bare_call), optimizers, strict=True):
                optimizer.zero_grad()
                with torch.compiler.set_stance("force_eager" if step in (2, 3) else "default"):
                    each(X).square().mean().backward()
                    optimizer.step()
            if step == 2:
                twin = copy.deepcopy(net)
                twin[4] = copy.deepcopy(twin[2])

    twin.zero_grad()
    twin(X).square().mean().backward()
    norms = watch.uses(parameters="2.weight")["use_norm"]
    assert list(norms.index) == [(0, "2.weight", "(unattributed)"), (3, "2.weight", "2"), (3, "2.weight", "4")]
    assert list(norms[3]) == pytest.approx([float(twin[i].weight.grad.norm()) for i in (2, 4)], rel=1e-5)
    assert all(torch.equal(one, other) for one, other in zip(net.parameters(), bare.parameters(), strict=True))


def never_called(net: nn.Module) -> Any:
    beside(net)
    return net


def called_in_a_validation(net: nn.Module) -> Any:
    call = beside(net)

    def forward(x: Tensor) -> Tensor:
        with torch.no_grad():
            call(x)
        return net(x)

    return forward


def beside_a_compiled_teacher(net: nn.Module) -> Any:
    teacher = beside(nn.Sequential(nn.Linear(4, 4), nn.Tanh()))
    return lambda x: net(teacher(x))


def disabled(net: nn.Module) -> Any:
    return torch.compiler.disable(net)


def told_to_be_eager_in_the_step_itself(net: nn.Module) -> Any:
    call = beside(net)

    def forward(x: Tensor) -> Tensor:
        with torch.compiler.set_stance("force_eager"):
            return call(x)

    return forward


@pytest.mark.parametrize(
    "way", [never_called, called_in_a_validation, beside_a_compiled_teacher, disabled, told_to_be_eager_in_the_step_itself]
)
def test_a_step_that_runs_eagerly_is_split_whatever_is_compiled_beside_it(
    way: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    torch._dynamo.reset()
    net, graphs = mlp(), []
    for watched in (False, True):
        torch._dynamo.utils.counters.clear()
        call = way(net)
        if watched:
            watch = train(net, lambda net: call(X).square().mean())  # noqa: B023  # called at once
        else:
            call(X).square().mean().backward()
        graphs.append(torch._dynamo.utils.counters["frames"]["total"])
        torch._dynamo.reset()

    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert list(watch.uses(parameters="2.weight").loc[0].droplevel("parameter").index) == ["2", "4"]
    assert watch.agreement()["residual"].lt(1e-6).all()
    # hooks are no part of what is compiled
    assert graphs[0] == graphs[1]


def test_a_step_that_is_compiled_in_part_is_not_split_and_the_next_one_is() -> None:
    net = mlp()
    call, optimizer = beside(net), torch.optim.SGD(net.parameters(), lr=0.1)
    with paramwatch.attach(net, uses=1) as watch:
        for step in range(3):
            optimizer.zero_grad()
            net(X).square().mean().backward()
            (call if step == 1 else net)(X).square().mean().backward()
            optimizer.step()

    uses = watch.uses(parameters="2.weight").reset_index()
    assert [(step, use) for step, use in zip(uses["step"], uses["use"], strict=True)] == [
        (0, "2"), (0, "4"), (1, "(unattributed)"), (2, "2"), (2, "4"),
    ]  # fmt: skip
    assert list(uses["mode"]) == ["full", "full", "off", "full", "full"]


class CompiledInside(nn.Module):
    """What is compiled here is no module, and uses a weight twice."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = self.again = nn.Linear(4, 4)
        self.twice = torch.compile(self._twice, backend="aot_eager")

    def _twice(self, x: Tensor) -> Tensor:
        return F.linear(torch.tanh(F.linear(x, self.layer.weight, self.layer.bias)), self.layer.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.twice(x) + self.layer(x)


def test_a_compiled_function_inside_is_one_use_of_those_it_holds(caplog: pytest.LogCaptureFixture) -> None:
    watch = train(CompiledInside(), lambda net: net(X).square().mean())

    assert "the uses of 'layer.weight', 'layer.bias' inside 'compiledfunction' cannot be told apart" in sentence(caplog)
    assert "force_eager" in sentence(caplog)
    inside, outside = watch.uses(parameters="layer.weight", steps=slice(0, 1)).index.get_level_values("use")
    assert (inside, outside) == ("(root):compiledfunction [merged in compiledfunction]", "layer")
    assert watch.agreement()["residual"].lt(1e-6).all()


# torch itself looks at the gradients of what it compiles with
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
# torch 2.6 does so with whatever hooks there are in what it compiles
@pytest.mark.filterwarnings("ignore:Trying to prepend a node to itself:UserWarning")
def test_a_step_of_which_the_backward_pass_is_compiled_is_named_and_the_others_are_split(caplog: pytest.LogCaptureFixture) -> None:
    from torch._dynamo.compiled_autograd import _enable

    ends, graphs = [], []
    for watched in (False, True):
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        net = mlp()
        optimizer, watch = torch.optim.SGD(net.parameters(), lr=0.1), paramwatch.attach(net, **({"uses": 1} if watched else {}))
        with watch:
            for step in range(6):
                optimizer.zero_grad()
                loss, stance = net(X).square().mean(), "force_eager" if step == 4 else "default"
                compiled = _enable(torch.compile(backend="eager", fullgraph=True)) if step in (1, 2, 4) else contextlib.nullcontext()
                with torch.compiler.set_stance(stance), compiled:
                    loss.backward()
                optimizer.step()
        ends.append(list(net.parameters()))
        graphs.append([dict(torch._dynamo.utils.counters[kind]) for kind in ("compiled_autograd", "frames", "graph_break")])
    torch._dynamo.reset()

    assert all(map(torch.equal, *ends))
    # hooks are no part of what is compiled
    assert graphs[0] == graphs[1]
    assert "the backward pass is compiled (compiled autograd)" in sentence(caplog)
    assert not watch.recorder.splits.guard.failed  # type: ignore[union-attr]  # with `uses` there are splits
    modes = watch.uses(parameters="2.weight")["mode"].groupby("step").agg(list)
    assert list(modes) == [["none"] if step in (1, 2) else ["full", "full"] for step in range(6)]


# ---- what is one operation --------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:TF32 acceleration on top of oneDNN:UserWarning")
@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch has no fused LSTM for the CPU")
def test_a_fused_lstm_is_one_use_and_without_the_fusion_it_is_one_at_each_moment(caplog: pytest.LogCaptureFixture) -> None:
    net, x = OverTime("LSTM", True, 7), torch.randn(7, 4, 6)

    fused = train(net, lambda net: net(x).square().mean(), uses_of="layer.*")

    said = sentence(caplog)
    assert "'layer.weight_ih_l0', 'layer.weight_hh_l0', 'layer.bias_ih_l0' and 1 more inside 'mkldnnrnnlayer' cannot be told apart" in said
    assert "torch.backends.mkldnn.flags(enabled=False)" in said
    assert set(fused.uses().index.get_level_values("use")) == {"layer [merged in mkldnnrnnlayer]"}
    with torch.backends.mkldnn.flags(enabled=False):
        apart = train(net, lambda net: net(x).square().mean(), steps=1, uses_of="layer.weight_hh*")
    assert list(apart.uses().loc[(0, "layer.weight_hh_l0")].index) == [f"layer#{t}" for t in range(7)]
    assert sentence(caplog) == said


def test_a_scripted_model_is_one_operation_once_it_is_compiled(caplog: pytest.LogCaptureFixture) -> None:
    watch = train(torch.jit.script(mlp()), lambda net: net(X).square().mean())

    assert "the uses of '2.weight', '2.bias' inside 'differentiablegraph' cannot be told apart" in sentence(caplog)
    assert "(root):differentiablegraph [merged in differentiablegraph]" in str(list(watch.uses().loc[2].index))


@pytest.mark.parametrize("operation", WAYS)
def test_each_operation_that_holds_several_uses_has_a_way_out(operation: str) -> None:
    said = merged(operation, ["a.weight"])

    assert said.startswith(f"the uses of 'a.weight' inside {operation!r} cannot be told apart")
    assert said.endswith(WAYS[operation])


# ---- what is not seen -------------------------------------------------------------------------


def with_other_parameters(net: nn.Module) -> Tensor:
    scaled = {name: 2 * parameter for name, parameter in net.named_parameters()}
    return torch.func.functional_call(net, scaled, (X,)).square().mean()


def traced(net: nn.Module) -> Tensor:
    return torch.jit.trace(copy.copy(net), X)(X).square().mean()


def replicated(net: nn.Module) -> Tensor:
    """As `nn.DataParallel` does it: copies of the modules, each called in a thread of its own."""
    outputs: list[Any] = [None, None]

    def work(i: int) -> None:
        outputs[i] = torch.func.functional_call(replica, copies[i], (X[8 * i : 8 * i + 8],))

    class Parallel(nn.Module):
        def forward(self) -> Tensor:
            for i in range(2):
                thread = threading.Thread(target=work, args=(i,))
                thread.start()
                thread.join()
            return torch.cat(outputs)

    replica = copy.deepcopy(net)
    copies = [{name: parameter.view_as(parameter) * 1 for name, parameter in net.named_parameters()} for _ in range(2)]
    return Parallel()().square().mean()


def by_hand(net: nn.Module) -> Tensor:
    h = torch.tanh(F.linear(torch.ones(3, 8), net[2].weight, net[2].bias))
    return F.linear(h, net[2].weight, net[2].bias).square().mean()


def with_swapped_parameters(net: nn.Module) -> Tensor:
    own = net[2].weight, net[2].bias
    net[2].weight = net[4].weight = nn.Parameter(2 * own[0].detach())
    net[2].bias = net[4].bias = nn.Parameter(2 * own[1].detach())
    loss = net(X).square().mean()
    net[2].weight, net[2].bias = net[4].weight, net[4].bias = own
    return loss + net(X).square().mean()


def with_tensors_of_its_own(net: nn.Module) -> Tensor:
    fast = {name: parameter.detach().clone().requires_grad_() for name, parameter in net.named_parameters()}
    return 5 * torch.func.functional_call(net, fast, 2 * X).square().mean()


def probed(net: nn.Module) -> Tensor:
    """Gradients of each sample, looked at beside the training."""
    own = {name: parameter.detach() for name, parameter in net.named_parameters()}

    def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(net, parameters, (x,)).square().mean()

    torch.func.vmap(torch.func.grad(loss), (None, 0))(own, X)
    return torch.zeros(())


@pytest.mark.parametrize("other", [with_tensors_of_its_own, probed])
@pytest.mark.parametrize("first", [False, True])
def test_tensors_of_someone_s_own_in_the_place_of_parameters_contribute_nothing(other: Forward, first: bool) -> None:
    def both(net: nn.Module) -> Tensor:
        loss = other(net) if first else net(X).square().mean()
        return loss + (net(X).square().mean() if first else other(net))

    frames = []
    for forward in (lambda net: net(X).square().mean(), both):
        torch.manual_seed(0)
        net = mlp()
        net[4] = nn.Linear(8, 8)
        net[4].weight, net[4].bias = net[2].weight, net[2].bias
        frames.append(train(net, forward, steps=1, include=["2.weight"]).uses().to_numpy())

    assert len(frames[0]) == 2
    assert (frames[0] == frames[1]).all()


@pytest.mark.parametrize("forward", [with_other_parameters, with_swapped_parameters, traced, replicated, by_hand])
def test_what_no_use_was_seen_of_is_named_once_with_what_may_be_the_cause(forward: Forward, caplog: pytest.LogCaptureFixture) -> None:
    net = mlp()
    # torch.func.functional_call leaves its own tensors in a module of two names
    net[4] = nn.Linear(8, 8)
    net[4].weight, net[4].bias = net[2].weight, net[2].bias
    watch = train(net, forward, include=["2.*"])

    assert "no use of '2.weight' and '2.bias' was found in the autograd graph" in sentence(caplog)
    for word in ("compiled", "scripted", "torch.func.functional_call", "nn.DataParallel", "watch.root(loss)", "force_eager"):
        assert word in sentence(caplog)
    assert_unattributed(watch, "none", "2.weight", "2.bias")
    assert list(watch.findings["rule"]) == ["unattributed_use"]


def test_a_single_use_is_told_where_something_else_adds_to_its_gradient_and_nowhere_else(caplog: pytest.LogCaptureFixture) -> None:
    def losses(net: nn.Module) -> list[Tensor]:
        return [net(X).square().mean(), net[0].weight.square().sum()]

    net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
    expected = [float(torch.autograd.grad(loss, net[0].weight)[0].norm()) for loss in losses(net)]
    uses = train(net, lambda net: torch.stack(losses(net)).sum(), steps=1, uses_of="*").uses()

    assert list(uses.index) == [(0, "0.weight", "0"), (0, "0.weight", "(unattributed)")]
    np.testing.assert_allclose(uses["use_norm"], expected, rtol=1e-5)
    assert "watch.root(loss)" in sentence(caplog)


@pytest.mark.parametrize("named", [False, True])
def test_a_part_that_was_found_in_no_use_is_named_with_its_size(named: bool, caplog: pytest.LogCaptureFixture) -> None:
    net = mlp()
    with paramwatch.attach(net, uses=1) as watch:
        loss = net(X).square().mean() + 0.1 * net[2].weight.square().mean()
        if named:
            watch.root(loss)
        loss.backward()
        torch.optim.SGD(net.parameters(), lr=0.1).step()

    residual = watch.agreement()["residual"][0, "2.weight"]
    if named:
        assert not caplog.records
        assert residual < 1e-6
    else:
        assert f"part of the gradient of '2.weight' ({residual:.0%} of its norm) was found in no use" in sentence(caplog)
        assert "watch.root(loss)" in sentence(caplog)


def test_a_gradient_of_zeros_that_nothing_was_added_to_needs_no_use(caplog: pytest.LogCaptureFixture) -> None:
    def forward(net: nn.Module) -> Tensor:
        for parameter in net.parameters():
            parameter.grad = torch.zeros_like(parameter)
        return net["used"](X).square().mean()

    watch = train(nn.ModuleDict({"used": mlp(), "idle": mlp()}), forward)

    assert not caplog.records
    assert set(watch.uses().index.get_level_values("parameter")) == {"used.2.weight", "used.2.bias"}


def test_what_is_used_once_is_neither_split_nor_unattributed(caplog: pytest.LogCaptureFixture) -> None:
    watch = train(mlp(), lambda net: net(X).square().mean(), uses_of="*")

    assert set(watch.uses().index.get_level_values("parameter")) == {"2.weight", "2.bias"}
    assert not caplog.records


# ---- threads, and other versions of torch -----------------------------------------------------


def test_calls_from_several_threads_at_once_are_named_and_nothing_is_lost(caplog: pytest.LogCaptureFixture) -> None:
    both_inside, outputs = threading.Barrier(2), [torch.empty(0)] * 2

    class Meets(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            both_inside.wait()
            return x

    net = mlp()
    net.insert(0, Meets())

    def forward(net: nn.Module) -> Tensor:
        def work(i: int) -> None:
            outputs[i] = net(X[8 * i : 8 * i + 8])

        threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return torch.cat(outputs).square().mean()

    watch = train(net, forward)

    assert "modules are called from several threads at once" in sentence(caplog)
    assert "DistributedDataParallel has a process for each device" in sentence(caplog)
    shares = watch.uses()["use_share"].groupby(["step", "parameter"]).sum()
    assert list(shares) == pytest.approx([1] * 6, abs=1e-6)


@pytest.mark.parametrize(("owner", "name"), [(torch.autograd, "_get_sequence_nr"), (torch._C, "_current_graph_task_id")])
def test_a_torch_without_what_is_needed_is_named_and_all_else_is_recorded(
    owner: Any, name: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delattr(owner, name)
    net, bare = mlp(), mlp()

    watch = train(net, lambda net: net(X).square().mean())

    assert f"{name}, which tells in which call an operation was made; another version of torch" in sentence(caplog)
    assert_unattributed(watch, "off", "2.weight", "2.bias")
    optimizer = torch.optim.SGD(bare.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        bare(X).square().mean().backward()
        optimizer.step()
    assert all(torch.equal(one, other) for one, other in zip(net.parameters(), bare.parameters(), strict=True))
