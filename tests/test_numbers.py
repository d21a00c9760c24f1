"""Every column of every row against a recomputation in float64, over real training of each model of the menagerie."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import truth
from models import BY_NAME, CASES, Case, loss_of, shared_mlp
from torch import nn
from truth import Truth

import paramwatch
from paramwatch import Watch

STEPS = 3
SPECIAL = {"nan": float("nan"), "+inf": float("inf"), "-inf": float("-inf")}


def train(case: Case, steps: int = STEPS, clip: Callable[[nn.Module], object] | None = None, **options: Any) -> tuple[Watch, list[Truth]]:
    """Train a model while it is watched, and beside it keep what happened."""
    model, optimizer = case.build()
    if any(isinstance(parameter, nn.parameter.UninitializedParameter) for parameter in model.parameters()):
        model(case.batch())
    happened = []
    with paramwatch.attach(model, **{"update": "exact", "raw_gradients": True} | options) as watch:
        for _ in range(steps):
            optimizer.zero_grad()
            loss_of(model, case.batch()).backward()
            happened.append(truth.step(model, optimizer, clip and (lambda: clip(model))))
    return watch, happened


def differences(frame: pd.DataFrame, happened: list[Truth], finite: bool = False) -> list[str]:
    """What in the numeric columns of a frame is not as it should be."""
    wrong = []
    for (number, name), line in frame.drop(columns=["lr", "grad_state"]).iterrows():
        expected = truth.columns(happened[number], name, finite)
        for column, found in line.items():
            value = np.nan if found is pd.NA else float(found)
            exact = float(np.float32(expected[column])) if column.endswith(("_min", "_max")) else expected[column]
            allowed = 0.0 if value == exact or not np.isfinite(exact) else truth.tolerance(column, happened[number], name, finite)
            if not (value == exact or (np.isnan(value) and np.isnan(exact)) or abs(value - exact) <= allowed):
                wrong.append(f"step {number}, {name!r}, {column}: {value!r}, expected {exact!r}")
    return wrong


@pytest.mark.parametrize("detail", ["cheap", "default", "full"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_column_equals_a_float64_recomputation(case: Case, detail: str) -> None:
    watch, happened = train(case, detail=detail)

    assert len(watch.frame()) == STEPS * len(happened[0].param)
    assert differences(watch.frame(), happened) == []


def test_the_comparison_sees_one_wrong_number() -> None:
    watch, happened = train(BY_NAME["shared_mlp"])
    happened[1].param["2.weight"][5] += 1e-3

    assert {line.split(",")[1] for line in differences(watch.frame(), happened)} == {" '2.weight'"}


def test_full_detail_has_every_column_and_cheap_the_fewest() -> None:
    tables = {detail: set(train(BY_NAME["zero_dim"], 1, detail=detail)[0].frame().columns) for detail in ("cheap", "default", "full")}

    assert tables["full"] - tables["default"] == {"update_cos", "exp_avg_norm", "exp_avg_sq_norm"}
    assert tables["cheap"] >= {"param_norm", "grad_norm", "update_norm", "update_ratio", "grad_abs_max", "grad_nan", "grad_inf", "lr"}
    assert not tables["cheap"] & {"param_mean", "param_std", "grad_zero_frac"}


def test_a_lazy_model_watched_before_its_first_forward_has_true_numbers() -> None:
    case = BY_NAME["lazy"]
    model, optimizer = case.build()
    with paramwatch.attach(model, update="exact") as watch:
        happened = []
        for _ in range(2):
            optimizer.zero_grad()
            loss_of(model, case.batch()).backward()
            happened.append(truth.step(model, optimizer))

    assert differences(watch.frame().drop(columns=["grad_raw_norm", "clip_coef"]), happened) == []
    assert len(watch.frame()) == 8


def test_clipped_gradients_are_recorded_as_used_and_as_they_were() -> None:
    watch, happened = train(BY_NAME["shared_mlp"], clip=lambda model: nn.utils.clip_grad_norm_(model.parameters(), 1e-3))

    assert differences(watch.frame(), happened) == []
    assert watch.frame("clip_coef").max().max() < 1


def test_without_raw_gradients_the_columns_before_clipping_are_null() -> None:
    frame = train(BY_NAME["zero_dim"], 1, raw_gradients=False)[0].frame()

    assert frame[["grad_raw_norm", "clip_coef"]].isna().all().all()


# ---- steps as a whole -----------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_totals_of_a_step_count_each_tensor_once(case: Case) -> None:
    watch, happened = train(case)

    for number, step in enumerate(happened):
        tensors = {"param_norm": step.param, "grad_norm": step.grad, "update_norm": step.update, "grad_raw_norm": step.grad_raw}
        expected = {total: np.sqrt(sum(np.sum(x * x) for x in rows.values())) for total, rows in tensors.items()}
        assert watch.steps.loc[number, list(expected)].to_dict() == pytest.approx(expected, rel=1e-6)
        assert watch.steps.loc[number, "nonfinite"] == 0


def test_a_tied_tensor_is_counted_once_in_the_total_however_many_names_it_has() -> None:
    watch, happened = train(BY_NAME["shared_mlp"], 1)
    twice = np.sqrt(sum(np.sum(x * x) for x in (*happened[0].param.values(), happened[0].param["2.weight"])))

    assert watch.steps.loc[0, "param_norm"] < twice * (1 - 1e-3)
    assert len(watch.frame(aliases=True)) == len(watch.frame()) + 2


def test_each_row_has_the_learning_rate_of_its_group() -> None:
    model = shared_mlp()
    groups = [{"params": model[0].parameters(), "lr": 0.5}, {"params": [*model[2].parameters(), *model[6].parameters()]}]
    optimizer = torch.optim.SGD(groups, lr=torch.tensor(0.25))
    with paramwatch.attach(model) as watch:
        loss_of(model, torch.randn(3, 4)).backward()
        optimizer.step()
        optimizer.param_groups[0]["lr"] = 0.25
        optimizer.step()

    assert watch.frame("lr").loc[0].to_dict() == {name: 0.5 if name[0] == "0" else 0.25 for name, _ in model.named_parameters()}
    assert watch.steps["lr"].isna().tolist() == [True, False]


# ---- the state of a gradient ----------------------------------------------------------------


def test_the_state_of_a_gradient_tells_absence_from_zero() -> None:
    model = nn.ModuleDict({name: nn.Linear(2, 1, bias=False) for name in ("used", "zero", "none", "frozen", "unowned", "frozen_unowned")})
    for name in ("frozen", "frozen_unowned"):
        model[name].requires_grad_(False)
    optimizer = torch.optim.SGD([model[name].weight for name in ("used", "zero", "none", "frozen")], lr=0.1)
    with paramwatch.attach(model) as watch:
        x = torch.ones(1, 2)
        (model["used"](x) + 0 * model["zero"](x) + model["unowned"](x)).sum().backward()
        optimizer.step()

    states = watch.frame("grad_state").loc[0]
    assert states.to_dict() == {f"{name}.weight": name.split("_")[0] for name in model}
    assert watch.frame("grad_norm").loc[0].isna().to_dict() == {f"{name}.weight": name not in ("used", "zero") for name in model}


def test_a_row_that_no_optimizer_holds_has_its_parameter_measured_at_powers_of_two_and_at_the_end() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 1))
    optimizer = torch.optim.SGD(model[1].parameters(), lr=0.1)
    with paramwatch.attach(model) as watch:
        for _ in range(8):
            loss_of(model, torch.randn(2, 3)).backward()
            optimizer.step()

    norms = watch.frame("param_norm")["0.weight"].dropna()
    assert norms.index.tolist() == [0, 1, 2, 4, 7]
    assert norms.to_list() == pytest.approx([model[0].weight.norm().item()] * 5, rel=1e-6)


# ---- values that are not finite -------------------------------------------------------------


def spoilt_run(where: str, values: tuple[float, ...], optimizer_type: Any = torch.optim.SGD) -> tuple[Watch, Truth]:
    """One step of a net with some values put into the gradient, or the parameter, of its last weight."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 5))
    optimizer = optimizer_type(model.parameters(), lr=0.1)
    with paramwatch.attach(model, update="exact", raw_gradients=True) as watch:
        loss_of(model, torch.randn(3, 4)).backward()
        target = model[1].weight if where == "param" else model[1].weight.grad
        target.detach().view(-1)[: len(values)] = torch.tensor(values)
        happened = truth.step(model, optimizer)
    return watch, happened


@pytest.mark.parametrize("finite", [False, True], ids=["all elements", "finite elements"])
@pytest.mark.parametrize("where", ["grad", "param"])
@pytest.mark.parametrize("kinds", [["nan"], ["+inf"], ["-inf"], ["+inf", "-inf"], ["nan", "nan", "+inf", "-inf"]], ids=" ".join)
def test_non_finite_values_are_counted_and_their_statistics_are_those_of_torch(where: str, kinds: list[str], finite: bool) -> None:
    watch, happened = spoilt_run(where, tuple(SPECIAL[kind] for kind in kinds))

    assert differences(watch.frame(finite=finite), [happened], finite) == []
    counts = watch.frame().loc[(0, "1.weight"), [f"{where}_nan", f"{where}_inf"]]
    assert counts.to_list() == [kinds.count("nan"), len(kinds) - kinds.count("nan")]
    assert watch.steps.loc[0, "nonfinite"] == len(kinds)


def test_a_row_with_no_finite_element_is_measured_all_the_same() -> None:
    watch, happened = spoilt_run("grad", (float("inf"),) * 30)

    assert differences(watch.frame(), [happened]) == []
    assert watch.frame(finite=True).loc[(0, "1.weight"), ["grad_norm", "grad_inf"]].to_list() == [0, 30]


def test_the_first_non_finite_value_is_said_once_with_its_row_and_how_many_followed() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with paramwatch.attach(model) as watch:
        for number in range(4):
            optimizer.zero_grad()
            loss_of(model, torch.randn(3, 2)).backward()
            if number == 1:
                model[0].bias.grad[0] = float("nan")
                model[1].weight.grad[0] = float("inf")
            optimizer.step()

    found = watch.findings
    assert found[["step", "rule", "parameter"]].values.tolist() == [[1, "first_nonfinite", "0.bias"]]
    assert "1 NaN and 0 infinite of 2 elements (1 other row in the same step)" in found["message"][0]


def test_a_finite_run_has_no_findings() -> None:
    assert train(BY_NAME["shared_mlp"])[0].findings.empty


# ---- the update, by other means -------------------------------------------------------------


def test_a_sampled_update_of_a_small_row_is_exact_but_for_its_extremes() -> None:
    watch, happened = train(BY_NAME["shared_mlp"], update="sampled")
    frame = watch.frame()

    assert differences(frame.drop(columns=["update_abs_max"]), happened) == []
    assert frame["update_abs_max"].isna().all()
    assert set(watch.steps["update_mode"]) == {"sampled"}


@pytest.mark.parametrize("shape", [(300, 1000), (4097,), (512, 512)], ids=str)
def test_a_sampled_update_of_a_large_row_is_an_estimate_within_a_few_percent(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    model = nn.ParameterList([nn.Parameter(torch.randn(shape))])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with paramwatch.attach(model, update="sampled") as watch:
        model[0].grad = torch.randn(shape)
        happened = truth.step(model, optimizer)

    expected = float(np.linalg.norm(happened.update["0"]))
    assert watch.frame("update_norm").loc[0, "0"] == pytest.approx(expected, rel=0.05)
    assert watch.steps.loc[0, "update_norm"] == pytest.approx(expected, rel=0.05)


def test_with_update_off_nothing_is_known_of_the_update_and_all_else_is_as_ever() -> None:
    watch, happened = train(BY_NAME["shared_mlp"], update="off", detail="full")
    of_update = ["update_norm", "update_abs_max", "update_ratio", "update_cos"]

    assert watch.frame()[of_update].isna().all().all()
    assert watch.steps["update_norm"].isna().all()
    assert differences(watch.frame().drop(columns=of_update), happened) == []


def test_the_direction_of_plain_gradient_descent_is_the_negative_gradient() -> None:
    case = BY_NAME["complex"]
    watch, _ = train(Case("descent", case.make, case.batch, lambda ps: torch.optim.SGD(ps, lr=0.1)), detail="full")

    assert watch.frame()["update_cos"].to_list() == pytest.approx([1.0] * STEPS * 4, abs=1e-6)
    assert watch.frame()["exp_avg_norm"].isna().all()
