"""How a tensor looks initialised: from its numbers, its shape and its module's default to a verdict in words.

Behind `summary`. What is exact comes first (constants, identity, orthogonal), then zeros are set apart, then the law of the rest is found
by its shape and named by its scale. A law is named with confidence from `ENOUGH` elements on; below, what fits is listed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple, Protocol, TypeAlias

import numpy as np

from paramwatch.columns import Array
from paramwatch.drawn import Answers, Kind, Law, Numbers, Rows
from paramwatch.fitting import agrees, named
from paramwatch.formulas import chosen_rows, differ_in_scale, gain_of_row, gain_of_rows
from paramwatch.laws import law_of, two_sided
from paramwatch.ragged import Ragged
from paramwatch.repeats import spread
from paramwatch.standards import DEFAULT, Standard
from paramwatch.vouched import NOT_ASKED, Vouched, vouched
from paramwatch.wording import grouped, not_smooth, per_cent, rounded, standing_apart, words
from paramwatch.zeros import are_apart, may_be_even, nonzero, std_beside

ENOUGH = 256
"""Elements that tell uniform from normal, and Xavier from Kaiming, in 99 draws of 100."""

UNLIKE = "unlike any standard one"

_SMALL = "too small to tell"

_UNIFORM: frozenset[Kind] = frozenset(("uniform",))
_NORMAL: frozenset[Kind] = frozenset(("normal",))
_EITHER: frozenset[Kind] = frozenset(("uniform", "normal"))

NO_CHANCE = 1e-6
"""What random rows do more rarely than this is said of them alone."""


class Look(NamedTuple):
    """How a tensor looks initialised."""

    text: str
    family: str
    """`zeros`, `ones`, `constant`, `identity`, `orthogonal`, `uniform`, `normal`, `truncated`, `two-sided`, `sparse`, `unlike`, `small`,
    or `unknown` where there are no values to look at; two of them with `or` where the text names laws of both."""
    std: float
    """The standard deviation that the first law named in the text has, NaN where none is named."""
    vouched: Vouched = NOT_ASKED
    """How far a law that is named alone is vouched for."""


Lines: TypeAlias = Callable[[Sequence[int]], Array]
"""Gives some rows of a tensor as a matrix, or columns, in float64."""


class Source(Protocol):
    """Gives what is asked of a tensor's elements: `sampling.Source`."""

    @property
    def answers(self) -> Answers: ...
    @property
    def rows(self) -> Rows: ...
    def ascending(self) -> Array: ...
    def lines(self) -> tuple[Lines | None, int | None]: ...
    def column_zeros(self) -> Array | None: ...


class Seen(NamedTuple):
    """What is known of a tensor."""

    shape: tuple[int, ...]
    numbers: Numbers
    """Over all elements; without `some`."""
    zeros: float
    """How many elements are zero."""
    source: Source
    default: Law | None = None
    default_zeros: int = 0
    """Zeros that belong to the default (the padding row of an embedding)."""


def look(seen: Seen) -> Look:
    """The verdict on a tensor of finite elements, at least one of them."""
    x = seen.numbers
    if x.low == x.high and (x.extent > 1 or x.low in (0.0, 1.0) or _is_default(seen)):
        return _constant(seen, x.low)
    if exact := _diagonal(seen):
        return exact
    if x.std == 0 and x.extent > x.n:
        return Look(f"{UNLIKE}: nearly all elements are {x.mean:.4g}", "unlike", math.nan)
    if x.low < x.high and not (x.std > 0 and 0 < x.square(0.0) < math.inf):
        return Look(f"{UNLIKE} (too far from 1 to square)", "unlike", math.nan)
    rows = _orthogonal(seen)
    if rows and rows.chance < NO_CHANCE:
        return Look(rows.text, "orthogonal", rows.std)
    share = seen.zeros / x.n
    if seen.default_zeros and seen.zeros == seen.default_zeros:
        found = _of_law(seen._replace(numbers=nonzero(x, seen.zeros)))
    elif are_apart(x, seen.zeros):
        return _sparse(seen, share)
    else:
        found = _of_law(seen)
    return _with_rows(rows, found) if rows else found


# ---- exact ----------------------------------------------------------------------------------


def _constant(seen: Seen, value: float) -> Look:
    name = {0.0: "zeros", 1.0: "ones"}.get(value, "constant")
    text = f"constant {value:.6g}" if name == "constant" else name
    return Look(f"{DEFAULT} ({text})" if _is_default(seen) else text, name, 0.0)


def _is_default(seen: Seen) -> bool:
    return seen.default is not None and seen.default.kind == "constant" and agrees(seen.numbers, seen.default)


def _diagonal(seen: Seen) -> Look | None:
    """`eye_` for a matrix, `dirac_` (in any number of groups) for a convolution."""
    x = seen.numbers
    if 0 not in (x.low, x.high) or seen.zeros < x.n / 2 or len(seen.shape) < 2 or x.n - seen.zeros > seen.shape[0]:
        return None
    lines, held = seen.source.lines()
    if lines is None or held is not None:
        return None
    w, value = _whole(seen.shape, lines), x.high or x.low
    at = np.argwhere(w != 0)
    if not np.all(w[tuple(at.T)] == value) or np.any(at[:, 2:] != np.array(seen.shape[2:]) // 2):
        return None
    rows, columns = seen.shape[0], seen.shape[1]
    gain = "" if value == 1 else f" times {value:.4g}"
    std = std_beside(value, 1 - len(at) / w.size)
    for groups in (g for g in range(1, rows + 1) if rows % g == 0):
        ones = min(rows // groups, columns)
        wanted = [(g * (rows // groups) + i, i) for g in range(groups) for i in range(ones)]
        if len(at) == len(wanted) and np.array_equal(at[:, :2], wanted):
            return Look(("identity" if len(seen.shape) == 2 else "Dirac (identity)") + gain, "identity", std)
    return None


@dataclass(frozen=True, slots=True)
class _Rows:
    """What is said of rows that are orthogonal and equally long."""

    text: str
    std: float
    chance: float
    """How often random rows are as much so."""


def _orthogonal(seen: Seen) -> _Rows | None:
    """Rows, or columns where there are more rows (Saxe et al., 2014)."""
    if len(seen.shape) < 2 or seen.zeros > seen.numbers.n / 2:
        return None
    fewer, length = sorted((seen.shape[0], math.prod(seen.shape[1:])))
    found = seen.source.rows.orthogonal
    if found is None:
        lines, held = seen.source.lines()
        if lines is None:
            return None
        count, grain = held or fewer, seen.numbers.grain
        found = gain_of_row(lines([0])[0], grain) if count == 1 else gain_of_rows(lines, count, length, grain)
    if not found:
        return None
    gain, chance = found
    told = "" if f"{gain:.3g}" == "1" else f", gain {gain:.3g}"
    return _Rows(f"orthogonal{told}", gain / math.sqrt(length), chance)


def _with_rows(rows: _Rows, found: Look) -> Look:
    """What is said of rows that may be orthogonal by chance: both, if what is orthogonal looks like that law, which is a normal one."""
    if found.family == "small":
        return Look(f"{_SMALL}: fits {rows.text}{found.text.removeprefix(_SMALL).replace(': fits', ',')}", "small", rows.std)
    if "normal" not in found.family.split(" or "):
        return found
    return found._replace(text=f"{rows.text} or {found.text}", family=f"orthogonal or {found.family}", std=rows.std)


def _whole(shape: tuple[int, ...], lines: Lines) -> Array:
    rows, columns = shape[0], math.prod(shape[1:])
    w = lines(range(min(rows, columns)))
    return (w if rows <= columns else w.T).reshape(shape)


# ---- with zeros -----------------------------------------------------------------------------


def _sparse(seen: Seen, share: float) -> Look:
    """Zeros, and a law for the rest. As many in every column is what `sparse_` does."""
    rest = nonzero(seen.numbers, seen.zeros)
    zeros = f"{per_cent(share)} zeros{' in each column' if _are_even_zeros(seen, share) else ''}"
    value = rest.high or rest.low
    # rounding leaves a little spread where all are equal
    if 0 in (rest.low, rest.high) and rest.std <= 1e-6 * abs(value):
        return Look(f"{zeros}, else {value:.4g}", "sparse", std_beside(value, share))
    under = _of_law(seen._replace(numbers=rest, default=None))
    if under.family == "unlike":
        return Look(f"{UNLIKE} ({zeros}){under.text.removeprefix(UNLIKE)}", "unlike", math.nan)
    std = under.std * math.sqrt(1 - share)
    if under.family == "small" and seen.numbers.n < ENOUGH:
        return Look(f"{_SMALL}: fits {zeros}, else {under.text.removeprefix(_SMALL + ': fits ')}", "small", std)
    return under._replace(text=f"{zeros}, else {under.text.replace(_SMALL, 'too few to tell')}", family="sparse", std=std)


def _are_even_zeros(seen: Seen, share: float) -> bool:
    if not may_be_even(seen.shape, share):
        return False
    if seen.source.answers.even_zeros is not None:
        return seen.source.answers.even_zeros
    columns = seen.source.column_zeros()
    return columns is not None and int(np.ptp(columns)) == 0


# ---- a law ----------------------------------------------------------------------------------


def _of_law(seen: Seen) -> Look:
    x = seen.numbers
    if x.n < ENOUGH:
        return _small(seen)
    elements, some, why, tests, _ = seen.source.answers
    if elements is None or some is None:
        elements = seen.source.ascending()
        some = elements[elements != 0] if seen.zeros else elements
        why = not_smooth(elements, some, x.grain)
        some = some if why else spread(Ragged.of([some]), x.grain).flat
    if why:
        return Look(f"{UNLIKE}: {why}", "unlike", math.nan)
    # a named bound that is met to one part in n says more than a slight curve, unless a round one is met as well
    bounds = _named(seen, _UNIFORM) if x.high - x.low < 4.2 * x.std else ()
    bound_known = bool(bounds) and all(bound.name for bound in bounds)
    laws = law_of(x.beside(some, tests), bound_known) if len(some) >= ENOUGH // 2 else []
    apart = "" if laws else standing_apart(elements)
    if not apart and not seen.zeros and _differ_in_scale(seen):
        return Look(f"{UNLIKE}: rows or columns of different scales", "unlike", math.nan)
    if not laws:
        return Look(UNLIKE + apart, "unlike", math.nan)
    told, stds = list[str](), list[float]()
    for law in laws:
        known = bounds if law.kind == "uniform" else _named(seen, _NORMAL) if law.kind == "normal" else ()
        first = known[0].law if known else rounded(x, law)
        told += grouped(known) if known else [words(first)]
        # rounded, centre and scale no longer go together
        stds.append(law.std if law.ends is not None else first.std)
    alone = len(laws) == 1 and laws[0].kind in _EITHER
    far = vouched(x, laws[0]) if alone else NOT_ASKED
    text = " or ".join(told) + (far.words(any(bound.name for bound in bounds)) if alone else "")
    return Look(text, " or ".join([law.kind for law in laws]), stds[0], far)


def _differ_in_scale(seen: Seen) -> bool:
    """Whether all that is drawn at once is not of one scale: layers that were fused, rows that were scaled."""
    if seen.source.rows.uneven is not None:
        return seen.source.rows.uneven
    lines, held = seen.source.lines() if len(seen.shape) > 1 else (None, None)
    if lines is None:
        return False
    fewer, length = sorted((seen.shape[0], math.prod(seen.shape[1:])))
    some = lines(chosen_rows(held or fewer, length))
    return bool(differ_in_scale(Ragged.of([some.ravel()]), np.array([some.shape]))[0])


def _small(seen: Seen) -> Look:
    """Too few elements to tell: what they are compatible with."""
    x = seen.numbers
    if x.extent == 1 and seen.default is None:
        return Look(f"{_SMALL}: one element", "small", math.nan)
    if known := _named(seen, _EITHER):
        return _fitting(known)
    if x.n < 8:
        return Look(_SMALL, "small", math.nan)
    middle = 0.0 if abs(x.mean) <= 3 * x.std / math.sqrt(x.n) else x.mean
    half = x.reach(middle)
    elements, some, _, tests, _ = seen.source.answers
    if elements is None or some is None:
        elements = seen.source.ascending()
        some = elements[elements != 0]
    free = [*two_sided(x.beside(some, tests))]
    free += [Law("normal", middle, math.sqrt(x.square(middle))), Law("uniform", middle, half)]
    fits = [law for law in free if law.kind == "two-sided" or agrees(x, law)]
    if not fits:
        return Look(UNLIKE + standing_apart(elements), "unlike", math.nan)
    plain = [rounded(x, law) for law in fits]
    return Look(f"{_SMALL}: fits {', '.join(map(words, plain))}", "small", plain[0].std)


@lru_cache(maxsize=1024)
def _fitting(known: tuple[Standard, ...]) -> Look:
    return Look(f"{_SMALL}: fits {', '.join(grouped(known, brief=True))}", "small", known[0].law.std)


def _named(seen: Seen, kinds: frozenset[Kind]) -> tuple[Standard, ...]:
    return named(seen.numbers, kinds, seen.shape, seen.default)
