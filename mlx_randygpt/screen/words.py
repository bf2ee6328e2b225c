"""Numbers, durations and text from outside, worded for people."""

from __future__ import annotations

import math


def clean(text: str, *, keep: str = "") -> str:
    """What a terminal could act on, replaced: white space not in `keep` by " ", the rest by �."""
    return "".join(c if c.isprintable() or c in keep else " " if c.isspace() else "�" for c in text)


def duration(seconds: float) -> str:
    """`02:10`, from an hour on `1:02:10`."""
    if not math.isfinite(seconds):
        return "--:--"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes:02}:{rest:02}"


def size(n_bytes: int) -> str:
    return f"{n_bytes / 1e9:.1f} GB" if n_bytes >= 1e9 else f"{n_bytes / 1e6:.0f} MB"


def short(value: float, digits: int) -> str:
    return f"{value:.{digits}f}" if value < 1e5 else f"{value:.1e}"


def speed(steps_per_second: float) -> str:
    return f"{steps_per_second:.{1 if steps_per_second >= 1 else 2}f} it/s"
