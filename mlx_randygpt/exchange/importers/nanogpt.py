"""Import nanoGPT's ckpt.pt: a dictionary of weights, sizes and settings, written by torch.save.

The weights have GPT-2's names, as (out, in), with or without biases. The variant of GELU is defined
in nanoGPT's code and is not recorded in the file.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mlx_randygpt.config import ARCHS, ModelConfig
from mlx_randygpt.exchange import ExchangeError
from mlx_randygpt.exchange.importers import gpt2
from mlx_randygpt.exchange.importers.imported_model import ImportedModel, whole
from mlx_randygpt.exchange.importers.tensors import LazyTensor, as_float32
from mlx_randygpt.exchange.importers.torch_file import TorchFile
from mlx_randygpt.exchange.importers.vocabulary import tokenizer_at
from mlx_randygpt.files import is_file, is_folder
from mlx_randygpt.settings import MODEL_SIZES
from mlx_randygpt.tokenizers import Tokenizer

CHECKPOINT, META = "ckpt.pt", "meta.pkl"
COMPILED = "_orig_mod."  # prefix of all names after torch.compile
GPT2_SIZES = (50257, 50304)  # GPT-2's vocabulary, and padded to a multiple of 64


def read_checkpoint(source: Path, vocab: Path | None, activation: str | None) -> ImportedModel:
    """Read the model in a ckpt.pt, or in the folder that holds it."""
    path = source / CHECKPOINT if is_folder(source) else source
    value = TorchFile(path).value
    content = value if isinstance(value, dict) else {}
    state, arguments = content.get("model"), content.get("model_args")
    if state is None or not isinstance(arguments, dict):
        raise ExchangeError(
            f"{path} is not a checkpoint of nanoGPT: it has no model and model_args"
        )
    sizes: dict[str, Any] = {
        name: whole(arguments, name, path) for name in ("vocab_size", *MODEL_SIZES)
    }
    bias = arguments.get("bias", True)  # the first versions lack this setting
    if not isinstance(bias, bool):
        raise ExchangeError(f"{path}: bias={bias!r} is not True or False")
    switches = ARCHS["gpt2"] | {"bias": bias, "activation": activation or "gelu"}
    model = ModelConfig(**switches, **sizes)
    tensors = gpt2.tensors_of(path, state)
    by_name = {name.removeprefix(COMPILED): tensor for name, tensor in tensors.items()}
    params = gpt2.weights(path, model, by_name)
    notes = []
    if activation is None:
        notes.append(
            "The file does not record its GELU; the exact one is assumed, which nanoGPT uses since "
            "July 2023. Older versions need --activation gelu_tanh."
        )
    tokenizer, note = _tokenizer(path, vocab, model.vocab_size, content.get("config"))
    step, loss = content.get("iter_num"), _number(content.get("best_val_loss"))
    if isinstance(step, int):
        best = f", best validation loss {loss:.4f}" if math.isfinite(loss) else ""
        notes.append(f"It was trained for {step:,} steps{best}; here it starts at step 0.")
    return ImportedModel("nanogpt", path, model, params, tokenizer, notes=(*notes, *note))


def _number(value: Any) -> float:
    """Return a loss, which nanoGPT stores as a scalar tensor; nan if there is none."""
    if isinstance(value, LazyTensor) and value.shape == () and value.kind in ("F32", "F64", "BF16"):
        return float(as_float32(value.read(), value.kind).reshape(-1)[0])
    return float(value) if isinstance(value, float) else math.nan


def _tokenizer(
    path: Path, vocab: Path | None, size: int, config: Any
) -> tuple[Tokenizer, tuple[str, ...]]:
    """Return the tokenizer of --vocab, else of the data set's meta.pkl with a note on its path."""
    if vocab is not None:
        return tokenizer_at(vocab, size), ()
    dataset = config.get("dataset") if isinstance(config, Mapping) else None
    paths = [path.parent / META]
    if isinstance(dataset, str) and re.fullmatch(r"\w[\w.-]*", dataset):
        paths.append(path.parent.parent / "data" / dataset / META)
    for file in paths:
        if is_file(file):
            return tokenizer_at(file, size), (f"Vocabulary: {file}",)
    if size in GPT2_SIZES:
        advice = (
            "GPT-2's tokenizer: --vocab tokenizer.json, or a folder of vocab.json and merges.txt"
        )
    else:
        advice = f"the {META} of its data set: --vocab {META}"
    raise ExchangeError(f"{path} has {size} tokens and needs {advice}; looked for {paths[-1]}")
