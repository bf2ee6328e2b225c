"""Import randyGPT: its .bin files (RGPT0001 to RGPT0003, with Adam's moments) and its HF folder.

Its model is the recipe `classic`: RMSNorm without gains (epsilon 1e-5) before attention and MLP
and none before the head, squared ReLU, learned positions, no biases, a head of its own.

A .bin file, little-endian: 8 letters, then vocab_size, the last iteration and Adam's step as
uint32, the best loss as float32, and float32 arrays: wte, wpe, lm_head, and wq, wk, wv, wo, fc1,
fc2 of each layer. Moments follow: in RGPT0003 all m and then all v, before it m and v of each array
in turn; some RGPT0002 files have none. Layers, width and context are nowhere in it.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mlx_randygpt.config import ModelConfig
from mlx_randygpt.exchange import ExchangeError
from mlx_randygpt.exchange.importers.imported_model import ImportedModel, whole
from mlx_randygpt.exchange.importers.tensors import (
    Array,
    LazyTensor,
    finite,
    params_of,
    read_json,
    read_safetensors,
    refuse_others,
)
from mlx_randygpt.exchange.importers.vocabulary import table_of_text, tokenizer_at
from mlx_randygpt.model import parameter_shapes
from mlx_randygpt.recipes import PRESETS, RECIPES
from mlx_randygpt.settings import MODEL_SIZES
from mlx_randygpt.state import Params
from mlx_randygpt.tokenizers import Tokenizer

LETTERS = b"RGPT"
VERSIONS = (b"RGPT0001", b"RGPT0002", b"RGPT0003")
HEADER = struct.Struct("<8sIIIf")
LAYER = ("wq", "wk", "wv", "wo", "fc1", "fc2")
# How randyGPT trains: the rate is constant up to 60 % of the run and then falls.
TRAIN = {
    "lr": 1e-4, "min_lr": 1e-5, "weight_decay": 0.1, "beta1": 0.9, "beta2": 0.999,
    "schedule": "trapezoid", "warmup": 0, "iters": 1000,
}  # fmt: skip
DROPOUT = 0.1


def read_bin(source: Path, vocab: Path | None, given: Mapping[str, int]) -> ImportedModel:
    """Read the model and, if stored, its moments; `given` are sizes from the user."""
    letters, vocab_size, _, step, best_loss = _header(source)
    n, rest = divmod(source.stat().st_size - HEADER.size, 4)
    if rest:
        raise ExchangeError(f"{source} is truncated: {rest} bytes are left over")
    model, n_copies, note = _model(source, vocab_size, n, given)
    tokenizer = _tokenizer(source, vocab, vocab_size)
    pieces = _pieces(source, letters, list(_layout(model)), n_copies)
    found = {kind: _ours(source, model, arrays) for kind, arrays in pieces.items()}
    params = found.pop("")
    if found and min(float(v.min()) for v in found["v"].values()) < 0:
        raise ExchangeError(f"{source}: a second moment is negative; the file is damaged")
    if not found:
        note += " It holds no moments: train --init-from begins anew."
    return ImportedModel(
        "randygpt", source, model, params, tokenizer, found, step if found else 0,
        best_loss, TRAIN, (note,),
    )  # fmt: skip


def read_folder(source: Path, vocab: Path | None) -> ImportedModel:
    """Read the Hugging Face folder that randyGPT's export_hf.py writes."""
    config = read_json(source / "config.json")
    named = ("vocab_size", *MODEL_SIZES)
    sizes: dict[str, Any] = {n: whole(config, n, source / "config.json") for n in named}
    classic = RECIPES["classic"]["model"]
    model = ModelConfig(vocab_size=sizes.pop("vocab_size"), dropout=DROPOUT, **classic, **sizes)
    path = source / "model.safetensors"
    stored = read_safetensors(path)
    found = {_short_name(name): tensor for name, tensor in stored.items()}
    params = params_of(path, model, _stacked(path, model, found))
    tokenizer = _tokenizer(source, vocab or source, model.vocab_size)
    loss = config.get("best_val_loss")
    best = float(loss) if isinstance(loss, int | float) and abs(loss) < 1e6 else math.inf
    return ImportedModel("randygpt-hf", source, model, params, tokenizer, {}, 0, best, TRAIN)


def _header(source: Path) -> tuple[bytes, int, int, int, float]:
    """Return letters, vocab_size, iteration, step and best loss."""
    try:
        with open(source, "rb") as file:
            raw = file.read(HEADER.size)
    except OSError as error:
        raise ExchangeError(f"{source} cannot be read: {error.strerror}") from error
    if len(raw) < HEADER.size or raw[:8] not in VERSIONS:
        if raw[:8] == b"RGPT0004":
            raise ExchangeError(
                f"{source} is RGPT0004, a mixture of experts, which there is no model for; "
                "RGPT0001 to RGPT0003 are read"
            )
        raise ExchangeError(f"{source} is not a .bin file of randyGPT (RGPT0001 to RGPT0003)")
    letters, vocab_size, iteration, step, best_loss = HEADER.unpack(raw)
    if not vocab_size:
        raise ExchangeError(f"{source} has vocab_size 0; the file is damaged")
    return letters, vocab_size, iteration, step, best_loss


def _model(
    source: Path, vocab_size: int, n: int, given: Mapping[str, int]
) -> tuple[ModelConfig, int, str]:
    """Find the model with `n` numbers in its file; return it, the number of copies, and a note.

    There is one copy without moments and three with them. The sizes are those of a preset, replaced
    by the sizes that are `given`.
    """
    fits: dict[tuple[int, ...], tuple[str, int]] = {}
    for name, preset in PRESETS.items():
        sizes = {key: given.get(key, getattr(preset, key)) for key in MODEL_SIZES}
        weights = _count(vocab_size, sizes["n_layer"], sizes["n_embd"], sizes["block_size"])
        for copies in (1, 3):
            if n == copies * weights:
                fits.setdefault(tuple(sizes.values()), (name, copies))
    options = ", ".join(f"--{key.replace('_', '-')}" for key in MODEL_SIZES)
    if len(fits) != 1:
        named = "; ".join(str(sizes) for sizes in fits) or "none"
        raise ExchangeError(
            f"{source} has {n:,} numbers for {vocab_size} tokens and does not say its layers, "
            f"heads, width and context; known sizes that fit: {named}; give {options}"
        )
    ((found, (name, copies)),) = fits.items()
    classic = RECIPES["classic"]["model"]
    sizes = dict(zip(MODEL_SIZES, found, strict=True))
    model = ModelConfig(vocab_size=vocab_size, dropout=DROPOUT, **classic, **sizes)
    shown = ", ".join(f"{key} {size}" for key, size in sizes.items())
    whence = "as given" if given else f"those of the preset {name}"
    return model, copies, f"The file does not say its sizes; taken: {shown}, {whence}."


def _count(vocab_size: int, n_layer: int, n_embd: int, block_size: int) -> int:
    return (2 * vocab_size + block_size) * n_embd + 12 * n_layer * n_embd**2


def _layout(model: ModelConfig) -> Iterator[tuple[str, int]]:
    """Yield randyGPT's array names and their counts of numbers, in the order of a file."""
    c, v = model.n_embd, model.vocab_size
    yield from (("wte", v * c), ("wpe", model.block_size * c), ("lm_head", v * c))
    for i in range(model.n_layer):
        for name in LAYER:
            yield f"layers.{i}.{name}", (4 if name.startswith("fc") else 1) * c * c


def _pieces(
    source: Path, letters: bytes, layout: Sequence[tuple[str, int]], n_copies: int
) -> dict[str, dict[str, Array]]:
    """Read the arrays of the file: the weights under "", the moments under "m" and "v"."""
    names = [name for name, _ in layout]
    order = [("", name) for name in names]
    if n_copies == 3 and letters == b"RGPT0003":
        order += [(kind, name) for kind in ("m", "v") for name in names]
    elif n_copies == 3:
        order += [(kind, name) for name in names for kind in ("m", "v")]
    sizes = dict(layout)
    found: dict[str, dict[str, Array]] = {}
    at = HEADER.size
    for kind, name in order:
        found.setdefault(kind, {})[name] = np.fromfile(source, "<f4", sizes[name], offset=at)
        at += 4 * sizes[name]
    return found


def _ours(source: Path, model: ModelConfig, arrays: Mapping[str, Array]) -> Params:
    """Return the arrays of one kind under our names, with query, key and value stacked."""
    params: Params = {}
    for name, shape in parameter_shapes(model).items():
        values = np.concatenate([arrays[part] for part in _parts(name)]).reshape(shape)
        params[name] = finite(source, name, np.ascontiguousarray(values, np.float32))
    return params


def _parts(name: str) -> list[str]:
    """Return randyGPT's names of the arrays that form one of our weights."""
    if not name.startswith("h."):
        return [name.removesuffix(".weight")]
    _, i, rest = name.removesuffix(".weight").split(".", 2)
    of = {
        "attn.c_attn": ("wq", "wk", "wv"), "attn.c_proj": ("wo",),
        "mlp.c_fc": ("fc1",), "mlp.c_proj": ("fc2",),
    }  # fmt: skip
    return [f"layers.{i}.{part}" for part in of[rest]]


def _short_name(name: str) -> str:
    """Return the name that a .bin file has for `layers.0.attn.wq.weight`."""
    short = name.removesuffix(".weight")
    return short.replace(".attn.", ".").replace(".mlp.", ".") if short != name else name


def _stacked(
    path: Path, model: ModelConfig, found: Mapping[str, LazyTensor]
) -> dict[str, LazyTensor]:
    """Return our weights, each made of one or three tensors of the file."""
    wanted = {name: _parts(name) for name in parameter_shapes(model)}
    known = {part for parts in wanted.values() for part in parts}
    for part in known - found.keys():
        raise ExchangeError(f"{path} lacks the tensor {part}")
    refuse_others(path, found.keys() - known)
    return {name: _together([found[part] for part in parts]) for name, parts in wanted.items()}


def _together(parts: Sequence[LazyTensor]) -> LazyTensor:
    """Stack tensors of one shape along the rows."""
    if len(parts) == 1:
        return parts[0]
    if len({(part.shape, part.kind) for part in parts}) > 1 or len(parts[0].shape) != 2:
        described = ", ".join(f"{part.kind} {part.shape}" for part in parts)
        raise ExchangeError(f"query, key and value are not of one shape: {described}")
    rows, columns = parts[0].shape

    def read() -> Array:
        return np.concatenate([part.read() for part in parts])

    return LazyTensor((len(parts) * rows, columns), parts[0].kind, read)


def _tokenizer(source: Path, vocab: Path | None, size: int) -> Tokenizer:
    """Return the tokenizer of --vocab, or of the vocab.json beside the file."""
    path = vocab or source.parent / "vocab.json"
    if not path.exists():
        raise ExchangeError(
            f"{source} needs its vocabulary: --vocab vocab.json or, where it reads characters, the "
            f"text it was trained on (there is no {path})"
        )
    if path.is_file() and path.suffix not in (".json", ".pkl"):
        return table_of_text(path, size)
    return tokenizer_at(path, size)
