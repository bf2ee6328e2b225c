"""The forward pass on MLX's default device: the loss of windows of tokens, and cached decoding.

Training and quantised weights share it. It owns the modules, but no weights: every method takes
those to compute with, or None for those that the modules hold.

Legend: B batch, T time, C n_embd, V vocab.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_unflatten

from mlx_randygpt.backends.base import ALL, check_decoding, check_ids
from mlx_randygpt.backends.mlx.cache import (
    Layer,
    LayerPass,
    MLXCache,
    at_ends,
    attention_mask,
)
from mlx_randygpt.backends.mlx.gpt2 import GPT2, GPT2Args
from mlx_randygpt.backends.mlx.model import GPT, ModelArgs, Operations
from mlx_randygpt.backends.mlx.ops import TRAINING
from mlx_randygpt.backends.mlx.recompute import recompute
from mlx_randygpt.backends.mlx.selftest import operations
from mlx_randygpt.backends.mlx.stacks import Weights
from mlx_randygpt.config import ModelConfig
from mlx_randygpt.state import IGNORED, Array, Batch

Windows = tuple[mx.array, mx.array, mx.array]  # inputs, targets and shares of these


class Forward:
    """A model without dropout keys or gradients of its own: loss and logits of given weights."""

    def __init__(
        self,
        config: ModelConfig,
        *,
        on_gpu: bool,
        dtype: mx.Dtype = mx.float32,
        recomputes: bool = False,
    ) -> None:
        self.config = config
        self.dtype = dtype  # of the loss; decoding is float32
        self.on_gpu = on_gpu
        # cuDNN's attention keeps no T x T array, but has half types only
        is_fused = on_gpu and not mx.metal.is_available() and dtype != mx.float32
        ops = replace(TRAINING, attention=None) if is_fused else operations(config)
        self.model = build_modules(config, ops, recomputes=recomputes)
        self._advance_token = self.compile(self.advance)

    def compile(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Compile a function on a GPU; on a CPU that costs 30 s and gains nothing."""
        compiled: Callable[..., Any] = mx.compile(function) if self.on_gpu else function
        return compiled

    def bind(self, weights: Weights | None) -> None:
        """Make the model compute with these weights; nothing relies on those bound before."""
        if weights is not None:
            self.model.update(tree_unflatten(list(weights.items())))

    def loss(
        self, weights: Weights | None, x: mx.array, y: mx.array, shares: mx.array, keys: Any
    ) -> mx.array:
        """Return the cross-entropies of targets y (B, T), summed by their shares, in float32."""
        if weights is not None:
            self.bind({name: w.astype(self.dtype) for name, w in weights.items()})
        logits = self.model(x, keys=keys)  # (B, T, V)
        if not self.on_gpu:  # the GPU's kernel sums in float32 whatever type it reads
            logits = logits.astype(mx.float32)
        return (mx.fast.cross_entropy(logits, y) * shares).sum()

    def new_cache(self, batch_size: int) -> MLXCache:
        """Return a cache with `batch_size` empty rows."""
        c = self.config
        return MLXCache(c.n_layer, (batch_size, c.n_head, c.block_size, c.head_size))

    def logits(
        self,
        weights: Weights | None,
        tokens: Array,
        cache: MLXCache,
        rows: slice = ALL,
        lengths: Array | None = None,
    ) -> Array:
        """Append tokens (B, T) to these rows; return the last position's logits, (B, V) float32.

        Empty rows take up to block_size tokens at once, and different numbers of them; others take
        them one by one.
        """
        check_decoding(self.config, tokens, cache.lengths[rows])
        empty = not cache.lengths[rows].any()
        for part in [tokens] if empty else np.split(tokens, tokens.shape[1], axis=1):
            inputs = mx.array(part.astype(np.int32)), mx.array(cache.lengths[rows].astype(np.int32))
            if part.shape[1] == 1:
                logits, layers = self._advance_token(weights, *inputs, cache.read(rows))
            else:
                counts = np.full(len(part), part.shape[1]) if lengths is None else lengths
                ends = mx.array(counts.astype(np.int32) - 1)
                logits, layers = self.advance(weights, *inputs, cache.read(rows), ends)
            cache.write(rows, layers, 1 if part.shape[1] == 1 else counts)
            del layers  # the cache owns them now
            mx.eval(logits, cache.layers)
        return np.array(logits)

    def advance(
        self,
        weights: Weights | None,
        ids: mx.array,
        lengths: mx.array,
        layers: list[Layer],
        ends: mx.array | None = None,
    ) -> tuple[mx.array, list[Layer]]:
        """Return the logits (B, V) after ids (B, T), and what the rows hold then.

        The rows have these lengths (B,); either T = 1 or all rows are empty. The last id of each
        row is at its end (B,); what follows is padding.
        """
        self.bind(weights)
        passes = [LayerPass(layer, lengths, ids.shape[1]) for layer in layers]
        mask = attention_mask(layers, lengths, ids.shape[1])
        x = self.model.features(ids, passes, mask)  # (B, T, C)
        return self.model.lm_head(at_ends(x, ends)[:, 0]), [each.layer(ends) for each in passes]

    def windows(self, batch: Batch, total: int = 0, n_rows: int = 0, scale: int = 1) -> Windows:
        """Gather inputs, targets and the share of each target in the mean over `total` of them.

        They are (B, T), int32 and float32; `total` is that of the batch if it is not given, and
        shares are multiplied by `scale`. There are at least `n_rows` rows; those added have none.
        """
        x, y = batch.x(), batch.y()
        counts = y != IGNORED
        check_ids(x, self.config.vocab_size)
        check_ids(y, self.config.vocab_size, lowest=IGNORED)
        shares = counts * np.float32(scale / max(1, total or batch.n_targets()))
        added = ((0, max(0, n_rows - len(x))), (0, 0))
        arrays = (np.pad(each, added) for each in (x, np.where(counts, y, 0), shares))
        x, y, shares = (mx.array(each) for each in arrays)
        return x, y, shares


def build_modules(config: ModelConfig, ops: Operations, *, recomputes: bool = False) -> GPT:
    """Build the model's modules; with `recomputes`, its blocks recompute their activations."""
    model: type[GPT] = GPT2 if config.is_gpt2 else GPT
    args: type[ModelArgs] = GPT2Args if config.is_gpt2 else ModelArgs
    values = {field.name: getattr(config, field.name) for field in fields(args)}
    return model(args(**values), ops=ops, wrap=recompute if recomputes else None)
