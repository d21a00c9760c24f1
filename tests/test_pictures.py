"""The running levels of a heat map against all of them at once, and the picture made of them."""

from __future__ import annotations

import io

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from paramwatch.columns import Array
from paramwatch.heatmap import INFINITE, MISSING, NOT_FINITE, NOT_MEASURED, PALETTE, ZERO, Scale
from paramwatch.tensorboard import strip
from paramwatch.tensorboard.picture import HEIGHT, PLOT_HEIGHT, WIDTH, _labels, picture
from paramwatch.tensorboard.strip import Strip


@settings(max_examples=60)
@given(st.lists(st.tuples(st.integers(1, 30), st.booleans()), min_size=1, max_size=8), st.integers(1, 4), st.integers(0, 5))
def test_a_strip_holds_of_the_steps_of_each_column_the_greatest(batches: list[tuple[int, bool]], rows: int, first: int) -> None:
    rng, kept, step = np.random.default_rng(rows), {}, first
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(strip, "MOST_COLUMNS", 16)
        found = Strip()
        for size, again in batches:
            # the last step comes again, with other numbers
            start = step - 1 if again and step > first else step
            numbers = range(start, start + size)
            values = rng.uniform(MISSING, 9, (size, rows)).astype(np.float32)
            found.add(numbers, {"grad_norm": values})
            kept |= dict(zip(numbers, values, strict=True))
            step = start + size
    steps, levels = sorted(kept), found.levels("grad_norm")
    assert found.steps == len(steps)
    assert found.last == steps[-1]
    assert len(found.first) <= 16
    for column, (begin, end) in enumerate(zip(found.first, [*found.first[1:], step], strict=True)):
        assert levels[:, column].tolist() == np.max([kept[i] for i in range(begin, end)], axis=0).tolist()


def test_a_strip_of_many_rows_takes_neighbours_together() -> None:
    found = Strip()
    values = np.arange(1720, dtype=np.float32)[None]
    found.add([0], {"grad_norm": values})
    assert found.levels("grad_norm")[:, 0].tolist() == list(range(9, 1720, 10))


def drawn(levels: Array, names: list[str]) -> Array:
    """The pixels of the picture, [height, width, 3]."""
    columns = levels.shape[1]
    data, width, height = picture(levels, names, range(0, 10 * columns, 10), 10 * columns - 1)
    pixels = np.asarray(Image.open(io.BytesIO(data)).convert("RGBA"))[..., :3]
    assert pixels.shape == (height, width, 3) == (HEIGHT, WIDTH, 3)
    return pixels


def test_each_cell_has_its_colour_beside_its_name() -> None:
    levels = np.float32([[1e-3, 1.0], [0.0, MISSING], [INFINITE, 0.1]])
    pixels = drawn(levels, ["a", "b", "c"])
    colours = Scale.of(levels).pixels(levels)
    for (row, column), colour in np.ndenumerate(colours):
        cell = pixels[4 + PLOT_HEIGHT * (2 * row + 1) // 6, 60 + 160 * column]
        assert np.abs(cell.astype(int) - PALETTE[colour][:3]).max() <= 3
    for special in (ZERO, NOT_MEASURED, NOT_FINITE):
        assert (pixels[-14:-4] == PALETTE[special][:3]).all(-1).sum() >= 100


def test_a_single_spoilt_cell_of_many_is_seen() -> None:
    levels = np.ones((172, 512), np.float32)
    levels[100, 300] = INFINITE
    red = (drawn(levels, [f"layers.{i}.weight" for i in range(172)])[: PLOT_HEIGHT + 4] == PALETTE[NOT_FINITE][:3]).all(-1)
    assert red.sum() >= 9


@pytest.mark.parametrize("names", [["w"], ["\U0001f525 größe/\n" * 9, ""], [f"{i}.weight" for i in range(1500)], ["x." * 40 + "y"] * 300])
def test_any_names_make_a_picture_with_something_written_beside_it(names: list[str]) -> None:
    levels = np.full((min(len(names), 172), 1), 0.5, np.float32)
    pixels = drawn(levels, names)
    assert (pixels[: PLOT_HEIGHT + 4, :40] < 200).any()
    assert (pixels[:, -1] == 255).all()


def test_of_more_layers_than_can_be_told_apart_some_are_named() -> None:
    names = ["embed.weight", *(f"layers.{i}.{j}.weight" for i in range(63) for j in range(20)), "head.weight"]
    left = drawn(np.full((172, 1), 0.5, np.float32), names)[: PLOT_HEIGHT + 4, :40].min(axis=(1, 2)) < 200
    lines = np.flatnonzero(np.diff(left.astype(int)) > 0)
    assert len(lines) >= 10


@pytest.mark.parametrize(("low", "high"), [(-10, -3), (-44, -37), (24, 31), (-1, 2)])
def test_every_power_beside_the_scale_is_written_whole(low: int, high: int) -> None:
    levels = np.logspace(low, high, 40, dtype=np.float32)[None]
    margin = drawn(levels, ["a"])[: PLOT_HEIGHT + 10, -1]
    assert (margin == 255).all()


def test_of_very_many_layers_some_are_named_and_marked_where_they_begin() -> None:
    names = ["embed.weight", *(f"transformer.h.{i}.{leaf}" for i in range(1250) for leaf in ("weight", "bias")), "norm.weight"]
    labels, cuts, ticks = _labels(tuple(names), PLOT_HEIGHT)
    assert len(labels) == len(ticks) - len(cuts) >= 12
    for text, middle in labels:
        row = names.index(f"{text}.weight")
        assert abs(middle - (row + 1) * PLOT_HEIGHT / len(names)) <= 6
        assert any(abs(tick - row * PLOT_HEIGHT / len(names)) <= 0.5 for tick in ticks)


def test_names_too_long_for_their_place_keep_what_tells_them_apart() -> None:
    names = (*(f"transformer.h.{i}.out.weight" for i in range(4)), "a_very_long_name_of_its_own")
    assert [text for text, _ in _labels(names, PLOT_HEIGHT)[0]] == [*(f"…h.{i}.out.weight" for i in range(4)), "a_very_lo…_its_own"]
