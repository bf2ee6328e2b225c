"""Import randyGPT: its .bin files (RGPT0001 to RGPT0003, with Adam's moments) and its HF folder.

Its model is the recipe `classic`: RMSNorm without gains (epsilon 1e-5) before attention and MLP,
no norm before the head, squared ReLU, learned positions, no biases, an untied head.

A .bin file, little-endian: 8 letters, then vocab_size, the last iteration and Adam's step as
uint32, the best loss as float32, and float32 arrays: wte, wpe, lm_head, and wq, wk, wv, wo, fc1,
fc2 of each layer. Moments follow: in RGPT0003 all m and then all v, before it m and v of each array
in turn; some RGPT0002 files lack them. The file does not record layers, width and context.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
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
from mlx_randygpt.files import exists, is_file
from mlx_randygpt.model import parameter_shapes
from mlx_randygpt.recipes import PRESETS, RECIPES
from mlx_randygpt.settings import MODEL_SIZES
from mlx_randygpt.state import Params
from mlx_randygpt.tokenizers import Tokenizer

LETTERS = b"RGPT"
VERSIONS = (b"RGPT0001", b"RGPT0002", b"RGPT0003")
HEADER = struct.Struct("<8sIIIf")
LAYER = {  # our matrix of a layer -> the arrays that are stacked in it
    "attn.c_attn": ("wq", "wk", "wv"),
    "attn.c_proj": ("wo",),
    "mlp.c_fc": ("fc1",),
    "mlp.c_proj": ("fc2",),
}
# How randyGPT trains: the rate is constant up to 60 % of the run and then falls.
TRAIN = {
    "lr": 1e-4,
    "min_lr": 1e-5,
    "weight_decay": 0.1,
    "beta1": 0.9,
    "beta2": 0.999,
    "schedule": "trapezoid",
    "warmup": 0,
    "iters": 1000,
}
DROPOUT = 0.1


def read_bin(source: Path, vocab: Path | None, sizes: Mapping[str, int]) -> ImportedModel:
    """Read the model and, if stored, its moments; `sizes` are those that the user gave."""
    letters, vocab_size, _, step, best_loss = _header(source)
    n, rest = divmod(source.stat().st_size - HEADER.size, 4)
    if rest:
        raise ExchangeError(f"{source} is truncated: {rest} bytes are left over")
    model, n_copies, note = _model(source, vocab_size, n, sizes)
    tokenizer = _tokenizer(source, vocab, vocab_size)
    pieces = _pieces(source, letters, list(_layout(model)), n_copies)
    moments = {kind: _stack_arrays(source, model, arrays) for kind, arrays in pieces.items()}
    params = moments.pop("")
    if moments and min(float(v.min()) for v in moments["v"].values()) < 0:
        raise ExchangeError(f"{source}: a second moment is negative; the file is damaged")
    if not moments:
        note += " It holds no moments: train --init-from starts with new ones."
    return ImportedModel(
        format="randygpt",
        source=source,
        model=model,
        params=params,
        tokenizer=tokenizer,
        moments=moments,
        step=step if moments else 0,
        best_loss=best_loss,
        train=TRAIN,
        notes=(note,),
    )


def read_folder(source: Path, vocab: Path | None) -> ImportedModel:
    """Read the Hugging Face folder that randyGPT's export_hf.py writes."""
    config = read_json(source / "config.json")
    names = ("vocab_size", *MODEL_SIZES)
    sizes: dict[str, Any] = {n: whole(config, n, source / "config.json") for n in names}
    classic = RECIPES["classic"]["model"]
    model = ModelConfig(vocab_size=sizes.pop("vocab_size"), dropout=DROPOUT, **classic, **sizes)
    path = source / "model.safetensors"
    stored = read_safetensors(path)
    tensors = {_short_name(name): tensor for name, tensor in stored.items()}
    params = params_of(path, model, _stack_tensors(path, model, tensors))
    tokenizer = _tokenizer(source, vocab or source, model.vocab_size)
    loss = config.get("best_val_loss")
    best = float(loss) if isinstance(loss, int | float) and abs(loss) < 1e6 else math.inf
    return ImportedModel(
        format="randygpt-hf",
        source=source,
        model=model,
        params=params,
        tokenizer=tokenizer,
        best_loss=best,
        train=TRAIN,
    )


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
                f"{source} is RGPT0004, a mixture of experts, which is not supported; "
                "give a file of RGPT0001 to RGPT0003"
            )
        raise ExchangeError(f"{source} is not a .bin file of randyGPT (RGPT0001 to RGPT0003)")
    letters, vocab_size, iteration, step, best_loss = HEADER.unpack(raw)
    if not vocab_size:
        raise ExchangeError(f"{source} has vocab_size 0; the file is damaged")
    return letters, vocab_size, iteration, step, best_loss


def _model(
    source: Path, vocab_size: int, n: int, given_sizes: Mapping[str, int]
) -> tuple[ModelConfig, int, str]:
    """Find the model with `n` numbers in its file; return it, the number of copies, and a note.

    There is one copy without moments and three with them. The sizes are those of a preset, with
    `given_sizes` in place of its own.
    """
    fits: dict[tuple[int, ...], tuple[str, int]] = {}
    for name, preset in PRESETS.items():
        sizes = {key: given_sizes.get(key, getattr(preset, key)) for key in MODEL_SIZES}
        weights = _count(vocab_size, sizes["n_layer"], sizes["n_embd"], sizes["block_size"])
        for copies in (1, 3):
            if n == copies * weights:
                fits.setdefault(tuple(sizes.values()), (name, copies))
    options = ", ".join(f"--{key.replace('_', '-')}" for key in MODEL_SIZES)
    if len(fits) != 1:
        matches = "; ".join(str(sizes) for sizes in fits) or "none"
        raise ExchangeError(
            f"{source} has {n:,} numbers for {vocab_size} tokens and does not record its layers, "
            f"heads, width and context; known sizes that fit: {matches}; give {options}"
        )
    ((values, (name, copies)),) = fits.items()
    classic = RECIPES["classic"]["model"]
    sizes = dict(zip(MODEL_SIZES, values, strict=True))
    model = ModelConfig(vocab_size=vocab_size, dropout=DROPOUT, **classic, **sizes)
    listed = ", ".join(f"{key} {size}" for key, size in sizes.items())
    origin = "as given" if given_sizes else f"those of the preset {name}"
    return model, copies, f"The file does not record its sizes; used: {listed}, {origin}."


def _count(vocab_size: int, n_layer: int, n_embd: int, block_size: int) -> int:
    return (2 * vocab_size + block_size) * n_embd + 12 * n_layer * n_embd**2


def _layout(model: ModelConfig) -> Iterator[tuple[str, int]]:
    """Yield randyGPT's array names and their counts of numbers, in the order of a file."""
    c, v = model.n_embd, model.vocab_size
    yield from (("wte", v * c), ("wpe", model.block_size * c), ("lm_head", v * c))
    for i in range(model.n_layer):
        for name in chain(*LAYER.values()):
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
    arrays: dict[str, dict[str, Array]] = {}
    at = HEADER.size
    for kind, name in order:
        arrays.setdefault(kind, {})[name] = np.fromfile(source, "<f4", sizes[name], offset=at)
        at += 4 * sizes[name]
    return arrays


def _stack_arrays(source: Path, model: ModelConfig, arrays: Mapping[str, Array]) -> Params:
    """Return weights or moments by our parameter names, with query, key and value stacked."""
    params: Params = {}
    parts_of = _parts(model)
    for name, shape in parameter_shapes(model).items():
        values = np.concatenate([arrays[part] for part in parts_of[name]]).reshape(shape)
        params[name] = finite(source, name, np.ascontiguousarray(values, np.float32))
    return params


def _parts(model: ModelConfig) -> dict[str, list[str]]:
    """Return our name of each weight -> randyGPT's names of the arrays in it."""
    parts = {f"{name}.weight": [name] for name in ("wte", "wpe", "lm_head")}
    for i in range(model.n_layer):
        for ours, theirs in LAYER.items():
            parts[f"h.{i}.{ours}.weight"] = [f"layers.{i}.{name}" for name in theirs]
    return parts


def _short_name(name: str) -> str:
    """Return the name that a .bin file has for `layers.0.attn.wq.weight`."""
    short = name.removesuffix(".weight")
    return short.replace(".attn.", ".").replace(".mlp.", ".") if short != name else name


def _stack_tensors(
    path: Path, model: ModelConfig, tensors: Mapping[str, LazyTensor]
) -> dict[str, LazyTensor]:
    """Return our weights, each made of one or three tensors of the file."""
    parts_of = _parts(model)
    expected = set(chain(*parts_of.values()))
    for part in expected - tensors.keys():
        raise ExchangeError(f"{path} lacks the tensor {part}")
    refuse_others(path, tensors.keys() - expected)
    return {name: _stack([tensors[part] for part in parts]) for name, parts in parts_of.items()}


def _stack(parts: Sequence[LazyTensor]) -> LazyTensor:
    """Stack tensors of one shape along the rows."""
    if len(parts) == 1:
        return parts[0]
    if len({(part.shape, part.kind) for part in parts}) > 1 or len(parts[0].shape) != 2:
        described = ", ".join(f"{part.kind} {part.shape}" for part in parts)
        raise ExchangeError(f"query, key and value differ in type or shape: {described}")
    rows, columns = parts[0].shape

    def read() -> Array:
        return np.concatenate([part.read() for part in parts])

    return LazyTensor((len(parts) * rows, columns), parts[0].kind, read)


def _tokenizer(source: Path, vocab: Path | None, size: int) -> Tokenizer:
    """Return the tokenizer of --vocab, or of the vocab.json beside the file."""
    path = vocab or source.parent / "vocab.json"
    if not exists(path):
        raise ExchangeError(
            f"{source} needs its vocabulary: --vocab vocab.json or, for a character model, the "
            f"text it was trained on (there is no {path})"
        )
    if is_file(path) and path.suffix not in (".json", ".pkl"):
        return table_of_text(path, size)
    return tokenizer_at(path, size)
