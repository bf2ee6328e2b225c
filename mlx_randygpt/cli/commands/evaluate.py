"""`mlxgpt eval`: evaluate a checkpoint on a whole split."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mlx_randygpt.cli.errors import Command
from mlx_randygpt.cli.loading import build, read, require_mlx
from mlx_randygpt.cli.options import (
    backend_option,
    checkpoint_option,
    data_path,
    json_option,
    model_options,
    quantize_option,
    reading_options,
)
from mlx_randygpt.cli.output import echo, print_json

if TYPE_CHECKING:
    from mlx_randygpt.backends.base import Scorer
    from mlx_randygpt.data.corpus import Corpus
    from mlx_randygpt.state import Batch
    from mlx_randygpt.tokenizers import Tokenizer
    from mlx_randygpt.training.evaluation import Score


@click.command("eval", cls=Command)
@checkpoint_option
@click.option(
    "--data",
    type=data_path,
    multiple=True,
    help="Evaluate on this text; repeatable.  [default: the run's own]",
)
@click.option(
    "--split",
    type=click.Choice(["val", "train", "all"]),
    default="val",
    show_default=True,
    help="Evaluate on the validation text, the training text, or both.",
)
@reading_options
@model_options(defaults=False)
@click.option(
    "--batch-size",
    type=int,
    default=64,
    show_default=True,
    help="Compute this many windows at once.",
)
@quantize_option
@backend_option
@json_option
def command(
    checkpoint: Path | None,
    data: tuple[str, ...],
    split: str,
    batch_size: int,
    backend: str,
    quantize: int | None,
    json: bool,
    **options: Any,
) -> None:
    """Evaluate a checkpoint on a whole split; the result is the same every time.

    The windows do not overlap, and every token but the first is predicted once; of conversations,
    the answers. Model options, if
    given, must match the checkpoint.
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
    _, corpus = text.load(files, text.reading(options, saved.data), tokenizer, saved.data)
    for line in text.loss_lines(corpus, tokenizer):
        echo(line, err=True, wrapped=True)
    if quantize is not None:  # compare in one type, and fail before the first evaluation
        saved = replace(saved, train=replace(saved.train, dtype="float32"))
        require_mlx(backend)
    n_train = len(corpus.train)
    ranges = {"val": slice(n_train, None), "train": slice(n_train), "all": slice(None)}
    batches = list(_batches(corpus, tokenizer, ranges[split], saved.model.block_size, batch_size))
    score = _evaluate(build(saved, backend), batches, tokenizer)
    cost: dict[str, float] = {}
    if quantize is not None:
        full, quantized = score, build(saved, backend, quantize)
        score = _evaluate(quantized, batches, tokenizer)
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
    echo(
        f"{split} loss {score.loss:.4f} | perplexity {score.perplexity:.2f} | "
        f"{score.bits_per_byte:.3f} bits/byte | {score.tokens:,} tokens | "
        f"step {saved.state.step}",
        wrapped=True,
    )
    if cost:
        echo(
            f"{quantize} bits cost {cost['loss_cost']:+.4f}: the float32 weights have "
            f"{cost['loss_float']:.4f}",
            wrapped=True,
        )


def _batches(
    corpus: Corpus, tokenizer: Tokenizer, part: slice, block_size: int, batch_size: int
) -> Iterator[Batch]:
    from mlx_randygpt.data.mixture import Drawing, conversations_in
    from mlx_randygpt.data.windows import eval_batches

    tokens, conversations = corpus.tokens[part], None
    if corpus.n_conversations:
        first, end, _ = part.indices(len(corpus.tokens))
        starts = corpus.starts[(corpus.starts >= first) & (corpus.starts < end)] - first
        conversations = conversations_in(tokens, starts, tokenizer, Drawing(block_size))
    return eval_batches(tokens, block_size, batch_size, conversations=conversations)


def _evaluate(backend: Scorer, batches: Sequence[Batch], tokenizer: Tokenizer) -> Score:
    from mlx_randygpt.training.evaluation import score_batches

    score = score_batches(backend, batches, tokenizer.token_bytes())
    assert score is not None
    return score
