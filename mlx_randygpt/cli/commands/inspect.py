"""`mlxgpt inspect`: show the inside of a model as one HTML page."""

from __future__ import annotations

from pathlib import Path

import click

from mlx_randygpt.cli.errors import Command
from mlx_randygpt.cli.loading import read
from mlx_randygpt.cli.options import data_path
from mlx_randygpt.cli.output import echo
from mlx_randygpt.cli.values import FilePath

DEFAULT_TOKENS = 50_000


@click.command("inspect", cls=Command)
@click.argument("checkpoint", required=False, type=FilePath(path_type=Path))
@click.option(
    "-o",
    "--output",
    type=FilePath(path_type=Path, dir_okay=False),
    default="inspect.html",
    show_default=True,
    help="Write this page.",
)
@click.option(
    "--text", help="Show the attention in this text.  [default: from the validation text]"
)
@click.option(
    "--data",
    type=data_path,
    multiple=True,
    help="Evaluate on this text; repeatable.  [default: the run's own]",
)
@click.option(
    "--max-tokens",
    type=click.IntRange(1),
    default=DEFAULT_TOKENS,
    show_default=True,
    help="Evaluate at most this many tokens of the validation text.",
)
def command(
    checkpoint: Path | None, output: Path, text: str | None, data: tuple[str, ...], max_tokens: int
) -> None:
    """Write a page that shows the attention, embeddings, errors and training samples of a model.

    The page is self-contained and makes no network requests.
    """
    import numpy as np
    from threadpoolctl import threadpool_limits

    from mlx_randygpt.analysis.insight import losses
    from mlx_randygpt.analysis.insight_page import page
    from mlx_randygpt.analysis.metrics import read_samples
    from mlx_randygpt.cli.training import text as texts
    from mlx_randygpt.config import ConfigError
    from mlx_randygpt.data import DataError
    from mlx_randygpt.data.mixture import Drawing, validation_windows
    from mlx_randygpt.files import write
    from mlx_randygpt.state import plain_ids
    from mlx_randygpt.words import unknown_line

    path, saved, tokenizer = read(checkpoint)
    if text == "":
        raise ConfigError("--text '' is empty; give at least one character")
    files = texts.files_of(data or saved.data["paths"])
    _, corpus = texts.load(files, texts.reading({}, saved.data), tokenizer, saved.data)
    for line in (*texts.loss_lines(corpus, tokenizer), unknown_line(tokenizer.unknown(text or ""))):
        if line:
            echo(line, err=True, wrapped=True)
    with threadpool_limits(1):  # for many small products, threads cost more than they gain
        samples = read_samples(path.with_name("samples.jsonl"))
        val = np.asarray(corpus.val)
        if len(val) < 2:
            raise DataError(
                f"the validation text has {len(val)} tokens, at least 2 are needed; use more --data"
            )
        windows = validation_windows(corpus, tokenizer, Drawing(saved.model.block_size))
        scored = losses(saved.state.params, saved.model, val, max_tokens, windows)
        html = page(str(path), saved, tokenizer, plain_ids(val), text, scored, samples)
    try:
        write(output, html.encode("utf-8", "replace"))
    except OSError as error:
        raise ConfigError(f"{output} cannot be written: {error.strerror}") from error
    echo(f"✓ Saved {output}")
