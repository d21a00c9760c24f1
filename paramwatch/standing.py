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
from paramwatch.run import Run
from paramwatch.series import Series, series

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
    ratios, grads, params = (series(run, name, steps=steps, by="layer") for name in ("update_ratio", "grad_norm", "param_norm"))
    # a run that goes on may have grown in between
    n = min(len(ratios.steps), len(grads.steps), len(params.steps))
    states = run.frame("grad_state", steps=steps, by="layer").iloc[:n]
    spoilt = (ratios.spoilt[:n] | grads.spoilt[:n] | params.spoilt[:n]).sum(0)
    ratio, grad = _medians(ratios.values[:n]), _medians(grads.values[:n])
    moving = ratio[ratio > 0]
    middle = float(np.median(moving)) if len(moving) else np.nan
    layers = []
    for i, name in enumerate(ratios.names):
        state = _last_known(states.iloc[:, i].to_list())
        against = ratio[i] / middle if ratio[i] > 0 else np.nan
        severity, verdict = _judged(int(spoilt[i]), state, ratio[i], against)
        layers.append(Layer(name, float(ratio[i]), float(grad[i]), float(against), int(spoilt[i]), verdict, severity))
    return Standing(tuple(sorted(layers, key=lambda layer: (-layer.severity, -_distance(layer)))), ratios)


def _medians(values: Array) -> Array:
    """Over the numbers of each column; NaN where there are none."""
    out = np.full(values.shape[1], np.nan)
    some = ~np.isnan(values).all(0)
    if some.any():
        out[some] = np.nanmedian(values[:, some], 0)
    return out


def _last_known(states: list[object]) -> str | None:
    return next((str(state) for state in reversed(states) if isinstance(state, str)), None)


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
