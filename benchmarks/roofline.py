"""Where a NumPy step's time goes, beside what this machine can do: matrix rate and bandwidth.

    python benchmarks/roofline.py [--preset small] [--recipe modern] [--rows 16] [--steps 60]
                                  [--json FILE] [--counts]

One thread works through one chunk, forward and backward. Every operation and product is timed at
each call; a row is the best sum over one step. Products are set against the machine's rate for
large matrices, everything else against the rate at which it copies memory. `--counts` writes
counts.json instead: how often one step calls what, which a test holds.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from threadpoolctl import threadpool_limits
from turns import save, timed

from mlx_randygpt.backends.numpy import ops
from mlx_randygpt.backends.numpy.model import Chunk, flat_views
from mlx_randygpt.config import ModelConfig
from mlx_randygpt.model import flops_per_token, initial_params
from mlx_randygpt.recipes import PRESETS, RECIPES

VOCAB = 67
COUNTS = Path(__file__).parent / "counts.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="small", choices=sorted(PRESETS))
    parser.add_argument("--recipe", default="modern", choices=sorted(RECIPES))
    parser.add_argument("--rows", type=int, default=16, help="sequences of the chunk")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--counts", action="store_true", help="write counts.json")
    options = parser.parse_args()
    if options.counts:
        COUNTS.write_text(json.dumps(counts(), indent=1, sort_keys=True, ensure_ascii=False) + "\n")
        return
    threadpool_limits(1, user_api="blas")
    model = sized(options.preset, options.recipe)
    flops, bandwidth = matrix_rate(), copy_rate()
    seconds, found = measure(model, options.rows, options.steps)
    n_tokens = options.rows * model.block_size
    fraction = flops_per_token(model) * n_tokens / seconds / flops
    print(f"{flops / 1e9:.0f} GFLOP/s, {bandwidth / 1e9:.0f} GB/s copied, one thread")
    print(
        f"{options.preset}, {options.recipe}, {n_tokens} tokens: {1e3 * seconds:.1f} ms, ", end=""
    )
    print(f"{fraction:.2f} of the matrix rate")
    table = [row(name, *values, seconds, flops, bandwidth) for name, values in found.items()]
    rest = seconds - sum(values[0] for values in found.values())
    table.append({"operation": "sums and the rest", "share": rest / seconds, "us": 1e6 * rest})
    for line in sorted(table, key=lambda line: -line["share"]):
        reached = f"{line['of_machine']:5.0%} of {line['limit']}" if "limit" in line else ""
        print(f"{line['operation']:34} {line['us']:8.0f} us {line['share']:6.1%}  {reached}")
    save(options.json, settings=vars(options), flops=flops, bandwidth=bandwidth, rows=table)


def sized(preset_name: str, recipe: str) -> ModelConfig:
    preset = PRESETS[preset_name]
    return ModelConfig(
        vocab_size=VOCAB, block_size=preset.block_size, n_layer=preset.n_layer,
        n_head=preset.n_head, n_embd=preset.n_embd, **RECIPES[recipe]["model"],
    )  # fmt: skip


def counts() -> dict[str, dict[str, int]]:
    """Calls of each operation and product in one step of 1,024 tokens of `small`, by recipe."""
    found = {}
    for recipe in sorted(RECIPES):
        step = stepper(sized("small", recipe), 16)
        step()
        found[recipe] = {name: int(values[3]) for name, values in recorded(step).items()}
    return found


def matrix_rate() -> float:
    """FLOP/s of large float32 products on one thread, the best of ten."""
    x = np.ones((1024, 1024), np.float32)
    out = np.empty_like(x)
    return 2 * 1024**3 / min(timed(lambda: np.matmul(x, x, out=out)) for _ in range(10))


def copy_rate() -> float:
    """Bytes read and written a second in a copy that fits no cache, the best of ten."""
    x = np.ones(1 << 25, np.float32)
    out = np.empty_like(x)
    return 2 * x.nbytes / min(timed(lambda: np.copyto(out, x)) for _ in range(10))


def stepper(model: ModelConfig, n_rows: int) -> Callable[[], None]:
    """One chunk forward and backward, its gradients added to what is there."""
    random = np.random.default_rng(0)
    weights = initial_params(model, 1)
    chunk = Chunk(model, n_rows, model.block_size, *flat_views(model, np.float32))
    windows = random.integers(0, VOCAB, (n_rows, model.block_size + 1)).astype(np.int32)
    x, y = windows[:, :-1].copy(), windows[:, 1:].reshape(-1).copy()

    def step() -> None:
        chunk.accumulating = True
        chunk.head(weights, chunk.forward(weights, x, None), y, 1 / y.size)
        chunk.backward(weights, x, dropped=False)

    return step


def measure(
    model: ModelConfig, n_rows: int, n_steps: int
) -> tuple[float, dict[str, tuple[float, ...]]]:
    """The best seconds of a step, and of what `recorded` finds in it."""
    step = stepper(model, n_rows)
    step()
    seconds = min(timed(step) for _ in range(n_steps))
    best: dict[str, tuple[float, ...]] = {}
    for _ in range(n_steps):
        for name, values in recorded(step).items():
            best[name] = min(best.get(name, values), values)
    return seconds, best


def recorded(step: Callable[[], None]) -> dict[str, tuple[float, ...]]:
    """Sums over one step: seconds, FLOP of products, bytes of arguments, calls. What an operation
    calls itself counts as its own."""
    sums: dict[str, tuple[float, ...]] = defaultdict(lambda: (0.0, 0.0, 0.0, 0.0))
    inside: list[str] = []

    def watch(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def watched(*args: Any, **kwargs: Any) -> Any:
            if inside:
                return call(*args, **kwargs)
            inside.append(name)
            start = time.perf_counter()
            result = call(*args, **kwargs)
            seconds = time.perf_counter() - start
            inside.pop()
            arrays = [a for a in (*args, *kwargs.values()) if isinstance(a, np.ndarray)]
            key, flop = name, 0.0
            if name == "matmul":
                (m, k), n = args[0].shape, args[1].shape[1]
                key, flop = f"({m}, {k}) × ({k}, {n})", 2.0 * m * k * n
            amounts = (seconds, flop, float(sum(a.nbytes for a in arrays)), 1.0)
            sums[key] = tuple(a + b for a, b in zip(sums[key], amounts, strict=True))
            return result

        return watched

    names = [n for n in vars(ops) if getattr(ops, n) in operations()]
    plain = {name: getattr(ops, name) for name in names}
    matmul = np.matmul
    try:
        for name, call in plain.items():
            setattr(ops, name, watch(name, call))
        np.matmul = watch("matmul", matmul)  # type: ignore[assignment]
        step()
    finally:
        np.matmul = matmul
        for name, call in plain.items():
            setattr(ops, name, call)
    return dict(sums)


def operations() -> list[Any]:
    """The public functions of ops that a step calls."""
    functions = [f for f in vars(ops).values() if callable(f)]
    own = [f for f in functions if getattr(f, "__module__", "") == ops.__name__]
    return [f for f in own if not f.__name__.startswith("_") and f.__name__ != "heads"]


def row(
    name: str, seconds: float, flop: float, n_bytes: float, n_calls: float,
    total: float, flops: float, copied: float,
) -> dict[str, Any]:  # fmt: skip
    limit = ("the matrix rate", flop / flops) if flop else ("the copy rate", n_bytes / copied)
    return {
        "operation": name,
        "calls": int(n_calls),
        "us": 1e6 * seconds,
        "share": seconds / total,
        "limit": limit[0],
        "of_machine": limit[1] / seconds,
    }


if __name__ == "__main__":
    main()
