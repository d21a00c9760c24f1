"""The gradients a step used: measured when they are complete, and again where a wrapper's inner optimizer knows better.

The last measurement before the update is right, with two exceptions. An optimizer that steps inside another speaks for the rows it holds
alone, since what the others hold may have been used up, changed or freed by then. And what one inside has stepped is its own from then
on: who evaluates a closure later, and does not hold it, finds gradients of which no step is made.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.amp.grad_scaler import OptState
from torch.optim import Optimizer

from paramwatch.measure import measure
from paramwatch.measure.histograms import histograms
from paramwatch.optimizers import params_of
from paramwatch.raw import RawGradients
from paramwatch.rounds import Measured, OptimizerStep


def see_gradients(step: OptimizerStep, optimizer: Optimizer, raw: RawGradients, keep: bool, evaluation: bool) -> list[str]:
    """Measure the gradients of a step, or of those of its rows for which this optimizer speaks; gives the names of these.

    Args:
        step: In progress; it takes what is measured.
        optimizer: Who will use them, the innermost of those that step just now.
        raw: What they were before they were clipped.
        keep: Keep copies for the direction of the update.
        evaluation: Whether a closure has just computed them.
    """
    plain, scale, found_inf = is_plain(optimizer), step.carried, None
    if not plain:
        with torch.no_grad():
            scale, found_inf = (_copied(getattr(optimizer, name, None)) for name in ("grad_scale", "found_inf"))
    if step.folded is not None and (plain or step.folded.scales):
        grads = [tensor.grad for tensor in step.tensors]
        step.raw = raw.of(step.names, grads, scale)
        if step.folded.see(grads, scale):
            step.scale, step.found_inf = scale, found_inf
            return step.names
    step.unfold()
    which = _spoken_for(step, optimizer, evaluation)
    with torch.no_grad():
        if step.used is None or len(which) == len(step.names):
            _see_all(step, raw, keep, scale, found_inf)
            return step.names
        if which:
            _see_some(step, which, raw, scale, found_inf)
        return [step.names[i] for i in which]


def is_plain(optimizer: Optimizer) -> bool:
    """Whether it takes gradients as they are, and asks nobody if there was an infinity among them."""
    return getattr(optimizer, "grad_scale", None) is None and getattr(optimizer, "found_inf", None) is None


def is_unscaled(scaler: torch.amp.GradScaler, optimizer: Optimizer) -> bool:
    """Whether a scaler has taken its scale out of the gradients that this optimizer is about to use."""
    return scaler._per_optimizer_states.get(id(optimizer), {}).get("stage") is OptState.UNSCALED


def take_raw(step: OptimizerStep, wanted: bool) -> None:
    """Gradients before clipping where they were seen; elsewhere nothing was clipped, and raw is what was used."""
    if wanted and step.used is not None:
        step.entered = [*step.entered, *(Measured("grad_raw", used.names, used.reading) for used in (step.used, *step.refined))]


def _spoken_for(step: OptimizerStep, optimizer: Optimizer, evaluation: bool) -> Sequence[int]:
    """The rows of which this optimizer knows the gradient."""
    inside = optimizer is not step.optimizers[0]
    if not inside and not step.settled:
        return range(len(step.names))
    held = set(map(id, params_of(optimizer)))
    mine = [i for i, tensor in enumerate(step.tensors) if id(tensor) in held]
    alone = inside and not evaluation
    which = mine if alone else [i for i, name in enumerate(step.names) if name not in step.settled or id(step.tensors[i]) in held]
    if inside:
        step.settled = step.settled.union(step.names[i] for i in mine)
    return which


def _see_all(step: OptimizerStep, raw: RawGradients, keep: bool, scale: Tensor | None, found_inf: Tensor | None) -> None:
    step.scale, step.found_inf = scale, found_inf
    grads = [tensor.grad for tensor in step.tensors]
    step.had_grad = [grad is not None for grad in grads]
    step.required_grad = [tensor.requires_grad for tensor in step.tensors]
    step.used, step.refined = _measured(step, step.names, grads, scale), []
    step.raw = raw.of(step.names, grads, scale)
    if keep:
        step.grads = [_copied(grad) for grad in grads]


def _see_some(step: OptimizerStep, which: Sequence[int], raw: RawGradients, scale: Tensor | None, found_inf: Tensor | None) -> None:
    step.scale, step.found_inf = (old if new is None else new for old, new in ((step.scale, scale), (step.found_inf, found_inf)))
    names, grads = [step.names[i] for i in which], [step.tensors[i].grad for i in which]
    # an optimizer inside may have brought rows of its own
    more = len(step.tensors) - len(step.had_grad)
    had, required = [*step.had_grad, *[False] * more], [*step.required_grad, *[False] * more]
    if step.grads is not None:
        step.grads += [None] * more
    for i, grad in zip(which, grads, strict=True):
        had[i], required[i] = grad is not None, step.tensors[i].requires_grad
        if step.grads is not None:
            step.grads[i] = _copied(grad)
    others = set(step.names) - set(names)
    step.had_grad, step.required_grad = had, required
    step.refined = [*(seen for seen in step.refined if not others.isdisjoint(seen.names)), _measured(step, names, grads, scale)]
    step.raw = [*(seen.only(others) for seen in step.raw), *raw.of(names, grads, scale)]


def _measured(step: OptimizerStep, names: list[str], grads: Sequence[Tensor | None], scale: Tensor | None) -> Measured:
    return Measured("grad", names, measure(grads, scale), histograms(grads, scale) if step.binned else None)


def _copied(tensor: Tensor | None) -> Tensor | None:
    return tensor.detach().clone() if isinstance(tensor, Tensor) else None
