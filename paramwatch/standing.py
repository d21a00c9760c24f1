"""Which layers do worst, and which best, over the latest steps of a run.

Worst is a layer with NaN or infinite elements; then one that a gradient does not reach, or that does not move; then the one whose steps,
relative to its size, are farthest from those of the other layers. Best is the layer in their middle. There is no threshold: what is too
fast is for people to judge, which layer is faster than the others is not.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from paramwatch.absence import counted
from paramwatch.columns import Array
from paramwatch.record import GRAD_STATES
from paramwatch.run import Run
from paramwatch.series import Series, of_each, select

_IDLE = {"zero": "zero gradient", "none": "no gradient", "unowned": "in no optimizer", None: "not stepped"}


@dataclass(frozen=True)
class Layer:
    """How a layer stood over some steps."""

    name: str
    update_ratio: float
    """Median over the steps in which it is a number; NaN if in none."""
    grad_norm: float
    """The same of the gradient."""
    against: float
    """Its `update_ratio` divided by the median of those of all layers that move; NaN where there is none."""
    nonfinite: int
    """Steps in which an element of a parameter, a gradient or an update was NaN or infinite."""
    verdict: str
    """In words."""
    severity: int
    """3: not finite. 2: without a gradient, or not moving. 1: moves. 0: frozen, so that nothing is to be expected."""


@dataclass(frozen=True)
class Standing:
    """All layers from worst to best, and what they were judged on."""

    layers: tuple[Layer, ...]
    ratios: Series
    """Update ratios by layer, in model order."""


def standing(run: Run, steps: slice | None = None) -> Standing:
    """Judge the layers of a run by some of its steps.

    Raises:
        ParamWatchError: Nothing whole was written yet.
    """
    found = select(run, ("update_ratio", "grad_norm", "param_norm", "grad_state"), steps=steps, by="layer")
    ratios, grads, params = (found.series(name) for name in ("update_ratio", "grad_norm", "param_norm"))
    spoilt, states = (ratios.spoilt | grads.spoilt | params.spoilt).sum(0), last_states(found.states)
    ratio, grad = (of_each(each.values, np.median) for each in (ratios, grads))
    moving = ratio[ratio > 0]
    middle = float(np.median(moving)) if len(moving) else np.nan
    layers = []
    for i, name in enumerate(ratios.names):
        against = ratio[i] / middle if ratio[i] > 0 else np.nan
        severity, verdict = _judged(int(spoilt[i]), states[i], ratio[i], against)
        layers.append(Layer(name, float(ratio[i]), float(grad[i]), float(against), int(spoilt[i]), verdict, severity))
    return Standing(tuple(sorted(layers, key=lambda layer: (-layer.severity, -_distance(layer)))), ratios)


def last_states(states: Array) -> list[str | None]:
    """The last of `GRAD_STATES` that is known of each column of int8 [n, columns]; None where none is."""
    if not len(states):
        return [None] * states.shape[1]
    known = states >= 0
    last = len(states) - 1 - known[::-1].argmax(0)
    codes = np.where(known.any(0), states[last, np.arange(states.shape[1])], -1)
    return [GRAD_STATES[code] if code >= 0 else None for code in codes.tolist()]


def _judged(spoilt: int, state: str | None, ratio: float, against: float) -> tuple[int, str]:
    if spoilt:
        return 3, f"not finite in {counted(spoilt, 'step')}"
    if state == "frozen":
        return 0, "frozen"
    if state != "used":
        return 2, _IDLE[state]
    if ratio == 0:
        return 2, "gradient, but no update"
    if np.isnan(against):
        return 1, "update not measured"
    if 0.8 <= against <= 1.25:
        return 1, "as the median"
    return 1, f"{_times(against)} {'faster' if against > 1 else 'slower'}"


def _times(against: float) -> str:
    times = max(against, 1 / against) if against > 0 else np.inf
    return f"{times:.1f}x" if times < 10 else f"{times:,.0f}x"


def _distance(layer: Layer) -> float:
    if layer.severity == 3:
        return float(layer.nonfinite)
    return abs(float(np.log(layer.against))) if layer.against > 0 else 0.0
