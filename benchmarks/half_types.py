"""What the types of --dtype cost in quality: the validation loss after the same steps in each.

    python benchmarks/half_types.py --data tinyshakespeare.txt [--steps 500] [--recipe modern]

Preset tiny with MLX, on whichever device it takes. On a CPU the half types take minutes.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np

from mlx_randygpt.backends.mlx.backend import MLXBackend
from mlx_randygpt.config import DTYPES
from mlx_randygpt.model import initial_state
from mlx_randygpt.recipes import RECIPES
from mlx_randygpt.settings import resolve_new
from mlx_randygpt.tokenizers.chars import CharTokenizer
from mlx_randygpt.training.evaluation import evaluate
from mlx_randygpt.training.loop import step_batches, step_rate


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--recipe", default="modern", choices=sorted(RECIPES))
    options = parser.parse_args()
    text = options.data.read_text()
    tokenizer = CharTokenizer.train(text)
    tokens = np.asarray(tokenizer.encode(text)).astype(np.uint16)
    n_train = len(tokens) * 9 // 10
    for dtype in DTYPES:
        given = {"preset": "tiny", "recipe": options.recipe, "iters": options.steps, "dtype": dtype}
        model, train = resolve_new(given, tokenizer.vocab_size)
        start, n_skipped = time.perf_counter(), 0
        backend = MLXBackend(model, train, initial_state(model, 1))
        for step in range(options.steps):
            batches = step_batches(train, tokens[:n_train], model.block_size, step)
            result = backend.train_step(batches, step_rate(train, step))
            n_skipped += not np.isfinite(result.grad_norm)
        score = evaluate(backend, tokens[n_train:], model.block_size, 256, tokenizer.token_bytes())
        assert score is not None
        seconds = time.perf_counter() - start
        print(f"{dtype:9} {score.loss:.4f}, {n_skipped} skipped, {seconds:.0f} s", flush=True)


if __name__ == "__main__":
    main()
