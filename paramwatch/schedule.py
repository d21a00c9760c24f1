"""Which steps are kept of a run whose length nobody knows: a pure function of the step number, fixed before the first step.

Used by the sinks that write to a place of limited size (the store, the TensorBoard event file).
"""

from __future__ import annotations

from collections.abc import Sequence

LEAST_BASE = 32
HORIZON = 2**20
"""The number of steps that fit the budget."""


class Schedule:
    """Every step below 2 x base; from there on the stride doubles each time the step number doubles.

    Steps in [base x 2^k, base x 2^(k+1)) are kept where they are multiples of 2^k, so each doubling keeps `base` more, runs of different
    length keep the same steps, and what a smaller base keeps a larger one keeps as well.

    Args:
        bytes_per_step: What one kept step takes.
        budget: Bytes that the first 2^20 steps may take. The base is the largest power of two for which they do, and never below
            `min_base`: a budget too small for that is exceeded.
        max_base: No larger base is chosen, whatever the budget. The default keeps each of the 2^20 steps.
        min_base: And no smaller one. A power of two.
    """

    def __init__(self, bytes_per_step: float, budget: float, max_base: int = HORIZON // 2, min_base: int = LEAST_BASE) -> None:
        self.base = min_base
        while self.base * 2 <= max_base and _kept(self.base * 2, HORIZON) * bytes_per_step <= budget:
            self.base *= 2

    def stride(self, step: int) -> int:
        """The distance between kept steps around this one: a power of two."""
        return 1 << max(step // self.base, 1).bit_length() - 1

    def keeps(self, step: int) -> bool:
        """Whether this step is kept."""
        return step % self.stride(step) == 0

    def chosen(self, steps: Sequence[int]) -> list[int]:
        """Which of some steps, each after the one before, are kept: their positions."""
        least, most = (self.stride(step) for step in (steps[0], steps[-1]))
        if least == most and steps[-1] - steps[0] == len(steps) - 1:
            return [*range(-steps[0] % least, len(steps), least)]
        # strides are powers of two: what a wide one keeps a narrow one keeps as well
        return [i for i, step in enumerate(steps) if step % least == 0 and (least == most or self.keeps(step))]

    def full_rate(self, step: int) -> bool:
        """Whether this step is in the stretch of which every step is kept."""
        return step < 2 * self.base

    def kept(self, steps: int) -> int:
        """How many of the steps 0 to `steps - 1` are kept."""
        return _kept(self.base, steps)

    def __repr__(self) -> str:
        return f"<Schedule: every step below {2 * self.base}, then {self.base} for each doubling of the step number>"


def _kept(base: int, steps: int) -> int:
    kept, start, end, stride = 0, 0, 2 * base, 1
    while start < steps:
        kept += -(-(min(end, steps) - start) // stride)
        start, end, stride = end, 2 * end, 2 * stride
    return kept
