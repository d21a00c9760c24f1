"""Blocks of several epochs and sessions, joined into one table: its columns are labels, and rows of one name share one.

Between the store and `frames`: which rows are asked for, under which names, at which steps, and merged into which groups.
"""

from __future__ import annotations

import difflib
import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Literal, TypeAlias

import numpy as np

from paramwatch.block import Block, joined_steps, null_of, one_per_step
from paramwatch.columns import ABSENT, PARTS, Array, Pair, kinds_of
from paramwatch.epoch import PER_ROW, Epoch, NoSteps, Span
from paramwatch.globs import fitting
from paramwatch.guard import ParamWatchError
from paramwatch.merging import Groups, merge
from paramwatch.record import GRAD_STATES

By: TypeAlias = Literal["parameter", "layer"] | int
"""One line a row, a module, or a block of that many leading name components."""

_MOST = np.iinfo(np.int64).max

_LONGEST, _LOOKED_AT = 200, 20_000
"""Characters of a name, and names, that an error message goes to the trouble of."""

_CELLS = 1 << 16
"""Cells that are derived at a time: what a statistic needs of so many stays in the cache."""


Source: TypeAlias = Epoch | NoSteps
"""What blocks are read from."""


@dataclass(frozen=True)
class Labels:
    """What the columns of a block are to be called, and which row each of them shows."""

    names: tuple[str, ...]
    rows: tuple[int, ...]


def all_rows(source: Source) -> Labels:
    rows = source.inventory.rows
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


def labels_of(sources: Sequence[Source], parameters: str | Sequence[str], aliases: bool) -> list[Labels]:
    patterns = as_patterns("parameters", parameters)
    if not patterns:
        raise ParamWatchError("parameters is empty; name at least one pattern, or leave it out for all")
    names = dict.fromkeys(name for source in sources for name, _ in source.inventory.names)
    chosen: set[str] = set()
    for pattern in patterns:
        # here a pattern that is a name means that one only; the default means all, also where a row is called so
        exactly = pattern in names and patterns != ["*"]
        chosen.update([pattern] if exactly else filter(fitting([pattern]), names))
    # a model whose rows have no shape yet has no names either
    if not chosen and (names or patterns != ["*"]):
        wanted = ", ".join(map(_quoted, patterns))
        raise ParamWatchError(f"no parameter fits {wanted}{nearest(patterns[0] if patterns else '', names)}")
    out = []
    for source in sources:
        inventory = source.inventory
        found = {row for name, row in inventory.names if name in chosen}
        shown = inventory.names if aliases else [(row.name, i) for i, row in enumerate(inventory.rows)]
        out.append(Labels(tuple(name for name, row in shown if row in found), tuple(row for _, row in shown if row in found)))
    return out


def span_of(steps: slice | None) -> Span:
    """The steps that a slice means.

    Raises:
        ParamWatchError: It is no slice, or one that means nothing.
    """
    if steps is None:
        return Span()
    if not isinstance(steps, slice):
        raise ParamWatchError(f"steps={steps!r} is not a slice; {_as_slice(steps)}")
    try:
        start, stop, stride = (
            # no step has a larger number
            min(default if given is None else operator.index(given), _MOST)
            for given, default in ((steps.start, 0), (steps.stop, _MOST), (steps.step, 1))
        )
    except TypeError as error:
        raise ParamWatchError(f"steps={steps!r}: steps are chosen by number, so start, stop and stride must be whole numbers") from error
    if start < 0 or stop < 0 or stride < 1:
        raise ParamWatchError(f"steps={steps!r}: steps are chosen by number, so start and stop cannot be negative, nor the stride below 1")
    return Span(start, stop, stride)


def chosen_steps(numbers: Array, steps: slice | None) -> Array:
    """Which of these step numbers a slice means, bool [n].

    Raises:
        ParamWatchError: As for `span_of`.
    """
    return span_of(steps).holds(numbers)


def _as_slice(steps: object) -> str:
    if isinstance(steps, range):
        return f"write slice({steps.start}, {steps.stop}{f', {steps.step}' if steps.step != 1 else ''})"
    if isinstance(steps, int | np.integer):
        return f"for one step write slice({steps}, {steps + 1})"
    return "write slice(100, 200) for the steps from 100 to 199"


def nearest(word: str, names: Iterable[str]) -> str:
    names = list(names)
    # looking costs the product of the lengths, for each name
    alike = (name for name in names if len(name) <= 2 * len(word) + 8) if len(word) <= _LONGEST else ()
    near = difflib.get_close_matches(word, islice(alike, _LOOKED_AT), n=3, cutoff=0.5)
    if near:
        return f"; nearest: {', '.join(map(_quoted, near))}"
    return f"; there are {', '.join(map(_quoted, names[:8]))}{', ...' if len(names) > 8 else ''}" if names else "; there are none"


def _quoted(name: str) -> str:
    return repr(name) if len(name) <= _LONGEST else f"{name[:_LONGEST]!r}... ({len(name):,} characters)"


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


def layout_of(sources: Sequence[Source | Block]) -> tuple[Pair, ...]:
    return tuple(dict.fromkeys(pair for source in sources for pair in source.inventory.layout))


def join(blocks: Sequence[Block], labels: Sequence[Labels], names_of: Sequence[Source]) -> Table:
    """Put blocks one after the other, their columns matched by label; what a block lacks is null.

    Args:
        blocks: Their rows are those of the labels.
        labels: For each block.
        names_of: Where each block was read from.
    """
    tensor_of: dict[str, str] = {}
    for source, found in zip(reversed(names_of), reversed(labels), strict=True):
        rows = source.inventory.rows
        for name, row in zip(found.names, found.rows, strict=True):
            tensor_of.setdefault(name, rows[row].name)
    names = tuple(tensor_of)
    if len(blocks) == 1:
        return Table(blocks[0], names, tuple(tensor_of.values()), np.broadcast_to(True, blocks[0].stepped.shape))

    layout = layout_of(blocks)
    kinds, ends = kinds_of(layout), np.cumsum([len(block.step) for block in blocks])
    n, width = int(ends[-1]), len(names)
    values = {part: np.full((n, len(kinds), width), null_of(part), PARTS[part].dtype) for part in {part for _, part in layout}}
    per_row: dict[str, Array] = {name: np.full((n, width), null, kind) for name, (kind, null) in PER_ROW.items()}
    position = {name: i for i, name in enumerate(names)}
    places = []
    for block, found, end in zip(blocks, labels, ends, strict=True):
        lines, columns = slice(end - len(block.step), end), np.array([position[name] for name in found.names], np.intp)
        places.append((block, columns))
        for j, kind in enumerate(block.inventory.kinds):
            for part, array in block.values.items():
                values[part][lines, kinds.index(kind)][:, columns] = array[:, j]
        for name, out in per_row.items():
            out[lines][:, columns] = getattr(block, name)
    joined = replace(
        blocks[-1],
        inventory=replace(blocks[-1].inventory, layout=layout),
        step=np.concatenate([block.step for block in blocks]),
        time=np.concatenate([block.time for block in blocks]),
        values=values,
        steps=joined_steps(blocks),
        **per_row,
    )
    joined = one_per_step(joined)
    exists = np.zeros(joined.stepped.shape, bool)
    for block, columns in places:
        exists[np.searchsorted(joined.step, block.step)[:, None], columns] = True
    return Table(joined, names, tuple(tensor_of.values()), exists)


def group(table: Table, by: By) -> Table:
    """Merge the columns of one module, or of one prefix, each tensor once."""
    if not table.labels:
        return table
    groups: dict[str, dict[str, int]] = {}
    for i, (label, tensor) in enumerate(zip(table.labels, table.tensors, strict=True)):
        groups.setdefault(group_of(label, by), {}).setdefault(tensor, i)
    members = Groups([list(group.values()) for group in groups.values()])

    def reduced(of: np.ufunc, array: Array) -> Array:
        # what is one line seen many times is so afterwards
        found = members.reduce(of, members.members(at(slice(None), array)))
        return np.broadcast_to(np.moveaxis(found, 0, -1), (len(array), len(groups)))

    block = table.block
    some = reduced(np.logical_or, block.stepped)
    merged: list[dict[str, Array]] = []
    for lines in runs(block) if block.values else ():
        values = {part: at(lines, array) for part, array in block.values.items()}
        stepped = members.members(at(lines, block.stepped))
        counted = stepped | ~members.spread(members.reduce(np.logical_or, stepped))
        merged.append(merge(values, members, counted[..., None]))
    rate = block.lr if at(slice(None), block.stepped).all() else np.where(block.stepped, block.lr, np.nan)
    low, high = (reduced(of, rate) for of in (np.fmin, np.fmax))
    state = at(slice(None), block.grad_state)
    first = reduced(np.minimum, np.broadcast_to(np.where(state < 0, len(GRAD_STATES), state), block.grad_state.shape))
    grouped = replace(
        block,
        values={part: _joined([found[part] for found in merged], len(block.step)) for part in (merged[0] if merged else ())},
        stepped=some,
        lr=np.where(low == high, low, np.nan),
        grad_state=np.where(first == len(GRAD_STATES), ABSENT, first).astype(np.int8),
    )
    names = tuple(groups)
    return Table(grouped, names, names, reduced(np.logical_or, table.exists))


def _joined(pieces: Sequence[Array], n: int) -> Array:
    """Pieces of n lines, one after the other; where each is one line for all of its own, they are alike."""
    if sum(map(len, pieces)) < n:
        return np.broadcast_to(pieces[0], (n, *pieces[0].shape[1:]))
    return np.concatenate(pieces)


def group_of(name: str, by: By) -> str:
    """What a row of this name is merged into."""
    if by == "parameter":
        return name
    return ".".join(name.split(".")[:by]) if isinstance(by, int) else name.rpartition(".")[0] or "(root)"


def at(lines: slice, array: Array) -> Array:
    """Some lines; one of them where it is one that is seen many times."""
    return array[:1] if array.strides[0] == 0 and len(array) else array[lines]


def runs(block: Block) -> list[slice]:
    """The steps of a block, some thousand cells at a time: temporaries stay small. At least one run."""
    n, width = block.stepped.shape
    size = max(1, _CELLS // max(1, width))
    return [slice(start, start + size) for start in range(0, max(n, 1), size)]
