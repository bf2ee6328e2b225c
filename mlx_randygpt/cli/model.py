"""What commands that work with a trained model share: finding it, a backend that holds it, and how
it picks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from mlx_randygpt.cli.options import default_checkpoint, readable_bytes

if TYPE_CHECKING:
    from mlx_randygpt.backends.base import Backend
    from mlx_randygpt.checkpoint import Checkpoint
    from mlx_randygpt.tokenizer import Tokenizer

F = TypeVar("F", bound=Callable[..., Any])


@dataclass(frozen=True)
class Loaded:
    """A checkpoint, and the backend that holds its weights."""

    path: Path
    saved: Checkpoint
    tokenizer: Tokenizer
    backend: Backend


def load(checkpoint: Path | None, backend: str, quantize: int | None = None) -> Loaded:
    """The checkpoint, else the best of checkpoints/; says on stderr what computes."""
    path, saved, tokenizer = read(checkpoint)
    return Loaded(path, saved, tokenizer, build(saved, backend, quantize))


def describe_backend(backend: Backend, why: str) -> str:
    """`MLX on Apple M3 Max (Metal)`, `NumPy on 2 threads (MLX has no GPU here)`."""
    names = {"mlx": "MLX", "numpy": "NumPy"}
    line = f"{names.get(backend.name, backend.name)} on {backend.device}"
    return f"{line} ({why})" if why else line


def read(checkpoint: Path | None, merge: bool = True) -> tuple[Path, Checkpoint, Tokenizer]:
    """The checkpoint, else the best of checkpoints/, its adapters merged, and its tokenizer."""
    from mlx_randygpt.checkpoint import load_checkpoint
    from mlx_randygpt.tokenizer import tokenizer_from_json

    path = default_checkpoint(checkpoint)
    saved = load_checkpoint(path, weights_only=True)
    saved = merged(saved) if merge else saved
    return path, saved, tokenizer_from_json(saved.tokenizer)


def merged(saved: Checkpoint) -> Checkpoint:
    """The same model without adapters, as most of the program knows it."""
    from mlx_randygpt import lora

    params, model = lora.merged(saved.state.params, saved.model)
    return replace(saved, model=model, state=replace(saved.state, params=params))


def build(saved: Checkpoint, backend: str, quantize: int | None = None) -> Backend:
    """A backend with the weights of the checkpoint; says on stderr what computes. With `quantize`,
    a number of bits, the checkpoint's own weights are emptied: nobody needs them any more."""
    from mlx_randygpt.backends import choose, make_backend

    if quantize is not None:
        return _quantized(saved, backend, quantize)
    name, why = choose(backend)
    built = make_backend(name, saved.model, replace(saved.train, threads=0), saved.state)
    click.echo(f"Backend: {describe_backend(built, why)}", err=True)
    return built


def require_mlx(backend: str) -> None:
    """BackendError where `--quantize` finds another backend than MLX."""
    from mlx_randygpt.backends import choose, mlx_device
    from mlx_randygpt.backends.base import BackendError

    name, why = choose(backend)
    device, missing = mlx_device()
    if name != "mlx" and device is None:
        raise BackendError(f"--quantize needs MLX: {missing}; pip install 'mlx-randygpt[cpu]'")
    if name != "mlx":
        took = f"auto took NumPy ({why}); --backend mlx" if why else f"not --backend {name}; mlx"
        raise BackendError(f"--quantize needs MLX, {took} takes it")


def _quantized(saved: Checkpoint, backend: str, bits: int) -> Backend:
    require_mlx(backend)
    from mlx_randygpt.backends.mlx_quantized import QuantizedMLX

    built = QuantizedMLX(saved.model, replace(saved.train, dtype="float32"), saved.state, bits)
    before = sum(weight.nbytes for weight in saved.state.params.values())
    saved.state.params.clear()
    after, of = readable_bytes(built.weight_bytes()), readable_bytes(before)
    click.echo(f"Backend: {describe_backend(built, '')}", err=True)
    click.echo(f"Weights in {bits} bits: {after} instead of {of}", err=True)
    return built


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


def biases(given: tuple[str, ...], tokenizer: Tokenizer) -> tuple[tuple[int, float], ...]:
    """`e=-5` and `#12=3.5` as token ids and numbers."""
    return tuple(_bias(text, tokenizer) for text in given)


def _bias(text: str, tokenizer: Tokenizer) -> tuple[int, float]:
    token, _, number = text.rpartition("=")
    try:
        value = float(number)
    except ValueError:
        raise click.BadParameter(
            f"{text!r} is not TOKEN=NUMBER, such as e=-5", param_hint="--logit-bias"
        ) from None
    if token.startswith("#") and token[1:].isdecimal():
        if int(token[1:]) >= tokenizer.vocab_size:
            known = f"ids are 0 to {tokenizer.vocab_size - 1}"
            raise click.BadParameter(f"{token} is not known; {known}", param_hint="--logit-bias")
        return int(token[1:]), value
    ids = tokenizer.encode(token).tolist()
    if len(ids) != 1 or tokenizer.unknown(token):
        what = "is not known" if tokenizer.unknown(token) else f"is {len(ids)} tokens"
        raise click.BadParameter(
            f"{token!r} {what}; give the text of one token, or its id as #12",
            param_hint="--logit-bias",
        )
    return ids[0], value
