"""What commands that work with a trained model share: finding it, a backend that holds it, and how
it picks."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mlx_randygpt.cli.output import readable_bytes

if TYPE_CHECKING:
    from mlx_randygpt.backends.base import Scorer
    from mlx_randygpt.checkpoint import Checkpoint
    from mlx_randygpt.tokenizers import Tokenizer


@dataclass(frozen=True)
class Loaded:
    """A checkpoint, and the backend that holds its weights."""

    path: Path
    saved: Checkpoint
    tokenizer: Tokenizer
    backend: Scorer


def load(checkpoint: Path | None, backend: str, quantize: int | None = None) -> Loaded:
    """The checkpoint, else the best of checkpoints/; says on stderr what computes."""
    path, saved, tokenizer = read(checkpoint)
    return Loaded(path, saved, tokenizer, build(saved, backend, quantize))


def describe_backend(backend: Scorer, why: str) -> str:
    """`MLX on Apple M3 Max (Metal)`, `NumPy on 2 threads (MLX has no GPU here)`."""
    names = {"mlx": "MLX", "numpy": "NumPy"}
    line = f"{names.get(backend.name, backend.name)} on {backend.device}"
    return f"{line} ({why})" if why else line


def read(checkpoint: Path | None, merge: bool = True) -> tuple[Path, Checkpoint, Tokenizer]:
    """The checkpoint, else the best of checkpoints/, its adapters merged, and its tokenizer."""
    from mlx_randygpt.checkpoint import load_checkpoint
    from mlx_randygpt.tokenizers import tokenizer_from_json

    path = default_checkpoint(checkpoint)
    saved = load_checkpoint(path, weights_only=True)
    saved = without_adapters(saved) if merge else saved
    return path, saved, tokenizer_from_json(saved.tokenizer)


def without_adapters(saved: Checkpoint) -> Checkpoint:
    """The same model without adapters, as most of the program knows it."""
    from mlx_randygpt.model import merge_adapters

    params, model = merge_adapters(saved.state.params, saved.model)
    return replace(saved, model=model, state=replace(saved.state, params=params))


def build(saved: Checkpoint, backend: str, quantize: int | None = None) -> Scorer:
    """A backend with the weights of the checkpoint; says on stderr what computes. With `quantize`,
    a number of bits, the checkpoint's own weights are emptied: nobody needs them any more."""
    from mlx_randygpt.backends import choose, make_scorer

    if quantize is not None:
        require_mlx(backend)
        backend = "mlx"
    name, why = choose(backend)
    params = saved.state.params
    built: Any = make_scorer(name, saved.model, params, dtype=saved.train.dtype, bits=quantize or 0)
    click.echo(f"Backend: {describe_backend(built, why)}", err=True)
    if quantize is not None:
        before = sum(weight.nbytes for weight in params.values())
        params.clear()
        after, of = readable_bytes(built.weight_bytes()), readable_bytes(before)
        click.echo(f"Weights in {quantize} bits: {after} instead of {of}", err=True)
    scorer: Scorer = built
    return scorer


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


def default_checkpoint(path: Path | None) -> Path:
    """Return `path`, or the checkpoint in it if it is a folder; by default that of checkpoints/."""
    from mlx_randygpt.checkpoint import find_checkpoint

    if path is not None and not path.is_dir():
        return path
    return find_checkpoint(path or Path("checkpoints"))
