"""The interface between a backend and the rest: `Scorer` evaluates and generates, `Backend` trains.

Only NumPy arrays, integers and floats cross it; a backend never sees files, text or terminals.
A third backend is one more file, and one more row in config.BACKENDS.
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
    """Raised if a backend cannot run here; the message names the reason and a remedy."""


@dataclass(frozen=True)
class StepResult:
    """Loss and gradient norm of one optimizer step.

    Reading them may wait for the device; a loop that reads one step late never makes the device
    wait for Python.
    """

    loss_value: SupportsFloat
    grad_norm_value: SupportsFloat

    @property
    def loss(self) -> float:
        """Return the mean cross-entropy over the step's tokens, in nats."""
        return float(self.loss_value)

    @property
    def grad_norm(self) -> float:
        """Return the global L2 norm of the gradient before clipping."""
        return float(self.grad_norm_value)


class Cache(Protocol):
    """Keys and values of B streams, one per row.

    Holds the last `block_size` tokens of each. Rows are independent of each other, so streams of
    different lengths can stand side by side.
    """

    lengths: NDArray[np.int64]  # (B,) tokens seen so far

    def reset(self, rows: slice) -> None:
        """Empty these rows."""

    def move(self, source: int, target: int) -> None:
        """Copy row `source` to row `target`."""

    def select(self, rows: Sequence[int]) -> None:
        """Keep these rows, in this order; a row may be repeated (beams) or left out."""


class Scorer(Protocol):
    """The weights of one model on one device, to be scored and to generate from."""

    name: str  # "mlx", "numpy"
    device: str  # for people: "Apple M3 Max (Metal)", "2 threads"

    def loss(self, batch: Batch) -> float:
        """Return the mean cross-entropy in nats over the targets that count, without dropout."""

    def new_cache(self, batch_size: int) -> Any:
        """Return a Cache with `batch_size` empty rows."""

    def logits(
        self, tokens: Array, cache: Any, rows: slice = ALL, lengths: Array | None = None
    ) -> Array:
        """Append tokens (B, T) to these rows; return float32 logits of the last position, (B, V).

        With rotary positions the window slides: each layer attends to the last `block_size` keys.
        With learned positions no length may pass `block_size`. Empty rows can read different
        numbers of tokens: `lengths` (B,), at least 1; the rest of a row of tokens is padding.
        Raises ValueError if T, an id or a position is out of range.
        """

    def warm_up(self) -> None:
        """Load and compile the decoder now, instead of once it pays off."""

    @property
    def decoding(self) -> str:
        """How the next token is computed, for people: "compiled by numba"."""

    def memory_bytes(self) -> int:
        """Return the most held so far: of a device's memory, or of the process's resident memory.

        A GPU reports what it holds at the moment, so call this after every step.
        """


class Backend(Scorer, Protocol):
    """One model in training on one device: owns weights, moments, step count and scratch memory.

    Built as `Class(model, train, state, *, group=SINGLE)`, with one rank of a `ranks.group.Group`.
    Belongs to the thread that built it. If the model has adapters, they alone are trained. With
    several ranks every batch that is passed in is the whole one, and so is every result; all
    methods that train, restore or score are then collectives.
    """

    features: tuple[str, ...]  # of "adapters" and "ranks", those that it can train with
    step: int  # optimizer steps taken

    @property
    def notes(self) -> tuple[str, ...]:
        """Return lines for the user about how it computes here; a backend may leave it out."""

    def train_step(self, batches: Sequence[Batch], lr: float) -> StepResult:
        """Take one optimizer step on the mean loss over all micro-batches (of one shape).

        Dropout is a function of (seed, step, micro-batch). If the gradient is not finite, weights
        and moments stay as they were; the step counts, and the StepResult shows it.
        """

    def loss_and_grads(self, batch: Batch) -> tuple[float, Params]:
        """Return `loss` and its gradient for every trained weight, without dropout or clipping."""

    def state(self) -> TrainState:
        """Return a consistent copy of weights and moments in float32, safe to save."""

    def restore(self, state: TrainState) -> None:
        """Go on from these weights, moments and step."""

    def matmul_flops(self) -> float:
        """Measure this device's float32 matrix-product rate, in FLOP per second."""


def resident_bytes() -> int:
    """Return the peak resident memory of this process."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def check_decoding(config: ModelConfig, tokens: Array, lengths: Array) -> None:
    """Raise ValueError unless tokens (B, T) can be appended to rows of these lengths (B,)."""
    (b, t), size = tokens.shape, config.block_size
    if b != len(lengths):
        raise ValueError(f"{b} streams of tokens for {len(lengths)} rows of the cache")
    if not 1 <= t <= size:
        raise ValueError(f"{t} tokens at once; it must be 1 to block_size={size}")
    if config.position == "learned" and (longest := int(lengths.max())) + t > size:
        raise ValueError(f"{longest} + {t} positions pass block_size={size}, the last learned")
    check_ids(tokens, config.vocab_size)


def check_ids(tokens: Array, vocab_size: int, lowest: int = 0) -> None:
    """Raise ValueError unless every id is in lowest..vocab_size-1: MLX would read past the end."""
    for token in (int(tokens.min()), int(tokens.max())):
        if not lowest <= token < vocab_size:
            raise ValueError(f"token id {token} is outside {lowest}..{vocab_size - 1}")
