"""Files as other programs write them, made without those programs: torch.save's archives, GPT-2's
folders, nanoGPT's checkpoints and randyGPT's binaries."""

from __future__ import annotations

import json
import pickle
import struct
import sys
import zipfile
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import patch

import numpy as np
import safetensors.numpy

from mlx_randygpt.config import ARCHS, ModelConfig
from mlx_randygpt.model import parameter_shapes
from mlx_randygpt.recipes import RECIPES
from mlx_randygpt.state import Params, rng

KINDS = {"<f4": "FloatStorage", "<f8": "DoubleStorage", "<f2": "HalfStorage", "<i8": "LongStorage"}
KINDS |= {"|b1": "BoolStorage", "<u2": "BFloat16Storage"}  # NumPy has no bfloat16
TURNED = ("c_attn.weight", "c_proj.weight", "c_fc.weight")
END = "<|endoftext|>"


class _Storage:
    def __init__(self, key: str, values: Any) -> None:
        self.key, self.values = key, values


class _Tensor:
    """A tensor as torch pickles it: a view of a storage."""

    def __init__(self, storage: _Storage, offset: int, shape: Any, strides: Any) -> None:
        self.view = storage, offset, tuple(shape), tuple(strides)

    def __reduce__(self) -> Any:
        rebuild = sys.modules["torch._utils"]._rebuild_tensor_v2  # type: ignore[attr-defined]
        return rebuild, (*self.view, False, OrderedDict())


def tensor(
    key: str, values: Any, offset: int = 0, shape: Any = None, strides: Any = None
) -> _Tensor:
    """`values` as a tensor in the storage `key`, or a view of them."""
    steps = [step // values.itemsize for step in values.strides]
    storage = _Storage(key, np.ascontiguousarray(values).reshape(-1))
    view = (values.shape, steps) if shape is None else (shape, strides)
    return _Tensor(storage, offset, *view)


def torch_pickle(value: Any) -> tuple[bytes, dict[str, Any]]:
    """The data.pkl of torch.save, and the storages it refers to."""
    torch, utils = ModuleType("torch"), ModuleType("torch._utils")
    for name in KINDS.values():
        setattr(torch, name, type(name, (), {"__module__": "torch", "__qualname__": name}))

    def rebuild() -> None: ...

    rebuild.__module__, rebuild.__qualname__ = "torch._utils", "_rebuild_tensor_v2"
    utils._rebuild_tensor_v2 = rebuild  # type: ignore[attr-defined]
    storages: dict[str, Any] = {}

    class Pickler(pickle.Pickler):
        def persistent_id(self, found: Any) -> Any:
            if not isinstance(found, _Storage):
                return None
            storages[found.key] = found.values
            kind = getattr(torch, KINDS[found.values.dtype.str])
            return "storage", kind, found.key, "cpu", found.values.size

    stream = BytesIO()
    with patch.dict(sys.modules, {"torch": torch, "torch._utils": utils}):
        Pickler(stream, 2).dump(value)
    return stream.getvalue(), storages


def save_torch(path: Path, value: Any, packed: bool = False) -> None:
    """What torch.save would write of a value with `tensor`s in it."""
    data, storages = torch_pickle(value)
    kind = zipfile.ZIP_DEFLATED if packed else zipfile.ZIP_STORED
    with zipfile.ZipFile(path, "w", kind) as archive:
        archive.writestr(f"{path.stem}/data.pkl", data)
        archive.writestr(f"{path.stem}/byteorder", "little")
        for key, values in storages.items():
            archive.writestr(f"{path.stem}/data/{key}", values.tobytes())
        archive.writestr(f"{path.stem}/version", "3\n")


def gpt2(**changes: Any) -> ModelConfig:
    """A small GPT-2."""
    sizes = {"vocab_size": 300, "block_size": 16, "n_layer": 2, "n_head": 4, "n_embd": 32}
    return ModelConfig(**{**ARCHS["gpt2"], **sizes, **changes})


def lively(model: ModelConfig, seed: int = 1) -> Params:
    """Weights of deviation 0.15, and gains about 1."""
    random = rng(seed, "check")
    return {
        name: np.float32(0.15) * random.standard_normal(shape, np.float32) + ("ln_" in name)
        for name, shape in parameter_shapes(model).items()
    }


def config_of(model: ModelConfig) -> dict[str, Any]:
    """The config.json that transformers writes for such a GPT-2, as far as it matters."""
    names = {"gelu_tanh": "gelu_new", "gelu": "gelu"}
    return {
        "model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "n_inner": None,
        "activation_function": names[model.activation], "layer_norm_epsilon": 1e-5,
        "vocab_size": model.vocab_size, "n_positions": model.block_size, "n_embd": model.n_embd,
        "n_layer": model.n_layer, "n_head": model.n_head, "tie_word_embeddings": True,
        "scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False,
    }  # fmt: skip


def hf_tensors(params: Mapping[str, Any], prefix: str = "transformer.") -> dict[str, Any]:
    """Weights as GPT-2's files have them: (in, out), behind a prefix."""
    return {
        prefix + name: np.ascontiguousarray(w.T) if name.endswith(TURNED) else w
        for name, w in params.items()
    }


def byte_level(n: int) -> dict[str, int]:
    """A vocab.json of GPT-2's kind: the bytes, made-up pieces, and what ends a text."""
    from mlx_randygpt.tokenizers.subword import byte_characters

    names = [*sorted(byte_characters().values()), "Ġt", "he", "Ġthe", "in"][: n - 1]
    return {name: i for i, name in enumerate([*names, END])}


MERGES = "#version: 0.2\nĠ t\nh e\nĠt he\ni n\n"


def gpt2_folder(folder: Path, model: ModelConfig, params: Mapping[str, Any]) -> Path:
    """A folder with config.json, model.safetensors, vocab.json and merges.txt."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config_of(model)))
    safetensors.numpy.save_file(hf_tensors(params), folder / "model.safetensors", {"format": "pt"})
    (folder / "vocab.json").write_text(json.dumps(byte_level(261)), encoding="utf-8")
    (folder / "merges.txt").write_text(MERGES, encoding="utf-8")
    return folder


def nanogpt(path: Path, model: ModelConfig, params: Mapping[str, Any], /, **changes: Any) -> Path:
    """A ckpt.pt of nanoGPT, after torch.compile, and the meta.pkl beside it."""
    named = {f"transformer.{name}": w for name, w in params.items()}
    named["lm_head.weight"] = params["wte.weight"]
    tensors = {f"_orig_mod.{name}": tensor(str(i), w) for i, (name, w) in enumerate(named.items())}
    names = ("n_layer", "n_head", "n_embd", "block_size", "bias", "vocab_size", "dropout")
    value = {
        "model": OrderedDict(tensors), "model_args": {n: getattr(model, n) for n in names},
        "optimizer": {"state": {0: {"step": tensor("s", np.zeros((), "<f4"))}}},
        "iter_num": 40, "best_val_loss": tensor("b", np.array(2.5, "<f4")),
        "config": {"dataset": "made_up", "learning_rate": 6e-4, "compile": True},
    }  # fmt: skip
    save_torch(path, {**value, **changes})
    chars = [chr(97 + i) if i else "\n" for i in range(model.vocab_size)]
    table = {"itos": dict(enumerate(chars)), "stoi": {c: i for i, c in enumerate(chars)}}
    meta = {"vocab_size": len(chars), **table}
    path.with_name("meta.pkl").write_bytes(pickle.dumps(meta))
    return path


LAYER = ("wq", "wk", "wv", "wo", "fc1", "fc2")


def randy_model(**changes: Any) -> ModelConfig:
    """The preset `tiny` as randyGPT has it."""
    sizes = {"vocab_size": 12, "block_size": 32, "n_layer": 2, "n_head": 4, "n_embd": 64}
    return ModelConfig(**{**RECIPES["classic"]["model"], **sizes, **changes})


def randy_arrays(model: ModelConfig, seed: int = 3) -> dict[str, Any]:
    """randyGPT's own arrays, in the order of its files."""
    random, c = np.random.default_rng(seed), model.n_embd
    shapes = {"wte": (model.vocab_size, c), "wpe": (model.block_size, c)}
    shapes["lm_head"] = (model.vocab_size, c)
    for i in range(model.n_layer):
        for name in LAYER:
            rows, columns = {"fc1": (4 * c, c), "fc2": (c, 4 * c)}.get(name, (c, c))
            shapes[f"{i}.{name}"] = (rows, columns)
    return {n: random.normal(0, 0.15, s).astype("<f4") for n, s in shapes.items()}


def randy_bin(
    path: Path, version: int, arrays: Mapping[str, Any], moments: Sequence[Mapping[str, Any]] = (),
    vocab_size: int = 12, step: int = 70,
) -> Path:  # fmt: skip
    """An RGPT000`version` file."""
    header = struct.pack("<8sIIIf", b"RGPT%04d" % version, vocab_size, step - 1, step, 2.25)
    parts = [arrays[name].tobytes() for name in arrays]
    if moments and version == 3:
        parts += [kind[name].tobytes() for kind in moments for name in arrays]
    elif moments:
        parts += [kind[name].tobytes() for name in arrays for kind in moments]
    path.write_bytes(header + b"".join(parts))
    vocab = {"vocab": ["<|bos|>", "<|eos|>", "\n", " ", *"abcdefgh"], "merges": []}
    path.with_name("vocab.json").write_text(json.dumps(vocab))
    return path
