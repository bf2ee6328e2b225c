"""How well a recipe learns: whole-validation loss after a budget of steps, for several seeds.

    python benchmarks/learning.py --data data/shakespeare.txt [--recipes classic modern]
        [--seeds 1337 1338 1339] [--steps 2000] [--batch-size 12] [--preset small4] [--n-head 4]
        [--backend numpy] [--json FILE]

The defaults are the sizes and the budget of nanoGPT's CPU recipe (0.80 M parameters, 2,000 steps
of 12 × 64 characters), which ends at 1.898 on tiny Shakespeare, measured the same way.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mlx_randygpt.backends import make_backend
from mlx_randygpt.cli import settings
from mlx_randygpt.config import PRESETS, RECIPES
from mlx_randygpt.data.corpus import encode_corpus, find_files, read_texts
from mlx_randygpt.evaluation import evaluate
from mlx_randygpt.reports import EvalLog
from mlx_randygpt.state import TrainState, initial_params
from mlx_randygpt.tokenizer import CharTokenizer
from mlx_randygpt.train import Run, train


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", nargs="+", required=True)
    parser.add_argument("--recipes", nargs="+", default=["classic", "modern"], choices=RECIPES)
    parser.add_argument("--seeds", nargs="+", type=int, default=[1337, 1338, 1339])
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--batch-size", type=int, default=12)
    parser.add_argument("--preset", default="small4", choices=PRESETS)
    parser.add_argument("--n-head", type=int, default=4)
    parser.add_argument("--backend", default="numpy")
    parser.add_argument("--set", nargs="*", default=[], metavar="NAME=VALUE", help="other settings")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()

    rows = []
    for recipe in options.recipes:
        runs = [one_run(options, recipe, seed) for seed in options.seeds]
        losses = [run["loss"] for run in runs]
        spread = statistics.stdev(losses) if len(losses) > 1 else 0.0
        rows.append({"recipe": recipe, "mean": statistics.mean(losses), "runs": runs})
        print(f"{recipe}: {rows[-1]['mean']:.4f} ± {spread:.4f} over {len(losses)} seeds")
    if options.json:
        settings_used = {k: str(v) for k, v in vars(options).items()}
        options.json.write_text(json.dumps({"settings": settings_used, "rows": rows}, indent=1))


def one_run(options: argparse.Namespace, recipe: str, seed: int) -> dict[str, Any]:
    texts = read_texts(find_files(options.data))
    tokenizer = CharTokenizer.train(texts.values())
    corpus = encode_corpus(texts, tokenizer)
    given = {
        "recipe": recipe, "preset": options.preset, "n_head": options.n_head, "seed": seed,
        "iters": options.steps, "batch_size": options.batch_size, "sample_every": 0,
        "prompt": "\n", **dict(parse(options.set)),
    }  # fmt: skip
    model, config = settings.fresh(given, tokenizer.vocab_size)
    state = TrainState(0, initial_params(model, seed), {})
    backend = make_backend(options.backend, model, config, state)
    started, curve = time.perf_counter(), {}
    for report in train(Run(model, config, tokenizer, corpus.train, corpus.val, {}), backend):
        if isinstance(report, EvalLog):
            curve[report.step] = report.val_loss
    seconds = time.perf_counter() - started
    score = evaluate(backend, corpus.val, model.block_size, 64, tokenizer.token_bytes())
    assert score is not None
    print(f"  {recipe} seed {seed}: {score.loss:.4f} in {seconds:.0f} s", flush=True)
    return {"seed": seed, "loss": score.loss, "seconds": seconds, "curve": curve}


def parse(pairs: list[str]) -> Iterator[tuple[str, Any]]:
    for pair in pairs:
        name, value = pair.split("=")
        yield name, json.loads(value)


if __name__ == "__main__":
    main()
