"""Rounds as a real recorder hands them over, of loops in which anything may happen; and what becomes of them one by one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from copy import copy

import numpy as np
import torch
from tensorboard.compat.proto import event_pb2, summary_pb2
from torch import nn
from torch.optim import Optimizer

from paramwatch import assemble, steps
from paramwatch.columns import ABSENT, LAYOUTS, STATISTICS, Array, Detail, ratio
from paramwatch.guard import Guard
from paramwatch.inventory import LiveInventory
from paramwatch.merging import merge
from paramwatch.outside import Outside
from paramwatch.record import Record
from paramwatch.recorder import Recorder
from paramwatch.rounds import Round
from paramwatch.tensorboard.curves import Curves
from paramwatch.tensorboard.norms import LINES
from paramwatch.totals import counted, totals
from paramwatch.updates import UpdateMode

ACTIONS = (
    *("both", "first", "second", "third", "without", "scaled", "skipped", "infinite"),
    *("zero", "nan", "read", "outside", "raises", "freeze", "grow", "share"),
)
"""What `rounds_of` can do: a step of one or two optimizers with ordinary gradients, or the same with what the word says."""


def rounds_of(
    actions: Sequence[str],
    *,
    detail: Detail = "default",
    update: UpdateMode = "exact",
    every: int = 1,
    raw: bool = False,
    plans: bool = True,
) -> list[Round]:
    """The rounds of a loop of these actions over a net of six rows, the last two of which are in no optimizer at first."""
    torch.manual_seed(len(actions))
    net = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2), nn.Linear(2, 1))
    # fused ones divide by the scale themselves, and do nothing where an infinity was found
    optimizers: list[Optimizer] = [
        torch.optim.Adam(net[0].parameters(), 0.1, fused=True),
        torch.optim.SGD(net[1].parameters(), 0.1, fused=True),
    ]
    # holds one row of each
    optimizers.append(torch.optim.SGD([net[0].weight, net[1].bias], lr=0.5, fused=True))
    rounds: list[Round] = []
    live = LiveInventory(net, ["*"], [], LAYOUTS[detail])
    recorder = Recorder(live, Guard("", lambda: None), rounds.append, every=every, update=update, full=detail == "full", raw=raw)
    recorder.plans = plans
    steps.register(recorder)
    try:
        for i, action in enumerate(actions):
            _act(action, net, optimizers, recorder, i)
    finally:
        steps.unregister(recorder)
    recorder.finish()
    assert not recorder.guard.failed
    return rounds


def _act(action: str, net: nn.Sequential, optimizers: list[Optimizer], recorder: Recorder, i: int) -> None:
    for param in net.parameters():
        param.grad = torch.randn_like(param) if param.requires_grad else None
    first, second, third = optimizers
    which = {"first": [first], "second": [second], "third": [third]}.get(action, [first, second])
    recorder.backwards, recorder.context = i % 3, {"epoch": i} if i % 12 else {}
    if action == "read":
        first.step()
        recorder.close_round()
        which = [second]
    elif action == "outside":
        with torch.no_grad():
            net[0].weight.add_(1.0)
    elif action == "freeze":
        net[1].bias.requires_grad_(not net[1].bias.requires_grad)
    elif action == "raises":
        with suppress(RuntimeError):
            first.step(lambda: _failing(net))
    elif action == "share" and len(first.param_groups) == 1:
        first.add_param_group({"params": [net[1].weight]})
    elif action == "grow" and len(second.param_groups) == 1:
        second.add_param_group({"params": list(net[2].parameters())})
    _spoil(action, net)
    if recorder.raw:
        grads = [param.grad for param in net[1].parameters() if param.grad is not None]
        recorder.before_clipping(lambda raw: raw.clipping(grads, None))
    for optimizer in which:
        if action in ("scaled", "infinite", "skipped"):
            optimizer.grad_scale, optimizer.found_inf = torch.tensor(4.0), torch.tensor(float(action == "infinite"))  # type: ignore[attr-defined]  # as a scaler
        if action == "skipped":
            recorder.skipped(optimizer)
        else:
            optimizer.step()
        for name in ("grad_scale", "found_inf"):
            if hasattr(optimizer, name):
                delattr(optimizer, name)


def _failing(net: nn.Sequential) -> float:
    with torch.no_grad():
        net[0].bias.mul_(2.0)
    raise RuntimeError


def _spoil(action: str, net: nn.Sequential) -> None:
    grad = net[0].weight.grad
    assert grad is not None
    if action == "without":
        net[1].weight.grad = None
    elif action == "zero":
        grad.zero_()
    elif action in ("infinite", "skipped"):
        grad[0, 0] = torch.inf
    elif action == "nan":
        grad[0, 0] = torch.nan


def fresh(rounds: Sequence[Round]) -> list[Round]:
    """The same rounds for another thread: what a step left is compared anew."""
    outside = Outside()
    found = [*map(copy, rounds)]
    for done in found:
        done.changed = outside.changed
    return found


def one_by_one(rounds: Sequence[Round]) -> list[Record]:
    """The records, as `assemble` has them."""
    return [assemble.assemble(done, "exact") for done in fresh(rounds)]


# ---- the event of a step, the obvious way ------------------------------------------------------


def event(record: Record, curves: Curves) -> bytes:
    """The curves of one record."""
    summary = summary_pb2.Summary()
    for tag, value in scalars(record, curves):
        summary.value.add(tag=tag, simple_value=value)
    payload: bytes = event_pb2.Event(wall_time=record.time, step=record.step, summary=summary).SerializeToString()
    return payload


def scalars(record: Record, curves: Curves) -> Iterator[tuple[str, float]]:
    """Tags and values; what was not measured is left out."""
    kinds = record.inventory.kinds
    for name, value in totals(record).items():
        if value == value or _spoilt(record, name):
            yield f"{name}/(all)", value
    values: Mapping[str, Array] = record.values
    if curves.blocks:
        counts = np.where(counted(record.values["count"], kinds, record.stepped), record.values["count"], ABSENT)
        values = merge({**record.values, "count": counts}, curves.blocks)
    parts = {
        part: np.where(values["count"] < 0, np.nan, values[part].astype(np.float64)) for part in ("count", "nan", "posinf", "neginf", "rms")
    }
    norms = STATISTICS["param_norm"].compute(lambda kind, part: parts[part], False)
    spoilt = parts["nan"] + parts["posinf"] + parts["neginf"]
    stored = [kinds_of for kinds_of in LINES.values() if set(kinds_of) <= set(kinds)]
    for needed, (_, tags) in zip(stored, curves.lines, strict=True):
        first, *second = (kinds.index(kind) for kind in needed)
        line = ratio(norms[first], norms[second[0]]) if second else norms[first]
        for tag, position in zip(tags, curves.positions, strict=True):
            if not np.isnan(line[position]) or spoilt[[first, *second], position].sum() > 0:
                yield tag, float(line[position])


def _spoilt(record: Record, name: str) -> bool:
    needed = {kind for kind, _ in STATISTICS[name].needs} if name in STATISTICS else set()
    kinds = record.inventory.kinds
    if not needed or not needed.issubset(kinds):
        return False
    chosen = [kinds.index(kind) for kind in needed]
    measured = (record.values["count"] >= 0) & counted(record.values["count"], kinds, record.stepped)
    special = measured & (record.values["nan"] + record.values["posinf"] + record.values["neginf"] > 0)
    return bool(measured[chosen].any(axis=1).all() and special[chosen].any())
