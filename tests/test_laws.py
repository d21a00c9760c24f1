"""The laws behind `summary`: which ones some numbers follow, and in which words."""

from __future__ import annotations

import math
import runpy
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor, nn
from torch.nn import init
from verdicts import looks

import paramwatch
from paramwatch import departures, vouched
from paramwatch.drawn import Law, Numbers
from paramwatch.fitting import agrees
from paramwatch.formulas import variance_between, variance_within
from paramwatch.laws import law_of
from paramwatch.lopsided import lopsided
from paramwatch.ragged import Ragged
from paramwatch.wording import per_cent, roundest

ROOT = Path(__file__).parents[1]
RECOGNITION = runpy.run_path(str(ROOT / "benchmarks" / "recognition.py"))


def numbers(elements: np.ndarray) -> Numbers:
    return Numbers.of(elements, 1e-16)


@pytest.mark.parametrize("n", [256, 1000, 5000])
@pytest.mark.parametrize("kind", ["uniform", "normal", "two-sided"])
def test_a_true_law_is_rejected_in_less_than_one_case_of_a_hundred(kind: str, n: int) -> None:
    random = np.random.default_rng(0)
    draws = {
        "uniform": lambda: random.uniform(-3, 3, n),
        "normal": lambda: random.normal(0, 3, n),
        "two-sided": lambda: random.uniform(1, 3, n) * random.choice([-1.0, 1.0], n),
    }
    found = Counter(" or ".join(law.kind for law in law_of(numbers(draws[kind]()))) for _ in range(300))

    assert sum(times for kinds, times in found.items() if kind in kinds.split(" or ")) >= 298, found


def test_numbers_agree_with_their_law_and_not_with_one_a_fifth_wider() -> None:
    random = np.random.default_rng(0)
    for law, draw in (
        (Law("uniform", 0.0, 2.0), lambda: random.uniform(-2, 2, 1000)),
        (Law("normal", 0.0, 2.0), lambda: random.normal(0, 2, 1000)),
    ):
        drawn = [numbers(draw()) for _ in range(300)]
        assert sum(agrees(x, law) for x in drawn) >= 299
        assert not any(agrees(x, Law(law.kind, 0.0, 2.4)) for x in drawn)


def test_std_of_a_law_is_that_of_many_draws_from_it() -> None:
    random = np.random.default_rng(0)
    z = random.normal(size=1_000_000)
    signs = random.choice([-1.0, 1.0], 1_000_000)

    assert Law("truncated", 0.0, 3.0, 1.5).std == pytest.approx(3 * z[np.abs(z) < 1.5].std(), rel=3e-3)
    assert Law("two-sided", 0.0, 10.0, 5.0).std == pytest.approx((signs * random.uniform(5, 10, 1_000_000)).std(), rel=3e-3)


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(0.0094, 0.0107, 0.01), (0.96, 1.07, 1.0), (-0.34, -0.29, -0.3), (-1.0, 2.0, 0.0), (1.2341, 1.2349, 1.2345)],
)
def test_the_roundest_number_has_the_fewest_digits(low: float, high: float, expected: float) -> None:
    assert roundest(low, high) == pytest.approx(expected, rel=1e-12)


# of the seeds to 30,000, all whose draws the Anderson-Darling or the chi-square test rejects though a law with a free centre may pass
REJECTED = {256: (7190, 10522, 11115, 14010, 25829), 1024: (3765, 4547, 16486, 17442, 23423, 24237, 28910)}


@pytest.mark.parametrize("n", REJECTED)
def test_uniform_numbers_that_its_test_rejects_are_not_called_truncated_alone(n: int) -> None:
    found = [[law.kind for law in law_of(Numbers.of(np.random.default_rng(seed).random(n), 2.0**-23))] for seed in REJECTED[n]]

    assert ["truncated"] not in found


@pytest.mark.parametrize("n", [256, 1024, 4096])
def test_normal_and_uniform_numbers_are_never_called_truncated_alone(n: int) -> None:
    random = np.random.default_rng(0)
    for draw in (random.normal, random.random):
        found = Counter(" or ".join(law.kind for law in law_of(numbers(draw(size=n)))) for _ in range(2000))
        assert found["truncated"] == 0, found


def test_a_bound_with_a_name_needs_no_second_law_unless_the_numbers_lean_to_it() -> None:
    random = np.random.default_rng(0)
    drawn = [numbers(random.uniform(-1, 1, 300)) for _ in range(1000)]
    open_ones = {known: sum(len(law_of(x, known)) == 2 for x in drawn) for known in (True, False)}

    assert open_ones[True] <= 40
    assert open_ones[False] >= 400


@pytest.mark.parametrize("kept", [1.0, 0.999999])
def test_what_all_elements_reach_tells_a_cut_that_a_sample_does_not_show(kept: float) -> None:
    random = np.random.default_rng(0)
    sample, whole = random.normal(size=4096), np.abs(random.normal(size=1_000_000)).max()
    far = 3.5 if kept == 1.0 else float(whole)
    some = np.sort(sample[np.abs(sample) < far])
    x = Numbers(len(some), float(some.mean()), float(some.std()), -far, far, 2.0**-23, some, 1_000_000)

    assert [law.kind for law in law_of(x)] == (["truncated"] if kept == 1.0 else ["normal"])


@pytest.mark.parametrize(
    ("share", "expected"),
    [
        (0.0, "0 %"),
        (1.0, "100 %"),
        (0.3, "30 %"),
        (0.994, "99 %"),
        (0.996, "99.6 %"),
        (0.9999, "99.99 %"),
        (0.004, "0.4 %"),
        (1e-9, "0.0000001 %"),
    ],
)
def test_a_share_is_rounded_to_none_or_all_of_nothing(share: float, expected: str) -> None:
    assert per_cent(share) == expected


@pytest.mark.skipif(not torch.__version__.startswith("2.13."), reason="the tables were made with torch 2.13; others draw other numbers")
def test_the_tables_in_the_docs_are_what_the_command_prints() -> None:
    command = RECOGNITION
    docs = (ROOT / "docs" / "summary.md").read_text(encoding="utf-8").splitlines()
    stated = [line.split(" | ") for line in docs if line.startswith("| ")]

    assert set(command["table"](command["OTHERS"], (16, 32, 64), 100)) <= set(docs)
    assert set(command["of_no_law"]((16, 32, 64), 60)) <= set(docs)
    # of the other table, which takes longer, three rows of the first column
    some = {law: command["OWN"][law] for law in ("uniform ±0.07", "normal(0, 0.02)", "cut at 1 std")}
    rows = [line.removesuffix(" |").split(" | ") for line in command["table"](some, (16,), 1000)[2:]]
    assert all(row in [line[:2] for line in stated] for row in rows)


@pytest.mark.parametrize(("mean", "low", "high"), [(0.5, -2, 2), (1.0, -2, 2), (0.0, -2, 3), (0.0, -1, 2)])
def test_a_normal_law_that_is_not_cut_as_far_on_both_sides_is_named_by_its_ends(mean: float, low: float, high: float) -> None:
    def frame(width: int) -> pd.DataFrame:
        torch.manual_seed(0)
        layers = nn.ModuleList(nn.Linear(width, width, bias=False) for _ in range(100))
        for layer in layers:
            nn.init.trunc_normal_(layer.weight, mean=mean, a=low, b=high)
        return paramwatch.summary(layers).frame

    found = frame(64)
    assert (found["family"] == "truncated").mean() >= 0.99
    assert frame(32)["family"].str.contains("truncated").mean() >= 0.99
    stated = found["looks_like"].str.extract(r"truncated normal\((\S+), (\S+)\), between (\S+) and (\S+)").astype(float)
    assert stated.mean().to_numpy() == pytest.approx([mean, 1, low, high], abs=0.05)
    assert found["theoretical_std"].to_numpy() == pytest.approx(found["std"].to_numpy(), rel=0.02)


@pytest.mark.parametrize("law", ["cut at -2 and 3 std", "cut at -1 and 2 std", "cut at -1 and 1.5 std", "cut at -3.5 and 0.5 std"])
def test_of_256_elements_a_lopsided_cut_is_named_in_99_of_100_draws(law: str) -> None:
    found = RECOGNITION["families"](RECOGNITION["OWN"][law], 16, 300)

    assert sum(n for said, n in found.items() if "truncated" in said.split(" or ")) >= 297, found


@pytest.mark.parametrize(
    ("name", "least"),
    [("normal_()", 210), ("trunc_normal_(std=0.02, a=-0.04, b=0.04)", 0), ("trunc_normal_(mean=1)", 290), ("sparse_(0.1)", 300)],
)
def test_what_a_function_fills_with_is_named_and_seldom_beside_another_where_256_elements_tell(name: str, least: int) -> None:
    family, draw = RECOGNITION["FUNCTIONS"][name]
    named, alone = RECOGNITION["recognised"](family, draw, RECOGNITION["SHAPES"][256], 300)

    assert named >= 297
    assert alone >= least


@pytest.mark.parametrize("width", [0.05, 1.0])
def test_of_all_laws_between_two_ends_the_likeliest_has_the_mean_and_the_spread_of_the_numbers(width: float) -> None:
    random = np.random.default_rng(0)
    drawn = random.normal(size=20_000)
    x = numbers(width * drawn[(drawn > -1.0) & (drawn < 1.7)])
    (found,) = lopsided([x], [0.0])
    centre, scale, (low, high) = found.law.centre, found.law.scale, found.law.ends
    at = np.linspace(low, high, 200_001)
    weights = np.exp(-(((at - centre) / scale) ** 2) / 2)
    mean = np.average(at, weights=weights)

    assert [mean, np.average((at - mean) ** 2, weights=weights)] == pytest.approx([x.mean, x.std**2], rel=1e-4)
    density = np.log(np.average(weights)) + np.log(high - low) + np.average(((x.some - centre) / scale) ** 2) / 2
    assert found.over_uniform == pytest.approx(x.n * (math.log(high - low) - density), rel=1e-3)


def test_the_spread_between_two_ends_is_that_of_the_integral() -> None:
    at = np.linspace(-1.5, 2.5, 400_001)
    weights = np.exp(-(at**2) / 2)
    mean = np.average(at, weights=weights)

    assert variance_between(-1.5, 2.5) == pytest.approx(np.average((at - mean) ** 2, weights=weights), rel=1e-5)
    assert variance_between(-2.0, 2.0) == pytest.approx(variance_within(2.0), rel=1e-12)


CUTS = (
    *((-cut, cut) for cut in (0.25, 0.5, 1.0, 1.5, 2.0, 2.5, 3.0, 4.0)),
    *((0.0, 0.5), (0.0, 1.0), (-0.5, 0.25), (-1.0, 1.5), (-1.0, 3.0), (-2.0, 3.0), (-3.0, 4.0)),
)
"""In standard deviations."""


@pytest.mark.parametrize("width", [16, 32, 64])
def test_a_cut_is_named_or_lies_where_a_verdict_that_names_none_says_that_it_does_not_know(width: int) -> None:
    torch.manual_seed(1)
    drawn = nn.ParameterList(nn.Parameter(torch.empty(width, width)) for _ in range(80 * len(CUTS)))
    for i, w in enumerate(drawn):
        low, high = CUTS[i % len(CUTS)]
        nn.init.trunc_normal_(w.detach(), std=0.02, a=0.02 * low, b=0.02 * high)
    frame = paramwatch.summary(drawn).frame
    bounds = np.array(CUTS * 80)
    near, far = np.abs(bounds).min(1), np.abs(bounds).max(1)
    named = frame["family"].str.contains("truncated").to_numpy()
    alone = frame["family"].isin(["normal", "uniform"]).to_numpy()

    # one that is unlike any is none of both: a true law is rejected in 1 case of 10,000
    assert (~(named | alone)).sum() <= 2
    assert not (alone & (frame["family"] == "normal") & ~(frame["uncut_to"] <= near)).any()
    assert not (alone & (frame["family"] == "uniform") & ~(frame["flat_within"] >= -np.expm1(-(far**2) / 2))).any()
    said = frame["looks_like"].str.extract(r", uncut to (\S+) std$|, flat within (\S+) %$").astype(float)
    assert said[0].fillna(3.5)[frame["family"] == "normal"].to_numpy() == pytest.approx(
        frame["uncut_to"].dropna().clip(upper=3.5).to_numpy()
    )
    # ends that a law with a name has go without saying
    assert (said[1] / 100)[said[1].notna()].to_numpy() == pytest.approx(frame["flat_within"][said[1].notna()].to_numpy(), abs=0.01)


def test_what_goes_without_saying_is_not_said_of_many_elements() -> None:
    torch.manual_seed(0)
    many = nn.ParameterList(nn.Parameter(torch.empty(300, 300)) for _ in range(2))
    nn.init.normal_(many[0].detach(), std=0.02)
    nn.init.uniform_(many[1].detach(), -0.07, 0.07)
    frame = paramwatch.summary(many).frame

    assert list(frame["looks_like"]) == ["normal(0, 0.02)", "uniform ±0.07"]
    assert frame["uncut_to"].iloc[0] >= 3.5
    assert frame["flat_within"].iloc[1] <= 0.12


@pytest.mark.parametrize(("width", "cut", "most"), [(16, 1.0, 0), (32, 0.75, 0), (64, 0.75, 5)])
def test_what_is_cut_where_a_named_law_ends_does_not_pass_for_that_law_without_a_word(width: int, cut: float, most: int) -> None:
    torch.manual_seed(7)
    layers = nn.ModuleList(nn.Linear(width, width, bias=False) for _ in range(100))
    for layer in layers:
        nn.init.trunc_normal_(layer.weight, std=width**-0.5 / cut, a=-(width**-0.5), b=width**-0.5)
    frame = paramwatch.summary(layers).frame

    assert (frame["looks_like"] == f"PyTorch default (uniform ±{width**-0.5:.3g})").sum() <= most
    # of 10,000 elements and more a default layer prints as such
    told = paramwatch.summary(nn.Linear(100, 100, bias=False)).frame["looks_like"].iloc[0]
    assert told == "PyTorch default (uniform ±0.1)"


def test_the_widest_fall_of_a_density_is_that_of_all_slopes_and_curves() -> None:
    turn = np.linspace(0.0, np.pi / 2, 20_001)
    slope, curve = math.sqrt(6) * np.sin(turn), math.sqrt(22.5) * np.cos(turn)
    with np.errstate(divide="ignore"):
        falls = np.where(slope >= 2 * curve, 2 * slope, (slope + 2 * curve) ** 2 / 4 / curve)

    assert falls.max() <= vouched._WIDEST <= falls.max() + 0.01


def blocks(w: Tensor) -> None:
    w.normal_(std=0.02)[: len(w) // 3].mul_(0.5)


def scaled_rows(w: Tensor) -> None:
    w.uniform_(-1, 1).mul_(torch.rand(len(w), 1) + 0.5)


def scaled_columns(w: Tensor) -> None:
    w.normal_().mul_(torch.rand(w.shape[1]) + 0.5)


def a_product_added(w: Tensor) -> None:
    w.normal_(std=0.02).add_(0.012 * torch.randn(len(w), 1) * torch.randn(w.shape[1]))


@pytest.mark.parametrize("fill", [blocks, scaled_rows, scaled_columns, a_product_added])
@pytest.mark.parametrize(("shape", "draws"), [((64, 48), 40), ((300, 200), 3)])
def test_what_is_not_of_one_scale_is_named_after_no_law(fill: Callable[[Tensor], object], shape: tuple[int, int], draws: int) -> None:
    found = looks(lambda: nn.Linear(*shape, bias=False), lambda w: fill(w.data), draws)

    assert all(text.startswith("unlike") for text in found)


@pytest.mark.parametrize("law", [law for law in RECOGNITION["OTHERS"] if law != "triangular"])
@pytest.mark.parametrize("width", [100, 256])
def test_a_law_that_was_not_tried_is_hardly_ever_named_alone_from_ten_thousand_elements_on(law: str, width: int) -> None:
    found = RECOGNITION["families"](RECOGNITION["OTHERS"][law], width, 30)

    assert found["unlike"] >= 27, found


@pytest.mark.parametrize("mean", [0.5, 1.0])
def test_a_lopsided_cut_is_recognised_in_99_of_100_draws_where_some_of_its_elements_are_looked_at(mean: float) -> None:
    found = looks(lambda: nn.Linear(64, 500, bias=False), lambda w: init.trunc_normal_(w, mean), 200)

    assert sum(text.startswith("truncated normal") for text in found) >= 198, Counter(found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_uniform_numbers_between_bounds_that_are_rounded_keep_their_ends(dtype: torch.dtype) -> None:
    found = Counter(looks(lambda: nn.Linear(64, 500, bias=False, dtype=dtype), lambda w: init.uniform_(w, -0.3, 0.1), 100))

    assert sum(n for text, n in found.items() if text.startswith("uniform(-0.3, 0.1)")) >= 99, found


@pytest.mark.parametrize("n", [256, 1024, 4096])
def test_how_laws_are_departed_from_is_found_in_a_true_one_in_less_than_one_case_of_a_thousand(n: int) -> None:
    random = np.random.default_rng(0)
    torch.manual_seed(0)
    uniform, normal, cut = (
        Ragged.of(list(np.sort(drawn)))
        for drawn in (random.random((4000, n)), random.normal(size=(4000, n)), init.trunc_normal_(torch.empty(4000, n)).numpy())
    )
    one, off = np.ones(4000), normal.flat - normal.each(normal.means(normal.flat))

    assert departures.have_soft_ends(uniform, 0.0).sum() <= 4
    assert departures.have_heavy_tails(normal.like(off * off)).sum() <= 4
    assert departures.are_bent(cut, 0 * one, one, -2 * one, 2 * one).sum() <= 4
