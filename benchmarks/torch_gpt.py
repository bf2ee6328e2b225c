"""The peer to measure against: the same model and optimizer in plain PyTorch, float32, as one
would write it there (fused attention, fused AdamW), after the design of nanoGPT."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mlx_randygpt.config import ModelConfig, TrainConfig


class Block(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        c = config.n_embd
        self.config = config
        self.c_attn = nn.Linear(c, 3 * c, bias=False)
        self.attn_proj = nn.Linear(c, c, bias=False)
        self.c_fc = nn.Linear(c, 4 * c, bias=False)
        self.mlp_proj = nn.Linear(4 * c, c, bias=False)

    def forward(self, x: Tensor, phases: Tensor | None) -> Tensor:
        b, t, c = x.shape
        split = (
            self.c_attn(self.read(x)).view(b, t, 3, self.config.n_head, -1).permute(2, 0, 3, 1, 4)
        )
        q, k, v = split.unbind(0)  # (B, H, T, D)
        if self.config.qk_norm:
            q, k = norm(q), norm(k)
        if phases is not None:
            q, k = rotate(q, phases), rotate(k, phases)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.attn_proj(y.transpose(1, 2).reshape(b, t, c))
        return x + self.mlp_proj(F.relu(self.c_fc(self.read(x))).square())

    def read(self, x: Tensor) -> Tensor:
        """The norm, shifted if the model does so; (B, T, C)."""
        y = norm(x)
        if not self.config.token_shift:
            return y
        half = y.shape[-1] // 2
        return torch.cat([F.pad(y[:, :-1, :half], (0, 0, 1, 0)), y[:, :, half:]], dim=-1)


class TorchGPT(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.block_size, config.n_embd)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        d = config.head_size
        angles = torch.outer(
            torch.arange(config.block_size), 10000.0 ** (-torch.arange(0, d, 2) / d)
        )
        self.register_buffer("phases", torch.polar(torch.ones_like(angles), angles))
        for p in self.parameters():
            nn.init.normal_(p, std=0.02)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        h = self.wte(x)  # (B, T, C)
        rotary = self.config.position == "rope"
        if not rotary:
            h = h + self.wpe(torch.arange(x.shape[1]))
        for block in self.blocks:
            h = block(h, self.phases if rotary else None)
        logits = self.lm_head(norm(h) if self.config.final_norm else h)
        return F.cross_entropy(logits.view(-1, logits.shape[-1]), y.view(-1))


def norm(x: Tensor) -> Tensor:
    return F.rms_norm(x, (x.shape[-1],), eps=1e-5)


def rotate(x: Tensor, phases: Tensor) -> Tensor:
    pairs = torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2))
    return torch.view_as_real(pairs * phases).flatten(-2)


class TorchTrainer:
    """One AdamW step as nanoGPT takes it: zero, forward, backward, clip, fused AdamW."""

    def __init__(self, model: ModelConfig, train: TrainConfig, *, compiled: bool) -> None:
        self.module = TorchGPT(model)
        self.run = torch.compile(self.module) if compiled else self.module
        self.clip = train.grad_clip
        self.optimizer = torch.optim.AdamW(
            self.module.parameters(),
            lr=train.lr, betas=(train.beta1, train.beta2), weight_decay=train.weight_decay,
            fused=True,
        )  # fmt: skip

    def train_step(self, x: Tensor, y: Tensor) -> float:
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.run(x, y)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.module.parameters(), self.clip)
        self.optimizer.step()
        return loss.item()
