"""Options that several commands share, each defined once.

`options(...)` stacks them on a command and names their section of `--help`. A single option is
applied as it is: `@json_option`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import click

from mlx_randygpt.cli.values import FilePath
from mlx_randygpt.config import ARCHS, BACKENDS, DTYPES, OPTIMIZERS, ModelConfig, TrainConfig
from mlx_randygpt.recipes import DEFAULT_PRESET, PRESETS, RECIPES

F = TypeVar("F", bound=Callable[..., Any])
Decorator = Callable[[F], F]


def options(*decorators: Decorator[Any], section: str = "") -> Decorator[Any]:
    """Return one decorator that adds these options in this order, in a section of `--help`."""

    def decorate(function: F) -> F:
        n_before = len(getattr(function, "__click_params__", ()))
        for decorator in reversed(decorators):
            function = decorator(function)
        if section:
            for option in function.__click_params__[n_before:]:  # type: ignore[attr-defined]
                option.section = section
        return function

    return decorate


# Where a command computes and what it prints

backend_option = click.option(
    "--backend",
    type=click.Choice(["auto", *BACKENDS]),
    default="auto",
    show_default=True,
    help="Compute with MLX or with NumPy; auto is MLX if it has a GPU, else NumPy. "
    "Small models write text with NumPy.",
)
json_option = click.option("--json", is_flag=True, help="Print exactly one JSON object on stdout.")
threads_option = click.option(
    "--threads", type=int, help="Use this many threads (NumPy only).  [default: all cores]"
)

# The text

data_path = FilePath(readable=False, allow_dash=True)  # reading it names what is wrong
data_option = click.option(
    "--data",
    type=data_path,
    multiple=True,
    help="Read these text files or folders, as `mlxgpt train` does; repeatable.",
)
tokenizer_options = options(
    click.option(
        "--tokenizer",
        type=FilePath(readable=False),
        metavar="NAME",
        help="Split the text by auto, char, bpe, wordpiece, or a tokenizer.json.  [default: auto]",
    ),
    click.option(
        "--vocab-size",
        type=int,
        help="Limit the vocabulary.  [default: at most 512 characters; subwords by the text]",
    ),
    section="Text",
)
reading_options = options(
    click.option("--encoding", help="Decode text files by this encoding.  [default: utf-8]"),
    click.option(
        "--text-field", help="Read this field of .jsonl and .parquet rows.  [default: text]"
    ),
    click.option("--me", metavar="NAME", help="Learn the answers of NAME in an exported chat."),
    click.option("--as-text", is_flag=True, default=None, help="Read conversations as plain text."),
    click.option(
        "--skip-bad-rows",
        is_flag=True,
        default=None,
        help="Leave out invalid rows, and report how many there are.",
    ),
    section="Text",
)

# The model


def model_options(defaults: bool = True, by_text: bool = False) -> Decorator[Any]:
    """Return the options that decide the model: recipe, preset and sizes.

    `defaults` names the defaults in the help; omit them if a checkpoint decides. `by_text`: a text
    decides some of them.
    """

    def default(text: str) -> str:
        return f"  [default: {text}]" if defaults else ""

    preset = f"{DEFAULT_PRESET}; tiny for a short text" if by_text else DEFAULT_PRESET
    dropout = "0; 0.1 for a large model on a short text" if by_text else "0"
    return options(
        click.option(
            "--recipe",
            type=click.Choice(sorted(RECIPES)),
            help=f"Choose model switches and training settings.{default('modern')}",
        ),
        click.option(
            "--arch",
            type=click.Choice(list(ARCHS)),
            help=f"Build this project's model, or GPT-2.{default('gpt')}",
        ),
        click.option(
            "--preset",
            type=click.Choice(list(PRESETS)),
            metavar="NAME",
            help=f"Choose the model's sizes by name; `mlxgpt presets` lists them.{default(preset)}",
        ),
        click.option("--n-layer", type=int, help=f"Stack this many layers.{default('preset')}"),
        click.option(
            "--n-head", type=int, help=f"Split attention into this many heads.{default('preset')}"
        ),
        click.option("--n-embd", type=int, help=f"Set the width of the model.{default('preset')}"),
        click.option(
            "--block-size", type=int, help=f"Let the model see this many tokens.{default('preset')}"
        ),
        click.option(
            "--dropout",
            type=float,
            help=f"Drop this share of values after attention and MLP.{default(dropout)}",
        ),
        section="Model",
    )


# Training

optimizer_option = click.option(
    "--optimizer", type=click.Choice(OPTIMIZERS), help="Choose the optimizer.  [default: recipe]"
)
dtype_option = click.option(
    "--dtype",
    type=click.Choice(DTYPES),
    help="Compute in this type (MLX only); weights stay float32.  [default: float32]",
)
grad_accum_option = click.option(
    "--grad-accum",
    type=int,
    help="Average the gradients of this many batches in each step.  [default: 1]",
)

AUTO = "auto_micro_batch"  # key that stands for `--micro-batch auto` until the size is known


class MicroBatch(click.ParamType):  # type: ignore[type-arg]
    """A number of sequences, or `auto`."""

    name = "number or auto"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> int | str:
        """Return `auto` or an integer; fail on anything else."""
        if value == "auto":
            return "auto"
        try:
            return int(value)
        except ValueError:
            self.fail(f"{value!r} is neither a number of sequences nor auto", param, ctx)


memory_options = options(
    click.option(
        "--micro-batch",
        type=MicroBatch(),
        metavar="N|auto",
        help="Cut a batch into micro-batches of N sequences to save memory (MLX only); the "
        "gradient stays the same. auto takes as many as fit.  [default: the whole batch]",
    ),
    click.option(
        "--checkpoint-activations/--keep-activations",
        default=None,
        help="Recompute activations in the backward pass, which saves memory and takes about a "
        "quarter more time.  [default: keep]",
    ),
    section="Memory",
)


def given_options(values: dict[str, Any]) -> dict[str, Any]:
    """Return the options that the user set; `--micro-batch auto` gets a key of its own."""
    given = {name: value for name, value in values.items() if value is not None}
    if given.get("micro_batch") == "auto":
        given[AUTO] = bool(given.pop("micro_batch"))
    return given


def fit_micro_batch(
    given: dict[str, Any], model: ModelConfig, train: TrainConfig, backend: str
) -> tuple[TrainConfig, str]:
    """Return the settings with the requested micro-batch, and a line that reports it."""
    if backend == "numpy" and (given.get(AUTO) or given.get("micro_batch")):
        return train, "NumPy computes in chunks of bounded size; --micro-batch has no effect."
    if not given.get(AUTO):
        return train, ""
    from mlx_randygpt.planning.devices import here
    from mlx_randygpt.planning.footprint import micro_batch

    device = here(backend)
    size = micro_batch(backend, model, train, device.memory, device.unified)
    passes = f"{size} sequences per pass" if size else "the whole batch in one pass"
    return replace(train, micro_batch=size), f"Micro-batch: {passes}, to fit into this device."


# A trained model and its samples

check_options = options(
    click.option(
        "--check",
        is_flag=True,
        help="Report what the generated text copies from the training text.",
    ),
    click.option(
        "--data",
        type=data_path,
        multiple=True,
        help="With --check, compare with this text; repeatable.  [default: the run's own]",
    ),
)


def _check_bits(ctx: click.Context, param: click.Parameter, value: int | None) -> int | None:
    if value not in (None, 8, 4):
        raise click.BadParameter(f"{value} bits; it must be 8 or 4", ctx, param)
    return value


checkpoint_option = click.option(
    "--checkpoint",
    type=FilePath(path_type=Path),
    help="Use this checkpoint, or the best one of this run's folder.  [default: checkpoints]",
)


def require_check(check: bool, data: tuple[str, ...]) -> None:
    """Raise UsageError if `--data` is given without `--check`."""
    if data and not check:
        raise click.UsageError("--data is the text that --check compares with; add --check")


quantize_option = click.option(
    "--quantize",
    type=int,
    metavar="8|4",
    callback=_check_bits,
    help="Store the weights in 8 or 4 bits (MLX only).  [default: 32]",
)
sampling_options = options(  # named as the fields of SampleConfig
    click.option(
        "--max-tokens", default=200, show_default=True, help="Stop after this many tokens."
    ),
    click.option(
        "--temperature",
        default=0.8,
        show_default=True,
        help="Make likely tokens likelier below 1; 0 always takes the likeliest.",
    ),
    click.option(
        "--top-p",
        default=0.9,
        show_default=True,
        help="Keep the likeliest tokens up to this total probability; 1 is off.",
    ),
    click.option(
        "--top-k", default=0, show_default=True, help="Keep the k likeliest tokens; 0 is off."
    ),
    click.option(
        "--min-p",
        default=0.0,
        show_default=True,
        help="Keep tokens with at least this share of the highest probability; 0 is off.",
    ),
    click.option(
        "--typical-p",
        default=1.0,
        show_default=True,
        help="Keep the most typical tokens up to this total probability; 1 is off.",
    ),
    click.option(
        "--repetition-penalty",
        default=1.0,
        show_default=True,
        help="Make tokens of the prompt and the text less likely (above 1).",
    ),
    click.option(
        "--presence-penalty",
        default=0.0,
        show_default=True,
        help="Subtract from the logit of every token used before.",
    ),
    click.option(
        "--frequency-penalty",
        default=0.0,
        show_default=True,
        help="Subtract from the logit of a token for each time it was used.",
    ),
    click.option(
        "--logit-bias",
        multiple=True,
        metavar="TOKEN=X",
        help="Add X to the logit of a token, given as its text or #id; repeatable.",
    ),
    click.option("--stop", multiple=True, help="Stop before this text; repeatable."),
    click.option("--seed", default=1337, show_default=True, help="Draw by this random seed."),
    section="Sampling",
)
