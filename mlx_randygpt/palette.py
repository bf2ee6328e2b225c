"""The colours of all screens and pages: a thing has the same colour wherever it is shown.

A terminal gets names, whose shades its theme decides; a page gets shades that stand out from white
and from near black alike. `tests/test_palette.py` holds the style sheet of the server to them.
"""

from __future__ import annotations

Colour = tuple[str, str]  # the name in a terminal, the shade on a page

RUNS: tuple[Colour, ...] = (  # of the curves of several runs, in this order
    ("cyan", "#0891b2"),
    ("yellow", "#b7791f"),
    ("green", "#16a34a"),
    ("magenta", "#c026d3"),
    ("blue", "#3b82f6"),
    ("red", "#ef4444"),
    ("bright_black", "#737b88"),
)
TRAINING, VALIDATION = RUNS[0], RUNS[3]  # of one run
PROBABILITIES = (  # the most a token had, and its ground under black text: surprising to expected,
    (0.05, "#f2a27c"),  # told apart without red and green
    (0.2, "#f8cfb4"),
    (0.5, "#f1ede4"),
    (0.8, "#cfe2f1"),
    (1.0, "#a5cbe6"),
)
DARK_PROBABILITIES = ("#9b4420", "#6b3a24", "#33353a", "#23405a", "#2b608f")  # under white text
PAGE = {  # the variables of a page's style: on light, on dark
    "ground": ("#faf9f6", "#15181c"),
    "sheet": ("#ffffff", "#1c2026"),
    "ink": ("#1d2126", "#e6e4de"),
    "soft": ("#5d6670", "#9aa3ad"),
    "line": ("#d9d6ce", "#343a42"),
    "accent": ("#24598a", "#7fb6e4"),
    "on-accent": ("#ffffff", "#10151a"),
    "warn": ("#a3320b", "#ff9d76"),
    **{
        f"t{i}": (light, dark)
        for i, ((_, light), dark) in enumerate(zip(PROBABILITIES, DARK_PROBABILITIES, strict=True))
    },
    "ink-t": ("#1d2126", "#f3f1ec"),
    "share": ("36, 89, 138", "127, 182, 228"),  # of attention: red, green, blue
    "train": (TRAINING[1], TRAINING[1]),
    "val": (VALIDATION[1], VALIDATION[1]),
}


def page_style(element: str) -> str:
    """Return the variables of `PAGE` on this element, light or dark as the system is."""
    light, dark = (
        "".join(f"--{name}:{shades[i]};" for name, shades in PAGE.items()) for i in (0, 1)
    )
    return (
        f"{element}{{color-scheme:light dark;{light}}}\n"
        f"@media (prefers-color-scheme:dark){{{element}{{{dark}}}}}"
    )
