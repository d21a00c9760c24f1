"""Laws in words, with the roundest parameters that the numbers allow.

Behind `summary`: where no law of a known scale fits, one says `normal(0, 0.01)` of numbers whose standard deviation is 0.00983.
"""

from __future__ import annotations

import math

from paramwatch.laws import Law, Numbers


def words(law: Law) -> str:
    if law.kind == "uniform":
        low, high = law.centre - law.scale, law.centre + law.scale
        return f"uniform ±{law.scale:.3g}" if law.centre == 0 else f"uniform({low:.3g}, {high:.3g})"
    if law.kind == "two-sided":
        return f"±uniform({law.cut:.3g}, {law.scale:.3g})"
    if law.kind == "constant":
        return f"constant {law.centre:.6g}"
    text = f"normal({law.centre:.3g}, {law.scale:.3g})"
    return f"truncated {text}, cut at {law.cut:.3g} std" if law.kind == "truncated" else text


def plain(x: Numbers, law: Law) -> str:
    """A law whose parameters are not known: the roundest ones that the numbers allow."""
    return words(_rounded(x, law))


def plain_std(x: Numbers, law: Law) -> float:
    return _rounded(x, law).std


def _rounded(x: Numbers, law: Law) -> Law:
    n, most = x.n, x.extent
    if law.kind in ("normal", "truncated"):
        off = 3 * law.scale / math.sqrt(2 * n)
        scale = roundest(law.scale - off, law.scale + off)
        centre = law.centre and roundest(law.centre - 3 * law.scale / math.sqrt(n), law.centre + 3 * law.scale / math.sqrt(n))
        # from the cut at 256 elements known to a tenth, to the one at a million to a thousandth
        cut = law.cut if law.kind == "normal" else roundest(law.cut * (1 - 1.6 / math.sqrt(n)), law.cut * (1 + 1.6 / math.sqrt(n)))
        return Law(law.kind, centre, scale, cut)
    # an extreme stays farther than 8/n of the width from its bound in 3 cases of 10,000
    if law.kind == "two-sided":
        off = 8 * (law.scale - law.cut) / most + 2 * x.grain * law.scale
        return Law(law.kind, 0.0, roundest(law.scale, law.scale + off), roundest(max(law.cut - off, 0.0), law.cut))
    # in a coarse dtype the uppermost number that is drawn may be one grain short
    if law.centre == 0:
        return Law(law.kind, 0.0, roundest(law.scale, law.scale * (1 + 8 / most + 2 * x.grain)))
    off, short = 16 * law.scale / most, 2 * x.grain * max(abs(x.low), abs(x.high))
    low, high = roundest(x.low - off, x.low), roundest(x.high, x.high + off + short)
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
