"""The inventory stays true while a model changes under it, and holds on to nothing."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator

import pytest
import torch
from models import shared_mlp
from torch import nn

import paramwatch
from paramwatch import ParamWatchError, TieGroup
from paramwatch.columns import LAYOUTS
from paramwatch.inventory import LiveInventory


def live(module: nn.Module, include: str = "*") -> LiveInventory:
    return LiveInventory(module, [include], [], LAYOUTS["default"])


def two_layers() -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))


def step(module: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """One step with gradients of ones."""
    for parameter in module.parameters():
        parameter.grad = torch.ones_like(parameter) if parameter.requires_grad else None
    optimizer.step()


def columns(inventory: LiveInventory, column: str) -> dict[str, object]:
    return {row.name: getattr(row, column) for row in inventory.current.rows}


# ---- what it says ---------------------------------------------------------------------------


def test_a_row_says_what_its_tensor_is() -> None:
    model = nn.Sequential(nn.Linear(3, 4, dtype=torch.bfloat16)).requires_grad_(False)

    row = live(model).current.rows[0]
    assert (row.name, row.module, row.module_type, row.shape, row.dtype, row.device) == (
        "0.weight",
        "0",
        "Linear",
        (4, 3),
        "bfloat16",
        "cpu",
    )
    assert (row.numel, row.bytes, row.trainable, row.owned, row.tie_group, row.from_step) == (12, 24, False, False, None, 0)


def test_a_tensor_that_cannot_be_read_is_unsupported_and_no_error() -> None:
    model = two_layers()
    model[0].to("meta")
    with paramwatch.attach(model) as watch:
        step(model[1], torch.optim.SGD(model.parameters(), lr=0.1))

    assert watch.parameters["dtype"].to_list() == ["float32 (unsupported)"] * 2 + ["float32"] * 2
    assert watch.frame("param_norm").loc[0].isna().to_list() == [True, True, False, False]


def test_a_row_is_owned_once_an_optimizer_that_holds_it_has_stepped() -> None:
    model = two_layers()
    inventory = live(model)

    assert not any(columns(inventory, "owned").values())
    inventory.held_by([*model[1].parameters()], 0)
    assert columns(inventory, "owned") == {"0.weight": False, "0.bias": False, "1.weight": True, "1.bias": True}


def test_an_optimizer_holds_its_rows_in_model_order_and_nothing_foreign() -> None:
    model = shared_mlp()
    inventory = live(model)

    found = inventory.held_by([model[6].bias, torch.zeros(3), model[4].weight, model[0].weight], 0)
    assert list(found) == ["0.weight", "2.weight", "6.bias"]
    assert all(found[name] is dict(model.named_parameters())[name] for name in found)


def test_what_is_not_included_is_held_by_nobody() -> None:
    model = two_layers()

    assert list(live(model, "1.*").held_by(list(model.parameters()), 0)) == ["1.weight", "1.bias"]


@pytest.mark.parametrize(("module", "message"), [(nn.ReLU(), "no parameters"), (two_layers(), "no row matches include=.*'0.weight'")])
def test_a_model_without_rows_to_watch_is_refused(module: nn.Module, message: str) -> None:
    with pytest.raises(ParamWatchError, match=message):
        live(module, "nothing")


# ---- a model that changes -------------------------------------------------------------------


def replace_layer(model: nn.Sequential) -> None:
    model[1] = nn.Linear(4, 7)


def to_dtype(model: nn.Sequential) -> None:
    model.to(torch.float64)


def freeze(model: nn.Sequential) -> None:
    model[0].requires_grad_(False)


def assign(model: nn.Sequential) -> None:
    model.load_state_dict({name: tensor.double() for name, tensor in model.state_dict().items()}, assign=True)


def remove_layer(model: nn.Sequential) -> None:
    del model[1]


def remove_bias(model: nn.Sequential) -> None:
    model[0].bias = None


def resize(model: nn.Sequential) -> None:
    model[1].weight.data = torch.zeros(9, 4)


def keep_replaced(model: nn.Sequential) -> None:
    model.kept = [model[1]]
    model[1] = nn.Linear(4, 2)


def swap_two(model: nn.Sequential) -> None:
    model._modules["0"], model._modules["1"] = model[1], model[0]


def add_frozen(model: nn.Sequential) -> None:
    model.append(nn.Linear(2, 2).requires_grad_(False))


CHANGES = (replace_layer, to_dtype, freeze, assign, remove_layer, remove_bias, resize, keep_replaced, swap_two, add_frozen)


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_after_a_change_the_inventory_is_that_of_the_model_as_it_is(change: Callable[[nn.Sequential], None]) -> None:
    model = two_layers()
    inventory = live(model)
    change(model)

    assert all(tensor is now for tensor, now in zip(inventory.tensors(5), model.parameters(), strict=True))
    fresh = live(model).current
    for column in ("shape", "dtype", "device", "numel", "bytes", "trainable", "module_type"):
        assert [getattr(row, column) for row in inventory.now().rows] == [getattr(row, column) for row in fresh.rows]
    assert (inventory.current.names, inventory.current.ties) == (fresh.names, fresh.ties)


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_training_goes_on_being_recorded_after_a_change(change: Callable[[nn.Sequential], None]) -> None:
    model = two_layers()
    with paramwatch.attach(model) as watch:
        step(model, torch.optim.SGD(model.parameters(), lr=0.1))
        change(model)
        step(model, torch.optim.SGD(model.parameters(), lr=0.1))
        expected = {name: parameter.detach().double().norm().item() for name, parameter in model.named_parameters()}
        step(model, torch.optim.SGD(model.parameters(), lr=0.1))

    assert watch.frame("param_norm").iloc[-1].dropna().to_dict() == pytest.approx(expected, rel=1e-6)


def test_rows_that_were_there_keep_their_first_step_and_new_ones_get_theirs() -> None:
    model = two_layers()
    inventory = live(model)
    replace_layer(model)
    inventory.tensors(5)

    assert columns(inventory, "from_step") == {"0.weight": 0, "0.bias": 0, "1.weight": 5, "1.bias": 5}


def test_nothing_is_read_again_while_nothing_changes() -> None:
    model = shared_mlp()
    inventory = live(model)
    inventory.held_by(list(model.parameters()), 0)
    before = inventory.current
    step(model, torch.optim.SGD(model.parameters(), lr=0.1))
    inventory.held_by([*model.parameters(), torch.zeros(1)], 1)
    inventory.refresh(1)

    assert inventory.current is before


def test_freezing_is_shown_at_once_and_makes_no_other_inventory() -> None:
    model = two_layers()
    inventory = live(model)
    inventory.held_by(list(model.parameters()), 0)
    before = inventory.current
    freeze(model)
    inventory.tensors(1)
    inventory.refresh(2)

    assert inventory.current is before
    assert [row.trainable for row in inventory.now().rows] == [False, False, True, True]
    replace_layer(model)
    inventory.tensors(3)
    assert columns(inventory, "trainable") == {"0.weight": False, "0.bias": False, "1.weight": True, "1.bias": True}


def test_a_row_that_is_owned_by_a_second_optimizer_does_not_freeze_those_of_the_first() -> None:
    model = two_layers()
    inventory = live(model)
    for number in range(2):
        model[number].requires_grad_(True)
        model[1 - number].requires_grad_(False)
        inventory.held_by(list(model[number].parameters()), 0)

    assert all(columns(inventory, "trainable").values())
    assert all(columns(inventory, "owned").values())


def test_a_lazy_layer_enters_at_the_step_at_which_it_has_a_shape() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.LazyLinear(2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with paramwatch.attach(model) as watch:
        assert watch.parameters.index.tolist() == ["0.weight", "0.bias"]
        for _ in range(3):
            model[0](torch.ones(1, 3)).sum().backward()
            optimizer.step()
        model(torch.ones(1, 3)).sum().backward()
        optimizer.step()

    assert watch.parameters["from_step"].to_list() == [0, 0, 3, 3]
    assert watch.frame("grad_norm")["1.weight"].isna().to_list() == [True, True, True, False]


def test_a_model_that_is_all_lazy_can_be_watched_from_the_start() -> None:
    model = nn.Sequential(nn.LazyLinear(4), nn.LazyLinear(2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with paramwatch.attach(model) as watch:
        assert watch.parameters.empty
        model(torch.ones(1, 3)).sum().backward()
        optimizer.step()

    assert watch.parameters["owned"].all()
    assert watch.frame("grad_norm").shape == (1, 4)


def test_a_frozen_layer_that_was_added_is_measured_at_the_next_power_of_two() -> None:
    model = nn.ModuleDict({"last": nn.Linear(2, 2)})
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with paramwatch.attach(model) as watch:
        for number in range(10):
            if number == 5:
                model["first"] = nn.Linear(2, 2).requires_grad_(False)
            step(model, optimizer)

    assert watch.parameters.loc["first.weight", "from_step"] == 5
    assert watch.frame("param_norm")["first.weight"].dropna().index.tolist() == [8, 9]


def test_a_frozen_parameter_that_was_added_is_seen_at_once_and_measured_at_the_next_power_of_two() -> None:
    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with paramwatch.attach(model) as watch:
        for number in range(10):
            if number == 5:
                model.register_parameter("scale", nn.Parameter(torch.ones(4), requires_grad=False))
            step(model, optimizer)

    assert watch.parameters.loc["scale", "from_step"] == 5
    assert watch.frame("param_norm")["scale"].dropna().index.tolist() == [8, 9]


def test_a_layer_that_was_added_with_its_optimizer_group_is_recorded_from_that_step() -> None:
    model = nn.ModuleDict({"last": nn.Sequential(nn.Linear(2, 2))})
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with paramwatch.attach(model) as watch:
        for number in range(4):
            if number == 2:
                # in front of what was there
                model["last"].insert(0, nn.Linear(3, 3))
                optimizer.add_param_group({"params": model["last"][0].parameters(), "lr": 0.5})
            step(model, optimizer)

    assert watch.parameters["from_step"].to_list() == [2, 2, 2, 2]
    assert watch.frame("lr").loc[3].to_dict() == {"last.0.weight": 0.5, "last.0.bias": 0.5, "last.1.weight": 0.1, "last.1.bias": 0.1}
    assert watch.frame("grad_norm").loc[2, "last.0.weight"] == 3


def test_a_frozen_layer_put_in_front_before_the_first_step_does_not_shift_the_numbers() -> None:
    model = nn.ModuleDict({"body": nn.Sequential(nn.Linear(2, 2)), "head": nn.Linear(2, 1)})
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with paramwatch.attach(model) as watch:
        model["body"].append(nn.Linear(5, 5).requires_grad_(False))
        expected = {name: parameter.norm().item() for name, parameter in model.named_parameters()}
        step(model, optimizer)

    assert watch.frame("param_norm").loc[0].to_dict() == pytest.approx(expected, rel=1e-6)


def test_an_optimizer_of_two_models_does_not_have_the_model_read_at_every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    model = two_layers()
    inventory = live(model)
    others = [list(two_layers().parameters()), list(two_layers().parameters())]
    reads: list[int] = []
    monkeypatch.setattr(inventory, "_read", lambda step, read=inventory._read: (reads.append(step), read(step)))
    for number in range(3):
        for other in others:
            inventory.held_by([*model.parameters(), *other], number)

    # once for each optimizer's strangers
    assert reads == [0, 0]


# ---- ties that change -----------------------------------------------------------------------


def tied_names(inventory: LiveInventory) -> list[tuple[str, ...]]:
    return [tie.names for tie in inventory.current.ties]


def test_a_tie_that_is_broken_makes_two_rows() -> None:
    model = shared_mlp()
    inventory = live(model)
    model[4] = nn.Linear(8, 8)
    inventory.tensors(3)

    assert tied_names(inventory) == []
    assert columns(inventory, "from_step")["4.weight"] == 3
    assert columns(inventory, "aliases")["2.weight"] == ()


def test_a_tie_that_is_made_makes_one_row() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    inventory = live(model)
    model[1].weight = model[0].weight
    inventory.tensors(3)

    assert inventory.current.ties == (TieGroup(("0.weight", "1.weight"), "parameter", 16, 64),)
    assert list(columns(inventory, "tie_group").items()) == [("0.weight", 0), ("0.bias", None), ("1.bias", None)]


@pytest.mark.parametrize("change", [to_dtype, nn.Module.requires_grad_, assign], ids=lambda change: change.__name__)
def test_one_layer_at_two_places_stays_tied(change: Callable[[nn.Module], object]) -> None:
    model = shared_mlp()
    inventory = live(model)
    change(model)
    inventory.tensors(1)

    assert tied_names(inventory) == [("2.weight", "4.weight"), ("2.bias", "4.bias")]


def test_a_lazy_tied_layer_is_tied_once_it_has_a_shape() -> None:
    layer = nn.LazyLinear(4)
    model = nn.Sequential(nn.Linear(4, 4), layer, layer)
    inventory = live(model)
    model(torch.ones(1, 4))
    inventory.tensors(2)

    assert tied_names(inventory) == [("1.weight", "2.weight"), ("1.bias", "2.bias")]
    assert columns(inventory, "from_step")["1.weight"] == 2


def test_memory_that_came_to_be_shared_is_seen_when_the_model_is_read_again() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    inventory = live(model)
    model[1].weight.data = model[0].weight.data
    inventory.refresh(1)

    assert [tie.kind for tie in inventory.current.ties] == ["storage"]


def test_a_child_or_a_parameter_under_another_name_is_seen_at_once() -> None:
    model = nn.ModuleDict({"a": nn.Linear(2, 2, bias=False), "b": nn.Linear(2, 2)})
    inventory = live(model)
    model["c"] = model.pop("a")
    model["b"]._parameters["beta"] = model["b"]._parameters.pop("bias")

    inventory.tensors(1)
    assert list(columns(inventory, "name")) == ["b.weight", "b.beta", "c.weight"]


def test_one_optimizer_a_layer_looks_at_the_whole_model_once_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(*(nn.Linear(2, 2) for _ in range(6)))
    inventory, looked = live(model), 0
    whole = inventory.sight.look

    def look() -> list[nn.Parameter] | None:
        nonlocal looked
        looked += 1
        return whole()

    layers = [list(layer.parameters()) for layer in model]
    for number in range(2):
        for i, layer in [*enumerate(layers)] * 2:
            assert list(inventory.held_by(layer, number)) == [f"{i}.weight", f"{i}.bias"]
    monkeypatch.setattr(inventory.sight, "look", look)
    for layer in layers * 2:
        inventory.held_by(layer, 2)

    assert looked == 1


@pytest.mark.parametrize("change", [lambda layer: layer.double(), lambda layer: setattr(layer, "weight", nn.Parameter(torch.zeros(5, 5)))])
def test_what_an_optimizer_holds_is_looked_at_again_in_the_same_step(change: Callable[[nn.Module], object]) -> None:
    model = nn.Sequential(nn.Sequential(nn.Linear(2, 2)), nn.Linear(2, 2))
    inventory, layers = live(model), [list(model[1].parameters()), list(model[0].parameters())]
    for number in (0, 1, 2, 2):
        for layer in layers:
            inventory.held_by(layer, number)
    change(model[0][0])

    inventory.held_by(layers[1], 2)
    assert inventory.current.rows[0].shape == tuple(model[0][0].weight.shape)
    assert inventory.current.rows[0].dtype == str(model[0][0].weight.dtype).removeprefix("torch.")


# ---- holding on to nothing ------------------------------------------------------------------


@pytest.fixture
def swapping() -> Iterator[None]:
    """Conversions that swap tensors: these fail where anything refers to a parameter weakly."""
    torch.__future__.set_swap_module_params_on_conversion(True)
    yield
    torch.__future__.set_swap_module_params_on_conversion(False)


def test_parameters_can_be_swapped_while_they_are_watched(swapping: None) -> None:
    model = shared_mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with paramwatch.attach(model) as watch:
        step(model, optimizer)
        model.zero_grad()
        model.double()
        step(model, torch.optim.SGD(model.parameters(), lr=0.1))

    assert set(watch.parameters["dtype"]) == {"float64"}
    assert watch.frame("grad_norm")["2.weight"].to_list() == [8, 8]


@pytest.mark.parametrize("detail", ["cheap", "full"])
def test_a_parameter_that_was_replaced_is_freed_while_watched(detail: str) -> None:
    model = two_layers()
    with paramwatch.attach(model, detail=detail) as watch:
        for _ in range(2):
            step(model, torch.optim.SGD(model.parameters(), lr=0.1))
        old = weakref.ref(model[1].weight)
        model[1] = nn.Linear(4, 2)
        gc.collect()

        assert old() is None
        assert len(watch.parameters) == 4


def test_a_model_is_freed_while_its_inventory_lives() -> None:
    model = two_layers()
    inventory, gone = live(model), weakref.ref(model[0].weight)
    del model
    gc.collect()

    assert gone() is None
    assert inventory.tensors(1) == []
    assert inventory.held_by([torch.zeros(1)], 1) == {}
    assert len(inventory.current.rows) == 4
