"""`mlxgpt find-lr`: a range test with its curve in the terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from mlx_randygpt.cli.errors import Command
from mlx_randygpt.cli.options import (
    backend_option,
    json_option,
    model_options,
    reading_options,
    tokenizer_options,
)
from mlx_randygpt.cli.output import print_json
from mlx_randygpt.config import OPTIMIZERS

if TYPE_CHECKING:
    from mlx_randygpt.training.find_lr import Trial

WIDTH, HEIGHT = 64, 12  # of the curve, in characters


@click.command("find-lr", cls=Command)
@click.option("--data", multiple=True, help="As for train.")
@tokenizer_options
@reading_options
@model_options()
@click.option("--batch-size", type=int, help="[default: preset, 64]")
@click.option("--optimizer", type=click.Choice(OPTIMIZERS), help="[default: recipe]")
@click.option("--from", "lowest", default=1e-4, show_default=True, help="Lowest rate.")
@click.option("--to", "highest", default=1.0, show_default=True, help="Highest rate.")
@click.option("--iters", default=100, show_default=True, help="Steps, one rate each.")
@click.option("--seed", type=int)
@backend_option
@json_option
def command(
    data: tuple[str, ...], lowest: float, highest: float, iters: int, backend: str, json: bool,
    **options: Any,
) -> None:  # fmt: skip
    """Find a learning rate: train a few steps at rates that grow, draw the loss, suggest one.

    Nothing is saved. Under Muon the rate is that of the matrices, as for `train --lr`.
    """
    from mlx_randygpt import settings
    from mlx_randygpt.backends import choose, make_backend
    from mlx_randygpt.cli.loading import describe_backend
    from mlx_randygpt.cli.training import text
    from mlx_randygpt.data.corpus import check_length
    from mlx_randygpt.model import initial_params
    from mlx_randygpt.state import TrainState
    from mlx_randygpt.training.find_lr import range_test, suggest

    if not 0 < lowest < highest < float("inf") or iters < 2:
        raise click.UsageError(
            f"--from {lowest:g} --to {highest:g} --iters {iters}: rates must grow from above 0, "
            "over at least 2 steps"
        )
    given = {name: value for name, value in options.items() if value is not None}
    tokenizer, corpus = text.load(
        text.files_of(data), text.reading(given), text.requested_tokenizer(given)
    )  # fmt: skip
    model, train = settings.resolve_new(given | {"iters": iters}, tokenizer.vocab_size)
    check_length(corpus, model.block_size)
    name, why = choose(backend)
    state = TrainState(0, initial_params(model, train.seed), {})
    engine = make_backend(name, model, train, state)
    click.echo(f"Backend: {describe_backend(engine, why)}", err=True)
    trials = list(
        range_test(engine, model, train, corpus.train, lowest=lowest, highest=highest, steps=iters)
    )
    rate = suggest(trials)
    if json:
        rows = [{"lr": trial.lr, "loss": trial.loss} for trial in trials]
        print_json({"suggestion": rate, "recipe_lr": train.lr, "trials": rows})
        return
    click.echo("\n".join(chart(trials)))
    click.echo(f"\nSuggested: --lr {rate:.2g} (the {train.recipe} recipe has {train.lr:g})")


def chart(trials: list[Trial]) -> list[str]:
    """Loss over the logarithm of the rate, in braille dots, with its axes."""
    from math import log10

    from mlx_randygpt.screen.curve import draw, frame

    points = [(float(i), trial.loss) for i, trial in enumerate(trials) if trial.loss == trial.loss]
    box = frame(points, (), (0, max(1, len(trials) - 1)), (WIDTH, HEIGHT))
    lines = [
        f"{box.value(row):7.3f} {'┤' if row % 4 == 0 or row == HEIGHT - 1 else '│'}{drawn}"
        for row, drawn in enumerate(draw(points, box))
    ]
    low, high = trials[0].lr, trials[-1].lr
    middle = 10 ** ((log10(low) + log10(high)) / 2)
    labels = f"{low:<22.1e}{middle:^20.1e}{high:>22.1e}"
    return ["   loss", *lines, f"{'':9}{labels}", f"{'':9}{'learning rate':^64}"]
