"""How numbers, durations, errors and text from outside are worded, everywhere."""

from __future__ import annotations

import math
import re
import textwrap
from collections import Counter
from collections.abc import Mapping

N_UNKNOWN = 5  # kinds of unknown characters named in a message
JOINERS = "\u200c\u200d"  # not printable, but part of how Persian, Hindi and emoji are spelled
LONE_SURROGATE = re.compile(
    "[\ud800-\udbff](?![\udc00-\udfff])|(?<![\ud800-\udbff])[\udc00-\udfff]"
)
MAX_REASON = 160  # characters of an error text, which may quote a damaged file


def format_bytes(n_bytes: float) -> str:
    """Return a size with three significant digits: `40 kB`, `14.5 MB`, `23.6 GB`."""
    for unit, scale in (("kB", 1e3), ("MB", 1e6), ("GB", 1e9)):
        if n_bytes < 999.5 * scale:
            return f"{n_bytes / scale:.3g} {unit}"
    return f"{n_bytes / 1e12:,.3g} TB"


def format_count(n: float) -> str:
    """Return a count: exact up to a million, then `1.24 M`, `124 M`, `1.56 G`."""
    for unit, scale in (("", 1), ("M", 1e6), ("G", 1e9)):
        if n < (1e6 if scale == 1 else 999.5 * scale):
            return f"{n:,.0f}" if scale == 1 else f"{n / scale:.3g} {unit}"
    return f"{n / 1e12:,.3g} T"


def format_share(share: float) -> str:
    """Return a share in percent with two significant digits: `0.043 %`, `3.1 %`, `29 %`."""
    percent = 100 * share
    return f"{percent:.0f} %" if percent >= 9.95 else f"{percent:.2g} %"


def format_clock(seconds: float) -> str:
    """Return a duration as a clock shows it: `02:10`, from an hour on `1:02:10`."""
    if not math.isfinite(seconds):
        return "--:--"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes:02}:{rest:02}"


def format_duration(seconds: float) -> str:
    """Return a duration in its unit: `3.2 ms`, `36.0 s`, `2.5 minutes`, `3.1 h`, `9 days`."""
    if seconds < 1:
        return f"{1e3 * seconds:,.1f} ms"
    if seconds < 60:
        return f"{seconds:,.1f} s"
    if seconds < 3600:
        return f"{seconds / 60:,.1f} minutes"
    hours = seconds / 3600
    return f"{hours:,.1f} h" if hours < 72 else f"{hours / 24:,.0f} days"


def unify_newlines(text: str) -> str:
    r"""Return text that came from outside without byte order mark, "\r\n" and "\r" as "\n"."""
    return text.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")


def one_line(error: object) -> str:
    """Return the text of an error as one printable line of at most MAX_REASON characters."""
    line = " ".join("".join(c if c.isprintable() else " " for c in str(error)).split())
    return line if len(line) <= MAX_REASON else line[:MAX_REASON] + "…"


def clean_text(text: str, *, keep: str = "") -> str:
    """Replace what a terminal could act on: white space not in `keep` by a space, the rest by �."""
    keep += JOINERS
    return "".join(c if c.isprintable() or c in keep else " " if c.isspace() else "�" for c in text)


def replace_surrogates(text: str) -> str:
    """Replace lone surrogates, which no encoding can hold, by U+FFFD."""
    if text.isascii():
        return text
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def count_surrogates(text: str) -> dict[str, int]:
    """Count the lone surrogates, most frequent first."""
    if text.isascii():
        return {}
    return dict(Counter(LONE_SURROGATE.findall(text)).most_common())


def wrap_words(line: str, width: int) -> list[str]:
    """Return a line as lines of at most `width` characters; a longer word stays whole."""
    wrapper = textwrap.TextWrapper(width, replace_whitespace=False)
    wrapper.break_long_words = wrapper.break_on_hyphens = False
    return wrapper.wrap(line) or [""]


def unknown_line(counts: Mapping[str, int]) -> str:
    """Return one line about characters that were dropped, or ""."""
    if not counts:
        return ""
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    names = ", ".join(f"{character!r} × {n}" for character, n in ordered[:N_UNKNOWN])
    more = f" and {len(ordered) - N_UNKNOWN} more kinds" if len(ordered) > N_UNKNOWN else ""
    total = sum(counts.values())
    if total == 1:
        return f"1 character is not in the vocabulary and was dropped: {names}"
    return f"{total:,} characters are not in the vocabulary and were dropped: {names}{more}"
