"""Peak memory of training beside PyTorch: each in a process of its own, the same sizes.

    python benchmarks/memory.py [--n-layer 6] [--n-head 6] [--n-embd 384] [--block-size 256]
                                [--batch-size 64] [--steps 2] [--json FILE]

Resident memory at its peak, less what the process held once its libraries were loaded. AdamW in
both, the classic model. Needs the `bench` extra.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
from pathlib import Path

from turns import save

SIZES = {"n_layer": 6, "n_head": 6, "n_embd": 384, "block_size": 256, "batch_size": 64, "steps": 2}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, value in SIZES.items():
        parser.add_argument("--" + name.replace("_", "-"), type=int, default=value)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--who", choices=["ours", "torch"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.who:
        print(json.dumps(measure(options)))
        return
    found = {}
    for who in ("ours", "torch"):
        command = [sys.executable, __file__, *sys.argv[1:], "--who", who]
        found[who] = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
        print(f"{who:6} {found[who]['used_mb']:8,.0f} MB, {found[who]['peak_mb']:,.0f} in all")
    ratio = found["ours"]["used_mb"] / found["torch"]["used_mb"]
    print(f"ours / torch: {ratio:.2f}")
    save(options.json, settings=vars(options), ratio=ratio, rows=found)


def measure(options: argparse.Namespace) -> dict[str, float]:
    import numpy as np
    import torch
    from torch_gpt import TorchTrainer

    from mlx_randygpt.backends.numpy.backend import NumpyBackend
    from mlx_randygpt.config import ModelConfig, TrainConfig
    from mlx_randygpt.model import initial_state
    from mlx_randygpt.recipes import RECIPES
    from mlx_randygpt.state import Batch

    model = ModelConfig(
        vocab_size=67, block_size=options.block_size, n_layer=options.n_layer,
        n_head=options.n_head, n_embd=options.n_embd, **RECIPES["classic"]["model"],
    )  # fmt: skip
    train = TrainConfig(recipe="classic", **RECIPES["classic"]["train"])
    shape = (options.batch_size, options.block_size + 1)
    windows = np.random.default_rng(0).integers(0, 67, shape)
    before = peak_mb()
    if options.who == "ours":
        backend = NumpyBackend(model, train, initial_state(model, 1))
        for _ in range(options.steps):
            backend.train_step([Batch.of(windows)], 1e-3)
    else:
        trainer = TorchTrainer(model, train, compiled=False)
        x, y = (torch.from_numpy(w.copy()) for w in (windows[:, :-1], windows[:, 1:]))
        for _ in range(options.steps):
            trainer.train_step(x, y)
    return {"peak_mb": peak_mb(), "used_mb": peak_mb() - before}


def peak_mb() -> float:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e6 if sys.platform == "darwin" else peak / 1e3


if __name__ == "__main__":
    main()
