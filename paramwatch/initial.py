"""How a tensor looks initialised: from its numbers, its shape and its module's default to a verdict in words.

Behind `summary`. What is exact comes first (constants, identity, orthogonal), then zeros are set apart, then the law of the rest is found
by its shape and named by its scale. A law is named with confidence from `ENOUGH` elements on; below, what fits is listed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass, replace

import numpy as np

from paramwatch.columns import Array
from paramwatch.laws import Kind, Law, Numbers, agrees, law_of, log_likelihood, scales, spread, two_sided
from paramwatch.standards import DEFAULT, Standard, standards
from paramwatch.wording import plain, plain_std, words

ENOUGH = 256
"""Elements that tell uniform from normal, and Xavier from Kaiming, in 99 draws of 100."""

UNLIKE = "unlike any standard one"

_SMALL = "too small to tell"

_AT_HAND = 1 << 15
"""Elements looked at to see whether rows are orthogonal, at most."""

_LESS_LIKELY = 7.5
"""Nats that a true law loses to another one in less than 1 draw of 1000: what loses more is not mentioned."""

_STRAY_ZEROS = 0.01
"""Share of zeros below which they say nothing: bfloat16 draws one in 256 by itself."""


@dataclass(frozen=True, slots=True)
class Look:
    """How a tensor looks initialised."""

    text: str
    family: str
    """`zeros`, `ones`, `constant`, `identity`, `orthogonal`, `uniform`, `normal`, `truncated`, `two-sided`, `sparse`, `unlike`, `small`,
    or `unknown` where there are no values to look at; two of them with `or` where the text names laws of both."""
    std: float
    """The standard deviation that the first law named in the text has, NaN where none is named."""


@dataclass(frozen=True, slots=True)
class Seen:
    """What is known of a tensor."""

    shape: tuple[int, ...]
    numbers: Numbers
    """Over all elements; without `some`."""
    zeros: float
    """How many elements are zero."""
    elements: Callable[[], Array]
    """Gives a sample of the elements, all of them if they are few, in float64 or in their own precision."""
    lines: Callable[[Sequence[int]], Array] | None = None
    """Gives some rows of the tensor as a matrix, columns where it has more rows than columns; None where it is no matrix of reals."""
    column_zeros: Callable[[], Array] | None = None
    """Gives how many elements of each column are zero; None where it is no matrix of reals."""
    default: Law | None = None
    default_zeros: int = 0
    """Zeros that belong to the default (the padding row of an embedding)."""


def look(seen: Seen) -> Look:
    """The verdict on a tensor of finite elements, at least one of them."""
    x = seen.numbers
    if x.low == x.high and (x.n > 1 or x.low in (0.0, 1.0) or _is_default(seen)):
        return _constant(seen, x.low)
    if x.std == 0 and x.extent > x.n:
        return Look(f"{UNLIKE}: nearly all elements are {x.mean:.4g}", "unlike", math.nan)
    if x.low < x.high and not (x.std > 0 and x.square(0.0) < math.inf):
        return Look(f"{UNLIKE} (too far from 1 to square)", "unlike", math.nan)
    exact = _diagonal(seen) or _orthogonal(seen)
    if exact:
        return exact
    share = seen.zeros / x.n
    if seen.default_zeros and seen.zeros == seen.default_zeros:
        return _of_law(replace(seen, numbers=_nonzero(seen)))
    if share > _STRAY_ZEROS and seen.zeros >= 2:
        return _sparse(seen, share)
    return _of_law(seen)


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
    if seen.lines is None or x.low != 0 or seen.zeros < x.n / 2 or x.n - seen.zeros > seen.shape[0]:
        return None
    w = _whole(seen)
    at = np.argwhere(w != 0)
    if not np.all(w[tuple(at.T)] == x.high) or np.any(at[:, 2:] != np.array(seen.shape[2:]) // 2):
        return None
    rows, columns = seen.shape[0], seen.shape[1]
    gain = "" if x.high == 1 else f" times {x.high:.4g}"
    std = x.std
    for groups in (g for g in range(1, rows + 1) if rows % g == 0):
        ones = min(rows // groups, columns)
        wanted = [(g * (rows // groups) + i, i) for g in range(groups) for i in range(ones)]
        if len(at) == len(wanted) and np.array_equal(at[:, :2], wanted):
            return Look(("identity" if len(seen.shape) == 2 else "Dirac (identity)") + gain, "identity", std)
    return None


def _orthogonal(seen: Seen) -> Look | None:
    """Rows, or columns where there are more rows, that are pairwise orthogonal and equally long (Saxe et al., 2014)."""
    if seen.lines is None or seen.zeros > seen.numbers.n / 2:
        return None
    count, length = sorted((seen.shape[0], math.prod(seen.shape[1:])))
    # the cosine of two random rows is about 1 / sqrt(length); rounding to a grain shifts it by that share of itself
    grain = seen.numbers.grain
    near = max(1e-5, 2 * grain / math.sqrt(length))
    if count < (2 if grain < 1e-5 else 8) or not _are_orthonormal(seen.lines([0, count - 1]), near):
        return None
    some = np.unique(np.linspace(0, count - 1, min(count, max(2, _AT_HAND // length), 64)).astype(np.int64))
    chosen = seen.lines(some.tolist())
    if not _are_orthonormal(chosen, near):
        return None
    gain = math.sqrt(float(chosen[0] @ chosen[0]))
    told = "" if abs(gain - 1) <= max(1e-4, grain) else f", gain {gain:.3g}"
    return Look(f"orthogonal{told}", "orthogonal", gain / math.sqrt(length))


def _whole(seen: Seen) -> Array:
    assert seen.lines is not None
    rows, columns = seen.shape[0], math.prod(seen.shape[1:])
    w = seen.lines(range(min(rows, columns)))
    return (w if rows <= columns else w.T).reshape(seen.shape)


def _are_orthonormal(rows: Array, near: float) -> bool:
    # the first two tell at once in nearly all cases
    first, second = rows[0], rows[1]
    length = float(first @ first)
    if abs(float(first @ second)) > near * length or abs(float(second @ second) - length) > 4 * near * length:
        return False
    products = rows @ rows.T
    squares = np.diagonal(products)
    scale = float(squares.mean())
    if scale == 0:
        return False
    return bool(np.abs(products - np.diag(squares)).max() <= near * scale and np.ptp(squares) <= 4 * near * scale)


# ---- with zeros -----------------------------------------------------------------------------


def _nonzero(seen: Seen) -> Numbers:
    """The numbers of the elements that are not zero, from those of all."""
    x, n = seen.numbers, max(int(seen.numbers.n - seen.zeros), 1)
    mean = x.mean * x.n / n
    return replace(x, n=n, total=round(x.extent * n / x.n), mean=mean, std=math.sqrt(max(x.square(0.0) * x.n / n - mean**2, 0.0)))


def _sparse(seen: Seen, share: float) -> Look:
    """Zeros, and a law for the rest. As many in every column is what `sparse_` does."""
    rest = _nonzero(seen)
    even = False
    if seen.column_zeros is not None and seen.shape[1] > 1:
        even = int(np.ptp(seen.column_zeros())) == 0
    zeros = f"{share:.0%} zeros{' in each column' if even else ''}".replace("%", " %")
    value = rest.high or rest.low
    # rounding leaves a little spread where all are equal
    if 0 in (rest.low, rest.high) and rest.std <= 1e-6 * abs(value):
        return Look(f"{zeros}, else {value:.4g}", "sparse", seen.numbers.std)
    under = _of_law(replace(seen, numbers=rest, default=None))
    if under.family == "unlike":
        return Look(f"{UNLIKE} ({zeros})", "unlike", math.nan)
    std = under.std * math.sqrt(1 - share)
    if under.family == "small" and seen.numbers.n < ENOUGH:
        return Look(f"{_SMALL}: fits {zeros}, else {under.text.removeprefix(_SMALL + ': fits ')}", "small", std)
    return Look(f"{zeros}, else {under.text.replace(_SMALL, 'too few to tell')}", "sparse", std)


# ---- a law ----------------------------------------------------------------------------------


def _of_law(seen: Seen) -> Look:
    x = seen.numbers
    if x.n < ENOUGH:
        return _small(seen)
    elements = _ascending(seen)
    some = spread(elements[elements != 0] if seen.zeros else elements, x.grain)
    laws = law_of(replace(x, some=some)) if len(some) >= ENOUGH // 2 else []
    if not laws:
        return Look(UNLIKE + _stray(elements), "unlike", math.nan)
    told: list[str] = []
    stds: list[float] = []
    kinds: list[str] = []
    for law in laws:
        named = _named(seen, {law.kind})
        told += _grouped(named) if named else [plain(x, law)]
        stds.append(named[0].law.std if named else plain_std(x, law))
        kinds.append(law.kind)
        # a named bound that is met to one part in n says more than a slight curve
        if law.kind == "uniform" and any(standard.name for standard in named):
            break
    return Look(" or ".join(told), " or ".join(kinds), stds[0])


def _ascending(seen: Seen) -> Array:
    # sorting is quicker in the precision they have
    return np.sort(seen.elements()).astype(np.float64, copy=False)


def _small(seen: Seen) -> Look:
    """Too few elements to tell: what they are compatible with."""
    x = seen.numbers
    named = _named(seen, {"uniform", "normal"})
    if named:
        return Look(f"{_SMALL}: fits {', '.join(_grouped(named, brief=True))}", "small", named[0].law.std)
    if x.n < 8:
        return Look(_SMALL, "small", math.nan)
    middle = 0.0 if abs(x.mean) <= 3 * x.std / math.sqrt(x.n) else x.mean
    half = x.reach(middle)
    elements = _ascending(seen)
    free = [*two_sided(replace(x, some=elements[elements != 0]))]
    free += [Law("normal", middle, math.sqrt(x.square(middle))), Law("uniform", middle, half)]
    fits = [law for law in free if law.kind == "two-sided" or agrees(x, law)]
    if not fits:
        return Look(UNLIKE + _stray(elements), "unlike", math.nan)
    return Look(f"{_SMALL}: fits {', '.join(plain(x, law) for law in fits)}", "small", plain_std(x, fits[0]))


def _named(seen: Seen, kinds: Set[Kind]) -> list[Standard]:
    """The standards that the numbers agree with, the likeliest first; the module's own default before all."""
    x = seen.numbers
    known: Sequence[Standard] = standards(seen.shape)
    if seen.default is not None:
        known = (Standard(DEFAULT, seen.default, -2), *known)
        if len(seen.shape) == 1 and seen.default.kind in kinds and agrees(x, seen.default):
            # no other law has a name for a vector
            return [known[0]]
    if "uniform" in kinds and x.reach(0.0) > 0:
        round_one = float(f"{x.reach(0.0) * (1 + 2 / x.n):.0e}")
        known = (*known, Standard("", Law("uniform", 0.0, round_one), 1))
    within = {kind: scales(x, kind) for kind in kinds if kind in ("uniform", "normal")}
    near = [s for s in known if s.law.kind in within and within[s.law.kind][0] <= s.law.scale <= within[s.law.kind][1]]
    fitting = [standard for standard in near if agrees(x, standard.law)]
    if not fitting:
        return []
    likelihood = {id(standard): log_likelihood(x, standard.law) for standard in fitting}
    best = max(likelihood.values())
    near = [standard for standard in fitting if likelihood[id(standard)] >= best - _LESS_LIKELY]
    # in the order, one rank is worth two nats
    return sorted(near, key=lambda standard: 2 * standard.rank - likelihood[id(standard)])


def _grouped(named: Sequence[Standard], brief: bool = False) -> list[str]:
    """One text for each distinct law, with the other names it has."""
    groups: dict[tuple[str, float], list[Standard]] = {}
    for standard in named:
        key = (standard.law.kind, round(math.log(standard.law.scale), 6))
        groups.setdefault(key, []).append(standard)
    texts = []
    for group in list(groups.values())[: 3 if brief else None]:
        first, *others = group
        names = [standard.name for standard in others if standard.name and not standard.name.endswith("a=sqrt(5)")]
        rounds = [words(standard.law) for standard in others if not standard.name]
        if first.name == DEFAULT:
            texts.append(DEFAULT if brief else f"{DEFAULT} (= {names[0]})" if names else f"{DEFAULT} ({words(first.law)})")
        else:
            same = [*names[:1], *rounds[:1]]
            texts.append((first.name or words(first.law)) + (f" (= {' = '.join(same)})" if same else ""))
    return texts


def _stray(ascending: Array) -> str:
    """Names an element that stands apart from all others, as one set by hand does."""
    if len(ascending) < 8:
        return ""
    inner = float(ascending[-2] - ascending[1])
    above, below = float(ascending[-1] - ascending[-2]), float(ascending[1] - ascending[0])
    if max(above, below) <= 2 * inner:
        return ""
    return f": {ascending[-1] if above > below else ascending[0]:.4g} stands apart"
