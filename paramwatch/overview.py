"""`summary`: a model as it stands, read without running it: layers, parameters, ties, gradients, and how each tensor looks initialised.

Rows and ties come from `rows` and `ties`, numbers from `measure` in one call for all rows, verdicts from `initial`; here they are put into
one frame. `sheet` prints it.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from paramwatch.columns import ABSENT, STATISTICS, Array, getter
from paramwatch.drawn import NOTHING, Answers, Law, Numbers, Rows
from paramwatch.guard import ParamWatchError
from paramwatch.hazards import Hazard, Read, hazards
from paramwatch.initial import Look, Seen, look
from paramwatch.measure import is_supported, measure
from paramwatch.measure.naive import ORDER
from paramwatch.memory import bytes_of, bytes_together
from paramwatch.record import TieGroup
from paramwatch.rows import Place, has_values, is_lazy, places, shape_of
from paramwatch.sampling import Source, completed, held, stored
from paramwatch.sheet import Line, Summary, Totals
from paramwatch.standards import default_of, type_name
from paramwatch.storage import is_there
from paramwatch.ties import find_ties
from paramwatch.together import Sights


def summary(module: nn.Module) -> Summary:
    """A table of a model's layers and parameters: shapes, ties, gradients, statistics, and how each tensor looks initialised.

    The model is not run and not changed, and no random number is drawn. Print what it returns, or read its `frame`.

    Raises:
        ParamWatchError: Something else than a module was given.
    """
    if not isinstance(module, nn.Module):
        raise ParamWatchError(f"summary takes an nn.Module, not {type(module).__name__}")
    with _collector_at_rest():
        return _summary(module)


@contextmanager
def _collector_at_rest() -> Iterator[None]:
    """Nothing made here refers to itself, and among so many objects Python would look for such things a dozen times."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _summary(module: nn.Module) -> Summary:
    found = places(module)
    ties = find_ties(found)
    grouped: dict[int, tuple[nn.Parameter, list[Place]]] = {}
    for place in found:
        if (tensor := place.tensor) is not None:
            grouped.setdefault(id(tensor), (tensor, []))[1].append(place)
    rows = [_row(group, tensor) for tensor, group in grouped.values()]
    return Summary(type_name(module), _frame(module, rows, ties), _totals(module, rows, ties), ties, _tree(module, found, rows))


class _Row(NamedTuple):
    """One distinct parameter tensor and the places that hold it."""

    places: Sequence[Place]
    tensor: nn.Parameter
    shape: tuple[int, ...] | None
    """None while it is lazy."""
    numel: int
    unreadable: str
    """Why there are no values to look at, "" if there are."""
    held: Tensor | None = None
    """What is looked at: of a sharded tensor the local shard."""


def _row(found: Sequence[Place], tensor: nn.Parameter) -> _Row:
    if is_lazy(tensor):
        return _Row(found, tensor, None, 0, "lazy: no shape before the first forward")
    why, here = "", None
    if not has_values(tensor):
        why = "on the meta device: no values" if tensor.is_meta else "fake: no values"
    elif not is_there(tensor):
        why = "without memory for now: no values"
    elif not is_supported(stored(tensor)):
        why = "nested: cannot be measured" if tensor.is_nested else "of a dtype that cannot be measured"
    elif not tensor.numel():
        why = "empty"
    elif not (here := held(tensor)).numel():
        why, here = "sharded: no values in this process", None
    return _Row(found, tensor, shape_of(tensor), tensor.numel(), why, here)


def _frame(module: nn.Module, rows: Sequence[_Row], ties: Sequence[TieGroup]) -> pd.DataFrame:
    group_of = {name: i for i, tie in reversed(list(enumerate(ties))) for name in tie.names}
    first = [row.places[0] for row in rows]
    sights = Sights([row.held for row in rows])
    reading = measure(sights.looked_at)
    reading.wait()
    numbers = reading.numpy().T
    totals, exact = completed(numbers, sights.wholes)
    judged, said = _judged(module, rows, sights, numbers, totals)
    statistics = _statistics(numbers)
    index = pd.Index([place.name for place in first], name="parameter", dtype="object")
    columns = {
        "module": pd.Series([place.name.rpartition(".")[0] for place in first], index, "object"),
        "module_type": pd.Series([type_name(place.holder) for place in first], index, "object"),
        "shape": pd.Series([row.shape for row in rows], index, "object"),
        "dtype": pd.Series([str(row.tensor.dtype).removeprefix("torch.") for row in rows], index, "object"),
        "numel": pd.Series([pd.NA if row.shape is None else row.numel for row in rows], index, "Int64"),
        "trainable": pd.Series([row.tensor.requires_grad for row in rows], index, "bool"),
        "tie_group": pd.Series([group_of.get(place.name, pd.NA) for place in first], index, "Int64"),
        "aliases": pd.Series([tuple(place.name for place in row.places[1:]) for row in rows], index, "object"),
        "gradient": pd.Series([_gradient(row.tensor) for row in rows], index, "object"),
        **{name: pd.Series(values, index, "float64") for name, values in statistics.items()},
        "exact": pd.Series(exact, index, "bool"),
        "looks_like": pd.Series([seen.text for seen in judged], index, "object"),
        "family": pd.Series([seen.family for seen in judged], index, "object"),
        "theoretical_std": pd.Series([seen.std for seen in judged], index, "float64"),
        "uncut_to": pd.Series([seen.vouched.uncut_to for seen in judged], index, "float64"),
        "flat_within": pd.Series([seen.vouched.flat_within for seen in judged], index, "float64"),
        "warning": pd.Series([hazard.warning for hazard in said], index, "object"),
        "note": pd.Series([hazard.note for hazard in said], index, "object"),
    }
    return pd.DataFrame(columns, index=index)


def _statistics(numbers: Array) -> dict[str, Array]:
    values = {part: numbers[i][None] for i, part in enumerate(ORDER)}
    values["count"] = np.where(np.isnan(values["count"]), ABSENT, values["count"])
    get = getter(values, ["param"])
    return {name: STATISTICS[f"param_{name}"].compute(get, False) for name in ("mean", "std", "min", "max", "zero_frac")}


def _gradient(tensor: Tensor) -> str:
    grad = tensor.grad
    if grad is None:
        return "none"
    if not has_values(grad) or not is_there(grad) or not is_supported(stored(grad)):
        return "set"
    return "set" if bool(stored(held(grad)).any()) else "zero"


# ---- how it looks initialised ---------------------------------------------------------------


def _judged(module: nn.Module, rows: Sequence[_Row], sights: Sights, numbers: Array, totals: Array) -> tuple[list[Look], list[Hazard]]:
    """The verdict on each row, and what to warn of."""
    of = dict(zip(ORDER, numbers, strict=True))
    bad = of["nan"] + of["posinf"] + of["neginf"]
    usable = (bad == 0) & (of["min"] < of["max"]) & (of["std"] > 0)
    columns = (of["count"], of["mean"], of["std"], of["min"], of["max"], totals)
    known = zip(rows, *(column.tolist() for column in columns), strict=True)
    each = [None if row.held is None else _numbers(row, *numbers) for row, *numbers in known]
    zeros, lost = of["zero"].tolist(), bad.tolist()
    defaults = [(None, 0) if row.held is None else _default(row) for row in rows]
    found = [Look(row.unreadable, "unknown", math.nan) for row in rows]
    there = [i for i, row in enumerate(rows) if row.held is not None]
    left = set(there)
    for answers in sights.answers(each, zeros, [padding for _, padding in defaults], usable):
        for i, answer in answers.items():
            found[i] = _judge(rows[i], i, sights, each[i], zeros[i], lost[i], *defaults[i], answer)
        left -= answers.keys()
    for i in left:
        found[i] = _judge(rows[i], i, sights, each[i], zeros[i], lost[i], *defaults[i], NOTHING)
    read = [
        Read(rows[i].places, rows[i].tensor, rows[i].shape or (), None if lost[i] else each[i], int(lost[i]), sights.rows[i].may_repeat)
        for i in there
    ]
    said = dict(zip(there, hazards(module, read), strict=True))
    return found, [said.get(i, Hazard()) for i in range(len(rows))]


def _numbers(row: _Row, count: float, mean: float, std: float, low: float, high: float, total: float) -> Numbers:
    return Numbers(int(count), mean, std, low, high, _grain(row.tensor.dtype), None, int(total))


def _judge(
    row: _Row,
    i: int,
    sights: Sights,
    x: Numbers | None,
    zeros: float,
    bad: float,
    default: Law | None,
    padding: int,
    answers: Answers,
) -> Look:
    looked_at, here, shape = sights.looked_at[i], row.held, row.shape
    assert looked_at is not None
    assert here is not None
    assert shape is not None
    assert x is not None
    if bad:
        return Look("unlike any standard one (NaN or infinite elements)", "unlike", math.nan)
    source = Source(here, shape, looked_at, sights.limits.judged, answers, sights.rows[i] if here.shape == shape else Rows())
    verdict = look(Seen(shape, x, zeros, source, default, padding))
    return verdict._replace(text=f"local shard: {verdict.text}") if here.numel() < row.numel else verdict


@lru_cache(maxsize=64)
def _grain(dtype: torch.dtype) -> float:
    """Distance from 1 to the next number, 0 of integers."""
    return float(torch.finfo(dtype).eps) if dtype.is_floating_point or dtype.is_complex else 0.0


def _default(row: _Row) -> tuple[Law | None, int]:
    """What PyTorch gives the first place, and how many zeros that has."""
    place, shape = row.places[0], row.shape or ()
    default = default_of(place.holder, place.key, shape)
    if len(shape) != 2 or place.key != "weight" or (default is not None and default.kind == "uniform"):
        return default, 0
    return default, shape[1] if getattr(place.holder, "padding_idx", None) is not None else 0


# ---- the whole ------------------------------------------------------------------------------


def _totals(module: nn.Module, rows: Sequence[_Row], ties: Sequence[TieGroup]) -> Totals:
    # a lazy buffer, like a lazy parameter, has no size yet
    buffers = [buffer for buffer in module.buffers() if not hasattr(buffer, "materialize")]
    parameters = [row.tensor for row in rows]
    held = sum(map(bytes_of, parameters)) - sum(tie.bytes_saved for tie in ties if tie.kind == "storage")
    return Totals(
        parameters=sum(row.numel for row in rows),
        with_repeats=sum(row.numel * len(row.places) for row in rows),
        trainable=sum(row.numel for row in rows if row.tensor.requires_grad),
        bytes=held,
        bytes_saved=sum(tie.bytes_saved for tie in ties),
        buffers=len(buffers),
        buffer_elements=sum(buffer.numel() for buffer in buffers),
        buffer_bytes=bytes_together([*parameters, *buffers]) - held if buffers else 0,
        lazy=sum(row.shape is None for row in rows),
        packed=sum([*map(type, vars(each).values())].count(torch.ScriptObject) for each in module.modules()),
    )


def _tree(module: nn.Module, found: Sequence[Place], rows: Sequence[_Row]) -> tuple[Line, ...]:
    """A line for each module on the way to a parameter, and one for each name of a parameter."""
    lines: list[Line] = []
    opened: set[str] = set()
    canonical = {place.name: row.places[0].name for row in rows for place in row.places}
    for place in found:
        path = place.name.split(".")[:-1]
        for depth in range(len(path)):
            prefix = ".".join(path[: depth + 1])
            if prefix not in opened:
                opened.add(prefix)
                holder = place.holder if depth == len(path) - 1 else _ancestor(module, place, depth + 1)
                lines.append(Line(depth, path[depth], type_name(holder) if holder is not None else "", None))
        row = canonical[place.name]
        lines.append(Line(len(path), place.name.rpartition(".")[2], "" if row == place.name else f"= {row}", row))
    return tuple(lines)


def _ancestor(module: nn.Module, place: Place, depth: int) -> nn.Module | None:
    """The module that many components down a name; None where components are no modules: names leave out those of wrappers."""
    if place.name != place.real_name:
        return None
    for key in place.name.split(".")[:depth]:
        # a name may have a dot in it; a scripted module has something less than a dictionary here
        child = module._modules[key] if key in module._modules else None  # noqa: SIM401
        if child is None:
            return None
        module = child
    return module
