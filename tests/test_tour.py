"""The walk through the chapter and the notebook run, and what they say is so."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture(scope="module")
def tour(tmp_path_factory: pytest.TempPathFactory) -> str:
    """What the tour prints on a terminal of 100 columns; both its streams must be free of warnings."""
    done = subprocess.run(
        [sys.executable, EXAMPLES / "04_book_tour.py"],
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=120,
        cwd=tmp_path_factory.mktemp("tour"),
        env={**os.environ, "COLUMNS": "100", "PYTHONIOENCODING": "utf-8"},
    )
    assert done.returncode == 0, done.stderr
    assert not done.stderr
    return done.stdout


def stop(tour: str, title: str) -> str:
    """What is printed under a heading."""
    after = tour.split(f"\n{title}\n{'-' * len(title)}\n")[1]
    return re.split(r"\n\n[^\n]+\n-+\n", after)[0]


def test_tour_fits_its_terminal(tour: str) -> None:
    assert max(map(len, tour.splitlines())) <= 100


def test_a_parameter_has_no_gradient_before_the_first_backward(tour: str) -> None:
    assert re.search(r"net\[2\]\.weight\.grad +None", stop(tour, "Access: one target"))


def test_nested_blocks_are_reached_by_index_and_by_name(tour: str) -> None:
    shown = stop(tour, "Access: nested blocks")
    by_index = re.search(r"norm of rgnet\[0\]\[1\]\[0\]\.bias\.grad +([\d.]+)", shown)[1]
    by_name, update = re.search(r"grad_norm of '0.block 1.0.bias' +([\d.]+), and the step moved it by ([\d.]+)", shown).groups()
    assert by_index == by_name
    assert float(update) == pytest.approx(0.1 * float(by_name), rel=0.01)
    assert "'0.block 0.0.weight'" in shown


@pytest.mark.parametrize(
    ("title", "seen"),
    {
        "PyTorch's default": ["0.weight.*PyTorch default", "2.weight.*PyTorch default"],
        "normal(0, 0.01), zero bias": [r"0.weight.*normal\(0, 0.01\)", "0.bias.*zeros"],
        "constant 1": ["0.weight.*ones", "symmetry"],
        "Xavier on one layer, 42 on another": ["0.weight.*Xavier uniform", "2.weight.*constant 42", "symmetry"],
        "a way of your own": [r"0.weight.*zeros, else ±uniform\(5, 10\)", r"2.weight.*±uniform\(5, 10\)"],
        "set by hand": ["0.weight.*unlike any standard one: 42 stands apart"],
    }.items(),
)
def test_each_initialisation_is_named(tour: str, title: str, seen: list[str]) -> None:
    shown = " ".join(stop(tour, f"Initialisation: {title}").split("\n"))
    for pattern in seen:
        assert re.search(pattern, shown), shown


def test_ties_are_told_from_copies_and_from_shared_memory(tour: str) -> None:
    assert re.search(r"net\[2\] 100\.0\n2\.weight = 4\.weight", stop(tour, "Tying: one layer at two places"))
    assert "0.weight = 2.weight: one tensor" in stop(tour, "Tying: two layers that hold one Parameter")
    assert "64 elements" in stop(tour, "Tying: before the shape is known")
    unequal = stop(tour, "Tying: equal values are not a tie")
    assert re.search(r"equal values +True\ntie groups +\(\)\n.* 100\.0\n", unequal)
    assert "0.bias = 2.bias: one tensor" in stop(tour, "Tying: two layers that hold one Parameter")
    assert re.search(r"rows before the first forward +0\nrows after the first step +1\n", stop(tour, "Tying: before the shape is known"))
    assert "This is not tying" in " ".join(unequal.split())


def test_sharing_saves_what_the_inventory_counts(tour: str) -> None:
    shown = stop(tour, "Tying: why sharing is a good idea")
    assert "432 numbers for 44,236,800: 176,945,472 bytes saved" in shown
    assert "64,000 numbers for 128,000: 256,000 bytes saved" in shown
    assert len(re.findall(r"(?:Conv2d|RNNCell|Autoencoder|ModuleDict): \d parameter tensor", tour)) == 4


def test_a_constant_is_no_parameter_and_a_layer_used_twice_is_one(tour: str) -> None:
    shown = stop(tour, "Exercise: access the parameters of every layer")
    assert "1 buffer of 400 elements" in shown
    assert shown.count("    linear    ") == 3
    summed, whole = (re.search(rf"gradient norm of {of} +([\d.]+)", shown)[1] for of in ("their sum", r"linear\.weight"))
    assert summed == whole


def test_notebook_runs_and_shows_the_watch() -> None:
    notebook = nbformat.read(EXAMPLES / "05_notebook.ipynb", as_version=4)
    NotebookClient(notebook, timeout=120, resources={"metadata": {"path": str(EXAMPLES)}}).execute()
    shown = [output["data"] for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs if "data" in output]
    pages = [data["text/html"] for data in shown if "text/html" in data]
    assert any("Watch in memory: SharedMLP, 6 rows (8 names), 300 steps" in page for page in pages)
    assert any("2.weight = 4.weight" in page for page in pages)
    assert any("image/png" in data for data in shown)
