"""The model as mlx-lm loads it: the GPT of `mlx_model.py`, beside this file, over mlx-lm's caches.

A layer keeps the keys and values of the last `block_size` positions and, if the model has a token
shift, the inputs of attention and MLP at the position before. With learned positions, a full cache
restarts with the last half window, as in mlx-randygpt; such texts are decoded one by one, because
mlx-lm cannot restart a single row of a batch.

Legend: B batch, T new tokens, S keys seen, C n_embd, V vocab.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from types import ModuleType
from typing import Any

import mlx.core as mx
from mlx_lm.models.base import create_attention_mask
from mlx_lm.models.cache import ArraysCache, CacheList, KVCache, RotatingKVCache, _BaseCache


def _beside(name: str) -> ModuleType:
    """Import the module in the file of this name in this folder."""
    spec = importlib.util.spec_from_file_location(
        f"mlxgpt_{name}", Path(__file__).with_name(f"{name}.py")
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up there
    spec.loader.exec_module(module)
    return module


gpt = _beside("mlx_model")


class ModelArgs(gpt.ModelArgs):  # type: ignore[misc, name-defined]
    """The fields of config.json that decide the shape of the model."""

    @classmethod
    def from_dict(cls, config: dict[str, Any]) -> ModelArgs:
        """Return the arguments for mlx-lm's call; fields that the model lacks are ignored."""
        names = [field.name for field in fields(cls)]
        return cls(**{name: config[name] for name in names if name in config})


class Shifted:
    """The inputs that the token shift of one layer reads next: slot 0 attention, slot 1 MLP."""

    def __init__(self, arrays: ArraysCache) -> None:
        self._arrays = arrays

    def __getitem__(self, slot: int) -> Any:
        return self._arrays[slot]  # (B, 1, C), or None before the first token

    def __setitem__(self, slot: int, read: mx.array) -> None:
        """Keep the last position of `read` (B, T, C), without padding on the right."""
        left = self._arrays.lengths  # (B,) tokens still to come, if rows are padded
        if left is None:
            self._arrays[slot] = read[:, -1:]
            return
        before = self._arrays[slot]
        if before is None:
            before = mx.zeros_like(read[:, :1])
        all_read = mx.concatenate([before, read], axis=1)  # (B, 1 + T, C)
        at = mx.clip(left, 0, read.shape[1])[:, None, None]
        self._arrays[slot] = mx.take_along_axis(all_read, at, axis=1)


class Layer:
    """The cache of one layer in the form that `gpt.GPT` uses."""

    def __init__(self, cache: Any, shifts: bool) -> None:
        self.keys = cache[0]
        self.arrays = cache[1] if shifts else None
        self.offset = self.keys.offset
        self.update_and_fetch = self.keys.update_and_fetch
        self.last = Shifted(self.arrays) if shifts else None


class Again(_BaseCache):  # type: ignore[misc]
    """The cache of one layer with learned positions, like a CacheList, and the ids read so far."""

    def __init__(self) -> None:
        self.ids: mx.array | None = None  # (B, n), in the first layer only
        self.forget()

    def forget(self) -> None:
        """Restart at position 0."""
        self.caches = KVCache(), ArraysCache(2)

    def __getitem__(self, index: int) -> Any:
        return self.caches[index]

    @property
    def state(self) -> Any:
        """Return the arrays of the cache."""
        return [cache.state for cache in self.caches], self.ids

    @state.setter
    def state(self, value: Any) -> None:
        """Restore the arrays of the cache."""
        self.forget()
        states, self.ids = value
        for cache, state in zip(self.caches, states, strict=True):
            cache.state = state

    def size(self) -> int:
        """Return the number of cached positions."""
        return int(self.caches[0].offset)

    def empty(self) -> bool:
        """Return whether nothing is cached."""
        return self.size() == 0

    @property
    def nbytes(self) -> int:
        """Return the memory of the arrays."""
        return sum(int(cache.nbytes) for cache in self.caches)


def begin_again(tokens: mx.array, cache: Sequence[Again], window: int) -> mx.array:
    """Return the tokens to read: `tokens` (B, T) or, if they do not fit, the last half window.

    The last half window goes into an empty cache. A long prompt is cut to its end, with room for
    one more token.
    """
    first, n_new = cache[0], tokens.shape[1]
    ids = tokens if first.ids is None else mx.concatenate([first.ids, tokens], axis=1)
    first.ids = ids[:, -window:]
    if first.size() + n_new <= window:
        return tokens
    for layer in cache:
        layer.forget()
    return ids[:, -max(1, window // 2 if n_new == 1 else window - 1) :]


class Model(gpt.GPT):  # type: ignore[misc, name-defined]
    """The GPT for mlx-lm: token ids (B, T) to logits (B, T, V)."""

    model_type = "mlxgpt"

    def __call__(self, tokens: mx.array, cache: Sequence[Any] | None = None) -> mx.array:
        """Return the logits of the new tokens; update the cache if there is one."""
        window, shifts = self.args.block_size, self.args.token_shift
        if cache is None or cache[0] is None:
            mask = create_attention_mask(tokens, None, window)
            return super().__call__(tokens, None, mask)
        if isinstance(cache[0], Again):
            tokens = begin_again(tokens, cache, window)
        layers = [Layer(one, shifts) for one in cache]
        mask = create_attention_mask(tokens, layers[0].keys)
        logits = super().__call__(tokens, layers, mask)  # (B, T, V)
        for layer in layers:
            if layer.arrays is not None:
                layer.arrays.advance(tokens.shape[1])
        return logits

    def make_cache(self) -> list[Any]:
        """Return an empty cache for each layer."""
        if self.args.position == "learned":
            return [Again() for _ in self.h]
        window, shifts = self.args.block_size, self.args.token_shift
        return [
            CacheList(RotatingKVCache(window), *([ArraysCache(2)] if shifts else []))
            for _ in self.h
        ]

    @property
    def layers(self) -> list[Any]:
        """Return the blocks, under the name that adapters look for."""
        return list(self.h)
