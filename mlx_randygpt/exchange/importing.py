"""Models from other programs: which one wrote a file or folder, and the reader for it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from mlx_randygpt.exchange import ExchangeError
from mlx_randygpt.exchange.importers import gpt2, nanogpt, native, randygpt
from mlx_randygpt.exchange.importers.imported_model import ImportedModel
from mlx_randygpt.exchange.importers.tensors import read_json
from mlx_randygpt.exchange.importers.torch_file import MAGIC

FORMATS = ("gpt2", "mlxgpt", "nanogpt", "randygpt", "randygpt-hf")
_OF_MODEL_TYPE = {"gpt2": "gpt2", "mlxgpt": "mlxgpt", "randygpt": "randygpt-hf"}
_FOLDERS: dict[str, Callable[[Path, Path | None], ImportedModel]] = {
    "gpt2": gpt2.read_folder, "mlxgpt": native.read_folder, "randygpt-hf": randygpt.read_folder,
}  # fmt: skip


def read_foreign(
    source: Path,
    format: str = "auto",
    *,
    vocab: Path | None = None,
    activation: str | None = None,
    sizes: Mapping[str, int] | None = None,
) -> ImportedModel:
    """The model of a file or folder; UserError in one line where it cannot be read, or is not
    one. Nothing that the file names is run, and nothing large is allocated that it does not hold.

    `activation` is for nanoGPT and `sizes` for randyGPT, whose files do not say them.
    """
    if not (source.is_file() or source.is_dir()):
        raise ExchangeError(f"{source} is not there")
    if source.name in gpt2.WEIGHTS and (source.parent / "config.json").is_file():
        source = source.parent  # the weights of a folder
    kind = detect(source) if format == "auto" else format
    if activation is not None and kind != "nanogpt":
        raise ExchangeError(f"--activation is for nanogpt; a {kind} says its own")
    if sizes and kind != "randygpt":
        raise ExchangeError(
            f"--{min(sizes).replace('_', '-')} is for randygpt; a {kind} says its own"
        )
    if kind in _FOLDERS:
        if not source.is_dir():
            raise ExchangeError(f"{source} is a file; {kind} is a folder with a config.json")
        return _FOLDERS[kind](source, vocab)
    if kind == "nanogpt":
        return nanogpt.read_checkpoint(source, vocab, activation)
    return randygpt.read_bin(source, vocab, sizes or {})


def detect(source: Path) -> str:
    """The format of a file or folder, by what is in it."""
    if source.is_dir():
        if (source / "config.json").is_file():
            found = read_json(source / "config.json").get("model_type")
            if isinstance(found, str) and found in _OF_MODEL_TYPE:
                return _OF_MODEL_TYPE[found]
            named = repr(found)[:40]
            raise ExchangeError(
                f"{source / 'config.json'} has model_type={named}; "
                f"what can be read is {', '.join(_OF_MODEL_TYPE)}"
            )
        if (source / nanogpt.CHECKPOINT).is_file():
            return "nanogpt"
        raise ExchangeError(
            f"{source} holds neither a config.json nor a {nanogpt.CHECKPOINT}; name the file"
        )
    try:
        with open(source, "rb") as file:
            first = file.read(8)
    except OSError as error:
        raise ExchangeError(f"{source} cannot be read: {error.strerror}") from error
    if first.startswith(randygpt.LETTERS):
        return "randygpt"
    if first.startswith(MAGIC):
        return "nanogpt"
    raise ExchangeError(
        f"{source} is neither a .bin file of randyGPT nor a file of torch.save as PyTorch writes "
        "it since 1.6; --format says what it is"
    )
