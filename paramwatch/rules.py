"""Rules: read each record, say what a user would want to be told."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import combinations

import numpy as np

from paramwatch.agreement import is_explained, norms, statistics
from paramwatch.batch import Batch
from paramwatch.columns import NON_FINITE
from paramwatch.record import UNCHANGED, Finding, Record

_CALLED = {"param": "parameter", "grad": "gradient"}


class FirstNonFinite:
    """Names the row that held the first non-finite value, once per run, and how many rows followed in the same step.

    A parameter comes before a gradient (it was there when the step was entered), then the order of the model. A step that a `GradScaler`
    skipped does not count: an infinity there is how the scaler finds its scale.
    """

    def __init__(self) -> None:
        self._said = False

    def __call__(self, record: Record) -> Iterator[Finding]:
        if self._said or record.steps.get("skipped"):
            return
        bad = {kind: self._non_finite(record, kind) for kind in _CALLED}
        spoilt = np.flatnonzero(np.any([counts > 0 for counts in bad.values()], axis=0))
        if not len(spoilt):
            return
        self._said = True
        kind = next(kind for kind in _CALLED if bad[kind].any())
        row = int(np.flatnonzero(bad[kind])[0])
        name = record.inventory.rows[row].name
        axis = record.inventory.kinds.index(kind)
        nan, count = int(record.values["nan"][axis, row]), int(record.values["count"][axis, row])
        others = len(spoilt) - 1
        followed = "no other row" if not others else "1 other row" if others == 1 else f"{others} other rows"
        infinite = int(bad[kind][row]) - nan
        message = (
            f"first non-finite value: {_CALLED[kind]} of {name!r} has {nan} NaN and {infinite} infinite of {count} elements "
            f"({followed} in the same step)"
        )
        yield Finding(record.step, "first_nonfinite", name, message)

    @staticmethod
    def _non_finite(record: Record, kind: str) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
        axis = record.inventory.kinds.index(kind)
        total: np.ndarray[tuple[int], np.dtype[np.int64]] = sum(record.values[part][axis] for part in NON_FINITE)
        return np.where(record.values["count"][axis] >= 0, total, 0)


class NonFiniteUse:
    """Names the uses through which the gradient of a row became no number, once for each row, where it was split."""

    def __init__(self) -> None:
        self._said: set[str] = set()

    def __call__(self, record: Record) -> Iterator[Finding]:
        for row, split in record.uses.items() if not record.steps.get("skipped") else ():
            finite = np.isfinite(norms(split))
            if finite.all() or row in self._said:
                continue
            self._said.add(row)
            bad, good = ([use for use, fine in zip(split.uses, finite, strict=True) if fine == wanted] for wanted in (False, True))
            others = f"; that through {_listed(good, 3)} is finite" if good else ", which is all of its uses"
            yield Finding(record.step, "nonfinite_use", row, f"the gradient of {row!r} is not finite through {_listed(bad, 3)}{others}")


class UnattributedUse:
    """Says once of each row that was split that its gradient, or part of it, was found in no use; of those of one step together."""

    LEAST = 0.01
    """Of the norm of the gradient."""

    def __init__(self) -> None:
        self._said: set[str] = set()

    def __call__(self, record: Record) -> Iterator[Finding]:
        if record.steps.get("skipped"):
            return
        missing = {row: statistics(split)["residual"] for row, split in record.uses.items() if not is_explained(split)}
        # where splitting was off, the log has named the reason
        new = {
            row: share
            for row, share in missing.items()
            if (share > self.LEAST or np.isnan(share)) and row not in self._said and not record.uses[row].mode.startswith("off")
        }
        self._said.update(new)
        if whole := [row for row in new if not record.uses[row].uses]:
            message = (
                f"no use of {_listed(whole, 3)} was found in the autograd graph, so the gradient is not split. That is so where the "
                "forward pass is compiled, scripted, functional (torch.func.functional_call) or with other parameters in their places, run "
                "in other threads (nn.DataParallel) or recomputed by a checkpoint with use_reentrant=True in which no module is called, "
                "where the backward pass is compiled (compiled autograd), where gradients come from torch.autograd.grad, or the loss not "
                "from what the model returned: watch.root(loss) before backward looks from there; "
                "torch.compiler.set_stance('force_eager') from before the step before ends (for a compiled backward pass: while it "
                "runs) lets a compiled step be split"
            )
            yield Finding(record.step, "unattributed_use", whole[0], message)
        of_cause: dict[str, list[str]] = {}
        for row in new:
            if record.uses[row].uses:
                cause = next((cause for label, cause in _CAUSES.items() if label in record.uses[row].mode), _CAUSES[""])
                of_cause.setdefault(cause, []).append(row)
        for cause, parts in of_cause.items():
            share = new[parts[0]]
            much = "how much is not known" if np.isnan(share) else f"{share:.0%} of its norm"
            message = f"part of the gradient of {_listed(parts, 3)} ({much}) was found in no use: {cause}"
            yield Finding(record.step, "unattributed_use", parts[0], message)


_CAUSES = {
    "left over": (
        "it was there before the first backward pass through the model, left from the steps before (optimizer.zero_grad() comes before "
        "the backward pass) or from a pass beside the model, which watch.root(loss) before it makes known"
    ),
    "changed between": (
        "between two backward passes of the step the gradient was changed, and not by a factor. To be told of the uses alone, change it "
        "after the last one"
    ),
    "": (
        "it is used between the outputs of the model and the loss, which watch.root(loss) before backward finds, or where no use can be "
        "told (torch.func.vmap, a checkpoint with use_reentrant=True in which no module is called), a gradient hook has changed it, or it "
        "comes from a backward pass in which the parameter had a single use"
    ),
}
"""Of what is unattributed, by what the mode says."""


class SharedStorage:
    """Says once of each group of parameters that share memory without being tied what will go wrong."""

    def __init__(self) -> None:
        self._said: set[tuple[str, ...]] = set()

    def __call__(self, record: Record) -> Iterator[Finding]:
        for tie in record.inventory.ties:
            if tie.kind == "storage" and tie.names not in self._said:
                self._said.add(tie.names)
                yield Finding(record.step, "shared_storage", tie.names[0], str(tie))


class TieBroken:
    """Says once of each pair of names that they were one parameter and are two."""

    def __init__(self) -> None:
        self._said: set[tuple[str, ...]] = set()

    def __call__(self, record: Record) -> Iterator[Finding]:
        for apart in record.changes.apart:
            pairs = set(combinations(apart.names, 2))
            if not pairs <= self._said:
                self._said |= pairs
                message = (
                    f"{_listed(apart.names)} came apart at step {apart.step}, after load_state_dict(assign=True)? (Or to_empty(), a "
                    "conversion, a layer that was replaced?) They are separate parameters now; assign one nn.Parameter to all of them to "
                    "tie them again"
                )
                yield Finding(apart.step, "tie_broken", apart.names[0], message)


class DeadOptimizer:
    """Says of an optimizer that tensors it steps have left the model."""

    def __call__(self, record: Record) -> Iterator[Finding]:
        for lost in record.changes.lost:
            n, were = len(lost.names), _listed(lost.names, 3)
            tensors = "1 tensor that is" if n == 1 else f"{n} tensors that are"
            message = (
                f"the optimizer ({lost.optimizer}) owns {tensors} no longer in the model: training has silently stopped for "
                f"{'it' if n == 1 else 'them'} (was {were}). Make the optimizer anew, or give it with add_param_group what took the place"
            )
            yield Finding(lost.step, "dead_optimizer", lost.names[0], message)


class ChangedOutside:
    """Says once of each row that something else than an optimizer's step changed it; of those of one interval together."""

    def __init__(self) -> None:
        self._said: set[str] = set()

    def __call__(self, record: Record) -> Iterator[Finding]:
        new = {name: step for name, step in record.changes.outside.items() if name not in self._said}
        self._said.update(new)
        for since in sorted(set(new.values())):
            first, *others = (name for name, step in new.items() if step == since)
            more = "" if not others else " and 1 other row" if len(others) == 1 else f" and {len(others)} other rows"
            message = f"{first!r}{more} changed outside an optimizer step between {since} and {record.step}"
            yield Finding(record.step, "changed_outside", first, message)


def _listed(names: Sequence[str], most: int | None = None) -> str:
    """Names as a sentence has them; of more than `most` the rest is counted."""
    shown = [repr(name) for name in names[:most]]
    if len(shown) < len(names):
        shown.append(f"{len(names) - len(shown)} more")
    return " and ".join([*([", ".join(shown[:-1])] if shown[:-1] else []), shown[-1]])


RULES = (FirstNonFinite, NonFiniteUse, UnattributedUse, SharedStorage, TieBroken, DeadOptimizer, ChangedOutside)
"""What a Watch applies, each made anew for it."""


def worth_reading(batch: Batch) -> list[int]:
    """The records of a batch of which a rule of ours may have something to say: that something is not finite, or has changed.

    What else a rule reads is the inventory, and none comes with a batch. A rule that reads anything else has to be asked for here too.
    """
    # nearly always it is the very same object, which takes no look inside
    speaks = np.array([change is not UNCHANGED and change != UNCHANGED for change in batch.changes])
    for part in NON_FINITE if not batch.finite else ():
        speaks |= (batch.values[part] > 0).any((1, 2))
    return np.flatnonzero(speaks).tolist()
