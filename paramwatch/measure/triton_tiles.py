# mypy: ignore-errors
# the bodies below are Triton's language, which a type checker would take for Python
# ruff: noqa: N803, SIM300  -- constants of a kernel are in capitals
"""What the kernels of triton_kernels.py do with the elements of one chunk: load, add up, judge, and write the record.

The names follow one rule: `p_` points to memory, `b_` is loaded, `o_` is an offset, `s_` was summed across all lanes; a mask is `m`.
"""

import triton
import triton.language as tl
from triton.errors import TritonError as TritonError  # what a compilation fails with

FINITE = tl.constexpr(0)
NAN = tl.constexpr(1)
POSINF = tl.constexpr(2)
NEGINF = tl.constexpr(3)
ZERO = tl.constexpr(4)
PIVOT = tl.constexpr(5)
FIRST = tl.constexpr(6)  # sum of x - pivot over the finite elements
SECOND = tl.constexpr(7)  # sum of its square
LEAST = tl.constexpr(8)
MOST = tl.constexpr(9)
DOT = tl.constexpr(10)  # written and read only where there is a gradient
FIELDS = tl.constexpr(11)
"""The numbers of a record. Each is a plane of its own over all chunks, so that neighbouring lanes of `fold` read neighbouring numbers."""

SIZE = tl.constexpr(0)
CHUNK_BASE = tl.constexpr(1)  # position of the row's first chunk
CHUNKS = tl.constexpr(2)
WITH_DOT = tl.constexpr(3)
TURN = tl.constexpr(4)  # no property of a row: the rows in the order in which they are folded
COLUMNS = tl.constexpr(5)
"""What a plan holds of each row, one column after the other; behind them, the row of each chunk."""

ELEMENTS = (tl.float32, tl.float64, tl.bfloat16, tl.float16)
"""As `native.TYPES` numbers them."""

SEEN_FIRST = tl.constexpr(32)  # elements that the pivot goes by; of 32 equal ones the mean is exact
TOO_FAR = tl.constexpr(9.0)  # how often the sum of squares about the pivot may hold that about the mean: one digit of seven is lost
TOO_SMALL = tl.constexpr(1.1754943508222875e-38)  # mean square below which float32 loses digits
UP = tl.constexpr(1152921504606846976.0)  # 2^60, which products carry: without it those of two small factors are lost
DOWN = tl.constexpr(8.673617379884035e-19)
INF = tl.constexpr(float("inf"))


@triton.jit
def chunk_of(p_plan, rows, base, CHUNK: tl.constexpr):
    """The chunk that this program takes: which it is, of which row, from which element on, and of how many."""
    i_chunk = base + tl.program_id(0).to(tl.int64)
    i_row = tl.load(p_plan + COLUMNS * rows + i_chunk)
    # in 64 bits: a tensor may hold more than 2^31 elements, a chunk never does
    start = (i_chunk - tl.load(p_plan + CHUNK_BASE * rows + i_row)) * CHUNK
    n = tl.minimum(tl.load(p_plan + SIZE * rows + i_row) - start, CHUNK).to(tl.int32)
    return i_chunk, i_row, start, n


@triton.jit
def pointer(address, ELEMENT: tl.constexpr, ALIGNED: tl.constexpr):
    """An address as a pointer; ALIGNED is a promise of 16 bytes."""
    p = address.to(tl.pointer_type(ELEMENT))
    if ALIGNED:
        # loads of 16 bytes need this and, as well, a loop without a mask; either alone gives loads of 4
        p = tl.multiple_of(p, 16)
    return p


@triton.jit
def word(p, o, PAIRS: tl.constexpr):
    """One element; with PAIRS 32 bits that hold two, since four lanes' worth of those fill 16 bytes as float32 does."""
    if PAIRS:
        return tl.load(tl.multiple_of(p.to(tl.pointer_type(tl.int32)), 16) + o)
    else:
        return tl.load(p + o)


@triton.jit
def store_word(p, o, b, PAIRS: tl.constexpr, ALIGNED: tl.constexpr):
    """Puts down what `word` has loaded."""
    if PAIRS:
        if ALIGNED:
            tl.store(tl.multiple_of(p.to(tl.pointer_type(tl.int32)), 16) + o, b)
        else:
            p_half = p.to(tl.pointer_type(tl.int16))
            tl.store(p_half + 2 * o, b.to(tl.int16))
            tl.store(p_half + 2 * o + 1, (b >> 16).to(tl.int16))
    else:
        tl.store(p + o, b)


@triton.jit
def single(b):
    """In float32. Of bfloat16 by its bits, which loses no subnormal number in whatever way conversions are compiled."""
    if b.dtype == tl.bfloat16:
        return (b.to(tl.int16, bitcast=True).to(tl.int32) << 16).to(tl.float32, bitcast=True)
    else:
        return b.to(tl.float32)


@triton.jit
def split(b, PAIRS: tl.constexpr, ELEMENT: tl.constexpr):
    """The elements of a word in float32; without PAIRS the second is the first again."""
    if PAIRS:
        if ELEMENT == tl.bfloat16:
            return (b << 16).to(tl.float32, bitcast=True), (b & -65536).to(tl.float32, bitcast=True)
        else:
            low = b.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
            return low, (b >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    else:
        return single(b), single(b)


@triton.jit
def beside(p, o, PAIRS: tl.constexpr, TOGETHER: tl.constexpr, ELEMENT: tl.constexpr):
    """What lies in another tensor beside the elements of a word: TOGETHER where it is aligned and of 16 bits too."""
    if PAIRS:
        if TOGETHER:
            return split(word(p, o, True), True, ELEMENT)
        else:
            return single(tl.load(p + 2 * o)), single(tl.load(p + 2 * o + 1))
    else:
        return split(tl.load(p + o), False, ELEMENT)


@triton.jit
def first_of(p, n):
    o = tl.arange(0, SEEN_FIRST)
    return single(tl.load(p + o, mask=o < n, other=0.0))


@triton.jit
def pivot_of(b_first, n):
    """What to subtract from each element: the mean of the first where they lie close about it, else 0, which spares zeros any rounding."""
    share = tl.where(n >= SEEN_FIRST, 1.0 / SEEN_FIRST, 1.0 / n.to(tl.float32))
    mean = tl.sum(b_first, 0) * share
    square = tl.sum(b_first * b_first, 0) * share
    # the mean is more than twice the standard deviation
    return tl.where(5.0 * mean * mean > 4.0 * square, mean, 0.0)


@triton.jit
def nothing(LANES: tl.constexpr):
    """The sums of no element; `zero` is float32, which holds what a lane can count and costs an instruction less to add to."""
    first = tl.zeros([LANES], tl.float32)
    second = tl.zeros([LANES], tl.float32)
    least = tl.full([LANES], INF, tl.float32)
    most = tl.full([LANES], -INF, tl.float32)
    zero = tl.zeros([LANES], tl.float32)
    return first, second, least, most, zero


@triton.jit
def add(b_x, pivot, first, second, least, most, zero):
    b_apart = b_x - pivot
    first += b_apart
    second = tl.fma(b_apart, b_apart, second)
    least = tl.minimum(least, b_x)
    most = tl.maximum(most, b_x)
    zero += tl.where(b_x == 0.0, 1.0, 0.0)
    return first, second, least, most, zero


@triton.jit
def add_some(b_x, m, pivot, first, second, least, most, zero):
    b_apart = tl.where(m, b_x - pivot, 0.0)
    first += b_apart
    second = tl.fma(b_apart, b_apart, second)
    least = tl.minimum(least, tl.where(m, b_x, INF))
    most = tl.maximum(most, tl.where(m, b_x, -INF))
    zero += tl.where(m & (b_x == 0.0), 1.0, 0.0)
    return first, second, least, most, zero


@triton.jit
def add_word(b, pivot, first, second, least, most, zero, PAIRS: tl.constexpr, ELEMENT: tl.constexpr):
    b_x, b_too = split(b, PAIRS, ELEMENT)
    first, second, least, most, zero = add(b_x, pivot, first, second, least, most, zero)
    if PAIRS:
        first, second, least, most, zero = add(b_too, pivot, first, second, least, most, zero)
    return first, second, least, most, zero


@triton.jit
def add_product(b_moved, b_grad, dot, GRAD: tl.constexpr):
    if GRAD:
        return tl.fma(b_moved * UP, b_grad, dot)
    else:
        return dot


@triton.jit
def across(first, second, least, most, zero):
    return tl.sum(first, 0), tl.sum(second, 0), tl.min(least, 0), tl.max(most, 0), tl.sum(zero, 0)


@triton.jit
def is_good(s_first, s_second, s_least, s_most, pivot, n):
    """Whether float32 was enough; an element that is not finite makes the sum of squares infinite or no number."""
    count = n.to(tl.float32)
    near = s_second <= TOO_FAR * (s_second - s_first / count * s_first)
    # else the elements are much smaller than the pivot, and what is lost by subtracting it is not small beside them
    near = near & ((pivot == 0.0) | (tl.abs(s_first) <= 0.5 * tl.abs(pivot) * count))
    return (s_second < INF) & near & ((s_second > count * TOO_SMALL) | (s_least == s_most))


@triton.jit
def write(p_to, chunks, finite, nan, posinf, neginf, zero, pivot, first, second, least, most):
    plane = tl.cast(chunks, tl.int64)
    tl.store(p_to + FINITE * plane, tl.cast(finite, tl.float64))
    tl.store(p_to + NAN * plane, tl.cast(nan, tl.float64))
    tl.store(p_to + POSINF * plane, tl.cast(posinf, tl.float64))
    tl.store(p_to + NEGINF * plane, tl.cast(neginf, tl.float64))
    tl.store(p_to + ZERO * plane, tl.cast(zero, tl.float64))
    tl.store(p_to + PIVOT * plane, tl.cast(pivot, tl.float64))
    tl.store(p_to + FIRST * plane, tl.cast(first, tl.float64))
    tl.store(p_to + SECOND * plane, tl.cast(second, tl.float64))
    tl.store(p_to + LEAST * plane, tl.cast(least, tl.float64))
    tl.store(p_to + MOST * plane, tl.cast(most, tl.float64))


@triton.jit
def double(p, m):
    b = tl.load(p, mask=m, other=0.0)
    if p.dtype.element_ty == tl.float64:
        return b
    else:
        return single(b).to(tl.float64)


@triton.jit
def read_any(
    p_x,
    p_old,
    p_grad,
    p_copy,
    n,
    p_to,
    chunks,
    UPDATE: tl.constexpr,
    GRAD: tl.constexpr,
    COPY: tl.constexpr,
    LANES: tl.constexpr,
):
    """A chunk in float64, every element for what it is, in two sweeps: the second is about the mean that the first has found."""
    o_lane = tl.arange(0, LANES)
    finite = tl.zeros([LANES], tl.int32)
    nan = tl.zeros([LANES], tl.int32)
    posinf = tl.zeros([LANES], tl.int32)
    neginf = tl.zeros([LANES], tl.int32)
    zero = tl.zeros([LANES], tl.int32)
    total = tl.zeros([LANES], tl.float64)
    dot = tl.zeros([LANES], tl.float64)
    least = tl.full([LANES], INF, tl.float64)
    most = tl.full([LANES], -INF, tl.float64)
    for i in range(0, n, LANES):
        o = i + o_lane
        m = o < n
        if COPY:
            tl.store(p_copy + o, tl.load(p_x + o, mask=m, other=0.0), mask=m)
        b_x = double(p_x + o, m)
        if UPDATE:
            b_x -= double(p_old + o, m)
        ok = m & (tl.abs(b_x) < INF)
        finite += ok.to(tl.int32)
        nan += (m & (b_x != b_x)).to(tl.int32)
        posinf += (m & (b_x == INF)).to(tl.int32)
        neginf += (m & (b_x == -INF)).to(tl.int32)
        zero += (m & (b_x == 0.0)).to(tl.int32)
        total += tl.where(ok, b_x, 0.0)
        least = tl.minimum(least, tl.where(ok, b_x, INF))
        most = tl.maximum(most, tl.where(ok, b_x, -INF))
        if GRAD:
            b_grad = double(p_grad + o, m)
            dot += tl.where(ok & (tl.abs(b_grad) < INF), b_x * b_grad, 0.0)
    s_finite = tl.sum(finite, 0)
    pivot = tl.sum(total, 0) / tl.maximum(s_finite, 1).to(tl.float64)
    second = tl.zeros([LANES], tl.float64)
    for i in range(0, n, LANES):
        o = i + o_lane
        m = o < n
        b_x = double(p_x + o, m)
        if UPDATE:
            b_x -= double(p_old + o, m)
        b_apart = tl.where(m & (tl.abs(b_x) < INF), b_x - pivot, 0.0)
        second += b_apart * b_apart
    s_nan = tl.sum(nan, 0)
    s_posinf = tl.sum(posinf, 0)
    s_neginf = tl.sum(neginf, 0)
    s_zero = tl.sum(zero, 0)
    write(p_to, chunks, s_finite, s_nan, s_posinf, s_neginf, s_zero, pivot, 0.0, tl.sum(second, 0), tl.min(least, 0), tl.max(most, 0))
    if GRAD:
        tl.store(p_to + tl.cast(chunks, tl.int64) * DOT, tl.sum(dot, 0))
