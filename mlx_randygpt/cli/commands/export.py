"""`mlxgpt export`: write a model for other programs."""

from __future__ import annotations

from pathlib import Path

import click

from mlx_randygpt.cli.errors import Command
from mlx_randygpt.cli.loading import read
from mlx_randygpt.cli.options import json_option
from mlx_randygpt.cli.output import echo, print_json
from mlx_randygpt.cli.values import FilePath
from mlx_randygpt.exchange import EXPORT_FORMATS, GGUF_OUTTYPES
from mlx_randygpt.words import format_bytes


@click.command("export", cls=Command)
@click.argument("checkpoint", required=False, type=FilePath(path_type=Path))
@click.option(
    "--format",
    "kind",
    type=click.Choice(tuple(EXPORT_FORMATS)),
    default="hf",
    show_default=True,
    help="Write this format. "
    + " ".join(f"{name} is {text}." for name, text in EXPORT_FORMATS.items()),
)
@click.option(
    "-o",
    "--output",
    type=FilePath(path_type=Path),
    required=True,
    metavar="DIR",
    help="Write this folder.",
)
@click.option(
    "--outtype",
    type=click.Choice(GGUF_OUTTYPES),
    help="Store the matrices of a GGUF file in this type.  [default: f32]",
)
@click.option("--overwrite", is_flag=True, help="Replace an existing export.")
@json_option
def command(
    checkpoint: Path | None,
    kind: str,
    output: Path,
    outtype: str | None,
    overwrite: bool,
    json: bool,
) -> None:
    """Export a model as files that other programs run.

    CHECKPOINT is a file or the folder of a run, whose best checkpoint counts; without it, the
    folder is checkpoints.
    """
    from mlx_randygpt.exchange.arcee import find_misfit
    from mlx_randygpt.exchange.export import export

    path, saved, _ = read(checkpoint, merge=kind != "adapters")
    sizes = export(saved, kind, output, outtype=outtype, overwrite=overwrite)
    n_bytes = sum(sizes.values())
    if json:
        row = {"checkpoint": str(path), "format": kind, "path": str(output)}
        print_json({**row, "files": sizes, "bytes": n_bytes})
        return
    total = format_bytes(n_bytes)
    echo(f"✓ Exported {path} to {output} ({len(sizes)} files, {total})")
    echo(f"Description and instructions: {output / 'README.md'}")
    if kind in ("hf", "mlx-lm") and not saved.model.is_gpt2 and find_misfit(saved.model):
        echo(
            "Note: this folder contains code of mlxgpt. A model of --recipe portable needs none, "
            "and runs in vLLM, llama.cpp, Ollama and LM Studio too (--format gguf).",
            wrapped=True,
        )
