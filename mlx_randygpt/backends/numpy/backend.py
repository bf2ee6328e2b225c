"""The NumPy backend: worker threads over chunks of a batch, the optimizer, decoding.

NumPy's loops and BLAS release the interpreter lock, so one thread per core with single-threaded
BLAS runs matrix products and element-wise passes in parallel alike. Sequences are dealt out and
gradients summed in a fixed order: the same number of threads gives the same bits.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from functools import partial
from itertools import pairwise
from math import prod
from typing import TYPE_CHECKING, Any

import numpy as np
from threadpoolctl import threadpool_limits

from mlx_randygpt.backends.base import ALL, StepResult, resident_bytes
from mlx_randygpt.backends.numpy import optimizer
from mlx_randygpt.backends.numpy.decode import Advance, Decoder, NumpyCache, advance
from mlx_randygpt.backends.numpy.model import Chunk, copied, flat_views
from mlx_randygpt.config import ModelConfig, TrainConfig
from mlx_randygpt.model import muon_parts
from mlx_randygpt.state import Array, Batch, Params, TrainState, rng

if TYPE_CHECKING:
    pass


CHUNK_TOKENS = 1024  # what a thread works through at a time; docs/benchmarks.md has the trials


class NumpyBackend:
    """See `backends.base.Backend`; `dtype` is float64 in checks."""

    name = "numpy"

    def __init__(
        self, model: ModelConfig, train: TrainConfig, state: TrainState, dtype: type = np.float32
    ) -> None:
        self.model, self.train, self.dtype = model, train, dtype
        self.n_threads = train.threads or available_cores()
        self.device = f"{self.n_threads} thread{'s' if self.n_threads > 1 else ''}"
        self._blas = threadpool_limits(1, user_api="blas")  # our threads take the cores
        self._pool = ThreadPoolExecutor(
            self.n_threads,
            thread_name_prefix="numpy-backend",
            initializer=partial(np.seterr, **np.geterr()),  # as in the thread that builds this
        )
        self._chunks: list[Chunk] = []
        self._chunk, advance = architecture(model.arch)
        if train.checkpoint_activations:
            from mlx_randygpt.backends.numpy.model import recomputing

            self._chunk = recomputing(self._chunk)
        self._w, self.params = flat_views(model, dtype)
        self._g, self._grads = flat_views(model, dtype)
        self._decoder = Decoder(model, advance, self._w, self.params, self._pool, self.n_threads)
        self._m, self._m_views = flat_views(model, dtype)
        self._v, self._v_views = flat_views(model, dtype)
        self.restore(state)

    def restore(self, state: TrainState) -> None:
        self.step = state.step
        for views, values in (
            (self.params, state.params),
            (self._m_views, state.moments.get("m", {})),
            (self._v_views, state.moments.get("v", {})),
        ):
            for name, view in views.items():
                view[...] = values.get(name, 0)

    def train_step(self, batches: Sequence[Batch], lr: float) -> StepResult:
        """As promised in base."""
        total = sum(batch.n_targets() for batch in batches)
        losses = [
            self._gradients(batch, total, dropout=(micro,), first=micro == 0)
            for micro, batch in enumerate(batches)
        ]
        self._reduce()
        norm = self._clipped_update(lr)
        self.step += 1
        return StepResult(sum(losses), norm)

    def _clipped_update(self, lr: float) -> float:
        """Move the weights, unless the gradient is not finite; its norm before clipping."""
        norm = float(np.sqrt(np.dot(self._g, self._g)))
        if np.isfinite(norm):
            self._g *= optimizer.clip_scale(norm, self.train.grad_clip)
            self._update(lr)
        return norm

    def loss(self, batch: Batch) -> float:
        return self._run(batch, batch.n_targets(), self._chunk_loss)

    def loss_and_grads(self, batch: Batch) -> tuple[float, Params]:
        loss = self._gradients(batch, batch.n_targets(), dropout=None, first=True)
        self._reduce()
        return loss, {name: g.copy() for name, g in self._grads.items()}

    def new_cache(self, batch_size: int) -> NumpyCache:
        return NumpyCache(self.model, batch_size, self.dtype)

    def logits(self, tokens: Array, cache: Any, rows: slice = ALL) -> Array:
        return self._decoder.logits(tokens, cache, rows)

    def state(self) -> TrainState:
        adamw_only = [
            n for n in self.params if self.train.optimizer == "adamw" or not muon_parts(n)
        ]
        v = {name: self._v_views[name] for name in adamw_only}
        params, m, v = copied([self.params, self._m_views, v])
        return TrainState(self.step, params, {"m": m, "v": v})

    def matmul_flops(self) -> float:

        return matmul_flops(self._pool, self.n_threads, self.dtype)

    def memory_bytes(self) -> int:
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
        """Σ work(chunk, x, y, total, first row) over the batch, in a fixed order."""
        x, y = batch.x(), batch.y()
        edges = [-(-len(x) * i // self.n_threads) for i in range(self.n_threads + 1)]
        rows = max(1, min(CHUNK_TOKENS // batch.block_size, edges[1]))
        self._fit(rows, batch.block_size)

        def share(worker: int) -> float:
            chunk, loss = self._chunks[worker], 0.0
            for start in range(edges[worker], edges[worker + 1], rows):
                part = slice(start, min(start + rows, edges[worker + 1]))
                loss += work(chunk, x[part], y[part].reshape(-1), total, batch.row + start)
            return loss

        return sum(self._pool.map(share, range(self.n_threads)))

    def _chunk_loss(self, chunk: Chunk, x: Array, y: Array, total: int, row: int) -> float:
        return chunk.head(self.params, chunk.forward(self.params, x, None), y, None) / total

    def _chunk_gradients(
        self, chunk: Chunk, x: Array, y: Array, total: int, row: int,
        dropout: tuple[int, ...] | None,
    ) -> float:  # fmt: skip
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
        have = self._chunks[0] if self._chunks else None
        if have is None or have.rows < rows or have.block_size < block_size:
            others = (flat_views(self.model, self.dtype) for _ in range(self.n_threads - 1))
            self._chunks = [
                self._chunk(self.model, rows, block_size, self.dtype, *gradients)
                for gradients in [(self._g, self._grads), *others]
            ]

    def _reduce(self) -> None:
        """Add the other threads' gradients to those of the first, slice by slice."""
        others = [chunk.flat_grads for chunk in self._chunks[1:] if chunk.accumulating]

        def add(part: slice) -> None:
            for other in others:
                self._g[part] += other[part]

        list(self._pool.map(add, self._slices(0, len(self._g))))

    def _update(self, lr: float) -> None:
        """AdamW on ranges of the flat vectors, Muon on stacks of matrices, both on all threads."""
        jobs: list[Callable[[], None]] = []
        for start, stop, rate, decay in self._adamw_ranges(lr):
            jobs += [partial(self._adamw, part, rate, decay) for part in self._slices(start, stop)]
        if self.train.optimizer == "muon":
            jobs += self._muon_jobs(lr)
        list(self._pool.map(lambda job: job(), jobs))

    def _adamw_ranges(self, lr: float) -> list[tuple[int, int, float, float]]:
        """(start, stop, rate, decay) of what AdamW updates: embeddings and head, but under Muon not
        the blocks' matrices, which lie together between them, and last vectors, without decay."""
        weights, train = self.params.items(), self.train
        before = sum(w.size for name, w in weights if name.startswith("w"))
        blocks = before + sum(w.size for name, w in weights if muon_parts(name))
        vectors = sum(w.size for _, w in weights if w.ndim > 1)
        if train.optimizer == "adamw":
            blocks = before
        else:
            lr *= train.adamw_lr_ratio
        ranges = [(0, before), (blocks, vectors)]
        decayed = [(*part, lr, train.weight_decay) for part in ranges]
        return [*decayed, (vectors, len(self._w), lr, 0.0)]

    def _adamw(self, part: slice, lr: float, decay: float) -> None:
        optimizer.adamw(
            self._w[part], self._g[part], self._m[part], self._v[part],
            t=self.step + 1, lr=lr, decay=decay, config=self.train,
        )  # fmt: skip

    def _muon_jobs(self, lr: float) -> Iterator[Callable[[], None]]:
        """Matrices of one shape are stacked, a few to a job and at least one job for a thread."""
        by_shape: dict[tuple[int, ...], list[tuple[Array, Array, Array]]] = {}
        for name, w in self.params.items():
            if parts := muon_parts(name):
                thirds = (
                    view[name].reshape(parts, -1, w.shape[1])
                    for view in (self.params, self._grads, self._m_views)
                )
                for matrices in zip(*thirds, strict=True):
                    by_shape.setdefault(matrices[0].shape, []).append(matrices)
        train = self.train
        for shape, found in by_shape.items():
            most = -(-len(found) // self.n_threads)
            size = max(1, min(most, optimizer.STACK // prod(shape)))
            for start in range(0, len(found), size):
                yield partial(
                    optimizer.muon, *zip(*found[start : start + size], strict=True),
                    lr=lr, decay=train.weight_decay, momentum=train.momentum,
                )  # fmt: skip

    def _slices(self, start: int, stop: int) -> list[slice]:
        edges = np.linspace(start, stop, self.n_threads + 1).astype(int)
        return [slice(a, b) for a, b in pairwise(edges)]


def architecture(arch: str) -> tuple[type[Chunk], Advance]:
    """What trains and what decodes this architecture."""
    if arch == "gpt":
        return Chunk, advance
    from mlx_randygpt.backends.numpy import gpt2

    return gpt2.GPT2Chunk, gpt2.advance


def available_cores() -> int:
    """Cores this process may run on."""
    n_all = os.cpu_count() or 1
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else n_all


SIZE, N_PRODUCTS, N_TRIES = 768, 8, 5


def matmul_flops(pool: Executor, n_threads: int, dtype: type) -> float:
    """Floating-point operations per second: all threads multiply square matrices at once, the best
    of five tries."""
    best = 0.0
    x: Array = np.ones((SIZE, SIZE), dtype)
    out: list[Array] = [np.empty_like(x) for _ in range(n_threads)]

    def work(i: int) -> None:
        for _ in range(N_PRODUCTS):
            np.matmul(x, x, out=out[i])

    for _ in range(N_TRIES):
        start = time.perf_counter()
        list(pool.map(work, range(n_threads)))
        seconds = time.perf_counter() - start
        best = max(best, 2 * SIZE**3 * N_PRODUCTS * n_threads / seconds)
    return best
