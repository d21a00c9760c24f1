"""What a run should have recorded: tensors cloned by the loop itself, and every column recomputed from them in float64, the obvious way.

Nothing of paramwatch is used here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

Numbers = dict[str, np.ndarray]
"""Row name -> its elements in float64; a row without such a tensor is left out."""


@dataclass
class Truth:
    """One step: each row's elements just before the optimizer stepped, and after."""

    param: Numbers
    grad: Numbers
    after: Numbers
    state: dict[str, Numbers]
    grad_raw: Numbers = field(default_factory=dict)

    @property
    def update(self) -> Numbers:
        """Parameter after minus before."""
        with np.errstate(invalid="ignore"):
            return {name: self.after[name] - self.param[name] for name in self.param}


def reals(tensor: Tensor) -> np.ndarray:
    """The elements as float64, a complex one as two."""
    dense = tensor.detach().clone().to_dense() if tensor.is_sparse else tensor.detach().clone()
    if dense.is_complex():
        flat = dense.numpy().ravel()
        return np.stack([flat.real, flat.imag], axis=1).ravel().astype(np.float64)
    return dense.to(torch.float64).numpy().ravel()


def named(model: nn.Module) -> dict[str, Tensor]:
    """Each distinct parameter under its first name."""
    return dict(model.named_parameters())


def step(model: nn.Module, optimizer: torch.optim.Optimizer, clip: Callable[[], object] | None = None) -> Truth:
    """Step the optimizer, whose gradients are there, and keep what it used and made."""
    raw = gradients(model)
    if clip is not None:
        clip()
    param = {name: reals(tensor) for name, tensor in named(model).items()}
    grad = gradients(model)
    optimizer.step()
    after = {name: reals(tensor) for name, tensor in named(model).items()}
    kept = {name: optimizer.state.get(tensor, {}) for name, tensor in named(model).items()}
    state = {key: {name: reals(held[key]) for name, held in kept.items() if key in held} for key in ("exp_avg", "exp_avg_sq")}
    return Truth(param, grad, after, state, raw)


def gradients(model: nn.Module) -> Numbers:
    """The gradients there are."""
    return {name: reals(tensor.grad) for name, tensor in named(model).items() if tensor.grad is not None}


def tensor_columns(kind: str, x: np.ndarray | None, finite: bool) -> dict[str, float]:
    """The statistics of one tensor, NaN where there is none; without `finite` they are what torch says."""
    names = ("norm", "mean", "std", "rms", "min", "max", "abs_max", "zero_frac", "nan", "inf")
    if x is None:
        return {f"{kind}_{name}": np.nan for name in names}
    counts = {"nan": np.isnan(x).sum(), "inf": np.isinf(x).sum()}
    x = x[np.isfinite(x)] if finite else x
    found = dict.fromkeys(names, np.nan) | counts | {"norm": np.sqrt(np.sum(x * x))}
    if x.size:
        with np.errstate(invalid="ignore"):
            found |= {"mean": x.mean(), "std": x.std(), "rms": np.sqrt(np.mean(x * x))}
        found |= {"min": x.min(), "max": x.max(), "abs_max": np.abs(x).max(), "zero_frac": np.mean(x == 0)}
    return {f"{kind}_{name}": float(value) for name, value in found.items()}


def ratio(above: float, below: float) -> float:
    """`above / below`, NaN where the divisor is 0."""
    return np.nan if below == 0 else above / below


def columns(truth: Truth, name: str, finite: bool = False) -> dict[str, float]:
    """Every numeric column of one row at one step, but for its learning rate."""
    grad, update = truth.grad.get(name), truth.update[name]
    found = tensor_columns("param", truth.param[name], finite) | tensor_columns("grad", grad, finite)
    of_update = tensor_columns("update", update, finite)
    found |= {"update_norm": of_update["update_norm"], "update_abs_max": of_update["update_abs_max"]}
    found["update_ratio"] = ratio(found["update_norm"], found["param_norm"])
    found["update_cos"] = np.nan if grad is None else ratio(-float(update @ grad), found["update_norm"] * found["grad_norm"])
    found["grad_raw_norm"] = tensor_columns("raw", truth.grad_raw.get(name), finite)["raw_norm"]
    found["clip_coef"] = ratio(found["grad_norm"], found["grad_raw_norm"])
    for key, held in truth.state.items():
        found[f"{key}_norm"] = tensor_columns(key, held.get(name), finite)[f"{key}_norm"]
    return found


def tolerance(column: str, truth: Truth, name: str, finite: bool) -> float:
    """How far a column may be off: 1e-6 of the sum of magnitudes it comes from; whole numbers and extremes are exact as float32."""
    if column.endswith("_mean"):
        x = (truth.param if column.startswith("param") else truth.grad)[name]
        return 1e-6 * float(np.mean(np.abs(x[np.isfinite(x)])))
    if column == "update_cos":
        # the inner product may cancel; the sum of its magnitudes is at most the product of the norms
        return 1e-6
    return 1e-6 * abs(columns(truth, name, finite)[column]) if column.endswith(("_norm", "_std", "_rms", "_ratio", "_coef")) else 0.0
