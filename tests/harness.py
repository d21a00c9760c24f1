"""The truth harness: a training loop is run bare, and again watched, beside a bookkeeper that uses nothing of paramwatch.

A loop is a function of a `Lab`. It makes everything it needs, says which model it trains, and wraps each round of its optimizers in
`by_update` (plain SGD: what was used follows from what was done), in `by_twin` (any optimizer: a copy of it, given the gradient that the
loop believes in, must arrive at the same bits) or in `by_closure` (the same for a step that evaluates a closure). `verify` then asks for

- training that is the same bit for bit, watched or not, random numbers included;
- one record a round, in which gradients, parameters and updates are those of the bookkeeper;
- nothing on modules, parameters and optimizers after any step.
"""

from __future__ import annotations

import copy
import functools
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import truth
from torch import Tensor, nn
from torch.optim import Optimizer

import paramwatch
from paramwatch import Watch

LR = 0.125
"""A power of two, so that dividing an update by it rounds nothing."""

Loop = Callable[["Lab"], None]


@dataclass
class Used(truth.Truth):
    """A round: what each row was, used and became; rows that did not step are in `param` alone."""

    slack: truth.Numbers = field(default_factory=dict)
    """How far each element of a gradient that was found from an update may be off."""

    skipped: bool = False
    """Whether the step was not made: then it has no update."""

    @functools.cached_property
    def update(self) -> truth.Numbers:
        """Parameter after minus before, of the rows that stepped."""
        with np.errstate(invalid="ignore"):
            return {name: after - self.param[name] for name, after in self.after.items()}


class Lab:
    """What a loop is given. A bare one does nothing at all.

    Args:
        watched: Whether the model is watched and books are kept.
        options: For `attach`.
    """

    def __init__(self, watched: bool, options: dict[str, Any]) -> None:
        self.watched = watched
        self.options = options
        self.model: nn.Module
        self.watch: Watch | None = None
        self.rounds: list[Used] = []
        self.losses: list[float] = []
        self.records_raw = bool(options.get("raw_gradients"))
        """Whether gradients before clipping are expected."""
        self.compiles = False
        self.expected_findings: set[str] = set()
        """Rules that may speak in this loop; any other is a false alarm."""
        self._raw: truth.Numbers = {}

    def attach(self, model: nn.Module, **options: Any) -> None:
        """This is the model that is trained, now with the optimizers made before or after."""
        self.follow(model)
        if self.watched:
            self.watch = paramwatch.attach(model, **self.options | options)

    def follow(self, model: nn.Module) -> None:
        """This is the model that is trained; something else has it watched (a callback)."""
        self.model = model

    def raw(self, *optimizers: Optimizer, scale: float = 1.0) -> None:
        """Gradients (by default all, otherwise those these hold) are complete, times a scale, and not clipped yet."""
        if self.watched:
            held = _held(self.model, optimizers)
            self._raw |= {name: x / scale for name, x in truth.gradients(self.model).items() if not optimizers or name in held}

    @contextmanager
    def by_update(self, *optimizers: Optimizer, lr: float = LR) -> Iterator[None]:
        """Around a round of plain SGD: the gradient is (before - after) / lr, to the rounding of `before` and `after`."""
        if not self.watched:
            yield
            return
        before = _numbers(self.model)
        yield
        stepped = _held(self.model, optimizers)
        after = {name: x for name, x in _numbers(self.model).items() if name in stepped}
        grad, slack = {}, {}
        for name, now in after.items():
            if stepped[name].grad is not None or not np.array_equal(before[name], now):
                grad[name] = (before[name] - now) / lr
                eps = torch.finfo(stepped[name].dtype).eps
                slack[name] = eps * np.maximum(np.abs(before[name]), np.abs(now)) / lr
        self._note(Used(before, grad, after, {}, slack=slack), optimizers)

    @contextmanager
    def by_twin(self, *optimizers: Optimizer, grads: Callable[[nn.Module], object] | None = None) -> Iterator[None]:
        """Around a round of any optimizers: the gradients are those there are now, and a copy that uses them does the same.

        Args:
            optimizers: Each steps once, without a closure.
            grads: Makes of a copy's gradients those that will be used (unscales or clips them as a hook will).
        """
        if not self.watched:
            yield
            return
        model, twins = self._twin(optimizers)
        if grads is not None:
            grads(model)
        used = truth.gradients(model)
        with self._against(model, optimizers, twins, lambda: used):
            for twin in twins:
                twin.step()
            yield

    @contextmanager
    def by_closure(self, optimizer: Optimizer, closure: Callable[[nn.Module, Optimizer], Callable[[], Tensor]]) -> Iterator[None]:
        """Around `optimizer.step(closure(model, optimizer))`: the gradients are those of a copy's last evaluation."""
        if not self.watched:
            yield
            return
        model, (twin,) = self._twin([optimizer])
        evaluate, seen = closure(model, twin), [truth.gradients(model)]

        def recording() -> Tensor:
            loss = evaluate()
            seen.append(truth.gradients(model))
            return loss

        with self._against(model, [optimizer], [twin], lambda: seen[-1]):
            with torch.random.fork_rng(devices=[]):
                twin.step(recording)
            yield

    @contextmanager
    def by_nothing(self, *optimizers: Optimizer, scale: float = 1.0) -> Iterator[None]:
        """Around a round that a `GradScaler` which met an infinity skips: nothing changes, and the gradients are those there are then.

        Args:
            optimizers: None of them changes anything.
            scale: By which the gradients are still multiplied, as they are where the optimizer itself would have divided.
        """
        if not self.watched:
            yield
            return
        before = _numbers(self.model)
        yield
        stepped, after = _held(self.model, optimizers), _numbers(self.model)
        for name in stepped:
            np.testing.assert_array_equal(before[name], after[name], err_msg=f"{name}: the step was not skipped")
        grad = {name: x / scale for name, x in truth.gradients(self.model).items() if name in stepped}
        self._note(Used(before, grad, {name: after[name] for name in stepped}, {}, skipped=True), optimizers)

    def _twin(self, optimizers: Any) -> tuple[nn.Module, list[Optimizer]]:
        memo: dict[int, Any] = {}
        model, twins = copy.deepcopy((self.model, list(optimizers)), memo)
        for mine, its in zip(optimizers, twins, strict=True):
            # a copied optimizer has its groups and its state, and nothing else; what a scheduler puts in the place of `step` is bound
            for key in vars(mine).keys() - vars(its).keys() - {"step"}:
                setattr(its, key, copy.deepcopy(vars(mine)[key], memo))
        for (_, mine), (_, its) in zip(self.model.named_parameters(), model.named_parameters(), strict=True):
            its.grad = None if mine.grad is None else mine.grad.detach().clone()
        return model, twins

    @contextmanager
    def _against(self, twin: nn.Module, optimizers: Any, twins: list[Optimizer], used: Callable[[], truth.Numbers]) -> Iterator[None]:
        before = _numbers(self.model)
        yield
        stepped, all_after = _held(self.model, optimizers), _numbers(self.model)
        for name, reached in _numbers(twin).items():
            np.testing.assert_array_equal(
                reached, all_after[name], err_msg=f"{name}: the gradient of the books is not the one that was used"
            )
        after = {name: x for name, x in all_after.items() if name in stepped}
        grad = {name: x for name, x in used().items() if name in stepped}
        self._note(Used(before, grad, after, _state(twin, twins)), optimizers)

    def _note(self, used: Used, optimizers: Any) -> None:
        # a compiler refers to parameters weakly itself
        assert_nothing_left(self.model, optimizers, weakly=not self.compiles)
        if self.records_raw:
            used.grad_raw = {name: self._raw.get(name, x) for name, x in used.grad.items()}
        self._raw = {}
        self.rounds.append(used)


def verify(loop: Loop, first_step: int = 0, **options: Any) -> Lab:
    """Run a loop bare and watched, and compare; gives the watched lab, its watch closed."""
    outcomes = []
    for watched in (False, True):
        lab = Lab(watched, {"update": "exact"} | options)
        torch.manual_seed(0)
        loop(lab)
        state = {name: tensor for name, tensor in lab.model.state_dict().items() if isinstance(tensor, Tensor)}
        outcomes.append(({name: x.detach().clone() for name, x in state.items()}, lab.losses, torch.get_rng_state()))
    (bare, losses, numbers), (state, watched_losses, watched_numbers) = outcomes
    assert bare.keys() == state.keys()
    changed = [name for name in bare if not torch.equal(_bits(bare[name]), _bits(state[name]))]
    assert not changed, f"watching changed what was learned: {changed}"
    assert losses == watched_losses
    assert torch.equal(numbers, watched_numbers), "watching drew random numbers"
    assert lab.watch is not None
    lab.watch.close()
    assert not lab.watch.recorder.guard.failed
    assert lab.rounds
    recorded = list(lab.watch.steps.index)
    assert recorded == list(range(first_step, first_step + len(lab.rounds))), f"{len(lab.rounds)} rounds, recorded as steps {recorded}"
    said = lab.watch.findings
    alarms = said[~said["rule"].isin(lab.expected_findings)]
    assert alarms.empty, list(alarms["message"])
    wrong = differences(lab.watch, lab.rounds, first_step)
    assert not wrong, "\n".join(wrong[:12])
    return lab


def differences(watch: Watch, rounds: list[Used], first_step: int = 0) -> list[str]:
    """What in the frame of a watch is not as the books say."""
    wrong = []
    raw = "grad_raw_norm" in watch.frame() and bool(watch.frame("grad_raw_norm").notna().any(axis=None))
    frame = watch.frame().drop(columns=["lr", "grad_state"])
    steps = frame.index.get_level_values("step")
    for number, used in enumerate(rounds, start=first_step):
        here = frame[steps == number].droplevel("step")
        missing = used.after.keys() - set(here.index)
        wrong += [f"step {number}: no row {name!r}" for name in sorted(missing)]
        for name, line in here.iterrows():
            wrong += [f"step {number}, {name!r}, {text}" for text in _line(used, str(name), line, raw)]
    return wrong


def _line(used: Used, name: str, line: Any, raw: bool) -> Iterator[str]:
    stepped = name in used.after
    param = {name: used.param[name]}
    whole = used if stepped else Used(param, {}, param, {})
    with np.errstate(invalid="ignore"):
        expected = truth.columns(whole, name)
    for column, found in line.items():
        value = np.nan if found is None or str(found) == "<NA>" else float(found)
        want = expected.get(column, np.nan)
        if used.skipped and column.startswith("update"):
            want = np.nan
        if not stepped and (column.startswith(("grad", "update", "clip", "exp")) or np.isnan(value)):
            # a row that did not step has its parameter at most
            want = np.nan
        if (column.startswith(("grad_raw", "clip")) and not raw) or (column.startswith("exp_avg") and not used.state):
            continue
        if column == "grad_zero_frac" and name in used.slack:
            continue
        exact = float(np.float32(want)) if column.endswith(("_min", "_max")) else want
        if value == exact or (np.isnan(value) and np.isnan(exact)):
            continue
        with np.errstate(invalid="ignore"):
            allowed = truth.tolerance(column, whole, name, False) + _slack(column, used, name, expected)
        if not abs(value - exact) <= allowed:
            yield f"{column}: {value!r}, the books say {exact!r}"


def _slack(column: str, used: Used, name: str, expected: dict[str, float]) -> float:
    """What the rounding of an update leaves open of a gradient that follows from it."""
    off = used.slack.get(name)
    if off is None or not off.size:
        return 0.0
    norm, most = float(np.linalg.norm(off)), float(off.max())
    if column in ("grad_norm", "grad_raw_norm"):
        return norm
    if column.startswith("grad_"):
        return most + 1e-6 * abs(expected.get(column, 0.0))
    if column in ("clip_coef", "update_cos"):
        size = expected["grad_norm"]
        return 4 * norm / size if size > 0 else np.inf
    return 0.0


def assert_nothing_left(model: nn.Module, optimizers: Any, weakly: bool = True) -> None:
    """No hook, attribute or, `weakly`, any weak reference of ours on modules, parameters and optimizers."""
    for module in model.modules():
        hooks = [value for key, value in vars(module).items() if key.endswith("_hooks") and isinstance(value, dict)]
        held = [*vars(module).values(), *(hook for registry in hooks for hook in registry.values())]
        assert not [thing for thing in held if _is_ours(thing)]
    for tensor in model.parameters():
        assert not weakly or weakref.getweakrefcount(tensor) == 0
        registries = (tensor._backward_hooks, getattr(tensor, "_post_accumulate_grad_hooks", None))
        assert not [hook for registry in registries for hook in (registry or {}).values() if _is_ours(hook)]
        assert not [thing for thing in vars(tensor).values() if _is_ours(thing)]
    for optimizer in optimizers:
        hooks = [value for key, value in vars(optimizer).items() if key.endswith("_hooks")]
        assert not [thing for thing in vars(optimizer).values() if _is_ours(thing)]
        assert not [hook for registry in hooks for hook in registry.values() if _is_ours(hook)]


def _is_ours(thing: object) -> bool:
    where = getattr(thing, "__module__", None) or type(thing).__module__
    return isinstance(where, str) and where.split(".")[0] == "paramwatch"


def _held(model: nn.Module, optimizers: Any) -> dict[str, Tensor]:
    ids = {id(param) for optimizer in optimizers for group in optimizer.param_groups for param in group["params"]}
    return {name: param for name, param in model.named_parameters() if id(param) in ids}


def _state(model: nn.Module, optimizers: list[Optimizer]) -> dict[str, truth.Numbers]:
    """What the optimizers themselves (not others inside them) keep of the parameters, where a statistic is of it."""
    found: dict[str, truth.Numbers] = {}
    for name, param in model.named_parameters():
        for optimizer in optimizers:
            held = getattr(optimizer, "state", {}).get(param, {})
            for key in ("exp_avg", "exp_avg_sq"):
                if isinstance(held.get(key), Tensor):
                    found.setdefault(key, {})[name] = truth.reals(held[key])
    return found


def _numbers(model: nn.Module) -> truth.Numbers:
    return {name: truth.reals(param) for name, param in model.named_parameters()}


def _bits(tensor: Tensor) -> Tensor:
    whole = tensor.to_dense() if tensor.layout is not torch.strided else tensor
    return whole.contiguous().reshape(-1).view(torch.uint8) if whole.numel() else whole.reshape(-1)
