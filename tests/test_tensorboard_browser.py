"""What a reader sees first in a real browser, of a run of six rows and of one of 1,500, both trained and recorded here.

`--screenshots FOLDER` keeps the pictures for a human to look at; the one in the README is of this making.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import browser
import numpy as np
import pytest
import torch
from PIL import Image
from servers import tensorboard
from torch import Tensor, nn

import paramwatch
from paramwatch.tensorboard.address import first_view

pytestmark = pytest.mark.skipif(browser.MISSING is not None, reason=str(browser.MISSING))

EXAMPLES = Path(__file__).parents[1] / "examples"
NAMES = ("two  words", 'it\'s "quoted"/a//b', "line\nbreak", "\U0001f525 größe <b>&amp;%20?#|\\")
WHOLE = {f"{statistic}/({what})" for statistic in ("grad_norm", "update_ratio") for what in ("all", "heat map", "log10 of each")}

CARDS = """
return [...document.querySelectorAll("card-view")].map(card => {
  const box = card.getBoundingClientRect(), image = card.querySelector("img");
  return {
    text: card.innerText.replace(/\\s+/g, " "),
    title: (card.querySelector("tb-truncated-path") || card).innerText.replace(/\\s+/g, ""),
    tag: (card.querySelector("tb-truncated-path") || card).title,
    box: [box.left, box.top, box.right, box.bottom],
    drawn: image ? image.complete && image.naturalWidth : card.querySelectorAll("svg path, canvas").length,
    waiting: card.querySelectorAll("mat-spinner").length,
    empty: card.querySelectorAll(".empty-message").length,
  };
}).filter(card => card.box[2] > 0);
"""


class Block(nn.Module):
    """Twelve parameters: attention with one head and a small MLP, each behind a norm."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.norm1, self.qkv, self.out = nn.LayerNorm(size), nn.Linear(size, 3 * size), nn.Linear(size, size)
        self.norm2, self.up, self.down = nn.LayerNorm(size), nn.Linear(size, 2 * size), nn.Linear(2 * size, size)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm1(x)).chunk(3, dim=-1)
        x = x + self.out(torch.softmax(q @ k.transpose(-1, -2), dim=-1) @ v)
        return x + self.down(torch.relu(self.up(self.norm2(x))))


def six_rows(folder: Path) -> None:
    """The exercise of the examples."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", [str(EXAMPLES), *sys.path])
        from shared_mlp import LEARNING_RATE, SEED, SharedMLP, batches, loss_of
    torch.manual_seed(SEED)
    net = SharedMLP()
    optimizer = torch.optim.SGD(net.parameters(), lr=LEARNING_RATE)
    with paramwatch.attach(net, folder):
        for _ in range(10):
            for measurements, answers in batches():
                optimizer.zero_grad()
                loss_of(net(measurements), answers).backward()
                optimizer.step()


def many_rows(folder: Path) -> None:
    """A transformer of 125 blocks, whose gradient is not a number for the last few steps of one layer."""
    torch.manual_seed(0)
    net = nn.Sequential()
    net.layers = nn.Sequential(*(Block(4) for _ in range(125)))
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3)
    x = torch.randn(8, 6, 4)
    with paramwatch.attach(net, folder) as watch:
        for step in range(24):
            optimizer.zero_grad()
            (net.layers(x) - x.flip(1)).square().mean().backward()
            if step >= 20:
                net.layers[70].up.weight.grad[0, 0] = torch.nan
            optimizer.step()
        assert len(watch.parameters) == 1500


def odd_names(folder: Path) -> None:
    """A model whose names are hard to show, with histograms of its elements."""
    net = nn.Module()
    for name in NAMES:
        net.register_parameter(name, nn.Parameter(torch.arange(4.0)))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.02)
    with paramwatch.attach(net, folder, histograms=2):
        for _ in range(12):
            optimizer.zero_grad()
            torch.stack([(param - i).square().sum() for i, param in enumerate(net.parameters())]).sum().backward()
            optimizer.step()


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    six_rows(folder / "six")
    many_rows(folder / "many")
    odd_names(folder / "names")
    torch.set_num_threads(threads)
    return folder


@pytest.fixture(scope="module")
def address(runs: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with tensorboard(runs, tmp_path_factory.mktemp("server") / "log.txt") as found:
        yield found


@pytest.fixture(scope="module")
def window(tmp_path_factory: pytest.TempPathFactory) -> Iterator[browser.Browser]:
    with browser.browser(tmp_path_factory.mktemp("browser"), 1440, 1200) as found:
        yield found


def shown(window: browser.Browser, address: str, cards: int) -> list[dict[str, Any]]:
    """The cards of a page once those that can be seen are drawn."""
    window.open("about:blank")
    window.open(address)
    drawn = "card.box[1] > innerHeight || card.drawn && !card.waiting"
    window.wait(f"const all = (() => {{{CARDS}}})(); return all.length >= {cards} && all.every(card => {drawn});")
    found: list[dict[str, Any]] = window.run(CARDS)
    return found


def settled(window: browser.Browser, file: Path) -> Any:
    """The pixels of the page once nothing moves any more, also kept as a file."""
    seen = b""
    for _ in range(60):
        time.sleep(1)
        window.screenshot(file)
        if file.read_bytes() == seen:
            return np.asarray(Image.open(file).convert("RGB"))
        seen = file.read_bytes()
    raise AssertionError("the page goes on changing")


def disjoint(one: list[float], other: list[float]) -> bool:
    return one[2] <= other[0] or other[2] <= one[0] or one[3] <= other[1] or other[3] <= one[1]


def assert_drawn(card: dict[str, Any], pixels: Any) -> None:
    """Something is in the plot, if all of the card is on the page: its frame, axes and letters are grey, what is drawn is not."""
    left, top, right, bottom = map(round, card["box"])
    if bottom <= len(pixels):
        plot = pixels[top + 50 : top + 270, left + 20 : right - 20].astype(int)
        assert (np.ptp(plot, axis=-1) > 20).sum() > 150, card["tag"]


@pytest.mark.parametrize("run", ["six", "many"])
def test_the_first_view_shows_a_whole_model_without_a_click(
    run: str, window: browser.Browser, address: str, screenshots: Path | None, tmp_path: Path
) -> None:
    cards = shown(window, first_view(address).replace("?", f"?runFilter=^{run}/&"), cards=len(WHOLE))
    pixels = settled(window, (screenshots or tmp_path) / f"{run}.png")

    assert window.run("return [...document.querySelectorAll('.scalars-smoothing .slider-input')].map(input => input.value)") == ["0"]
    assert {card["tag"] for card in cards} == WHOLE
    assert len(cards) == len(WHOLE)
    assert not any(card["empty"] for card in cards)
    for i, card in enumerate(cards):
        assert f"{run}/paramwatch" in card["text"]
        assert all(disjoint(card["box"], other["box"]) for other in cards[:i])
        assert_drawn(card, pixels)


def test_names_are_shown_as_they_are_and_histograms_of_each_are_drawn(
    window: browser.Browser, address: str, screenshots: Path | None, tmp_path: Path
) -> None:
    window.resize(1440, 2400)
    cards = shown(window, f"{address}?smoothing=0&runFilter=^names/&tagFilter=^grad(_norm)?/[^0-9(]#timeseries", cards=2 * len(NAMES))
    pixels = settled(window, (screenshots or tmp_path) / "names.png")

    expected = {f"{statistic}/{name}" for statistic in ("grad", "grad_norm") for name in NAMES}
    seen = {card["tag"]: card for card in cards if "names/paramwatch" in card["text"]}
    assert set(seen) == expected
    # HTML shows a line feed as a space and neighbouring spaces as one
    assert {tag: card["title"] for tag, card in seen.items()} == {tag: "".join(tag.split()) for tag in expected}
    for card in seen.values():
        assert not card["empty"]
        assert_drawn(card, pixels)
