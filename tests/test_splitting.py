"""Splitting in the middle of training: which steps, what is recorded of them, that nothing changes and nothing stays."""

from __future__ import annotations

import copy
import gc
import io
import logging
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules import module as torch_modules
from used_models import CASES, Case, LanguageModel, shared_mlp

import paramwatch
from paramwatch import ParamWatchError, Watch
from paramwatch.uses import gram as naive
from paramwatch.uses import watched

pytestmark = pytest.mark.usefixtures("nothing_open")

X = torch.randn(16, 4, generator=torch.manual_seed(0))


def global_hooks() -> int:
    names = ("_global_forward_hooks", "_global_forward_pre_hooks", "_global_forward_hooks_always_called", "_global_backward_hooks")
    return sum(len(getattr(torch_modules, name)) for name in names)


def hooks_on(net: nn.Module) -> int:
    own = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in net.modules())
    return own + sum(len(p._backward_hooks or ()) for p in net.parameters())


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return shared_mlp(True)[0]


def train(net: nn.Module, steps: int, backwards: int = 1, **options: Any) -> Watch:
    watch = paramwatch.attach(net, uses=1, **options)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        for batch in X.chunk(backwards):
            net(batch).square().mean().backward()
        optimizer.step()
    return watch


def run(case: Case, watched: bool, steps: int = 3) -> tuple[list[float], list[Tensor]]:
    net, loss, _ = case.build(tied=True)
    watch = paramwatch.attach(net, uses=2, uses_of="*") if watched else None
    optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        value = loss(net)
        value.backward()
        optimizer.step()
        losses.append(value.item())
    if watch is not None:
        watch.close()
        assert not watch.recorder.guard.failed
        assert not watch.recorder.splits.guard.failed
    assert global_hooks() == hooks_on(net) == 0
    return losses, [parameter.detach().clone() for parameter in net.parameters()]


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_training_is_the_same_bit_for_bit_with_and_without(case: Case) -> None:
    bare, watched = run(case, False), run(case, True)

    assert bare[0] == watched[0]
    assert all(torch.equal(one, other) for one, other in zip(bare[1], watched[1], strict=True))


def test_steps_that_are_multiples_are_split_and_nothing_is_installed_off_them() -> None:
    net = mlp()
    watch = paramwatch.attach(net, uses=3)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    armed = []
    for _ in range(7):
        armed.append(global_hooks() > 0)
        loss = net(X).square().mean()
        loss.backward()
        optimizer.step()
        assert hooks_on(net) == 0

    assert armed == [True, False, False, True, False, False, True]
    assert list(watch.agreement().index.unique("step")) == [0, 3, 6]
    watch.close()
    assert global_hooks() == 0


def test_where_nothing_was_split_of_what_is_asked_for_frames_are_empty_and_have_their_columns() -> None:
    watch = train(mlp(), 2)
    for frame in (watch.uses, watch.agreement):
        none = frame(steps=slice(50, 60))
        assert none.empty
        assert list(none.columns) == list(frame().columns)
    watch.close()


def test_frames_have_the_columns_of_the_design_live_and_loaded(tmp_path: Path) -> None:
    watch = train(mlp(), 2, log_dir=tmp_path)
    uses, agreement, cosines = watch.uses(), watch.agreement(), watch.use_cosines("4.weight", 1)
    watch.close()
    run = paramwatch.load(tmp_path)

    assert uses.index.names == ["step", "parameter", "use"]
    assert list(uses.columns) == ["use_norm", "use_share", "mode", "backwards"]
    assert list(uses.loc[(0, "2.weight")].index) == ["2", "4"]
    assert list(agreement.columns) == ["agreement", "coherence", "imbalance", "horizon", "residual", "unattributed", "use_count"]
    assert cosines.loc["2", "4"] == pytest.approx(agreement.loc[(1, "2.weight"), "agreement"], abs=1e-14)
    assert run.uses().equals(uses)
    assert run.agreement().equals(agreement)
    assert run.use_cosines("2.weight", 1).equals(cosines)
    assert list(run.uses(parameters="4.bias", steps=slice(1, 2), aliases=True).index.unique("parameter")) == ["2.bias", "4.bias"]
    assert paramwatch.load([tmp_path]).agreement().index.names == ["run", "step", "parameter"]


def test_use_norms_are_in_units_of_the_gradient_as_used() -> None:
    net = mlp()
    watch = paramwatch.attach(net, uses=1)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    (net(X).square().mean() * 1024).backward()
    torch.nn.utils.clip_grad_norm_(net.parameters(), 0.01)
    optimizer.step()
    uses, frame = watch.uses(), watch.frame()

    for name in ("2.weight", "2.bias"):
        both, used = uses.loc[(0, name)], frame.loc[(0, name), "grad_norm"]
        assert used < 0.011
        cosine = watch.use_cosines(name, 0).iloc[0, 1]
        one, two = both["use_norm"]
        assert np.sqrt(one**2 + two**2 + 2 * one * two * cosine) == pytest.approx(used, rel=1e-5)
        assert both["use_share"].sum() == pytest.approx(1, abs=1e-6)


def test_in_half_precision_shares_and_what_is_unattributed_sum_to_one_as_exactly_as_in_any() -> None:
    net = mlp().bfloat16()
    watch = paramwatch.attach(net, uses=1)
    net(X.bfloat16()).square().mean().backward()
    torch.optim.SGD(net.parameters(), lr=0.1).step()

    both = watch.uses()["use_share"].groupby("parameter").sum() + watch.agreement()["unattributed"].droplevel("step")
    assert list(both) == pytest.approx([1, 1], abs=1e-14)
    # what is rounding has no line of its own
    assert "(unattributed)" not in watch.uses().index.get_level_values("use")
    watch.close()


def untied_gradients(batches: list[Tensor]) -> dict[str, Tensor]:
    """Of the shared weight, by use, summed over batches."""
    torch.manual_seed(0)
    net = shared_mlp(False)[0]
    for batch in batches:
        net(batch).square().mean().backward()
    return {"2": net[2].weight.grad.double(), "4": net[4].weight.grad.double()}


def assert_split(watch: Watch, truth: dict[str, Tensor], step: int = 0, tolerance: float = 1e-5) -> None:
    uses = watch.uses(parameters="2.weight", steps=slice(step, step + 1)).droplevel(["step", "parameter"])
    total = sum(truth.values())
    for name, grad in truth.items():
        assert uses.loc[name, "use_norm"] == pytest.approx(float(grad.norm()), rel=tolerance)
        assert uses.loc[name, "use_share"] == pytest.approx(float((grad * total).sum() / total.square().sum()), rel=tolerance)
    assert list(uses.index) == list(truth)


def test_backward_passes_of_one_step_are_summed() -> None:
    watch = train(mlp(), 1, backwards=4)

    assert_split(watch, untied_gradients(list(X.chunk(4))))
    assert (watch.uses()[["mode", "backwards"]] == ["full", 4]).all(axis=None)


def test_beyond_the_budget_the_last_backward_counts_and_it_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watched, "LEAST_BUDGET", 0)
    monkeypatch.setattr(watched, "share_of_device", lambda device: 0)
    watch = train(mlp(), 1, backwards=2)

    assert list(watch.uses()["mode"].unique()) == ["full, last backward"]
    assert (watch.uses()["backwards"] == 1).all()
    last = untied_gradients([X.chunk(2)[1]])
    shares = watch.uses().loc[(0, "2.weight"), "use_share"]
    total = sum(last.values())
    assert list(shares) == pytest.approx([float((g * total).sum() / total.square().sum()) for g in last.values()], rel=1e-5)


@pytest.mark.parametrize(("budget", "mode"), [(5 * 768, "stream"), (0, "norms")])
def test_many_uses_are_streamed_beyond_the_budget_and_then_only_their_norms_known(
    budget: int, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = CASES["rnn_cell"]
    expected = watch_one_step(case)
    monkeypatch.setattr(watched, "LEAST_BUDGET", 1024 if mode == "stream" else 0)
    monkeypatch.setattr(watched, "share_of_device", lambda device: 0)

    watch = watch_one_step(case)

    assert list(watch.uses()["mode"].unique()) == [mode]
    for column in ("agreement", "coherence", "imbalance", "horizon", "use_count"):
        assert watch.agreement()[column].iloc[0] == pytest.approx(expected.agreement()[column].iloc[0], rel=1e-5, nan_ok=True)
    np.testing.assert_allclose(watch.uses()["use_norm"], expected.uses()["use_norm"], rtol=1e-6)
    assert watch.agreement()["residual"].lt(1e-6).all() == (mode == "stream")
    with pytest.raises(ParamWatchError, match=f"mode '{mode}'"):
        watch.use_cosines("cell.weight_hh", 0)


def test_a_step_that_is_no_number_is_an_error_that_says_what_is_expected() -> None:
    watch = watch_one_step(CASES["rnn_cell"])

    for step in ("x", None):
        with pytest.raises(ParamWatchError, match=r"step has to be the number of a step, as in use_cosines\("):
            watch.use_cosines("cell.weight_hh", step)  # type: ignore[arg-type]  # that is what is tested


def watch_one_step(case: Case, **options: Any) -> Watch:
    net, loss, _ = case.build(tied=True)
    watch = paramwatch.attach(net, **{"uses": 1, "uses_of": case.row, **options})
    loss(net).backward()
    torch.optim.SGD(net.parameters(), lr=0.1).step()
    watch.close()
    return watch


def test_a_closure_counts_as_its_last_evaluation() -> None:
    net = mlp()
    watch = paramwatch.attach(net, uses=1)
    optimizer = torch.optim.LBFGS(net.parameters(), lr=0.1, max_iter=3)
    last: list[dict[str, Tensor]] = []

    def closure() -> Tensor:
        optimizer.zero_grad(set_to_none=False)
        twin = copy.deepcopy(net)
        twin.zero_grad()
        twin[4] = copy.deepcopy(twin[2])
        twin(X).square().mean().backward()
        last.append({"2": twin[2].weight.grad.double(), "4": twin[4].weight.grad.double()})
        loss = net(X).square().mean()
        loss.backward()
        return loss

    optimizer.step(closure)

    assert len(last) > 1
    assert_split(watch, last[-1], tolerance=1e-4)


def test_two_losses_through_one_graph_are_summed() -> None:
    net = mlp()
    watch = paramwatch.attach(net, uses=1)
    loss = net(X).square().mean()
    loss.backward(retain_graph=True)
    loss.backward(create_graph=False)
    torch.optim.SGD(net.parameters(), lr=0.1).step()

    assert_split(watch, {name: 2 * grad for name, grad in untied_gradients([X]).items()})
    assert (watch.uses()["backwards"] == 2).all()


def penalised(net: nn.Module, root: Callable[[Tensor], None]) -> None:
    x = X.clone().requires_grad_()
    out = net(x)
    (slope,) = torch.autograd.grad(out.sum(), x, create_graph=True)
    loss = out.square().mean() + (slope.norm() - 1).square()
    root(loss)
    loss.backward()


def smooth() -> nn.Sequential:
    torch.manual_seed(0)
    shared = nn.Linear(4, 4)
    return nn.Sequential(shared, nn.Tanh(), shared, nn.Tanh(), nn.Linear(4, 1))


def test_a_gradient_penalty_is_unattributed_unless_the_loss_is_named() -> None:
    seen = {}
    for named in (False, True):
        net = smooth()
        watch = paramwatch.attach(net, uses=1)
        penalised(net, watch.root if named else lambda loss: None)
        torch.optim.SGD(net.parameters(), lr=0.1).step()
        seen[named] = watch.uses(parameters="0.weight").droplevel(["step", "parameter"]), watch.agreement(parameters="0.weight").iloc[0]
        assert seen[named][0]["use_share"].sum() == pytest.approx(1, abs=1e-6)

    assert list(seen[False][0].index) == ["0", "2", "(unattributed)"]
    assert abs(seen[False][1]["unattributed"]) > 0.01
    assert list(seen[True][0].index)[:2] == ["0", "2"]
    assert all(use.startswith("(outside)") for use in seen[True][0].index[2:])
    assert len(seen[True][0]) > 2
    assert seen[True][1]["residual"] < 1e-6


def test_a_nan_is_traced_to_its_use_and_a_rule_says_so() -> None:
    net = LanguageModel(True)
    watch = paramwatch.attach(net, uses=1)
    out = net(torch.tensor([[1, 2]]))
    # reaches the head alone: what goes further down is cut off
    head = net.lm_head(torch.full((1, 32), float("nan"))).sum() + F.embedding(torch.tensor([3]), net.embed.weight).sum() + out.sum()
    watch.root(head)
    head.backward()
    torch.optim.SGD(net.parameters(), lr=0.1).step()

    norms = watch.uses(parameters="embed.weight")["use_norm"].droplevel(["step", "parameter"])
    bad = norms[norms.isna()]
    assert list(bad.index) == ["lm_head#1"]
    assert norms.drop("lm_head#1").gt(0).all()
    assert "lm_head#1" in watch.findings.set_index("rule").loc["nonfinite_use", "message"]


def test_no_hook_is_left_after_an_exception_and_the_next_step_is_split() -> None:
    net = mlp()
    watch = paramwatch.attach(net, uses=1)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    with pytest.raises(RuntimeError):
        net(torch.randn(3, 5))
    net(X).square().mean().backward()
    optimizer.step()

    assert_split(watch, untied_gradients([X]))
    watch.close()
    assert global_hooks() == 0


def test_copies_made_in_mid_step_have_no_hooks_and_are_not_split() -> None:
    net = mlp()
    watch = paramwatch.attach(net, uses=1)
    loss = net(X).square().mean()
    copied, pickled = copy.deepcopy(net), pickle.loads(pickle.dumps(net))
    file = io.BytesIO()
    torch.save(net, file)
    loss.backward()
    copied(X).square().mean().backward()
    torch.optim.SGD(net.parameters(), lr=0.1).step()

    assert hooks_on(copied) == hooks_on(pickled) == hooks_on(net) == 0
    assert_split(watch, untied_gradients([X]))


class Held(torch.autograd.Function):
    """An operation whose context tells when the graph is freed."""

    alive = 0

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.token = Token()
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


class Token:
    def __init__(self) -> None:
        Held.alive += 1

    def __del__(self) -> None:
        Held.alive -= 1


def test_the_graph_is_freed_without_the_collector() -> None:
    net = mlp()
    watch = paramwatch.attach(net, uses=1)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    gc.collect()
    gc.disable()
    try:
        for _ in range(2):
            loss = net(Held.apply(net(X).expand(16, 4))).square().mean()
            assert Held.alive == 1
            loss.backward()
            del loss
            assert Held.alive == 0
            optimizer.step()
    finally:
        gc.enable()
    assert len(watch.uses().loc[0]) > 0


def test_the_model_is_collected_while_a_step_is_armed() -> None:
    net = mlp()
    watch = paramwatch.attach(net, uses=1)
    net(X).square().mean().backward()
    torch.optim.SGD(net.parameters(), lr=0.1).step()
    net(X)
    del net
    gc.collect()

    assert watch.watched() is None
    assert global_hooks() == 0
    assert len(watch.agreement()) == 2


def test_two_optimizers_and_one_backward_split_the_rows_of_both() -> None:
    net = smooth()
    watch = paramwatch.attach(net, uses=1)
    one, two = torch.optim.SGD([net[0].weight], lr=0.1), torch.optim.Adam([net[0].bias, *net[4].parameters()])
    for _ in range(2):
        net(X).square().mean().backward()
        for optimizer in (one, two):
            optimizer.step()
            optimizer.zero_grad()

    assert list(watch.agreement().index) == [(step, row) for step in (0, 1) for row in ("0.weight", "0.bias")]
    assert watch.agreement()["residual"].lt(1e-6).all()


def test_networks_that_take_turns_are_split_in_their_own_step() -> None:
    torch.manual_seed(0)
    nets = nn.ModuleDict({"d": nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 1)), "g": nn.Linear(4, 4)})
    watch = paramwatch.attach(nets, uses=1, uses_of="d.*")
    d, g = (torch.optim.SGD(nets[name].parameters(), lr=0.1) for name in "dg")
    truth = []
    for _ in range(3):
        d.zero_grad()
        real, fake = nets["d"](X), nets["d"](nets["g"](X).detach())
        weight = nets["d"][0].weight
        truth += [torch.autograd.grad(y.square().mean(), weight, retain_graph=True)[0].norm().item() for y in (real, fake)]
        (real.square().mean() + fake.square().mean()).backward()
        d.step()
        g.zero_grad()
        nets["d"](nets["g"](X)).square().mean().backward()
        g.step()

    norms = watch.uses(parameters="d.0.weight")["use_norm"]
    assert list(norms.index.get_level_values("use")) == ["call0:d.0", "call1:d.0"] * 3
    assert list(norms) == pytest.approx(truth, rel=1e-5)


def test_a_run_without_splits_says_how_to_ask_for_them() -> None:
    net = mlp()
    watch = paramwatch.attach(net)
    torch.optim.SGD(net.parameters(), lr=0.1).step()

    for ask in (watch.uses, watch.agreement, lambda: watch.use_cosines("2.weight", 0)):
        with pytest.raises(ParamWatchError, match=r"attach\(net, uses=N\)"):
            ask()


def test_what_was_not_split_is_named_with_the_nearest_that_was() -> None:
    watch = train(mlp(), 2)

    with pytest.raises(ParamWatchError, match="the nearest of them 1"):
        watch.use_cosines("2.weight", 9)
    with pytest.raises(ParamWatchError, match=r"'0.weight' was not split by use; nearest: '2.weight'"):
        watch.use_cosines("0.weight", 0)
    with pytest.raises(ParamWatchError, match="root takes the loss"):
        watch.root(1.0)


def test_gradient_hooks_of_others_on_a_parameter_show_as_unattributed() -> None:
    net = mlp()
    net[2].weight.register_hook(lambda grad: 3 * grad)
    watch = train(net, 1)

    assert watch.uses().loc[(0, "2.weight", "(unattributed)"), "use_share"] == pytest.approx(2 / 3, rel=1e-5)
    assert "(unattributed)" not in watch.uses().loc[(0, "2.bias")].index


def test_a_sparse_embedding_and_a_dense_head_are_split() -> None:
    torch.manual_seed(0)
    net = LanguageModel(True)
    net.embed.sparse = True
    watch = paramwatch.attach(net, uses=1)
    for _ in range(2):
        net(torch.tensor([[1, 2, 2]])).square().mean().backward()
    torch.optim.SGD(net.parameters(), lr=0.1).step()

    assert list(watch.uses().index.get_level_values("use")) == ["embed", "lm_head"]
    assert watch.agreement()["residual"].lt(1e-6).all()


@pytest.mark.parametrize("layout", [torch.sparse_coo, torch.sparse_csr])
# it is a prototype
@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta state:UserWarning")
def test_a_parameter_that_is_sparse_keeps_no_other_from_being_split(layout: torch.layout) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mixes, self.layer = nn.Parameter(torch.eye(4).to_sparse(layout=layout)), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(self.mixes @ self.layer(x[:4]))

    net = Net()
    with paramwatch.attach(net, uses=1, uses_of="*") as watch:
        net(X).square().mean().backward()
        torch.optim.SGD(net.layer.parameters(), lr=0.1).step()

    assert list(watch.uses().loc[(0, "layer.weight")].index) == ["layer@0", "layer@1"]


def test_inner_products_are_those_of_the_whole_tensors_for_any_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    grads = [torch.randn(1000, generator=torch.manual_seed(i)) for i in range(3)]
    total = sum(grads)
    whole = naive.plain_gram(grads, total)
    monkeypatch.setattr(naive, "_PIECE", 35)
    many = naive.plain_gram(grads, total)
    monkeypatch.setattr(naive, "MOST_PAIRS", 2)
    few = naive.plain_gram(grads, total)

    assert torch.allclose(whole, many, rtol=1e-12, atol=1e-15)
    known = ~few.isnan()
    assert known.sum() == 25 - 6
    assert torch.allclose(few[known], whole[known], rtol=1e-12, atol=1e-15)


def test_rows_that_are_asked_for_and_not_there_are_misuse() -> None:
    with pytest.raises(ParamWatchError, match="no row fits uses_of="):
        paramwatch.attach(mlp(), uses=1, uses_of="nowhere.*")


def test_a_model_without_ties_is_told_what_to_ask_for(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "paramwatch"):
        # what it says at its end must not reach the next test
        paramwatch.attach(nn.Linear(2, 2), uses=1).close()

    assert "uses_of='*'" in caplog.text
