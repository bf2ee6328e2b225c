"""`mlxgpt import`: a model of another program as a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mlx_randygpt.cli.errors import Command
from mlx_randygpt.cli.options import json_option
from mlx_randygpt.cli.output import print_json
from mlx_randygpt.config import GPT2_ACTIVATIONS

if TYPE_CHECKING:
    from mlx_randygpt.exchange.importers.imported_model import ImportedModel

FORMATS = ("gpt2", "mlxgpt", "nanogpt", "randygpt", "randygpt-hf")


@click.command("import", cls=Command)
@click.argument("source", type=click.Path(path_type=Path))
@click.option(
    "--format", type=click.Choice(["auto", *FORMATS]), default="auto", show_default=True,
    help="Who wrote it; auto looks.",
)  # fmt: skip
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    required=True,
    help="The checkpoint to write.",
)
@click.option("--overwrite", is_flag=True, help="Replace a checkpoint that is there.")
@click.option(
    "--vocab", type=click.Path(path_type=Path),
    help="Tokenizer: tokenizer.json, a folder, vocab.json, meta.pkl.  [default: beside SOURCE]",
)  # fmt: skip
@click.option(
    "--activation",
    type=click.Choice(GPT2_ACTIVATIONS),
    help="nanogpt: which GELU.  [default: gelu]",
)
@click.option("--n-layer", type=int, help="randygpt: layers, which its file does not say.")
@click.option("--n-head", type=int, help="randygpt: heads.")
@click.option("--n-embd", type=int, help="randygpt: width.")
@click.option("--block-size", type=int, help="randygpt: context.")
@json_option
def command(
    source: Path, format: str, output: Path, overwrite: bool, vocab: Path | None,
    activation: str | None, json: bool, **sizes: int | None,
) -> None:  # fmt: skip
    """Read a model of GPT-2, nanoGPT, randyGPT or `mlxgpt export` and write it as a checkpoint.

    SOURCE is a Hugging Face folder, a ckpt.pt or a .bin file. No code in it is run. The checkpoint
    is for eval, sample, info, serve and train --init-from.
    """
    from mlx_randygpt.checkpoint import save_checkpoint
    from mlx_randygpt.exchange import ExchangeError
    from mlx_randygpt.exchange.importing import read_foreign

    if output.is_dir():
        raise ExchangeError(
            f"{output} is a folder; name the file, such as {output / 'model.safetensors'}"
        )
    if output.exists() and not overwrite:
        raise ExchangeError(f"{output} is there already; --overwrite replaces it")
    given = {name: value for name, value in sizes.items() if value is not None}
    found = read_foreign(source, format, vocab=vocab, activation=activation, sizes=given)
    for note in found.notes:
        click.echo(note, err=True)
    save_checkpoint(output, found.checkpoint())
    values = describe(output, found)
    if json:
        print_json(values)
        return
    click.echo(
        f"✓ {values['parameters']:,} parameters of {values['format']} written to {output} "
        f"(step {values['step']:,}, vocabulary {values['vocab_size']:,})"
    )
    click.echo(f"Let it write: mlxgpt sample --checkpoint {output}")


def describe(out: Path, found: ImportedModel) -> dict[str, Any]:
    """The JSON of the command."""
    from dataclasses import asdict

    from mlx_randygpt.model import parameter_count

    return {
        "path": str(out),
        "format": found.format,
        "source": str(found.source),
        "parameters": parameter_count(found.model),
        "step": found.step,
        "moments": bool(found.moments),
        "vocab_size": found.model.vocab_size,
        "tokenizer": found.tokenizer.to_json()["type"],
        "model": asdict(found.model),
        "notes": list(found.notes),
    }
