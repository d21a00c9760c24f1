"""Tie groups: by identity of the tensor, apart from what only shares memory, and never by equal values."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from models import BY_NAME, TiedHead, one_parameter_in_two_modules, shared_mlp
from torch import nn

import paramwatch
from paramwatch import ParamWatchError, TieGroup, summary, tie_groups
from paramwatch.memory import bytes_of, span_of


def pair(size: int = 4) -> nn.ModuleDict:
    """Two layers, `a` and `b`, with nothing in common."""
    return nn.ModuleDict({name: nn.Linear(size, size, bias=False) for name in ("a", "b")})


def views(*starts_and_sizes: tuple[int, int]) -> nn.ParameterList:
    """Parameters that are pieces of one buffer of 100 elements."""
    buffer = torch.randn(100)
    return nn.ParameterList([nn.Parameter(buffer[start : start + size]) for start, size in starts_and_sizes])


def test_what_is_no_module_is_refused() -> None:
    with pytest.raises(ParamWatchError, match=r"tie_groups takes an nn\.Module, not int"):
        tie_groups(5)  # type: ignore[arg-type]


# ---- one tensor, several names --------------------------------------------------------------


def test_one_module_at_two_places_ties_each_of_its_parameters() -> None:
    assert tie_groups(shared_mlp()) == (
        TieGroup(("2.weight", "4.weight"), "parameter", 64, 256),
        TieGroup(("2.bias", "4.bias"), "parameter", 8, 32),
    )


def test_one_parameter_in_two_modules_is_tied_and_their_biases_are_not() -> None:
    assert tie_groups(one_parameter_in_two_modules()) == (TieGroup(("0.weight", "2.weight"), "parameter", 36, 144),)


def test_an_embedding_tied_to_a_head_is_found() -> None:
    assert tie_groups(TiedHead()) == (TieGroup(("embed.weight", "lm_head.weight"), "parameter", 66, 264),)


def test_memory_saved_is_that_of_each_further_name() -> None:
    layer = nn.Linear(2, 3, bias=False, dtype=torch.float64)

    assert tie_groups(nn.Sequential(layer, layer, layer, layer)) == (
        TieGroup(("0.weight", "1.weight", "2.weight", "3.weight"), "parameter", 6, 144),
    )


def test_a_tied_lazy_layer_is_found_before_it_has_a_shape() -> None:
    layer = nn.LazyLinear(3, bias=False)

    assert tie_groups(nn.Sequential(layer, layer)) == (TieGroup(("0.weight", "1.weight"), "parameter", 0, 0),)


@pytest.mark.parametrize("name", sorted(BY_NAME.keys() - {"shared_mlp", "one_parameter_in_two_modules", "tied_head"}))
def test_the_other_models_have_no_ties(name: str) -> None:
    assert tie_groups(BY_NAME[name].make()) == ()


def test_equal_values_are_no_tie() -> None:
    model = pair()
    model["b"].load_state_dict(model["a"].state_dict())

    assert tie_groups(model) == ()


@pytest.mark.parametrize("tied", [shared_mlp, one_parameter_in_two_modules])
@pytest.mark.parametrize(
    "convert", [copy.deepcopy, nn.Module.double, nn.Module.requires_grad_, nn.Module.share_memory], ids=lambda f: f.__name__
)
def test_ties_live_through_what_keeps_identity(tied: Callable[[], nn.Module], convert: Callable[[nn.Module], nn.Module]) -> None:
    assert [group.names for group in tie_groups(convert(tied()))] == [group.names for group in tie_groups(tied())]


# ---- one piece of memory, several tensors ---------------------------------------------------


def test_data_assigned_from_another_parameter_shares_memory_and_is_no_tie() -> None:
    model = pair()
    model["b"].weight.data = model["a"].weight.data

    assert tie_groups(model) == (TieGroup(("a.weight", "b.weight"), "storage", 16, 64),)


def test_a_transposed_view_of_another_parameter_shares_its_memory() -> None:
    model = pair()
    model["b"].weight = nn.Parameter(model["a"].weight.t())

    assert [group.kind for group in tie_groups(model)] == ["storage"]


def test_what_shares_memory_says_what_will_go_wrong() -> None:
    model = pair()
    model["b"].weight.data = model["a"].weight.data

    message = str(tie_groups(model)[0])
    assert "not tying" in message
    assert "gradients are not summed" in message
    assert "updates that memory once for each" in message


@pytest.mark.parametrize(
    ("pieces", "expected"),
    [
        ([(0, 10), (5, 10)], [TieGroup(("0", "1"), "storage", 15, 20)]),
        ([(0, 50), (10, 5), (40, 20)], [TieGroup(("0", "1", "2"), "storage", 60, 60)]),
        ([(20, 10), (0, 10), (25, 2), (5, 3)], [TieGroup(("0", "2"), "storage", 10, 8), TieGroup(("1", "3"), "storage", 10, 12)]),
        ([(0, 10), (10, 10), (20, 1)], []),
        ([(0, 10), (5, 0)], []),
    ],
    ids=["overlapping", "one within", "two groups", "side by side", "empty"],
)
def test_pieces_of_one_buffer_share_memory_only_where_they_overlap(pieces: list[tuple[int, int]], expected: list[TieGroup]) -> None:
    assert list(tie_groups(views(*pieces))) == expected


def test_columns_of_one_matrix_side_by_side_share_no_element() -> None:
    matrix = torch.randn(6, 8)
    halves = nn.ParameterList([nn.Parameter(matrix[:, :4]), nn.Parameter(matrix[:, 4:])])
    meeting = nn.ParameterList([nn.Parameter(matrix[:, :5]), nn.Parameter(matrix[:, 4:])])

    assert tie_groups(halves) == ()
    assert [group.names for group in tie_groups(meeting)] == [("0", "1")]


def test_a_tie_and_shared_memory_at_once_are_two_groups() -> None:
    model = nn.ModuleDict({"a": nn.Linear(2, 2, bias=False), "c": nn.Linear(2, 2, bias=False)})
    model["b"] = model["a"]
    model["c"].weight.data = model["a"].weight.data

    assert [(group.names, group.kind) for group in tie_groups(model)] == [
        (("a.weight", "b.weight"), "parameter"),
        (("a.weight", "c.weight"), "storage"),
    ]


@pytest.mark.parametrize(
    "make", [lambda: pair().to("meta"), lambda: nn.ParameterList([nn.Parameter(torch.empty(0)) for _ in range(2)])], ids=["meta", "empty"]
)
def test_what_has_no_memory_shares_none(make: Callable[[], nn.Module]) -> None:
    assert tie_groups(make()) == ()


def test_one_number_seen_as_many_shares_its_memory() -> None:
    number = torch.zeros(1)

    group = tie_groups(nn.ParameterList([nn.Parameter(number), *(nn.Parameter(number.expand(3, 5)) for _ in range(2))]))[0]
    assert (group.names, group.kind) == (("0", "1", "2"), "storage")


BASE = torch.randn(96)
"""384 bytes."""


@pytest.mark.parametrize(
    ("pieces", "expected"),
    [
        ([BASE, BASE], 384),
        ([BASE[:64], BASE[32:]], 384),
        ([BASE[:48], BASE[48:]], 384),
        ([BASE[::2], BASE[1::2]], 384),
        ([BASE[::2], BASE[::2]], 192),
        ([BASE.view(8, 12), BASE.view(8, 12).t()], 384),
        ([BASE[:8].expand(8, 8)], 32),
        ([BASE[:1].expand(8, 8), BASE[:1]], 4),
        ([BASE[:10].unfold(0, 4, 1)], 40),
        ([torch.zeros(1, device="meta").expand(8, 8)], 4),
    ],
)
def test_bytes_are_those_of_the_memory_whatever_lies_on_it(pieces: list[torch.Tensor], expected: int) -> None:
    net = nn.ParameterList([nn.Parameter(piece) for piece in pieces])
    totals = summary(net).totals
    separate = sum(map(bytes_of, pieces))

    assert totals.bytes == expected
    assert totals.bytes + totals.bytes_saved == separate


def test_buffers_take_what_is_not_of_parameters_or_of_other_buffers() -> None:
    net = nn.ModuleDict({"a": nn.Linear(4, 4, bias=False), "norm": nn.BatchNorm1d(3)})
    net["again"] = net["norm"]
    net["a"].register_buffer("view", net["a"].weight.detach()[:2])
    net["a"].register_buffer("own", torch.zeros(1).expand(6))
    net["a"].register_buffer("same", net["a"].own)
    totals = summary(net).totals

    assert (totals.buffers, totals.bytes) == (5, 64 + 24)
    assert totals.buffer_bytes == 12 + 12 + 8 + 4
    assert totals.bytes_saved == 24  # the scale and the bias of the norm, which is at two places


# ---- while a model is watched ---------------------------------------------------------------


def test_ties_of_a_watch_are_those_of_its_rows() -> None:
    with paramwatch.attach(shared_mlp(), include="*.bias") as watch:
        assert watch.ties == (TieGroup(("2.bias", "4.bias"), "parameter", 8, 32),)
        assert watch.parameters["tie_group"].to_dict()["2.bias"] == 0
        assert watch.parameters["tie_group"].isna().sum() == 2


def test_every_alias_finds_its_row() -> None:
    model = shared_mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with paramwatch.attach(model) as watch:
        model(torch.randn(3, 4)).sum().backward()
        optimizer.step()

    assert watch.frame(parameters="4.weight").index.tolist() == [(0, "2.weight")]
    both = watch.frame("grad_norm", aliases=True)
    assert both["4.weight"].equals(both["2.weight"].rename("4.weight"))
    assert watch.parameters.loc["2.weight", "aliases"] == ("4.weight",)


def test_shared_memory_is_a_finding_once() -> None:
    model = pair()
    model["b"].weight.data = model["a"].weight.data
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with paramwatch.attach(model) as watch:
        for _ in range(3):
            (model["a"](torch.randn(2, 4)) + model["b"](torch.randn(2, 4))).sum().backward()
            optimizer.step()

    assert watch.findings[["step", "rule", "parameter"]].values.tolist() == [[0, "shared_storage", "a.weight"]]


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor:UserWarning")
def test_elements_that_share_a_byte_take_no_more_than_they_have() -> None:
    net = nn.Module()
    net.a = nn.Parameter(torch.quantize_per_tensor(torch.ones(64), 1.0, 0, torch.quint4x2), requires_grad=False)

    (span,) = [span_of(0, net.a)]
    assert span is not None
    assert span.end - span.start == net.a.untyped_storage().nbytes()
