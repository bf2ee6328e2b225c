"""Text from nanoGPT's model in PyTorch, in its own two ways; needs nothing but PyTorch."""

from __future__ import annotations

import nanogpt
import torch
import torch.nn.functional as F
from torch import Tensor


def draw(logits: Tensor) -> Tensor:
    """As nanoGPT draws: (B, V) -> (B, 1)."""
    logits = logits / 0.8
    smallest = torch.topk(logits, 50).values[:, -1:]
    p = F.softmax(logits.masked_fill(logits < smallest, -torch.inf), dim=-1)
    return torch.multinomial(p, 1)


@torch.no_grad()
def nanogpt_generate(model: nanogpt.Model, block_size: int, n: int) -> None:
    tokens = torch.zeros((1, 1), dtype=torch.long)
    for _ in range(n):
        tokens = torch.cat([tokens, draw(model(tokens[:, -block_size:])[:, -1])], dim=1)


@torch.inference_mode()
def torch_kv(model: nanogpt.Model, n: int, n_streams: int = 1) -> None:
    """One token of each stream at a time over keys and values that were allocated once; a full
    window starts again, which costs it nothing."""
    block_size, c = model.wpe.weight.shape
    n_head = model.blocks[0].n_head
    device, b = model.wpe.weight.device, n_streams
    sizes = (len(model.blocks), 2, b, n_head, block_size, c // n_head)
    cache = torch.zeros(sizes, device=device)
    weights = [
        (
            b.norm1.weight, b.c_attn.weight, b.attn_proj.weight,
            b.norm2.weight, b.c_fc.weight, b.mlp_proj.weight,
        )
        for b in model.blocks
    ]  # fmt: skip
    wte, wpe, last_norm = model.wte.weight, model.wpe.weight, model.norm.weight
    token = torch.zeros((b, 1), dtype=torch.long, device=device)
    for i in range(n):
        at = i % block_size
        x = wte[token[:, 0]] + wpe[at]  # (B, C)
        for kv, (norm1, c_attn, attn_proj, norm2, c_fc, mlp_proj) in zip(
            cache, weights, strict=True
        ):
            qkv = F.linear(F.layer_norm(x, (c,), norm1), c_attn).view(b, 3, n_head, 1, -1)
            kv[:, :, :, at] = qkv[:, 1:, :, 0].transpose(0, 1)
            seen = kv[:, :, :, : at + 1]
            y = F.scaled_dot_product_attention(qkv[:, 0], seen[0], seen[1])  # (B, H, 1, D)
            x = x + F.linear(y.view(b, c), attn_proj)
            x = x + F.linear(F.gelu(F.linear(F.layer_norm(x, (c,), norm2), c_fc)), mlp_proj)
        token = draw(F.linear(F.layer_norm(x, (c,), last_norm), wte))
