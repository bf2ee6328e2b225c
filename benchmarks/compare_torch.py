"""Training steps of the NumPy backend beside PyTorch: interleaved, medians, the ratio first.

    python benchmarks/compare_torch.py [--preset small] [--batch-size 64] [--recipe classic]
                                       [--steps 20] [--compiled] [--json FILE]

PyTorch always trains with AdamW (the cheaper optimizer); ours with the recipe's own, so `modern`
carries Muon's products in its time and PyTorch does not. Needs the `bench` extra.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch_gpt import TorchTrainer

from mlx_randygpt.backends.numpy_backend import NumpyBackend, available_cores
from mlx_randygpt.config import PRESETS, RECIPES, ModelConfig, TrainConfig
from mlx_randygpt.state import Batch, TrainState, initial_params

TURN = 5  # steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="small", choices=sorted(PRESETS))
    parser.add_argument("--n-head", type=int, help="override the preset's heads")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--recipe", default="classic", choices=sorted(RECIPES))
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--compiled", action="store_true", help="also torch.compile")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()

    preset = PRESETS[options.preset]
    model = ModelConfig(
        vocab_size=67, block_size=preset.block_size, n_layer=preset.n_layer,
        n_head=options.n_head or preset.n_head, n_embd=preset.n_embd,
        **RECIPES[options.recipe]["model"],
    )  # fmt: skip
    train = TrainConfig(
        recipe=options.recipe, batch_size=options.batch_size, **RECIPES[options.recipe]["train"]
    )
    windows = np.random.default_rng(0).integers(0, 67, (options.batch_size, model.block_size + 1))
    runners = make_runners(model, train, windows, compiled=options.compiled)
    seconds = interleave(runners, options.steps)
    report(options, model, seconds)


def make_runners(
    model: ModelConfig, train: TrainConfig, windows: np.ndarray, *, compiled: bool
) -> dict[str, Callable[[], object]]:
    ours = NumpyBackend(model, train, TrainState(0, initial_params(model, 1), {}))
    torch.set_num_threads(available_cores())
    batch, x, y = (
        Batch.of(windows),
        *(torch.from_numpy(w.copy()) for w in (windows[:, :-1], windows[:, 1:])),
    )
    runners: dict[str, Callable[[], object]] = {"numpy": lambda: ours.train_step([batch], 1e-3)}
    for name in ["torch eager"] + ["torch compiled"] * compiled:
        trainer = TorchTrainer(model, train, compiled=name.endswith("compiled"))
        runners[name] = lambda trainer=trainer: trainer.train_step(x, y)
    return runners


def interleave(runners: dict[str, Callable[[], object]], steps: int) -> dict[str, list[float]]:
    """Seconds of a step, the median of each turn. The runners take turns of TURN steps, so that a
    slow spell hits all alike; the first step of a turn is not counted, for the threads of the one
    before may still be spinning and the caches hold its arrays."""
    for run in runners.values():
        for _ in range(3):
            run()
    seconds: dict[str, list[float]] = {name: [] for name in runners}
    for _ in range(max(1, steps // TURN)):
        for name, run in runners.items():
            run()
            seconds[name].append(statistics.median(timed(run) for _ in range(TURN)))
    return seconds


def timed(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def report(
    options: argparse.Namespace, model: ModelConfig, seconds: dict[str, list[float]]
) -> None:
    tokens = options.batch_size * model.block_size
    rows = {
        name: {
            "step_ms": round(1e3 * statistics.median(times), 2),
            "tokens_per_second": round(tokens / statistics.median(times)),
            "numpy_speed_ratio": round(
                statistics.median(t / n for t, n in zip(times, seconds["numpy"], strict=True)), 3
            ),
        }
        for name, times in seconds.items()
    }
    print(f"{options.preset}, {options.recipe}, batch {options.batch_size} × {model.block_size}")
    for name, row in rows.items():
        ratio = f"numpy is {row['numpy_speed_ratio']:.2f} × as fast" if name != "numpy" else ""
        print(f"{name:15} {row['step_ms']:8.1f} ms {row['tokens_per_second']:8,} tokens/s  {ratio}")
    if options.json:
        facts = {"machine": platform.processor() or platform.machine(), "cores": available_cores()}
        versions = {"numpy": np.__version__, "torch": torch.__version__}
        settings = {k: str(v) for k, v in vars(options).items() if v is not None}
        options.json.write_text(
            json.dumps({**facts, **versions, **settings, "rows": rows}, indent=1)
        )


if __name__ == "__main__":
    main()
