"""The peer to learn against: nanoGPT's model and its CPU recipe for characters, in PyTorch.

Model: learned positions, LayerNorm without bias, exact GELU, one matrix for embedding and
head, no biases. Recipe (its readme, "I only have a macbook"): AdamW at 1e-3 with betas 0.9 and
0.99, decay 0.1 on matrices, clip 1, 100 steps of warmup, cosine to 1e-4, dropout 0. Written anew
from that description; github.com/karpathy/nanoGPT is the original.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mlx_randygpt.data.windows import eval_batches, sample_batch
from mlx_randygpt.state import Array
from mlx_randygpt.training.schedule import learning_rate


class Block(nn.Module):
    def __init__(self, c: int, n_head: int) -> None:
        super().__init__()
        self.n_head = n_head
        self.norm1, self.norm2 = nn.LayerNorm(c, bias=False), nn.LayerNorm(c, bias=False)
        self.c_attn = nn.Linear(c, 3 * c, bias=False)
        self.attn_proj = nn.Linear(c, c, bias=False)
        self.c_fc = nn.Linear(c, 4 * c, bias=False)
        self.mlp_proj = nn.Linear(4 * c, c, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        b, t, c = x.shape
        qkv = self.c_attn(self.norm1(x)).view(b, t, 3, self.n_head, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # (B, H, T, D)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.attn_proj(y.transpose(1, 2).reshape(b, t, c))
        return x + self.mlp_proj(F.gelu(self.c_fc(self.norm2(x))))


class Model(nn.Module):
    def __init__(self, vocab: int, t: int, n_layer: int, n_head: int, c: int) -> None:
        super().__init__()
        self.wte, self.wpe = nn.Embedding(vocab, c), nn.Embedding(t, c)
        self.blocks = nn.ModuleList(Block(c, n_head) for _ in range(n_layer))
        self.norm = nn.LayerNorm(c, bias=False)
        for name, p in self.named_parameters():
            if p.ndim > 1:
                nn.init.normal_(p, std=0.02 / (2 * n_layer) ** 0.5 if "proj" in name else 0.02)

    def forward(self, x: Tensor) -> Tensor:
        h = self.wte(x) + self.wpe(torch.arange(x.shape[1], device=x.device))  # (B, T, C)
        for block in self.blocks:
            h = block(h)
        return self.norm(h) @ self.wte.weight.T  # (B, T, V)


class NanoGPT:
    """A run of the recipe over `steps` steps: `step(i)` trains, `loss(tokens)` evaluates."""

    def __init__(
        self, vocab: int, block_size: int, n_layer: int, n_head: int, n_embd: int,
        batch_size: int, steps: int, seed: int,
        device: str = "cpu", dtype: str = "float32", compiled: bool = False,
    ) -> None:  # fmt: skip
        torch.manual_seed(seed)
        self.model = Model(vocab, block_size, n_layer, n_head, n_embd).to(device)
        self.run = torch.compile(self.model) if compiled else self.model
        half = dtype == "bfloat16"
        self.cast = torch.autocast(torch.device(device).type, torch.bfloat16, enabled=half)
        self.device = device
        self.block_size, self.batch_size = block_size, batch_size
        self.steps, self.seed = steps, seed
        matrices = [p for p in self.model.parameters() if p.ndim > 1]
        vectors = [p for p in self.model.parameters() if p.ndim == 1]
        groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors}]
        self.optimizer = torch.optim.AdamW(
            groups, lr=1e-3, betas=(0.9, 0.99), weight_decay=0.0, fused=True
        )

    def step(self, i: int, tokens: Array) -> None:
        batch = sample_batch(tokens, self.batch_size, self.block_size, self.seed, i)
        lr = learning_rate(i, iters=self.steps, warmup=100, lr=1e-3, min_lr=1e-4, schedule="cosine")
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        x, y = self.there(batch.x()), self.there(batch.y())
        with self.cast:
            loss = F.cross_entropy(self.run(x).flatten(0, 1), y.flatten())
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()

    def there(self, ids: Array) -> Tensor:
        """Token ids on the device, without waiting for it where it can."""
        tokens = torch.from_numpy(ids).long()
        if self.device == "cuda":
            tokens = tokens.pin_memory()
        return tokens.to(self.device, non_blocking=True)

    @torch.no_grad()
    def loss(self, tokens: Array) -> float:
        """Mean over all of `tokens`, in the windows that `mlxgpt eval` takes."""
        nats, n_targets = 0.0, 0
        for batch in eval_batches(tokens, self.block_size, 64):
            logits = self.model(self.there(batch.x())).flatten(0, 1)
            y = self.there(batch.y()).flatten()
            nats += float(F.cross_entropy(logits, y, ignore_index=-1, reduction="sum"))
            n_targets += batch.n_targets()
        return nats / n_targets
