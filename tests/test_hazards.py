"""What is warned of, and what never: PyTorch's defaults, zeros, constants; scripted modules are known by what they were."""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from paramwatch import summary
from paramwatch.standards import DEFAULT, Usual, default_of, kind_of, type_name, usual_of

# ---- PyTorch's own defaults -----------------------------------------------------------------

FRESH: tuple[Callable[[], nn.Module], ...] = (
    lambda: nn.Linear(10_000, 1),
    lambda: nn.Linear(1, 10_000),
    lambda: nn.Bilinear(1000, 1000, 1),
    lambda: nn.Bilinear(1, 1000, 3),
    lambda: nn.Bilinear(2, 2000, 3),
    lambda: nn.Bilinear(2000, 2, 3),
    lambda: nn.LSTM(10_000, 4),
    lambda: nn.LSTM(4, 1000, proj_size=1),
    lambda: nn.LSTM(10_000, 4, 2, proj_size=2, bidirectional=True),
    lambda: nn.RNN(10_000, 4),
    lambda: nn.RNN(1, 1000),
    lambda: nn.GRU(10_000, 4),
    lambda: nn.LSTMCell(10_000, 4),
    lambda: nn.RNNCell(10_000, 4),
    lambda: nn.GRUCell(10_000, 4),
    lambda: nn.GRUCell(1, 1000),
    lambda: nn.Conv1d(4000, 1, 1),
    lambda: nn.Conv1d(1, 4000, 1),
    lambda: nn.Conv2d(500, 500, 3, groups=500),
    lambda: nn.Conv3d(1, 4, 15),
    lambda: nn.ConvTranspose1d(4000, 1, 1),
    lambda: nn.ConvTranspose2d(1, 500, 5),
    lambda: nn.ConvTranspose2d(500, 500, 3, groups=500),
    lambda: nn.MultiheadAttention(4, 2, kdim=10_000, vdim=10_000, add_bias_kv=True),
    lambda: nn.MultiheadAttention(400, 2, kdim=1, vdim=1, add_bias_kv=True),
    lambda: nn.TransformerEncoderLayer(4, 2, 10_000),
    lambda: nn.AdaptiveLogSoftmaxWithLoss(4000, 50, [10, 20], div_value=20),
    lambda: nn.Embedding(10, 10_000, padding_idx=0),
    lambda: nn.EmbeddingBag(10_000, 10),
    lambda: nn.BatchNorm2d(3),
    lambda: nn.RMSNorm((3, 4)),
    lambda: nn.PReLU(4),
)


@pytest.mark.parametrize("make", FRESH)
def test_what_pytorch_makes_is_never_warned_of(make: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)

    assert summary(make()).warnings == {}


# ---- zeros that may be meant ----------------------------------------------------------------


class Adapted(nn.Module):
    """A weight that is not trained, and a low-rank addition to it."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Linear(32, 48).requires_grad_(False)
        self.down, self.up = nn.Linear(32, 4, bias=False), nn.Linear(4, 48, bias=False)
        nn.init.zeros_(self.up.weight)


def test_the_zero_factor_of_a_low_rank_addition_is_not_warned_of_unless_nothing_reaches_it_either() -> None:
    net = Adapted()
    seen = summary(net)
    assert (seen.warnings, seen.notes) == ({}, {})
    nn.init.zeros_(net.down.weight)
    assert list(summary(net).warnings) == ["down.weight", "up.weight"]
    nn.init.normal_(net.down.weight, std=0.1)
    assert list(summary(net.requires_grad_(True)).warnings) == ["up.weight"]


def zero(layer: nn.Module) -> nn.Module:
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer


def test_a_layer_of_zeros_at_the_end_of_its_branch_is_noted_and_one_that_others_follow_is_warned_of() -> None:
    controlled = nn.ModuleDict({"body": nn.Conv2d(8, 8, 3), "taps": nn.ModuleList([zero(nn.Conv2d(8, 8, 1)) for _ in range(2)])})
    branch = nn.Sequential(nn.Conv2d(8, 8, 3, bias=False), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3, bias=False), nn.BatchNorm2d(8))
    nn.init.zeros_(branch[3].weight)
    for net, names in ((controlled, ["taps.0.weight", "taps.1.weight"]), (branch, ["3.weight"])):
        seen = summary(net)
        assert (seen.warnings, list(seen.notes)) == ({}, names)
        assert re.search(rf"{len(names)} notes?\n", str(seen))

    chain = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), zero(nn.Linear(8, 8)), nn.ReLU(), nn.Linear(8, 2))
    nn.init.zeros_(branch[1].weight)
    for net, name in ((chain, "2.weight"), (zero(nn.Linear(8, 8)), "weight"), (branch, "1.weight")):
        assert list(summary(net).warnings) == [name]
    zero(chain[4])
    assert "2.weight" in summary(chain).warnings


# ---- constant -------------------------------------------------------------------------------


def trained(net: nn.Module, steps: int = 20) -> nn.Module:
    """A classifier into three, after some steps."""
    inputs, answers = torch.randn(30, 4), torch.arange(30) % 3
    for _ in range(steps):
        gradients = torch.autograd.grad(F.cross_entropy(net(inputs), answers), list(net.parameters()))
        with torch.no_grad():
            for parameter, gradient in zip(net.parameters(), gradients, strict=True):
                parameter -= 0.5 * gradient
    return net


def different_units(weight: Tensor) -> int:
    return len(weight.detach().unique(dim=0))


def flat(layer: nn.Linear) -> nn.Linear:
    nn.init.constant_(layer.weight, 0.1)
    nn.init.zeros_(layer.bias)
    return layer


def a_last_layer() -> nn.Linear:
    return flat(nn.Linear(4, 3))


def outgoing_weights() -> nn.Sequential:
    return nn.Sequential(flat(nn.Linear(4, 8)), nn.Tanh(), nn.Linear(8, 3))


def dropout() -> nn.Sequential:
    return nn.Sequential(flat(nn.Linear(4, 8)), nn.Tanh(), nn.Dropout(0.5), flat(nn.Linear(8, 3)))


def a_bias() -> nn.Sequential:
    net = nn.Sequential(flat(nn.Linear(4, 8)), nn.Tanh(), flat(nn.Linear(8, 3)))
    nn.init.normal_(net[0].bias)
    return net


def nothing() -> nn.Sequential:
    return nn.Sequential(flat(nn.Linear(4, 8)), nn.Tanh(), flat(nn.Linear(8, 3)))


@pytest.mark.parametrize(
    ("made", "excuse"),
    [(a_last_layer, "in the last layer, their targets"), (outgoing_weights, "outgoing weights"), (dropout, "dropout"), (a_bias, "bias")],
    ids=lambda case: getattr(case, "__name__", ""),
)
def test_each_exception_from_the_warning_of_a_constant_is_named_and_real(made: Callable[[], nn.Module], excuse: str) -> None:
    torch.manual_seed(0)
    net = made()
    name, weight = next(iter(net.named_parameters()))
    warning = summary(net).warnings[name]
    trained(net)

    assert excuse in warning[warning.index("unless") :]
    assert different_units(weight) == len(weight)


@pytest.mark.parametrize(
    ("fill", "said", "units"),
    [
        (lambda w: None, "all units have the same weights", 1),
        (lambda w: w.copy_(torch.randn(1, 4).expand_as(w)), "all units have the same weights", 1),
        (lambda w: w[-1, 2].fill_(5), "7 of 8 units have the same weights", 2),
    ],
    ids=["constant", "rows alike", "one element off"],
)
def test_units_with_nothing_to_tell_them_apart_stay_alike_as_is_warned_of(fill: Callable[[Tensor], object], said: str, units: int) -> None:
    torch.manual_seed(0)
    net = nothing()
    fill(net[0].weight.data)
    warning = summary(net).warnings["0.weight"]
    trained(net)

    assert said in warning
    assert "symmetry is not broken" in warning
    assert different_units(net[0].weight) == units
    assert different_units(net[2].weight) == 3


REPEATED: tuple[tuple[Callable[[], nn.Module], str], ...] = (
    (lambda: nn.Linear(8, 600), "all units have"),
    (lambda: nn.Linear(300, 60).bfloat16(), "all units have"),
    (lambda: nn.Conv2d(3, 6, 3), "all units have"),
    (lambda: nn.Embedding(10, 4), "all vectors that are looked up are the same"),
    # each sees another channel
    (lambda: nn.Conv2d(6, 6, 3, groups=6), ""),
    (lambda: nn.LayerNorm((4, 4)), ""),
)


@pytest.mark.parametrize(("make", "said"), REPEATED)
def test_rows_that_are_alike_are_warned_of_where_they_are_units_with_the_same_inputs(make: Callable[[], nn.Module], said: str) -> None:
    torch.manual_seed(0)
    layer = make()
    layer.weight.data[:] = torch.randn(layer.weight.shape[1:]) / 4
    warnings = summary(layer).warnings

    assert said in warnings.get("weight", "")
    assert bool(warnings) == bool(said)


# ---- scripted and traced --------------------------------------------------------------------


def usual(module: nn.Module, key: str, shape: tuple[int, ...]) -> Usual | None:
    return usual_of(kind_of(module), key, shape, default_of(module, key, shape))  # type: ignore[arg-type]  # a class has a hash


class OwnEmbedding(nn.Embedding):
    pass


class Mixed(nn.Module):
    """One layer of each kind that has a default of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = OwnEmbedding(10, 1000)
        self.lstm = nn.LSTM(1000, 4)
        self.norm = nn.LayerNorm(4)
        self.attend = nn.MultiheadAttention(4, 2)
        self.depthwise = nn.Conv1d(4, 4, 1, groups=4)
        self.up = nn.ConvTranspose1d(4, 4, 1, groups=4)
        self.prelu = nn.PReLU()
        self.pair = nn.Bilinear(4, 4, 3)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        y, _ = self.lstm(self.embed(x))
        y = self.norm(y)
        y, _ = self.attend(y, y, y)
        y = self.prelu(self.up(self.depthwise(y.transpose(1, 2)))).transpose(1, 2)
        return self.head(y) + self.pair(y, y)


def scripted(net: nn.Module) -> nn.Module:
    return torch.jit.script(net)


def traced(net: nn.Module) -> nn.Module:
    return torch.jit.trace(net, torch.zeros(5, 2, dtype=torch.long))


def loaded(net: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.jit.save(torch.jit.script(net), file)
    file.seek(0)
    return torch.jit.load(file)


@pytest.fixture(scope="module", params=[scripted, traced, loaded], ids=lambda made: made.__name__)
def compiled(request: pytest.FixtureRequest) -> Iterator[tuple[nn.Module, nn.Module]]:
    """A module and what TorchScript made of it."""
    torch.manual_seed(0)
    with warnings.catch_warnings():
        # torch 2.13 says of all of TorchScript that it is deprecated, and of traced attention that it looks at sizes
        warnings.simplefilter("ignore")
        net = Mixed()
        yield net, request.param(net)


def test_a_compiled_module_is_called_by_the_class_it_was_made_from(compiled: tuple[nn.Module, nn.Module]) -> None:
    net, made = compiled

    assert [type_name(module) for module in made.modules()] == [type(module).__name__ for module in net.modules()]
    assert [kind_of(module) for module in made.modules()] == [type(module) for module in net.modules()]
    assert type_name(nn.Linear(2, 2)) == "Linear"


def test_a_compiled_module_has_the_defaults_of_the_class_it_was_made_from(
    compiled: tuple[nn.Module, nn.Module], request: pytest.FixtureRequest
) -> None:
    net, made = compiled
    lost = {"lstm"} if "traced" in request.node.name else set()
    theirs = dict(made.named_modules())
    for name, module in net.named_modules():
        for key, tensor in module.named_parameters(recurse=False):
            for what in (default_of, usual):
                expected = None if name in lost else what(module, key, tensor.shape)
                assert what(theirs[name], key, tensor.shape) == expected, (name, key)


def test_a_compiled_module_as_pytorch_makes_it_is_not_warned_of(compiled: tuple[nn.Module, nn.Module]) -> None:
    _, made = compiled
    seen = summary(made)

    assert seen.warnings == {}
    assert seen.frame["looks_like"]["norm.weight"] == f"{DEFAULT} (ones)"
    assert seen.frame["looks_like"]["embed.weight"] == f"{DEFAULT} (normal(0, 1))"


def test_a_compiled_module_is_warned_of_as_what_it_was_made_from(compiled: tuple[nn.Module, nn.Module]) -> None:
    _, made = compiled
    weights, fresh = dict(made.named_parameters()), {name: weight.clone() for name, weight in made.state_dict().items()}
    with torch.no_grad():
        for name in ("head.weight", "depthwise.weight", "up.weight"):
            weights[name].fill_(0.1)
        weights["norm.weight"].zero_()
    found = summary(made).warnings
    made.load_state_dict(fresh)

    assert {name: said.split(":")[0] for name, said in found.items()} == {"norm.weight": "all zeros", "head.weight": "constant"}


# ---- shares ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("zeros", "said"), [(0, "0%"), (1, "<1%"), (500, "50%"), (999, ">99%"), (1000, "100%")])
def test_none_and_all_are_said_of_none_and_all_only(zeros: int, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    net = nn.ParameterDict({"a": nn.Parameter(torch.cat([torch.zeros(zeros), 1 + torch.rand(1000 - zeros)]))})

    assert re.search(rf"(?<!\S){said}(?!\S)", str(summary(net)).split("zeros", 1)[1])
