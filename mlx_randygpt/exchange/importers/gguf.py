"""Import GGUF, the format of llama.cpp, for the architectures that are also ours.

They are `gpt2` and `arcee`. The tokens are byte-level BPE with GPT-2's rule for splitting words, or
characters written as such. Quantised matrices become float32.
"""

from __future__ import annotations

import reprlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mlx_randygpt import files
from mlx_randygpt.config import ARCHS, ConfigError, ModelConfig, missing
from mlx_randygpt.exchange import ExchangeError, arcee
from mlx_randygpt.exchange.exporters.gguf import (
    CONTROL,
    GGUF,
    NO_MERGE,
    NORMAL,
    UNUSED,
    gpt2_names,
)
from mlx_randygpt.exchange.importers import arcee as arcee_folder
from mlx_randygpt.exchange.importers import gpt2
from mlx_randygpt.exchange.importers.imported_model import ImportedModel, whole
from mlx_randygpt.exchange.importers.tensors import LazyTensor
from mlx_randygpt.exchange.importers.vocabulary import byte_level_bpe, split_dialogue, tokenizer_at
from mlx_randygpt.model import GPT2_NORM_EPS
from mlx_randygpt.tokenizers import Tokenizer
from mlx_randygpt.tokenizers.chars import SPECIALS, CharTokenizer
from mlx_randygpt.words import one_line

LETTERS = b"GGUF"  # with which a file begins
SIZES = {  # our name -> that after the architecture's
    "block_size": "context_length",
    "n_layer": "block_count",
    "n_head": "attention.head_count",
    "n_embd": "embedding_length",
}
FIXED = {
    "gpt2": {"attention.layer_norm_epsilon": GPT2_NORM_EPS},
    "arcee": {"attention.layer_norm_rms_epsilon": arcee.NORM_EPS},
}
TOKENS = "tokenizer.ggml.tokens"


def read_file(source: Path, vocab: Path | None) -> ImportedModel:
    """Read the model in a GGUF file, or in the folder that `mlxgpt export` wrote it to."""
    path = source / GGUF if files.is_folder(source) else source
    settings, stored = _read(path)
    arch = settings.get("general.architecture")
    if arch not in FIXED:
        raise ExchangeError(
            f"{path} has the architecture {reprlib.repr(arch)}; supported are {', '.join(FIXED)}"
        )
    model = _model(path, str(arch), settings, stored)
    if arch == "gpt2":
        theirs = {name: ours for ours, name in gpt2_names(model.n_layer).items()}
        params = gpt2.weights(path, model, {theirs.get(n, n): t for n, t in stored.items()})
    else:
        params = arcee_folder.weights(path, model, stored, arcee.GGUF, tied=True)
    size = model.vocab_size
    tokenizer = tokenizer_at(vocab, size) if vocab else _tokenizer(path, settings, size)
    recipe = "classic" if arch == "gpt2" else arcee_folder.RECIPE
    return ImportedModel("gguf", source, model, params, tokenizer, recipe=recipe)


def _read(path: Path) -> tuple[dict[str, Any], dict[str, LazyTensor]]:
    """Return the settings and tensors of a file; the tensors are not read yet."""
    try:
        from gguf import GGUFReader
    except ImportError as error:
        raise missing("a GGUF file", "gguf", "gguf") from error
    try:
        with np.errstate(all="ignore"):
            reader = GGUFReader(path)
            settings = {name: field.contents() for name, field in reader.fields.items()}
        tensors = {str(t.name): _lazy(path, t) for t in reader.tensors}
    except OSError as error:
        raise ExchangeError(f"{path} cannot be read: {error.strerror or error}") from error
    except Exception as error:  # the library checks little, so damage ends in any of them
        raise ExchangeError(f"{path} is damaged or not a GGUF file ({one_line(error)})") from error
    return settings, tensors


def _lazy(path: Path, tensor: Any) -> LazyTensor:
    """Return a tensor that becomes float32 when it is read."""
    shape = tuple(int(n) for n in reversed(tensor.shape))

    def read() -> Any:
        from gguf.quants import dequantize

        try:
            return dequantize(tensor.data, tensor.tensor_type).astype(np.float32, copy=False)
        except (NotImplementedError, ValueError) as error:
            kind = tensor.tensor_type.name
            raise ExchangeError(
                f"{path}: {tensor.name} has the type {kind} ({one_line(error)}); convert the file "
                "to F32, F16 or Q8_0"
            ) from error

    return LazyTensor(shape, "F32", read)


def _model(
    path: Path, arch: str, settings: Mapping[str, Any], stored: Mapping[str, LazyTensor]
) -> ModelConfig:
    """Return the model that the settings describe."""
    own = {
        name.removeprefix(f"{arch}."): value
        for name, value in settings.items()
        if name.startswith(f"{arch}.")
    }
    sizes: dict[str, Any] = {ours: whole(own, name, path) for ours, name in SIZES.items()}
    sizes["vocab_size"] = _vocab_size(path, stored)
    expected = FIXED[arch] | {
        "feed_forward_length": 4 * sizes["n_embd"],
        "attention.head_count_kv": sizes["n_head"],
        "rope.dimension_count": sizes["n_embd"] // sizes["n_head"],
    }
    for name, value in expected.items():
        seen = own.get(name, value)
        if not isinstance(seen, int | float) or not np.isclose(seen, value, rtol=1e-6, atol=0):
            raise ExchangeError(f"{path} has {name}={reprlib.repr(seen)}; supported is {value:g}")
    if "rope.scaling.type" in own and own["rope.scaling.type"] != "none":
        raise ExchangeError(f"{path} scales its rotary positions, which is not supported")
    if arch == "arcee":
        return arcee_folder.build_model(path, sizes, own.get("rope.freq_base"))
    try:
        return ModelConfig(**ARCHS["gpt2"], **sizes)
    except ConfigError as error:
        raise ExchangeError(f"{path}: {error}") from error


def _vocab_size(path: Path, stored: Mapping[str, LazyTensor]) -> int:
    embedding = stored.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise ExchangeError(f"{path} has no matrix token_embd.weight")
    return embedding.shape[0]


def _tokenizer(path: Path, settings: Mapping[str, Any], size: int) -> Tokenizer:
    """Return the tokenizer of a file."""
    kind, pre = (settings.get(f"tokenizer.ggml.{name}") for name in ("model", "pre"))
    if (kind, pre) != ("gpt2", "gpt-2"):
        raise ExchangeError(
            f"{path} has the tokenizer {reprlib.repr(kind)} ({reprlib.repr(pre)}), not byte-level "
            "BPE as GPT-2 splits it; give --vocab"
        )
    names = _list(path, settings, TOKENS, str)
    kinds = _list(path, settings, "tokenizer.ggml.token_type", int)
    merges = [m for m in _list(path, settings, "tokenizer.ggml.merges", str) if m != NO_MERGE]
    if not len(names) == len(kinds) == size:
        raise ExchangeError(
            f"{path} has {len(names)} tokens of {len(kinds)} kinds and a model of {size}"
        )
    rest, dialogue = split_dialogue(names)
    if rest[-3:] == SPECIALS and (characters := _characters(rest[:-3])):
        return CharTokenizer(characters, dialogue)
    added = {i: name for i, name in enumerate(names) if kinds[i] != NORMAL}
    special = {i for i in added if kinds[i] in (CONTROL, UNUSED)}
    return byte_level_bpe(path, names, [tuple(m.split(" ")) for m in merges], added, special)


def _list(
    path: Path, settings: Mapping[str, Any], name: str, kind: Callable[[Any], Any]
) -> list[Any]:
    values = settings.get(name)
    if not isinstance(values, list) or not all(type(value) is kind for value in values):
        raise ExchangeError(f"{path} has no list {name}")
    return values


def _characters(names: Sequence[str]) -> str:
    """Return the characters that the tokens spell, or "" unless each spells one, in order."""
    from mlx_randygpt.tokenizers.subword import byte_characters

    byte_of = {char: byte for byte, char in byte_characters().items()}
    try:
        chars = [bytes(byte_of[c] for c in name).decode() for name in names]
        if all(len(char) == 1 for char in chars):
            return CharTokenizer("".join(chars)).chars
    except (KeyError, ValueError):
        pass
    return ""
