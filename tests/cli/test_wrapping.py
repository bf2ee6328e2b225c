"""Words of a growing text stay whole, and nothing but spaces at the end of a line is left out."""

from __future__ import annotations

import random

import pytest
from rich.cells import cell_len

from mlx_randygpt.cli.wrapping import WordWrapper


def wrapped(text: str, width: int, pieces: int = 1) -> str:
    wrapper = WordWrapper(width)
    parts = [wrapper.add(text[i : i + pieces]) for i in range(0, len(text), pieces)]
    return "".join(parts) + wrapper.end()


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("the old ship", "the old \nship"),
        ("one two", "one two"),
        ("12345678 9", "12345678\n9"),  # no room for the space
        ("a\n\n  bc\n", "a\n\n  bc\n"),
        ("an abcdefghijk no", "an \nabcdefghijk no"),  # the terminal breaks it
        ("日本 日本", "日本 \n日本"),  # two columns each
        ("a\tb", "a\t\nb"),
        ("abcdefgh\ti", "abcdefgh\ni"),
        ("abc " + 20 * "x" + " y", "abc \n" + 20 * "x" + " y"),
    ],
)
def test_a_line_ends_between_words(text: str, shown: str) -> None:
    assert wrapped(text, 8) == shown


def rows_of_words(shown: str, width: int) -> list[set[int]]:
    """The rows in which a terminal shows the characters of each word."""
    words, row, column = [set[int]()], 0, 0
    for char in shown:
        if column + cell_len(char) > width and char != "\n":
            row, column = row + 1, 0
        if char in " \n":
            words.append(set())
        else:
            words[-1].add(row)
        row, column = (row + 1, 0) if char == "\n" else (row, column + cell_len(char))
    return [rows for rows in words if rows]


def test_any_word_that_fits_is_in_one_row_whatever_the_pieces() -> None:
    draw = random.Random(1)
    for _ in range(500):
        text = "".join(draw.choice("abc  \n日é") for _ in range(draw.randrange(80)))
        shown = wrapped(text, 6)
        assert shown == wrapped(text, 6, pieces=draw.randrange(1, 9))
        assert shown.split() == text.split()
        for word, rows in zip(text.split(), rows_of_words(shown, 6), strict=True):
            assert len(rows) == 1 or cell_len(word) > 6
