"""`mlxgpt presets`: list the presets with computed sizes."""

from __future__ import annotations

from math import prod
from typing import Any

import click

from mlx_randygpt.cli.errors import Command
from mlx_randygpt.cli.loading import BACKEND_TITLES
from mlx_randygpt.cli.options import json_option
from mlx_randygpt.cli.output import echo, print_json, show, stdout_console
from mlx_randygpt.recipes import DEFAULT_PRESET, PRESETS, RECIPES
from mlx_randygpt.words import format_bytes, format_duration

VOCAB_SIZE = 67  # of tiny Shakespeare: 65 characters, <bos> and <eos>, as in randyGPT's tables
STEPS = 1000  # whose minutes are shown
PURPOSES = {
    "mini": "to try things out, in seconds",
    "tiny": "a short text: letters, poems",
    "small4": "a book, in less time",
    "small": "a book; the default",
    "medium": "several books",
    "large": "a shelf of books, on a fast GPU",
    "xs": "a book, with a longer context",
    "s": "as xs, deeper",
    "ds": "as s, deeper still",
    "m": "several books, with a longer context",
    "l": "as m, wider",
    "deep": "as m, much deeper",
    "xl": "a shelf of books, on a GPU",
    "flux-small": "what FluxParser called small",
    "flux-medium": "what FluxParser called medium",
    "flux-large": "what FluxParser called large",
    "gpt2": "to fine-tune GPT-2",
    "gpt2-medium": "to fine-tune its larger ones",
    "gpt2-large": "the same, on a large GPU",
    "gpt2-xl": "the same, on a large GPU",
}
MEASURED = ("backend", "device", "date")  # what is shown of the measurement
SIZES = ("n_layer", "n_head", "n_embd", "block_size")
HEADERS = ("Layers", "Heads", "Width", "Context", "Parameters")
BYTES = {
    "16 B/param": "memory for training (weights, gradients, two moments) without activations",
    "On disk": "the size of a checkpoint (weights and moments)",
}
GAP = 2  # columns between two columns


@click.command("presets", cls=Command)
@click.option(
    "--recipe",
    type=click.Choice(sorted(RECIPES)),
    default="modern",
    show_default=True,
    help="Count parameters and moments by this recipe.",
)
@json_option
def command(recipe: str, json: bool) -> None:
    """List the presets with their sizes, parameter counts and memory, and what each is for."""
    from mlx_randygpt.planning.speed import RECIPE, load

    speed = load() if recipe == RECIPE else None
    minutes = {name: STEPS * t / 60 for name, t in speed.step_seconds.items()} if speed else {}
    rows = [sizes(name, recipe) | {"minutes": minutes.get(name)} for name in PRESETS]
    measured = {name: getattr(speed, name) for name in MEASURED} if speed else None
    if json:
        values = {"recipe": recipe, "vocab_size": VOCAB_SIZE, "presets": rows}
        print_json(values | {"steps": STEPS, "measured": measured})
        return
    table = _table(rows, stdout_console().width)
    show(table)
    headers = {column.header for column in table.columns}
    notes = [
        f"Parameters of the {recipe} recipe with a vocabulary of {VOCAB_SIZE}; the default preset "
        f"is {DEFAULT_PRESET}.",
        *(f"{name}: {text}." for name, text in BYTES.items() if name in headers),
    ]
    echo("\n".join(["", *notes, ""]), wrapped=True)
    show(_purposes(rows))
    echo(f"\n{_source(measured, recipe)}", wrapped=True)


def sizes(name: str, recipe: str) -> dict[str, Any]:
    """Return one preset in numbers.

    `checkpoint_bytes` counts the tensors; the header adds a few kB. Muon has one moment and AdamW
    two; `training_bytes` counts two for every weight.
    """
    from mlx_randygpt import settings
    from mlx_randygpt.model import parameter_count, second_moment_shapes

    model, train = settings.resolve_new({"preset": name, "recipe": recipe}, VOCAB_SIZE)
    n, shapes = parameter_count(model), second_moment_shapes(model, train).values()
    return {
        "name": name,
        **{size: getattr(model, size) for size in SIZES},
        "parameters": n,
        "training_bytes": 16 * n,
        "checkpoint_bytes": 4 * (2 * n + sum(prod(shape) for shape in shapes)),
        "text_bytes": dict(zip(("least", "good", "most"), settings.suitable_text(n), strict=True)),
        "purpose": PURPOSES[name],
    }


def _table(rows: list[dict[str, Any]], width: int) -> Any:
    """Return the sizes; the last columns are left out if there is no room for them."""
    from rich.table import Table

    columns = [["Preset", *(row["name"] for row in rows)]]
    for header, key in zip(HEADERS, (*SIZES, "parameters"), strict=True):
        columns.append([header, *(f"{row[key]:,}" for row in rows)])
    for header, key in zip(BYTES, ("training_bytes", "checkpoint_bytes"), strict=True):
        columns.append([header, *(format_bytes(row[key]) for row in rows)])
    while len(columns) > 1 and sum(max(map(len, cells)) + GAP for cells in columns) - GAP > width:
        columns.pop()
    table = Table(box=None, pad_edge=False, header_style="bold")
    for i, (header, *_) in enumerate(columns):
        style = "" if i else "bold"
        table.add_column(header, style=style, justify="right" if i else "left", no_wrap=True)
    for cells in list(zip(*columns, strict=True))[1:]:
        table.add_row(*cells)
    return table


def _purposes(rows: list[dict[str, Any]]) -> Any:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("Preset", style="bold", no_wrap=True)
    for header in ("Text", "1,000 steps"):
        table.add_column(header, justify="right", no_wrap=True)
    table.add_column("Purpose")
    for row in rows:
        least, most = (format_bytes(row["text_bytes"][name]) for name in ("least", "most"))
        minutes = row["minutes"]
        time = "?" if minutes is None else format_duration(60 * minutes)
        table.add_row(row["name"], f"{least} to {most}", time, row["purpose"])
    return table


def _source(measured: dict[str, str] | None, recipe: str) -> str:
    """Return where the times come from, or how they are found out."""
    from mlx_randygpt.planning.speed import RECIPE

    if recipe != RECIPE:
        return f"1,000 steps: known for the {RECIPE} recipe only."
    if measured is None:
        return "1,000 steps: not measured yet; mlxgpt doctor does."
    backend = BACKEND_TITLES.get(measured["backend"], measured["backend"])
    where = f"{backend} on {measured['device']}"
    return f"1,000 steps: estimated from those of mlxgpt doctor, {measured['date']}, {where}."
