"""The MLX backend: owns weights and moments on the device, the compiled step and resident tokens.

Everything is lazy and one step is one `async_eval`; weights stay float32 and are cast inside the
differentiated function. Knows nothing of files, schedules or text. Importing it needs MLX: the
caller catches ImportError.

Legend: B batch, T time, C n_embd, H heads, D = C/H, V vocab.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_unflatten

from mlx_randygpt.backends.base import ALL, StepResult, check_decoding, check_ids, resident_bytes
from mlx_randygpt.backends.mlx.cache import Layer, LayerPass, MLXCache, mask
from mlx_randygpt.backends.mlx.model import FEW_ROWS, GPT, ModelArgs
from mlx_randygpt.backends.mlx.optimizer import Moments, Weights, rates, update, uses_muon
from mlx_randygpt.config import ModelConfig, TrainConfig
from mlx_randygpt.model import parameter_shapes
from mlx_randygpt.state import IGNORED, Array, Batch, Params, TrainState, rng

RESIDENT_SPLITS = 4  # token arrays kept on the device: train, validation and two to spare
RESIDENT_TOKENS = 2**26  # longer ones are gathered on the host while the device is busy


@dataclass(frozen=True)
class Device:
    """Where MLX computes by default."""

    has_gpu: bool
    description: str  # "Apple M3 Max (Metal)", "NVIDIA H200 (CUDA)", "CPU"
    memory: int = 0  # bytes of a GPU; 0 is not known
    recommended: int = 0  # bytes that a program should fill at most, as Metal says


def probe() -> Device:
    """The default device; it starts nothing on it. RuntimeError where MLX is built for a GPU and
    there is none: it then allocates nothing, for its CPU device neither."""
    if mx.default_device().type != mx.DeviceType.gpu:
        return Device(False, "CPU")
    if not mx.is_available(mx.gpu):
        raise RuntimeError("this build of MLX needs a GPU and finds none")
    is_metal = hasattr(mx, "metal") and mx.metal.is_available()
    info = mx.device_info()
    name = f"{info.get('device_name', 'GPU')} ({'Metal' if is_metal else 'CUDA'})"
    memory = info.get("memory_size") or info.get("total_memory") or 0
    return Device(True, name, int(memory), int(info.get("max_recommended_working_set_size") or 0))


class MLXBackend:
    """A base.Backend on MLX's default device."""

    name = "mlx"

    def __init__(self, model: ModelConfig, train: TrainConfig, state: TrainState) -> None:
        device = probe()
        self.device = device.description
        self._on_gpu = device.has_gpu
        self._config, self._train = model, train
        self._model = build(model)
        if train.checkpoint_activations:
            from mlx_randygpt.backends.mlx.recompute import recompute

            self._model.around = recompute
        self.restore(state)
        self._dtype = mx.bfloat16 if train.dtype == "bfloat16" else mx.float32
        self._splits: list[tuple[Array, mx.array]] = []  # the latest last

        # on a CPU: 30 s lost, nothing gained
        compiled = mx.compile if self._on_gpu else (lambda f: f)
        self._value_and_grad = mx.value_and_grad(self._mean_loss)
        self._training_grads = compiled(self._value_and_grad)
        self._evaluated_loss = compiled(self._mean_loss)
        self._update = compiled(partial(update, train))
        self._token = compiled(self._advanced)

    def restore(self, state: TrainState) -> None:
        """Go on from these weights, moments and step."""
        self.step = state.step
        self._weights: Weights = {
            name: mx.array(state.params[name]) for name in parameter_shapes(self._config)
        }
        self._moments = self._loaded_moments(state.moments)

    def train_step(self, batches: Sequence[Batch], lr: float) -> StepResult:
        """One optimizer step on the mean loss over all micro-batches, with dropout; see base."""
        loss, grads = self._accumulated(batches)
        now = rates(self._train, self.step, lr)
        self._weights, self._moments, norm = self._update(self._weights, self._moments, grads, now)
        self._bind(self._whole())  # else the model would keep the old ones alive
        self.step += 1
        mx.async_eval(self._weights, self._moments, loss, norm)
        return StepResult(loss, norm)

    def loss(self, batch: Batch) -> float:
        """Mean cross-entropy in nats over the targets that count, without dropout."""
        return float(self._evaluated_loss(self._weights, *self._windows(batch), None))

    def loss_and_grads(self, batch: Batch) -> tuple[float, Params]:
        """`loss` and its gradient for every weight, float32, without dropout or clipping."""
        loss, grads = self._value_and_grad(self._weights, *self._windows(batch), None)
        return float(loss), _to_numpy(grads)

    def new_cache(self, batch_size: int) -> MLXCache:
        """An empty cache for `batch_size` streams."""
        c = self._config
        return MLXCache(c.n_layer, (batch_size, c.n_head, c.block_size, c.head_size))

    def logits(self, tokens: Array, cache: MLXCache, rows: slice = ALL) -> Array:
        """Append tokens (B, T) to these rows; float32 logits of the last position, (B, V).

        Computed in float32 whatever the training type. Empty rows take up to block_size tokens at
        once, others take them one by one.
        """
        check_decoding(self._config, tokens, cache.lengths[rows])
        empty = not cache.lengths[rows].any()
        for part in [tokens] if empty else np.split(tokens, tokens.shape[1], axis=1):
            now = mx.array(part.astype(np.int32)), mx.array(cache.lengths[rows].astype(np.int32))
            advance = self._token if part.shape[1] == 1 else self._advanced
            logits, layers = advance(self._whole(), *now, cache.read(rows))
            cache.write(rows, layers, part.shape[1])
            del layers  # the cache's now
            mx.eval(logits, cache.layers)
        return np.array(logits)

    def _advanced(
        self, weights: Weights, ids: mx.array, lengths: mx.array, layers: list[Layer]
    ) -> tuple[mx.array, list[Layer]]:
        """Logits (B, V) after ids (B, T) that follow rows of these lengths (B,), T = 1 or the rows
        are empty; and what the rows hold then."""
        self._bind(weights)
        passes = [LayerPass(layer, lengths, ids.shape[1]) for layer in layers]
        x = self._model.features(ids, passes, mask(layers, lengths, ids.shape[1]))  # (B, T, C)
        return self._model.lm_head(x[:, -1]), [each.layer() for each in passes]

    def state(self) -> TrainState:
        """A copy of step, weights and moments in float32; waits for the device."""
        moments = {kind: _to_numpy(arrays) for kind, arrays in self._moments.items()}
        return TrainState(self.step, _to_numpy(self._weights), moments)

    def matmul_flops(self) -> float:

        return matmul_flops(self._on_gpu)

    def memory_bytes(self) -> int:
        """Peak device memory and what MLX keeps for reuse; on a CPU, the process at its peak."""
        if not self._on_gpu:
            return resident_bytes()
        return int(mx.get_peak_memory() + mx.get_cache_memory())

    def _accumulated(self, batches: Sequence[Batch]) -> tuple[mx.array, Weights]:
        """Mean loss and gradients over all targets, `micro_batch` sequences in memory at a time."""
        total = max(1, sum(batch.n_targets() for batch in batches))
        size = self._train.micro_batch or max(1, len(batches[0].starts))
        terms = (
            self._part(replace(b, starts=b.starts[i : i + size], row=b.row + i), index, total)
            for index, b in enumerate(batches)
            for i in range(0, len(b.starts), size)
        )
        loss, grads = next(terms)
        for another, more in terms:
            mx.eval(loss, grads)  # else the passes would stand in memory side by side
            loss = loss + another
            grads = {name: g + more[name] for name, g in grads.items()}
        return loss, grads

    def _part(self, batch: Batch, index: int, total: int) -> tuple[mx.array, Weights]:
        """What these sequences of micro-batch `index` add to the means over `total` targets."""
        keys = None
        if self._config.dropout > 0:  # by place and sequence: the same for any split
            bits = rng(self._train.seed, "dropout", self.step, index).integers(2**32, size=2)
            places = np.indices((2 * self._config.n_layer, len(batch.starts))).transpose(1, 2, 0)
            keys = mx.array((bits + places + (0, batch.row)).astype(np.uint32))  # (2L, B, 2)
        loss, grads = self._training_grads(self._weights, *self._windows(batch), keys)
        part = batch.n_targets() / total
        if part < 1:
            loss, grads = loss * part, {name: g * part for name, g in grads.items()}
        return loss, grads

    def _mean_loss(self, weights: Weights, x: mx.array, y: mx.array, keys: Any) -> mx.array:
        """Mean cross-entropy over the targets that count, added up in float32."""
        self._bind({name: w.astype(self._dtype) for name, w in weights.items()})
        logits = self._model(x, keys=keys)  # (B, T, V)
        if not self._on_gpu:  # a GPU's kernel adds in float32 whatever it reads
            logits = logits.astype(mx.float32)
        counts = y != IGNORED  # (B, T)
        surprise = mx.fast.cross_entropy(logits, mx.where(counts, y, 0))  # (B, T)
        return mx.where(counts, surprise, 0).sum() / mx.maximum(counts.sum(), 1)

    def _whole(self) -> Weights:
        """The weights of the whole model as they are now."""
        return self._weights

    def _bind(self, weights: Weights) -> None:
        """Let the model compute with these; no use of it relies on what was bound before."""
        self._model.update(tree_unflatten(list(weights.items())))

    def _windows(self, batch: Batch) -> tuple[mx.array, mx.array]:
        """Inputs and targets (B, T) int32, equal to batch.x() and batch.y(), gathered there."""
        n = len(batch.tokens)
        if n > RESIDENT_TOKENS:
            x, y = batch.x(), batch.y()
            check_ids(x, self._config.vocab_size)
            check_ids(y, self._config.vocab_size, lowest=IGNORED)
            return mx.array(x), mx.array(y)
        tokens = self._resident(batch.tokens)
        starts = mx.array(batch.starts.astype(np.int32))  # (B,)
        at = starts[:, None] + mx.arange(batch.block_size)  # (B, T)
        x = tokens[mx.minimum(at, n - 1)].astype(mx.int32)
        y = tokens[mx.minimum(at + 1, n - 1)].astype(mx.int32)
        return x, mx.where(at + 1 < n, y, IGNORED)

    def _resident(self, tokens: Array) -> mx.array:
        """The device's copy of `tokens`, checked and made at first sight of this very array."""
        for index, (known, resident) in enumerate(self._splits):
            if known is tokens:
                self._splits.append(self._splits.pop(index))
                return resident
        check_ids(tokens, self._config.vocab_size)
        self._splits = [*self._splits[1 - RESIDENT_SPLITS :], (tokens, mx.array(tokens))]
        return self._splits[-1][1]

    def _loaded_moments(self, moments: dict[str, Params]) -> Moments:
        """Moments on the device; what is missing is zero, and Muon's weights have no second."""
        loaded: Moments = {"m": {}, "v": {}}
        for name, shape in parameter_shapes(self._config).items():
            for kind in ("m",) if uses_muon(name, self._train.optimizer) else ("m", "v"):
                found = moments.get(kind, {}).get(name)
                loaded[kind][name] = mx.zeros(shape) if found is None else mx.array(found)
        return loaded


def build(model: ModelConfig) -> GPT:
    """The modules of this architecture."""
    kind: type[GPT] = GPT
    arguments: type[ModelArgs] = ModelArgs
    if model.is_gpt2:
        from mlx_randygpt.backends.mlx.gpt2 import GPT2, GPT2Args

        kind, arguments = GPT2, GPT2Args
    built = kind(arguments(**{f.name: getattr(model, f.name) for f in fields(arguments)}))
    if model.vocab_size > FEW_ROWS:
        from mlx_randygpt.backends.mlx.embedding import rows

        built.wte.rows = rows
    return built


def _to_numpy(arrays: Weights) -> Params:
    return {name: np.array(array) for name, array in arrays.items()}


N_TRIES = 5


def matmul_flops(on_gpu: bool) -> float:
    """Floating-point operations per second of chains of square products, the best of five; TF32
    counts where MLX uses it."""
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
