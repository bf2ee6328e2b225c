"""Words for numbers: three digits, the unit that fits, no control characters."""

from __future__ import annotations

import math

import pytest

from mlx_randygpt import words


@pytest.mark.parametrize(
    ("n", "text"),
    [(0, "0 kB"), (40e3, "40 kB"), (999_499, "999 kB"), (999_600, "1 MB"), (14.52e6, "14.5 MB"),
     (23.6e9, "23.6 GB"), (1.5e12, "1.5 TB")],
)  # fmt: skip
def test_a_size_has_three_digits(n: float, text: str) -> None:
    assert words.format_bytes(n) == text


@pytest.mark.parametrize(
    ("n", "text"),
    [(999_999, "999,999"), (1_237_000, "1.24 M"), (124e6, "124 M"), (1.56e9, "1.56 G")],
)
def test_a_count_is_exact_up_to_a_million(n: float, text: str) -> None:
    assert words.format_count(n) == text


@pytest.mark.parametrize(
    ("seconds", "clock", "duration"),
    [(0.0032, "00:00", "3.2 ms"), (36, "00:36", "36.0 s"), (130, "02:10", "2.2 minutes"),
     (3730, "1:02:10", "1.0 h"), (777_600, "216:00:00", "9 days")],
)  # fmt: skip
def test_a_duration_takes_the_unit_that_fits(seconds: float, clock: str, duration: str) -> None:
    assert (words.format_clock(seconds), words.format_duration(seconds)) == (clock, duration)


def test_an_unknown_time_is_shown_as_dashes() -> None:
    assert words.format_clock(math.nan) == "--:--"


def test_an_error_is_one_printable_line() -> None:
    assert words.one_line(ValueError("a\n\x1b[31mb")) == "a [31mb"
    assert len(words.one_line(ValueError("x" * 500))) == words.MAX_REASON + 1


def test_text_from_outside_cannot_act_on_a_terminal() -> None:
    assert words.clean_text("a\x1b[2J\tb\nc", keep="\n") == "a�[2J b\nc"
    assert words.clean_text("\x7f\x9b\u202e\ud800می\u200cخواهم") == "����می\u200cخواهم"


def test_a_line_is_broken_between_words_alone() -> None:
    assert words.wrap_words("put --max-tokens 5 in it", 8) == ["put", "--max-tokens", "5 in it"]
    assert words.wrap_words("", 8) == [""]
