"""`--minutes` and `--hours`: the preset and the steps that a time allows on this machine."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import click

from mlx_randygpt.cli.options import options
from mlx_randygpt.cli.output import echo
from mlx_randygpt.cli.values import Number

if TYPE_CHECKING:
    from mlx_randygpt.config import ModelConfig, TrainConfig
    from mlx_randygpt.planning.expected_loss import TextFacts
    from mlx_randygpt.planning.time_budget import Measure, TimedRun

time_options = options(
    click.option(
        "--minutes",
        type=Number(0, min_open=True),
        help="Train for this long: preset and steps follow from the text and the machine.",
    ),
    click.option("--hours", type=Number(0, min_open=True), help="Train for this many hours."),
)


def take_minutes(values: dict[str, Any]) -> dict[str, Any]:
    """Return the values of a command with `--hours` turned into `--minutes`."""
    hours, minutes = values["hours"], values["minutes"]
    if hours and minutes:
        raise click.UsageError(
            f"--minutes {minutes:g} and --hours {hours:g} are both times; omit one"
        )
    rest = {name: value for name, value in values.items() if name != "hours"}
    return rest | ({"minutes": 60 * hours} if hours else {})


def measure_here(backend: str, threads: int) -> Measure:
    """Return a function that measures the training steps of a model on this machine."""
    from mlx_randygpt.backends import make_backend
    from mlx_randygpt.model import initial_state
    from mlx_randygpt.planning.plan import step_seconds

    def measure(model: ModelConfig, train: TrainConfig, seconds: float) -> float:
        state = initial_state(model, train.seed)
        engine = make_backend(backend, model, replace(train, threads=threads), state)
        return step_seconds(engine, model, train, train.batch_size, time.perf_counter, seconds)

    echo("Measuring short steps on this machine …", err=True)
    return measure


def choose(
    given: Mapping[str, Any], vocab_size: int, text: TextFacts, measure: Measure
) -> TimedRun:
    """Choose the run that fits into the `minutes` of the options."""
    from mlx_randygpt.planning.time_budget import choose_run

    rest = {name: value for name, value in given.items() if name != "minutes"}
    return choose_run(rest, 60 * given["minutes"], vocab_size, text, measure)


def settle(given: Mapping[str, Any], run: TimedRun) -> dict[str, Any]:
    """Return the options with the preset and the steps that the time has decided.

    The time itself stays among them if the run is to end with it.
    """
    rest = {name: value for name, value in given.items() if name != "minutes"}
    sizes = {"iters": run.train.iters, "preset": run.train.preset}
    ends_with_time = {"minutes": given["minutes"]} if run.is_full else {}
    return sizes | rest | ends_with_time
