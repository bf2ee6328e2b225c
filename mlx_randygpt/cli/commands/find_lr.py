"""`mlxgpt find-lr`: a learning rate range test, drawn in the terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from mlx_randygpt.cli.errors import Command
from mlx_randygpt.cli.options import (
    backend_option,
    data_option,
    json_option,
    model_options,
    optimizer_option,
    reading_options,
    tokenizer_options,
)
from mlx_randygpt.cli.output import echo, print_json

if TYPE_CHECKING:
    from mlx_randygpt.training.find_lr import Trial

WIDTH, HEIGHT = 64, 12  # of the curve, in characters


@click.command("find-lr", cls=Command)
@data_option
@tokenizer_options
@reading_options
@model_options(by_text=True)
@click.option(
    "--batch-size",
    type=int,
    help="Draw this many sequences per step.  [default: 64; 8 for gpt2 presets]",
)
@optimizer_option
@click.option("--from", "lowest", default=1e-4, show_default=True, help="Begin at this rate.")
@click.option("--to", "highest", default=1.0, show_default=True, help="End at this rate.")
@click.option(
    "--iters", default=100, show_default=True, help="Train this many steps, each at its own rate."
)
@click.option("--seed", type=int, help="Draw by this random seed.  [default: 1337]")
@backend_option
@json_option
def command(
    data: tuple[str, ...],
    lowest: float,
    highest: float,
    iters: int,
    backend: str,
    json: bool,
    **options: Any,
) -> None:
    """Find a learning rate: train for a few steps at increasing rates, plot the loss, suggest one.

    Nothing is saved. With Muon it is the rate of the matrices, as `mlxgpt train --lr` sets it.
    """
    from mlx_randygpt import settings
    from mlx_randygpt.backends import choose, make_backend
    from mlx_randygpt.cli.loading import describe_backend
    from mlx_randygpt.cli.training import text
    from mlx_randygpt.data.corpus import check_length
    from mlx_randygpt.data.mixture import Drawing, training_windows
    from mlx_randygpt.model import initial_state
    from mlx_randygpt.training.find_lr import is_worth_trying, range_test, suggest
    from mlx_randygpt.training.loop import step_batches

    if not 0 < lowest < highest < float("inf") or iters < 2:
        raise click.UsageError(
            f"--from {lowest:g} --to {highest:g} --iters {iters}: rates must grow from above 0, "
            "in at least 2 steps"
        )
    given = {name: value for name, value in options.items() if value is not None}
    sources, requested = text.sources_of(data), text.requested_tokenizer(given)
    tokenizer, corpus = text.load(
        [source.file for source in sources], text.reading(given), requested
    )
    given, n_tokens = given | {"iters": iters}, len(corpus.train)
    model, train = settings.resolve_new(given, tokenizer.vocab_size, n_tokens)
    check_length(corpus, model.block_size)
    name, reason = choose(backend)
    state = initial_state(model, train.seed)
    engine = make_backend(name, model, train, state)
    chosen = settings.choices_note(given, train, n_tokens)
    for line in filter(None, [*text.tokenizer_lines(corpus, tokenizer), chosen]):
        echo(line, err=True, wrapped=True)
    echo(f"Backend: {describe_backend(engine, reason)}", err=True, wrapped=True)
    windows = training_windows(corpus, tokenizer, sources, Drawing(model.block_size))
    batches = [
        batch
        for step in range(iters)
        for batch in step_batches(train, corpus.train, model.block_size, step, windows)
    ]
    trials = list(range_test(engine, batches, lowest=lowest, highest=highest))
    rate = suggest(trials)
    if json:
        rows = [{"lr": trial.lr, "loss": trial.loss} for trial in trials]
        worth = is_worth_trying(rate, train.lr)
        print_json(
            {"suggestion": rate, "recipe_lr": train.lr, "worth_trying": worth, "trials": rows}
        )
        return
    echo("\n".join(chart(trials)))
    echo(f"\nSuggested: --lr {rate:.2g} (the {train.recipe} recipe has {train.lr:g})")
    if is_worth_trying(rate, train.lr):
        echo("Worth a try: compare both over a few hundred steps before a long run.", wrapped=True)
    else:
        echo(
            "Not worth a change: rates this close to the recipe's end within a range test's noise.",
            wrapped=True,
        )


def chart(trials: list[Trial]) -> list[str]:
    """Draw the loss over the logarithm of the rate in braille dots, with axes."""
    from math import log10

    from mlx_randygpt.screen.curve import draw, frame

    points = [(float(i), trial.loss) for i, trial in enumerate(trials) if trial.loss == trial.loss]
    box = frame(points, (), (0, max(1, len(trials) - 1)), (WIDTH, HEIGHT))
    lines = [
        f"{box.value(row):7.3f} {'┤' if row % 4 == 0 or row == HEIGHT - 1 else '│'}{dots}"
        for row, dots in enumerate(draw(points, box))
    ]
    low, high = trials[0].lr, trials[-1].lr
    middle = 10 ** ((log10(low) + log10(high)) / 2)
    labels = f"{low:<22.1e}{middle:^20.1e}{high:>22.1e}"
    return ["   loss", *lines, f"{'':9}{labels}", f"{'':9}{'learning rate':^64}"]
