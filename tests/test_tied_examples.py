"""`examples/06_tied_gradients.py`: what it prints of each training is what the trainings show."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def printed() -> str:
    command = [sys.executable, ROOT / "examples" / "06_tied_gradients.py", "--effort=0.1"]
    done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", timeout=240)
    assert done.returncode == 0, done.stderr
    assert not done.stderr
    return done.stdout


def lines_of(section: str) -> dict[str, list[float]]:
    found = re.findall(r"^(\w+(?: \d+)?) +((?:-?[\d.]+(?:e-?\d+)? *)+)$", section, re.MULTILINE)
    return {name: [float(number) for number in numbers.split()] for name, numbers in found}


def test_the_head_of_a_tied_language_model_drowns_the_embedding_early_on(printed: str) -> None:
    lines = lines_of(printed.split("\n2. ")[0])

    assert {"0", "30"} <= set(lines)
    embed, head, ratio, share, _ = lines["30"]
    assert ratio == pytest.approx(head / embed, rel=0.02)
    assert ratio > 10
    assert share > 0.95
    assert lines["0"][2] < 2


def test_a_tanh_cell_learns_from_its_last_moments_only(printed: str) -> None:
    lines = lines_of(printed.split("\n2. ")[1].split("\n3. ")[0])

    default, orthogonal = lines["horizon"]
    assert default < 15
    assert orthogonal > 2 * default
    assert lines["moment 1"][0] < 1e-9 * lines["moment 59"][0]
    assert 0.2 < lines["grad_norm"][0] / lines["grad_norm"][1] < 5


def test_the_halves_of_a_discriminator_cancel(printed: str) -> None:
    lines = lines_of(printed.split("\n3. ")[1])

    for real, fake, total, agreement, coherence in lines.values():
        assert coherence == pytest.approx(total / (real + fake), abs=0.01)
        assert agreement < -0.8
    assert lines["100"][4] < 0.15


def test_it_fits_a_terminal_of_100_columns(printed: str) -> None:
    assert max(map(len, printed.splitlines())) <= 100
