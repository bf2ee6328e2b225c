"""What commands share: error lines, `--config` and `--debug`, the model options."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import click

from mlx_randygpt.config import ARCHS, BACKENDS, ModelConfig, TrainConfig
from mlx_randygpt.recipes import DEFAULT_PRESET, PRESETS, RECIPES

F = TypeVar("F", bound=Callable[..., Any])


def quantize_option(function: F) -> F:
    """--quantize, of every command that only lets a model compute."""

    def bits(ctx: click.Context, param: click.Parameter, value: int | None) -> int | None:
        if value not in (None, 8, 4):
            raise click.BadParameter(f"{value} bits; it is 8 or 4", ctx, param)
        return value

    return click.option(
        "--quantize", type=int, metavar="8|4", callback=bits,
        help="Hold the weights in so many bits (MLX).  [default: off, 32]",
    )(function)  # fmt: skip


def checkpoint_option(function: F) -> F:
    """--checkpoint, of every command that works with a trained model."""
    return click.option(
        "--checkpoint",
        type=click.Path(path_type=Path),
        help="[default: the best of checkpoints/, else the newest]",
    )(function)


def sampling_options(function: F) -> F:
    """What decides which token comes next; the names are the fields of SampleConfig."""
    options = [
        click.option("--max-tokens", default=200, show_default=True),
        click.option(
            "--temperature", default=0.8, show_default=True, help="0 always takes the likeliest."
        ),
        click.option(
            "--top-p", default=0.9, show_default=True, help="Likeliest tokens up to this sum."
        ),
        click.option("--top-k", default=0, show_default=True, help="The k likeliest; 0 is off."),
        click.option(
            "--min-p", default=0.0, show_default=True, help="At least this share of the likeliest."
        ),
        click.option(
            "--typical-p", default=1.0, show_default=True,
            help="About as surprising as the average, up to this sum; 1 is off.",
        ),
        click.option("--repetition-penalty", default=1.0, show_default=True),
        click.option("--presence-penalty", default=0.0, show_default=True),
        click.option("--frequency-penalty", default=0.0, show_default=True),
        click.option(
            "--logit-bias", multiple=True, metavar="TOKEN=X",
            help="Add X to the logit of a token, its text or #id; may be given several times.",
        ),
        click.option(
            "--stop", multiple=True, help="Text to stop before; may be given several times."
        ),
        click.option("--seed", default=1337, show_default=True),
    ]  # fmt: skip
    for option in reversed(options):
        function = option(function)
    return function


def model_options(defaults: bool = True) -> Callable[[F], F]:
    """The options that decide the model: recipe, preset and the numbers of it. `defaults` names
    them in the help; where a checkpoint decides there are none."""

    def default(text: str) -> str:
        return f"  [default: {text}]" if defaults else ""

    options = [
        click.option(
            "--recipe",
            type=click.Choice(sorted(RECIPES)),
            help=f"Model and rates.{default('modern')}",
        ),
        click.option(
            "--arch",
            type=click.Choice(list(ARCHS)),
            help=f"Our model or GPT-2's.{default('gpt')}",
        ),
        click.option(
            "--preset",
            type=click.Choice(list(PRESETS)),
            metavar="NAME",
            help=f"Sizes by name; see `mlxgpt presets`.{default(DEFAULT_PRESET)}",
        ),
        click.option("--n-layer", type=int, help="Layers."),
        click.option("--n-head", type=int, help="Attention heads."),
        click.option("--n-embd", type=int, help="Width."),
        click.option("--block-size", type=int, help="Context, in tokens."),
        click.option("--dropout", type=float, help=f"After attention and MLP.{default('rule')}"),
    ]

    def decorate(function: F) -> F:
        for option in reversed(options):
            function = option(function)
        return function

    return decorate


def backend_option(function: F) -> F:
    """--backend, for every command that computes."""
    choice = click.Choice(["auto", *BACKENDS])
    text = "auto: MLX where it has a GPU, else NumPy."
    return click.option("--backend", type=choice, default="auto", show_default=True, help=text)(
        function
    )


def json_option(function: F) -> F:
    """--json, for every command that reports figures."""
    text = "Print exactly one JSON object on stdout."
    return click.option("--json", is_flag=True, help=text)(function)


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


def given_options(options: dict[str, Any]) -> dict[str, Any]:
    """What the user set; `--micro-batch auto` is no number yet and has a key of its own."""
    given = {name: value for name, value in options.items() if value is not None}
    if given.get("micro_batch") == "auto":
        given[AUTO] = bool(given.pop("micro_batch"))
    return given


def fit_micro_batch(
    given: dict[str, Any], model: ModelConfig, train: TrainConfig, backend: str
) -> tuple[TrainConfig, str]:
    """The settings with the micro-batch that was asked for, and a line that tells of it."""
    if backend == "numpy" and (given.get(AUTO) or given.get("micro_batch")):
        line = "NumPy works through chunks of bounded size; --micro-batch changes nothing there."
        return train, line
    if not given.get(AUTO):
        return train, ""
    from mlx_randygpt.planning.devices import here
    from mlx_randygpt.planning.footprint import micro_batch

    device = here(backend)
    size = micro_batch(backend, model, train, device.memory, device.unified)
    passes = f"{size} sequences a pass" if size else "the whole batch in one pass"
    return replace(train, micro_batch=size), f"Micro-batch: {passes}, to fit into this device."


def tokenizer_options(function: F) -> F:
    """--tokenizer and --vocab-size, where a run begins."""
    for option in reversed(
        [
            click.option(
                "--tokenizer",
                metavar="NAME",
                help="char, bpe, wordpiece, or a tokenizer.json.  [default: char]",
            ),
            click.option(
                "--vocab-size",
                type=int,
                help="Characters at most, or tokens.  [default: 512 for char, else 1024]",
            ),
        ]
    ):
        function = option(function)
    return function


def reading_options(function: F) -> F:
    """--encoding and --text-field, where files are read."""
    for option in reversed(
        [
            click.option("--encoding", help="Of text files.  [default: utf-8]"),
            click.option(
                "--text-field", help="Of the rows of .jsonl and .parquet.  [default: text]"
            ),
        ]
    ):
        function = option(function)
    return function
