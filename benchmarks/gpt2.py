"""Fine-tuning a GPT-2 with the NumPy backend beside transformers in PyTorch: interleaved, medians.

    python benchmarks/gpt2.py [--preset gpt2] [--batch-size 2] [--block-size 256] [--turns 5]
                              [--json FILE]

Both hold the same random weights and take an AdamW step without dropout; the losses of the first
step are compared. Needs the `peers` extra.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from transformers import GPT2Config, GPT2LMHeadModel
from turns import Runners, interleave, rows, save, show

from mlx_randygpt.backends.numpy.backend import NumpyBackend, available_cores
from mlx_randygpt.config import ARCHS, ModelConfig, TrainConfig
from mlx_randygpt.model import in_out_names, initial_params
from mlx_randygpt.recipes import PRESETS, RECIPES
from mlx_randygpt.state import Batch, TrainState

VOCAB_SIZE, RATE = 50257, 1e-4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="gpt2", choices=sorted(PRESETS))
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--block-size", type=int, default=256)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()

    size, t = PRESETS[options.preset], options.block_size
    model = ModelConfig(VOCAB_SIZE, t, size.n_layer, size.n_head, size.n_embd, **ARCHS["gpt2"])
    windows = np.random.default_rng(0).integers(0, VOCAB_SIZE, (options.batch_size, t + 1))
    seconds = interleave(make_runners(model, windows), options.turns, 1)
    found = rows(seconds, dict.fromkeys(seconds, options.batch_size * t))
    show(f"GPT-2, preset {options.preset}, batch {options.batch_size} × {t}", found)
    save(options.json, torch=torch.__version__, settings=vars(options), rows=found)


def make_runners(model: ModelConfig, windows: np.ndarray) -> Runners:
    torch.set_num_threads(available_cores())
    params = initial_params(model, 1)
    train = TrainConfig(recipe="classic", **RECIPES["classic"]["train"])
    ours = NumpyBackend(model, train, TrainState(0, params, {}))
    batch = Batch.of(windows)

    peer = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=model.vocab_size, n_positions=model.block_size, n_embd=model.n_embd,
            n_layer=model.n_layer, n_head=model.n_head, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0,
        )
    )  # fmt: skip
    turned = in_out_names(model)
    named = {n: torch.from_numpy(w.T if n in turned else w) for n, w in params.items()}
    peer.transformer.load_state_dict(named, strict=False)
    optimizer = torch.optim.AdamW(
        peer.parameters(), lr=RATE, betas=(train.beta1, train.beta2), fused=True,
        weight_decay=train.weight_decay,
    )  # fmt: skip
    x, y = (torch.from_numpy(w.copy()) for w in (windows[:, :-1], windows[:, 1:]))

    def step() -> float:
        optimizer.zero_grad(set_to_none=True)
        logits = peer(x).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), y.flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(peer.parameters(), train.grad_clip)
        optimizer.step()
        return loss.item()

    same = abs(ours.loss(batch) - step())  # the loss is that of before the step
    assert same < 1e-3, f"the losses differ by {same}"
    return {"numpy": lambda: ours.train_step([batch], RATE), "transformers, eager": step}


if __name__ == "__main__":
    main()
