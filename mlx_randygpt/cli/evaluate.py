"""`mlxgpt eval`: the loss of a checkpoint on a whole split."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from mlx_randygpt.cli.options import (
    Command,
    backend_option,
    default_checkpoint,
    json_option,
    model_options,
    print_json,
)
from mlx_randygpt.cli.text_options import reading_options


@click.command("eval", cls=Command)
@click.option(
    "--checkpoint",
    type=click.Path(path_type=Path),
    help="[default: the best of checkpoints/, else the newest]",
)
@click.option("--data", multiple=True, help="Text to score.  [default: the run's own]")
@click.option(
    "--split", type=click.Choice(["val", "train", "all"]), default="val", show_default=True
)
@reading_options
@model_options(defaults=False)
@click.option("--batch-size", type=int, default=64, show_default=True)
@backend_option
@json_option
def command(
    checkpoint: Path | None, data: tuple[str, ...], split: str, batch_size: int, backend: str,
    json: bool, **options: Any,
) -> None:  # fmt: skip
    """Score a checkpoint on a whole split: the same number every time.

    Non-overlapping windows, every token but the first predicted once. Model options, where given,
    must be those of the checkpoint.
    """
    from mlx_randygpt.backends import choose, make_backend
    from mlx_randygpt.checkpoint import load_checkpoint
    from mlx_randygpt.cli import settings, text
    from mlx_randygpt.cli.model import describe_backend
    from mlx_randygpt.evaluation import evaluate
    from mlx_randygpt.tokenizer import tokenizer_from_json

    if batch_size < 1:
        raise click.BadParameter(
            f"{batch_size} is too small; it must be at least 1", param_hint="--batch-size"
        )
    saved = load_checkpoint(default_checkpoint(checkpoint), weights_only=True)
    settings.resumed({k: v for k, v in options.items() if v is not None}, saved)
    tokenizer = tokenizer_from_json(saved.tokenizer)
    files = text.files_of(data or saved.data["paths"])
    _, corpus = text.load(files, text.reading(options, saved.data), tokenizer)
    if line := text.unknown_line(corpus.unknown):
        click.echo(line, err=True)
    tokens = {"val": corpus.val, "train": corpus.train, "all": corpus.tokens}[split]
    name, why = choose(backend)
    engine = make_backend(name, saved.model, replace(saved.train, threads=0), saved.state)
    click.echo(f"Backend: {describe_backend(engine, why)}", err=True)
    score = evaluate(engine, tokens, saved.model.block_size, batch_size, tokenizer.token_bytes())
    assert score is not None
    values = {
        "loss": score.loss,
        "perplexity": score.perplexity,
        "bits_per_byte": score.bits_per_byte,
        "tokens": score.tokens,
        "split": split,
    }
    if json:
        print_json(values)
        return
    click.echo(
        f"{split} loss {score.loss:.4f} | perplexity {score.perplexity:.2f} | "
        f"{score.bits_per_byte:.3f} bits/byte | {score.tokens:,} tokens | "
        f"step {saved.state.step}"
    )
