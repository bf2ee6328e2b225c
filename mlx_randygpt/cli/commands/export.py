"""`mlxgpt export`: a model for other programs."""

from __future__ import annotations

from pathlib import Path

import click

from mlx_randygpt.cli.errors import Command
from mlx_randygpt.cli.loading import read
from mlx_randygpt.cli.options import json_option
from mlx_randygpt.cli.output import print_json, readable_bytes

FORMATS = ("hf", "mlx-lm", "safetensors", "gguf", "adapters")


@click.command("export", cls=Command)
@click.argument("checkpoint", required=False, type=click.Path(path_type=Path))
@click.option(
    "--format", "kind", type=click.Choice(FORMATS), default="hf", show_default=True,
    help="hf and mlx-lm: one folder for both; safetensors: weights alone; gguf: llama.cpp; "
    "adapters: those of --lora-rank alone, which the others merge.",
)  # fmt: skip
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), required=True, metavar="DIR",
    help="The folder to make.",
)  # fmt: skip
@click.option("--overwrite", is_flag=True, help="Replace an export that is there.")
@json_option
def command(checkpoint: Path | None, kind: str, output: Path, overwrite: bool, json: bool) -> None:
    """Write a model as files that other programs run.

    Without CHECKPOINT: the best of checkpoints/, else the newest.
    """
    from mlx_randygpt.exchange.export import export

    path, saved, _ = read(checkpoint, merge=kind != "adapters")
    sizes = export(saved, kind, output, overwrite=overwrite)
    if json:
        print_json({
            "checkpoint": str(path), "format": kind, "path": str(output), "files": sizes,
            "bytes": sum(sizes.values()),
        })  # fmt: skip
        return
    total = readable_bytes(sum(sizes.values()))
    click.echo(f"✓ Exported {path} to {output} ({len(sizes)} files, {total})")
    click.echo(f"How to run it, and what it is: {output / 'README.md'}")
