"""What is warned of, and what never: PyTorch's own defaults; and that scripted and traced modules are known by what they were."""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from paramwatch import summary
from paramwatch.hazards import APART, FAR
from paramwatch.standards import DEFAULT, default_of, kind_of, scale_range, type_name

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


@pytest.mark.parametrize(
    ("module", "key"),
    [
        (nn.LSTM(10_000, 4), "weight_ih_l0"),
        (nn.RNN(10_000, 4), "weight_ih_l0"),
        (nn.GRUCell(10_000, 4), "weight_ih"),
        (nn.Bilinear(1000, 1000, 1), "weight"),
        (nn.Bilinear(2, 2000, 3), "weight"),
        (nn.Linear(10_000, 4), "weight"),
        (nn.MultiheadAttention(4, 2), "in_proj_weight"),
    ],
    ids=lambda case: type(case).__name__ if isinstance(case, nn.Module) else case,
)
def test_the_range_reaches_to_the_modules_own_default(module: nn.Module, key: str) -> None:
    weight = getattr(module, key)
    least, usual, most = scale_range(module, key, weight.shape)

    assert least <= default_of(module, key, weight.shape).std == usual <= most
    with torch.no_grad():
        weight.mul_(max(11 * usual, 3.5 * most) / weight.square().mean().sqrt())
    assert re.match(r"its size is \d\d times above PyTorch's default", summary(module).warnings[key])


USUAL: tuple[tuple[nn.Module, str], ...] = (
    (nn.Linear(64, 64), "weight"),
    (nn.Conv2d(16, 32, 3), "weight"),
    (nn.ConvTranspose2d(16, 16, 3), "weight"),
    (nn.GRU(32, 32), "weight_hh_l0"),
    (nn.LSTM(32, 32), "weight_ih_l0"),
    (nn.MultiheadAttention(32, 2), "in_proj_weight"),
    (nn.Bilinear(16, 16, 8), "weight"),
)


@pytest.mark.parametrize(("module", "key"), USUAL, ids=lambda case: type(case).__name__ if isinstance(case, nn.Module) else case)
@pytest.mark.parametrize(("factor", "said"), [(10.5, "above"), (1 / 10.5, "below"), (8.0, ""), (1 / 8, "")])
def test_a_weight_is_called_out_where_it_is_ten_times_what_pytorch_makes_it_or_a_tenth(
    module: nn.Module, key: str, factor: float, said: str
) -> None:
    weight = getattr(module, key)
    with torch.no_grad():
        weight.copy_(torch.ones_like(weight).uniform_(-1, 1) * default_of(module, key, weight.shape).std * 3**0.5 * factor)
    found = summary(module).warnings

    assert set(found) == ({key} if said else set())
    assert all(f"times {said} PyTorch's default" in text for text in found.values())


@pytest.mark.parametrize(("std", "said"), [(10.5, True), (8.0, False), (0.02, False), (1e-4, False)])
def test_an_embedding_is_called_out_where_it_is_too_large_and_may_be_as_small_as_one_likes(std: float, said: bool) -> None:
    torch.manual_seed(0)
    for module in (nn.Embedding(200, 50), nn.EmbeddingBag(200, 50)):
        nn.init.normal_(module.weight, std=std)
        found = summary(module).warnings
        assert [("times above PyTorch's default (rms" in text, "Xavier" in text) for text in found.values()] == [(True, False)] * said


def test_an_embedding_of_zeros_or_of_one_value_is_not_warned_of_unless_it_is_a_head() -> None:
    for value in (0.0, 0.5):
        embedding, head = nn.Embedding(20, 10), nn.Linear(10, 20, bias=False)
        nn.init.constant_(embedding.weight, value)
        assert summary(embedding).warnings == {}
        head.weight = embedding.weight
        assert list(summary(nn.ModuleList([embedding, head])).warnings) == ["0.weight"]


@pytest.mark.parametrize(
    ("shape", "std"),
    [
        ((768, 768), 0.02),  # GPT-2, BERT
        ((768, 768), 0.02 / 24**0.5),  # the projection back into the residual stream of GPT-2
        ((1024, 1024), 0.02 / 48**0.5),
        ((384, 512), (512 * 64) ** -0.5),  # the queries of T5
        ((4096, 4096), 0.02),  # Llama
        ((32, 32), 0.02),
    ],
    ids=str,
)
def test_what_transformers_begin_with_is_not_called_out(shape: tuple[int, int], std: float) -> None:
    least, usual, most = scale_range(nn.Linear(shape[1], shape[0], device="meta"), "weight", shape)

    assert min(usual / FAR, least / APART) <= std <= max(usual * FAR, most * APART)


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated:FutureWarning")
@pytest.mark.parametrize(("make", "name"), [(lambda: nn.LSTM(10_000, 4), "weight_ih_l0"), (lambda: nn.Bilinear(2, 10_000, 3), "weight")])
def test_the_lengths_of_a_weight_normalisation_are_no_weights(make: Callable[[], nn.Module], name: str) -> None:
    module = nn.utils.weight_norm(make(), name)

    assert summary(module).warnings == {}
    assert default_of(module, f"{name}_g", getattr(module, f"{name}_g").shape) is None


# ---- the model is not run -------------------------------------------------------------------


def test_a_weight_that_is_computed_when_one_asks_for_it_is_not_asked_for() -> None:
    net = parametrizations.spectral_norm(nn.Linear(8, 8))
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    seen = summary(net)

    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())
    assert DEFAULT in seen.frame["looks_like"]["bias"]


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


def test_a_constant_with_nothing_to_tell_its_units_apart_stays_as_it_is_warned_of() -> None:
    torch.manual_seed(0)
    net = nothing()
    assert "symmetry is not broken" in summary(net).warnings["0.weight"]
    trained(net)

    assert different_units(net[0].weight) == 1
    assert different_units(net[2].weight) == 3


# ---- scripted and traced --------------------------------------------------------------------


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
            for what in (default_of, scale_range):
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
