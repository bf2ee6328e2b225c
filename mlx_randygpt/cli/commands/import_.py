"""`mlxgpt import`: convert a model of another program to a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mlx_randygpt.cli.errors import Command
from mlx_randygpt.cli.options import json_option
from mlx_randygpt.cli.output import echo, print_json
from mlx_randygpt.cli.values import FilePath
from mlx_randygpt.config import GPT2_ACTIVATIONS
from mlx_randygpt.exchange import IMPORT_FORMATS

if TYPE_CHECKING:
    from mlx_randygpt.exchange.importers.imported_model import ImportedModel


@click.command("import", cls=Command)
@click.argument("source", type=FilePath(path_type=Path))
@click.option(
    "--format",
    type=click.Choice(["auto", *IMPORT_FORMATS]),
    default="auto",
    show_default=True,
    help="Read this format; auto detects it. "
    + " ".join(f"{name} is {text}." for name, text in IMPORT_FORMATS.items()),
)
@click.option(
    "-o",
    "--output",
    type=FilePath(path_type=Path),
    required=True,
    help="Write this checkpoint.",
)
@click.option("--overwrite", is_flag=True, help="Replace an existing checkpoint.")
@click.option(
    "--vocab",
    type=FilePath(path_type=Path),
    help="Take the tokenizer from a tokenizer.json, vocab.json, meta.pkl or folder.  [default: "
    "beside SOURCE]",
)
@click.option(
    "--activation",
    type=click.Choice(GPT2_ACTIVATIONS),
    help="For nanogpt, compute this variant of GELU.  [default: gelu]",
)
@click.option("--n-layer", type=int, help="For randygpt, whose files do not record it: the layers.")
@click.option("--n-head", type=int, help="For randygpt: the attention heads.")
@click.option("--n-embd", type=int, help="For randygpt: the width of the model.")
@click.option("--block-size", type=int, help="For randygpt: the context in tokens.")
@json_option
def command(
    source: Path,
    format: str,
    output: Path,
    overwrite: bool,
    vocab: Path | None,
    activation: str | None,
    json: bool,
    **sizes: int | None,
) -> None:
    """Import a model of GPT-2, nanoGPT, randyGPT or `mlxgpt export` as a checkpoint.

    SOURCE is a Hugging Face folder, a ckpt.pt or a .bin file. No code in it is run. The checkpoint
    works with eval, sample, info, serve and train --init-from.
    """
    from mlx_randygpt import files
    from mlx_randygpt.checkpoint import save_checkpoint
    from mlx_randygpt.dialogue import has_dialogue
    from mlx_randygpt.exchange import ExchangeError
    from mlx_randygpt.exchange.importing import read_foreign

    if files.is_folder(output):
        raise ExchangeError(
            f"{output} is a folder; name the file, such as {output / 'model.safetensors'}"
        )
    if files.exists(output) and not overwrite:
        raise ExchangeError(f"{output} exists already; --overwrite replaces it")
    given_sizes = {name: value for name, value in sizes.items() if value is not None}
    imported = read_foreign(source, format, vocab=vocab, activation=activation, sizes=given_sizes)
    for note in imported.notes:
        echo(note, err=True, wrapped=True)
    save_checkpoint(output, imported.checkpoint())
    values = describe(output, imported)
    if json:
        print_json(values)
        return
    echo(
        f"✓ {values['parameters']:,} parameters of {values['format']} written to {output} "
        f"(step {values['step']:,}, vocabulary {values['vocab_size']:,})"
    )
    next_step = (
        "Talk to it: mlxgpt chat"
        if has_dialogue(imported.tokenizer)
        else "Let it write: mlxgpt sample"
    )
    echo(f"{next_step} --checkpoint {output}")


def describe(output: Path, imported: ImportedModel) -> dict[str, Any]:
    """Return the JSON of the command."""
    from dataclasses import asdict

    from mlx_randygpt.model import parameter_count

    return {
        "path": str(output),
        "format": imported.format,
        "source": str(imported.source),
        "parameters": parameter_count(imported.model),
        "step": imported.step,
        "moments": bool(imported.moments),
        "vocab_size": imported.model.vocab_size,
        "tokenizer": imported.tokenizer.to_json()["type"],
        "model": asdict(imported.model),
        "notes": list(imported.notes),
    }
