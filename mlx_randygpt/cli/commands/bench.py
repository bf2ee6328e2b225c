"""`mlxgpt bench`: measure training or sampling on this machine."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import click

from mlx_randygpt.cli.errors import Command
from mlx_randygpt.cli.options import (
    backend_option,
    json_option,
    model_options,
    threads_option,
)
from mlx_randygpt.cli.output import echo, print_json, show_facts

if TYPE_CHECKING:
    from mlx_randygpt.planning.bench import Bench

VOCAB_SIZE = 67
DEFAULT_ITERS = {"train": 20, "sample": 200}


@click.command("bench", cls=Command)
@click.argument("mode", type=click.Choice(list(DEFAULT_ITERS)), default="train")
@model_options()
@click.option(
    "--batch-size",
    type=int,
    help="Compute this many sequences at once.  [default: 64; 8 for gpt2 presets; 1 for sample]",
)
@click.option(
    "--iters",
    type=int,
    help="Measure this many steps, or tokens for sample.  [default: 20; 200 for sample]",
)
@threads_option
@backend_option
@json_option
def command(mode: str, backend: str, json: bool, **options: Any) -> None:
    """Measure training or sampling speed with random weights and tokens; report medians."""
    from dataclasses import asdict

    from mlx_randygpt import settings
    from mlx_randygpt.backends import choose, make_backend
    from mlx_randygpt.cli.loading import describe_backend
    from mlx_randygpt.cli.training.request import describe_model
    from mlx_randygpt.model import initial_params
    from mlx_randygpt.planning.bench import measure_sampling, measure_training
    from mlx_randygpt.state import TrainState

    given = {name: value for name, value in options.items() if value is not None}
    if mode == "sample":
        given.setdefault("batch_size", 1)
    given.setdefault("iters", DEFAULT_ITERS[mode])
    model, train = settings.resolve_new(given, VOCAB_SIZE)
    name, reason = choose(backend)
    state = TrainState(0, initial_params(model, train.seed), {})
    built = make_backend(name, model, train, state)
    echo(f"Backend: {describe_backend(built, reason)}", err=True)
    measure = measure_sampling if mode == "sample" else measure_training
    result = measure(built, model, train, train.iters)
    if json:
        print_json(asdict(result))
    else:
        show_facts(facts(result, describe_model(model), train.iters))


def facts(result: Bench, model: str, n: int) -> Iterator[tuple[str, str]]:
    """Yield the measurement as names and values."""
    if result.mode == "train":
        step = f"step of {result.batch_size} × {result.block_size} tokens"
    else:
        step = f"token of {result.batch_size} stream{'s' if result.batch_size > 1 else ''}"
    yield "Model", f"{model} ({result.recipe})"
    yield "Speed", f"{result.tokens_per_second:,.0f} tokens/s"
    yield "Time", f"{result.step_ms:,.2f} ms per {step}, median of {n}"
    yield "Memory", f"{result.peak_memory_mb:,.0f} MB at the peak"
    yield "Compute", f"{result.flops_fraction:.1%} of the device's float32 matrix-product rate"
