"""Names are data: whatever is in them is shown on one line, and in the place it has."""

from __future__ import annotations

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from paramwatch.lettering import cut, padded, shortened, visible, width_of

HOSTILE = "\x1b[2J\x1b]0;gone\x07 a\nb\rc\td ‮evil‬ \u200b \x9b31m \ud800 \x00"


def test_nothing_that_moves_the_cursor_or_turns_the_text_is_left() -> None:
    shown = visible(HOSTILE)
    assert shown.isprintable()
    assert not any(unicodedata.category(c) in ("Cc", "Cf", "Cs", "Zl", "Zp") for c in shown)
    assert "\\x1b[2J" in shown
    assert "\\u202eevil" in shown


def test_what_can_be_seen_stays_as_it_is() -> None:
    assert visible("0.block 2.Gewicht ü 重み") == "0.block 2.Gewicht ü 重み"


@given(st.text(max_size=40), st.integers(1, 30))
def test_a_text_in_its_place_is_never_wider_than_it(text: str, width: int) -> None:
    for fitted in (shortened(visible(text), width), cut(visible(text), width)):
        assert width_of(fitted) <= width
        assert width_of(padded(fitted, width)) == width == width_of(padded(fitted, width, right=True))


@pytest.mark.parametrize("text", ["encoder.layers.11.weight", "重み.重み.重み.重み.重み.重み"])
def test_a_shortened_name_keeps_its_beginning_and_its_end(text: str) -> None:
    kept = shortened(text, 15)
    assert kept[0] == text[0]
    assert kept[-1] == text[-1]
    assert "…" in kept
