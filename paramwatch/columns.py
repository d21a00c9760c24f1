"""Parts and statistics: what is stored of a tensor, and what users read from it.

The first stage of the pipe by meaning: `PARTS` are the numbers a measurement yields, chosen so that they merge over blocks, shards and
rows (`merging`); `STATISTICS` are the columns users read, each derived from parts by one function here and nowhere else. No torch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

Array: TypeAlias = NDArray[Any]
Detail: TypeAlias = Literal["cheap", "default", "full"]
Pair: TypeAlias = tuple[str, str]
"""A (kind, part): one stored column."""
Get: TypeAlias = Callable[[str, str], Array]
"""Gives the float64 values of a (kind, part); `count` is NaN where nothing was measured."""

KINDS = ("param", "grad", "update", "grad_raw", "exp_avg", "exp_avg_sq")
"""Which tensor of a row is measured. The last two are the optimizer's state, in `detail="full"` only."""

ABSENT = -1
"""The `count` of a (kind, row) that was not measured: a null everywhere it is shown."""


@dataclass(frozen=True)
class Part:
    """One stored number of a measured tensor."""

    name: str
    integer: bool
    product: bool = False
    """Of two tensors: it leaves the range of float32 where the numbers of both are well inside."""

    @property
    def dtype(self) -> type[np.generic]:
        """How the part is held: whole numbers as int64, products as float64, the rest as float32."""
        return np.int64 if self.integer else np.float64 if self.product else np.float32


PARTS: Mapping[str, Part] = {
    part.name: part
    for part in (
        Part("count", True),  # elements measured, non-finite ones included (a complex element counts as two reals)
        Part("nan", True),  # elements that are not a number
        Part("posinf", True),  # elements that are +infinity
        Part("neginf", True),  # elements that are -infinity
        Part("zero", True),  # elements equal to zero, of either sign
        Part("mean", False),  # mean of the finite elements
        Part("std", False),  # population standard deviation of the finite elements
        Part("rms", False),  # root mean square of the finite elements
        Part("min", False),  # least finite element
        Part("max", False),  # greatest finite element
        Part("dot", False, product=True),  # inner product of update and gradient over the finite elements of both
    )
}

NON_FINITE = ("nan", "posinf", "neginf")
"""Parts that count elements which are not finite."""

SPECIALS = ("count", *NON_FINITE)


def _pairs(**parts: str) -> tuple[Pair, ...]:
    return tuple((kind, part) for kind, names in parts.items() for part in (*SPECIALS, *names.split()))


LAYOUTS: Mapping[Detail, tuple[Pair, ...]] = {
    "cheap": _pairs(param="rms min max", grad="rms min max", update="rms min max", grad_raw="rms"),
    "default": _pairs(param="zero mean std rms min max", grad="zero mean std rms min max", update="rms min max", grad_raw="rms"),
    "full": _pairs(
        param="zero mean std rms min max",
        grad="zero mean std rms min max",
        update="rms min max dot",
        grad_raw="rms",
        exp_avg="rms",
        exp_avg_sq="rms",
    ),
}
"""What is stored for each `detail`."""


def kinds_of(layout: Sequence[Pair]) -> tuple[str, ...]:
    """The kinds of a layout, in the order of `KINDS`: the first axis of a record's arrays."""
    present = {kind for kind, _ in layout}
    return tuple(kind for kind in KINDS if kind in present)


@dataclass(frozen=True)
class Statistic:
    """One column that users read, and how it follows from parts."""

    name: str
    needs: tuple[Pair, ...]
    compute: Callable[[Get, bool], Array]
    """Called with the parts and `finite`; gives float64, NaN where nothing was measured."""
    integer: bool
    unit: str
    formula: str


def statistics_of(layout: Sequence[Pair]) -> tuple[Statistic, ...]:
    """The statistics that can be derived from what a layout stores, in table order."""
    stored = set(layout)
    return tuple(statistic for statistic in STATISTICS.values() if stored.issuperset(statistic.needs))


def getter(values: Mapping[str, Array], kinds: Sequence[str]) -> Get:
    """Read parts out of arrays shaped [..., kinds, rows], in float64, nulls as NaN."""
    axis = {kind: i for i, kind in enumerate(kinds)}

    def get(kind: str, part: str) -> Array:
        column = values[part][..., axis[kind], :].astype(np.float64)
        return np.where(values["count"][..., axis[kind], :] < 0, np.nan, column)

    return get


# ---- how statistics follow from parts -------------------------------------------------------


def _specials(get: Get, kind: str, finite: bool) -> tuple[Array, Array]:
    """How many elements count as numbers, and what a sum over all elements would turn into (0, infinity or NaN)."""
    count, nan = get(kind, "count"), get(kind, "nan")
    infinite = get(kind, "posinf") + get(kind, "neginf")
    spoilt = np.where(nan > 0, np.nan, np.where(infinite > 0, np.inf, 0.0))
    return count - nan - infinite, np.where(np.isnan(count), np.nan, 0.0) if finite else spoilt


def _norm(kind: str) -> Callable[[Get, bool], Array]:
    def compute(get: Get, finite: bool) -> Array:
        n, spoilt = _specials(get, kind, finite)
        return np.where(n == 0, 0.0, get(kind, "rms") * np.sqrt(n)) + spoilt

    return compute


def _rms(kind: str) -> Callable[[Get, bool], Array]:
    def compute(get: Get, finite: bool) -> Array:
        n, spoilt = _specials(get, kind, finite)
        all_infinite = np.where((n == 0) & (spoilt == np.inf), 0.0, get(kind, "rms"))
        return all_infinite + spoilt

    return compute


def _mean(kind: str) -> Callable[[Get, bool], Array]:
    def compute(get: Get, finite: bool) -> Array:
        if finite:
            return get(kind, "mean")
        up, down = get(kind, "posinf") > 0, get(kind, "neginf") > 0
        lost = (get(kind, "nan") > 0) | (up & down)
        return np.where(lost, np.nan, np.where(up, np.inf, np.where(down, -np.inf, get(kind, "mean"))))

    return compute


def _std(kind: str) -> Callable[[Get, bool], Array]:
    def compute(get: Get, finite: bool) -> Array:
        _, spoilt = _specials(get, kind, finite)
        return np.where(spoilt == 0, get(kind, "std"), np.nan)

    return compute


def _extreme(kind: str, part: str) -> Callable[[Get, bool], Array]:
    sign, toward, away = (-1.0, "neginf", "posinf") if part == "min" else (1.0, "posinf", "neginf")

    def compute(get: Get, finite: bool) -> Array:
        value = get(kind, part)
        if finite:
            return value
        n, _ = _specials(get, kind, finite)
        value = np.where((n == 0) & (get(kind, away) > 0), -sign * np.inf, value)
        value = np.where(get(kind, toward) > 0, sign * np.inf, value)
        return np.where(get(kind, "nan") > 0, np.nan, value)

    return compute


def _abs_max(kind: str) -> Callable[[Get, bool], Array]:
    low, high = _extreme(kind, "min"), _extreme(kind, "max")

    def compute(get: Get, finite: bool) -> Array:
        return np.maximum(np.abs(low(get, finite)), np.abs(high(get, finite)))

    return compute


def _zero_frac(kind: str) -> Callable[[Get, bool], Array]:
    def compute(get: Get, finite: bool) -> Array:
        n = _specials(get, kind, finite)[0] if finite else get(kind, "count")
        return ratio(get(kind, "zero"), n)

    return compute


def _nans(kind: str) -> Callable[[Get, bool], Array]:
    return lambda get, finite: get(kind, "nan")


def _infinities(kind: str) -> Callable[[Get, bool], Array]:
    return lambda get, finite: get(kind, "posinf") + get(kind, "neginf")


def _ratio(above: str, below: str) -> Callable[[Get, bool], Array]:
    top, bottom = _norm(above), _norm(below)
    return lambda get, finite: ratio(top(get, finite), bottom(get, finite))


def _update_cos(get: Get, finite: bool) -> Array:
    norms = _norm("update")(get, finite) * _norm("grad")(get, finite)
    return ratio(-get("update", "dot"), norms)


def ratio(above: Array, below: Array) -> Array:
    """`above / below`, NaN where the divisor is 0."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(below == 0, np.nan, above / below)


def _table() -> dict[str, Statistic]:
    made: dict[str, Statistic] = {}

    def add(name: str, compute: Callable[[Get, bool], Array], needs: tuple[Pair, ...], unit: str, formula: str) -> None:
        integer = name.endswith(("_nan", "_inf"))
        made[name] = Statistic(name, needs, compute, integer, unit, formula)

    for kind, unit in (("param", "parameter"), ("grad", "gradient")):
        add(f"{kind}_norm", _norm(kind), _pairs(**{kind: "rms"}), unit, "sqrt(sum x^2)")
        add(f"{kind}_mean", _mean(kind), _pairs(**{kind: "mean"}), unit, "sum x / n")
        add(f"{kind}_std", _std(kind), _pairs(**{kind: "std"}), unit, "sqrt(sum (x - mean)^2 / n)")
        add(f"{kind}_rms", _rms(kind), _pairs(**{kind: "rms"}), unit, "sqrt(sum x^2 / n)")
        add(f"{kind}_min", _extreme(kind, "min"), _pairs(**{kind: "min"}), unit, "min x")
        add(f"{kind}_max", _extreme(kind, "max"), _pairs(**{kind: "max"}), unit, "max x")
        add(f"{kind}_abs_max", _abs_max(kind), _pairs(**{kind: "min max"}), unit, "max |x|")
        add(f"{kind}_zero_frac", _zero_frac(kind), _pairs(**{kind: "zero"}), "1", "(number of x = 0) / n")
        add(f"{kind}_nan", _nans(kind), _pairs(**{kind: ""}), "elements", "number of NaN")
        add(f"{kind}_inf", _infinities(kind), _pairs(**{kind: ""}), "elements", "number of +inf and -inf")
    add("update_norm", _norm("update"), _pairs(update="rms"), "parameter", "sqrt(sum (after - before)^2)")
    add("update_abs_max", _abs_max("update"), _pairs(update="min max"), "parameter", "max |after - before|")
    add("update_ratio", _ratio("update", "param"), _pairs(update="rms", param="rms"), "1", "update_norm / param_norm")
    add("grad_raw_norm", _norm("grad_raw"), _pairs(grad_raw="rms"), "gradient", "grad_norm before clipping")
    clip = _pairs(grad="rms", grad_raw="rms")
    add("clip_coef", _ratio("grad", "grad_raw"), clip, "1", "grad_norm / grad_raw_norm")
    cosine = (*_pairs(update="rms dot"), *_pairs(grad="rms"))
    add("update_cos", _update_cos, cosine, "1", "-<update, grad> / (update_norm * grad_norm)")
    add("exp_avg_norm", _norm("exp_avg"), _pairs(exp_avg="rms"), "gradient", "sqrt(sum m^2), m = state['exp_avg']")
    squares = _pairs(exp_avg_sq="rms")
    add("exp_avg_sq_norm", _norm("exp_avg_sq"), squares, "gradient^2", "sqrt(sum v^2), v = state['exp_avg_sq']")
    return made


STATISTICS: Mapping[str, Statistic] = _table()
"""Every statistic by its column name."""

EXTRA_COLUMNS = ("lr", "grad_state")
"""Columns of a frame that are read per row and are not derived from parts."""
