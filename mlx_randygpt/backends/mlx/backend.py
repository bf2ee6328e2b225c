"""The MLX backend: weights and moments on the device, and the compiled training step.

Everything is lazy and one step is one `async_eval`; weights stay float32 and are cast inside the
differentiated function. With several ranks each computes its own rows of every batch; dropout is
drawn per sequence of the whole batch, so the number of ranks changes nothing. Importing this module
needs MLX: the caller catches ImportError.

Legend: B batch, T time, L layers.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_randygpt.backends.base import ALL, StepResult
from mlx_randygpt.backends.mlx.cache import MLXCache
from mlx_randygpt.backends.mlx.forward import Forward
from mlx_randygpt.backends.mlx.memory import HeldMemory
from mlx_randygpt.backends.mlx.optimizer import Moments, Weights, rates, update
from mlx_randygpt.backends.mlx.trained import Adapters, AllWeights, Trained
from mlx_randygpt.backends.ranks.group import SINGLE, Group, resync
from mlx_randygpt.config import ModelConfig, TrainConfig
from mlx_randygpt.model import muon_matrices, second_moment_shapes
from mlx_randygpt.state import Array, Batch, Params, TrainState, rng

N_TRIES = 5  # of the speed measurement


@dataclass(frozen=True)
class Device:
    """Where MLX computes by default."""

    has_gpu: bool
    description: str  # "Apple M3 Max (Metal)", "NVIDIA H200 (CUDA)", "CPU"
    memory: int = 0  # bytes of a GPU; 0 if unknown
    recommended: int = 0  # bytes that a program should use at most, as Metal reports
    architecture: str = ""  # "applegpu_g16s"


def probe() -> Device:
    """Return the default device, without starting anything on it.

    Raises RuntimeError if MLX is built for a GPU and finds none: then it cannot allocate memory,
    not even on its CPU device.
    """
    if mx.default_device().type != mx.DeviceType.gpu:
        return Device(False, "CPU")
    if not mx.is_available(mx.gpu):
        raise RuntimeError("this build of MLX needs a GPU and finds none")
    is_metal = hasattr(mx, "metal") and mx.metal.is_available()
    info = mx.device_info()
    name = f"{info.get('device_name', 'GPU')} ({'Metal' if is_metal else 'CUDA'})"
    memory = info.get("memory_size") or info.get("total_memory") or 0
    return Device(
        True,
        name,
        int(memory),
        int(info.get("max_recommended_working_set_size") or 0),
        str(info.get("architecture", "")),
    )


class MLXBackend:
    """A base.Backend on MLX's default device."""

    name = "mlx"
    features: tuple[str, ...] = ("adapters", "ranks")

    def __init__(
        self, model: ModelConfig, train: TrainConfig, state: TrainState, *, group: Group = SINGLE
    ) -> None:
        assert train.optimizer == "adamw" or not model.lora_rank, "Muon does not train adapters"
        device = probe()
        self.device = device.description
        self._memory = HeldMemory(on_gpu=device.has_gpu)
        self._train, self._group = train, group
        self._trained: Trained = Adapters(model) if model.lora_rank else AllWeights(model)
        self._muon = muon_matrices(model) if train.optimizer == "muon" else {}
        self._second_moment_shapes = second_moment_shapes(model, train)
        self._forward = Forward(
            self._trained.model,
            on_gpu=device.has_gpu,
            dtype=mx.bfloat16 if train.dtype == "bfloat16" else mx.float32,
            recomputes=train.checkpoint_activations,
        )
        self.restore(state)
        compiled = self._forward.compile
        self._value_and_grad = mx.value_and_grad(self._mean_loss)
        self._training_grads = compiled(self._value_and_grad)
        self._evaluated_loss = compiled(self._mean_loss)
        self._update = compiled(partial(update, train, self._muon))

    def restore(self, state: TrainState) -> None:
        """Go on from these weights, moments and step; with several ranks, from rank 0's."""
        state = self._group.same_state(state)
        self.step = state.step
        self._trained.freeze(state.params)
        self._weights: Weights = {
            name: mx.array(state.params[name]) for name in self._trained.shapes
        }
        self._moments = self._load_moments(state.moments)

    def train_step(self, batches: Sequence[Batch], lr: float) -> StepResult:
        """Take one optimizer step on the mean loss over all micro-batches, with dropout."""
        if self._group.size > 1:
            resync(self)
        shares = [self._group.share(batch) for batch in batches]
        loss, grads = self._accumulate(shares)
        loss, grads = self._group.mean(loss, grads, _fraction_of_targets(shares, batches))
        step_rates = rates(self._train, self.step, lr)
        self._weights, self._moments, norm = self._update(
            self._weights, self._moments, grads, step_rates
        )
        # else the model would keep the old weights alive
        self._forward.bind(self._trained.merged(self._weights))
        self.step += 1
        mx.async_eval(self._weights, self._moments, loss, norm)
        return StepResult(loss, norm)

    def loss(self, batch: Batch) -> float:
        """Return the mean cross-entropy in nats over the targets that count, without dropout."""
        share = self._group.share(batch)
        loss = float(self._evaluated_loss(self._weights, *self._forward.windows(share), None))
        return self._group.total(loss * _fraction_of_targets([share], [batch]))

    def loss_and_grads(self, batch: Batch) -> tuple[float, Params]:
        """Return `loss` and its gradient for every trained weight, float32 and not clipped."""
        share = self._group.share(batch)
        loss, grads = self._value_and_grad(self._weights, *self._forward.windows(share), None)
        loss, grads = self._group.mean(loss, grads, _fraction_of_targets([share], [batch]))
        return float(loss), _to_numpy(grads)

    def new_cache(self, batch_size: int) -> MLXCache:
        """Return a cache with `batch_size` empty rows."""
        return self._forward.new_cache(batch_size)

    def logits(self, tokens: Array, cache: MLXCache, rows: slice = ALL) -> Array:
        """Append tokens (B, T) to these rows; return the last position's logits, (B, V) float32.

        They are computed in float32 whatever the training type.
        """
        return self._forward.logits(self._trained.merged(self._weights), tokens, cache, rows)

    def state(self) -> TrainState:
        """Return a copy of step, weights and moments in float32; waits for the device."""
        moments = {kind: _to_numpy(arrays) for kind, arrays in self._moments.items()}
        return TrainState(self.step, _to_numpy(self._trained.frozen | self._weights), moments)

    def matmul_flops(self) -> float:
        """Measure this device's float32 matrix-product rate, in FLOP per second."""
        return matmul_flops(on_gpu=self._forward.on_gpu)

    def memory_bytes(self) -> int:
        """Return the most memory held so far, as seen at each call; on a CPU, of the process."""
        return self._memory.read()

    def _accumulate(self, batches: Sequence[Batch]) -> tuple[mx.array, Weights]:
        """Return mean loss and gradients over all targets, `micro_batch` sequences at a time."""
        total = max(1, sum(batch.n_targets() for batch in batches))
        size = self._train.micro_batch or max(1, len(batches[0].starts))
        terms = (
            self._weighted_grads(
                replace(b, starts=b.starts[i : i + size], row=b.row + i), index, total
            )
            for index, b in enumerate(batches)
            for i in range(0, len(b.starts), size)
        )
        loss, grads = next(terms)
        for next_loss, next_grads in terms:
            mx.eval(loss, grads)  # else the passes would be in memory side by side
            loss = loss + next_loss
            grads = {name: g + next_grads[name] for name, g in grads.items()}
        return loss, grads

    def _weighted_grads(self, batch: Batch, index: int, total: int) -> tuple[mx.array, Weights]:
        """Return loss and gradients of these sequences, times their share of `total` targets.

        `index` is the number of the micro-batch.
        """
        keys = None
        if self._forward.config.dropout > 0:  # by place and sequence: the same for any split
            bits = rng(self._train.seed, "dropout", self.step, index).integers(2**32, size=2)
            n_places = 2 * self._forward.config.n_layer
            places = np.indices((n_places, len(batch.starts))).transpose(1, 2, 0)
            keys = mx.array((bits + places + (0, batch.row)).astype(np.uint32))  # (2L, B, 2)
        windows = self._forward.windows(batch)
        loss, grads = self._training_grads(self._weights, *windows, keys)
        fraction = batch.n_targets() / total
        if fraction < 1:
            loss, grads = loss * fraction, {name: g * fraction for name, g in grads.items()}
        return loss, grads

    def _mean_loss(self, weights: Weights, x: mx.array, y: mx.array, keys: Any) -> mx.array:
        """Return the mean loss as a function of the trained weights."""
        return self._forward.mean_loss(self._trained.merge(weights), x, y, keys)

    def _load_moments(self, moments: dict[str, Params]) -> Moments:
        """Copy moments to the device; missing ones are zero."""
        loaded: Moments = {"m": {}, "v": {}}
        for kind, shapes in (("m", self._trained.shapes), ("v", self._second_moment_shapes)):
            for name, shape in shapes.items():
                moment = moments.get(kind, {}).get(name)
                loaded[kind][name] = mx.zeros(shape) if moment is None else mx.array(moment)
        return loaded


def matmul_flops(*, on_gpu: bool) -> float:
    """Measure the best rate of chains of square products, in FLOP per second.

    TF32 counts if MLX uses it.
    """
    size, n = (4096, 8) if on_gpu else (512, 1)
    x, best = mx.ones((size, size)) / size, 0.0
    mx.eval(x)
    for _ in range(N_TRIES):
        start, y = time.perf_counter(), x
        for _ in range(n):
            y = y @ x
        mx.eval(y)
        best = max(best, 2 * size**3 * n / (time.perf_counter() - start))
    return best


def _fraction_of_targets(shares: Sequence[Batch], batches: Sequence[Batch]) -> float:
    """Return the fraction of the batches' targets that is in these shares of them."""
    return sum(b.n_targets() for b in shares) / max(1, sum(b.n_targets() for b in batches))


def _to_numpy(arrays: Weights) -> Params:
    return {name: np.array(array) for name, array in arrays.items()}
