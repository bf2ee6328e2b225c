"""GPT-2 in MLX: LayerNorm, GELU, biases and a head that is the embedding, around our attention.

Caches and dropout work as in `model`.

Legend: B batch, T time, C n_embd, F = 4C, V vocab.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_randygpt.backends.mlx.model import (
    GPT,
    PLAIN,
    Attention,
    Embedding,
    ModelArgs,
    Operations,
    drop,
)
from mlx_randygpt.model import GPT2_NORM_EPS


@dataclass(frozen=True)
class GPT2Args(ModelArgs):
    """Adds what only GPT-2 has."""

    activation: str = "gelu_tanh"  # | "gelu", the exact one
    bias: bool = True


def gelu(h: mx.array) -> mx.array:
    """Return h Φ(h), Φ the normal distribution; MLX's own is compiled, which is slow on a CPU."""
    return h * (1 + mx.erf(h * 2**-0.5)) * 0.5


def gelu_tanh(h: mx.array) -> mx.array:
    """Return GPT-2's approximation of GELU, ½h(1 + tanh(√(2/π)(h + 0.044715h³)))."""
    return 0.5 * h * (1 + mx.tanh((2 / math.pi) ** 0.5 * (h + 0.044715 * h * h * h)))


class GPT2Attention(Attention):
    """Attention with biases."""

    def __init__(self, args: GPT2Args, ops: Operations) -> None:
        super().__init__(args, ops)
        self.c_attn = nn.Linear(args.n_embd, 3 * args.n_embd, bias=args.bias)
        self.c_proj = nn.Linear(args.n_embd, args.n_embd, bias=args.bias)


class GPT2MLP(nn.Module):  # type: ignore[misc]
    """GELU between two projections (arXiv 1606.08415)."""

    def __init__(self, args: GPT2Args) -> None:
        super().__init__()
        self.c_fc = nn.Linear(args.n_embd, 4 * args.n_embd, bias=args.bias)
        self.c_proj = nn.Linear(4 * args.n_embd, args.n_embd, bias=args.bias)
        self.activation = gelu if args.activation == "gelu" else gelu_tanh

    def __call__(self, x: mx.array) -> mx.array:
        """Map (B, T, C) to (B, T, C)."""
        return self.c_proj(self.activation(self.c_fc(x)))  # (B, T, F) inside


class GPT2Block(nn.Module):  # type: ignore[misc]
    """Pre-norm residual block."""

    def __init__(self, args: GPT2Args, ops: Operations) -> None:
        super().__init__()
        self.dropout = args.dropout
        self.ln_1 = nn.LayerNorm(args.n_embd, GPT2_NORM_EPS, bias=args.bias)
        self.attn = GPT2Attention(args, ops)
        self.ln_2 = nn.LayerNorm(args.n_embd, GPT2_NORM_EPS, bias=args.bias)
        self.mlp = GPT2MLP(args)

    def __call__(self, x: mx.array, mask: Any, cache: Any, keys: Sequence[Any]) -> mx.array:
        """Map (B, T, C) to (B, T, C); `keys` are the dropout keys of the two branches."""
        x = x + drop(self.attn(self.ln_1(x), mask, cache), self.dropout, keys[0])
        return x + drop(self.mlp(self.ln_2(x)), self.dropout, keys[1])


class GPT2(GPT):
    """A GPT with GPT-2's modules: the same calls, other weights."""

    def __init__(
        self,
        args: GPT2Args,
        *,
        ops: Operations = PLAIN,
        wrap: Callable[[Any], Callable[..., mx.array]] | None = None,
    ) -> None:
        nn.Module.__init__(self)  # other modules under the same names
        self.args = args
        self.wrap = wrap
        self.wte = Embedding(args.vocab_size, args.n_embd, ops)
        self.wpe = nn.Embedding(args.block_size, args.n_embd)
        self.h = [GPT2Block(args, ops) for _ in range(args.n_layer)]
        self.ln_f = nn.LayerNorm(args.n_embd, GPT2_NORM_EPS, bias=args.bias)

    def normalize_final(self, x: mx.array) -> mx.array:
        """Apply the last LayerNorm, (B, T, C)."""
        return self.ln_f(x)

    def lm_head(self, x: mx.array) -> mx.array:
        """Return the logits (…, V) of features (…, C), by the embedding."""
        return self.wte.as_linear(x)
