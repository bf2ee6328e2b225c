"""Measure how fast a backend trains and samples: medians over steps, each awaited."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from mlx_randygpt.backends.base import Backend
from mlx_randygpt.config import ModelConfig, TrainConfig
from mlx_randygpt.data.windows import sample_batch
from mlx_randygpt.model import flops_per_token, parameter_count, parameters
from mlx_randygpt.sampling.filters import SampleConfig, pick, probabilities
from mlx_randygpt.sampling.generate import Streams
from mlx_randygpt.state import rng

N_WARMUP = 3  # steps that are not timed: scratch memory, compilation, caches
MIN_TOKENS = 2**18  # of the random text


@dataclass(frozen=True)
class Bench:
    """One measurement; its fields are the keys of `mlxgpt bench --json`."""

    tokens_per_second: float  # over all sequences or streams
    step_ms: float  # the median
    peak_memory_mb: float
    parameters: int
    flops_fraction: float  # model FLOP/s over the device's float32 matrix-product rate
    backend: str
    device: str
    mode: str  # "train" | "sample"
    recipe: str
    preset: str
    batch_size: int
    block_size: int
    decoding: str | None = None  # of sampling: how a token was computed


def measure_training(
    backend: Backend,
    model: ModelConfig,
    train: TrainConfig,
    n_steps: int,
    clock: Callable[[], float] = time.perf_counter,
) -> Bench:
    """Measure optimizer steps on random tokens; the loss is read after each."""
    size = max(MIN_TOKENS, 2 * model.block_size)
    tokens = rng(train.seed, "check").integers(model.vocab_size, size=size, dtype=np.int32)  # (n,)

    def step(index: int) -> None:
        batch = sample_batch(tokens, train.batch_size, model.block_size, train.seed, index)
        _ = backend.train_step([batch], train.lr).loss

    n_tokens = train.batch_size * model.block_size
    seconds = _median_seconds(step, n_steps, clock)
    return _result(
        "train",
        backend,
        model,
        train,
        seconds=seconds,
        tokens_per_step=n_tokens,
        flops=flops_per_token(model),
    )


def measure_sampling(
    backend: Backend,
    model: ModelConfig,
    train: TrainConfig,
    n_tokens: int,
    clock: Callable[[], float] = time.perf_counter,
) -> Bench:
    """Measure the decoding of `batch_size` streams, sampled as by `mlxgpt sample`, once warm."""
    backend.warm_up()
    configs = [SampleConfig(seed=train.seed)] * train.batch_size
    random = rng(train.seed, "sample")
    streams = Streams(backend, model, train.batch_size)
    logits = streams.join([[0]] * train.batch_size)

    def step(_: int) -> None:
        nonlocal logits
        tokens = pick(probabilities(logits, configs), random.random(train.batch_size))
        logits = streams.append(tokens.tolist())

    seconds = _median_seconds(step, n_tokens, clock)
    in_blocks = sum(weight.size for weight in parameters(model) if weight.is_block_matrix)
    in_products = in_blocks + model.vocab_size * model.n_embd
    return _result(
        "sample",
        backend,
        model,
        train,
        seconds=seconds,
        tokens_per_step=train.batch_size,
        flops=2 * in_products,
    )


def sweep(largest: int) -> list[int]:
    """Return the numbers of streams up to the largest that show how speed grows: 1, 2, 4, …."""
    return [*(1 << i for i in range(largest.bit_length()) if 1 << i < largest), largest]


def _median_seconds(step: Callable[[int], None], n_steps: int, clock: Callable[[], float]) -> float:
    times = []
    for index in range(N_WARMUP + n_steps):
        start = clock()
        step(index)
        times.append(clock() - start)
    return max(statistics.median(times[N_WARMUP:]), 1e-9)


def _result(
    mode: str,
    backend: Backend,
    model: ModelConfig,
    train: TrainConfig,
    *,
    seconds: float,
    tokens_per_step: int,
    flops: int,
) -> Bench:
    rate = tokens_per_step / seconds
    peak = backend.memory_bytes()  # before matmul_flops allocates its own
    return Bench(
        tokens_per_second=rate,
        step_ms=1e3 * seconds,
        peak_memory_mb=peak / 1e6,
        parameters=parameter_count(model),
        flops_fraction=flops * rate / backend.matmul_flops(),
        backend=backend.name,
        device=backend.device,
        mode=mode,
        recipe=train.recipe,
        preset=train.preset,
        batch_size=train.batch_size,
        block_size=model.block_size,
        decoding=backend.decoding if mode == "sample" else None,
    )
