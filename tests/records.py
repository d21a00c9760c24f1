"""Builds inventories and records from plain arrays: what a measurement would give, written the obvious way in float64, without torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from paramwatch.batch import Batch
from paramwatch.columns import ABSENT, LAYOUTS, PARTS, Array, Pair, kinds_of
from paramwatch.record import GRAD_STATES, Inventory, Record, Row, TieGroup


def inventory(
    *names: str,
    tied: Mapping[str, Sequence[str]] | None = None,
    layout: Sequence[Pair] = LAYOUTS["default"],
    numel: int = 4,
    model: str = "Net",
) -> Inventory:
    """An inventory of these names in model order.

    Args:
        names: Every name, aliases included.
        tied: Canonical name -> its aliases.
        layout: What is stored.
        numel: Elements of each row.
        model: Class name.
    """
    tied = tied or {}
    alias_of = {alias: name for name, aliases in tied.items() for alias in aliases}
    canonical = [name for name in names if name not in alias_of]
    ties = tuple(TieGroup((name, *aliases), "parameter", numel, numel * 4 * len(aliases)) for name, aliases in tied.items())
    rows = tuple(
        Row(
            name=name,
            aliases=tuple(tied.get(name, ())),
            real_name=name,
            module=name.rpartition(".")[0],
            module_type="Linear",
            shape=(numel,),
            dtype="float32",
            device="cpu",
            numel=numel,
            bytes=numel * 4,
            trainable=True,
            owned=True,
            tie_group=list(tied).index(name) if name in tied else None,
            from_step=0,
        )
        for name in canonical
    )
    place = {name: i for i, name in enumerate(canonical)}
    positions = tuple((name, place[alias_of.get(name, name)]) for name in names)
    return Inventory(rows, positions, ties, tuple(layout), model)


def parts_of(x: Any) -> dict[str, float]:
    """Every part of one array, in float64; NaN where no element is finite."""
    x = np.asarray(x, np.float64).ravel()
    finite = x[np.isfinite(x)]
    out = {
        "count": x.size,
        "nan": np.isnan(x).sum(),
        "posinf": (x == np.inf).sum(),
        "neginf": (x == -np.inf).sum(),
        "zero": (x == 0).sum(),
    }
    names = ("mean", "std", "rms", "min", "max")
    if not finite.size:
        return out | dict.fromkeys(names, np.nan)
    numbers = (finite.mean(), finite.std(), np.sqrt(np.mean(finite**2)), finite.min(), finite.max())
    return out | dict(zip(names, numbers, strict=True))


def record(
    step: int,
    inv: Inventory,
    tensors: Mapping[str, Mapping[str, Any]],
    *,
    stepped: Sequence[str] | None = None,
    lr: float | Mapping[str, float] = 0.1,
    states: Mapping[str, str] | None = None,
    **steps: Any,
) -> Record:
    """A record of what was measured.

    Args:
        step: Its number.
        inv: What could be measured.
        tensors: Kind -> row name -> elements; a row that is left out was not measured.
        stepped: The rows that were stepped, by default those with a parameter measured.
        lr: Of the stepped rows.
        states: Row name -> grad state; by default `used` where stepped.
        steps: `Record.steps`; `time` is taken out of it.
    """
    kinds, names = kinds_of(inv.layout), [row.name for row in inv.rows]
    shape = (len(kinds), len(names))
    values: dict[str, Array] = {part: np.zeros(shape, PARTS[part].dtype) for _, part in inv.layout}
    values["count"][:] = ABSENT
    for kind, rows in tensors.items():
        for name, x in rows.items():
            for part, value in parts_of(x).items():
                if (kind, part) in inv.layout:
                    values[part][kinds.index(kind), names.index(name)] = value
    stepped = list(tensors.get("param", {})) if stepped is None else stepped
    rate = dict.fromkeys(names, lr) if isinstance(lr, float) else lr
    states = dict.fromkeys(stepped, "used") | dict(states or {})
    return Record(
        step=step,
        time=steps.pop("time", 1_700_000_000.0 + step),
        inventory=inv,
        steps=steps,
        values=values,
        stepped=np.array([name in stepped for name in names]),
        lr=np.array([rate[name] if name in stepped else np.nan for name in names]),
        grad_state=np.array([GRAD_STATES.index(states[name]) if name in states else ABSENT for name in names], np.int8),
    )


def random_record(step: int, inv: Inventory, **steps: Any) -> Record:
    """A record of normal noise in every kind and row, the same for the same step."""
    noise = np.random.default_rng(step)
    tensors = {kind: {row.name: noise.normal(size=row.numel) for row in inv.rows} for kind in inv.kinds}
    return record(step, inv, tensors, **steps)


def batch_of(records: Sequence[Record]) -> Batch:
    """Records of one inventory and the same stepped rows, put together."""
    first = records[0]
    return Batch(
        first.inventory,
        [each.step for each in records],
        [each.time for each in records],
        {key: [each.steps[key] for each in records] for key in first.steps},
        {part: np.stack([each.values[part] for each in records]) for part in first.values},
        first.stepped,
        np.stack([each.lr for each in records]),
        np.stack([each.grad_state for each in records]),
        [each.changes for each in records],
    )
