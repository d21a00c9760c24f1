"""What the Triton kernels are told of the tensors of a call; none of it needs Triton, or a GPU."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from paramwatch.measure import tables
from paramwatch.measure.tables import Layout, Plan, Sizes, Variant

SIZES = Sizes(chunk=4096, few=3)
"""1024 elements of float32, 2048 of 16 bits, 256 of float64."""


def zeros(n: int, dtype: torch.dtype = torch.float32, shift: int = 0) -> Tensor:
    return torch.zeros(n + shift, dtype=dtype)[shift:]


def columns(plan: Plan, rows: int) -> dict[str, list[int]]:
    table = plan.table.numpy()
    names = ("size", "base", "chunks", "dot", "turn")
    found = {name: table[i * rows : (i + 1) * rows].tolist() for i, name in enumerate(names)}
    return found | {"owner": table[len(names) * rows :].tolist()}


def test_a_chunk_of_each_dtype_is_as_many_elements_as_fit() -> None:
    tensors = [zeros(n, dtype) for dtype in tables.DTYPES for n in (0, 1, 256, 257, 1024, 1025, 2049)]
    plan = Layout.of(tensors).plan(SIZES, 0)

    expected = [-(-x.numel() // SIZES.elements(x.dtype)) for x in tensors]
    assert columns(plan, len(tensors))["chunks"] == expected
    assert plan.chunks == sum(expected)


def test_every_chunk_has_one_owner_and_those_of_a_tensor_lie_together_in_order() -> None:
    tensors = [zeros(3000), zeros(5000, torch.bfloat16), zeros(0), zeros(1), zeros(700, torch.float64), zeros(1025, shift=1)]
    known = columns(Layout.of(tensors).plan(SIZES, 0), len(tensors))

    for row, (base, chunks) in enumerate(zip(known["base"], known["chunks"], strict=True)):
        assert known["owner"][base : base + chunks] == [row] * chunks
    assert len(known["owner"]) == sum(known["chunks"])


def test_there_is_one_launch_for_each_dtype_and_alignment_whatever_the_number_of_tensors() -> None:
    tensors = [zeros(n, dtype, shift) for n in range(1, 200) for dtype in (torch.float32, torch.bfloat16) for shift in (0, 1)]
    plan = Layout.of(tensors).plan(SIZES, 0)

    assert [(launch.variant.dtype, launch.variant.aligned) for launch in plan.launches] == [
        (torch.float32, False),
        (torch.bfloat16, False),
        (torch.float32, True),
        (torch.bfloat16, True),
    ]
    ends = [launch.base + launch.chunks for launch in plan.launches]
    assert [launch.base for launch in plan.launches] == [0, *ends[:-1]]
    assert ends[-1] == plan.chunks


def test_what_has_no_elements_is_launched_for_nowhere_and_folded_all_the_same() -> None:
    plan = Layout.of([zeros(0), zeros(0, torch.float64)]).plan(SIZES, 0)

    assert plan.launches == ()
    assert plan.chunks == 0
    assert columns(plan, 2)["turn"] == [0, 1]


def test_rows_of_few_chunks_are_folded_before_rows_of_many() -> None:
    plan = Layout.of([zeros(4000), zeros(3), zeros(9000), zeros(3 * 1024)]).plan(SIZES, 0)

    assert columns(plan, 4)["turn"] == [1, 3, 0, 2]
    assert plan.few == 2


def test_beside_a_tensor_that_is_not_aligned_nothing_counts_as_aligned() -> None:
    odd, even = zeros(8, shift=1), zeros(8)
    first, second, third = (Layout.of([x], [other], [grad]) for x, other, grad in ((odd, even, even), (even, odd, even), (even, even, odd)))

    assert Variant.of(int(first.codes[0])) == Variant(torch.float32, False, False, False, torch.float32)
    assert Variant.of(int(second.codes[0])) == Variant(torch.float32, True, False, True, torch.float32)
    assert Variant.of(int(third.codes[0])) == Variant(torch.float32, True, True, False, torch.float32)


def test_a_variant_knows_all_dtypes_and_whether_there_is_a_gradient() -> None:
    x = [zeros(4, dtype) for dtype in tables.DTYPES for _ in range(5)]
    grads = [grad for _ in tables.DTYPES for grad in (None, *(zeros(4, dtype) for dtype in tables.DTYPES))]
    layout = Layout.of(x, x, grads)

    for tensor, grad, code in zip(x, grads, layout.codes, strict=True):
        assert Variant.of(int(code)) == Variant(tensor.dtype, True, True, grad is not None, None if grad is None else grad.dtype)
    assert columns(layout.plan(SIZES, 0), len(x))["dot"] == [int(grad is not None) for grad in grads]


def test_addresses_are_of_tensors_then_copies_then_gradients() -> None:
    x, copies, grad = [zeros(4), zeros(5)], [zeros(4), zeros(5)], zeros(5)

    found = Layout.of(x, copies, [None, grad]).addresses(0).tolist()
    assert found == [*(tensor.data_ptr() for tensor in (*x, *copies)), 0, grad.data_ptr()]


def test_tables_are_sent_again_only_when_they_changed() -> None:
    x, first, second = [zeros(4), zeros(5)], [zeros(4), zeros(5)], [zeros(4), zeros(5)]
    plan = Layout.of(x).plan(SIZES, 0)
    sent = [Layout.of(tensors).addresses(0) for tensors in (x, first, second)]

    for again in range(2):
        for tensors, table in zip((x, first, second), sent, strict=True):
            assert Layout.of(tensors).addresses(0) is table, again
            assert Layout.of(tensors).plan(SIZES, 0) is plan
    kept = sent[0].clone()
    other = Layout.of([x[0], zeros(5)]).addresses(0)
    assert other is not sent[0]
    assert torch.equal(sent[0], kept)  # one that a kernel may still read is never written to
    assert Layout.of([x[0], zeros(6)]).plan(SIZES, 0) is not plan


def test_what_was_sent_on_one_stream_is_not_used_on_another() -> None:
    layout = Layout.of([zeros(4)])

    assert layout.addresses(7) is not layout.addresses(8)
    assert layout.plan(SIZES, 7) is not layout.plan(SIZES, 8)


def test_tables_are_given_back() -> None:
    layout = Layout.of([zeros(4)])
    before = layout.addresses(0)
    tables.forget()

    assert layout.addresses(0) is not before


def test_a_copy_or_a_gradient_of_another_size_is_refused() -> None:
    for others, grads in (([zeros(3)], None), ([], None), ([zeros(4)], [zeros(5)])):
        with pytest.raises(ValueError, match="differ in size"):
            Layout.of([zeros(4)], others, grads)


def test_a_model_of_15_000_tensors_is_laid_out() -> None:
    tensors = [zeros(64)] * 15_000
    layout = Layout.of(tensors, tensors)
    plan = layout.plan(Sizes(), 0)

    assert (plan.chunks, len(plan.launches), plan.few) == (15_000, 1, 15_000)
    assert np.array_equal(layout.addresses(0).numpy(), np.full(30_000, tensors[0].data_ptr()))


def test_sizes_beyond_32_bits_are_laid_out() -> None:
    layout = Layout.of([zeros(4), zeros(4, torch.bfloat16)])
    layout.numel[:] = 1 << 36
    known = columns(layout.plan(Sizes(chunk=1 << 24), 0), 2)

    assert known["size"] == [1 << 36] * 2
    assert known["chunks"] == [1 << 14, 1 << 13]
    assert known["base"] == [0, 1 << 14]
