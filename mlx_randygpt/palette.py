"""The colours of all screens and pages: a thing has the same colour wherever it is shown.

A terminal gets names, whose shades its theme decides; a page gets shades that stand out from white
and from near black alike. `tests/test_palette.py` holds the style sheets to them.
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
