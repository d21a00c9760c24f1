"""Names of parameters: those torch gives, without what wrappers put in, whatever characters they have."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from models import CASES, ODD_NAMES, Case, OddNames, TiedHead, shared_mlp
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper, offload_wrapper
from torch.optim.swa_utils import AveragedModel

import paramwatch
from paramwatch import ParamWatchError
from paramwatch.globs import fitting
from paramwatch.rows import chosen, is_lazy, model_name, places


def names(module: nn.Module) -> list[str]:
    return [place.name for place in places(module)]


def real_names(module: nn.Module) -> list[str]:
    return [place.real_name for place in places(module)]


@pytest.fixture
def process_group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A group of this process alone."""
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_names_and_tensors_are_those_of_torch_with_every_duplicate(case: Case) -> None:
    module = case.make()
    expected = list(module.named_parameters(remove_duplicate=False))

    found = places(module)
    assert [(place.name, place.real_name) for place in found] == [(name, name) for name, _ in expected]
    assert all(place.tensor is tensor for place, (_, tensor) in zip(found, expected, strict=True))


def test_a_parameter_that_is_none_has_no_name() -> None:
    assert names(nn.Linear(2, 2, bias=False)) == ["weight"]


def test_lazy_parameters_are_found_and_told_apart() -> None:
    found = places(nn.Sequential(nn.LazyLinear(2), nn.Linear(2, 2)))

    assert [is_lazy(place.tensor) for place in found] == [True, True, False, False]


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
def test_a_scripted_module_has_names_too() -> None:
    assert names(torch.jit.script(nn.Sequential(nn.Linear(2, 2)))) == ["0.weight", "0.bias"]


def test_a_module_that_contains_itself_is_walked_once() -> None:
    module = nn.Linear(2, 2)
    module.itself = module

    assert names(module) == ["weight", "bias"]


# ---- wrappers -------------------------------------------------------------------------------

WRAPPERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "AveragedModel": AveragedModel,
    "torch.compile": partial(torch.compile, backend="eager"),
    "checkpoint": checkpoint_wrapper,
    "offload": offload_wrapper,
    "DataParallel": nn.DataParallel,
    "one in another": lambda module: AveragedModel(torch.compile(checkpoint_wrapper(module), backend="eager")),
}


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS.keys())
def test_what_a_wrapper_puts_into_names_is_taken_out_and_the_real_name_is_kept(wrap: Callable[[nn.Module], nn.Module]) -> None:
    wrapped = wrap(shared_mlp())

    assert names(wrapped) == names(shared_mlp())
    assert [getattr_path(wrapped, name) for name in real_names(wrapped)] == [place.tensor for place in places(wrapped)]
    assert all(real != name for real, name in zip(real_names(wrapped), names(wrapped), strict=True))
    assert model_name(wrapped) == "Sequential"


def getattr_path(module: nn.Module, path: str) -> object:
    for part in path.split("."):
        module = getattr(module, part)
    return module


def test_ddp_is_a_wrapper(process_group: None) -> None:
    wrapped = nn.parallel.DistributedDataParallel(TiedHead())

    assert names(wrapped) == names(TiedHead())
    assert real_names(wrapped)[0] == "module.embed.weight"


def test_a_wrapper_deep_inside_a_model_is_taken_out() -> None:
    assert names(nn.Sequential(nn.ReLU(), checkpoint_wrapper(nn.Linear(2, 2)))) == ["1.weight", "1.bias"]


def test_a_class_derived_from_a_wrapper_is_a_wrapper() -> None:
    class Smoothed(AveragedModel):
        pass

    assert names(Smoothed(nn.Linear(2, 2))) == ["weight", "bias"]


@pytest.mark.parametrize("key", ["module", "_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module", "_forward_module"])
def test_a_module_of_the_user_with_a_wrappers_name_is_not_taken_out(key: str) -> None:
    model = nn.Module()
    model.add_module(key, nn.Linear(2, 2))

    assert names(model) == [f"{key}.weight", f"{key}.bias"]


def test_two_tensors_that_only_a_wrapper_tells_apart_keep_their_real_names() -> None:
    class Named(AveragedModel):
        def __init__(self, module: nn.Module) -> None:
            super().__init__(module)
            self.weight = nn.Parameter(torch.zeros(1))

    assert names(Named(nn.Linear(2, 2))) == ["weight", "module.weight", "bias"]


def test_two_tensors_that_torch_gives_one_name_are_numbered() -> None:
    model = nn.Module()
    model.a = nn.ParameterDict({"b": nn.Parameter(torch.ones(3))})
    model._parameters["a.b"] = nn.Parameter(torch.ones(2))
    assert [name for name, _ in model.named_parameters()] == ["a.b", "a.b"]

    assert names(model) == ["a.b", "a.b#2"]
    assert [place.tensor.numel() for place in places(model)] == [2, 3]


# ---- filters --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("include", "exclude", "expected"),
    [
        ("*", (), ["embed.weight", "norm.weight", "norm.bias"]),
        ("norm.*", (), ["norm.weight", "norm.bias"]),
        ("lm_head.weight", (), ["embed.weight"]),
        (["*.bias", "embed*"], (), ["embed.weight", "norm.bias"]),
        ("*", "lm_head.*", ["norm.weight", "norm.bias"]),
        ("*", ["*.bias", "embed.weight"], ["norm.weight"]),
        ("NORM.*", (), None),
        ("*", "*", None),
    ],
    ids=str,
)
def test_rows_are_chosen_by_globs_over_names_and_aliases(include: str | list[str], exclude: str | list[str], expected: list[str]) -> None:
    if expected is None:
        with pytest.raises(ParamWatchError, match="no row matches"):
            paramwatch.attach(TiedHead(), include=include, exclude=exclude)
    else:
        with paramwatch.attach(TiedHead(), include=include, exclude=exclude) as watch:
            assert watch.parameters.index.tolist() == expected


@pytest.mark.parametrize("name", ODD_NAMES)
def test_a_name_is_a_pattern_for_itself_whatever_it_is_made_of(name: str) -> None:
    with paramwatch.attach(OddNames(), include=f"weights.{name}") as watch:
        assert watch.parameters.index.tolist() == [f"weights.{name}"]


@given(st.text(), st.text(alphabet="*?[]!a.-\n"))
def test_a_pattern_fits_itself_and_what_the_shell_says(name: str, pattern: str) -> None:
    assert fitting([name])(name)
    assert fitting(["*"])(name)
    assert fitting([pattern])(name) == (name == pattern or fnmatch.fnmatchcase(name, pattern))


def test_one_excluded_alias_excludes_the_row() -> None:
    assert chosen(["a", "b"], fitting(["a"]), fitting([]))
    assert not chosen(["a", "b"], fitting(["a"]), fitting(["b"]))
    assert not chosen(["a", "b"], fitting(["c"]), fitting([]))


def test_odd_names_reach_every_frame_intact() -> None:
    model = OddNames()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with paramwatch.attach(model) as watch:
        model(torch.randn(3, 4)).sum().backward()
        optimizer.step()

    expected = [name for name, _ in model.named_parameters()]
    assert watch.parameters.index.tolist() == watch.frame("grad_norm").columns.tolist() == expected
    assert watch.frame().index.get_level_values("parameter").tolist() == expected
