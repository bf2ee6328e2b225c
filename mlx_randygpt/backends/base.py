"""The seam: what a backend is. Two live behind it, and a third is one file and one row more.

Only NumPy arrays, integers and floats cross it; a backend never sees files, text or terminals.
"""

from __future__ import annotations

import resource
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, SupportsFloat

import numpy as np
from numpy.typing import NDArray

from mlx_randygpt.config import ModelConfig, UserError
from mlx_randygpt.state import Array, Batch, Params, TrainState

ALL = slice(None)  # every row of a cache


class BackendError(UserError, RuntimeError):
    """A backend that cannot run here; the message says why and what would make it run."""


@dataclass(frozen=True)
class StepResult:
    """Loss and gradient norm of one optimizer step; reading them may wait for the device,
    so that a loop that reads one step late never makes the device wait for Python."""

    loss_value: SupportsFloat
    grad_norm_value: SupportsFloat

    @property
    def loss(self) -> float:
        """Mean cross-entropy over the step's tokens, in nats."""
        return float(self.loss_value)

    @property
    def grad_norm(self) -> float:
        """Global L2 norm of the gradient before clipping."""
        return float(self.grad_norm_value)


class Cache(Protocol):
    """Keys and values of B streams, one a row. Holds the last `block_size` tokens of each; rows
    know nothing of each other, so that streams of any length stand side by side."""

    lengths: NDArray[np.int64]  # (B,) tokens seen so far

    def reset(self, rows: slice) -> None:
        """Empty these rows."""

    def move(self, source: int, target: int) -> None:
        """Let row `target` hold what row `source` does."""

    def select(self, rows: Sequence[int]) -> None:
        """Keep these streams, in this order; a row may be named twice (beams) or not at all."""


class Backend(Protocol):
    """One model on one device: owns weights, moments, step count and scratch memory.

    Built as `Class(model_config, train_config, state)`. Belongs to the thread that built it.
    """

    name: str  # "mlx", "numpy"
    device: str  # for people: "Apple M3 Max (Metal)", "2 threads"
    step: int  # optimizer steps taken

    def train_step(self, batches: Sequence[Batch], lr: float) -> StepResult:
        """One optimizer step on the mean loss over all micro-batches (of one shape), with dropout.

        Dropout is a function of (seed, step, micro-batch). Where the gradient is not finite,
        weights and moments stay as they were; the step counts, and the StepResult tells.
        """

    def loss(self, batch: Batch) -> float:
        """Mean cross-entropy in nats over the targets that count, without dropout."""

    def loss_and_grads(self, batch: Batch) -> tuple[float, Params]:
        """`loss` and its gradient for every weight, without dropout or clipping."""

    def new_cache(self, batch_size: int) -> Any:
        """A Cache with `batch_size` rows, all of them empty."""

    def logits(self, tokens: Array, cache: Any, rows: slice = ALL) -> Array:
        """Append tokens (B, T) to these rows of the cache; float32 logits of the last position,
        (B, V).

        With rotary positions the window slides: each layer attends to the last `block_size` keys.
        With learned positions no length may pass `block_size`. ValueError where T, an id or a
        position is out of range.
        """

    def state(self) -> TrainState:
        """A consistent copy of weights and moments in float32, safe to save."""

    def matmul_flops(self) -> float:
        """This device's own float32 matrix-product rate, measured now, in FLOP per second."""

    def restore(self, state: TrainState) -> None:
        """Go on from these weights, moments and step."""

    def memory_bytes(self) -> int:
        """The most held so far: device memory, or resident memory of the process."""


def resident_bytes() -> int:
    """Peak resident memory of this process."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def check_decoding(config: ModelConfig, tokens: Array, lengths: Array) -> None:
    """ValueError unless tokens (B, T) can follow what rows of these lengths (B,) have read."""
    (b, t), size = tokens.shape, config.block_size
    if b != len(lengths):
        raise ValueError(f"{b} streams of tokens for {len(lengths)} rows of the cache")
    if not 1 <= t <= size:
        raise ValueError(f"{t} tokens at once; it must be 1 to block_size={size}")
    if config.position == "learned" and (longest := int(lengths.max())) + t > size:
        raise ValueError(f"{longest} + {t} positions pass block_size={size}, the last learned")
    check_ids(tokens, config.vocab_size)


def check_ids(tokens: Array, vocab_size: int, lowest: int = 0) -> None:
    """ValueError unless every id is in lowest..vocab_size-1: MLX would read past the end."""
    for token in (int(tokens.min()), int(tokens.max())):
        if not lowest <= token < vocab_size:
            raise ValueError(f"token id {token} is outside {lowest}..{vocab_size - 1}")
