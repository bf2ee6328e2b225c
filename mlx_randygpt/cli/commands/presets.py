"""`mlxgpt presets`: list the presets with computed sizes."""

from __future__ import annotations

from math import prod
from typing import Any

import click

from mlx_randygpt.cli.errors import Command
from mlx_randygpt.cli.options import json_option
from mlx_randygpt.cli.output import echo, print_json, show
from mlx_randygpt.recipes import DEFAULT_PRESET, PRESETS, RECIPES
from mlx_randygpt.words import format_bytes

VOCAB_SIZE = 67  # of tiny Shakespeare: 65 characters, <bos> and <eos>, as in randyGPT's tables
SIZES = ("n_layer", "n_head", "n_embd", "block_size")


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
    """List the presets with their sizes, parameter counts and memory."""
    rows = [sizes(name, recipe) for name in PRESETS]
    if json:
        print_json({"recipe": recipe, "vocab_size": VOCAB_SIZE, "presets": rows})
        return
    show(_table(rows))
    echo(
        f"\nParameters of the {recipe} recipe with a vocabulary of {VOCAB_SIZE}; the default "
        f"preset is {DEFAULT_PRESET}.\n16 B/param: memory for training (weights, gradients, two "
        "moments) without activations.\nOn disk: the size of a checkpoint (weights and moments)."
    )


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
    }


def _table(rows: list[dict[str, Any]]) -> Any:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("Preset", style="bold", no_wrap=True)
    for header in ("Layers", "Heads", "Width", "Context", "Parameters", "16 B/param", "On disk"):
        table.add_column(header, justify="right", no_wrap=True)
    for row in rows:
        counts = [f"{row[key]:,}" for key in (*SIZES, "parameters")]
        memory = [format_bytes(row[key]) for key in ("training_bytes", "checkpoint_bytes")]
        table.add_row(row["name"], *counts, *memory)
    return table
