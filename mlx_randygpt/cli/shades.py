"""Tokens tinted by their probability, and what each might have been, in the terminal."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

from rich.table import Table
from rich.text import Text

from mlx_randygpt.cli.options import show

if TYPE_CHECKING:
    from mlx_randygpt.sample import Generated
    from mlx_randygpt.tokenizer import Tokenizer

# From surprising to expected: told apart without red and green, on a dark and a light ground.
SHADES = (
    (0.05, "black on #f4a582"), (0.2, "black on #fddbc7"), (0.5, "black on #f7f7f7"),
    (0.8, "black on #d1e5f0"), (1.0, "black on #92c5de"),
)  # fmt: skip
VISIBLE = {"\n": "⏎\n", "\t": "⇥"}


def shade(probability: float) -> str:
    """The style of a token that had this probability."""
    return next(style for most, style in SHADES if probability <= most + 1e-9)


def spelled(tokenizer: Tokenizer) -> Callable[[int], str]:
    """token id -> its text; the end of a text is `<eos>`."""
    names = {tokenizer.bos: "<bos>", tokenizer.eos: "<eos>"}
    return lambda token: tokenizer.decode([token]) or names.get(token, "")


def show_choices(prompt: str, sample: Generated, tokenizer: Tokenizer) -> None:
    """The text, each token on the shade of its probability, the legend, and a line per token."""
    from mlx_randygpt.tally import clean

    name = spelled(tokenizer)
    text, legend = Text(clean(prompt, keep="\n")), Text()
    table = Table("token", "probability", "instead of", box=None, pad_edge=False)
    for choice in sample.choices:
        p = math.exp(choice.logprob)
        written = name(choice.token)
        text.append("".join(VISIBLE.get(c, clean(c)) for c in written), shade(p))
        others = [(i, q) for i, q in choice.likeliest if i != choice.token]
        listed = "  ".join(f"{name(i)!r} {math.exp(q):.1%}" for i, q in others)
        table.add_row(Text(repr(written), shade(p)), f"{p:.1%}", listed)
    for most, style in SHADES:
        legend.append(f" to {most:.0%} ", style)
    for part in (text, Text(), legend, Text(), table):
        show(part)
