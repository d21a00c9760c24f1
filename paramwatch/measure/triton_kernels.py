# mypy: ignore-errors
# the bodies below are Triton's language, which a type checker would take for Python
# ruff: noqa: N803, N806  -- constants of a kernel are in capitals
"""The parts of many tensors on a GPU, each byte read once. Launched by gpu.py; needs triton, which comes with torch for CUDA.

A tensor is cut into chunks of a size that depends on its dtype alone. One program reads a chunk and writes a record of it; triton_fold.py
then makes the parts of each tensor from its records, in float64 and in their order. No two programs add to the same number, so the bits are
the same from run to run, whatever else is measured in the same call.

Inside a chunk the sums are of float32 and about a pivot: a lane adds up at most 64 numbers, and the lanes are added pairwise. A chunk is
first read as if all of it were finite and of ordinary size. The sums tell whether it was and whether the pivot was near enough; only a
chunk that was not is read again, from the cache, in float64 and with every element looked at. Products and sums are never contracted behind
our back (`enable_fp_fusion=False`), so that the same lines give the same bits in each kernel.
"""

import triton
import triton.language as tl

from paramwatch.measure.triton_tiles import (
    DOT,
    DOWN,
    FIELDS,
    INF,
    across,
    add,
    add_product,
    add_some,
    add_word,
    beside,
    chunk_of,
    first_of,
    is_good,
    nothing,
    pivot_of,
    pointer,
    read_any,
    single,
    split,
    store_word,
    word,
    write,
)


@triton.jit(do_not_specialize=["rows", "chunks", "base"])
def measure_chunks(
    p_plan,
    p_address,
    p_record,
    rows,
    chunks,
    base,
    ELEMENT: tl.constexpr,
    BYTES: tl.constexpr,
    ALIGNED: tl.constexpr,
    COPY: tl.constexpr,
    COPY_ALIGNED: tl.constexpr,
    CHUNK: tl.constexpr,
    LANES: tl.constexpr,
    SLOW_LANES: tl.constexpr,
):
    """One chunk of one tensor: its record, and with COPY a copy of its elements."""
    PAIRS: tl.constexpr = ALIGNED and BYTES == 2
    i_chunk, i_row, start, n = chunk_of(p_plan, rows, base, CHUNK)
    p_x = pointer(tl.load(p_address + i_row) + start * BYTES, ELEMENT, ALIGNED)
    p_copy = p_x
    if COPY:
        p_copy = pointer(tl.load(p_address + rows + i_row) + start * BYTES, ELEMENT, COPY_ALIGNED)
    p_to = p_record + i_chunk
    if BYTES == 8:
        read_any(p_x, p_x, p_x, p_copy, n, p_to, chunks, False, False, COPY, SLOW_LANES)
    else:
        WHOLE: tl.constexpr = 4 * LANES * (2 if PAIRS else 1)
        o_lane = tl.arange(0, LANES)
        pivot = pivot_of(first_of(p_x, n), n)
        first, second, least, most, zero = nothing(LANES)
        for i in range(0, n // WHOLE):
            # all loads before any sum: 64 bytes of each thread are on their way at a time
            o = i * (4 * LANES) + o_lane
            b_0 = word(p_x, o, PAIRS)
            b_1 = word(p_x, o + LANES, PAIRS)
            b_2 = word(p_x, o + 2 * LANES, PAIRS)
            b_3 = word(p_x, o + 3 * LANES, PAIRS)
            if COPY:
                store_word(p_copy, o, b_0, PAIRS, COPY_ALIGNED)
                store_word(p_copy, o + LANES, b_1, PAIRS, COPY_ALIGNED)
                store_word(p_copy, o + 2 * LANES, b_2, PAIRS, COPY_ALIGNED)
                store_word(p_copy, o + 3 * LANES, b_3, PAIRS, COPY_ALIGNED)
            first, second, least, most, zero = add_word(b_0, pivot, first, second, least, most, zero, PAIRS, ELEMENT)
            first, second, least, most, zero = add_word(b_1, pivot, first, second, least, most, zero, PAIRS, ELEMENT)
            first, second, least, most, zero = add_word(b_2, pivot, first, second, least, most, zero, PAIRS, ELEMENT)
            first, second, least, most, zero = add_word(b_3, pivot, first, second, least, most, zero, PAIRS, ELEMENT)
        for i in range(n // WHOLE * WHOLE, n, LANES):
            m = i + o_lane < n
            b_x = tl.load(p_x + i + o_lane, mask=m, other=0.0)
            if COPY:
                tl.store(p_copy + i + o_lane, b_x, mask=m)
            first, second, least, most, zero = add_some(single(b_x), m, pivot, first, second, least, most, zero)
        s_first, s_second, s_least, s_most, s_zero = across(first, second, least, most, zero)
        if is_good(s_first, s_second, s_least, s_most, pivot, n):
            write(p_to, chunks, n, 0, 0, 0, s_zero, pivot, s_first, s_second, s_least, s_most)
        else:
            read_any(p_x, p_x, p_x, p_copy, n, p_to, chunks, False, False, False, SLOW_LANES)


@triton.jit(do_not_specialize=["rows", "chunks", "base"])
def measure_updates(
    p_plan,
    p_address,
    p_record,
    rows,
    chunks,
    base,
    ELEMENT: tl.constexpr,
    BYTES: tl.constexpr,
    ALIGNED: tl.constexpr,
    OLD_ALIGNED: tl.constexpr,
    GRAD: tl.constexpr,
    GRAD_ELEMENT: tl.constexpr,
    GRAD_BYTES: tl.constexpr,
    GRAD_ALIGNED: tl.constexpr,
    CHUNK: tl.constexpr,
    LANES: tl.constexpr,
    SLOW_LANES: tl.constexpr,
):
    """One chunk of a tensor and of what it was: the record of the difference and, behind those of all chunks, that of the tensor itself.

    Lanes take the same elements in the same order as in `measure_chunks`, so that of the tensor itself the bits are the same.
    """
    PAIRS: tl.constexpr = ALIGNED and BYTES == 2
    GRAD_PAIRS: tl.constexpr = GRAD_ALIGNED and GRAD_BYTES == 2
    i_chunk, i_row, start, n = chunk_of(p_plan, rows, base, CHUNK)
    p_x = pointer(tl.load(p_address + i_row) + start * BYTES, ELEMENT, ALIGNED)
    p_old = pointer(tl.load(p_address + rows + i_row) + start * BYTES, ELEMENT, OLD_ALIGNED)
    p_grad = p_x
    if GRAD:
        p_grad = pointer(tl.load(p_address + 2 * rows + i_row) + start * GRAD_BYTES, GRAD_ELEMENT, GRAD_ALIGNED)
    p_to = p_record + i_chunk
    p_itself = p_to + tl.cast(chunks, tl.int64) * FIELDS
    if BYTES == 8:
        read_any(p_x, p_x, p_x, p_x, n, p_itself, chunks, False, False, False, SLOW_LANES)
        read_any(p_x, p_old, p_grad, p_x, n, p_to, chunks, True, GRAD, False, SLOW_LANES)
    else:
        WHOLE: tl.constexpr = 4 * LANES * (2 if PAIRS else 1)
        o_lane = tl.arange(0, LANES)
        b_first = first_of(p_x, n)
        pivot = pivot_of(b_first, n)
        u_pivot = pivot_of(b_first - first_of(p_old, n), n)
        first, second, least, most, zero = nothing(LANES)
        u_first, u_second, u_least, u_most, u_zero = nothing(LANES)
        dot = tl.zeros([LANES], tl.float32)
        for i in range(0, n // WHOLE * 2):
            o = i * (2 * LANES) + o_lane
            b_0 = word(p_x, o, PAIRS)
            b_1 = word(p_x, o + LANES, PAIRS)
            b_old_0, b_old_0_too = beside(p_old, o, PAIRS, OLD_ALIGNED, ELEMENT)
            b_old_1, b_old_1_too = beside(p_old, o + LANES, PAIRS, OLD_ALIGNED, ELEMENT)
            b_grad_0, b_grad_0_too, b_grad_1, b_grad_1_too = b_old_0, b_old_0, b_old_0, b_old_0
            if GRAD:
                b_grad_0, b_grad_0_too = beside(p_grad, o, PAIRS, GRAD_PAIRS, GRAD_ELEMENT)
                b_grad_1, b_grad_1_too = beside(p_grad, o + LANES, PAIRS, GRAD_PAIRS, GRAD_ELEMENT)
            b_0, b_0_too = split(b_0, PAIRS, ELEMENT)
            first, second, least, most, zero = add(b_0, pivot, first, second, least, most, zero)
            u_first, u_second, u_least, u_most, u_zero = add(b_0 - b_old_0, u_pivot, u_first, u_second, u_least, u_most, u_zero)
            dot = add_product(b_0 - b_old_0, b_grad_0, dot, GRAD)
            if PAIRS:
                first, second, least, most, zero = add(b_0_too, pivot, first, second, least, most, zero)
                b_moved = b_0_too - b_old_0_too
                u_first, u_second, u_least, u_most, u_zero = add(b_moved, u_pivot, u_first, u_second, u_least, u_most, u_zero)
                dot = add_product(b_moved, b_grad_0_too, dot, GRAD)
            b_1, b_1_too = split(b_1, PAIRS, ELEMENT)
            first, second, least, most, zero = add(b_1, pivot, first, second, least, most, zero)
            u_first, u_second, u_least, u_most, u_zero = add(b_1 - b_old_1, u_pivot, u_first, u_second, u_least, u_most, u_zero)
            dot = add_product(b_1 - b_old_1, b_grad_1, dot, GRAD)
            if PAIRS:
                first, second, least, most, zero = add(b_1_too, pivot, first, second, least, most, zero)
                b_moved = b_1_too - b_old_1_too
                u_first, u_second, u_least, u_most, u_zero = add(b_moved, u_pivot, u_first, u_second, u_least, u_most, u_zero)
                dot = add_product(b_moved, b_grad_1_too, dot, GRAD)
        for i in range(n // WHOLE * WHOLE, n, LANES):
            o = i + o_lane
            m = o < n
            b_x = single(tl.load(p_x + o, mask=m, other=0.0))
            b_moved = b_x - single(tl.load(p_old + o, mask=m, other=0.0))
            first, second, least, most, zero = add_some(b_x, m, pivot, first, second, least, most, zero)
            u_first, u_second, u_least, u_most, u_zero = add_some(b_moved, m, u_pivot, u_first, u_second, u_least, u_most, u_zero)
            if GRAD:
                dot = add_product(b_moved, single(tl.load(p_grad + o, mask=m, other=0.0)), dot, True)
        s_first, s_second, s_least, s_most, s_zero = across(first, second, least, most, zero)
        t_first, t_second, t_least, t_most, t_zero = across(u_first, u_second, u_least, u_most, u_zero)
        s_dot = tl.sum(dot, 0)
        good = is_good(t_first, t_second, t_least, t_most, u_pivot, n)
        if GRAD:
            # infinite, or no number: with a gradient that is, or an inner product beyond 1e20
            good = good & (tl.abs(s_dot) < INF)
        if is_good(s_first, s_second, s_least, s_most, pivot, n):
            write(p_itself, chunks, n, 0, 0, 0, s_zero, pivot, s_first, s_second, s_least, s_most)
        else:
            read_any(p_x, p_x, p_x, p_x, n, p_itself, chunks, False, False, False, SLOW_LANES)
        if good:
            write(p_to, chunks, n, 0, 0, 0, t_zero, u_pivot, t_first, t_second, t_least, t_most)
            if GRAD:
                tl.store(p_to + tl.cast(chunks, tl.int64) * DOT, s_dot.to(tl.float64) * DOWN)
        else:
            read_any(p_x, p_old, p_grad, p_x, n, p_to, chunks, True, GRAD, False, SLOW_LANES)
