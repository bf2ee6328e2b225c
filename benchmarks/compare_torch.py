"""Training steps of the NumPy backend beside PyTorch: interleaved, medians, the ratio first.

    python benchmarks/compare_torch.py [--preset small] [--batch-size 64] [--recipe classic]
                                       [--steps 20] [--compiled] [--json FILE]

PyTorch always trains with AdamW (the cheaper optimizer); ours with the recipe's own, so `modern`
carries Muon's products in its time and PyTorch does not. Needs the `bench` extra.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from torch_gpt import TorchTrainer
from turns import Runners, interleave, rows, save, show

from mlx_randygpt.backends.numpy.backend import NumpyBackend, available_cores
from mlx_randygpt.config import ModelConfig, TrainConfig
from mlx_randygpt.model import initial_state
from mlx_randygpt.recipes import PRESETS, RECIPES
from mlx_randygpt.state import Batch


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="small", choices=sorted(PRESETS))
    for name in ("--n-layer", "--n-head", "--n-embd", "--block-size"):
        parser.add_argument(name, type=int, help="instead of the preset's")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--recipe", default="classic", choices=sorted(RECIPES))
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--in-a-row", type=int, default=5, help="steps of a turn")
    parser.add_argument("--compiled", action="store_true", help="also torch.compile")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()

    preset = PRESETS[options.preset]
    model = ModelConfig(
        vocab_size=67,
        block_size=options.block_size or preset.block_size,
        n_layer=options.n_layer or preset.n_layer,
        n_head=options.n_head or preset.n_head,
        n_embd=options.n_embd or preset.n_embd,
        **RECIPES[options.recipe]["model"],
    )  # fmt: skip
    train = TrainConfig(
        recipe=options.recipe, batch_size=options.batch_size, **RECIPES[options.recipe]["train"]
    )
    windows = np.random.default_rng(0).integers(0, 67, (options.batch_size, model.block_size + 1))
    runners = make_runners(model, train, windows, compiled=options.compiled)
    seconds = interleave(runners, max(1, options.steps // options.in_a_row), options.in_a_row)
    found = rows(seconds, dict.fromkeys(runners, options.batch_size * model.block_size))
    title = f"{model.n_layer} layers of {model.n_embd}, {options.recipe}, "
    title += f"batch {options.batch_size} × {model.block_size}"
    show(title, found)
    save(options.json, torch=torch.__version__, settings=vars(options), rows=found)


def make_runners(
    model: ModelConfig, train: TrainConfig, windows: np.ndarray, *, compiled: bool
) -> Runners:
    ours = NumpyBackend(model, train, initial_state(model, 1))
    torch.set_num_threads(available_cores())
    batch, x, y = (
        Batch.of(windows),
        *(torch.from_numpy(w.copy()) for w in (windows[:, :-1], windows[:, 1:])),
    )
    runners: Runners = {"numpy": lambda: ours.train_step([batch], 1e-3)}
    for name in ["torch eager"] + ["torch compiled"] * compiled:
        trainer = TorchTrainer(model, train, compiled=name.endswith("compiled"))
        runners[name] = lambda trainer=trainer: trainer.train_step(x, y)
    return runners


if __name__ == "__main__":
    main()
