"""The palette: visible on light and dark, and the one that the style sheets have."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import mlx_randygpt
from mlx_randygpt.palette import DARK_PROBABILITIES, PAGE, PROBABILITIES, RUNS

ROOT = Path(mlx_randygpt.__file__).parent
PAPERS = (*PAGE["ground"], *PAGE["sheet"])


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


def test_text_is_readable_on_every_probability() -> None:
    assert min(contrast("#000000", ground) for _, ground in PROBABILITIES) >= 4.5
    light, dark = PAGE["ink-t"]
    assert min(contrast(light, ground) for _, ground in PROBABILITIES) >= 4.5
    assert min(contrast(dark, ground) for ground in DARK_PROBABILITIES) >= 4.5


def test_no_two_runs_have_the_same_colour() -> None:
    names, shades = zip(*RUNS, strict=True)
    assert len(set(names)) == len(set(shades)) == len(RUNS)


@pytest.mark.parametrize("scheme", [0, 1], ids=["light", "dark"])
def test_the_page_of_the_server_has_the_same_colours(scheme: int) -> None:
    sheet = (ROOT / "serve" / "page" / "style.css").read_text()
    light, *dark = re.findall(r":root[^{]*\{([^}]*--[^}]*)\}", sheet)
    for block in dark if scheme else [light]:
        found = dict(re.findall(r"--([\w-]+): ([^;]+);", block))
        wanted = {name: shades[scheme] for name, shades in PAGE.items()}
        same_in_both = {name for name, (a, b) in PAGE.items() if a == b and scheme}
        assert found == {name: wanted[name] for name in wanted.keys() - same_in_both}
    assert len(dark) == 2
    limits = [limit for limit, _ in PROBABILITIES[:-1]]
    assert f"const SHADES = {limits};" in (ROOT / "serve" / "page" / "app.js").read_text()
