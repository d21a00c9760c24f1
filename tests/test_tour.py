"""The walk through the chapter and the notebook run, and what they say is so."""

from __future__ import annotations

import copy
import csv
import math
import os
import re
import runpy
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import nbformat
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from nbclient import NotebookClient
from torch import Tensor, nn

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture(scope="module")
def tour(tmp_path_factory: pytest.TempPathFactory) -> str:
    """What the tour prints into a pipe, for which it takes 80 columns; both its streams must be free of warnings."""
    done = subprocess.run(
        [sys.executable, EXAMPLES / "04_book_tour.py"],
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=120,
        cwd=tmp_path_factory.mktemp("tour"),
        env={**{name: value for name, value in os.environ.items() if name != "COLUMNS"}, "PYTHONIOENCODING": "utf-8"},
    )
    assert done.returncode == 0, done.stderr
    assert not done.stderr
    return done.stdout


@pytest.fixture
def page(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], dict[str, object]]:
    """Opens a file of the tour, here."""
    monkeypatch.syspath_prepend(EXAMPLES)
    return lambda name: runpy.run_path(str(EXAMPLES / f"{name}.py"))


def stop(tour: str, title: str) -> str:
    """What is printed under a heading."""
    after = tour.split(f"\n{title}\n{'-' * len(title)}\n")[1]
    return re.split(r"\n\n[^\n]+\n-+\n", after)[0]


def test_tour_fits_a_pipe(tour: str) -> None:
    assert max(map(len, tour.splitlines())) == 80


@pytest.mark.parametrize("columns", [60, 100])
def test_tour_fits_its_terminal(
    columns: int, page: Callable[[str], dict[str, object]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setattr(sys, "argv", ["04_book_tour.py"])
    page("04_book_tour")["main"]()
    lines = capsys.readouterr().out.splitlines()

    assert max(map(len, lines)) == columns
    # prose, and not only the rules of tables, makes use of the width
    assert max(len(line) for line in lines if line.endswith(",") or line[-1:].isalpha()) > columns - 8


def test_a_parameter_has_no_gradient_before_the_first_backward(tour: str) -> None:
    assert re.search(r"net\[2\]\.weight\.grad +None", stop(tour, "Access: one target"))


def test_a_tensor_is_reached_by_its_name(tour: str) -> None:
    by_target = re.search(r"net\[2\]\.bias\.data +(tensor\(.+\))", stop(tour, "Access: one target"))[1]

    assert re.search(r"net\.state_dict\(\)\['2\.bias'\] +(.+)", stop(tour, "Access: all at once"))[1] == by_target


def test_nested_blocks_are_reached_by_index_and_by_name(tour: str) -> None:
    shown = stop(tour, "Access: nested blocks")
    by_index = re.findall(r"(?:rgnet\[0\]\[1\]\[0\]\.bias(?:\.grad| before)|the bias moved) +([\d.]+)$", shown, re.MULTILINE)
    by_name = re.findall(r"(?:param|grad|update)_norm of '0\.block 1\.0\.bias' +([\d.]+)$", shown, re.MULTILINE)
    assert len(by_index) == 3
    assert by_index == by_name
    assert float(by_name[2]) == pytest.approx(0.1 * float(by_name[1]), rel=0.01)
    assert re.search(r"^the first +'0\.block 0\.0\.weight'$", shown, re.MULTILINE)


@pytest.mark.parametrize(
    ("title", "seen"),
    {
        "PyTorch's default": ["0.weight.*PyTorch default", "2.weight.*PyTorch default"],
        "Gluon's default": [r"0.weight.*uniform ±0.07", "0.bias.*zeros", r"2.weight.*uniform ±0.07"],
        "nn.init's defaults": [r"0.weight.*uniform\(0, 1\)", r"2.weight.*normal\(0, 1\)"],
        "normal(0, 0.01)": [r"0.weight.*normal\(0, 0.01\)", "0.bias.*zeros"],
        "constant 1": ["0.weight.*ones", "symmetry", "the last layer: they part if their targets differ"],
        "Xavier and 42": ["0.weight.*Xavier uniform", "2.weight.*constant 42", "symmetry"],
        "a way of your own": [r"0.weight.*zeros, else ±uniform\(5, 10\)", r"2.weight.*±uniform\(5, 10\)"],
        "set by hand": ["0.weight.*unlike any standard one: 42 stands apart"],
    }.items(),
)
def test_each_initialisation_is_named(tour: str, title: str, seen: list[str]) -> None:
    shown = " ".join(stop(tour, f"Initialisation: {title}").split("\n"))
    for pattern in seen:
        assert re.search(pattern, shown), shown


def test_the_shapes_of_the_initialised_net_are_shown_once(tour: str) -> None:
    assert re.search(
        r"0\.weight +\(64, 16\)\n0\.bias +\(64,\)\n2\.weight +\(32, 64\)\n2\.bias +\(32,\)", stop(tour, "Initialisation: the net")
    )
    assert tour.count("(64, 16)") == 1


def test_ties_are_told_from_copies_and_from_shared_memory(tour: str) -> None:
    assert re.search(r"net\[2\] +100\.0\n2\.weight = 4\.weight", stop(tour, "Tying: one layer at two places"))
    assert "0.weight = 2.weight: one tensor" in stop(tour, "Tying: two layers that hold one Parameter")
    assert "64 elements" in stop(tour, "Tying: before the shape is known")
    unequal = stop(tour, "Tying: equal values are not a tie")
    assert re.search(r"equal values +True\ntie groups +\(\)\n.* 100\.0\n", unequal)
    assert "0.bias = 2.bias: one tensor" in stop(tour, "Tying: two layers that hold one Parameter")
    assert re.search(
        r"rows before the first forward +0\nrows after the first step +6\n.+ 100\.0\n2\.weight = 4\.weight",
        stop(tour, "Tying: before the shape is known"),
    )
    assert "This is not tying" in " ".join(unequal.split())


def test_the_terms_of_a_tied_gradient_are_what_layers_of_their_own_would_get(tour: str) -> None:
    shown = stop(tour, "Tying: what becomes of the gradient")
    torch.manual_seed(0)
    nn.Linear(8, 8), nn.Linear(4, 8), nn.Linear(8, 1)  # of the stop before
    second, first, last = nn.Linear(8, 8), nn.Linear(4, 8), nn.Linear(8, 1)
    fourth = copy.deepcopy(second)
    nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), fourth, nn.ReLU(), last)(torch.rand(2, 4)).sum().backward()
    terms = [layer.weight.grad.double() for layer in (second, fourth)]
    whole = sum(terms)
    for use, term in zip((2, 4), terms, strict=True):
        told = re.search(rf"^[\w.]* +{use} +(\S+) +(\S+)$", shown, re.MULTILINE)
        expected = [float(term.norm()), float((term * whole).sum() / whole.square().sum())]
        assert [float(number) for number in told.groups()] == pytest.approx(expected, rel=1e-3)
    cosine = float(F.cosine_similarity(*(term.flatten() for term in terms), dim=0))
    agreement, norm = re.search(r"agreement .*\nparameter *\n2\.weight +(\S+) +(\S+)", shown).groups()
    assert [float(agreement), float(norm)] == pytest.approx([cosine, float(whole.norm())], rel=1e-3)


def test_a_tied_decoder_makes_its_encoder_orthogonal_and_one_of_its_own_does_not(tour: str) -> None:
    shown = stop(tour, "Tying: what a tied decoder makes of its encoder")
    tied, own = (re.search(rf"^decoder {kind} +\S+ +(\S+) +(.+)$", shown, re.MULTILINE).groups() for kind in ("= encoder", "of its own"))
    assert float(tied[0]) < 1e-5
    assert tied[1] == "orthogonal"
    assert float(own[0]) > 0.1
    assert "orthogonal" not in own[1]


def test_sharing_saves_what_the_inventory_counts(tour: str) -> None:
    shown = stop(tour, "Tying: why sharing is a good idea")
    assert [
        re.search(rf"^{case}.* ([\d,]+) +([\d,]+) +([\d,]+)$", shown, re.MULTILINE).groups() for case in ("CNN", "RNN", "auto", "lang")
    ] == [
        ("432", "44,236,800", "176,945,472"),
        ("6,272", "125,440", "476,672"),
        ("1,024", "2,048", "4,096"),
        ("64,000", "128,000", "256,000"),
    ]
    assert len(re.findall(r"(?:Conv2d|RNNCell|Autoencoder|ModuleDict): \d parameter tensor", tour)) == 4


def test_a_constant_is_no_parameter_and_a_layer_used_twice_is_one(tour: str) -> None:
    shown = stop(tour, "Exercise: access the parameters of every layer")
    assert "1 buffer of 400 elements" in shown
    assert len(re.findall(r"^\d +linear ", shown, re.MULTILINE)) == 3


def test_each_use_of_a_layer_adds_what_its_own_weight_would_get(tour: str) -> None:
    torch.manual_seed(0)
    constant, linear, x = torch.rand(20, 20), nn.Linear(20, 20), torch.rand(2, 20)

    def output(first: Tensor, second: Tensor) -> Tensor:
        y = F.linear(torch.relu(F.linear(x, first, linear.bias) @ constant + 1), second, linear.bias)
        while y.abs().sum() > 1:
            y = y / 2
        return y.sum()

    split = [linear.weight.detach().clone().requires_grad_() for _ in range(2)]
    first, second = torch.autograd.grad(output(*split), split)
    (whole,) = torch.autograd.grad(output(linear.weight, linear.weight), linear.weight)
    shown = re.findall(r"^gradient norm of .+ ([\d.]+)$", stop(tour, "Exercise: access the parameters of every layer"), re.MULTILINE)

    assert torch.equal(first + second, whole)
    assert shown == [f"{gradient.norm():.4f}" for gradient in (first, second, first + second, whole)]
    assert shown == ["1.0915", "2.1181", "2.1965", "2.1965"]


def test_the_first_ten_steps_are_those_of_a_loop_in_plain_torch(tour: str, page: Callable[[str], dict[str, object]]) -> None:
    shown = stop(tour, "Exercise: initialisers, compared by their first ten steps")

    for title, (_, apply) in page("book_initialisation")["WAYS"].items():
        line = re.search(rf"^{re.escape(title)} +(.+)$", shown, re.MULTILINE)[1]
        assert [float(number) for number in line.split()] == pytest.approx(ten_steps(apply), rel=6e-3), title


def ten_steps(apply: Callable[[nn.Module], None]) -> list[float]:
    """First and last loss, and medians of gradient norm and update ratio of each weight."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 32), nn.ReLU(), nn.Linear(32, 1))
    apply(net)
    weights = [net[0].weight, net[2].weight]
    losses, norms, ratios = [], [], []
    for x, y in irises():
        losses.append(F.binary_cross_entropy_with_logits(net(x), y))
        gradients = dict(zip(net.parameters(), torch.autograd.grad(losses[-1], list(net.parameters())), strict=True))
        norms.append([float(gradients[weight].norm()) for weight in weights])
        ratios.append([0.1 * float(gradients[weight].norm() / weight.detach().norm()) for weight in weights])
        with torch.no_grad():
            for parameter, gradient in gradients.items():
                parameter -= 0.1 * gradient
    medians = [statistics.median(values) for table in (norms, ratios) for values in zip(*table, strict=True)]
    return [losses[0].item(), losses[-1].item(), *medians]


def irises() -> list[tuple[Tensor, Tensor]]:
    """Ten batches of ten."""
    with (EXAMPLES / "data" / "iris.csv").open() as file:
        lines = list(csv.DictReader(file))
    y = torch.tensor([[float(line.pop("species") == "virginica")] for line in lines])
    x = torch.tensor([[float(number) for number in line.values()] for line in lines], dtype=torch.float64)
    order = torch.randperm(150, generator=torch.Generator().manual_seed(0))
    x = ((x - x.mean(0)) / x.std(0)).float()
    return list(zip(x[order].split(10)[:10], y[order].split(10)[:10], strict=True))


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        (
            {"a": (1.0, 0.5, 0.1, 0.2), "b": (2.0, 1.99, 0.4, 0.3), "c": (9.0, 1.0, 0.3, 0.05)},
            (
                "(a first loss of more than twice that): 'b', 'c'.",
                "changed least, by 0.5%, with 'b': 2 became 1.99.",
                "longest steps, 0.4 of a weight's norm, are those of weight 0 with 'b'.",
                "shortest steps, 0.05 of a weight's norm, are those of weight 2 with 'c'.",
            ),
        ),
        (
            {"a": (0.5, 0.5, 0.1, 0.2), "b": (0.7, 1.4, 0.01, 0.3)},
            (
                "(a first loss of more than twice that): none.",
                "changed least, by 0.0%, with 'a': 0.5 became 0.5.",
                "longest steps, 0.3 of a weight's norm, are those of weight 2 with 'b'.",
                "shortest steps, 0.01 of a weight's norm, are those of weight 0 with 'b'.",
            ),
        ),
    ],
    ids=["some are wrong", "none is wrong"],
)
def test_what_the_comparison_shows_is_read_off_its_numbers(
    lines: dict[str, tuple[float, ...]], said: tuple[str, ...], page: Callable[[str], dict[str, object]]
) -> None:
    table = pd.DataFrame.from_dict(lines, orient="index", columns=["loss 1", "loss 10", "ratio 0", "ratio 2"])
    sentences = list(page("book_exercises")["learned_from"](table))

    assert sentences[0].startswith(f"Guessing costs ln 2 = {math.log(2):.3f}.")
    for sentence, end in zip(sentences, said, strict=True):
        assert sentence.endswith(end)


def test_notebook_runs_and_shows_the_watch() -> None:
    notebook = nbformat.read(EXAMPLES / "05_notebook.ipynb", as_version=4)
    NotebookClient(notebook, timeout=120, resources={"metadata": {"path": str(EXAMPLES)}}).execute()
    shown = [output["data"] for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs if "data" in output]
    pages = [data["text/html"] for data in shown if "text/html" in data]
    assert any("Watch in memory: SharedMLP, 6 rows (8 names), 300 steps" in page for page in pages)
    assert any("2.weight, 4.weight" in page for page in pages)
    assert any("image/png" in data for data in shown)
