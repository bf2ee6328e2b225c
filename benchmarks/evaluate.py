"""`eval` beside PyTorch's eager forward: the mean loss of the same windows, in turns, medians.

    python benchmarks/evaluate.py [--preset small] [--windows 256] [--threads 1] [--turns 9]

Both compute the loss without gradients, in batches of 64 windows, with the same number of threads.
Needs the `bench` extra.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import nanogpt
import numpy as np
import torch
import torch.nn.functional as F
from turns import Runners, interleave, rows, show

from mlx_randygpt.backends.numpy.backend import NumpyBackend
from mlx_randygpt.config import ModelConfig, TrainConfig
from mlx_randygpt.data.windows import eval_batches
from mlx_randygpt.model import initial_state
from mlx_randygpt.recipes import PRESETS, RECIPES
from mlx_randygpt.state import Array

VOCAB, BATCH = 67, 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="small", choices=sorted(PRESETS))
    parser.add_argument("--windows", type=int, default=256)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--turns", type=int, default=9)
    options = parser.parse_args()
    preset = PRESETS[options.preset]
    size = options.windows * preset.block_size + 1
    tokens = np.random.default_rng(0).integers(0, VOCAB, size).astype(np.int32)
    runners: Runners = {
        recipe: ours(options.preset, recipe, tokens, options.threads) for recipe in sorted(RECIPES)
    }
    runners["torch eager"] = theirs(options.preset, tokens, options.threads)
    found = rows(interleave(runners, options.turns, 1), dict.fromkeys(runners, size - 1))
    show(f"{options.preset}, {options.windows} windows, {options.threads} threads", found)


def ours(preset_name: str, recipe: str, tokens: Array, n_threads: int) -> Callable[[], object]:
    preset = PRESETS[preset_name]
    model = ModelConfig(
        vocab_size=VOCAB, block_size=preset.block_size, n_layer=preset.n_layer,
        n_head=preset.n_head, n_embd=preset.n_embd, **RECIPES[recipe]["model"],
    )  # fmt: skip
    train = TrainConfig(recipe=recipe, threads=n_threads, **RECIPES[recipe]["train"])
    backend = NumpyBackend(model, train, initial_state(model, 1))
    return lambda: [backend.loss(b) for b in eval_batches(tokens, preset.block_size, BATCH)]


def theirs(preset_name: str, tokens: Array, n_threads: int) -> Callable[[], object]:
    preset = PRESETS[preset_name]
    sizes = (VOCAB, preset.block_size, preset.n_layer, preset.n_head, preset.n_embd)
    model = nanogpt.Model(*sizes).eval()

    @torch.inference_mode()
    def run() -> None:
        torch.set_num_threads(n_threads)
        for batch in eval_batches(tokens, preset.block_size, BATCH):
            logits = model(torch.from_numpy(batch.x()).long()).flatten(0, 1)
            targets = torch.from_numpy(batch.y()).long().flatten()
            float(F.cross_entropy(logits, targets, ignore_index=-1))

    return run


if __name__ == "__main__":
    main()
