"""The palette: visible on light and dark, and the one that the style sheets have."""

from __future__ import annotations

from pathlib import Path

import pytest

import mlx_randygpt
from mlx_randygpt.palette import PROBABILITIES, RUNS, TRAINING, VALIDATION

ROOT = Path(mlx_randygpt.__file__).parent
PAPERS = ("#ffffff", "#faf9f6", "#111827", "#1c2026")  # grounds of the pages


def luminance(shade: str) -> float:
    parts = [int(shade[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return sum(w * c for w, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def contrast(a: str, b: str) -> float:
    """The ratio of WCAG: 3 is enough for graphics, 4.5 for text."""
    low, high = sorted((luminance(a), luminance(b)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("shade", [shade for _, shade in RUNS])
def test_a_curve_stands_out_from_every_ground(shade: str) -> None:
    assert min(contrast(shade, paper) for paper in PAPERS) >= 3


def test_black_text_is_readable_on_every_probability() -> None:
    assert min(contrast("#000000", ground) for _, ground in PROBABILITIES) >= 4.5


def test_no_two_runs_have_the_same_colour() -> None:
    names, shades = zip(*RUNS, strict=True)
    assert len(set(names)) == len(set(shades)) == len(RUNS)


def test_the_page_of_the_server_has_the_same_colours() -> None:
    sheet = (ROOT / "serve" / "page" / "style.css").read_text()
    assert f"--train: {TRAINING[1]}; --val: {VALIDATION[1]};" in sheet
    grounds = " ".join(f"--t{i}: {ground};" for i, (_, ground) in enumerate(PROBABILITIES))
    assert grounds in sheet
