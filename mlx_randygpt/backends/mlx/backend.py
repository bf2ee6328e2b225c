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
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_randygpt.backends.base import ALL, StepResult
from mlx_randygpt.backends.mlx import selftest
from mlx_randygpt.backends.mlx.cache import MLXCache
from mlx_randygpt.backends.mlx.forward import Forward, Windows
from mlx_randygpt.backends.mlx.memory import HeldMemory
from mlx_randygpt.backends.mlx.optimizer import Moments, Rates, rates, update
from mlx_randygpt.backends.mlx.stacks import Stacks, Weights
from mlx_randygpt.backends.mlx.trained import Adapters, AllWeights, Trained
from mlx_randygpt.backends.ranks.group import SINGLE, Group, resync
from mlx_randygpt.config import ModelConfig, TrainConfig
from mlx_randygpt.model import muon_matrices, second_moment_shapes
from mlx_randygpt.state import Array, Batch, Params, TrainState, rng

N_TRIES = 5  # of the speed measurement
LOSS_SCALE = 1024  # in float16 most gradients would be too small for the type without it


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


@dataclass(frozen=True)
class Pass:
    """A part of a step's sequences that is computed at once."""

    batch: Batch
    index: int  # of the micro-batch
    total: int  # targets of the step on this rank


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
        muon = muon_matrices(model) if train.optimizer == "muon" else {}
        self._stacks = Stacks(self._trained.shapes, muon)
        self._moment_shapes = {"m": self._trained.shapes, "v": second_moment_shapes(model, train)}
        self._forward = Forward(
            self._trained.model,
            on_gpu=device.has_gpu,
            dtype=getattr(mx, train.dtype),
            recomputes=train.checkpoint_activations,
        )
        # adapters are merged in float32, and only then cast
        self._weight_dtype = mx.float32 if model.lora_rank else self._forward.dtype
        self._is_scaled = train.dtype == "float16"
        self._most_rows = 0  # of an evaluated batch
        self.restore(state)
        compiled = self._forward.compile
        self._value_and_grad = mx.value_and_grad(self._loss)
        self._compiled_step = compiled(self._whole_step)
        self._compiled_grads = compiled(self._float32_grads)
        self._compiled_update = compiled(self._update)
        self._compiled_loss = compiled(self._loss)

    @property
    def notes(self) -> tuple[str, ...]:
        """Return a line for each Metal kernel that failed its test and is off; test them first."""
        in_float32 = self._forward.dtype == mx.float32
        return selftest.notes(self._forward.config) if in_float32 else ()

    def restore(self, state: TrainState) -> None:
        """Go on from these weights, moments and step; with several ranks, from rank 0's."""
        state = self._group.same_state(state)
        self.step = state.step
        self._trained.freeze(state.params)
        self._weights = self._stacks.load({n: state.params[n] for n in self._trained.shapes})
        self._moments = {
            kind: self._stacks.load(
                {n: named.get(n, np.zeros(shape, np.float32)) for n, shape in shapes.items()}
            )
            for kind, shapes in self._moment_shapes.items()
            for named in [state.moments.get(kind, {})]
        }
        self._named = self._stacks.unpack(self._weights)

    def train_step(self, batches: Sequence[Batch], lr: float) -> StepResult:
        """Take one optimizer step on the mean loss over all micro-batches, with dropout."""
        if self._group.size > 1:
            resync(self)
        shares = [self._group.share(batch) for batch in batches]
        state = self._weights, self._moments, rates(self._train, self.step, lr)
        passes = self._passes(shares)
        if len(passes) == 1 and self._group.size == 1:
            loss, *new = self._compiled_step(*state, *self._inputs(passes[0]))
        else:
            loss, grads = self._accumulate(passes)
            loss, grads = self._group.mean(loss, grads, _fraction_of_targets(shares, batches))
            new = self._compiled_update(*state, grads)
        self._weights, self._moments, norm = new
        self._named = self._stacks.unpack(self._weights)
        # else the model would keep the old weights alive
        self._forward.bind(self._trained.merged(self._named))
        self.step += 1
        mx.async_eval(self._weights, self._moments, loss, norm)
        return StepResult(loss, norm)

    def loss(self, batch: Batch) -> float:
        """Return the mean cross-entropy in nats over the targets that count, without dropout."""
        share = self._group.share(batch)
        if self._forward.on_gpu:  # a last, smaller batch is no new trace
            self._most_rows = max(self._most_rows, len(share.starts))
        windows = self._forward.windows(share, n_rows=self._most_rows)
        loss = float(self._compiled_loss(self._named, *windows, None))
        return self._group.total(loss * _fraction_of_targets([share], [batch]))

    def loss_and_grads(self, batch: Batch) -> tuple[float, Params]:
        """Return `loss` and its gradient for every trained weight, float32 and not clipped."""
        share = self._group.share(batch)
        windows = self._windows(share)
        loss, grads = self._float32_grads(self._weights, *windows, None)
        loss, grads = self._group.mean(loss, grads, _fraction_of_targets([share], [batch]))
        return float(loss), _to_numpy(grads)

    def new_cache(self, batch_size: int) -> MLXCache:
        """Return a cache with `batch_size` empty rows."""
        return self._forward.new_cache(batch_size)

    def logits(
        self, tokens: Array, cache: MLXCache, rows: slice = ALL, lengths: Array | None = None
    ) -> Array:
        """Append tokens (B, T) to these rows; return the last position's logits, (B, V) float32.

        They are computed in float32 whatever the training type.
        """
        weights = self._trained.merged(self._named)
        return self._forward.logits(weights, tokens, cache, rows, lengths)

    def warm_up(self) -> None:
        """Do nothing: the first token is compiled."""

    @property
    def decoding(self) -> str:
        """How the next token is computed, for people."""
        return "compiled by MLX" if self._forward.on_gpu else "MLX"

    def state(self) -> TrainState:
        """Return a copy of step, weights and moments in float32; waits for the device."""
        moments = {
            kind: _to_numpy(self._stacks.unpack(self._moments[kind], shapes))
            for kind, shapes in self._moment_shapes.items()
        }
        return TrainState(self.step, _to_numpy(self._trained.frozen | self._named), moments)

    def matmul_flops(self) -> float:
        """Measure this device's float32 matrix-product rate, in FLOP per second."""
        return matmul_flops(on_gpu=self._forward.on_gpu)

    def memory_bytes(self) -> int:
        """Return the most memory held so far, as seen at each call; on a CPU, of the process."""
        return self._memory.read()

    def _passes(self, batches: Sequence[Batch]) -> list[Pass]:
        """Cut a step's batches into passes of `micro_batch` sequences."""
        total = max(1, sum(batch.n_targets() for batch in batches))
        size = self._train.micro_batch or max(1, len(batches[0].starts))
        return [
            Pass(b.part(i, i + size), index, total)
            for index, b in enumerate(batches)
            for i in range(0, len(b.starts), size)
        ]

    def _accumulate(self, passes: Sequence[Pass]) -> tuple[mx.array, Weights]:
        """Return mean loss and gradients over the targets of all passes."""
        loss, grads = self._compiled_grads(self._weights, *self._inputs(passes[0]))
        for each in passes[1:]:
            mx.eval(loss, grads)  # else the passes would be in memory side by side
            next_loss, next_grads = self._compiled_grads(self._weights, *self._inputs(each))
            loss = loss + next_loss
            grads = {name: g + next_grads[name] for name, g in grads.items()}
        return loss, grads

    def _inputs(self, each: Pass) -> tuple[Any, ...]:
        """Return the windows of a pass and its dropout keys."""
        batch, keys = each.batch, None
        if self._forward.config.dropout > 0:  # by place and sequence: the same for any split
            bits = rng(self._train.seed, "dropout", self.step, each.index).integers(2**32, size=2)
            n_places = 2 * self._forward.config.n_layer
            places = np.indices((n_places, len(batch.starts))).transpose(1, 2, 0)
            keys = mx.array((bits + places + (0, batch.row)).astype(np.uint32))  # (2L, B, 2)
        return *self._windows(batch, each.total), keys

    def _windows(self, batch: Batch, total: int = 0) -> Windows:
        """Return the windows of a loss that is to be differentiated."""
        return self._forward.windows(batch, total, scale=LOSS_SCALE if self._is_scaled else 1)

    def _loss(self, named: Weights, *inputs: Any) -> mx.array:
        """Return the loss as a function of the trained weights."""
        return self._forward.loss(self._trained.merge(named), *inputs)

    def _grads(self, weights: Weights, *inputs: Any) -> tuple[mx.array, Weights]:
        """Return loss and named gradients, these scaled and in the type of the products."""
        cast = {stack: w.astype(self._weight_dtype) for stack, w in weights.items()}
        loss, grads = self._value_and_grad(self._stacks.unpack(cast), *inputs)
        return loss, grads

    def _unscaled(self, loss: mx.array, grads: Weights) -> tuple[mx.array, Weights]:
        """Return the loss and its gradients in float32, without the factor LOSS_SCALE."""
        grads = {name: g.astype(mx.float32) for name, g in grads.items()}
        if not self._is_scaled:
            return loss, grads
        return loss / LOSS_SCALE, {name: g / LOSS_SCALE for name, g in grads.items()}

    def _float32_grads(self, weights: Weights, *inputs: Any) -> tuple[mx.array, Weights]:
        """Return loss and named gradients that can be added up."""
        return self._unscaled(*self._grads(weights, *inputs))

    def _update(
        self, weights: Weights, moments: Moments, now: Rates, grads: Weights
    ) -> tuple[Weights, Moments, mx.array]:
        """Return weights and moments after a step along these named gradients, and their norm."""
        return update(self._train, self._stacks, weights, moments, self._stacks.pack(grads), now)

    def _whole_step(
        self, weights: Weights, moments: Moments, now: Rates, *inputs: Any
    ) -> tuple[Any, ...]:
        """Return the loss, and weights, moments and norm after a step of one pass."""
        loss, grads = self._grads(weights, *inputs)
        loss, packed = self._unscaled(loss, self._stacks.pack(grads))
        return loss, *update(self._train, self._stacks, weights, moments, packed, now)


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
    """Copy arrays to the host in row-major order; a view of a stack can be column-major."""
    return {name: np.ascontiguousarray(np.array(array)) for name, array in arrays.items()}
