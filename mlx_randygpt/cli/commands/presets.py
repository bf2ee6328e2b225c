"""`mlxgpt presets`: the named sizes, with every number computed."""

from __future__ import annotations

from typing import Any

import click

from mlx_randygpt.cli.errors import Command
from mlx_randygpt.cli.options import json_option
from mlx_randygpt.cli.output import print_json, readable_bytes, show
from mlx_randygpt.recipes import DEFAULT_PRESET, PRESETS, RECIPES

VOCAB_SIZE = 67  # of tiny Shakespeare, 65 characters, in the seeds' tables
SIZES = ("n_layer", "n_head", "n_embd", "block_size")


@click.command("presets", cls=Command)
@click.option(
    "--recipe", type=click.Choice(sorted(RECIPES)), default="modern", show_default=True,
    help="Decides which weights there are and which moments a checkpoint holds.",
)  # fmt: skip
@json_option
def command(recipe: str, json: bool) -> None:
    """List the named sizes with their parameter counts and the memory each needs."""
    rows = [sizes(name, recipe) for name in PRESETS]
    if json:
        print_json({"recipe": recipe, "vocab_size": VOCAB_SIZE, "presets": rows})
        return
    show(_table(rows))
    click.echo(
        f"\nParameters of the {recipe} recipe with a vocabulary of {VOCAB_SIZE}; the default is "
        f"{DEFAULT_PRESET}.\n16 B/param: memory for training (weights, gradients, two AdamW "
        "moments), without\nactivations. On disk: a checkpoint (weights and moments)."
    )


def sizes(name: str, recipe: str) -> dict[str, Any]:
    """One preset in numbers; `checkpoint_bytes` are those of its tensors, the header adds some kB.

    Muon keeps one moment where AdamW keeps two; `training_bytes` counts two for every weight.
    """
    from mlx_randygpt import settings
    from mlx_randygpt.model import parameter_count, parameters

    model, train = settings.resolve_new({"preset": name, "recipe": recipe}, VOCAB_SIZE)
    n, by_muon = parameter_count(model), 0
    if train.optimizer == "muon":
        by_muon = sum(weight.size for weight in parameters(model) if weight.is_block_matrix)
    return {
        "name": name,
        **{size: getattr(model, size) for size in SIZES},
        "parameters": n,
        "training_bytes": 16 * n,
        "checkpoint_bytes": 4 * (3 * n - by_muon),
    }


def _table(rows: list[dict[str, Any]]) -> Any:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("Preset", style="bold", no_wrap=True)
    for header in ("Layers", "Heads", "Width", "Context", "Parameters", "16 B/param", "On disk"):
        table.add_column(header, justify="right", no_wrap=True)
    for row in rows:
        counts = [f"{row[key]:,}" for key in (*SIZES, "parameters")]
        memory = [readable_bytes(row[key]) for key in ("training_bytes", "checkpoint_bytes")]
        table.add_row(row["name"], *counts, *memory)
    return table
