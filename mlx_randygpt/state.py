"""What a model is, apart from any backend: names and shapes of its weights, their first values,
the state of a run, a batch of token windows, and the random numbers of a (seed, purpose, step).

Legend: B batch, T time (block_size), C n_embd, H heads, D = C/H, F = 4C, V vocab, L layers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mlx_randygpt import gpt2, lora_names
from mlx_randygpt.config import ModelConfig

Array = NDArray[Any]
Params = dict[str, Array]

IGNORED = -1  # a target that is not counted


@dataclass(frozen=True)
class TrainState:
    """A consistent copy of one run: float32 arrays that nobody else writes to.

    `moments["m"]` has an entry per weight; `moments["v"]` only for those AdamW updates.
    Empty moments mean zeros.
    """

    step: int  # optimizer steps taken
    params: Params
    moments: dict[str, Params]


@dataclass(frozen=True)
class Batch:
    """B windows of T tokens, named by where they start in `tokens`; nothing is copied before use.

    A backend may keep `tokens` on its device and gather there, as long as it sees the same array.
    """

    tokens: Array  # (n,) integers, a whole split
    starts: NDArray[np.int64]  # (B,)
    block_size: int  # T
    row: int = 0  # of its first window, where this is a part of a batch

    @staticmethod
    def of(windows: Array) -> Batch:
        """The batch whose inputs are windows[:, :-1] and targets windows[:, 1:]; (B, T+1) ids."""
        size = windows.shape[1]
        starts = np.arange(len(windows), dtype=np.int64) * size
        return Batch(np.ascontiguousarray(windows, dtype=np.int32).reshape(-1), starts, size - 1)

    def x(self) -> NDArray[np.int32]:
        """Inputs, (B, T); past the end of `tokens` the last token is repeated."""
        at = np.minimum(self._positions(), len(self.tokens) - 1)
        return self.tokens[at].astype(np.int32)

    def y(self) -> NDArray[np.int32]:
        """Targets, (B, T): the token after each input, IGNORED past the end of `tokens`."""
        at = self._positions() + 1
        inside = at < len(self.tokens)
        return np.where(inside, self.tokens[np.where(inside, at, 0)].astype(np.int32), IGNORED)

    def n_targets(self) -> int:
        """How many targets count."""
        return int(np.clip(len(self.tokens) - 1 - self.starts, 0, self.block_size).sum())

    def _positions(self) -> NDArray[np.int64]:
        return self.starts[:, None] + np.arange(self.block_size)  # (B, T)


def parameter_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Published name -> shape, in the order every file and every backend keeps; (out, in)."""
    c, v = config.n_embd, config.vocab_size
    shapes: dict[str, tuple[int, ...]] = {"wte.weight": (v, c)}
    if config.position == "learned":
        shapes["wpe.weight"] = (config.block_size, c)
    for i in range(config.n_layer):
        shapes[f"h.{i}.attn.c_attn.weight"] = (3 * c, c)  # query, key and value stacked
        shapes[f"h.{i}.attn.c_proj.weight"] = (c, c)
        shapes[f"h.{i}.mlp.c_fc.weight"] = (4 * c, c)
        shapes[f"h.{i}.mlp.c_proj.weight"] = (c, 4 * c)
    if config.is_gpt2:
        shapes |= gpt2.vectors(config.n_layer, c, config.bias)
    else:
        shapes["lm_head.weight"] = (v, c)
    return shapes | lora_names.shapes(shapes, config.lora_rank, config.lora_targets)


def parameter_count(config: ModelConfig) -> int:
    """Trainable numbers, embeddings and head included."""
    return sum(int(np.prod(shape)) for shape in parameter_shapes(config).values())


def flops_per_token(config: ModelConfig) -> int:
    """Floating-point operations of one training step per token: 6 per weight of a product, and
    12·C·T per layer for attention over the full square (the convention of PaLM, appendix B)."""
    weights = 12 * config.n_layer * config.n_embd**2 + config.vocab_size * config.n_embd
    return 6 * weights + 12 * config.n_layer * config.n_embd * config.block_size


def muon_parts(name: str) -> int:
    """How many stacked square-ish matrices Muon sees in this weight; 0 means AdamW updates it."""
    if not (name.startswith("h.") and ".c_" in name and name.endswith("weight")):
        return 0
    return 3 if name.endswith("c_attn.weight") else 1


def initial_params(config: ModelConfig, seed: int) -> Params:
    """The untrained weights, float32: normal(0, init_scale / √C); output projections zero, or
    smaller by √(2L) as in GPT-2."""
    params: Params = {}
    for index, (name, shape) in enumerate(parameter_shapes(config).items()):
        zero = config.zero_init and name.endswith("c_proj.weight")
        if len(shape) == 1 or zero or name.endswith("lora_b"):
            params[name] = np.full(shape, "ln_" in name and name.endswith("weight"), np.float32)
            continue
        scale = (2 * config.n_layer) ** -0.5 if name.endswith("c_proj.weight") else 1.0
        normal = rng(seed, "init", index).standard_normal(shape, dtype=np.float32)
        params[name] = normal * np.float32(config.init_scale * config.n_embd**-0.5 * scale)
    return params


PURPOSES = ("init", "batch", "dropout", "sample", "check")


def rng(seed: int, purpose: str, *index: int) -> np.random.Generator:
    """The generator of (seed, purpose, index): nothing random has a state worth saving."""
    key = (PURPOSES.index(purpose), *index)
    return np.random.Generator(np.random.PCG64DXSM(np.random.SeedSequence(seed, spawn_key=key)))
