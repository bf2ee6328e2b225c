"""`mlxgpt presets`: the named sizes, with every number computed."""

from __future__ import annotations

from dataclasses import asdict
from math import prod
from typing import Any

import click

from mlx_randygpt.cli.options import Command, json_option, print_json, readable_bytes, show
from mlx_randygpt.config import DEFAULT_PRESET, PRESETS, RECIPES, ConfigError

VOCAB_SIZE = 67  # of tiny Shakespeare, 65 characters, in the seeds' tables
COMPUTED = ("parameters", "training_bytes", "checkpoint_bytes")


@click.command("presets", cls=Command)
@click.option(
    "--recipe", type=click.Choice(sorted(RECIPES)), default="modern", show_default=True,
    help="Decides which weights there are and which moments a checkpoint holds.",
)  # fmt: skip
@json_option
def command(recipe: str, as_json: bool) -> None:
    """List the named sizes with their parameter counts and the memory each needs."""
    rows = [sizes(name, recipe) for name in PRESETS]
    if as_json:
        print_json({"recipe": recipe, "vocab_size": VOCAB_SIZE, "presets": rows})
        return
    show(_table(rows))
    for row in rows:
        if row["problem"]:
            click.echo(f"{row['name']}: {row['problem']}")
    click.echo(
        f"\nParameters of the {recipe} recipe with a vocabulary of {VOCAB_SIZE}; the default is "
        f"{DEFAULT_PRESET}.\n16 B/param: memory for training (weights, gradients, two AdamW "
        "moments), without\nactivations. On disk: a checkpoint (weights and moments)."
    )


def sizes(name: str, recipe: str) -> dict[str, Any]:
    """One preset in numbers, null where the recipe cannot take its sizes and `problem` says why.

    `checkpoint_bytes` are those of the tensors; the header adds some kB.
    """
    from mlx_randygpt.cli import settings
    from mlx_randygpt.state import muon_parts, parameter_count, parameter_shapes

    row: dict[str, Any] = {"name": name, **asdict(PRESETS[name])}
    for key in ("batch_size", "dropout"):
        del row[key]
    try:
        model, train = settings.fresh({"preset": name, "recipe": recipe}, VOCAB_SIZE)
    except ConfigError as error:
        return row | dict.fromkeys(COMPUTED) | {"problem": str(error)}
    n, shapes = parameter_count(model), parameter_shapes(model)
    muon = [shapes[w] for w in shapes if train.optimizer == "muon" and muon_parts(w)]
    n_moments = 2 * n - sum(map(prod, muon))  # Muon keeps one where AdamW keeps two
    computed = (n, 16 * n, 4 * (n + n_moments))
    return row | dict(zip(COMPUTED, computed, strict=True)) | {"problem": None}


def _table(rows: list[dict[str, Any]]) -> Any:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("Preset", style="bold", no_wrap=True)
    for header in ("Layers", "Heads", "Width", "Context", "Parameters", "16 B/param", "On disk"):
        table.add_column(header, justify="right", no_wrap=True)
    for row in rows:
        counts = [row[key] for key in ("n_layer", "n_head", "n_embd", "block_size", "parameters")]
        memory = [row[key] for key in ("training_bytes", "checkpoint_bytes")]
        table.add_row(
            row["name"],
            *("–" if count is None else f"{count:,}" for count in counts),
            *("–" if n_bytes is None else readable_bytes(n_bytes) for n_bytes in memory),
        )
    return table
