"""How tensors look initialised: each of torch's initialisers is recognised, nothing else is taken for it."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.nn import init
from verdicts import Layer, frame_of, holding, is_named, looks, named_in, plain

from paramwatch import summary

DRAWS = 100

LAYERS: dict[str, Layer] = {
    "linear 16x16": lambda: nn.Linear(16, 16),
    "linear 8x32": lambda: nn.Linear(32, 8),
    "linear 100x7": lambda: nn.Linear(7, 100),
    "linear 64x64": lambda: nn.Linear(64, 64),
    "linear 120x70": lambda: nn.Linear(70, 120),
    "conv 16x8x3x3": lambda: nn.Conv2d(8, 16, 3),
    "conv 12x12x5": lambda: nn.Conv1d(12, 12, 5),
}


@dataclass(frozen=True)
class Initialiser:
    """One way to fill a tensor, and the names it may be given, as patterns; on square layers Kaiming's has no mode."""

    name: str
    fill: Callable[[Tensor], object]
    names: tuple[str, ...]
    matrices: bool = False
    """It fills matrices only."""


FAN_OUT = {"mode": "fan_out", "nonlinearity": "relu"}

INITIALISERS = (
    Initialiser("uniform_", init.uniform_, ("uniform(0, 1*",)),
    Initialiser("uniform_ symmetric", lambda w: init.uniform_(w, -0.07, 0.07), ("uniform ±0.07",)),
    Initialiser("normal_", init.normal_, ("normal(0, 1*",)),
    Initialiser("normal_ 0.01", lambda w: init.normal_(w, std=0.01), ("normal(0, 0.01*",)),
    Initialiser("normal_ around 1", lambda w: init.normal_(w, 1.0, 0.02), ("normal(1, 0.0*", "normal(0.99*", "normal(1.00*")),
    Initialiser("constant_", lambda w: init.constant_(w, 42), ("constant 42",)),
    Initialiser("ones_", init.ones_, ("ones",)),
    Initialiser("zeros_", init.zeros_, ("zeros",)),
    Initialiser("eye_", lambda w: init.eye_(w) if w.dim() == 2 else init.dirac_(w), ("identity", "Dirac (identity")),
    Initialiser("xavier_uniform_", init.xavier_uniform_, ("Xavier uniform",)),
    Initialiser("xavier_normal_", init.xavier_normal_, ("Xavier normal",)),
    Initialiser("kaiming_uniform_", partial(init.kaiming_uniform_, nonlinearity="relu"), ("Kaiming uniform", "Kaiming uniform, fan_in")),
    Initialiser("kaiming_normal_", partial(init.kaiming_normal_, nonlinearity="relu"), ("Kaiming normal", "Kaiming normal, fan_in")),
    Initialiser(
        "kaiming_uniform_ fan_out",
        partial(init.kaiming_uniform_, **FAN_OUT),
        ("Kaiming uniform", "Kaiming uniform, fan_out"),
    ),
    Initialiser(
        "kaiming_normal_ fan_out",
        partial(init.kaiming_normal_, **FAN_OUT),
        ("Kaiming normal", "Kaiming normal, fan_out"),
    ),
    Initialiser("kaiming_uniform_ sqrt(5)", lambda w: init.kaiming_uniform_(w, a=math.sqrt(5)), ("PyTorch default",)),
    Initialiser("trunc_normal_ far out", lambda w: init.trunc_normal_(w, std=0.02), ("normal(0, 0.02*",)),
    Initialiser("trunc_normal_ 2 std", lambda w: init.trunc_normal_(w, std=0.02, a=-0.04, b=0.04), ("truncated normal(0, 0.0*",)),
    Initialiser("orthogonal_", init.orthogonal_, ("orthogonal",)),
    Initialiser("sparse_", lambda w: init.sparse_(w, 0.3), ("* zeros in each column, else *",), matrices=True),
    Initialiser("the module's default", lambda w: None, ("PyTorch default",)),
)


def test_a_name_is_not_taken_for_a_longer_one() -> None:
    assert is_named("Xavier uniform (= Kaiming uniform, linear gain)", ["Xavier uniform"])
    assert not is_named("Xavier uniform, tanh gain", ["Xavier uniform"])


@pytest.mark.parametrize(
    ("initialiser", "layer"),
    [
        pytest.param(initialiser, layer, id=f"{initialiser.name}-{layer}")
        for initialiser in INITIALISERS
        for layer in LAYERS
        if layer.startswith("linear") or not initialiser.matrices
    ],
)
def test_initialiser_is_recognised_in_99_of_100_draws_and_never_taken_for_another(initialiser: Initialiser, layer: str) -> None:
    found = Counter(looks(LAYERS[layer], initialiser.fill, DRAWS))
    recognised = sum(n for text, n in found.items() if is_named(text, initialiser.names))
    confident = [text for text in found if not is_named(text, (*initialiser.names, "unlike*"))]

    assert recognised >= 0.99 * DRAWS, found
    assert confident == [], found


def test_laws_that_coincide_are_both_named() -> None:
    square = LAYERS["linear 64x64"]

    assert set(map(plain, looks(square, init.xavier_uniform_, DRAWS))) == {"Xavier uniform (= Kaiming uniform, linear gain)"}
    found = Counter(map(plain, looks(square, lambda w: init.kaiming_normal_(w, nonlinearity="relu"), DRAWS)))
    # in one draw of a hundred the largest is so near that a cut there is said, too
    assert found["Kaiming normal (= Xavier normal, relu gain)"] >= 97, found


@pytest.mark.parametrize(
    ("draw", "name"),
    [
        (lambda n: torch.distributions.Laplace(0.0, 1.0).sample((n,)), "laplace"),
        (lambda n: torch.distributions.StudentT(3.0).sample((n,)), "student"),
        (lambda n: torch.randn(n) * torch.linspace(0.2, 2, n), "of growing scale"),
        (lambda n: torch.cat([torch.rand(n // 2), torch.randn(n - n // 2)]), "half and half"),
        (lambda n: torch.randn(n).sign() + 0.05 * torch.randn(n), "two humps"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_other_distributions_are_unlike_any(draw: Callable[[int], Tensor], name: str) -> None:
    found = looks(LAYERS["linear 64x64"], lambda w: w.data.copy_(draw(w.numel())[torch.randperm(w.numel())].reshape(w.shape)), 50)

    assert all(text.startswith("unlike any standard one") for text in found), Counter(found)


def test_half_a_normal_law_is_one_that_is_cut_at_its_centre() -> None:
    found = looks(LAYERS["linear 64x64"], lambda w: w.data.copy_(torch.randn_like(w).abs()), 50)

    assert all(re.match(r"truncated normal\(\S+, \S+\), between 0 and [345]", text) for text in found), Counter(found)


def test_two_humps_that_overlap_are_not_uniform() -> None:
    found = looks(LAYERS["linear 16x16"], lambda w: w.data.copy_(torch.randn_like(w).sign() + 0.3 * torch.randn_like(w)), DRAWS)

    assert set(found) == {"unlike any standard one"}


@pytest.mark.parametrize(
    ("make", "std", "expected"),
    [
        (lambda: nn.Linear(2, 128), 1.0, "Kaiming normal, fan_in (= normal(0, 1))"),
        (lambda: nn.Linear(128, 2), 1.0, "Kaiming normal, fan_out (= normal(0, 1))"),
        (lambda: nn.Linear(1, 300), 1.0, "Kaiming normal, linear gain (= normal(0, 1))"),
        (lambda: nn.Linear(200, 30), 0.1, "Kaiming normal, fan_in (= normal(0, 0.1))"),
    ],
)
def test_a_round_law_is_named_beside_a_named_one_of_the_same_scale(make: Layer, std: float, expected: str) -> None:
    found = looks(make, lambda w: init.normal_(w, std=std), DRAWS)

    assert sum(expected in text for text in found) >= 99, Counter(found)


@pytest.mark.parametrize(
    ("make", "fill", "name"),
    [
        (lambda: nn.Linear(8, 39), init.xavier_uniform_, "Xavier uniform"),
        (lambda: nn.Conv2d(64, 64, 3, groups=64), partial(init.kaiming_uniform_, mode="fan_out"), "Kaiming uniform, fan_out"),
        (lambda: nn.Linear(16, 17), init.xavier_normal_, "Xavier normal"),
    ],
    ids=["xavier uniform", "fan_out", "xavier normal"],
)
def test_the_true_law_is_always_among_those_named(make: Layer, fill: Callable[[Tensor], object], name: str) -> None:
    found = looks(make, fill, 1000)

    assert sum(is_named(text, [name]) for text in found) >= 998, Counter(found)


def test_a_cut_at_two_standard_deviations_and_none_are_told_apart_and_the_family_says_what_is_open() -> None:
    torch.manual_seed(0)
    cut, uncut = (nn.ModuleList([nn.Linear(16, 16, bias=False) for _ in range(500)]) for _ in range(2))
    for one, other in zip(cut, uncut, strict=True):
        init.trunc_normal_(one.weight)
        init.normal_(other.weight)

    for layers, family in ((cut, "truncated"), (uncut, "normal")):
        frame = summary(layers).frame
        first = frame["family"].str.split(" or ").str[0]
        # one in a hundred; seen in 6000 draws of each
        assert (first == family).mean() >= 0.97
        assert frame["family"].str.contains(family).all()
        assert ((frame["family"].str.contains(" or ")) == frame["looks_like"].str.contains(r"normal.* or .*(?:normal|uniform)")).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("fill", "expected"),
    [
        (lambda w: None, "PyTorch default (uniform ±0.05)"),
        (init.uniform_, "uniform(0, 1)"),
        (lambda w: init.uniform_(w, -0.07, 0.07), "uniform ±0.07"),
        (lambda w: init.uniform_(w, -0.3, 0.1), "uniform(-0.3, 0.1)"),
        (init.normal_, "normal(0, 1)"),
    ],
    ids=["default", "uniform", "symmetric", "with bounds that are rounded outwards", "normal"],
)
def test_tensors_that_were_drawn_in_low_precision_are_recognised(
    fill: Callable[[Tensor], object], expected: str, dtype: torch.dtype
) -> None:
    found = Counter(map(plain, looks(lambda: nn.Linear(400, 300, dtype=dtype), fill, 30)))

    assert found[expected] == 30, found


@pytest.mark.parametrize("bound", [(6 / 768) ** 0.5, (6 / 778) ** 0.5], ids=["kaiming", "xavier"])
def test_two_scales_that_lie_closer_than_the_grain_are_both_named(bound: float) -> None:
    make = partial(nn.Linear, 768, 10, bias=False, dtype=torch.bfloat16)

    found = Counter(map(plain, looks(make, lambda w: init.uniform_(w, -bound, bound), 20)))
    assert all(set(named_in(text)) == {"Xavier uniform", "Kaiming uniform, fan_in"} for text in found), found


def test_the_books_own_initialisation_is_a_mixture_of_zeros_and_two_sided_uniform() -> None:
    def custom(w: Tensor) -> None:
        init.uniform_(w, -10, 10)
        w.data *= w.data.abs() >= 5

    found = looks(LAYERS["linear 64x64"], custom, DRAWS)

    assert all(text.endswith(" % zeros, else ±uniform(5, 10)") for text in found), Counter(found)


def test_an_element_set_by_hand_stands_apart() -> None:
    def by_hand(w: Tensor) -> None:
        w.data += 1
        w.data[0, 0] = 42

    assert set(looks(lambda: nn.Linear(4, 8), by_hand, DRAWS)) == {"unlike any standard one: 42 stands apart"}


@pytest.mark.parametrize("fill", [init.xavier_uniform_, init.normal_, init.kaiming_normal_])
def test_of_a_small_tensor_only_what_fits_is_said(fill: Callable[[Tensor], object]) -> None:
    assert all(text.startswith("too small to tell") for text in looks(lambda: nn.Linear(4, 8), fill, DRAWS))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_are_recognised(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    layers = nn.ModuleList([nn.Linear(64, 64).to(dtype) for _ in range(DRAWS)])

    found = Counter(map(plain, summary(layers).frame["looks_like"][::2]))
    assert found["PyTorch default (uniform ±0.125)"] >= 99, found


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda: nn.Embedding(64, 16, padding_idx=3), {"weight": "PyTorch default (normal(0, 1))"}),
        (lambda: nn.EmbeddingBag(64, 16), {"weight": "PyTorch default (normal(0, 1))"}),
        (lambda: nn.LayerNorm(300), {"weight": "PyTorch default (ones)", "bias": "PyTorch default (zeros)"}),
        (lambda: nn.BatchNorm2d(3), {"weight": "PyTorch default (ones)", "bias": "PyTorch default (zeros)"}),
        (lambda: nn.GroupNorm(2, 4), {"weight": "PyTorch default (ones)", "bias": "PyTorch default (zeros)"}),
        (lambda: nn.PReLU(), {"weight": "PyTorch default (constant 0.25)"}),
        (lambda: nn.LSTM(16, 25), dict.fromkeys(("weight_ih_l0", "weight_hh_l0"), "PyTorch default (uniform ±0.2)")),
        (lambda: nn.GRUCell(16, 26), dict.fromkeys(("weight_ih", "weight_hh"), "PyTorch default (uniform ±0.196)")),
        (lambda: nn.Bilinear(16, 5, 9), {"weight": "PyTorch default (uniform ±0.25)"}),
        (lambda: nn.ConvTranspose2d(8, 16, 3), {"weight": "PyTorch default (uniform ±0.0833)"}),
        (lambda: nn.Linear(64, 300), dict.fromkeys(("weight", "bias"), "PyTorch default (uniform ±0.125)")),
        (
            lambda: nn.MultiheadAttention(24, 2),
            {
                "in_proj_weight": "PyTorch default (= Xavier uniform)",
                "in_proj_bias": "PyTorch default (zeros)",
                "out_proj.weight": "PyTorch default (uniform ±0.204)",
                "out_proj.bias": "PyTorch default (zeros)",
            },
        ),
        (lambda: nn.MultiheadAttention(32, 2, kdim=20, vdim=20), {"k_proj_weight": "PyTorch default (= Xavier uniform)"}),
    ],
    ids=lambda value: type(value()).__name__ if callable(value) else "",
)
def test_defaults_of_modules_are_known(make: Layer, expected: dict[str, str]) -> None:
    torch.manual_seed(0)
    for _ in range(20):
        found = summary(make()).frame["looks_like"]
        assert {name: plain(found[name]) for name in expected} == expected


COARSE = [torch.float16, torch.bfloat16]

DRAWS_ZEROS = bool((torch.empty(4096, dtype=torch.bfloat16).normal_(generator=torch.Generator().manual_seed(0)) == 0).any())
"""Whether `normal_` of this torch draws exact zeros in low precision, as 2.6 does: some tensors have more than a law explains."""


@pytest.mark.parametrize("dtype", COARSE)
@pytest.mark.parametrize(
    ("fill", "family"),
    [
        (init.trunc_normal_, "truncated"),
        (lambda w: init.trunc_normal_(w, std=0.02, a=-0.04, b=0.04), "truncated"),
        (init.uniform_, "uniform"),
        (init.normal_, "normal"),
    ],
    ids=["truncated", "truncated 0.02", "uniform", "normal"],
)
def test_256_elements_that_were_drawn_in_low_precision_are_told_apart_and_their_zeros_are_no_mixture(
    fill: Callable[[Tensor], object], family: str, dtype: torch.dtype
) -> None:
    found = Counter(frame_of(lambda: nn.Linear(16, 16, dtype=dtype), fill, 1000)["family"])

    told = sum(n for said, n in found.items() if family in said.split(" or "))
    assert told >= (980 if family == "normal" and DRAWS_ZEROS else 998), found


def test_zeros_that_are_more_than_low_precision_draws_are_still_a_mixture() -> None:
    found = looks(lambda: nn.Linear(16, 16, dtype=torch.bfloat16), lambda w: init.sparse_(w, 0.1), 20)

    beside = r"1[2-4] % zeros( in each column)?" if DRAWS_ZEROS else "12 % zeros in each column"
    assert all(re.match(f"{beside}, else ", text) for text in found), Counter(found)


@pytest.mark.parametrize("shape", [(16, 16), (8, 39), (1, 300)], ids=str)
def test_a_cut_at_one_standard_deviation_is_never_called_uniform_alone(shape: tuple[int, int]) -> None:
    found = Counter(frame_of(lambda: nn.Linear(*shape), lambda w: init.trunc_normal_(w, a=-1, b=1), 1000)["family"])

    # what the likelihood ratio lets pass is 1 in 100 at most, and 1 in 500 in fact
    assert sum(n for said, n in found.items() if "truncated" in said) >= 994, found


@pytest.mark.parametrize("cut", [0.3, 0.6, 0.8])
def test_what_is_cut_near_its_centre_is_uniform_or_truncated_and_no_cut_is_said_that_is_none(cut: float) -> None:
    frame = frame_of(LAYERS["linear 64x64"], lambda w: init.trunc_normal_(w, std=0.02, a=-0.02 * cut, b=0.02 * cut), DRAWS)

    assert frame["family"].str.contains("uniform").mean() >= 0.98
    assert not frame["looks_like"].str.contains(r"cut at 0\.[0-4]").any()


@pytest.mark.usefixtures("no_kernel")
@pytest.mark.parametrize("cut", [3.0, 3.5, 4.0, 4.5])
def test_a_cut_far_out_is_told_in_a_sample_by_the_extremes_of_the_whole(cut: float) -> None:
    far = 0.02 * cut
    found = frame_of(lambda: nn.Linear(1000, 1100, bias=False), lambda w: init.trunc_normal_(w, std=0.02, a=-far, b=far), 3)

    assert not found["exact"].any()
    said = [float(told) for text in found["looks_like"] for told in re.findall(r"truncated normal\(0, 0.02\), cut at (\S+) std", text)]
    # its place follows from the standard deviation, which a sample tells to 1 in 100
    assert said == pytest.approx([cut] * 3, rel=0.05)
    if cut < 4.5:
        # the largest of a million normal numbers is nearer than 4 standard deviations in 1 case of 10^30
        assert set(found["family"]) == {"truncated"}


# ---- what is no law -------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, *COARSE])
@pytest.mark.parametrize(
    ("fill", "at"),
    [
        (lambda w: init.uniform_(w, -0.0625, 0.0625).data.clamp_(-0.05, 0.05), "±0.05"),
        (lambda w: init.normal_(w).data.clamp_(-1.5, 1.5), "±1.5"),
        (lambda w: init.normal_(w).data.clamp_(max=1), "1"),
    ],
    ids=["uniform", "normal", "one side"],
)
def test_what_was_clipped_is_no_law(fill: Callable[[Tensor], object], at: str, dtype: torch.dtype) -> None:
    found = looks(LAYERS["linear 64x64"], fill, 20, dtype)

    # 0.05 is 0.04999 in float16 and 0.05005 in bfloat16
    expected = rf"unlike any standard one: (1[2-9]|2[0-2]) % of the elements are at {at} \(clipped\?\)"
    assert all(re.fullmatch(expected, re.sub("0.04999|0.05005", "0.05", text)) for text in found), Counter(found)


def test_a_uniform_law_that_lost_its_negative_half_is_a_mixture() -> None:
    found = looks(LAYERS["linear 64x64"], lambda w: init.uniform_(w, -1, 1).data.clamp_(min=0), 20)

    assert all(re.fullmatch(r"\d\d % zeros, else uniform\(0, 1\)", plain(text)) for text in found), Counter(found)


@pytest.mark.parametrize(("levels", "values"), [(2, "[45]"), (7, "1[345]"), (127, r"\d\d\d")])
@pytest.mark.parametrize("draw", [init.normal_, lambda w: init.uniform_(w, -1, 1)], ids=["normal", "uniform"])
def test_what_was_quantised_is_no_law(draw: Callable[[Tensor], Tensor], levels: int, values: str) -> None:
    def quantised(w: Tensor) -> None:
        step = draw(w).abs().max() / levels
        w.div_(step).round_().mul_(step)

    found = looks(LAYERS["linear 64x64"], lambda w: quantised(w.data), 20)

    expected = rf"unlike any standard one( \(\d+(\.\d)? % zeros\))?: {values} distinct values \(quantised\?\)"
    assert all(re.fullmatch(expected, text) for text in found), Counter(found)


@pytest.mark.parametrize("dtype", COARSE)
def test_few_values_that_low_precision_has_are_not_called_quantised(dtype: torch.dtype) -> None:
    found = looks(LAYERS["linear 64x64"], lambda w: init.normal_(w, 1.0, 0.02), 20, dtype)

    assert all(text.startswith("normal(1, 0.02)") for text in found), Counter(found)


# ---- identity -------------------------------------------------------------------------------


def test_dirac_in_groups_and_scaled_identity_are_recognised() -> None:
    conv, linear = nn.Conv2d(4, 8, 3), nn.Linear(5, 7)
    init.dirac_(conv.weight, groups=2)
    init.eye_(linear.weight).data.mul_(-3)

    assert summary(conv).frame["looks_like"]["weight"] == "Dirac (identity)"
    assert summary(linear).frame["looks_like"]["weight"] == "identity times -3"


def test_an_identity_with_one_element_too_many_is_none() -> None:
    linear = nn.Linear(20, 20)
    init.eye_(linear.weight).data[3, 5] = 1

    assert "identity" not in summary(linear).frame["looks_like"]["weight"]


@pytest.mark.usefixtures("no_kernel")
@pytest.mark.parametrize(
    ("layer", "looks_like"),
    [(nn.Linear(1300, 1200, bias=False), "identity"), (nn.Conv2d(400, 420, 3), "Dirac (identity)")],
    ids=["eye", "dirac"],
)
def test_the_expected_std_of_ones_among_zeros_is_exact_in_a_sample(layer: nn.Module, looks_like: str) -> None:
    (init.eye_ if layer.weight.dim() == 2 else init.dirac_)(layer.weight)
    row = summary(layer).frame.loc["weight"]

    assert (row["looks_like"], row["exact"]) == (looks_like, False)
    assert row["theoretical_std"] == pytest.approx(layer.weight.detach().double().std(correction=0).item(), rel=1e-9)


def test_rounding_makes_no_share_of_zeros_all_of_them() -> None:
    w = torch.zeros(1200, 1200)
    w[[0, 3, 5], [0, 3, 7]] = torch.tensor([1.0, 3.0, -2.0])

    assert summary(holding(w)).frame["looks_like"]["p"].startswith("99.9998 % zeros, else ")
    assert summary(holding(w.clamp(0, 1))).frame["looks_like"]["p"] == "99.9999 % zeros, else 1"


def test_theoretical_std_is_that_of_the_law_named_first() -> None:
    linear = nn.Linear(300, 200)
    for fill, std in (
        (init.xavier_normal_, math.sqrt(2 / 500)),
        (lambda w: init.kaiming_uniform_(w, nonlinearity="relu"), math.sqrt(2 / 300)),
        (lambda w: init.trunc_normal_(w, std=0.02, a=-0.04, b=0.04), 0.02 * math.sqrt(0.77374)),
        (init.orthogonal_, 1 / math.sqrt(300)),
    ):
        fill(linear.weight)
        row = summary(linear).frame.loc["weight"]
        assert row["theoretical_std"] == pytest.approx(std, rel=2e-2 if "truncated" in row["looks_like"] else 1e-6)
        assert row["std"] == pytest.approx(std, rel=2e-2)
