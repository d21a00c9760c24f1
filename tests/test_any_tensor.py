"""A tensor of any form, with any numbers in it, on each path of the CPU, whole and in pieces: against numpy in extended precision."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from itertools import pairwise
from unittest.mock import patch

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from paramwatch.bins import BINS, LEAST, ZERO
from paramwatch.columns import PARTS, Array
from paramwatch.measure import Kept, histograms, measure, measure_end, native
from paramwatch.measure.naive import ORDER, as_reals
from paramwatch.merging import merge

EXACT = [part for part in ORDER if PARTS[part].integer or part in ("min", "max")]
ODD = (math.nan, math.inf, -math.inf, 0.0, -0.0, 1e-41, -1e-45, 1e30, -1e30, 3.4e38, 6e-8, 1e-300)

SPREADS: dict[str, Callable[[Tensor], Tensor]] = {
    "normal": lambda x: x,
    "tiny": lambda x: x * 1e-40,
    "huge": lambda x: x * 1e30,
    "about one": lambda x: 1 + 1e-4 * x,
    "constant": lambda x: torch.full_like(x, 0.1),
    "heavy tails": lambda x: x.pow(7),
    "mostly zero": lambda x: torch.where(x > 1, x, -0.0),
}

LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "in one piece": lambda x: x,
    "transposed": lambda x: x[: len(x) // 7 * 7].view(7, -1).t(),
    "strided": lambda x: x[::3],
    "a square of it": lambda x: x[: math.isqrt(len(x)) ** 2].view(math.isqrt(len(x)), -1)[:, ::2],
    "expanded": lambda x: x[:300].view(-1, 1).expand(-1, 3),
}

SIZES = st.integers(0, 70) | st.integers(0, 5000) | st.sampled_from([1023, 16_385, 65_535, 65_536, 65_537, 131_073, 300_001, 600_000])


@st.composite
def tensors(draw: st.DrawFn) -> Tensor:
    n, dtype = draw(SIZES), draw(st.sampled_from(list(native.TYPES)))
    x = SPREADS[draw(st.sampled_from(list(SPREADS)))](torch.randn(n, generator=torch.Generator().manual_seed(n), dtype=torch.float64))
    for at, value in draw(st.lists(st.tuples(st.integers(0, max(n - 1, 0)), st.sampled_from(ODD)), max_size=6)) if n else ():
        x[at] = value
    offset = draw(st.integers(0, 8))
    return LAYOUTS[draw(st.just("in one piece") | st.sampled_from(list(LAYOUTS)))](torch.cat((torch.zeros(offset), x)).to(dtype)[offset:])


def expected(x: Array) -> dict[str, float]:
    """The parts, and how large the elements are."""
    finite = x[np.isfinite(x)].astype(np.longdouble)
    found: dict[str, float] = {"count": len(x), "nan": np.isnan(x).sum(), "zero": (x == 0).sum()}
    found |= {"posinf": (x == np.inf).sum(), "neginf": (x == -np.inf).sum(), "size": 0.0}
    if not len(finite):
        return found | dict.fromkeys(("mean", "std", "rms", "min", "max"), math.nan)
    mean, rms = finite.mean(), np.sqrt(np.square(finite).mean())
    found |= {"mean": float(mean), "std": float(np.sqrt(np.square(finite - mean).mean())), "rms": float(rms)}
    # an extreme of 0 has no sign
    return found | {"min": float(finite.min()) + 0.0, "max": float(finite.max()) + 0.0, "size": float(np.abs(finite).mean())}


def check(found: Array, x: Array) -> None:
    want, got = expected(x), dict(zip(ORDER, found, strict=True))
    np.testing.assert_equal({part: got[part] for part in EXACT}, {part: want[part] for part in EXACT})
    np.testing.assert_allclose(got["mean"], want["mean"], rtol=0, atol=1e-6 * want["size"])
    np.testing.assert_allclose([got["std"], got["rms"]], [want["std"], want["rms"]], rtol=0, atol=1e-6 * want["rms"])


def counted(x: Array) -> Array:
    x = x[np.isfinite(x)]
    size = np.clip(np.frexp(x)[1].astype(np.int64) - 1 - LEAST + 2, 1, ZERO)
    return np.bincount(ZERO + np.where(x == 0, 0, np.where(x < 0, -size, size)), minlength=BINS)


def paths() -> Iterator[None]:
    yield
    with patch.object(native, "available", lambda: False):
        yield


@settings(max_examples=60)
@given(x=tensors(), step=st.sampled_from([0.0, 1e-8, 0.5]), cuts=st.lists(st.floats(0, 1), max_size=3))
def test_any_tensor_has_the_parts_that_numpy_says_and_the_same_bits_for_any_threads(x: Tensor, step: float, cuts: list[float]) -> None:
    old = x - step
    ends = sorted({0, x.numel(), *(int(cut * x.numel()) for cut in cuts)})
    pieces = [x.reshape(-1)[start:end] for start, end in pairwise(ends)]
    with np.errstate(invalid="ignore"):
        moved = as_reals(x).numpy() - as_reals(old).numpy()
    threads = torch.get_num_threads()
    try:
        for _ in paths():
            bits = set()
            for n in (1, 3):
                torch.set_num_threads(n)
                update, after = measure_end([x], Kept([old]))
                found = [measure([x]).numpy(), update.numpy(), after.numpy(), histograms.histograms([x]).numpy()]
                bits.add(b"".join(each.tobytes() for each in found))
            assert len(bits) == 1
            assert found[0].tobytes() == found[2].tobytes()
            check(found[0][0], as_reals(x).numpy())
            check(found[1][0], moved)
            np.testing.assert_array_equal(found[3][0], counted(as_reals(x).numpy()))
            if pieces:
                each = measure(pieces).numpy().T
                columns = {part: side.astype(np.int64) if PARTS[part].integer else side for part, side in zip(ORDER, each, strict=True)}
                whole = merge(columns, [range(len(pieces))])
                check(np.array([whole[part][0] for part in ORDER]), as_reals(x).numpy())
    finally:
        torch.set_num_threads(threads)
