"""A summary as text that fits the terminal, and as HTML for notebooks."""

from __future__ import annotations

import html as escaping
import math
import shutil
import sys
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import pandas as pd

from paramwatch.lettering import padded, shortened, sized, visible, width_of
from paramwatch.record import TieGroup
from paramwatch.terminal import writable

LINES = 1000
"""Lines of the tree that are printed; the frame has them all."""

WARNINGS = 20
"""Warnings, and notes, that are printed in full."""


class Line(NamedTuple):
    """One line of the layer tree: a module, or a parameter under one of its names."""

    depth: int
    name: str
    note: str
    """Type of a module; for a further name of a tied parameter, which row it is."""
    row: str | None
    """Name of the row that the line shows, None for a module."""

    @property
    def label(self) -> str:
        """Its name, as far to the right as it is deep."""
        return "  " * self.depth + visible(self.name)


@dataclass(frozen=True, slots=True)
class Totals:
    """Counts over a whole model, each tensor once unless said otherwise."""

    parameters: int
    """Elements of all parameters; lazy ones count none."""
    with_repeats: int
    """The same, a tied tensor counted under each of its names."""
    trainable: int
    bytes: int
    """Memory of all parameters; what several of them, or several elements of one, lie on counts once."""
    bytes_saved: int
    """Memory that separate tensors would take on top: what the groups in `ties` save, of either kind."""
    buffers: int
    """How many buffers there are."""
    buffer_elements: int
    buffer_bytes: int
    """What the buffers take beside the parameters."""
    lazy: int
    """Parameters that still wait for their shape."""
    packed: int
    """Weights that quantised layers hold packed: they are no parameters, and are neither counted nor looked at."""


@dataclass(frozen=True, repr=False, eq=False)
class Summary:
    """What `summary` returns: prints as a table, and is a frame underneath."""

    model: str
    """Class name of the module."""
    frame: pd.DataFrame
    """Index `parameter`; docs/summary.md says what each column means."""
    totals: Totals
    ties: tuple[TieGroup, ...]
    tree: tuple[Line, ...]
    """The layers in model order, each followed by its parameters."""

    @property
    def warnings(self) -> Mapping[str, str]:
        """What would stop learning, by parameter."""
        found = self.frame["warning"]
        return dict(found[found != ""])

    @property
    def notes(self) -> Mapping[str, str]:
        """What may be meant, by parameter: it depends on how the model uses it, and that is not seen."""
        found = self.frame["note"]
        return dict(found[found != ""])

    def __repr__(self) -> str:
        return writable(text(self), sys.stdout)

    def _repr_html_(self) -> str:
        return html(self)


def text(summary: Summary) -> str:
    """As wide as the terminal."""
    width = max(shutil.get_terminal_size().columns, 40)
    if summary.frame.empty:
        return "\n".join([*_wrap(_heading(summary), width), *_footer(summary, width)])
    shown = summary.tree[:LINES]
    layout = _Layout(summary.frame, shown, width)
    position = {name: i for i, name in enumerate(summary.frame.index)}
    out = [*_wrap(_heading(summary), width), "", layout.header(), "─" * width]
    for line in shown:
        if line.row is None:
            out.append(shortened(f"{line.label}  {visible(line.note)}".rstrip(), width))
        else:
            out += [layout.tied(line)] if line.note else layout.row(line, position[line.row])
    if len(summary.tree) > LINES:
        out.append(f"… and {len(summary.tree) - LINES:,} more lines; .frame has them all")
    left_out = _wrap(f"no room for {', '.join(layout.left_out)}: .frame has them", width) if layout.left_out else []
    return "\n".join([*out, "─" * width, *left_out, *_footer(summary, width)])


def html(summary: Summary) -> str:
    """A table of all columns, everything escaped."""
    cells = _cells(summary.frame)
    position = {name: i for i, name in enumerate(summary.frame.index)}
    out = [f"<p>{_escape(_heading(summary))}</p>", "<table>", f"<thead><tr>{_tags('th', ['parameter', *cells])}</tr></thead>", "<tbody>"]
    for entry in summary.tree[:LINES]:
        label = f'<th style="text-align:left;padding-left:{entry.depth + 0.5}em">{_escape(entry.name)}</th>'
        if entry.row is None or entry.note:
            out.append(f'<tr>{label}<td colspan="{len(cells)}" style="text-align:left">{_escape(entry.note)}</td></tr>')
        else:
            out.append(f"<tr>{label}{_tags('td', [cell[position[entry.row]] for cell in cells.values()])}</tr>")
    out += ["</tbody>", "</table>", *(f"<p>{_escape(line)}</p>" for line in _footer(summary, 10_000) if line)]
    return "\n".join(out)


# ---- columns --------------------------------------------------------------------------------

_LAST = "looks like"
_RIGHT = ("elements", "mean", "std", "expected", "min", "max", "zeros")
_ENOUGH = 60
"""What the verdict, which says most, is given before further columns are, ..."""

_LEAST = {"shape": 24, "std": 24, "expected": 40}
"""... and before those without which it says less."""


def _cells(frame: pd.DataFrame) -> dict[str, list[str]]:
    """Every column as text, in table order."""

    def made(column: str, how: Callable[[Any], str]) -> list[str]:
        return [how(value) for value in frame[column]]

    def estimated(column: str) -> list[str]:
        return [f"~{said}" if said and not exact else said for said, exact in zip(made(column, _number), frame["exact"], strict=True)]

    return {
        "shape": made("shape", shape_text),
        "elements": made("numel", lambda numel: "?" if numel is pd.NA else f"{numel:,}"),
        "dtype": made("dtype", str),
        "trained": made("trainable", lambda trainable: "yes" if trainable else "frozen"),
        "gradient": made("gradient", str),
        "mean": estimated("mean"),
        "std": estimated("std"),
        "expected": made("theoretical_std", _number),
        "min": made("min", _number),
        "max": made("max", _number),
        "zeros": made("zero_frac", _per_cent),
        _LAST: [("sample: " if not exact else "") + look for exact, look in zip(frame["exact"], frame["looks_like"], strict=True)],
    }


class _Layout:
    """Which columns are printed, and how wide each is."""

    def __init__(self, frame: pd.DataFrame, lines: Sequence[Line], width: int) -> None:
        self._cells = _cells(frame)
        self._widths = {name: max([width_of(name), *map(width_of, cells)]) for name, cells in self._cells.items()}
        needed = max((width_of(line.label) for line in lines if line.row is not None), default=0)
        self._first = min(max(needed, width_of("parameter")), max(width // 3, 12))
        self.left_out: list[str] = []
        """Columns that do not fit."""
        self._names = self._chosen(width - self._first)
        self._total = width

    def _chosen(self, room: int) -> list[str]:
        """Those that fit, the most telling first; what is the same in all rows is in the heading instead."""
        wanted = ("shape", "std", "expected", "gradient", "trained", "dtype", "zeros", "mean", "max", "min", "elements")
        chosen, left = {_LAST}, room - 2
        for name in wanted:
            same = name in ("gradient", "trained", "dtype") and len(set(self._cells[name])) < 2
            verdict = min(_LEAST.get(name, _ENOUGH), self._widths[_LAST])
            if not same and self._widths[name] + 2 <= left - verdict:
                chosen.add(name)
                left -= self._widths[name] + 2
            elif not same:
                self.left_out.append(name)
        return [name for name in self._cells if name in chosen]

    def header(self) -> str:
        return self._lines("parameter", {name: name for name in self._names})[0]

    def row(self, line: Line, position: int) -> list[str]:
        return self._lines(line.label, {name: self._cells[name][position] for name in self._names})

    def tied(self, line: Line) -> str:
        return f"{self._label(line.label)}  {shortened(visible(line.note), self._total - self._first - 2)}"

    def _lines(self, first: str, cells: dict[str, str]) -> list[str]:
        """A line, and more of them where the verdict is longer than its column."""
        out = self._label(first)
        for name in self._names[:-1]:
            out += "  " + padded(cells[name], self._widths[name], name in _RIGHT)
        # a number stays with its sign
        verdict = _wrap(cells[_LAST].replace(" %", "\u00a0%"), self._total - width_of(out) - 2, further="")
        lines = [f"{out}  {verdict[0] if verdict else ''}".rstrip(), *(" " * (width_of(out) + 2) + said for said in verdict[1:])]
        return [line.replace("\u00a0", " ") for line in lines]

    def _label(self, label: str) -> str:
        return padded(shortened(label, self._first), self._first)


def shape_text(shape: tuple[int, ...] | None) -> str:
    if shape is None:
        return "?"
    return "x".join("?" if size < 0 else str(size) for size in shape) or "scalar"


def _number(value: float) -> str:
    return "" if math.isnan(value) else f"{value:.3g}"


def _per_cent(value: float) -> str:
    return "" if math.isnan(value) else "<1%" if 0 < value < 0.005 else ">99%" if 0.995 <= value < 1 else f"{value:.0%}"


# ---- around the table -----------------------------------------------------------------------


def _heading(summary: Summary) -> str:
    frame = summary.frame
    if frame.empty:
        return f"{visible(summary.model)}: no parameters"
    said = [f"{visible(summary.model)}: {_count(len(frame), 'parameter tensor')}"]
    if frame["dtype"].nunique() == 1:
        said.append(str(frame["dtype"].iloc[0]))
    if frame["trainable"].nunique() == 1:
        said.append("all trained" if frame["trainable"].iloc[0] else "all frozen")
    if frame["gradient"].nunique() == 1:
        said.append({"none": "no gradients yet", "zero": "all gradients zero", "set": "all have gradients"}[frame["gradient"].iloc[0]])
    return ", ".join(said)


def _footer(summary: Summary, width: int) -> list[str]:
    totals = summary.totals
    out = _wrap(f"{_count(totals.parameters, 'parameter')}, {sized(totals.bytes)}; {totals.trainable:,} trained", width)
    shared = sum(tie.bytes_saved for tie in summary.ties if tie.kind == "storage")
    if totals.with_repeats != totals.parameters:
        out += _wrap(f"with repeats {totals.with_repeats:,}: ties save {sized(totals.bytes_saved - shared)}", width)
    if shared:
        out += _wrap(f"memory that several parameters lie on saves {sized(shared)}", width)
    if totals.lazy:
        out += _wrap(f"{_count(totals.lazy, 'lazy parameter')} not counted: run the model once to give them their shapes", width)
    if totals.packed:
        out += _wrap(f"{_count(totals.packed, 'packed weight')} of quantised layers not counted: no parameters, and not looked at", width)
    if totals.buffers:
        elements = _count(totals.buffer_elements, "element")
        out += _wrap(f"{_count(totals.buffers, 'buffer')} of {elements}, {sized(totals.buffer_bytes)}", width)
    out += [line for tie in summary.ties if tie.kind == "storage" for line in ("", *_wrap(visible(str(tie)), width))]
    return [*out, *_listed("warning", summary.warnings, width), *_listed("note", summary.notes, width)]


def _listed(noun: str, found: Mapping[str, str], width: int) -> list[str]:
    shown = list(found.items())[:WARNINGS]
    out = ["", _count(len(found), noun)] if found else []
    out += [line for name, said in shown for line in _wrap(f"{visible(name)}: {visible(said)}", width, "  ")]
    return out + [f"  … and {len(found) - WARNINGS:,} more; .{noun}s has them all"] * (len(found) > WARNINGS)


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _wrap(said: str, width: int, indent: str = "", further: str = "  ") -> list[str]:
    return textwrap.wrap(said, width, initial_indent=indent, subsequent_indent=indent + further, break_on_hyphens=False)


def _escape(said: str) -> str:
    return escaping.escape(visible(said))


def _tags(tag: str, values: Sequence[str]) -> str:
    return "".join(f"<{tag}>{_escape(value)}</{tag}>" for value in values)
