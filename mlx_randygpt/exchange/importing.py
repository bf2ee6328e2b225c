"""Import models of other programs: detect the format of a file or folder and call its reader."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from mlx_randygpt import files
from mlx_randygpt.exchange import ExchangeError
from mlx_randygpt.exchange.exporters.gguf import GGUF
from mlx_randygpt.exchange.importers import arcee, gguf, gpt2, nanogpt, native, randygpt
from mlx_randygpt.exchange.importers.imported_model import ImportedModel
from mlx_randygpt.exchange.importers.tensors import read_json
from mlx_randygpt.exchange.importers.torch_file import MAGIC, refuse_legacy

_FORMAT_OF_MODEL_TYPE = {
    "arcee": "arcee",
    "gpt2": "gpt2",
    "mlxgpt": "mlxgpt",
    "randygpt": "randygpt-hf",
}
_FOLDER_READERS: dict[str, Callable[[Path, Path | None], ImportedModel]] = {
    "arcee": arcee.read_folder,
    "gpt2": gpt2.read_folder,
    "mlxgpt": native.read_folder,
    "randygpt-hf": randygpt.read_folder,
}


def read_foreign(
    source: Path,
    format: str = "auto",
    *,
    vocab: Path | None = None,
    activation: str | None = None,
    sizes: Mapping[str, int] | None = None,
) -> ImportedModel:
    """Read the model in a file or folder; raise UserError (one line) if that is not possible.

    No code in the file is run, and no large memory is allocated for data that it does not hold.
    `activation` is for nanoGPT and `sizes` for randyGPT, whose files do not record them.
    """
    if not files.exists(source):
        raise ExchangeError(f"{source} does not exist")
    if not (files.is_file(source) or files.is_folder(source)):
        raise ExchangeError(f"{source} is a pipe or a device; give a file or a folder")
    if source.name in gpt2.WEIGHTS and files.is_file(source.parent / "config.json"):
        source = source.parent  # the weights of a folder
    kind = detect(source) if format == "auto" else format
    if activation is not None and kind != "nanogpt":
        raise ExchangeError(f"--activation is for nanogpt; {kind} records its own")
    if sizes and kind != "randygpt":
        option = min(sizes).replace("_", "-")
        raise ExchangeError(f"--{option} is for randygpt; {kind} records its own")
    if kind in _FOLDER_READERS:
        if not files.is_folder(source):
            raise ExchangeError(f"{source} is a file; {kind} is a folder with a config.json")
        return _FOLDER_READERS[kind](source, vocab)
    if kind == "gguf":
        return gguf.read_file(source, vocab)
    if kind == "nanogpt":
        return nanogpt.read_checkpoint(source, vocab, activation)
    return randygpt.read_bin(source, vocab, sizes or {})


def detect(source: Path) -> str:
    """Return the format of a file or folder, judged by its content."""
    if files.is_folder(source):
        return _detect_folder(source)
    try:
        with open(source, "rb") as file:
            first = file.read(8)
    except OSError as error:
        raise ExchangeError(f"{source} cannot be read: {error.strerror}") from error
    if first.startswith(randygpt.LETTERS):
        return "randygpt"
    if first.startswith(MAGIC):
        return "nanogpt"
    if first.startswith(gguf.LETTERS):
        return "gguf"
    refuse_legacy(source)
    raise ExchangeError(
        f"{source} is neither a GGUF file, a .bin file of randyGPT nor a file of torch.save in the "
        "format of PyTorch 1.6 and later; name its format with --format"
    )


def _detect_folder(source: Path) -> str:
    """Return the format of a folder, by its config.json or ckpt.pt."""
    if files.is_file(source / "config.json"):
        model_type = read_json(source / "config.json").get("model_type")
        if isinstance(model_type, str) and model_type in _FORMAT_OF_MODEL_TYPE:
            return _FORMAT_OF_MODEL_TYPE[model_type]
        raise ExchangeError(
            f"{source / 'config.json'} has model_type={repr(model_type)[:40]}; "
            f"supported are {', '.join(_FORMAT_OF_MODEL_TYPE)}"
        )
    if files.is_file(source / nanogpt.CHECKPOINT):
        return "nanogpt"
    if files.is_file(source / GGUF):
        return "gguf"
    raise ExchangeError(
        f"{source} holds neither a config.json, a {nanogpt.CHECKPOINT} nor a {GGUF}; name the file"
    )
