"""A weight that is ten times off in size, and weights that are computed from others."""

from __future__ import annotations

import math
import re
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

from paramwatch import summary
from paramwatch.drawn import Law
from paramwatch.scale import Sizes, Weight, far_off
from paramwatch.standards import DEFAULT, default_of, usual_of

# ---- ten times off --------------------------------------------------------------------------


LAYERS: tuple[Callable[[], nn.Module], ...] = (
    lambda: nn.Linear(64, 64),
    lambda: nn.Linear(4, 1024),
    lambda: nn.Linear(8, 256),
    lambda: nn.Linear(512, 4),
    lambda: nn.Conv2d(16, 32, 3),
    lambda: nn.Conv2d(256, 256, 3, groups=256),
    lambda: nn.ConvTranspose2d(16, 16, 3),
    lambda: nn.GRU(32, 32),
    lambda: nn.LSTM(16, 32, proj_size=8),
    lambda: nn.LSTM(1000, 4),
    lambda: nn.MultiheadAttention(32, 2, kdim=16, vdim=64),
    lambda: nn.Bilinear(16, 16, 8),
    lambda: nn.Transformer(32, 4, 1, 1, 64, batch_first=True),
)


@pytest.mark.parametrize("make", LAYERS)
def test_every_weight_is_called_out_at_ten_times_what_it_begins_with_and_at_a_tenth(make: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    for factor, said in ((10.5, "above"), (1 / 10.5, "below"), (3.0, ""), (1 / 3, "")):
        module = make()
        weights = {name: p for name, p in module.named_parameters() if p.dim() > 1 and "bias" not in name}
        for weight in weights.values():
            weight.data *= factor
        found = summary(module).warnings
        assert set(found) == (set(weights) if said else set()), factor
        assert all(f"times {said} " in text for text in found.values())


SCHEMES: tuple[Callable[[Tensor], object], ...] = (
    nn.init.xavier_uniform_,
    nn.init.xavier_normal_,
    nn.init.kaiming_normal_,
    nn.init.kaiming_uniform_,
    nn.init.orthogonal_,
)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_whatever_scheme_made_a_weight_a_tenth_of_it_is_called_out_and_it_is_not(scheme: Callable[[Tensor], object]) -> None:
    torch.manual_seed(0)
    shapes = [(64, 64), (256, 64), (64, 256), (32, 16, 3, 3)]
    for factor, expected in ((1.0, 0), (1 / 10.5, len(shapes)), (10.5, len(shapes))):
        layers = [nn.Linear(*shape[::-1]) if len(shape) == 2 else nn.Conv2d(16, 32, 3) for shape in shapes]
        for layer in layers:
            scheme(layer.weight)
            layer.weight.data *= factor
        assert len(summary(nn.ModuleList(layers)).warnings) == expected


def test_a_tenth_and_ten_times_of_each_scheme_are_told_in_every_shape_whose_sides_differ_by_less_than_twenty_times() -> None:
    for inputs in (7, 33, 300, 4096):
        for outputs in {max(4, round(inputs * ratio)) for ratio in (1 / 19, 1 / 5, 1, 2, 8, 19)}:
            default = 1 / math.sqrt(3 * inputs)
            usual = usual_of(nn.Linear, "weight", (outputs, inputs), Law("uniform", 0.0, default * math.sqrt(3)))
            assert usual is not None
            for size in (default, math.sqrt(2 / (inputs + outputs)), math.sqrt(2 / inputs), 1 / math.sqrt(max(inputs, outputs))):
                for factor, above in ((1.0, None), (10.5, True), (1 / 10.5, False)):
                    weight = Weight((outputs, inputs), size * factor, 10**6)
                    far = far_off(weight, usual, Sizes([weight]))
                    assert (far and far.above) == above, (inputs, outputs, size, factor)


def block(width: int, std: float, projected: float) -> nn.Module:
    net = nn.ModuleDict({"up": nn.Linear(width, 4 * width), "down": nn.Linear(4 * width, width), "out": nn.Linear(width, width)})
    for name, layer in net.items():
        nn.init.normal_(layer.weight, std=std if name == "up" else projected)
    return net


@pytest.mark.parametrize(("width", "depth"), [(32, 30), (64, 6), (128, 3)])
def test_the_projections_of_a_deep_model_are_judged_by_the_root_of_their_number(width: int, depth: int) -> None:
    torch.manual_seed(0)
    less = 0.02 / (2 * depth) ** 0.5
    deep = nn.ModuleList([block(width, 0.02, less) for _ in range(depth)])

    assert summary(deep).warnings == {}
    # alone there is no depth that asks for it
    assert "out.weight" in summary(block(width, 0.02, less)).warnings


def test_queries_may_be_smaller_than_keys_by_the_root_of_the_size_of_a_head() -> None:
    torch.manual_seed(0)
    net = nn.ModuleDict({name: nn.Linear(512, 512, bias=False) for name in ("q", "k", "v")})
    for name, std in (("q", (512 * 64) ** -0.5), ("k", 512**-0.5), ("v", 512**-0.5)):
        nn.init.normal_(net[name].weight, std=std)

    assert summary(net).warnings == {}
    assert list(summary(net["q"]).warnings) == ["weight"]


@pytest.mark.parametrize("shape", [(32, 32), (768, 768), (3072, 768), (96, 1, 7, 7)], ids=str)
def test_two_hundredths_are_what_transformers_begin_with_in_every_shape(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(shape[1], shape[0]) if len(shape) == 2 else nn.Conv2d(96, 96, 7, groups=96)
    nn.init.normal_(layer.weight, std=0.02)

    assert summary(layer).warnings == {}


def test_two_hundredths_of_a_depthwise_convolution_are_not_called_out_where_chance_makes_them_less() -> None:
    torch.manual_seed(0)
    net = nn.ModuleList(nn.Conv2d(32, 32, 3, groups=32) for _ in range(40))
    for layer in net:
        nn.init.trunc_normal_(layer.weight, std=0.02)
    found = summary(net)

    assert (found.frame["std"].filter(like="weight") < 1 / math.sqrt(27) / 10).any()
    assert found.warnings == {}


@pytest.mark.parametrize(("std", "said"), [(10.5, True), (8.0, False), (0.02, False), (1e-4, False)])
def test_an_embedding_is_called_out_where_it_is_too_large_and_may_be_as_small_as_one_likes(std: float, said: bool) -> None:
    torch.manual_seed(0)
    for module in (nn.Embedding(200, 50), nn.EmbeddingBag(200, 50)):
        nn.init.normal_(module.weight, std=std)
        found = summary(module).warnings
        assert [("times above PyTorch's default (rms" in text, "Xavier" in text) for text in found.values()] == [(True, False)] * said


@pytest.mark.parametrize(("value", "said"), [(0.0, "all zeros: what is looked up is nothing"), (0.5, "constant: all vectors")])
def test_an_embedding_of_zeros_or_of_one_value_is_warned_of_and_as_a_head_if_it_is_one(value: float, said: str) -> None:
    embedding, head = nn.Embedding(20, 10), nn.Linear(10, 20, bias=False)
    nn.init.constant_(embedding.weight, value)
    assert summary(embedding).warnings["weight"].startswith(said)
    head.weight = embedding.weight
    assert re.match("all zeros: at the first step|constant: all units", summary(nn.ModuleList([embedding, head])).warnings["0.weight"])


# ---- computed weights -----------------------------------------------------------------------


def pruned() -> nn.Module:
    return prune.l1_unstructured(nn.Linear(32, 32), "weight", 0.1)


NORMED: tuple[Callable[[], nn.Module], ...] = (
    lambda: nn.utils.weight_norm(nn.Linear(32, 32)),
    lambda: nn.utils.spectral_norm(nn.Linear(32, 32)),
    lambda: parametrizations.weight_norm(nn.Linear(32, 32)),
    lambda: parametrizations.spectral_norm(nn.Linear(32, 32)),
)


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated:FutureWarning")
@pytest.mark.parametrize("make", [pruned, *NORMED])
def test_what_a_weight_is_computed_from_is_warned_of_as_the_weight_would_be(make: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    whole = make is pruned
    for change, said in (
        (lambda p: p.mul_(10.5), r"its size is 1\d times above.*" + ("blow up" if whole else "only its direction counts")),
        (lambda p: p.div_(10.5), r"its size is \d\d times below.*" + ("fade" if whole else "only its direction counts")),
        (lambda p: p.fill_(0.1), "constant: .*" + ("same weights" if whole else "same direction") + " .symmetry is not broken"),
        (torch.zero_, "all zeros: " + ("at the first step" if whole else "it is divided by its own length, which is NaN")),
    ):
        module = make()
        assert summary(module).warnings == {}
        name, weight = next((name, p) for name, p in module.named_parameters() if p.shape == (32, 32))
        with torch.no_grad():
            change(weight)
        found = summary(module).warnings
        assert list(found) == [name]
        assert re.match(said, found[name])
    assert whole or bool(module(torch.ones(1, 32)).isnan().all())


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated:FutureWarning")
@pytest.mark.parametrize("make", [NORMED[0], NORMED[2]])
def test_the_lengths_of_a_weight_normalisation_tell_its_size(make: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    module = make()
    name, lengths = next((name, p) for name, p in module.named_parameters() if p.shape == (32, 1))
    lengths.data /= 10.5

    module(torch.ones(1, 32))
    rms = float(module.weight.detach().square().mean().sqrt())
    assert re.match(rf"its size is \d\d times below .* \(rms {rms:.3g}", summary(module).warnings[name])
    lengths.data.zero_()
    assert summary(module).warnings[name].startswith("all zeros: at the first step")


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated:FutureWarning")
@pytest.mark.parametrize(("make", "name"), [(lambda: nn.LSTM(10_000, 4), "weight_ih_l0"), (lambda: nn.Bilinear(2, 10_000, 3), "weight")])
def test_the_lengths_of_a_weight_normalisation_are_no_weights(make: Callable[[], nn.Module], name: str) -> None:
    module = nn.utils.weight_norm(make(), name)

    assert summary(module).warnings == {}
    assert default_of(module, f"{name}_g", getattr(module, f"{name}_g").shape) is None


def test_a_weight_that_is_computed_when_one_asks_for_it_is_not_asked_for() -> None:
    net = parametrizations.spectral_norm(nn.Linear(8, 8))
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    seen = summary(net)

    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())
    assert DEFAULT in seen.frame["looks_like"]["bias"]
