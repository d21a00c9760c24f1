"""Laws in words, with the roundest parameters that the numbers allow.

Behind `summary`: where no law of a known scale fits, one says `normal(0, 0.01)` of numbers whose standard deviation is 0.00983.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

from paramwatch.columns import Array
from paramwatch.drawn import Law, Numbers
from paramwatch.ragged import Ragged
from paramwatch.repeats import few_values, tied_ends
from paramwatch.standards import DEFAULT, Standard

_NEAR = 1.5
"""Standard deviations: of a law that is cut nearer, the bound is known better than the standard deviation."""


def words(law: Law) -> str:
    if law.kind == "uniform":
        low, high = law.centre - law.scale, law.centre + law.scale
        return f"uniform ±{law.scale:.3g}" if law.centre == 0 else f"uniform({low:.3g}, {high:.3g})"
    if law.kind == "two-sided":
        return f"±uniform({law.cut:.3g}, {law.scale:.3g})"
    if law.kind == "constant":
        return f"constant {law.centre:.6g}"
    text = f"normal({law.centre:.3g}, {law.scale:.3g})"
    if law.ends is not None:
        return f"truncated {text}, between {law.ends[0]:.3g} and {law.ends[1]:.3g}"
    return f"truncated {text}, cut at {law.cut:.3g} std" if law.kind == "truncated" else text


@lru_cache(maxsize=4096)
def grouped(named: tuple[Standard, ...], brief: bool = False) -> Sequence[str]:
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


def standing_apart(ascending: Array) -> str:
    """Names an element that stands apart from all others, as one set by hand does."""
    if len(ascending) < 8:
        return ""
    inner = float(ascending[-2] - ascending[1])
    above, below = float(ascending[-1] - ascending[-2]), float(ascending[1] - ascending[0])
    if max(above, below) <= 2 * inner:
        return ""
    return f": {ascending[-1] if above > below else ascending[0]:.4g} stands apart"


def not_smooth(ascending: Array, nonzero: Array, grain: float, distinct: int | None = None) -> str:
    """What no smooth law does: few values (`distinct`, if known), or many elements at an extreme, beside zeros. "" if they do neither."""
    distinct = int(few_values(Ragged.of([ascending]), grain)[0]) if distinct is None else distinct
    if distinct:
        return f"{distinct} distinct values (quantised?)"
    below, above = tied_ends(nonzero, grain)
    if not below and not above:
        return ""
    low, high = float(nonzero[0]), float(nonzero[-1])
    ends = [f"{end:.4g}" for end, ties in ((low, below), (high, above)) if ties]
    at = f"±{high:.4g}" if len(ends) == 2 and low == -high else " and ".join(ends)
    return f"{per_cent((below + above) / len(ascending))} of the elements are at {at} (clipped?)"


def per_cent(share: float) -> str:
    """A share in whole per cent, in more digits where rounding would make it none or all."""
    for digits in range(12):
        text = f"{100 * share:.{digits}f}"
        if 0 < float(text) < 100 or share in (0, 1):
            return f"{text} %"
    return f"{100 * share} %"


def rounded(x: Numbers, law: Law) -> Law:
    """A law whose parameters are not known, with the roundest ones that the numbers allow."""
    n, most = x.n, x.extent
    if law.ends is not None:
        off, about = 8 * (x.high - x.low) / most, 3 * law.scale / math.sqrt(n)
        centre, scale = roundest(law.centre - about, law.centre + about), roundest(law.scale - about, law.scale + about)
        return law._replace(centre=centre, scale=scale, ends=(roundest(x.low - off, x.low), roundest(x.high, x.high + off)))
    if law.kind in ("normal", "truncated"):
        off = 3 * law.scale / math.sqrt(2 * n)
        scale = roundest(law.scale - off, law.scale + off)
        centre = law.centre and roundest(law.centre - 3 * law.scale / math.sqrt(n), law.centre + 3 * law.scale / math.sqrt(n))
        # from the cut at 256 elements known to a tenth, to the one at a million to a thousandth
        cut = law.cut if law.kind == "normal" else roundest(law.cut * (1 - 1.6 / math.sqrt(n)), law.cut * (1 + 1.6 / math.sqrt(n)))
        if cut <= _NEAR:
            # where they end is known far better than how they curve
            scale = roundest(law.scale * law.cut / cut, law.scale * law.cut / cut * (1 + 8 / most + 2 * x.grain))
        return Law(law.kind, centre, scale, cut)
    # an extreme stays farther than 8/n of the width from its bound in 3 cases of 10,000
    if law.kind == "two-sided":
        off = 8 * (law.scale - law.cut) / most + 2 * x.grain * law.scale
        return Law(law.kind, 0.0, roundest(law.scale, law.scale + off), roundest(max(law.cut - off, 0.0), law.cut))
    # in a coarse dtype the uppermost number that is drawn may be one grain short
    if law.centre == 0:
        return Law(law.kind, 0.0, roundest(law.scale, law.scale * (1 + 8 / most + 2 * x.grain)))
    off, short = 16 * law.scale / most, 2 * x.grain * max(abs(x.low), abs(x.high))
    # and a bound may itself be rounded outwards
    low = roundest(x.low - off, x.low + x.grain * abs(x.low))
    high = roundest(x.high - x.grain * abs(x.high), x.high + off + short)
    return Law(law.kind, (low + high) / 2, (high - low) / 2)


def roundest(low: float, high: float) -> float:
    """The number of fewest digits between two, the one nearest the middle if there are several."""
    middle = (low + high) / 2
    if low <= 0 <= high:
        return 0.0
    for digits in range(1, 7):
        found = float(f"{middle:.{digits - 1}e}")
        if low <= found <= high:
            return found
    return float(f"{middle:.4g}")
