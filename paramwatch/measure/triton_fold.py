# mypy: ignore-errors
# the bodies below are Triton's language, which a type checker would take for Python
# ruff: noqa: N803  -- constants of a kernel are in capitals
"""From the records of chunks to the parts of tensors: the second half of triton_kernels.py."""

import triton
import triton.language as tl

from paramwatch.measure.triton_tiles import (
    CHUNK_BASE,
    CHUNKS,
    DOT,
    FIELDS,
    FINITE,
    FIRST,
    INF,
    LEAST,
    MOST,
    NAN,
    NEGINF,
    PIVOT,
    POSINF,
    SECOND,
    SIZE,
    TURN,
    WITH_DOT,
    ZERO,
)

PARTS = tl.constexpr(11)


# what is found may lie anywhere in the numbers of a step: it is not compiled once more for where it is aligned by chance
@triton.jit(do_not_specialize=["p_out", "rows", "chunks", "base", "turns"])
def fold(p_plan, p_record, p_scale, p_out, rows, chunks, base, turns, SCALED: tl.constexpr, LANES: tl.constexpr):
    """The parts of one tensor from the records of its chunks. SCALED: 0 nothing, 1 all but the counts, 2 the inner product."""
    i_row = tl.load(p_plan + TURN * rows + base + tl.program_id(0) % turns)
    i_set = (tl.program_id(0) // turns).to(tl.int64)
    n_chunks = tl.load(p_plan + CHUNKS * rows + i_row).to(tl.int32)
    # of an update there are two records, and only the first may hold an inner product
    with_dot = (tl.load(p_plan + WITH_DOT * rows + i_row) != 0) & (i_set == 0)
    n_dots = tl.where(with_dot, n_chunks, 0)
    plane = tl.cast(chunks, tl.int64)
    p_first = p_record + i_set * plane * FIELDS + tl.load(p_plan + CHUNK_BASE * rows + i_row)
    # the pivot of the first chunk is near enough for all: float64 has digits to spare
    finite_0 = tl.load(p_first + FINITE * plane, mask=n_chunks > 0, other=0.0)
    pivot = tl.load(p_first + PIVOT * plane, mask=finite_0 > 0, other=0.0)
    o_lane = tl.arange(0, LANES)
    finite = tl.zeros([LANES], tl.float64)
    nan = tl.zeros([LANES], tl.float64)
    posinf = tl.zeros([LANES], tl.float64)
    neginf = tl.zeros([LANES], tl.float64)
    zero = tl.zeros([LANES], tl.float64)
    first = tl.zeros([LANES], tl.float64)
    second = tl.zeros([LANES], tl.float64)
    dot = tl.zeros([LANES], tl.float64)
    least = tl.full([LANES], INF, tl.float64)
    most = tl.full([LANES], -INF, tl.float64)
    for i in range(0, n_chunks, LANES):
        m = i + o_lane < n_chunks
        p = p_first + i + o_lane
        b_finite = tl.load(p + FINITE * plane, mask=m, other=0.0)
        finite += b_finite
        nan += tl.load(p + NAN * plane, mask=m, other=0.0)
        posinf += tl.load(p + POSINF * plane, mask=m, other=0.0)
        neginf += tl.load(p + NEGINF * plane, mask=m, other=0.0)
        zero += tl.load(p + ZERO * plane, mask=m, other=0.0)
        dot += tl.load(p + DOT * plane, mask=i + o_lane < n_dots, other=0.0)
        least = tl.minimum(least, tl.load(p + LEAST * plane, mask=m, other=INF))
        most = tl.maximum(most, tl.load(p + MOST * plane, mask=m, other=-INF))
        # sums about the pivot of the chunk become sums about the pivot of the tensor
        b_step = tl.where(b_finite > 0, tl.load(p + PIVOT * plane, mask=m, other=0.0) - pivot, 0.0)
        b_first = tl.load(p + FIRST * plane, mask=m, other=0.0)
        first += b_first + b_finite * b_step
        second += tl.load(p + SECOND * plane, mask=m, other=0.0) + b_step * (2.0 * b_first + b_finite * b_step)
    s_finite = tl.sum(finite, 0)
    s_first = tl.sum(first, 0)
    s_second = tl.sum(second, 0)
    # of no finite element nothing is known
    n = tl.where(s_finite > 0, s_finite, float("nan"))
    shift = s_first / n
    mean = pivot + shift
    # squares of float64 beyond 1e154 are infinite, and so are their differences here
    variance = tl.where(s_second < INF, tl.maximum((s_second - shift * s_first) / n, 0.0), s_second / n)
    unknown = n * 0.0
    std = tl.sqrt(variance) + unknown
    rms = tl.sqrt(variance + mean * mean) + unknown
    low = tl.min(least, 0) + unknown
    high = tl.max(most, 0) + unknown
    product = tl.where(with_dot, tl.sum(dot, 0), float("nan"))
    if SCALED == 1:
        scale = tl.load(p_scale).to(tl.float64)
        mean = mean / scale
        std = std / scale
        rms = rms / scale
        low = low / scale
        high = high / scale
    if SCALED == 2:
        product = product / tl.load(p_scale).to(tl.float64)
    p = p_out + (i_set * rows + i_row) * PARTS
    tl.store(p, tl.load(p_plan + SIZE * rows + i_row).to(tl.float64))
    tl.store(p + 1, tl.sum(nan, 0))
    tl.store(p + 2, tl.sum(posinf, 0))
    tl.store(p + 3, tl.sum(neginf, 0))
    tl.store(p + 4, tl.sum(zero, 0))
    tl.store(p + 5, mean)
    tl.store(p + 6, std)
    tl.store(p + 7, rms)
    tl.store(p + 8, low)
    tl.store(p + 9, high)
    tl.store(p + 10, product)
