"""How far numbers vouch for a law that is named alone: within which bounds of one that is nearly the same they exclude all others.

Between `laws` and `initial`. No number of elements tells a normal law from one that is cut farther out than all of them, or a uniform law
from a normal one that is cut close to its centre: so it is said how far out it is not cut, and how flat it is.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from paramwatch.drawn import Law, Numbers
from paramwatch.formulas import telling
from paramwatch.shapes import LEVEL, SURE

_WIDEST = 5.43
"""The largest range of b t - a t^2 on -1 to 1 where b^2/6 + 2 a^2/45 is 1."""

_FAR, _FLAT = 3.5, 0.12
"""Where this much is known a verdict does not say it: 1 normal number of 2000 is farther out, and so much lower is the density at a cut at
half a standard deviation than at the centre."""

_FLAT_WITH_A_NAME = 1 - math.exp(-1 / 2)
"""The same at a cut at one standard deviation: of a law that ends where one with a name does."""


class Vouched(NamedTuple):
    """How far a law that is named alone is vouched for; NaN where the other kind is named, or several."""

    uncut_to: float = math.nan
    """Standard deviations within which a normal law is not cut, on neither side."""
    flat_within: float = math.nan
    """The share by which the density of a uniform law falls, at most, from its highest place to its lowest."""

    def words(self, bound_has_a_name: bool) -> str:
        """What a verdict says of it, "" where it goes without saying."""
        if self.uncut_to < _FAR:
            return f", uncut to {self.uncut_to:.1f} std"
        if self.flat_within > (_FLAT_WITH_A_NAME if bound_has_a_name else _FLAT):
            return f", flat within {100 * self.flat_within:.0f} %"
        return ""


NOT_ASKED = Vouched()


def vouched(x: Numbers, law: Law) -> Vouched:
    """How far these numbers vouch for a law that they look drawn from: either bound is false in about 1 case of 10,000 at most."""
    if law.kind == "normal":
        # its standard deviation is taken as large as may be
        most = math.sqrt(x.square(law.centre)) * (1 + SURE / math.sqrt(2 * x.n))
        return Vouched(uncut_to=math.floor(10 * min(x.high - law.centre, law.centre - x.low) / most) / 10)
    return Vouched(flat_within=_fall(x, law)) if law.kind == "uniform" else NOT_ASKED


def _fall(x: Numbers, law: Law) -> float:
    """The greatest fall of the density exp(b t - a t^2), t from -1 to 1 between the ends, that the numbers allow.

    Over a uniform one it gains b m - b^2/6 - a (q - 1/3) - 2 a^2/45 nats an element, m and q being the means of t and t^2. Of all a and b
    that lose no more to it than a true one does, the largest range of b t - a t^2 is bounded by its triangle inequality.
    """
    off, bent = (x.mean - law.centre) / law.scale, x.square(law.centre) / (law.scale * law.scale) - 1 / 3
    radius = -math.log(LEVEL) / telling(x.n, x.grain) + 1.5 * off * off + 45 / 8 * bent * bent
    return -math.expm1(-(6 * abs(off) + 45 / 4 * abs(bent) + _WIDEST * math.sqrt(radius)))
