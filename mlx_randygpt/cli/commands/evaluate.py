"""`mlxgpt eval`: the loss of a checkpoint on a whole split."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mlx_randygpt.cli.errors import Command
from mlx_randygpt.cli.loading import build, read, require_mlx
from mlx_randygpt.cli.options import (
    backend_option,
    checkpoint_option,
    json_option,
    model_options,
    quantize_option,
    reading_options,
)
from mlx_randygpt.cli.output import print_json

if TYPE_CHECKING:
    from mlx_randygpt.checkpoint import Checkpoint
    from mlx_randygpt.state import Array
    from mlx_randygpt.tokenizers import Tokenizer
    from mlx_randygpt.training.evaluation import Score


@click.command("eval", cls=Command)
@checkpoint_option
@click.option("--data", multiple=True, help="Text to score.  [default: the run's own]")
@click.option(
    "--split", type=click.Choice(["val", "train", "all"]), default="val", show_default=True
)
@reading_options
@model_options(defaults=False)
@click.option("--batch-size", type=int, default=64, show_default=True)
@quantize_option
@backend_option
@json_option
def command(
    checkpoint: Path | None, data: tuple[str, ...], split: str, batch_size: int, backend: str,
    quantize: int | None, json: bool, **options: Any,
) -> None:  # fmt: skip
    """Score a checkpoint on a whole split: the same number every time.

    Non-overlapping windows, every token but the first predicted once. Model options, where given,
    must be those of the checkpoint.
    """
    from mlx_randygpt import settings
    from mlx_randygpt.cli.training import text

    if batch_size < 1:
        raise click.BadParameter(
            f"{batch_size} is too small; it must be at least 1", param_hint="--batch-size"
        )
    _, saved, tokenizer = read(checkpoint)
    settings.resolve_resume(
        {k: v for k, v in options.items() if v is not None}, saved.model, saved.train
    )
    files = text.files_of(data or saved.data["paths"])
    _, corpus = text.load(files, text.reading(options, saved.data), tokenizer)
    if line := text.unknown_line(corpus.unknown):
        click.echo(line, err=True)
    if quantize is not None:  # compared in one type; and what is wrong is told before it takes time
        saved = replace(saved, train=replace(saved.train, dtype="float32"))
        require_mlx(backend)
    tokens = {"val": corpus.val, "train": corpus.train, "all": corpus.tokens}[split]
    score = _score(saved, tokens, batch_size, tokenizer, backend, None)
    cost: dict[str, float] = {}
    if quantize is not None:
        full, score = score, _score(saved, tokens, batch_size, tokenizer, backend, quantize)
        cost = {"loss_float": full.loss, "loss_cost": score.loss - full.loss, "bits": quantize}
    values = {
        "loss": score.loss,
        "perplexity": score.perplexity,
        "bits_per_byte": score.bits_per_byte,
        "tokens": score.tokens,
        "split": split,
        **cost,
    }
    if json:
        print_json(values)
        return
    click.echo(
        f"{split} loss {score.loss:.4f} | perplexity {score.perplexity:.2f} | "
        f"{score.bits_per_byte:.3f} bits/byte | {score.tokens:,} tokens | "
        f"step {saved.state.step}"
    )
    if cost:
        click.echo(
            f"{quantize} bits cost {cost['loss_cost']:+.4f}: the float32 weights have "
            f"{cost['loss_float']:.4f}"
        )


def _score(
    saved: Checkpoint, tokens: Array, batch_size: int, tokenizer: Tokenizer, backend: str,
    quantize: int | None,
) -> Score:  # fmt: skip
    from mlx_randygpt.training.evaluation import evaluate

    engine = build(saved, backend, quantize)
    score = evaluate(engine, tokens, saved.model.block_size, batch_size, tokenizer.token_bytes())
    assert score is not None
    return score
