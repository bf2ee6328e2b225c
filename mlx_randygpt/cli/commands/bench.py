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
@click.option(
    "--streams",
    type=click.IntRange(min=1),
    help="Sample with 1, 2, 4, … up to this many streams, one after the other.",
)
@threads_option
@backend_option
@json_option
def command(mode: str, backend: str, json: bool, streams: int | None, **options: Any) -> None:
    """Measure training or sampling speed with random weights and tokens; report medians."""
    from dataclasses import asdict, replace

    from mlx_randygpt import settings
    from mlx_randygpt.backends import choose, make_backend
    from mlx_randygpt.cli.loading import describe_backend
    from mlx_randygpt.cli.training.request import describe_model
    from mlx_randygpt.model import initial_state
    from mlx_randygpt.planning.bench import measure_sampling, measure_training, sweep

    given = {name: value for name, value in options.items() if value is not None}
    if streams is not None:
        if mode == "train" or "batch_size" in given:
            message = "--streams is for `bench sample`, without --batch-size"
            raise click.UsageError(message)
        given["batch_size"] = streams
    if mode == "sample":
        given.setdefault("batch_size", 1)
    given.setdefault("iters", DEFAULT_ITERS[mode])
    model, train = settings.resolve_new(given, VOCAB_SIZE)
    name, reason = choose(backend)
    state = initial_state(model, train.seed)
    built = make_backend(name, model, train, state)
    echo(f"Backend: {describe_backend(built, reason)}", err=True, wrapped=True)
    sizes = sweep(streams) if streams is not None else [train.batch_size]
    measure = measure_sampling if mode == "sample" else measure_training
    results = [measure(built, model, replace(train, batch_size=n), train.iters) for n in sizes]
    if json:
        swept = {"sweep": [asdict(result) for result in results]} if streams is not None else {}
        print_json({**asdict(results[-1]), **swept})
    else:
        show_facts(facts(results, describe_model(model), train.iters))


def facts(results: list[Bench], model: str, n: int) -> Iterator[tuple[str, str]]:
    """Yield the measurements, of one size or of a sweep, as names and values."""
    yield "Model", f"{model} ({results[0].recipe})"
    for result in results if len(results) > 1 else []:
        speed = f"{result.tokens_per_second:,.0f} tokens/s, {result.step_ms:,.2f} ms per token"
        yield n_streams(result), f"{speed}, median of {n}"
    result = results[-1]
    if len(results) == 1:
        trained = f"step of {result.batch_size} × {result.block_size} tokens"
        step = trained if result.mode == "train" else f"token of {n_streams(result)}"
        yield "Speed", f"{result.tokens_per_second:,.0f} tokens/s"
        yield "Time", f"{result.step_ms:,.2f} ms per {step}, median of {n}"
    if result.decoding is not None:
        yield "Decoding", result.decoding
    yield "Memory", f"{result.peak_memory_mb:,.0f} MB at the peak"
    yield "Compute", f"{result.flops_fraction:.1%} of the device's float32 matrix-product rate"


def n_streams(result: Bench) -> str:
    """Return the number of streams, in words."""
    return f"{result.batch_size} stream{'s' if result.batch_size > 1 else ''}"
