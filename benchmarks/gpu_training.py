"""Speed on the device MLX finds: its matrix rate, training steps and their pieces, decoding.

Legend: B batch, T time, C n_embd, H heads, D = C/H, V vocab.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from typing import Any

import mlx.core as mx
import numpy as np
from turns import timed

from mlx_randygpt import settings
from mlx_randygpt.backends.mlx.backend import MLXBackend, probe
from mlx_randygpt.backends.mlx.optimizer import rates
from mlx_randygpt.config import ModelConfig, TrainConfig
from mlx_randygpt.data.windows import sample_batch
from mlx_randygpt.model import flops_per_token, initial_state, parameter_count
from mlx_randygpt.planning.bench import measure_sampling
from mlx_randygpt.planning.devices import here
from mlx_randygpt.planning.footprint import device_bytes
from mlx_randygpt.state import Array
from mlx_randygpt.training.loop import step_batches, step_rate
from mlx_randygpt.words import format_bytes

Found = Iterator[tuple[str, dict[str, Any]]]
Measure = Callable[[], Found]
TYPES = {"float32": mx.float32, "bfloat16": mx.bfloat16}
LEAST_FRACTION = 0.4  # of the matrix rate, GPT-2 in bfloat16
PROFILE_RUNS = 5
FAST = 5e13  # FLOP per second


@dataclass(frozen=True)
class Case:
    """One model and batch: options of `mlxgpt train` and a vocabulary."""

    name: str
    given: dict[str, Any] = field(default_factory=dict)
    vocab_size: int = 67

    def settings(self, **more: Any) -> tuple[ModelConfig, TrainConfig]:
        return settings.resolve_new({**self.given, **more}, self.vocab_size)


DEFAULT = Case("small")
LARGE = Case("6/6/384 × 256", {"preset": "xl", "n_layer": 6, "n_head": 6})
GPT2 = Case("gpt2", {"preset": "gpt2", "arch": "gpt2", "recipe": "classic"}, 50304)  # AdamW
TINY = Case("tiny", {"preset": "mini", "batch_size": 4})


def cases(small: bool) -> tuple[Case, ...]:
    return (TINY,) if small else (DEFAULT, LARGE, GPT2)


def attempt(table: str, about: dict[str, Any], measure: Measure) -> Found:
    """The rows of one case; a failure becomes a row, and the next case goes on."""
    try:
        yield from measure()
    except Exception as error:
        line = (str(error).splitlines() or [""])[0]
        yield table, {**about, "failed": f"{type(error).__name__}: {line}"[:200]}


def built(model: ModelConfig, train: TrainConfig) -> MLXBackend:
    mx.clear_cache()
    mx.reset_peak_memory()
    return MLXBackend(model, train, initial_state(model, 1))


def device(options: argparse.Namespace) -> Found:
    """What it is, and what it multiplies in each type; float32 with TF32 where MLX uses it."""
    facts = {
        "device": probe().description, "system": platform.platform(terse=True),
        "python": platform.python_version(), "mlx": version("mlx"), "numpy": np.__version__,
    }  # fmt: skip
    yield (
        "device",
        facts | {f"{name}_tflops": matrix_rate(name, options.small) / 1e12 for name in TYPES},
    )


def matrix_rate(dtype: str, small: bool) -> float:
    """FLOP per second in chains of square products of this type, the best of five; larger squares
    where the device is so fast that it would wait for Python."""

    def rate(size: int, n_chains: int) -> float:
        x = (mx.ones((size, size)) / size).astype(TYPES[dtype])

        def chain() -> None:
            y = x
            for _ in range(8):
                y = y @ x
            mx.eval(y)

        chain()
        return 16 * size**3 / min(timed(chain) for _ in range(n_chains))

    found = rate(128 if small else 4096, 5)
    return max(found, rate(8192, 5)) if found > FAST else found


def training(options: argparse.Namespace) -> Found:
    """Every case in both types: speed, fraction of the matrix rate, memory, profile."""
    peaks = {dtype: matrix_rate(dtype, options.small) for dtype in TYPES}
    for case in cases(options.small):
        for dtype in reversed(TYPES):
            about = {"model": case.name, "dtype": dtype}

            def measure(case: Case = case, dtype: str = dtype, about: Any = about) -> Found:
                yield from trained(case, dtype, peaks[dtype], about, options.small)

            yield from attempt("training", about, measure)


def lacking(model: ModelConfig, train: TrainConfig) -> str:
    """Why a training step does not fit into this device's memory by `mlxgpt plan`, or ""."""
    needed, room = device_bytes(model, train, 1, 0), here("mlx").memory
    if needed <= room:
        return ""
    return f"needs {format_bytes(needed)} by plan, the device has {format_bytes(room)}"


def trained(case: Case, dtype: str, peak: float, about: dict[str, Any], small: bool) -> Found:
    model, train = case.settings(dtype=dtype)
    if why := lacking(model, train):
        yield "training", about | {"left_out": why}
        return
    backend, tokens = built(model, train), random_tokens(model)
    steps(backend, train, tokens, 3)
    pace = timed(lambda: steps(backend, train, tokens, 2)) / 2
    n = 2 if small else int(min(max(3.0 / pace, 4), 200))  # about three seconds
    seconds = timed(lambda: steps(backend, train, tokens, n)) / n
    per_step = train.batch_size * model.block_size
    fraction = flops_per_token(model) * per_step / seconds / peak
    yield "training", {
        **about, "parameters": parameter_count(model), "batch": train.batch_size,
        "tokens_per_second": round(per_step / seconds), "step_ms": 1e3 * seconds,
        "fraction_of_peak": fraction, "memory_mb": backend.memory_bytes() / 1e6,
    }  # fmt: skip
    if case == GPT2 and dtype == "bfloat16":
        yield "goals", goal("gpt2, bfloat16: fraction of the matrix rate", fraction, LEAST_FRACTION)
    yield "profile", about | {"step": 1e3 * seconds} | profile(backend, train, tokens)


def goal(name: str, value: float | None, least: float = 0.0, most: float = 0.0) -> dict[str, Any]:
    """A line of the goals, at `least` or at `most`; None was never reached. Not a proof, so that
    a slower machine does not fail."""
    wanted = f"≤ {most:g}" if most else f"≥ {least:g}"
    met = value is not None and (value <= most if most else value >= least)
    return {"goal": name, "measured": value, "wanted": wanted, "met": bool(met)}


def random_tokens(model: ModelConfig) -> Array:
    size = max(2**18, 2 * model.block_size)
    return np.random.default_rng(0).integers(model.vocab_size, size=size, dtype=np.int32)  # (n,)


def steps(backend: Any, train: TrainConfig, tokens: Array, n: int) -> None:
    """Optimizer steps as the loop takes them: a loss is read when the next step is under way."""
    block_size, pending = backend._forward.config.block_size, None
    for _ in range(n):
        batches = step_batches(train, tokens, block_size, backend.step)
        lr = step_rate(train, backend.step)
        previous, pending = pending, backend.train_step(batches, lr)
        if previous:
            _ = previous.loss
    _ = pending and pending.loss


def profile(backend: MLXBackend, train: TrainConfig, tokens: Array) -> dict[str, float]:
    """Milliseconds of the pieces of a step, each alone, compiled as the step is, waited for."""
    model, weights, moments = backend._forward.config, backend._weights, backend._moments
    compiled = mx.compile if backend._forward.on_gpu else (lambda f: f)
    batch = sample_batch(tokens, train.batch_size, model.block_size, 1, 0)
    windows = backend._forward.windows(batch)
    few = backend._forward.windows(replace(batch, starts=batch.starts[:1], block_size=8))
    forward, both = compiled(backend._loss), backend._compiled_grads
    _, grads = both(weights, *windows, None)
    now = rates(train, 0, 1e-3)
    mx.eval(windows, few, grads, now)
    attention, head = alone(backend, train.batch_size, windows[1], compiled)
    update = (weights, moments, now, grads)
    found = {
        "forward": median_ms(lambda: mx.eval(forward(backend._named, *windows, None))),
        "forward_and_backward": median_ms(lambda: mx.eval(both(weights, *windows, None))),
        "optimizer": median_ms(lambda: mx.eval(backend._compiled_update(*update))),
        "attention": median_ms(attention),
        "head_and_loss": median_ms(head),
        "launches": median_ms(lambda: mx.eval(both(weights, *few, None))),  # 8 tokens: no work
    }
    return found | {"python": called_ms(backend, batch)}


def alone(
    backend: MLXBackend, b: int, y: mx.array, compiled: Callable[[Any], Any]
) -> tuple[Callable[[], None], Callable[[], None]]:
    """Attention of all layers, and head with loss, forward and backward, on random arrays."""
    model, dtype = backend._forward.config, backend._forward.dtype
    shape = (b, model.n_head, model.block_size, model.head_size)
    q, k, v = (mx.random.normal(shape, dtype) for _ in range(3))  # (B, H, T, D)
    x = mx.random.normal((b, model.block_size, model.n_embd), dtype)  # (B, T, C)
    w = mx.random.normal((model.vocab_size, model.n_embd), dtype)  # (V, C)

    def attend(q: mx.array, k: mx.array, v: mx.array) -> mx.array:
        scale = model.head_size**-0.5
        return mx.fast.scaled_dot_product_attention(q, k, v, scale=scale, mask="causal").sum()

    def loss(x: mx.array, w: mx.array) -> mx.array:
        return mx.fast.cross_entropy(x @ w.T, mx.maximum(y, 0)).mean()  # logits (B, T, V)

    attention = compiled(mx.value_and_grad(attend, argnums=(0, 1, 2)))
    head = compiled(mx.value_and_grad(loss, argnums=(0, 1)))
    mx.eval(q, k, v, x, w)
    layers = range(model.n_layer)
    return lambda: mx.eval([attention(q, k, v) for _ in layers]), lambda: mx.eval(head(x, w))


def called_ms(backend: MLXBackend, batch: Any) -> float:
    """How long Python needs for a step before the device is waited for."""
    times = []
    for _ in range(PROFILE_RUNS + 1):
        start = time.perf_counter()
        result = backend.train_step([batch], 1e-3)
        times.append(time.perf_counter() - start)
        _ = result.loss
    return 1e3 * statistics.median(times[1:])


def median_ms(run: Callable[[], object]) -> float:
    for _ in range(2):
        run()
    return 1e3 * statistics.median(timed(run) for _ in range(PROFILE_RUNS))


def decoding(options: argparse.Namespace) -> Found:
    """Tokens per second of 1, 32 and 256 streams: drawn as `mlxgpt sample` does, and the model
    alone, which reads the same token each time."""
    n = 5 if options.small else 100
    for case in (TINY,) if options.small else (DEFAULT, LARGE):
        model, train = case.settings()
        backend = built(model, train)
        for streams in (1, 32, 256):
            train = replace(train, batch_size=streams)
            found = measure_sampling(backend, model, train, n)
            cache, token = backend.new_cache(streams), np.zeros((streams, 1), np.int32)
            ms = [1e3 * timed(lambda: backend.logits(token, cache)) for _ in range(n)]  # noqa: B023
            yield "decoding", {
                "model": case.name, "streams": streams,
                "drawn_tokens_per_second": found.tokens_per_second, "drawn_ms": found.step_ms,
                "model_ms": statistics.median(ms),
                "model_tokens_per_second": 1e3 * streams / statistics.median(ms),
            }  # fmt: skip
