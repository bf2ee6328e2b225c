"""The NumPy backend: worker threads over chunks of a batch, and decoding.

NumPy's loops and BLAS release the interpreter lock, so one thread per core with single-threaded
BLAS runs matrix products and element-wise passes in parallel alike. Sequences are dealt out and
gradients summed in a fixed order: the same number of threads gives the same bits.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import numpy as np
from threadpoolctl import threadpool_limits

from mlx_randygpt.backends.base import ALL, StepResult, resident_bytes
from mlx_randygpt.backends.numpy.decode import Decoder, NumpyCache
from mlx_randygpt.backends.numpy.model import Chunk
from mlx_randygpt.backends.numpy.trained import Adapters, AllWeights, Threads, Weights
from mlx_randygpt.backends.ranks.group import SINGLE, Group, resync
from mlx_randygpt.config import ModelConfig, TrainConfig
from mlx_randygpt.model import base_config
from mlx_randygpt.state import Array, Batch, Params, TrainState, rng

CHUNK_TOKENS = 1024  # what a thread works through at a time; docs/benchmarks.md has the trials


class NumpyBackend:
    """A base.Backend on the cores of this machine; `dtype` is float64 in checks."""

    name = "numpy"
    features: tuple[str, ...] = ("adapters", "ranks")
    notes: tuple[str, ...] = ()

    def __init__(
        self,
        model: ModelConfig,
        train: TrainConfig,
        state: TrainState,
        *,
        group: Group = SINGLE,
        dtype: type = np.float32,
    ) -> None:
        self.model = base_config(model)  # the one that computes, adapters merged
        self.train, self.dtype, self._group = train, dtype, group
        n_threads = train.threads or available_cores()
        self.device = f"{n_threads} thread{'s' if n_threads > 1 else ''}"
        self._blas = threadpool_limits(1, user_api="blas")  # our threads take the cores
        pool = ThreadPoolExecutor(
            n_threads,
            thread_name_prefix="numpy-backend",
            initializer=partial(np.seterr, **np.geterr()),  # as in the thread that builds this
        )
        self._threads = Threads(pool, n_threads)
        self._chunks: list[Chunk] = []
        whole = Weights.zeros(self.model, dtype)
        self._grads = Weights.zeros(self.model, dtype)
        self.params = whole.views
        self.trained = (Adapters if model.lora_rank else AllWeights)(
            model, train, whole, self._grads
        )
        self._decoder = Decoder(self.model, self.params, pool, n_threads)
        self.restore(state)

    def restore(self, state: TrainState) -> None:
        """Go on from these weights, moments and step; with several ranks, from rank 0's."""
        state = self._group.same_state(state)
        self.step = state.step
        self.trained.restore(state)
        self._decoder.forget_weights()

    def train_step(self, batches: Sequence[Batch], lr: float) -> StepResult:
        """Take one optimizer step on the mean loss over all micro-batches; see base."""
        if self._group.size > 1:
            resync(self)
        total = sum(batch.n_targets() for batch in batches)
        losses = [
            self._gradients(batch, total, dropout=(micro,), first=micro == 0)
            for micro, batch in enumerate(batches)
        ]
        self._reduce()
        norm = self.trained.update(self.step, lr, self._threads)
        self._decoder.forget_weights()
        self.step += 1
        return StepResult(self._group.total(sum(losses)), norm)

    def loss(self, batch: Batch) -> float:
        """Return the mean cross-entropy in nats over the targets that count, without dropout."""
        return self._group.total(self._run(batch, batch.n_targets(), self._chunk_loss))

    def loss_and_grads(self, batch: Batch) -> tuple[float, Params]:
        """Return `loss` and its gradient for every trained weight, without dropout or clipping."""
        loss = self._gradients(batch, batch.n_targets(), dropout=None, first=True)
        self._reduce()
        return self._group.total(loss), self.trained.gradients()

    def new_cache(self, batch_size: int) -> NumpyCache:
        """Return a cache with `batch_size` empty rows."""
        return NumpyCache(self.model, batch_size, self.dtype)

    def logits(
        self, tokens: Array, cache: Any, rows: slice = ALL, lengths: Array | None = None
    ) -> Array:
        """Append tokens (B, T) to these rows; return the last position's logits, (B, V)."""
        return self._decoder.logits(tokens, cache, rows, lengths)

    def warm_up(self) -> None:
        """Load numba now; the first token that it decodes waits until it has compiled."""
        self._decoder.warm_up()

    @property
    def decoding(self) -> str:
        """How the next token is computed, for people."""
        return "compiled by numba" if self._decoder.compiled else "NumPy without numba"

    def state(self) -> TrainState:
        """Return a copy of step, weights and moments in float32."""
        return self.trained.state(self.step)

    def matmul_flops(self) -> float:
        """Measure the float32 matrix-product rate of all threads, in FLOP per second."""
        return matmul_flops(self._threads, self.dtype)

    def memory_bytes(self) -> int:
        """Return the peak resident memory of the process."""
        return resident_bytes()

    # One pass over a batch: each thread takes its share of the sequences, chunk after chunk.

    def _gradients(
        self, batch: Batch, total: int, dropout: tuple[int, ...] | None, first: bool
    ) -> float:
        if first:
            for chunk in self._chunks:
                chunk.accumulating = False
        return self._run(batch, total, partial(self._chunk_gradients, dropout=dropout))

    def _run(self, batch: Batch, total: int, work: Callable[..., float]) -> float:
        """Run `work` on every chunk of this rank's rows and sum the results in a fixed order.

        `work` is called with a chunk, its inputs and targets, the `total` number of targets of the
        batch, and the index of its first row.
        """
        batch, n_threads = self._group.share(batch), self._threads.n
        x, y = batch.x(), batch.y()
        edges = [-(-len(x) * i // n_threads) for i in range(n_threads + 1)]
        rows = max(1, min(CHUNK_TOKENS // batch.block_size, edges[1]))
        self._fit(rows, batch.block_size)

        def share(worker: int) -> float:
            chunk, loss = self._chunks[worker], 0.0
            for start in range(edges[worker], edges[worker + 1], rows):
                part = slice(start, min(start + rows, edges[worker + 1]))
                loss += work(chunk, x[part], y[part].reshape(-1), total, batch.row + start)
            return loss

        return sum(self._threads.pool.map(share, range(n_threads)))

    def _chunk_loss(self, chunk: Chunk, x: Array, y: Array, total: int, row: int) -> float:
        final = chunk.forward(self.params, x, None, keep=False)
        return chunk.head(self.params, final, y, None) / total

    def _chunk_gradients(
        self,
        chunk: Chunk,
        x: Array,
        y: Array,
        total: int,
        row: int,
        dropout: tuple[int, ...] | None,
    ) -> float:
        random = None
        if dropout is not None and self.model.dropout:  # by sequence: the same for any split
            random = [
                rng(self.train.seed, "dropout", self.step, *dropout, row + i) for i in range(len(x))
            ]
        final = chunk.forward(self.params, x, random)
        loss = chunk.head(self.params, final, y, 1 / total)
        chunk.backward(self.params, x, dropped=random is not None)
        return loss / total

    def _fit(self, rows: int, block_size: int) -> None:
        """Allocate chunks of this size unless the existing ones are large enough."""
        first = self._chunks[0] if self._chunks else None
        if first and first.rows >= rows and first.block_size >= block_size:
            return
        recompute = self.train.checkpoint_activations
        others = [Weights.zeros(self.model, self.dtype) for _ in range(self._threads.n - 1)]
        self._chunks = [
            Chunk(self.model, rows, block_size, grads.flat, grads.views, recompute=recompute)
            for grads in (self._grads, *others)
        ]

    def _reduce(self) -> None:
        """Sum the gradients of all threads, slice by slice, and then of all ranks."""
        total = self._grads.flat
        others = [chunk.flat_grads for chunk in self._chunks[1:] if chunk.accumulating]

        def add(part: slice) -> None:
            for other in others:
                total[part] += other[part]

        list(self._threads.pool.map(add, self._threads.slices(0, len(total))))
        self._group.sum(total)


def available_cores() -> int:
    """Count the cores this process may run on."""
    n_all = os.cpu_count() or 1
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else n_all


MATMUL_SIZE, N_PRODUCTS, N_TRIES = 768, 8, 5


def matmul_flops(threads: Threads, dtype: type) -> float:
    """Measure the floating-point operations per second of matrix products, the best of five tries.

    All threads multiply square matrices at once.
    """
    best = 0.0
    x: Array = np.ones((MATMUL_SIZE, MATMUL_SIZE), dtype)
    out: list[Array] = [np.empty_like(x) for _ in range(threads.n)]

    def multiply(i: int) -> None:
        for _ in range(N_PRODUCTS):
            np.matmul(x, x, out=out[i])

    for _ in range(N_TRIES):
        start = time.perf_counter()
        list(threads.pool.map(multiply, range(threads.n)))
        seconds = time.perf_counter() - start
        best = max(best, 2 * MATMUL_SIZE**3 * N_PRODUCTS * threads.n / seconds)
    return best
