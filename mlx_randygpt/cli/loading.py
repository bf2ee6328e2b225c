"""Finding a trained model, and building the backend that generates or evaluates with it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mlx_randygpt.cli.output import echo
from mlx_randygpt.words import format_bytes

if TYPE_CHECKING:
    from mlx_randygpt.backends.base import Scorer
    from mlx_randygpt.checkpoint import Checkpoint
    from mlx_randygpt.tokenizers import Tokenizer

BACKEND_TITLES = {"mlx": "MLX", "numpy": "NumPy"}


@dataclass(frozen=True)
class Loaded:
    """A checkpoint, its tokenizer, and the backend that holds its weights."""

    path: Path
    saved: Checkpoint
    tokenizer: Tokenizer
    backend: Scorer


def load(
    checkpoint: Path | None, backend: str, quantize: int | None = None, n_streams: int = 1
) -> Loaded:
    """Load a checkpoint, by default the best of checkpoints/, to generate `n_streams` texts."""
    path, saved, tokenizer = read(checkpoint)
    built = build(saved, backend, quantize, n_streams)
    if quantize is not None:
        saved = without_weights(saved)
    return Loaded(path, saved, tokenizer, built)


def read(checkpoint: Path | None, merge: bool = True) -> tuple[Path, Checkpoint, Tokenizer]:
    """Return path, contents and tokenizer of a checkpoint, by default the best of checkpoints/.

    `merge` merges adapters into the weights.
    """
    from mlx_randygpt.checkpoint import load_checkpoint
    from mlx_randygpt.tokenizers import tokenizer_from_json

    path = default_checkpoint(checkpoint)
    saved = load_checkpoint(path, weights_only=True)
    saved = without_adapters(saved) if merge else saved
    return path, saved, tokenizer_from_json(saved.tokenizer)


def without_adapters(saved: Checkpoint) -> Checkpoint:
    """Return the same model with its adapters merged into the weights."""
    from mlx_randygpt.model import merge_adapters

    params, model = merge_adapters(saved.state.params, saved.model)
    return replace(saved, model=model, state=replace(saved.state, params=params))


def without_weights(saved: Checkpoint) -> Checkpoint:
    """Return the same checkpoint without its weights, so that their memory can be released."""
    return replace(saved, state=replace(saved.state, params={}))


def default_checkpoint(path: Path | None) -> Path:
    """Return `path`, or the checkpoint in it if it is a folder; by default that of checkpoints/."""
    from mlx_randygpt.checkpoint import find_checkpoint, is_run_folder

    if path is not None and not is_run_folder(path):
        return path
    return find_checkpoint(path or Path("checkpoints"))


def build(
    saved: Checkpoint, backend: str, quantize: int | None = None, n_streams: int = 0
) -> Scorer:
    """Build a backend with these weights, in `quantize` bits if given; report it on stderr.

    It generates up to `n_streams` texts at once; 0: it evaluates.
    """
    from mlx_randygpt.backends import choose, choose_for_text, limit_memory, make_scorer

    if quantize is not None:
        require_mlx(backend)
        backend = "mlx"
    generates = n_streams > 0
    name, reason = (
        choose_for_text(backend, saved.model, n_streams) if generates else choose(backend)
    )
    params = saved.state.params
    built: Any = make_scorer(name, saved.model, params, dtype=saved.train.dtype, bits=quantize or 0)
    limit_memory(built)
    echo(f"Backend: {describe_backend(built, reason)}", err=True, wrapped=True)
    if quantize is not None:
        before = format_bytes(sum(weight.nbytes for weight in params.values()))
        after = format_bytes(built.weight_bytes())
        echo(f"Weights in {quantize} bits: {after} instead of {before}", err=True)
    scorer: Scorer = built
    return scorer


def require_mlx(backend: str) -> None:
    """Raise BackendError unless `--quantize` can run with this choice of backend."""
    from mlx_randygpt.backends import choose, install_mlx, mlx_device
    from mlx_randygpt.backends.base import BackendError

    name, reason = choose(backend)
    device, missing = mlx_device()
    if name != "mlx" and device is None:
        raise BackendError(f"--quantize needs MLX: {missing}; {install_mlx()}")
    if name != "mlx":
        chosen = f"but auto chose NumPy ({reason})" if reason else f"not --backend {name}"
        raise BackendError(f"--quantize needs MLX, {chosen}; add --backend mlx")


def describe_backend(backend: Scorer, reason: str = "") -> str:
    """Return `MLX on Apple M3 Max (Metal)` or `NumPy on 2 threads (MLX has no GPU here)`."""
    line = f"{BACKEND_TITLES.get(backend.name, backend.name)} on {backend.device}"
    return f"{line} ({reason})" if reason else line


def parse_biases(texts: tuple[str, ...], tokenizer: Tokenizer) -> tuple[tuple[int, float], ...]:
    """Return `e=-5` and `#12=3.5` as pairs of token id and number."""
    return tuple(_parse_bias(text, tokenizer) for text in texts)


def _parse_bias(text: str, tokenizer: Tokenizer) -> tuple[int, float]:
    def fail(message: str) -> click.BadParameter:
        return click.BadParameter(message, param_hint="--logit-bias")

    token, _, number = text.rpartition("=")
    try:
        value = float(number)
    except ValueError:
        raise fail(f"{text!r} is not TOKEN=NUMBER, such as e=-5") from None
    if token.startswith("#") and token[1:].isdecimal():
        if int(token[1:]) >= tokenizer.vocab_size:
            raise fail(f"{token} is not a token; ids are 0 to {tokenizer.vocab_size - 1}")
        return int(token[1:]), value
    ids = tokenizer.encode(token).tolist()
    if len(ids) != 1 or tokenizer.unknown(token):
        problem = "is not known" if tokenizer.unknown(token) else f"is {len(ids)} tokens"
        raise fail(f"{token!r} {problem}; give the text of one token, or its id as #12")
    return ids[0], value
