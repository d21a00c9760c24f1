"""Blocks of several epochs and sessions, joined into one table: its columns are labels, and rows of one name share one.

Between the store and `frames`: which rows are asked for, under which names, at which steps, and merged into which groups.
"""

from __future__ import annotations

import difflib
import fnmatch
import operator
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

import numpy as np

from paramwatch.block import Block, joined_steps, null_of, one_per_step
from paramwatch.columns import ABSENT, PARTS, Array, Pair, Statistic, kinds_of
from paramwatch.guard import ParamWatchError
from paramwatch.merging import merge
from paramwatch.record import GRAD_STATES

By: TypeAlias = Literal["parameter", "layer"] | int
"""One line a row, a module, or a block of that many leading name components."""

_CELLS = 1 << 16
"""Cells that are derived at a time: what a statistic needs of so many stays in the cache."""


@dataclass(frozen=True)
class Labels:
    """What the columns of a block are to be called, and which row each of them shows."""

    names: tuple[str, ...]
    rows: tuple[int, ...]


def all_rows(block: Block) -> Labels:
    rows = block.inventory.rows
    return Labels(tuple(row.name for row in rows), tuple(range(len(rows))))


def as_patterns(argument: str, given: str | Sequence[str]) -> list[str]:
    """The glob patterns that someone passed as an argument of this name.

    Raises:
        ParamWatchError: It is neither a str nor several.
    """
    patterns = [given] if isinstance(given, str) else list(given) if isinstance(given, Iterable) else [given]
    if not all(isinstance(pattern, str) for pattern in patterns):
        raise ParamWatchError(f"{argument} must be a glob pattern such as '*.weight', or a list of them, not {given!r}")
    return patterns


def labels_of(blocks: Sequence[Block], parameters: str | Sequence[str], aliases: bool) -> list[Labels]:
    patterns = as_patterns("parameters", parameters)
    if not patterns:
        raise ParamWatchError("parameters is empty; name at least one pattern, or leave it out for all")
    names = dict.fromkeys(name for block in blocks for name, _ in block.inventory.names)
    chosen: set[str] = set()
    for pattern in patterns:
        # the default means all, also where a row is called so
        exactly = pattern in names and patterns != ["*"]
        chosen.update([pattern] if exactly else filter(re.compile(fnmatch.translate(pattern)).match, names))
    # a model whose rows have no shape yet has no names either
    if not chosen and (names or patterns != ["*"]):
        wanted = ", ".join(map(repr, patterns))
        raise ParamWatchError(f"no parameter fits {wanted}{nearest(patterns[0] if patterns else '', names)}")
    out = []
    for block in blocks:
        inventory = block.inventory
        found = {row for name, row in inventory.names if name in chosen}
        shown = inventory.names if aliases else [(row.name, i) for i, row in enumerate(inventory.rows)]
        out.append(Labels(tuple(name for name, row in shown if row in found), tuple(row for _, row in shown if row in found)))
    return out


def at_steps(block: Block, steps: slice | None) -> Block:
    return block if steps is None else block.at(chosen_steps(block.step, steps))


def chosen_steps(numbers: Array, steps: slice | None) -> Array:
    """Which of these step numbers a slice means, bool [n].

    Raises:
        ParamWatchError: It is no slice, or one that means nothing.
    """
    if steps is None:
        return np.ones(len(numbers), dtype=bool)
    if not isinstance(steps, slice):
        raise ParamWatchError(f"steps={steps!r} is not a slice; {_as_slice(steps)}")
    try:
        start, stop, stride = (
            default if given is None else operator.index(given)
            for given, default in ((steps.start, 0), (steps.stop, np.iinfo(np.int64).max), (steps.step, 1))
        )
    except TypeError as error:
        raise ParamWatchError(f"steps={steps!r}: steps are chosen by number, so start, stop and stride must be whole numbers") from error
    if start < 0 or stop < 0 or stride < 1:
        raise ParamWatchError(f"steps={steps!r}: steps are chosen by number, so start and stop cannot be negative, nor the stride below 1")
    chosen: Array = (numbers >= start) & (numbers < stop) & ((numbers - start) % stride == 0)
    return chosen


def _as_slice(steps: object) -> str:
    if isinstance(steps, range):
        return f"write slice({steps.start}, {steps.stop}{f', {steps.step}' if steps.step != 1 else ''})"
    if isinstance(steps, int | np.integer):
        return f"for one step write slice({steps}, {steps} + 1)"
    return "write slice(100, 200) for the steps from 100 to 199"


def nearest(word: str, names: Iterable[str]) -> str:
    names = list(names)
    near = difflib.get_close_matches(word, names, n=3, cutoff=0.5)
    if near:
        return f"; nearest: {', '.join(map(repr, near))}"
    return f"; there are {', '.join(map(repr, names[:8]))}{', ...' if len(names) > 8 else ''}" if names else "; there are none"


# ---- blocks to one table --------------------------------------------------------------------


@dataclass(frozen=True)
class Table:
    """One block whose last axis is labels, not the rows of its inventory."""

    block: Block
    labels: tuple[str, ...]
    tensors: tuple[str, ...]
    """The canonical name behind each label."""
    exists: Array
    """bool [n, labels]"""


def layout_of(blocks: Sequence[Block]) -> tuple[Pair, ...]:
    return tuple(dict.fromkeys(pair for block in blocks for pair in block.inventory.layout))


def join(blocks: Sequence[Block], labels: Sequence[Labels]) -> Table:
    """Put blocks one after the other, their columns matched by label; what a block lacks is null."""
    tensor_of: dict[str, str] = {}
    for block, found in zip(reversed(blocks), reversed(labels), strict=True):
        for name, row in zip(found.names, found.rows, strict=True):
            tensor_of.setdefault(name, block.inventory.rows[row].name)
    names = tuple(tensor_of)
    if len(blocks) == 1:
        block = _only(blocks[0], labels[0])
        return Table(block, names, tuple(tensor_of.values()), np.ones(block.stepped.shape, bool))

    layout = layout_of(blocks)
    kinds, ends = kinds_of(layout), np.cumsum([len(block.step) for block in blocks])
    n, width = int(ends[-1]), len(names)
    values = {part: np.full((n, len(kinds), width), null_of(part), PARTS[part].dtype) for part in {part for _, part in layout}}
    stepped, lr, state = np.zeros((n, width), bool), np.full((n, width), np.nan), np.full((n, width), ABSENT, np.int8)
    position = {name: i for i, name in enumerate(names)}
    places = []
    for block, found, end in zip(blocks, labels, ends, strict=True):
        lines, rows, columns = slice(end - len(block.step), end), list(found.rows), [position[name] for name in found.names]
        places.append((block, columns))
        for j, kind in enumerate(block.inventory.kinds):
            for part, array in block.values.items():
                values[part][lines, kinds.index(kind)][:, columns] = array[:, j, rows]
        for out, array in ((stepped, block.stepped), (lr, block.lr), (state, block.grad_state)):
            out[lines][:, columns] = array[:, rows]
    joined = replace(
        blocks[-1],
        inventory=replace(blocks[-1].inventory, layout=layout),
        step=np.concatenate([block.step for block in blocks]),
        time=np.concatenate([block.time for block in blocks]),
        values=values,
        stepped=stepped,
        lr=lr,
        grad_state=state,
        steps=joined_steps(blocks),
    )
    joined = one_per_step(joined)
    exists = np.zeros(joined.stepped.shape, bool)
    for block, columns in places:
        exists[np.searchsorted(joined.step, block.step)[:, None], columns] = True
    return Table(joined, names, tuple(tensor_of.values()), exists)


def _only(block: Block, labels: Labels) -> Block:
    """A block with these columns only."""
    if labels.rows == tuple(range(len(block.inventory.rows))):
        return block
    rows = list(labels.rows)
    values = {part: array[..., rows] for part, array in block.values.items()}
    return replace(block, values=values, **{name: getattr(block, name)[:, rows] for name in ("stepped", "lr", "grad_state")})


def narrow(table: Table, statistic: Statistic | None) -> Table:
    """Only the parts that a statistic needs, since merging is what costs (no statistic: those of one kind)."""
    inventory = table.block.inventory
    layout = statistic.needs if statistic else tuple(pair for pair in inventory.layout if pair[0] == inventory.kinds[0])
    axis = [inventory.kinds.index(kind) for kind in kinds_of(layout)]
    parts = {part for _, part in layout}
    # these two merge together
    parts |= {"mean", "std"} if parts & {"mean", "std"} else set()
    values = {part: table.block.values[part][:, axis] for part in parts}
    return replace(table, block=replace(table.block, inventory=replace(inventory, layout=layout), values=values))


def group(table: Table, by: By) -> Table:
    """Merge the columns of one module, or of one prefix, each tensor once."""
    if not table.labels:
        return table
    groups: dict[str, dict[str, int]] = {}
    for i, (label, tensor) in enumerate(zip(table.labels, table.tensors, strict=True)):
        groups.setdefault(group_of(label, by), {}).setdefault(tensor, i)
    members = [list(group.values()) for group in groups.values()]
    order, sizes = [i for group in members for i in group], [len(group) for group in members]
    starts = np.cumsum([0, *sizes[:-1]])
    ranges = [range(start, start + size) for start, size in zip(starts, sizes, strict=True)]

    block = table.block
    stepped = block.stepped[:, order]
    some = np.logical_or.reduceat(stepped, starts, axis=1)
    counted = stepped | ~np.repeat(some, sizes, axis=1)
    merged: list[dict[str, Array]] = []
    for lines in runs(block):
        values = {part: array[lines][..., order] for part, array in block.values.items()}
        values["count"] = np.where(counted[lines, None], values["count"], ABSENT)
        merged.append(merge(values, ranges))
    low, high = (reduce.reduceat(np.where(stepped, block.lr[:, order], np.nan), starts, axis=1) for reduce in (np.fmin, np.fmax))
    state = block.grad_state[:, order]
    first = np.minimum.reduceat(np.where(state < 0, len(GRAD_STATES), state), starts, axis=1)
    grouped = replace(
        block,
        values={part: np.concatenate([found[part] for found in merged]) for part in merged[0]},
        stepped=some,
        lr=np.where(low == high, low, np.nan),
        grad_state=np.where(first == len(GRAD_STATES), ABSENT, first).astype(np.int8),
    )
    names = tuple(groups)
    return Table(grouped, names, names, np.logical_or.reduceat(table.exists[:, order], starts, axis=1))


def group_of(name: str, by: By) -> str:
    """What a row of this name is merged into."""
    if by == "parameter":
        return name
    return ".".join(name.split(".")[:by]) if isinstance(by, int) else name.rpartition(".")[0] or "(root)"


def runs(block: Block) -> list[slice]:
    """The steps of a block, some thousand cells at a time: temporaries stay small. At least one run."""
    n, width = block.stepped.shape
    size = max(1, _CELLS // max(1, width))
    return [slice(start, start + size) for start in range(0, max(n, 1), size)]
