"""The options that trade time for memory, of `train` and `plan`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeVar

import click

from mlx_randygpt.config import ModelConfig, TrainConfig

F = TypeVar("F", bound=Callable[..., Any])
AUTO = "auto_micro_batch"  # a key of what was given, where it was `--micro-batch auto`


class MicroBatch(click.ParamType):  # type: ignore[type-arg]
    """A number of sequences, or `auto`."""

    name = "number or auto"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> int | str:
        if value == "auto":
            return "auto"
        try:
            return int(value)
        except ValueError:
            self.fail(f"{value!r} is neither a number of sequences nor auto", param, ctx)


def memory_options(function: F) -> F:
    """--micro-batch and --checkpoint-activations."""
    options = [
        click.option(
            "--micro-batch", type=MicroBatch(), metavar="N|auto",
            help="Sequences of one pass of MLX; the batch and its gradient stay the same. auto: "
            "what fits.  [default: all]",
        ),
        click.option(
            "--checkpoint-activations/--keep-activations", default=None,
            help="Keep only what enters each layer, and make the rest again: less memory, about "
            "a quarter more time.  [default: keep]",
        ),
    ]  # fmt: skip
    for option in reversed(options):
        function = option(function)
    return function


def given_of(options: dict[str, Any]) -> dict[str, Any]:
    """What the user set; `--micro-batch auto` is no number yet and has a key of its own."""
    given = {name: value for name, value in options.items() if value is not None}
    if given.get("micro_batch") == "auto":
        given[AUTO] = bool(given.pop("micro_batch"))
    return given


def fitted(
    given: dict[str, Any], model: ModelConfig, train: TrainConfig, backend: str
) -> tuple[TrainConfig, str]:
    """The settings with the micro-batch that was asked for, and a line that tells of it."""
    if backend == "numpy" and (given.get(AUTO) or given.get("micro_batch")):
        line = "NumPy works through chunks of bounded size; --micro-batch changes nothing there."
        return train, line
    if not given.get(AUTO):
        return train, ""
    from mlx_randygpt.devices import here
    from mlx_randygpt.footprint import micro_batch

    device = here(backend)
    size = micro_batch(backend, model, train, device.memory, device.unified)
    passes = f"{size} sequences a pass" if size else "the whole batch in one pass"
    return replace(train, micro_batch=size), f"Micro-batch: {passes}, to fit into this device."
