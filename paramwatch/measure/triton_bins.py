# mypy: ignore-errors
# the bodies below are Triton's language, which a type checker would take for Python
# ruff: noqa: N803  -- constants of a kernel are in capitals
"""Histograms of many tensors on a GPU, in the bins of bins.py. Launched by gpu.py; the chunks are those of triton_kernels.py.

A program counts the elements of a chunk by their bits and adds what it has found to the counts of the row. Whole numbers add up to the
same in any order, so that the counts do not depend on which program comes first.
"""

import triton
import triton.language as tl

from paramwatch import bins
from paramwatch.measure.triton_tiles import chunk_of, double, pointer, single

LEAST = tl.constexpr(bins.LEAST)
ZERO = tl.constexpr(bins.ZERO)
BINS = tl.constexpr(bins.BINS)
ROOM = tl.constexpr(256)
"""A power of two: in the last place is what is in no bin."""


@triton.jit
def bin_of(negative, exponent, zero, outside):
    """Position of the bin of each element, from what its bits say."""
    size = tl.minimum(tl.maximum(exponent - LEAST + 2, 1), ZERO)
    signed = tl.where(zero, 0, tl.where(negative, -size, size))
    return tl.where(outside, BINS, ZERO + signed)


@triton.jit
def bin_of_single(b, m):
    bits = single(b).to(tl.int32, bitcast=True)
    exponent = (bits >> 23) & 255
    return bin_of(bits < 0, exponent - 127, (bits & 0x7FFFFFFF) == 0, (exponent == 255) | (m == 0))


@triton.jit
def bin_of_double(b, m):
    bits = b.to(tl.int64, bitcast=True)
    exponent = ((bits >> 52) & 2047).to(tl.int32)
    return bin_of(bits < 0, exponent - 1023, (bits & 0x7FFFFFFFFFFFFFFF) == 0, (exponent == 2047) | (m == 0))


@triton.jit(do_not_specialize=["rows", "base"])
def count_chunks(
    p_plan,
    p_address,
    p_scale,
    p_count,
    rows,
    base,
    ELEMENT: tl.constexpr,
    BYTES: tl.constexpr,
    ALIGNED: tl.constexpr,
    UPDATE: tl.constexpr,
    OLD_ALIGNED: tl.constexpr,
    SCALED: tl.constexpr,
    CHUNK: tl.constexpr,
    LANES: tl.constexpr,
):
    """One chunk of one tensor, with UPDATE of its difference from what it was, with SCALED without a factor that it carries."""
    _, i_row, start, n = chunk_of(p_plan, rows, base, CHUNK)
    p_x = pointer(tl.load(p_address + i_row) + start * BYTES, ELEMENT, ALIGNED)
    o_lane = tl.arange(0, LANES)
    counts = tl.zeros([ROOM], tl.int32)
    if UPDATE or SCALED or BYTES == 8:
        p_old = p_x
        if UPDATE:
            p_old = pointer(tl.load(p_address + rows + i_row) + start * BYTES, ELEMENT, OLD_ALIGNED)
        for i in range(0, n, LANES):
            m = i + o_lane < n
            b_x = double(p_x + i + o_lane, m)
            if UPDATE:
                b_x -= double(p_old + i + o_lane, m)
            if SCALED:
                b_x = b_x / tl.load(p_scale).to(tl.float64)
            counts += tl.histogram(bin_of_double(b_x, m), ROOM)
    else:
        for i in range(0, n // LANES):
            b_x = tl.load(p_x + i * LANES + o_lane)
            counts += tl.histogram(bin_of_single(b_x, o_lane >= 0), ROOM)
        for i in range(n // LANES * LANES, n, LANES):
            m = i + o_lane < n
            counts += tl.histogram(bin_of_single(tl.load(p_x + i + o_lane, mask=m, other=0.0), m), ROOM)
    o_bin = tl.arange(0, ROOM)
    tl.atomic_add(p_count + i_row * BINS + o_bin, counts.to(tl.int64), mask=(counts > 0) & (o_bin < BINS), sem="relaxed")
