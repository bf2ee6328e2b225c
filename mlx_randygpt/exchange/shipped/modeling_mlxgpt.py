"""A GPT of mlx-randygpt in PyTorch, for transformers; weights have their published names.

The cache holds the keys and values of the last `block_size` positions of each layer and, if the
model has a token shift, the inputs of attention and MLP at the position before. With learned
positions, a text that has filled its cache continues from its last half window in an empty one, as
in mlx-randygpt; a text with padding, or one that is too long from the start, is refused.

Legend: B batch, T new tokens, S keys seen, C n_embd, H heads, D = C/H, V vocab.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.cache_utils import Cache, DynamicLayer
from transformers.modeling_outputs import CausalLMOutputWithPast

from .configuration_mlxgpt import MLXGPTConfig

EPS = 1e-5  # of every RMSNorm


CACHE_FIELD = next(  # of an output; transformers renamed it in 5.24
    field.name
    for field in fields(CausalLMOutputWithPast)
    if field.name in ("cache", "past_key_values")
)
REDUNDANT = ("cache_position",)  # arguments of older versions that the cache itself answers


class WindowLayer(DynamicLayer):  # type: ignore[misc]
    """Keys and values of the last `window` positions, and the two halves of the token shift."""

    is_sliding = True
    is_croppable = False
    keys: Any  # (B, H, up to window - 1, D)
    values: Any

    def __init__(self, window: int) -> None:
        super().__init__()
        self.window = window
        self.seen = 0
        self.last: list[Tensor | None] = [None, None]  # (B, 1, C/2) each
        self.ids: Tensor | None = None  # (B, n) read so far; first layer, learned positions
        self.again = False  # whether they were read again from position 0

    def update(self, k: Tensor, v: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Store k and v (B, H, T, D); return all keys and values for the queries, (B, H, S, D)."""
        if not self.is_initialized:
            self.lazy_initialization(k, v)
        if self.seen:
            k, v = torch.cat([self.keys, k], dim=-2), torch.cat([self.values, v], dim=-2)
        self.seen += k.shape[-2] - self.kept()
        first = max(
            0, k.shape[-2] - self.window + 1
        )  # the next query takes one place of the window
        self.keys, self.values = k[..., first:, :], v[..., first:, :]
        return k, v

    def kept(self) -> int:
        """Return the number of stored positions."""
        return self.keys.shape[-2] if self.seen else 0

    def get_seq_length(self) -> int:
        """Return the number of tokens read so far."""
        return self.seen

    def get_max_length(self) -> int:
        """Return the size of the window."""
        return self.window

    def reset(self) -> None:
        """Empty the cache."""
        super().reset()
        self.seen, self.last, self.ids = 0, [None, None], None

    def crop(self, *_: Any) -> None:
        """Raise NotImplementedError."""
        raise NotImplementedError("keys that have left the window cannot come back")

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Select the rows of the beams."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Select rows of the batch."""
        if self.seen:
            self.keys, self.values = self.keys[indices], self.values[indices]
            self.last = [None if x is None else x[indices] for x in self.last]
            self.ids = None if self.ids is None else self.ids[indices]

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row of the batch."""
        if self.seen:
            rows = torch.arange(len(self.keys), device=self.keys.device)
            self.batch_select_indices(rows.repeat_interleave(repeats))


class WindowCache(Cache):  # type: ignore[misc]
    """One WindowLayer per layer."""

    def __init__(self, config: MLXGPTConfig) -> None:
        super().__init__(layers=[WindowLayer(config.block_size) for _ in range(config.n_layer)])


def rms(x: Tensor) -> Tensor:
    """Return x / sqrt(mean(x²) + EPS) over the last axis, without a gain."""
    return F.rms_norm(x, x.shape[-1:], eps=EPS)


def turn(x: Tensor, positions: Tensor, base: float) -> Tensor:
    """Rotate x (B, H, T, D) by positions (B, T): RoPE (arXiv 2104.09864) on interleaved pairs.

    If D is odd, the last value stays unchanged.
    """
    n = x.shape[-1] // 2
    rates = base ** (-torch.arange(n, device=x.device, dtype=torch.float64) / n)
    angles = positions[:, None, :, None].to(torch.float64) * rates  # (B, 1, T, n)
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    even, odd = x[..., 0 : 2 * n : 2], x[..., 1 : 2 * n : 2]
    turned = torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1)
    return torch.cat([turned.flatten(-2), x[..., 2 * n :]], dim=-1)


def shift(x: Tensor, real: Tensor | None, cache: WindowLayer | None, slot: int) -> Tensor:
    """Take the first half of x (B, T, C) from the position before: token shift (arXiv 2305.13048).

    It is zero before the first position and after padding, at which `real` (B, T) is 0.
    """
    half = x.shape[-1] // 2
    read = x[..., :half] if real is None else x[..., :half] * real[..., None].to(x.dtype)
    before = None if cache is None else cache.last[slot]
    if before is None:
        before = torch.zeros_like(read[:, :1])
    if cache is not None:
        cache.last[slot] = read[:, -1:]
    return torch.cat([torch.cat([before, read[:, :-1]], dim=1), x[..., half:]], dim=-1)


def _refuse_others(others: dict[str, Any]) -> None:
    """Raise TypeError for an argument that this model does not have, unless it is off."""
    for name, value in others.items():
        if value is not None and value is not False and name not in REDUNDANT:
            raise TypeError(f"this model has no argument {name}; its result would be without it")


class Attention(nn.Module):  # type: ignore[misc]
    """Causal self-attention; c_attn stacks query, key and value, with H heads of D rows each."""

    def __init__(self, config: MLXGPTConfig) -> None:
        super().__init__()
        self.n_head, self.qk_norm = config.n_head, config.qk_norm
        self.rope_base = config.rope_base if config.position == "rope" else None
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=False)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=False)

    def forward(
        self, x: Tensor, positions: Tensor, mask: Tensor, cache: WindowLayer | None
    ) -> Tensor:
        """Return the attention output for x (B, T, C)."""
        b, t, c = x.shape
        qkv = self.c_attn(x).view(b, t, 3, self.n_head, c // self.n_head)  # (B, T, 3, H, D)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (B, H, T, D) each
        if self.qk_norm:
            q, k = rms(q), rms(k)
        if self.rope_base:
            q, k = (turn(x, positions, self.rope_base) for x in (q, k))
        if cache is not None:
            k, v = cache.update(k, v)  # (B, H, S, D)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.c_proj(y.transpose(1, 2).reshape(b, t, c))  # (B, T, C)


class MLP(nn.Module):  # type: ignore[misc]
    """Squared ReLU between two projections (arXiv 2109.08668)."""

    def __init__(self, config: MLXGPTConfig) -> None:
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=False)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return the output for x (B, T, C)."""
        return self.c_proj(F.relu(self.c_fc(x)).square())


class Block(nn.Module):  # type: ignore[misc]
    """A pre-norm residual block."""

    def __init__(self, config: MLXGPTConfig) -> None:
        super().__init__()
        self.shifted = config.token_shift
        self.attn, self.mlp = Attention(config), MLP(config)
        self.drop = nn.Dropout(config.dropout)

    def forward(
        self,
        x: Tensor,
        positions: Tensor,
        mask: Tensor,
        real: Tensor | None,
        cache: WindowLayer | None,
    ) -> Tensor:
        """Return x (B, T, C) with the outputs of attention and MLP added."""
        read = shift(rms(x), real, cache, 0) if self.shifted else rms(x)
        x = x + self.drop(self.attn(read, positions, mask, cache))
        read = shift(rms(x), real, cache, 1) if self.shifted else rms(x)
        return x + self.drop(self.mlp(read))


class MLXGPTForCausalLM(PreTrainedModel, GenerationMixin):  # type: ignore[misc]
    """The GPT for transformers: token ids (B, T) to logits (B, T, V)."""

    config_class = MLXGPTConfig
    _no_split_modules = ["Block"]  # noqa: RUF012
    _input_embed_layer = "wte"
    _supports_sdpa = True
    _is_stateful = True  # a cache cannot be rolled back, so no assisted decoding

    def __init__(self, config: MLXGPTConfig) -> None:
        super().__init__(config)
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        if config.position == "learned":
            self.wpe = nn.Embedding(config.block_size, config.n_embd)
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.post_init()

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False  # `forward` creates its own

    def forward(  # noqa: PLR0913
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        return_dict: bool | None = None,
        cache: Cache | None = None,
        num_items_in_batch: int | Tensor | None = None,
        **others: Any,
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        """Return the logits and, with `labels`, the loss.

        `attention_mask` (B, tokens so far) is 0 at padding, on either side. Only the last
        `logits_to_keep` logits are returned, 0 for all. `labels` are shifted here; -100 is ignored.
        The loss is their mean, or their sum divided by `num_items_in_batch`. `cache` is the name of
        `past_key_values` since transformers 5.24; the output has it under both names.
        """
        _refuse_others(others)
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        if None not in (cache, past_key_values) and cache is not past_key_values:
            raise ValueError("cache and past_key_values are two names of one cache; give one")
        cache = past_key_values if cache is None else cache
        use_cache = use_cache if use_cache is not None else not self.training
        cache = self._cache(cache) if use_cache or cache is not None else None
        layers = cache.layers if cache else [None] * len(self.h)
        if cache and input_ids is not None and self.config.position == "learned":
            input_ids = self._begin_again(input_ids, attention_mask, cache.layers)
        x = self.wte(input_ids) if inputs_embeds is None else inputs_embeds  # (B, T, C)
        positions, mask, real = self._places(x, attention_mask, position_ids, layers[0])
        if self.config.position == "learned":
            x = x + self.wpe(positions)
        for block, layer in zip(self.h, layers, strict=True):
            x = block(x, positions, mask, real, layer)
        x = rms(x) if self.config.final_norm else x
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(x[:, kept])  # (B, T, V)
        loss = None
        if labels is not None:
            targets = labels[:, 1:].to(logits.device)
            scores, n = logits[:, :-1].flatten(0, 1).float(), num_items_in_batch
            how = "mean" if n is None else "sum"
            loss = F.cross_entropy(scores, targets.flatten(), reduction=how)
            loss = loss if n is None else loss / n
        output = CausalLMOutputWithPast(loss=loss, logits=logits, **{CACHE_FIELD: cache})
        if CACHE_FIELD != "cache":
            output.cache = cache
        return output.to_tuple() if return_dict is False else output

    def _cache(self, cache: Cache | None) -> WindowCache:
        """Return `cache`, or a new one if it is None, or empty and of another kind."""
        if isinstance(cache, WindowCache):
            return cache
        if cache is not None and not (isinstance(cache, Cache) and cache.get_seq_length() == 0):
            raise ValueError(f"a cache of another model ({type(cache).__name__}); pass its own")
        return WindowCache(self.config)

    def _begin_again(self, ids: Tensor, mask: Tensor | None, layers: list[Any]) -> Tensor:
        """Return the tokens to read: `ids` (B, T) or, if they do not fit, the last half window.

        The last half window is read from position 0.
        """
        first, window = layers[0], self.config.block_size
        ids_read = ids if first.ids is None else torch.cat([first.ids, ids], dim=1)[:, -window:]
        full = first.seen + ids.shape[1] > window
        if full and ids.shape[1] == 1 and (mask is None or bool(mask.all())):
            for layer in layers:
                layer.reset()
            ids, first.again = ids_read[:, -max(1, window // 2) :], True
        first.ids = ids_read
        return ids

    def _places(
        self,
        x: Tensor,
        padding_mask: Tensor | None,
        positions: Tensor | None,
        layer: WindowLayer | None,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return positions (B, T), visible keys (B or 1, 1, T, S), and non-padding flags (B, T)."""
        b, t, _ = x.shape
        seen, kept = (layer.seen, layer.kept()) if layer else (0, 0)
        if padding_mask is not None and padding_mask.ndim != 2:
            raise ValueError(
                f"attention_mask {tuple(padding_mask.shape)} is not of (batch, tokens)"
            )
        if padding_mask is not None and bool(padding_mask.all()):
            padding_mask = None
        if layer and layer.again:
            positions = None
        if positions is None and padding_mask is not None:
            positions = (padding_mask.long().cumsum(-1) - 1).clamp(min=0)[:, -t:]
        if positions is None:
            positions = torch.arange(seen, seen + t, device=x.device).expand(b, t)
        self._refuse_beyond(positions)
        keys = torch.arange(kept + t, device=x.device)  # (S,)
        query = keys[kept:, None]
        mask = (keys <= query) & (keys > query - self.config.block_size)  # (T, S)
        if padding_mask is None:
            return positions, mask[None, None], None
        real = padding_mask.bool()[:, -(kept + t) :]  # (B, S)
        # Padding attends to itself: the softmax of an empty row would be NaN.
        mask = (mask & real[:, None, :]) | (keys == query)  # (B, T, S)
        return positions, mask[:, None], real[:, -t:]

    def _refuse_beyond(self, positions: Tensor) -> None:
        last, most = int(positions.max()), self.config.block_size
        if self.config.position == "learned" and last >= most:
            raise ValueError(
                f"position {last} is beyond the {most} that this model has learned; only a text "
                "without padding goes on past them, token by token and with its cache"
            )
